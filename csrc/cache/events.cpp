// The log of whole pages that become matchable or are let go.
#include <algorithm>
#include <utility>

#include "cache.h"

namespace tokenspeed::cache {

void Cache::log_events(int32_t entries) {
    max_events_ = std::max(entries, 0);
    events_.clear();
    events_lost_ = max_events_ > 0;  // whatever is there already is told by the first drain
}

void Cache::log(Event event) {
    if (events_lost_) return;
    if (static_cast<int32_t>(events_.size()) == max_events_) {
        events_.clear();
        events_lost_ = true;
        return;
    }
    events_.push_back(std::move(event));
}

Event Cache::stored(NodeId id, NodeId root) const {
    const Node& node = tree_[id];
    Event event{.kind = Event::Kind::kStored, .block = id};
    if (node.parent != root) {
        event.parent = node.parent;
    } else {
        auto named = std::ranges::find(roots_, root, [](const auto& entry) { return entry.second; });
        event.name_space = named->first;
    }
    event.tokens.assign(tree_.tokens(id), tree_.tokens(id) + node.length);
    return event;
}

// Nobody can match a forgotten namespace's pages: they are not worth telling.
void Cache::announce(NodeId id, NodeId root) {
    if (max_events_ == 0 || tree_[root].cleared) return;
    tree_[id].announced = true;
    if (!events_lost_) log(stored(id, root));
}

void Cache::withdraw(NodeId id) {
    if (!std::exchange(tree_[id].announced, false) || max_events_ == 0) return;
    log({.kind = Event::Kind::kRemoved, .block = id});
}

std::vector<Event> Cache::drain_events() {
    if (!events_lost_) return std::exchange(events_, {});
    events_lost_ = false;
    std::vector<Event> events{{.kind = Event::Kind::kCleared}};
    for (const auto& [name, root] : roots_) {
        std::vector<NodeId> nodes{root};
        for (size_t i = 0; i < nodes.size(); ++i) {
            for (NodeId id : tree_[nodes[i]].children) {
                Node& child = tree_[id];
                if (!child.resident() || child.length < config_.page_tokens) continue;
                child.announced = true;
                events.push_back(stored(id, root));
                nodes.push_back(id);
            }
        }
    }
    return events;
}

}  // namespace tokenspeed::cache
