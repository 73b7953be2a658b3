// Prefixes that come from another engine, and prefixes that one reads here.
#include <algorithm>

#include "cache.h"

namespace tokenspeed::cache {

std::optional<Error> Cache::validate_transfer(RequestId id, Tokens tokens) const {
    if (!config_.enabled) return Error::kDisabled;
    if (requests_.contains(id)) return Error::kDuplicateRequest;
    if (tokens.empty()) return Error::kEmptyPrompt;
    return std::nullopt;
}

// A reception is a sequence that computes nothing: its one promised snapshot is the state that comes.
Result<Reception> Cache::receive(RequestId id, std::string_view name_space, Tokens tokens) {
    if (auto error = validate_transfer(id, tokens)) return *error;
    const int32_t page = config_.page_tokens, count = static_cast<int32_t>(tokens.size()), total = pages_for(count);
    if (total > config_.pages || config_.slots < 1) return Error::kTooLarge;

    Request request{.role = Role::kReception, .root = root_of(name_space)};
    Walk found = walk(request.root, tokens, {count, false}, &request.path);
    request.path.resize(found.shared);
    NodeId standing = found.shared > 0 ? request.path.back() : request.root;
    lock(standing);
    if (auto missing = make_room(total - found.shared, 1)) {
        unlock(standing);
        forget_if_empty(request.root);
        ++counters_.no_room;
        return *missing;
    }
    request.published = request.writes_from = found.shared;
    request.committed = std::min(found.shared * page, count - 1);
    for (NodeId node : request.path) {
        request.pages.push_back(tree_[node].page);
        pages_.add(tree_[node].page, true);
    }
    while (static_cast<int32_t>(request.pages.size()) < total) take_page(request);
    keep(kept_node(request));
    grow_path(request, tokens, count / page);
    add_promise(request, count, snapshot_node(request, tokens, count), Kind::kBoundary, slots_.take());

    trim_ghosts();
    Reception reception{found.shared * page, request.pages, request.promised[0].slot.id()};
    counters_.received_tokens += count - found.shared * page;
    requests_.emplace(id, std::move(request));
    return reception;
}

Result<Done> Cache::received(RequestId id) {
    auto it = requests_.find(id);
    if (it == requests_.end() || it->second.role != Role::kReception) return Error::kUnknownRequest;
    Request& request = it->second;
    const int32_t count = request.promised[0].tokens;
    const NodeId node = request.promised[0].node;
    Request pinned{.role = Role::kPin, .root = request.root};
    publish(request, {}, count);  // its nodes are there since it was reserved
    lock(pinned.root);
    keep(pinned.root);
    if (tree_[node].state) {  // else its namespace was cleared
        pinned.source = node;
        lock(node);
        pinned.source_slot = snapshots_[tree_[node].snapshot].slot.share();
    }
    release(it);
    requests_.emplace(id, std::move(pinned));
    ++counters_.received;
    return Done{};
}

Result<Loan> Cache::lend(RequestId id, std::string_view name_space, Tokens tokens) {
    if (auto error = validate_transfer(id, tokens)) return *error;
    const auto count = static_cast<int32_t>(tokens.size());
    Request request{.role = Role::kPin, .root = root_of(name_space)};
    Walk found = walk(request.root, tokens, {count, true, false}, &request.path);
    request.path.resize(found.shared);
    request.published = request.writes_from = found.shared;
    request.committed = found.shared * config_.page_tokens;
    lock(locked_node(request));
    keep(kept_node(request));
    for (NodeId node : request.path) {
        request.pages.push_back(tree_[node].page);
        pages_.add(tree_[node].page, true);
    }
    Loan loan{found.match.kv_tokens, found.match.state_tokens, request.pages, -1};
    if (found.snapshot != kNoNode) {
        request.source = found.snapshot;
        lock(request.source);
        request.source_slot = snapshots_[tree_[request.source].snapshot].slot.share();
        loan.slot = request.source_slot.id();
        if (loan.kv_tokens > request.committed) {
            request.source_page = tree_[request.source].page;
            pages_.add(request.source_page, true);
            loan.pages.push_back(request.source_page);
        }
    }
    requests_.emplace(id, std::move(request));
    ++counters_.lent;
    return loan;
}

Result<Done> Cache::release(RequestId id) {
    auto it = requests_.find(id);
    if (it == requests_.end() || it->second.role == Role::kSequence) return Error::kUnknownRequest;
    release(it);
    return Done{};
}

}  // namespace tokenspeed::cache
