// What moe_experts_prefill.cu and moe_experts_prefill_fp8.cu share: a stage is 128 bytes of each row, 64 columns of bf16
// or 128 of e4m3; which expert a tile is of; the last launch.
#pragma once
#include <launch.h>
#include <ptx.h>

#include "kernels.h"

namespace tokenspeed::expert_prefill {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 384;  // warpgroup 0 copies, 1 and 2 multiply
constexpr int kGroupThreads = 128;
constexpr int kGroupChoices = 64;  // that a warpgroup multiplies at a time
constexpr int kTileRows = 256;     // of weights
constexpr int kStages = 4;
constexpr int kRowBytes = 128;  // of a stage: what a row of a swizzled tile has
constexpr int kMaxExperts = 512;

// In shared memory: how many tiles of choices lower experts have.
struct TileTable {
    int before[kMaxExperts + 1];  // the total past the last expert
    int warp_total[kThreads / 32];

    __device__ int count() const { return before[kMaxExperts]; }

    // tiles_of(choices): how many an expert has. Called by the whole block, which then needs a barrier.
    template <typename TilesOf>
    __device__ void fill(const int32_t* offsets, int experts, TilesOf tiles_of) {
        constexpr int kShare = kMaxExperts / kThreads + 1;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = static_cast<int>(threadIdx.x) * kShare;
        int tiles[kShare], mine = 0;
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            tiles[i] = first + i < experts ? tiles_of(offsets[first + i + 1] - offsets[first + i]) : 0;
            mine += tiles[i];
        }
        int through = mine;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(kAllLanes, through, distance);
            if (lane >= distance) through += other;
        }
        if (lane == 31) warp_total[warp] = through;
        __syncthreads();
        int lower = through - mine;
        for (int w = 0; w < warp; ++w) lower += warp_total[w];
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            if (first + i <= kMaxExperts) before[first + i] = lower;
            lower += tiles[i];
        }
    }

    // The expert of a tile, where each tile of choices is so many tiles. Called by a whole warp.
    __device__ int find(int index, int column_tiles) const {
        constexpr int kStride = kMaxExperts / 32;
        const int lane = threadIdx.x % 32;
        const int coarse = __popc(__ballot_sync(kAllLanes, before[lane * kStride] * column_tiles <= index)) - 1;
        const int* part = before + coarse * kStride + 1;
        return coarse * kStride +
               __popc(__ballot_sync(kAllLanes, lane < kStride - 1 && part[lane] * column_tiles <= index));
    }
};

// A place in the ring and the parity of its phase.
struct Cursor {
    int slot = 0;
    uint32_t phase = 0;

    __device__ void next() {
        if (++slot == kStages) slot = 0, phase ^= 1;
    }
};

// The sum of each token's rows, [choices, hidden] by token and rank, in order of rank, with its weights: the last
// launch.
cudaError_t sum_ranks(const MoeExperts& p, const __nv_bfloat16* rows, cudaStream_t stream);

}  // namespace tokenspeed::expert_prefill
