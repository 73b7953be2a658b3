// The table of snapshots and the one function that ranks them.
//
// kValue: a snapshot is worth the recompute it saves x (1 + hits) x a weight for its kind, over the square of
// the time since its last use; times below the usual time to reuse count as that.
//   - What it saves is its distance to the nearest snapshot before it, where its users would resume without it.
//   - Time is the number of admissions. The usual time to reuse is a mean weighted by tokens saved, learned from hits
//   and
//     also from prompts that would have hit a snapshot that was let go; otherwise early evictions would confirm
//     themselves.
//   - A snapshot that a conversation resumed from or has passed is *superseded*: a later one is about to stand for it.
//   It
//     weighs less, by as much as such snapshots are used less often (learned too), and later ones are credited with the
//     distance behind it. When the conversation passes once more it stands where few will go back to, and weighs
//     less again (learned as well). Branch points are never superseded.
// kLru is the baseline. Ties break on the sequence number of the last use, so equal calls give equal answers.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "pools.h"
#include "tree.h"

namespace tokenspeed::cache {

enum class Policy : uint8_t { kValue, kLru };

// Where a snapshot came from.
enum class Kind : uint8_t { kBoundary, kBranch, kGrid, kEnd };

class Snapshots {
  public:
    struct Record {
        NodeId node;
        NodeId base;     // nearest snapshot before it that is not superseded, or kNoNode
        int32_t tokens;  // its position
        int32_t gain;    // tokens to recompute without it
        int32_t hits;
        uint32_t owner;  // admission number of its writer
        uint32_t used;   // admission number of the last use
        Kind kind;
        bool counted;       // its first use since `Node::superseded` last grew is in the evidence
        uint64_t sequence;  // of the last use
        double value;       // all of the score but the time
        SlotRef slot;       // on the device
        SlotRef host_slot;
        bool refused;  // host memory had no room for it since its last use
        int64_t move;  // under way to host memory; 0: none
    };

    explicit Snapshots(Policy policy) : policy_(policy) {}

    // `owner`: the admission number of the sequence that wrote it.
    void add(Tree& tree, NodeId node, Kind kind, uint32_t owner, SlotRef slot);
    SlotRef remove(Tree& tree, NodeId node);  // both slots go; the device's is returned
    // A snapshot that only host memory holds gets a slot on the device (again), or loses it.
    void attach(Tree& tree, NodeId node, SlotRef slot);
    SlotRef detach(Tree& tree, NodeId node);
    void hit(Tree& tree, NodeId node);

    // Time passes with admissions.
    void tick() { ++now_; }
    uint32_t now() const { return now_; }
    // A prompt could resume at `node`, whose snapshot was let go or declined, and would save `gain` tokens.
    void missed(Node& node, int32_t gain);
    void declined(Node& node);

    double score(const Record& record) const {
        if (policy_ == Policy::kLru) return 0;
        double idle = std::max(static_cast<double>(now_ - record.used), usual_reuse_time());
        return record.value / (idle * idle);
    }
    // What a snapshot that is not taken yet would score.
    double score(int32_t gain, Kind kind) const {
        return value(gain, 0, kind, false) / (usual_reuse_time() * usual_reuse_time());
    }

    // Whether the first of two goes first.
    bool weaker(const Record& a, const Record& b) const {
        const double first = score(a), second = score(b);
        return first != second ? first < second : a.sequence < b.sequence;
    }

    const std::vector<Record>& records() const { return records_; }
    const Record& operator[](uint32_t index) const { return records_[index]; }
    Record& operator[](uint32_t index) { return records_[index]; }
    int32_t size() const { return static_cast<int32_t>(records_.size()); }
    int64_t bytes() const { return static_cast<int64_t>(records_.capacity() * sizeof(Record)); }
    // How likely a snapshot that was superseded once or (2) passed since is used again, to how likely a fresh one is.
    double superseded_weight(int times = 1) const {
        return std::min(1.0, (superseded_hits_[times - 1] / superseded_[times - 1]) / (fresh_hits_ / fresh_));
    }
    double usual_reuse_time() const { return static_cast<double>(weighted_time_) / static_cast<double>(weight_); }

  private:
    void learn(uint32_t used, int32_t gain);
    double value(int32_t gain, int32_t hits, Kind kind, int superseded) const;
    void revalue(const Tree& tree, Record& record) {
        record.value = value(record.gain, record.hits, record.kind, tree[record.node].superseded);
    }
    void supersede(Tree& tree, Record& record);
    void pass_again(Tree& tree, const Record& record);
    // Those beyond a snapshot are measured from it, or from what is before it.
    void stand(Tree& tree, const Record& record);
    void step_aside(const Tree& tree, const Record& record);

    Policy policy_;
    std::vector<Record> records_;
    uint64_t sequence_ = 0;
    uint32_t now_ = 0;
    // Weights before anything is learned: 0.3 once superseded, 0.09 when passed since.
    double fresh_ = 40, fresh_hits_ = 20, superseded_[2] = {40, 40}, superseded_hits_[2] = {6, 1.8};
    int64_t weight_ = 50'000, weighted_time_ = 100 * 50'000;  // before anything is learned: 100 admissions
};

}  // namespace tokenspeed::cache
