// Admission: match, pin, make room, allot, promise snapshots.
#include <algorithm>
#include <cassert>
#include <utility>

#include "cache.h"

namespace tokenspeed::cache {

std::unique_ptr<Cache> Cache::create(const Config& config) {
    bool possible = config.pages >= 0 && config.slots >= 0 && config.host_pages >= 0 && config.host_slots >= 0 &&
                    config.page_tokens >= 2 && config.page_tokens <= 128 && config.ghost_nodes >= 0 &&
                    config.grid_tokens >= 0;
    return std::unique_ptr<Cache>(possible ? new Cache(config) : nullptr);
}

Cache::Cache(const Config& config)
    : config_(config),
      tree_(config.page_tokens),
      pages_(config.pages),
      slots_(config.slots),
      host_pages_(config.host_pages),
      host_slots_(config.host_slots),
      snapshots_(config.policy),
      idle_(ListName::kIdle),
      ghosts_(ListName::kGhosts) {}

Result<Admission> Cache::admit(RequestId id, std::string_view name_space, Tokens prompt,
                               std::span<const int32_t> boundaries, bool prompt_logprobs) {
    const int32_t page = config_.page_tokens;
    if (requests_.contains(id)) return Error::kDuplicateRequest;
    if (prompt.empty()) return Error::kEmptyPrompt;
    const int64_t total = static_cast<int64_t>(prompt.size() / page) + 1;  // prompt + one token
    if (total > config_.pages || config_.slots < 1) return Error::kTooLarge;

    Request request;
    if (config_.enabled) request.root = root_of(name_space);
    const auto cap = static_cast<int32_t>(prompt.size()) - 1;  // some token must give logits
    Walk found = walk(request.root, prompt, {cap, !prompt_logprobs}, &request.path);
    Room room = reserve(request, found, static_cast<int32_t>(total));
    if (room.missing && found.snapshot != kNoNode && requests_.empty()) {
        // The pinned page or slot of the snapshot itself is in the way, and nobody will ever make room.
        found = walk(request.root, prompt, {cap, false}, &request.path);
        found.match.reason = Reason::kTightMemory;
        room = reserve(request, found, static_cast<int32_t>(total));
    }
    if (room.missing) {
        if (config_.enabled) forget_if_empty(request.root);
        ++counters_.no_room;
        return *room.missing;
    }
    Admission admission;
    admission.match = found.match;
    const int32_t resume = found.match.state_tokens;
    const PageId partial = room.partial;
    snapshots_.tick();
    if (found.lost != kNoNode) {
        Node& lost = tree_[found.lost];
        snapshots_.missed(lost, static_cast<int32_t>(lost.end) - resume);
    }

    if (room.consume) {
        request.working = take_state(request.source);
        request.source_slot.reset();
        ++counters_.snapshots_consumed;
        admission.read_slot = request.working.id();
    } else {
        request.working = slots_.take();
        admission.read_slot = request.source_slot.id();
        if (request.source != kNoNode) snapshots_.hit(tree_, request.source);
    }
    counters_.snapshot_hits += resume > 0;
    admission.write_slot = request.working.id();

    request.pages.reserve(total);
    for (NodeId node : request.path) {
        request.pages.push_back(tree_[node].page);
        pages_.add(tree_[node].page, true);
    }
    request.writes_from = found.shared;
    if (room.append) {
        pages_.add(partial, true);
        pages_.set_writer(partial, true);
        request.pages.push_back(partial);
        ++counters_.pages_appended_in_place;
    }
    while (static_cast<int64_t>(request.pages.size()) < total) take_page(request);
    if (partial >= 0 && !room.append) {
        admission.copies.push_back({partial, request.pages[found.shared], resume % page});
        ++counters_.page_copies;
    }
    request.admission = snapshots_.now();
    request.resume = request.committed = resume;
    request.published = found.shared;
    if (config_.enabled) {
        keep(kept_node(request));
        grow_path(request, prompt, static_cast<int32_t>(prompt.size() / page));
        if (found.host != kNoNode) bring_back(request, admission, found);
        promise_snapshots(request, prompt, boundaries, found);
    }

    trim_ghosts();
    admission.pages = request.pages;
    for (const Promised& promised : request.promised)
        if (promised.tokens > resume) admission.snapshots.push_back({promised.tokens, promised.slot.id()});
    ++counters_.admissions;
    const auto length = static_cast<int32_t>(prompt.size());
    counters_.prompt_tokens += length;
    counters_.cached_tokens += resume;
    counters_.known_tokens += std::min(found.match.known_tokens, length - 1);
    counters_.kv_matched_tokens += found.match.kv_tokens;
    counters_.recomputed_matched_tokens += found.match.kv_tokens - resume;
    requests_.emplace(id, std::move(request));
    return admission;
}

// Pins the match, so that making room cannot take it, and makes room for the rest. Without room nothing stays pinned.
Cache::Room Cache::reserve(Request& request, const Walk& found, int32_t total) {
    const int32_t page = config_.page_tokens, resume = found.match.state_tokens;
    request.path.resize(found.shared);
    NodeId standing = found.shared > 0 ? request.path.back() : request.root;
    lock(standing);
    if (found.snapshot != kNoNode) {
        request.source = found.snapshot;
        lock(request.source);
        request.source_slot = snapshots_[tree_[request.source].snapshot].slot.share();
    }
    if (found.host != kNoNode) {
        request.host_source = found.host;
        host_use(found.host);
        keep(found.host);
        request.host_slot = snapshots_[tree_[found.host].snapshot].host_slot.share();
    }

    Room room;
    if (found.match.kv_tokens > found.shared * page &&
        found.host == kNoNode) {  // resume inside a page: its first rows are needed
        // Rows from the fill on may be appended by one sequence; a page nobody writes or filled further is taken over.
        room.partial = tree_[request.source].page;
        room.append = !pages_.has_writer(room.partial) && pages_.fill(room.partial) == resume % page;
    }
    const int32_t fresh = total - found.shared - room.append;
    room.missing = make_room(fresh, 1);
    if (room.missing && request.source_slot && slots_.references(request.source_slot.id()) == 2) {
        room.consume = true;  // nobody else uses the snapshot: go on in its slot
        room.missing = make_room(fresh, 0);
    }
    if (room.missing) {
        release_source(request);
        unlock(standing);
        request.path.clear();
    }
    return room;
}

// What the sequence resumes from comes from host memory, into its own pages and, where a slot can be had, into a slot
// that becomes a snapshot again; else into its working slot.
void Cache::bring_back(Request& request, Admission& admission, const Walk& found) {
    const int32_t page = config_.page_tokens, resume = request.resume;
    request.committed = std::min(found.shared * page, resume - 1);
    const Snapshots::Record& record = snapshots_[tree_[found.host].snapshot];
    const Kind kind = record.kind;
    if (tree_[found.host].promises == 0)
        if (auto slot = optional_slot(found.match.moved_tokens, kind)) {
            request.source_slot = slot->share();
            add_promise(request, resume, found.host, kind, std::move(*slot));
        }
    admission.read_slot = request.source_slot ? request.source_slot.id() : request.working.id();
    Move move{++last_move_, false, {}, request.host_slot.id(), admission.read_slot};
    for (NodeId id = found.host; tree_[id].parent != kNoNode; id = tree_[id].parent) {
        const int32_t index = (static_cast<int32_t>(tree_[id].end) - 1) / page;
        if (index < found.shared) break;
        move.pages.emplace_back(tree_[id].host_page, request.pages[index]);
    }
    std::ranges::reverse(move.pages);
    snapshots_.hit(tree_, found.host);
    request.move = admission.move = move.id;
    request.move_seconds = seconds_to_move(static_cast<int32_t>(move.pages.size()));
    ++counters_.moved_in;
    counters_.moved_in_pages += static_cast<int64_t>(move.pages.size());
    counters_.moved_in_tokens += found.match.moved_tokens;
    moves_.push_back(std::move(move));
}

void Cache::promise_snapshots(Request& request, Tokens prompt, std::span<const int32_t> boundaries, const Walk& found) {
    const auto length = static_cast<int32_t>(prompt.size());
    struct Candidate {
        int32_t tokens;
        Kind kind;
    };
    std::vector<Candidate> candidates;
    // Where this prompt leaves what is known, somebody else went on differently.
    const int32_t known = found.match.known_tokens;
    if (config_.branch_points && known < length) candidates.push_back({known, Kind::kBranch});
    for (int32_t tokens : boundaries) candidates.push_back({tokens, Kind::kBoundary});
    if (config_.grid_tokens > 0)
        for (int64_t at = config_.grid_tokens; at <= length; at += config_.grid_tokens)
            candidates.push_back({static_cast<int32_t>(at), Kind::kGrid});
    std::ranges::stable_sort(candidates, {}, &Candidate::tokens);  // of equals the stronger reason comes first

    int32_t previous = request.resume;
    for (auto [tokens, kind] : candidates) {
        if (tokens <= previous || tokens > length) continue;
        // A branch point a few tokens beyond a promised boundary (two texts that begin alike) is not worth a slot.
        if (kind == Kind::kBranch && tokens - previous < config_.page_tokens / 4) continue;
        if (NodeId existing = find_snapshot_node(request, prompt, tokens);
            existing != kNoNode && (tree_[existing].state || tree_[existing].promises > 0)) {
            previous = tokens;
            continue;
        }
        std::optional<SlotRef> slot = optional_slot(tokens - previous, kind);
        if (!slot) {
            if (kind == Kind::kGrid) continue;
            ++counters_.snapshots_declined;
            NodeId node =
                snapshot_node(request, prompt, tokens);  // remembered, to learn whether it would have been used
            if (!tree_[node].has_snapshot()) snapshots_.declined(tree_[node]);
            refresh(node);
            continue;
        }
        NodeId node = snapshot_node(request, prompt, tokens);
        add_promise(request, tokens, node, kind, std::move(*slot));
        previous = tokens;
    }
}

// A slot for a snapshot that would be nice to have: free, or taken from one that ranks lower. Half of all slots stay
// out of reach of promises, because a promised slot cannot be evicted; the grid takes only free ones, and leaves half of
// them.
std::optional<SlotRef> Cache::optional_slot(int32_t gain, Kind kind) {
    if (promised_ + 1 > slots_.size() / 2) return std::nullopt;
    const double mine = snapshots_.score(gain, kind);
    if (kind == Kind::kGrid && slots_.free() <= slots_.size() / 2) return std::nullopt;
    if (slots_.free() == 0) {
        std::optional<Victim> victim = weakest(Resource::kSlots);
        if (!victim || (config_.policy == Policy::kValue && victim->score >= mine)) return std::nullopt;
        evict_snapshot(victim->node);
    }
    return slots_.take();
}

}  // namespace tokenspeed::cache
