// What happens to a sequence between admission and its end.
#include <algorithm>
#include <cassert>

#include "cache.h"

namespace tokenspeed::cache {

std::map<RequestId, Cache::Request>::iterator Cache::find_sequence(RequestId id) {
    auto it = requests_.find(id);
    return it != requests_.end() && it->second.role == Role::kSequence ? it : requests_.end();
}

NodeId Cache::root_of(std::string_view name_space) {
    auto found = roots_.find(name_space);
    if (found != roots_.end()) return found->second;
    return roots_.emplace(name_space, tree_.create_root()).first->second;
}

void Cache::take_page(Request& request) {
    PageId id = pages_.take();
    pages_.set_writer(id, true);
    request.pages.push_back(id);
}

NodeId Cache::locked_node(const Request& request) const {
    return request.published > 0 ? request.path[request.published - 1] : request.root;
}

NodeId Cache::kept_node(const Request& request) const {
    return request.path.empty() ? request.root : request.path.back();
}

// Nodes for the first `full_pages` pages of the sequence. Those it has not published are ghosts, or another's.
void Cache::grow_path(Request& request, Tokens tokens, int32_t full_pages) {
    if (static_cast<int32_t>(request.path.size()) >= full_pages) return;
    NodeId kept = kept_node(request), node = kept;
    while (static_cast<int32_t>(request.path.size()) < full_pages) {
        node = tree_.insert(node, tokens.data() + request.path.size() * config_.page_tokens, config_.page_tokens);
        request.path.push_back(node);
    }
    keep(node);
    unkeep(kept);
}

NodeId Cache::node_before(const Request& request, int32_t count) const {
    int32_t full = count / config_.page_tokens;
    return full > 0 ? request.path[full - 1] : request.root;
}

NodeId Cache::find_snapshot_node(const Request& request, Tokens tokens, int32_t count) const {
    NodeId before = node_before(request, count);
    int32_t rows = count % config_.page_tokens;
    return rows == 0 ? before : tree_.find(before, tokens.data() + count - rows, rows);
}

NodeId Cache::snapshot_node(Request& request, Tokens tokens, int32_t count) {
    NodeId before = node_before(request, count);
    int32_t rows = count % config_.page_tokens;
    return rows == 0 ? before : tree_.insert(before, tokens.data() + count - rows, rows);
}

void Cache::add_promise(Request& request, int32_t tokens, NodeId node, Kind kind, SlotRef slot) {
    if (node != kNoNode) {
        keep(node);
        ++tree_[node].promises;
    }
    request.promised.push_back({tokens, node, kind, std::move(slot)});
    ++promised_;
    ++counters_.snapshots_promised;
}

void Cache::drop_promise(const Promised& promised) {
    --promised_;
    if (promised.node == kNoNode) return;
    --tree_[promised.node].promises;
    unkeep(promised.node);
}

Result<std::span<const PageId>> Cache::extend(RequestId id, int32_t count) {
    auto it = find_sequence(id);
    if (it == requests_.end()) return Error::kUnknownRequest;
    Request& request = it->second;
    const int32_t held = static_cast<int32_t>(request.pages.size());
    const int32_t fresh = pages_for(count) - held;
    if (fresh <= 0) return std::span<const PageId>{};
    if (pages_for(count) > config_.pages) return Error::kTooLarge;
    if (auto missing = make_room(fresh, 0)) {
        ++counters_.no_room;
        return *missing;
    }
    while (static_cast<int32_t>(request.pages.size()) < held + fresh) take_page(request);
    trim_ghosts();
    return std::span<const PageId>(request.pages).subspan(held);
}

std::optional<Error> Cache::validate(RequestId id, Tokens tokens, int32_t count) const {
    auto it = requests_.find(id);
    if (it == requests_.end() || it->second.role != Role::kSequence) return Error::kUnknownRequest;
    if (it->second.move != 0) return Error::kMoving;
    if (count < it->second.committed) return Error::kBackwards;
    if (count > static_cast<int64_t>(tokens.size())) return Error::kTokensMissing;
    if (pages_for(count) > static_cast<int64_t>(it->second.pages.size())) return Error::kBeyondPages;
    return std::nullopt;
}

Result<Done> Cache::commit(RequestId id, Tokens tokens, int32_t count) {
    if (auto error = validate(id, tokens, count)) return *error;
    Request& request = requests_.find(id)->second;
    publish(request, tokens, count);
    trim_ghosts();
    return Done{};
}

void Cache::publish(Request& request, Tokens tokens, int32_t count) {
    if (count > request.resume) release_source(request);
    request.committed = count;
    const int32_t full = config_.enabled ? count / config_.page_tokens : 0;
    if (full > request.published) {
        grow_path(request, tokens, full);
        NodeId locked = locked_node(request);
        for (; request.published < full; ++request.published) {
            NodeId node = request.path[request.published];
            // Another sequence may have published the same tokens first; then ours stays private.
            if (!tree_[node].resident()) {
                make_resident(node, request.pages[request.published]);
                announce(node, request.root);
            }
            request.duplicates += tree_[node].page != request.pages[request.published];
        }
        lock(locked_node(request));
        unlock(locked);
    }
    size_t passed = 0;
    for (; passed < request.promised.size() && request.promised[passed].tokens <= count; ++passed) {
        Promised& promised = request.promised[passed];
        if (promised.node != kNoNode)
            publish_snapshot(request, promised.node, std::move(promised.slot), promised.kind,
                             counters_.snapshots_published);
        drop_promise(promised);
    }
    request.promised.erase(request.promised.begin(), request.promised.begin() + passed);
}

void Cache::publish_snapshot(Request& request, NodeId id, SlotRef slot, Kind kind, int64_t& counter) {
    const Node& node = tree_[id];
    if (node.state || tree_[request.root].cleared) {
        ++counters_.snapshots_redundant;
        return;
    }
    if (!node.resident()) {  // a tail: refer to the rows where they are, copy nothing
        NodeId longer = tree_.resident_extension(node.parent, tree_.tokens(id), node.length);
        make_resident(
            id, longer != kNoNode ? tree_[longer].page : request.pages[(node.end - node.length) / config_.page_tokens]);
    }
    if (node.has_snapshot())
        snapshots_.attach(tree_, id, std::move(slot));
    else
        snapshots_.add(tree_, id, kind, request.admission, std::move(slot));
    refresh(id);
    ++counter;
}

Result<Fork> Cache::fork(RequestId parent_id, RequestId child_id, Tokens tokens, int32_t count) {
    if (requests_.contains(child_id)) return Error::kDuplicateRequest;
    if (auto error = validate(parent_id, tokens, count)) return *error;
    if (count == 0) return Error::kEmptyPrompt;
    Request& parent = requests_.find(parent_id)->second;
    const int32_t page = config_.page_tokens, full = count / page, rows = count % page;

    // The state at `count`: a promised snapshot there, or the working slot itself, which then becomes one.
    auto promised = std::ranges::find(parent.promised, count, &Promised::tokens);
    const bool convert = promised == parent.promised.end();
    if (auto missing = make_room(1, convert ? 2 : 1)) {
        ++counters_.no_room;
        return *missing;
    }
    Fork result;
    Request child;
    if (convert) {
        NodeId node = kNoNode;
        if (config_.enabled) {
            grow_path(parent, tokens, full);
            node = snapshot_node(parent, tokens, count);
        }
        result.parent_read = parent.working.id();
        child.source_slot = parent.working.share();
        SlotRef state = std::move(parent.working);
        parent.working = slots_.take();
        add_promise(parent, count, node, Kind::kBoundary, std::move(state));
        std::ranges::sort(parent.promised, {}, &Promised::tokens);
    } else {
        child.source_slot = promised->slot.share();
        result.parent_read = parent.working.id();
    }
    result.parent_write = parent.working.id();

    child.root = parent.root;
    if (config_.enabled) {
        child.path.assign(parent.path.begin(), parent.path.begin() + full);
        child.published = std::min(parent.published, full);
        for (int32_t i = 0; i < child.published; ++i) child.duplicates += tree_[child.path[i]].page != parent.pages[i];
        lock(locked_node(child));
        keep(kept_node(child));
    }
    child.admission = parent.admission;
    child.resume = child.committed = count;
    child.writes_from = full;
    // The child relies on rows that may not be published yet: should the parent be aborted, nobody may append over
    // them.
    for (int32_t i = 0; i < full; ++i) {
        pages_.add(parent.pages[i], true);
        pages_.raise_fill(parent.pages[i], page);
        child.pages.push_back(parent.pages[i]);
    }
    take_page(child);
    child.working = slots_.take();
    if (rows > 0) {
        child.source_page = parent.pages[full];
        pages_.add(child.source_page, true);
        result.child.copies.push_back({child.source_page, child.pages[full], rows});
        ++counters_.page_copies;
    }
    result.child.match = {
        .known_tokens = count, .kv_tokens = count, .state_tokens = count, .reason = Reason::kNewTokens};
    result.child.pages = child.pages;
    result.child.read_slot = child.source_slot.id();
    result.child.write_slot = child.working.id();
    requests_.emplace(child_id, std::move(child));
    publish(parent, tokens, parent.committed);  // a state at what is committed already is a snapshot now
    trim_ghosts();
    ++counters_.forks;
    return result;
}

void Cache::release_source(Request& request) {
    if (request.source != kNoNode) unlock(std::exchange(request.source, kNoNode));
    request.source_slot.reset();
    request.host_slot.reset();
    if (request.host_source != kNoNode) {
        host_drop(request.host_source);
        unkeep(std::exchange(request.host_source, kNoNode));
    }
    if (request.source_page >= 0) pages_.remove(std::exchange(request.source_page, -1), true);
}

Result<Done> Cache::finish(RequestId id, Tokens tokens, int32_t count, bool donate) {
    if (auto error = validate(id, tokens, count)) return *error;
    auto it = requests_.find(id);
    Request& request = it->second;
    publish(request, tokens, count);
    if (config_.enabled && count > 0) {
        // Also when no state is kept: the tokens say where a later prompt diverges.
        NodeId node = snapshot_node(request, tokens, count);
        refresh(node);
        // Before its first step the working slot holds nothing.
        if (donate && count > request.resume)
            publish_snapshot(request, node, std::move(request.working), Kind::kEnd, counters_.snapshots_donated);
    }
    ++counters_.finished;
    release(it);
    return Done{};
}

Result<Done> Cache::abort(RequestId id) {
    auto it = find_sequence(id);
    if (it == requests_.end()) return Error::kUnknownRequest;
    if (it->second.move != 0) return Error::kMoving;
    ++counters_.aborted;
    release(it);
    return Done{};
}

void Cache::release(std::map<RequestId, Request>::iterator it) {
    Request request = std::move(it->second);
    requests_.erase(it);
    release_source(request);
    for (const Promised& promised : request.promised) drop_promise(promised);
    request.promised.clear();
    for (size_t i = 0; i < request.pages.size(); ++i) {
        if (static_cast<int32_t>(i) >= request.writes_from) pages_.set_writer(request.pages[i], false);
        pages_.remove(request.pages[i], true);
    }
    if (!config_.enabled) return;
    unlock(locked_node(request));
    unkeep(kept_node(request));
    if (tree_[request.root].cleared) purge(request.root);
    forget_if_empty(request.root);
    trim_ghosts();
}

}  // namespace tokenspeed::cache
