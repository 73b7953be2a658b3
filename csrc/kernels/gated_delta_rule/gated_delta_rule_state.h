// The state that a block of gated_delta_rule_prefill.cu works on: where it comes from, where it goes, and when.
#pragma once
#include "gated_delta_rule_prefill.h"

namespace tokenspeed::delta_rule_prefill {

constexpr int kNoSnapshot = INT32_MAX;
constexpr int kChunksOfPair = 1;   // a state's way in and out takes about as long as so many chunks
static_assert(kChunksOfPair > 0);  // a pair without chunks, too, is in a range

// What a block works on: half a value head of one sequence, the chunks of one window.
struct Work : Chunks {
    int sequence, value_head, rank, column;
    int read_slot, write_slot;
    int first, chunks;     // of the window: the first chunk of the sequence, and how many
    int slot;              // of the window: where its chunks begin
    bool begins, goes_on;  // whether the sequence does, in and beyond this window

    __device__ Work(const GatedDeltaRulePrefill& p, const Window& window, int of_sequence, int of_head, int of_slot)
        : Chunks(p, of_sequence) {
        sequence = of_sequence;
        value_head = of_head;
        rank = blockIdx.x;
        column = rank * kColumns;
        read_slot = max(p.read_slot[sequence], 0);
        write_slot = p.write_slot[sequence];
        first = window.first;
        chunks = window.count(count);
        slot = of_slot;
        begins = first == 0;
        goes_on = first + chunks < count;
    }
    __device__ int key_head(const GatedDeltaRulePrefill& p) const { return value_head / (p.value_heads / p.key_heads); }
};

// A cluster for every sequence and value head.
struct OnePair : Work {
    static constexpr bool kInTurn = false;
    struct Range {
        __device__ Range(const GatedDeltaRulePrefill&, const Window&) {}
    };

    __device__ OnePair(const GatedDeltaRulePrefill& p, const Window& window, const Range&)
        : Work(p, window, blockIdx.z, blockIdx.y, first_slot(p, window, blockIdx.z)) {}
    __device__ bool idle() const { return chunks == 0 && !begins; }
    __device__ bool next(const GatedDeltaRulePrefill&, const Window&) { return false; }
};

// Where there are more pairs of a sequence and a value head than clusters that fit: a cluster takes some in turn. In
// the order of sequences, then of heads, each has a range, and ranges cost alike to within a pair. In one window only.
struct PairsInTurn : Work {
    static constexpr bool kInTurn = true;

    // The first pair of the cluster's range, and the cost in chunks from there to the range's end. A pair is in the
    // range in which its own cost begins.
    struct Range {
        int sequence = 0, value_head = 0, slot = 0, cost = 0;

        // By whole warps.
        __device__ Range(const GatedDeltaRulePrefill& p, const Window&) {
            const int lane = threadIdx.x % 32, heads = p.value_heads, clusters = gridDim.y, cluster = blockIdx.y;
            int all = 0;
            for (int i = lane; i < p.sequences; i += 32) all += cost_of_head(Chunks(p, i).count);
            all = __reduce_add_sync(kAllLanes, all) * heads;
            const int begin = (cluster * all + clusters - 1) / clusters;
            const int end = ((cluster + 1) * all + clusters - 1) / clusters;
#pragma unroll 1
            for (int first = 0, before = 0; first < p.sequences; first += 32) {
                const int own = first + lane < p.sequences ? cost_of_head(Chunks(p, first + lane).count) : 0;
                const int through = before + warp_running_sum(own), start = (through - own) * heads;
                // The cost of its last head begins in the range or beyond.
                const uint32_t found = __ballot_sync(kAllLanes, own > 0 && start + own * (heads - 1) >= begin);
                if (found != 0) {
                    const int from = __ffs(found) - 1, of_head = __shfl_sync(kAllLanes, own, from);
                    const int skipped = max(begin - __shfl_sync(kAllLanes, start, from), 0);
                    sequence = first + from;
                    value_head = (skipped + of_head - 1) / of_head;
                    slot = __shfl_sync(kAllLanes, through - own, from) - sequence * kChunksOfPair;
                    cost = end - __shfl_sync(kAllLanes, start, from) - value_head * of_head;
                    return;
                }
                before = __shfl_sync(kAllLanes, through, 31);
            }
        }
    };

    int left;  // of the range's cost, with this pair's

    __device__ PairsInTurn(const GatedDeltaRulePrefill& p, const Window& window, const Range& range)
        : Work(p, window, range.sequence, range.value_head, range.slot), left(range.cost) {}
    __device__ bool idle() const { return left <= 0; }
    __device__ static int cost_of_head(int chunks) { return chunks + kChunksOfPair; }

