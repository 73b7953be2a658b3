// How much of a prompt is known, and why compute resumes where it does.
#include <algorithm>

#include "cache.h"

namespace tokenspeed::cache {

Cache::Walk Cache::walk(NodeId root, Tokens prompt, Search search, std::vector<NodeId>* path) const {
    const int32_t page = config_.page_tokens;
    const auto length = static_cast<int32_t>(prompt.size());
    const int32_t cap = search.cap;
    Walk found;
    Match& match = found.match;
    if (!config_.enabled) {
        match.reason = Reason::kDisabled;
        return found;
    }

    // Down: whole pages, then the longest common prefix inside one.
    NodeId node = root;
    int32_t position = 0, resident = 0;
    while (node != kNoNode && length - position >= page) {
        NodeId child = tree_.find(node, prompt.data() + position, page);
        if (child == kNoNode) break;
        node = child;
        position += page;
        ++found.full;
        if (tree_[node].resident()) resident = found.full;
        if (path) path->push_back(node);
    }
    if (node != kNoNode)
        match.known_tokens = position + tree_.common_prefix(node, prompt.data() + position, length - position);

    // Up: the deepest snapshot within the cap. Tails of a node lie deeper than the node.
    bool whole = false, computed_sooner = false;
    NodeId pending = kNoNode;
    auto examine = [&](NodeId id) {
        const Node& here = tree_[id];
        auto end = static_cast<int32_t>(here.end);
        if (here.state && end <= cap) {
            found.snapshot = id;
        } else if (here.has_snapshot() && end > cap) {
            whole = true;
        } else if (end <= cap) {
            if (here.has_snapshot() && found.host == kNoNode) found.host = id;
            if (here.snapshot_lost && found.lost == kNoNode) found.lost = id;
            if (here.promises > 0 && pending == kNoNode) pending = id;
        }
        return found.snapshot != kNoNode;
    };
    for (NodeId up = node; up != kNoNode; up = tree_[up].parent) {
        auto end = static_cast<int32_t>(tree_[up].end);
        NodeId tail = tree_.longest_tail(up, prompt.data() + end, length - end);
        while (tail != kNoNode && !examine(tail))
            tail = tree_.longest_tail(up, prompt.data() + end, tree_[tail].length - 1);
        if (found.snapshot != kNoNode || examine(up)) break;
    }
    if (!search.states) found.snapshot = found.host = pending = kNoNode;
    if (!search.host) found.host = kNoNode;
    if (found.snapshot != kNoNode) match.state_tokens = static_cast<int32_t>(tree_[found.snapshot].end);
    // A page that is not shared whole is stored again from its first recomputed row, so sharing stops at a page border
    // unless compute itself resumes inside the page.
    found.shared = std::min(resident, cap / page);
    auto end_of = [&](NodeId id) { return static_cast<int32_t>(tree_[id].end); };
    auto slower_than_computing = [&](double seconds, int32_t end) {
        return seconds > (end - match.state_tokens) * costs_.token;
    };
    if (pending != kNoNode &&
        std::ranges::any_of(requests_,
                            [&](const auto& entry) {
                                return entry.second.move != 0 && entry.second.promised.size() > 0 &&
                                       entry.second.promised[0].node == pending;
                            }) &&
        slower_than_computing(seconds_under_way(), end_of(pending))) {
        pending = kNoNode;
        computed_sooner = true;
    }
    const int32_t kept = match.state_tokens;
    if (found.host != kNoNode) {
        const int32_t end = end_of(found.host), missing = std::max(0, pages_for(end) - found.shared);
        if (slower_than_computing(seconds_under_way() + seconds_to_move(missing), end)) {
            found.host = kNoNode;
            computed_sooner = true;
        } else {
            match.moved_tokens = end - match.state_tokens;
            match.state_tokens = end;
            found.snapshot = kNoNode;
        }
    }
    if (pending != kNoNode && end_of(pending) >= match.state_tokens && end_of(pending) > kept)
        match.pending_tokens = end_of(pending);
    if (found.lost != kNoNode && end_of(found.lost) < match.state_tokens) found.lost = kNoNode;
    match.kv_tokens = std::max(match.state_tokens, found.shared * page);

    if (match.known_tokens == 0)
        match.reason = Reason::kCold;
    else if (!search.states)
        match.reason = Reason::kPromptLogprobs;
    else if (match.state_tokens == cap && match.known_tokens == length)
        match.reason = Reason::kWholePromptKnown;
    else if (match.state_tokens == std::min(match.known_tokens, cap))
        match.reason = Reason::kNewTokens;
    else if (match.pending_tokens > 0)
        match.reason = Reason::kPending;
    else if (computed_sooner)
        match.reason = Reason::kComputedSooner;
    else if (found.lost != kNoNode)
        match.reason = Reason::kSnapshotEvicted;
    else
        match.reason = whole ? Reason::kWholePromptKnown : Reason::kNoSnapshot;
    return found;
}

Match Cache::probe(std::string_view name_space, Tokens prompt, bool prompt_logprobs) const {
    if (prompt.empty()) return {};
    auto root = roots_.find(name_space);
    const auto cap = static_cast<int32_t>(prompt.size()) - 1;  // some token must give logits
    return walk(root == roots_.end() ? kNoNode : root->second, prompt, {cap, !prompt_logprobs}, nullptr).match;
}

}  // namespace tokenspeed::cache
