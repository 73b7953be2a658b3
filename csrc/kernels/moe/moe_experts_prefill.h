// What the files moe_experts_prefill*.cu share: the sizes of tiles and stages, the table of tiles, the ring's places,
// the last launch. A stage is 128 bytes of each row: 64 columns of bf16, 128 of e4m3.
#pragma once
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include "kernels.h"
#include "ring.h"

namespace tokenspeed::expert_prefill {

constexpr int kThreads = 384;  // warpgroup 0 copies, 1 and 2 multiply
constexpr int kCopyThreads = 128;
constexpr int kTileRows = 256;  // of weights
constexpr int kStages = 4;
constexpr int kRowBytes = 128;                    // of a stage: what a row of a swizzled tile has
constexpr int kGroupChoices = 64;                 // that one warpgroup multiplies
constexpr int kStageChoices = 3 * kGroupChoices;  // of bf16: that a block's stage has room for
constexpr int kBoxChoices = kGroupChoices / 2;    // of bf16: that TMA brings at once
constexpr int kClusterBlocks = 2;
constexpr int kMaxExperts = 512;

// Of shared memory: which tiles of choices are whose.
struct Table {
    int tiles_before[kMaxExperts + 1];  // tiles of lower experts; the total past the last expert
    int warp_total[kThreads / 32];

    // Called by the whole block, which has to synchronize before it reads.
    __device__ void fill(const int32_t* offsets, int experts, int tile_choices) {
        constexpr int kShare = kMaxExperts / kThreads + 1;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = static_cast<int>(threadIdx.x) * kShare;
        int tiles[kShare], mine = 0;
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            const int choices = first + i < experts ? offsets[first + i + 1] - offsets[first + i] : 0;
            tiles[i] = (choices + tile_choices - 1) / tile_choices;
            mine += tiles[i];
        }
        int through = warp_running_sum(mine);
        if (lane == 31) warp_total[warp] = through;
        __syncthreads();
        int before = through - mine;
        for (int w = 0; w < warp; ++w) before += warp_total[w];
#pragma unroll
        for (int i = 0; i < kShare; ++i) {
            if (first + i <= kMaxExperts) tiles_before[first + i] = before;
            before += tiles[i];
        }
    }

    // The expert whose tile, of `column_tiles` for each tile of choices, is the index-th. Called by a whole warp.
    __device__ int expert_of(int index, int column_tiles) const {
        constexpr int kStride = kMaxExperts / 32;
        const int lane = threadIdx.x % 32;
        const bool reached = tiles_before[lane * kStride] * column_tiles <= index;
        const int coarse = __popc(__ballot_sync(kAllLanes, reached)) - 1;
        const int* part = tiles_before + coarse * kStride + 1;
        const int within = __popc(__ballot_sync(kAllLanes, lane < kStride - 1 && part[lane] * column_tiles <= index));
        return coarse * kStride + within;
    }
};

// Starts the ring's barriers. By one thread.
__device__ inline void start_ring(uint64_t* full, uint64_t* empty, int full_arrivals, int empty_arrivals) {
    for (int i = 0; i < kStages; ++i) {
        ptx::mbarrier_init(&full[i], full_arrivals);
        ptx::mbarrier_init(&empty[i], empty_arrivals);
    }
    ptx::fence_mbarrier_init();
}

// A prefill and what passes between its launches.
struct Prefill {
    MoeExperts p;
    const void* x;        // [tokens, hidden]
    uint32_t x_pieces;    // of 16 bytes: from a row of x to the next
    void* activations;    // [choices, width], in the order of `order`
    __nv_bfloat16* rows;  // [choices, hidden], by token and rank
    int* next_tiles;      // that nobody has claimed: of gate_up, of down
    // Of e4m3, which x and activations are then too: scales by groups of columns, then by tokens or choices.
    const float* x_scale = nullptr;
    float* activation_scale = nullptr;
    uint32_t x_scale_stride = 0, activation_scale_stride = 0;  // from a group's to the next group's
};

// moe_experts_prefill_alone.cu and moe_experts_prefill_cluster.cu: both grouped products, the first tiles those of so
// many blocks or clusters.
cudaError_t products_alone(const Prefill& a, int blocks, cudaStream_t stream);
cudaError_t products_in_clusters(const Prefill& a, int clusters, cudaStream_t stream);

// Whether an expert has on average more than so many choices. Of a model split over ranks by experts, choices that are
// elsewhere count, and so do their experts: the host does not know `offsets`.
inline bool has_more_choices(const MoeExperts& p, int choices) {
    const int64_t experts = p.model_experts > p.experts ? p.model_experts : p.experts;
    return int64_t{p.tokens} * p.top_k > experts * choices;
}

// The first launch: the counters of tiles, for so many blocks or clusters that claim them.
cudaError_t start_tiles(int* next_tiles, int takers, cudaStream_t stream);

// The sum of each token's rows, [choices, hidden] by token and rank, in order of rank, with its weights: the last
// launch.
cudaError_t sum_ranks(const MoeExperts& p, const __nv_bfloat16* rows, cudaStream_t stream);

}  // namespace tokenspeed::expert_prefill
