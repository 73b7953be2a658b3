// What the two kernels of moe_experts_decode.cu share: entries, units and their order, the layout of shared memory.
#pragma once
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "fp8.h"
#include "kernels.h"
#include "ring.h"

namespace tokenspeed::expert_decode {

constexpr int kConsumers = 8;  // warps that multiply; they come first
constexpr int kConsumerThreads = kConsumers * 32;
constexpr int kWeightWarp = kConsumers, kRowWarp = kConsumers + 1;
constexpr int kThreads = kConsumerThreads + 64;
constexpr int kWarps = kThreads / 32;
constexpr uint32_t kConsumerBarrier = 1;  // named barrier of the warps that multiply

constexpr int kEntryChoices = 16;
constexpr int kGroups = kEntryChoices / 8;  // N = 8 of one mma
constexpr int kMaxEntries = kMoeDecodeTokens * kMaxTopK;
constexpr int kChunkBytes = 128;  // of a weight row: what a TMA row swizzles
constexpr int kStageBytes = 16384;
constexpr int kMaxStages = 12, kLeastStages = 4;
constexpr int kMaxRowSlots = 2;
constexpr int kMaxDepth = 8192;  // past what the ring leaves room for; a warp's scales of a unit are one a lane
constexpr int kPrefetchBytes = 128 * 1024;  // of down, by each block of gate_up

// What the type of weights decides: bf16, or E4m3 with a scale for every block of 128 x 128.
template <typename Weight>
struct Format {
    static constexpr bool kScaled = std::is_same_v<Weight, E4m3>;
    static constexpr int kChunk = kChunkBytes / static_cast<int>(sizeof(Weight));  // of depth
    // Bytes of a row of choices: its elements, of e4m3 weights what each group was divided by, and padding, for two
    // rows to meet no bank twice.
    static constexpr int row_pitch(int depth) {
        return depth * 2 + (kScaled ? (depth / kScaleBlock * 4 + 127) / 128 * 128 + 16 : 64);
    }
};
static_assert(Format<E4m3>::kChunk == kScaleBlock, "one scale a chunk");

// The two products differ in the shape of a tile, in the order of their units and in what becomes of the sums.
struct GateUp {
    static constexpr int kRowWarps = 2;      // of 16 rows each: 8 gate rows and their 8 up rows
    static constexpr int kTileColumns = 16;  // of the activations
    static constexpr int kRowSlots = 1;      // an entry lasts for many units: the ring covers the change
};
struct Down {
    static constexpr int kRowWarps = 4;
    static constexpr int kTileColumns = 64;  // of the output
    static constexpr int kRowSlots = 2;
};

template <typename Product>
struct Shape {
    static constexpr int kRows = 16 * Product::kRowWarps;                // of weights in a stage
    static constexpr int kDepthWarps = kConsumers / Product::kRowWarps;  // each takes a chunk of a stage's depth
    static constexpr int kPitch = kRows + 4;  // floats of a choice's sums: distinct banks for a warp's stores
    static_assert(kRows * kDepthWarps * kChunkBytes == kStageBytes);
};

struct Entry {
    int first;  // position in `order`
    uint16_t expert, choices;
};

struct Control {
    Entry entries[kMaxEntries];
    float sums[4 * kEntryChoices * Shape<GateUp>::kPitch];  // [depth warp, choice, row]
    uint64_t full[kMaxStages], empty[kMaxStages];
    uint64_t rows_full[kMaxRowSlots], rows_empty[kMaxRowSlots];
    int warp_total[kWarps];
    int completes_tile;
};
static_assert(2 * Shape<Down>::kPitch <= 4 * Shape<GateUp>::kPitch, "both products use the same buffer of sums");

// Dynamic shared memory: the ring, row slots, control.
struct Layout {
    int stages, row_pitch, row_slots;  // row_pitch in bytes

    __host__ __device__ int rows_offset() const { return stages * kStageBytes; }
    __host__ __device__ int control_offset() const { return rows_offset() + row_slots * kEntryChoices * row_pitch; }
    __host__ __device__ int bytes() const { return control_offset() + static_cast<int>(sizeof(Control)); }
};

// The deepest ring that fits beside the rows; fewer than kLeastStages say that the depth is too long.
template <typename Weight, typename Product>
Layout layout_for(int depth) {
    Layout layout{0, Format<Weight>::row_pitch(depth), Product::kRowSlots};
    layout.stages = std::min((kSharedLimit - layout.bytes()) / kStageBytes, kMaxStages);
    return layout;
}

struct Arguments {
    MoeExperts p;
    __nv_bfloat16* activations;  // [choices, width], in the order of `order`
    float* rows;                 // [choices, hidden], by token and rank
    uint32_t* done;              // [hidden / 64] units of the tile that are complete
    Layout layout;
};

// A block's share of the units, and which unit is which.
template <typename Product>
struct Work {
    int entries, tiles, begin, end;

    __device__ Work(int entry_count, int tile_count) : entries(entry_count), tiles(tile_count) {
        const int units = entries * tiles, block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
        begin = static_cast<int>(int64_t{units} * block / blocks);
        end = static_cast<int>(int64_t{units} * (block + 1) / blocks);
    }
    __device__ int entry(int unit) const;
    __device__ int tile(int unit) const;
};
template <>
__device__ inline int Work<GateUp>::entry(int unit) const {
    return unit / tiles;
}
template <>
__device__ inline int Work<GateUp>::tile(int unit) const {
    return unit % tiles;
}
template <>
__device__ inline int Work<Down>::entry(int unit) const {
    return unit % entries;
}
template <>
__device__ inline int Work<Down>::tile(int unit) const {
    return unit / entries;
}

__device__ inline void initialise_barriers(Control& control, const Layout& layout) {
    if (threadIdx.x == 0) {
        for (int i = 0; i < layout.stages; ++i) {
            ptx::mbarrier_init(&control.full[i], 1);
            ptx::mbarrier_init(&control.empty[i], kConsumers);
        }
        for (int i = 0; i < layout.row_slots; ++i) {
            ptx::mbarrier_init(&control.rows_full[i], 1);
            ptx::mbarrier_init(&control.rows_empty[i], kConsumers);
        }
        ptx::fence_mbarrier_init();
    }
}

// Lists the entries of the experts that were hit, by rising expert, and returns their count. Called by the whole block;
// ends with a barrier.
__device__ inline int list_entries(Control& control, const int32_t* offsets, int experts) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int share = (experts + kThreads - 1) / kThreads;
    const int begin = min(static_cast<int>(threadIdx.x) * share, experts), end = min(begin + share, experts);
    int mine = 0;
    for (int e = begin; e < end; ++e) mine += (offsets[e + 1] - offsets[e] + kEntryChoices - 1) / kEntryChoices;
    int through = warp_running_sum(mine);
    if (lane == 31) control.warp_total[warp] = through;
    __syncthreads();
    int place = through - mine, total = 0;
    for (int w = 0; w < kWarps; ++w) {
        if (w < warp) place += control.warp_total[w];
        total += control.warp_total[w];
    }
    for (int e = begin; e < end; ++e) {
        for (int first = offsets[e]; first < offsets[e + 1]; first += kEntryChoices) {
            const int choices = min(offsets[e + 1] - first, kEntryChoices);
            control.entries[place++] = {first, static_cast<uint16_t>(e), static_cast<uint16_t>(choices)};
        }
    }
    __syncthreads();
    return total;
}

}  // namespace tokenspeed::expert_decode
