// Host memory: what is copied there before the device lets it go, and what comes back.
#include <algorithm>
#include <cassert>
#include <utility>

#include "cache.h"

namespace tokenspeed::cache {

namespace {

constexpr size_t kMaxOutgoing = 4;  // units under way to host memory at once
constexpr int32_t kReserve = 4;     // one in so many pages is to be free, one in so many slots free or saved

}  // namespace

// A host page is there while a host snapshot or a move needs it. Only the first use of a node climbs further.
void Cache::host_use(NodeId id) {
    for (; id != kNoNode && tree_[id].host_uses++ == 0; id = tree_[id].parent) refresh(id);
}

void Cache::host_drop(NodeId id) {
    for (; id != kNoNode && --tree_[id].host_uses == 0; id = tree_[id].parent) {
        if (tree_[id].host_page >= 0) host_pages_.remove(std::exchange(tree_[id].host_page, -1), true);
        refresh(id);
    }
}

std::vector<Move> Cache::take_moves() {
    if (config_.host_slots > 0) save_ahead();
    trim_ghosts();
    return std::exchange(moves_, {});
}

// The weakest snapshots are copied first: they are the next to go. What host memory refuses, being weaker than all that
// would have to make room, ends with its eviction, unless it is used before.
void Cache::save_ahead() {
    while (outgoing_.size() < kMaxOutgoing && scarce()) {
        std::optional<NodeId> node = weakest_unsaved();
        if (!node) return;
        if (!save(*node)) snapshots_[tree_[*node].snapshot].refused = true;
    }
}

// Whether the next prompts may have to evict what has no copy in host memory. How many pages a unit would free is known
// only when it goes, so under pressure for pages every unit is saved.
bool Cache::scarce() const {
    if (pages_.free() + idle_.size() < config_.pages / kReserve) return true;
    int32_t slots = slots_.free();
    for (const auto& record : snapshots_.records())
        slots += record.slot.unique() && (record.host_slot || record.move != 0);
    return slots < config_.slots / kReserve + 1;
}

std::optional<NodeId> Cache::weakest_unsaved() const {
    const Snapshots::Record* weakest = nullptr;
    for (const auto& record : snapshots_.records()) {
        if (!record.slot || record.host_slot || record.move != 0 || record.refused) continue;
        if (weakest && !snapshots_.weaker(record, *weakest)) continue;
        // What another move is about to bring there is not copied twice.
        auto shares = [&](const Outgoing& move) {
            return !move.nodes.empty() && tree_.is_prefix(move.nodes[0], record.node);
        };
        if (std::ranges::none_of(outgoing_, shares)) weakest = &record;
    }
    return weakest ? std::optional(weakest->node) : std::nullopt;
}

const Snapshots::Record* Cache::weakest_on_host() const {
    const Snapshots::Record* weakest = nullptr;
    for (const auto& record : snapshots_.records())
        if (record.host_slot.unique() && (!weakest || snapshots_.weaker(record, *weakest))) weakest = &record;
    return weakest;
}

bool Cache::save(NodeId id) {
    Outgoing outgoing{last_move_ + 1, id, id, {}, {}, {}};
    for (NodeId& base = outgoing.base; tree_[base].host_page < 0 && tree_[base].parent != kNoNode;
         base = tree_[base].parent)
        outgoing.nodes.push_back(base);
    std::ranges::reverse(outgoing.nodes);
    host_use(outgoing.base);
    if (!make_host_room(snapshots_[tree_[id].snapshot], static_cast<int32_t>(outgoing.nodes.size()))) {
        host_drop(outgoing.base);
        return false;
    }
    Snapshots::Record& record = snapshots_[tree_[id].snapshot];
    outgoing.slot = host_slots_.take();
    record.move = ++last_move_;
    Move move{record.move, true, {}, record.slot.id(), outgoing.slot.id()};
    for (NodeId node : outgoing.nodes) {
        tree_[node].leaving = true;
        outgoing.pages.push_back(host_pages_.take());
        move.pages.emplace_back(tree_[node].page, outgoing.pages.back());
    }
    outgoing_.push_back(std::move(outgoing));
    moves_.push_back(std::move(move));
    return true;
}

// Host memory lets go of what is weaker than the newcomer, and of nothing else.
bool Cache::make_host_room(const Snapshots::Record& record, int32_t pages) {
    const NodeId newcomer = record.node;
    while (host_slots_.free() < 1 || host_pages_.free() < pages) {
        const Snapshots::Record* weakest = weakest_on_host();
        if (!weakest || !snapshots_.weaker(*weakest, snapshots_[tree_[newcomer].snapshot])) return false;
        evict_host(weakest->node);
    }
    return true;
}

void Cache::evict_host(NodeId id) {
    snapshots_[tree_[id].snapshot].host_slot.reset();
    if (!tree_[id].state) snapshots_.remove(tree_, id);
    host_drop(id);
    ++counters_.host_evicted;
}

// What a move out was told to copy is about to change: its bytes are of no use.
void Cache::make_void(Snapshots::Record& record) {
    auto move = std::ranges::find(outgoing_, std::exchange(record.move, 0), &Outgoing::id);
    for (NodeId node : move->nodes) tree_[node].leaving = false;
    move->nodes.clear();
    move->node = kNoNode;
    host_drop(move->base);
    ++counters_.moves_void;
}

void Cache::void_moves_of(NodeId id) {
    for (Outgoing& move : outgoing_)
        if (std::ranges::find(move.nodes, id) != move.nodes.end()) make_void(snapshots_[tree_[move.node].snapshot]);
}

// The snapshot leaves the device. Host memory may still have it.
SlotRef Cache::take_state(NodeId id) {
    Snapshots::Record& record = snapshots_[tree_[id].snapshot];
    if (record.move != 0) make_void(record);
    SlotRef slot = record.host_slot ? snapshots_.detach(tree_, id) : snapshots_.remove(tree_, id);
    refresh(id);
    return slot;
}

void Cache::forget_snapshot(NodeId id) {
    Snapshots::Record& record = snapshots_[tree_[id].snapshot];
    if (record.move != 0) make_void(record);
    const bool host = bool(record.host_slot);
    snapshots_.remove(tree_, id);
    if (host) host_drop(id);
    refresh(id);
}

Result<Done> Cache::moved(int64_t id) {
    for (auto& [name, request] : requests_)
        if (request.move == id && id > 0) {
            arrived(request);
            return Done{};
        }
    auto move = std::ranges::find(outgoing_, id, &Outgoing::id);
    if (move == outgoing_.end()) return Error::kUnknownMove;
    if (move->node == kNoNode) {
        for (PageId page : move->pages) host_pages_.remove(page, true);
    } else {
        for (size_t i = 0; i < move->nodes.size(); ++i) {
            tree_[move->nodes[i]].leaving = false;
            tree_[move->nodes[i]].host_page = move->pages[i];
        }
        Snapshots::Record& record = snapshots_[tree_[move->node].snapshot];
        record.host_slot = std::move(move->slot);
        record.move = 0;
        host_use(move->node);
        host_drop(move->base);
        ++counters_.moved_out;
        counters_.moved_out_pages += static_cast<int64_t>(move->pages.size());
    }
    outgoing_.erase(move);
    trim_ghosts();
    return Done{};
}

void Cache::arrived(Request& request) {
    request.move = 0;
    request.host_slot.reset();
    host_drop(request.host_source);
    publish(request, {}, request.resume);  // its nodes are there since it was admitted
    unkeep(std::exchange(request.host_source, kNoNode));
    trim_ghosts();
}

double Cache::seconds_under_way() const {
    double seconds = 0;
    for (const auto& [id, request] : requests_)
        if (request.move != 0) seconds += request.move_seconds;
    return seconds;
}

// What it costs to let a snapshot go from the device: its score, or of that what bringing it back takes.
double Cache::loss(const Snapshots::Record& record) const {
    const double score = snapshots_.score(record);
    if (!record.host_slot) return score;
    return score * std::min(1.0, seconds_to_move(record.gain / config_.page_tokens) / (record.gain * costs_.token));
}

}  // namespace tokenspeed::cache
