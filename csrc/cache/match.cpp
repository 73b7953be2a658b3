// How much of a prompt is known, and why compute resumes where it does.
#include <algorithm>

#include "cache.h"

namespace tokenspeed::cache {

Cache::Walk Cache::walk(NodeId root, Tokens prompt, int32_t cap, bool prompt_logprobs,
                        std::vector<NodeId>* path) const {
    const int32_t page = config_.page_tokens;
    const auto length = static_cast<int32_t>(prompt.size());
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
    bool whole = false;
    auto examine = [&](NodeId id) {
        const Node& here = tree_[id];
        auto end = static_cast<int32_t>(here.end);
        if (here.has_snapshot() && end <= cap) {
            found.snapshot = id;
        } else if (here.has_snapshot()) {
            whole = true;
        } else if (end <= cap) {
            if (here.snapshot_lost && found.lost == kNoNode) found.lost = id;
            if (here.promises > 0 && match.pending_tokens == 0) match.pending_tokens = end;
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
    if (found.snapshot != kNoNode && !prompt_logprobs)
        match.state_tokens = static_cast<int32_t>(tree_[found.snapshot].end);
    if (prompt_logprobs) {
        found.snapshot = kNoNode;
        match.pending_tokens = 0;
    }
    // A page that is not shared whole is stored again from its first recomputed row, so sharing stops at a page border
    // unless compute itself resumes inside the page.
    found.shared = std::min(resident, cap / page);
    match.kv_tokens = std::max(match.state_tokens, found.shared * page);

    if (match.known_tokens == 0)
        match.reason = Reason::kCold;
    else if (prompt_logprobs)
        match.reason = Reason::kPromptLogprobs;
    else if (match.state_tokens == cap && match.known_tokens == length)
        match.reason = Reason::kWholePromptKnown;
    else if (match.state_tokens == std::min(match.known_tokens, cap))
        match.reason = Reason::kNewTokens;
    else if (match.pending_tokens > 0)
        match.reason = Reason::kPending;
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
    return walk(root == roots_.end() ? kNoNode : root->second, prompt, cap, prompt_logprobs, nullptr).match;
}

}  // namespace tokenspeed::cache