    // To the next pair; false: there is none.
    __device__ bool next(const GatedDeltaRulePrefill& p, const Window& window) {
        left -= cost_of_head(chunks);
        if (left <= 0) return false;
        if (value_head + 1 < p.value_heads) {
            ++value_head;
        } else {
            static_cast<Work&>(*this) = Work(p, window, sequence + 1, 0, slot + chunks);
        }
        return true;
    }
};

// Place of a thread in an accumulator: rows `row` and `row` + 8 are value columns, pairs of columns start at `column`.
struct Lane {
    int row, column;
    __device__ Lane()
        : row(threadIdx.x % kGroupThreads / 32 * 16 + threadIdx.x % 32 / 4), column(threadIdx.x % 4 * 2) {}
};

// The 64 x 128 part of a slot's state that belongs to the block.
__device__ __forceinline__ float* state_of(const GatedDeltaRulePrefill& p, const Work& at, int slot) {
    return p.state + slot * p.state_stride + (static_cast<int64_t>(at.value_head) * kDim + at.column) * kDim;
}

// The same of the workspace, between two windows.
__device__ __forceinline__ float* carried_state(const GatedDeltaRulePrefill& p, const Work& at, const Window& window) {
    const int place = at.start / static_cast<int>(Window::carry_distance(window.chunks));
    return window.carry + ((int64_t{place} * p.value_heads + at.value_head) * kDim + at.column) * kDim;
}

// Where the state after the window's chunks goes; null: nowhere.
__device__ __forceinline__ float* leaving_state(const GatedDeltaRulePrefill& p, const Work& at, const Window& window) {
    if (at.goes_on) return carried_state(p, at, window);
    return at.write_slot >= 0 ? state_of(p, at, at.write_slot) : nullptr;
}

__device__ __forceinline__ float2& pair_of(float* state, const Lane& lane, int j, int h) {
    return *reinterpret_cast<float2*>(state + (lane.row + 8 * h) * kDim + 8 * j + lane.column);
}

__device__ __forceinline__ void store_state(float* state, const float (&s)[64]) {
    const Lane lane;
#pragma unroll
    for (int i = 0; i < 32; ++i) pair_of(state, lane, i / 2, i % 2) = float2{s[2 * i], s[2 * i + 1]};
}

// The cursor of the state that the chunks begin with: updates from there on wait in the ring.
__device__ __forceinline__ int entering_cursor(const GatedDeltaRulePrefill& p, const Work& at) {
    return at.begins && at.context > 0 ? p.cursor[at.read_slot * p.cursor_stride + at.value_head] : at.context;
}

// Brings a slot's state to `context` tokens: the updates that still wait in its ring, oldest first.
__device__ __forceinline__ void fold_ring(const GatedDeltaRulePrefill& p, const Work& at, int cursor, float (&s)[64]) {
    const Lane lane;
#pragma unroll 1
    for (int token = max(max(cursor, at.context - p.ring_rows), 0); token < at.context; ++token) {
        const float* update = p.ring + at.read_slot * p.ring_stride + token % p.ring_rows * int64_t{p.ring_width};
        const float* key = update + at.key_head(p) * kDim + lane.column;
        const float* u = update + (p.key_heads + at.value_head) * kDim + at.column + lane.row;
        const float decay = expf(update[(p.key_heads + p.value_heads) * kDim + at.value_head]);
        const float of_row[2] = {u[0], u[8]};
#pragma unroll
        for (int i = 0; i < 64; ++i) s[i] = decay * s[i] + of_row[i / 2 % 2] * key[i / 4 * 8 + i % 2];
    }
}

// What the window before left, or the slot's state.
__device__ __forceinline__ void load_state(const GatedDeltaRulePrefill& p, const Work& at, const Window& window,
                                           float (&s)[64]) {
    const Lane lane;
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] = 0;
    if (at.begins && at.context == 0) return;
    float* state = at.begins ? state_of(p, at, at.read_slot) : carried_state(p, at, window);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const float2 pair = pair_of(state, lane, i / 2, i % 2);
        s[2 * i] = pair.x;
        s[2 * i + 1] = pair.y;
    }
}

// The smallest token count beyond `count` at which the sequence's state is asked for. By whole warps.
__device__ __forceinline__ int next_snapshot(const GatedDeltaRulePrefill& p, const Work& at, int count) {
    int next = kNoSnapshot;
    for (int i = threadIdx.x % 32; i < p.snapshot_count; i += 32) {
        const int32_t* row = p.snapshots + 3 * i;
        if (row[0] == at.sequence && row[2] >= 0 && row[1] > count) next = min(next, row[1]);
    }
    return __reduce_min_sync(kAllLanes, next);
}

// Calls what(token count, slot) for the sequence's snapshots with first < count <= last.
template <typename Function>
__device__ __forceinline__ void for_snapshots(const GatedDeltaRulePrefill& p, const Work& at, int first, int last,
                                              Function what) {
#pragma unroll 1
    for (int i = 0; i < p.snapshot_count; ++i) {
        const int32_t* row = p.snapshots + 3 * i;
        if (row[0] == at.sequence && row[2] >= 0 && row[1] > first && row[1] <= last) what(row[1], row[2]);
    }
}

}  // namespace tokenspeed::delta_rule_prefill
