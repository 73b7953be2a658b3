// Stats, and every invariant recomputed from scratch.
#include <algorithm>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "cache.h"

namespace tokenspeed::cache {

Stats Cache::stats() const {
    Stats stats = counters_;
    stats.pages_free = pages_.free();
    stats.pages_evictable = pages_.evictable();
    stats.pages_held = pages_.size() - stats.pages_free - stats.pages_evictable;
    stats.slots_free = slots_.free();
    stats.slots_working =
        std::ranges::count_if(requests_, [](const auto& entry) { return bool(entry.second.working); });
    stats.running =
        std::ranges::count_if(requests_, [](const auto& entry) { return entry.second.role == Role::kSequence; });
    stats.pinned = static_cast<int64_t>(requests_.size()) - stats.running;
    stats.slots_promised = promised_;
    stats.slots_snapshot =
        std::ranges::count_if(snapshots_.records(), [](const auto& record) { return bool(record.slot); });
    stats.slots_draining =
        slots_.size() - stats.slots_free - stats.slots_working - stats.slots_promised - stats.slots_snapshot;
    stats.host_pages_free = host_pages_.free();
    stats.host_slots_free = host_slots_.free();
    stats.moves_under_way = static_cast<int64_t>(outgoing_.size()) +
                            std::ranges::count_if(requests_, [](const auto& entry) { return entry.second.move != 0; });
    stats.nodes = tree_.size();
    stats.ghosts = ghosts_.size();
    stats.namespaces = static_cast<int64_t>(roots_.size());
    stats.usual_reuse_time = snapshots_.usual_reuse_time();
    stats.superseded_weight = snapshots_.superseded_weight();
    stats.bookkeeping_bytes = tree_.bytes() + pages_.bytes() + slots_.bytes() + snapshots_.bytes() +
                              host_pages_.bytes() + host_slots_.bytes();
    stats.token_bytes = tree_.token_bytes();
    return stats;
}

std::string Cache::check() const {
    struct Expected {
        uint32_t locks = 0, keeps = 0, promises = 0, host_uses = 0;
    };
    std::unordered_map<NodeId, Expected> expected;
    std::vector<int32_t> references(pages_.size()), holds(pages_.size()), writers(pages_.size());
    std::vector<int32_t> slot_references(slots_.size()), host_slot_references(host_slots_.size());
    std::vector<int32_t> host_references(host_pages_.size());
    std::unordered_set<NodeId> roots;
    for (const auto& [name, root] : roots_) roots.insert(root);
    auto count_slot = [&](const SlotRef& slot) {
        if (slot) ++slot_references[slot.id()];
    };
    auto count_host_slot = [&](const SlotRef& slot) {
        if (slot) ++host_slot_references[slot.id()];
    };
    size_t leaving = 0;
    for (const Outgoing& move : outgoing_) {
        count_host_slot(move.slot);
        for (PageId page : move.pages) ++host_references[page];
        if (move.node == kNoNode) continue;
        ++expected[move.base].host_uses;
        leaving += move.nodes.size();
        if (!tree_[move.node].state || snapshots_[tree_[move.node].snapshot].move != move.id)
            return "a move out of what is not on the device";
    }

    int32_t all_promised = 0;
    for (const auto& [id, request] : requests_) {
        const std::string who = "request " + std::to_string(id) + ": ";
        if (config_.enabled) {
            roots.insert(request.root);
            ++expected[locked_node(request)].locks;
            ++expected[kept_node(request)].keeps;
        }
        if (request.source != kNoNode) ++expected[request.source].locks;
        if (bool(request.working) != (request.role == Role::kSequence)) return who + "a working slot too few or many";
        if (pages_for(request.committed) > static_cast<int32_t>(request.pages.size()))
            return who + "committed past its pages";
        if (request.published > static_cast<int32_t>(request.path.size())) return who + "published past its path";
        for (int32_t i = 0; i < request.published; ++i)
            if (!tree_[request.path[i]].resident()) return who + "a published page is not resident";
        for (size_t i = 0; i < request.pages.size(); ++i) {
            ++references[request.pages[i]];
            ++holds[request.pages[i]];
            if (static_cast<int32_t>(i) >= request.writes_from)
                ++writers[request.pages[i]];
            else if (pages_.fill(request.pages[i]) < config_.page_tokens)
                return who + "shares rows that somebody may store again";
        }
        if (request.source_page >= 0) {
            ++references[request.source_page];
            ++holds[request.source_page];
        }
        count_slot(request.working);
        count_slot(request.source_slot);
        count_host_slot(request.host_slot);
        if ((request.move != 0) != (request.host_source != kNoNode) || (request.move != 0) != bool(request.host_slot))
            return who + "a source without a move, or the other way round";
        if (request.host_source != kNoNode) {
            ++expected[request.host_source].host_uses;
            ++expected[request.host_source].keeps;
        }
        for (const Promised& promised : request.promised) {
            ++all_promised;
            count_slot(promised.slot);
            if (promised.tokens <= request.committed) return who + "a passed snapshot is still promised";
            if (promised.node == kNoNode) continue;
            ++expected[promised.node].keeps;
            ++expected[promised.node].promises;
        }
    }
    if (all_promised != promised_) return "the count of promised slots is wrong";

    std::vector<NodeId> nodes(roots.begin(), roots.end());
    std::vector<bool> forgotten;  // beside `nodes`: below the root of a namespace that was cleared
    for (NodeId root : nodes) forgotten.push_back(tree_[root].cleared);
    int32_t idle = 0, ghosts = 0, snapshots = 0;
    for (size_t i = 0; i < nodes.size(); ++i) {
        const Node& node = tree_[nodes[i]];
        uint32_t host_children = 0, locked_children = 0, kept_children = 0, resident_children = 0, tails = 0;
        NodeId previous = kNoNode;
        for (NodeId child_id : node.children) {
            const Node& child = tree_[child_id];
            const std::string who = "node " + std::to_string(child_id) + ": ";
            nodes.push_back(child_id);
            forgotten.push_back(forgotten[i]);
            bool block = child.resident() && child.length == config_.page_tokens && !forgotten[i];
            if (max_events_ > 0 && !events_lost_ && child.announced != block)
                return who + (block ? "a page nobody was told of" : "announced, but not to be matched");
            if (child.parent != nodes[i]) return who + "its parent does not know it";
            if (child.end != node.end + child.length || child.length == 0) return who + "wrong length";
            if (child.length < config_.page_tokens && child.children.size() > 0) return who + "a tail with children";
            if (child.resident() && node.parent != kNoNode && !node.resident()) return who + "resident below a ghost";
            if (child.state && !child.resident()) return who + "a snapshot outlived its pages";
            if ((child.host_page >= 0) != (child.host_uses > 0)) return who + "a host page without use, or the reverse";
            if (child.host_page >= 0) ++host_references[child.host_page];
            host_children += child.host_uses > 0;
            leaving -= child.leaving;
            if (previous != kNoNode) {
                std::span<const Token> a(tree_.tokens(previous), tree_[previous].length);
                std::span<const Token> b(tree_.tokens(child_id), child.length);
                if (!std::ranges::lexicographical_compare(a, b)) return who + "out of order";
            }
            previous = child_id;
            locked_children += child.locks > 0;
            kept_children += child.keeps > 0;
            resident_children += child.resident();
            tails += child.length < config_.page_tokens;
            if (child.resident()) {
                ++references[child.page];
                holds[child.page] += child.locks > 0;
                if (pages_.fill(child.page) < child.length) return who + "refers to rows beyond its page's fill";
            }
            bool needed = child.resident() && (child.resident_children > 0 || child.state);
            ListName wanted = ListName::kNone;
            if (child.locks == 0 && child.resident() && !needed) wanted = ListName::kIdle;
            if (child.locks == 0 && child.keeps == 0 && child.host_uses == 0 && !child.resident())
                wanted = ListName::kGhosts;
            if (child.list != wanted) return who + "in the wrong list";
            idle += wanted == ListName::kIdle;
            ghosts += wanted == ListName::kGhosts;
            if (child.has_snapshot()) {
                ++snapshots;
                if (child.snapshot >= snapshots_.records().size()) return who + "snapshot index out of range";
                const Snapshots::Record& record = snapshots_[child.snapshot];
                NodeId base = tree_.snapshot_before(child_id);
                int32_t from = base == kNoNode ? 0 : static_cast<int32_t>(tree_[base].end);
                if (record.node != child_id || record.tokens != static_cast<int32_t>(child.end))
                    return who + "its snapshot is another's";
                if (bool(record.slot) != child.state || (!record.slot && !record.host_slot))
                    return who + "a snapshot without a slot";
                if (record.host_slot) ++expected[child_id].host_uses;
                if (record.move != 0 && std::ranges::find(outgoing_, record.move, &Outgoing::id) == outgoing_.end())
                    return who + "a move that is not under way";
                if (record.base != base || record.gain != record.tokens - from) return who + "wrong gain";
            }
        }
        const std::string who = "node " + std::to_string(nodes[i]) + ": ";
        Expected here = expected.contains(nodes[i]) ? expected[nodes[i]] : Expected{};
        if (node.locks != here.locks + locked_children) return who + "wrong locks";
        if (node.keeps != here.keeps + kept_children) return who + "wrong keeps";
        if (node.host_uses != here.host_uses + host_children) return who + "wrong host uses";
        if (node.promises != here.promises) return who + "wrong promises";
        if (node.resident_children != resident_children) return who + "wrong count of resident children";
        if (node.tails != tails) return who + "wrong count of tails";
    }
    if (static_cast<int64_t>(nodes.size()) != tree_.size()) return "nodes are lost";
    if (snapshots != snapshots_.size()) return "snapshots are lost";
    if (idle != idle_.size() || ghosts != ghosts_.size()) return "a list has the wrong size";
    if (ghosts > config_.ghost_nodes) return "too many ghosts";
    if (leaving != 0) return "nodes are on their way to nowhere";

    int32_t evictable = 0, free = 0;
    for (PageId id = 0; id < pages_.size(); ++id) {
        const std::string who = "page " + std::to_string(id) + ": ";
        if (pages_.references(id) != references[id]) return who + "wrong references";
        if (pages_.holds(id) != holds[id]) return who + "wrong holds";
        if (references[id] > 0 && (writers[id] > 0) != pages_.has_writer(id)) return who + "wrong writer";
        free += references[id] == 0;
        evictable += references[id] > 0 && holds[id] == 0;
    }
    if (free != pages_.free() || evictable != pages_.evictable()) return "the page totals are wrong";
    for (const auto& record : snapshots_.records()) {
        count_slot(record.slot);
        count_host_slot(record.host_slot);
    }
    int32_t free_host_slots = 0, free_host_pages = 0;
    for (SlotId id = 0; id < host_slots_.size(); ++id) {
        if (host_slots_.references(id) != host_slot_references[id]) return "a host slot has wrong references";
        free_host_slots += host_slot_references[id] == 0;
    }
    for (PageId id = 0; id < host_pages_.size(); ++id) {
        if (host_pages_.references(id) != host_references[id]) return "a host page has wrong references";
        free_host_pages += host_references[id] == 0;
    }
    if (free_host_slots != host_slots_.free() || free_host_pages != host_pages_.free())
        return "the host totals are wrong";
    int32_t free_slots = 0;
    for (SlotId id = 0; id < slots_.size(); ++id) {
        if (slots_.references(id) != slot_references[id]) return "slot " + std::to_string(id) + ": wrong references";
        free_slots += slot_references[id] == 0;
    }
    if (free_slots != slots_.free()) return "the slot totals are wrong";
    return {};
}

}  // namespace tokenspeed::cache
