#include "snapshots.h"

#include <algorithm>
#include <cassert>
#include <utility>

namespace tokenspeed::cache {

namespace {

constexpr double kBranchWeight = 4;       // several continuations are known already
constexpr int64_t kForget = 100'000'000;  // tokens of evidence after which the older half fades

}  // namespace

double Snapshots::value(int32_t gain, int32_t hits, Kind kind, int superseded) const {
    // One resume is what every turn does to the one before it.
    double weight = kind == Kind::kBranch ? kBranchWeight * (1 + hits) : std::max(1, hits);
    if (superseded) weight *= superseded_weight(superseded);
    return gain * weight;
}

void Snapshots::learn(uint32_t used, int32_t gain) {
    weight_ += gain;
    weighted_time_ += static_cast<int64_t>(now_ - used) * gain;
    if (weight_ > kForget) {
        weight_ /= 2;
        weighted_time_ /= 2;
    }
}

void Snapshots::stand(Tree& tree, const Record& record) {
    // Mostly nothing but the sequence's own tokens lies beyond a new snapshot: then no table is searched.
    NodeId below = record.node;
    if (tree[below].length == tree.page_tokens()) {
        while (tree[below].children.size() == 1 && (below == record.node || !tree[below].has_snapshot()))
            below = tree[below].children[0];
        if (tree[below].children.size() == 0 && !tree[below].has_snapshot()) return;
    }
    for (Record& other : records_)
        if (other.base == record.base && other.tokens > record.tokens && tree.is_prefix(record.node, other.node)) {
            other.base = record.node;
            other.gain = other.tokens - record.tokens;
            revalue(tree, other);
        }
}

void Snapshots::step_aside(const Tree& tree, const Record& record) {
    for (Record& other : records_)
        if (other.base == record.node) {
            other.base = record.base;
            other.gain += record.gain;
            revalue(tree, other);
        }
}

void Snapshots::supersede(Tree& tree, Record& record) {
    Node& node = tree[record.node];
    if (record.kind == Kind::kBranch || node.superseded) return;
    node.superseded = 1;
    ++superseded_[0];
    step_aside(tree, record);
    revalue(tree, record);
}

void Snapshots::pass_again(Tree& tree, const Record& record) {
    for (Record& earlier : records_)
        if (tree[earlier.node].superseded == 1 && earlier.tokens < record.tokens &&
            tree.is_prefix(earlier.node, record.node)) {
            tree[earlier.node].superseded = 2;
            earlier.counted = false;
            ++superseded_[1];
            revalue(tree, earlier);
        }
}

void Snapshots::missed(Node& node, int32_t gain) {
    learn(node.last_used, gain);
    ++(node.superseded ? superseded_hits_[node.superseded - 1] : fresh_hits_);
    node.last_used = now_;
}

void Snapshots::declined(Node& node) {
    node.snapshot_lost = true;
    node.superseded = 0;
    node.last_used = now_;
    ++fresh_;
}

void Snapshots::add(Tree& tree, NodeId id, Kind kind, uint32_t owner, SlotRef slot) {
    Node& node = tree[id];
    NodeId base = tree.snapshot_before(id);
    while (base != kNoNode) {  // of one sequence's snapshots the last stands for the others
        Record& earlier = records_[tree[base].snapshot];
        if (earlier.owner != owner || earlier.kind == Kind::kBranch) break;
        supersede(tree, earlier);
        base = earlier.base;
    }
    auto tokens = static_cast<int32_t>(node.end);
    int32_t gain = tokens - (base == kNoNode ? 0 : static_cast<int32_t>(tree[base].end));
    node.snapshot = static_cast<uint32_t>(records_.size());
    node.snapshot_lost = false;
    node.superseded = 0;
    ++fresh_;
    records_.push_back({id, base, tokens, gain, 0, owner, now_, kind, false, ++sequence_, value(gain, 0, kind, false),
                        std::move(slot), SlotRef(), false, 0});
    node.state = true;
    stand(tree, records_.back());
}

SlotRef Snapshots::remove(Tree& tree, NodeId id) {
    Node& node = tree[id];
    uint32_t index = node.snapshot;
    assert(records_[index].node == id);
    if (!node.superseded) step_aside(tree, records_[index]);
    node.snapshot = kNoSnapshot;
    node.state = false;
    node.snapshot_lost = true;
    node.last_used = records_[index].used;
    SlotRef slot = std::move(records_[index].slot);
    if (index + 1 != records_.size()) {
        records_[index] = std::move(records_.back());
        tree[records_[index].node].snapshot = index;
    }
    records_.pop_back();
    return slot;
}

void Snapshots::attach(Tree& tree, NodeId id, SlotRef slot) {
    Record& record = records_[tree[id].snapshot];
    record.slot = std::move(slot);
    record.refused = false;
    record.used = now_;
    record.sequence = ++sequence_;
    tree[id].state = true;
}

SlotRef Snapshots::detach(Tree& tree, NodeId id) {
    tree[id].state = false;
    return std::move(records_[tree[id].snapshot].slot);
}

void Snapshots::hit(Tree& tree, NodeId id) {
    Record& record = records_[tree[id].snapshot];
    learn(record.used, record.gain);
    if (!tree[id].superseded) {
        fresh_hits_ += record.hits == 0;
    } else {
        superseded_hits_[tree[id].superseded - 1] += !record.counted;
        record.counted = true;
    }
    ++record.hits;
    record.refused = false;
    record.used = now_;
    record.sequence = ++sequence_;
    pass_again(tree, record);
    supersede(tree, record);
    revalue(tree, record);
    for (NodeId passed = record.base; passed != kNoNode;) {
        Record& earlier = records_[tree[passed].snapshot];
        passed = earlier.base;
        supersede(tree, earlier);
    }
}

}  // namespace tokenspeed::cache
