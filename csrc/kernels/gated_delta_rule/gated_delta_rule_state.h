// The state that a block of gated_delta_rule_prefill.cu works on: where it comes from, where it goes, and when.
#pragma once
#include "gated_delta_rule_prefill.h"

namespace tokenspeed::delta_rule_prefill {

constexpr int kNoSnapshot = INT32_MAX;

// What a block works on: half a value head of one sequence, the chunks of one window.
struct Work : Chunks {
    int sequence, value_head, key_head, rank, column;
    int read_slot, write_slot;
    int first, chunks;     // of the window: the first chunk of the sequence, and how many
    int slot;              // of the window: where its chunks begin
    bool begins, goes_on;  // whether the sequence does, in and beyond this window

    __device__ Work(const GatedDeltaRulePrefill& p, const Window& window) : Chunks(p, blockIdx.z) {
        sequence = blockIdx.z;
        value_head = blockIdx.y;
        key_head = value_head / (p.value_heads / p.key_heads);
        rank = blockIdx.x;
        column = rank * kColumns;
        read_slot = max(p.read_slot[sequence], 0);
        write_slot = p.write_slot[sequence];
        first = window.first;
        chunks = window.count(count);
        slot = first_slot(p, window, sequence);
        begins = first == 0;
        goes_on = first + chunks < count;
    }
    __device__ bool idle() const { return chunks == 0 && !begins; }
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
    const int64_t place = at.start / Window::carry_distance(window.chunks);
    return window.carry + ((place * p.value_heads + at.value_head) * kDim + at.column) * kDim;
}

__device__ __forceinline__ float2& pair_of(float* state, const Lane& lane, int j, int h) {
    return *reinterpret_cast<float2*>(state + (lane.row + 8 * h) * kDim + 8 * j + lane.column);
}

__device__ __forceinline__ void store_state(float* state, const float (&s)[64]) {
    const Lane lane;
#pragma unroll
    for (int i = 0; i < 32; ++i) pair_of(state, lane, i / 2, i % 2) = float2{s[2 * i], s[2 * i + 1]};
}

// What the window before left, or the state after `context` tokens: the slot's, then the updates that still wait in its
// ring, oldest first.
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
    if (!at.begins) return;
    const int cursor = p.cursor[at.read_slot * p.cursor_stride + at.value_head];
#pragma unroll 1
    for (int token = max(max(cursor, at.context - p.ring_rows), 0); token < at.context; ++token) {
        const float* update = p.ring + at.read_slot * p.ring_stride + token % p.ring_rows * int64_t{p.ring_width};
        const float* key = update + at.key_head * kDim + lane.column;
        const float* u = update + (p.key_heads + at.value_head) * kDim + at.column + lane.row;
        const float decay = expf(update[(p.key_heads + p.value_heads) * kDim + at.value_head]);
        const float of_row[2] = {u[0], u[8]};
#pragma unroll
        for (int i = 0; i < 64; ++i) s[i] = decay * s[i] + of_row[i / 2 % 2] * key[i / 4 * 8 + i % 2];
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
