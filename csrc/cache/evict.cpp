// What leaves, and the bookkeeping of locks, residency and the two lists.
#include <algorithm>
#include <cassert>
#include <ranges>
#include <utility>

#include "cache.h"

namespace tokenspeed::cache {

// A lock keeps a node and, through its parents, every page before it. Only the first lock of a node climbs further.
void Cache::lock(NodeId id) {
    for (; id != kNoNode && tree_[id].locks++ == 0; id = tree_[id].parent) {
        if (tree_[id].resident()) pages_.add_hold(tree_[id].page);
        refresh(id);
    }
}

void Cache::unlock(NodeId id) {
    for (; id != kNoNode && --tree_[id].locks == 0; id = tree_[id].parent) {
        if (tree_[id].resident()) pages_.remove_hold(tree_[id].page);
        refresh(id);  // children enter a list before their parents: the deepest goes first
    }
}

// A kept node stays in the tree, with or without its page.
void Cache::keep(NodeId id) {
    for (; id != kNoNode && tree_[id].keeps++ == 0; id = tree_[id].parent) refresh(id);
}

void Cache::unkeep(NodeId id) {
    for (; id != kNoNode && --tree_[id].keeps == 0; id = tree_[id].parent) refresh(id);
}

// Puts a node into the list it belongs to.
void Cache::refresh(NodeId id) {
    const Node& node = tree_[id];
    ListName wanted = ListName::kNone;
    if (node.locks == 0 && node.parent != kNoNode) {
        if (!node.resident() && node.keeps == 0 && node.host_uses == 0)
            wanted = ListName::kGhosts;
        else if (node.resident() && node.resident_children == 0 && !node.state)
            wanted = ListName::kIdle;
    }
    if (wanted == node.list) return;
    if (node.list == ListName::kIdle) idle_.remove(tree_, id);
    if (node.list == ListName::kGhosts) ghosts_.remove(tree_, id);
    if (wanted == ListName::kIdle) idle_.push_back(tree_, id);
    if (wanted == ListName::kGhosts) ghosts_.push_back(tree_, id);
}

void Cache::make_resident(NodeId id, PageId page) {
    Node& node = tree_[id];
    pages_.add(page, node.locks > 0);
    pages_.raise_fill(page, node.length);
    node.page = page;
    ++tree_[node.parent].resident_children;
    refresh(id);
    refresh(node.parent);
}

void Cache::make_ghost(NodeId id) {
    Node& node = tree_[id];
    assert(node.locks == 0 && node.resident_children == 0 && !node.state);
    withdraw(id);
    pages_.remove(node.page, false);
    node.page = -1;
    --tree_[node.parent].resident_children;
    refresh(id);
    refresh(node.parent);
}

void Cache::erase(NodeId id) {
    if (tree_[id].list == ListName::kGhosts) ghosts_.remove(tree_, id);
    NodeId parent = tree_[id].parent;
    tree_.erase(id);
    forget_if_empty(parent);
}

void Cache::trim_ghosts() {
    while (ghosts_.size() > config_.ghost_nodes) {
        erase(ghosts_.front());
        ++counters_.ghosts_dropped;
    }
}

void Cache::forget_if_empty(NodeId root) {
    const Node& node = tree_[root];
    if (node.parent != kNoNode || node.children.size() > 0 || node.locks > 0 || node.keeps > 0) return;
    if (!node.cleared) std::erase_if(roots_, [&](const auto& entry) { return entry.second == root; });
    tree_.erase(root);
}

bool Cache::evictable(const Snapshots::Record& record, Resource resource) const {
    const Node& node = tree_[record.node];
    if (resource == Resource::kPages) return node.state && node.locks == 0 && node.resident_children == 0;
    return record.slot.unique();  // else a sequence reads it
}

int32_t Cache::evictable_slots() const {
    return static_cast<int32_t>(
        std::ranges::count_if(snapshots_.records(), [](const auto& record) { return record.slot.unique(); }));
}

std::optional<Cache::Victim> Cache::weakest(Resource resource) const {
    std::optional<Victim> found;
    uint64_t sequence = 0;
    for (const auto& record : snapshots_.records()) {
        double score = loss(record);
        if (found && (score > found->score || (score == found->score && record.sequence > sequence))) continue;
        if (!evictable(record, resource)) continue;
        found = {record.node, score};
        sequence = record.sequence;
    }
    return found;
}

void Cache::evict_idle() {
    make_ghost(idle_.front());
    ++counters_.pages_evicted;
}

void Cache::evict_snapshot(NodeId id) {
    take_state(id);
    counters_.snapshots_left_to_host += tree_[id].has_snapshot();
    ++counters_.snapshots_evicted;
}

// KV that no snapshot needs goes first: it saves no compute.
void Cache::evict_one(Resource resource) {
    if (resource != Resource::kSlots && idle_.size() > 0) return evict_idle();
    std::optional<Victim> victim = weakest(resource);
    assert(victim);
    evict_snapshot(victim->node);
}

NoRoom Cache::missing(int32_t pages, int32_t slots) const {
    NoRoom result;
    result.pages_short = std::max(0, pages - pages_.free() - pages_.evictable());
    if (slots_.free() < slots) result.slots_short = std::max(0, slots - slots_.free() - evictable_slots());
    return result;
}

// Two sequences that computed the same tokens side by side hold a page each, and the tree one of the two. When that
// one's sequence has ended, the tree takes the other's: nothing is locked that no running sequence uses.
void Cache::drop_duplicates() {
    for (auto& [id, request] : requests_) {
        if (request.duplicates == 0) continue;
        request.duplicates = 0;
        for (int32_t i = 0; i < request.published; ++i) {
            Node& node = tree_[request.path[i]];
            if (node.page == request.pages[i]) continue;
            if (pages_.holds(node.page) > 1) {
                ++request.duplicates;
                continue;
            }
            pages_.add(request.pages[i], true);
            pages_.raise_fill(request.pages[i], node.length);
            pages_.remove(std::exchange(node.page, request.pages[i]), true);
            if (node.leaving) void_moves_of(request.path[i]);  // they read the page that is gone
        }
    }
}

std::optional<NoRoom> Cache::make_room(int32_t pages, int32_t slots) {
    NoRoom lacking = missing(pages, slots);
    if (lacking.pages_short > 0) {
        drop_duplicates();
        lacking = missing(pages, slots);
    }
    if (lacking.pages_short > 0 || lacking.slots_short > 0) return lacking;
    while (slots_.free() < slots) evict_one(Resource::kSlots);
    while (pages_.free() < pages) evict_one(Resource::kPages);
    return std::nullopt;
}

void Cache::purge(NodeId root) {
    std::vector<NodeId> nodes{root};
    for (size_t i = 0; i < nodes.size(); ++i)
        nodes.insert(nodes.end(), tree_[nodes[i]].children.begin(), tree_[nodes[i]].children.end());
    for (NodeId id : std::views::reverse(nodes)) {  // children before parents
        if (tree_[id].has_snapshot()) forget_snapshot(id);
        withdraw(id);
        if (tree_[id].locks > 0 || id == root) continue;
        if (tree_[id].resident()) make_ghost(id);
        if (tree_[id].keeps > 0) continue;
        if (tree_[id].list == ListName::kGhosts) ghosts_.remove(tree_, id);
        tree_.erase(id);
    }
}

bool Cache::clear(std::string_view name_space) {
    auto it = roots_.find(name_space);
    if (it == roots_.end()) return false;
    NodeId root = it->second;
    roots_.erase(it);
    forget(root);
    return true;
}

int64_t Cache::clear_all() {
    auto roots = std::exchange(roots_, {});
    for (const auto& [name, root] : roots) forget(root);
    return static_cast<int64_t>(roots.size());
}

// Its name is gone from `roots_` already: a prompt of that name starts a tree of its own.
void Cache::forget(NodeId root) {
    tree_[root].cleared = true;
    purge(root);
    forget_if_empty(root);
}

}  // namespace tokenspeed::cache
