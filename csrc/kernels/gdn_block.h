// What gdn_block.cu's kernel is laid out by: the caller's memory, shared memory, who has which units.
#pragma once
#include <launch.h>
#include <ptx.h>

#include <algorithm>
#include <cstdint>

#include "gated_delta_rule_decode.h"
#include "kernels.h"
#include "moe_block.h"

namespace tokenspeed::gdn_layer {

using delta_rule::kDim;
using delta_rule::kTaps;
using delta_rule::Place;
using delta_rule::Slots;
using expert_decode::Cursor;
using expert_decode::kConsumerBarrier;
using expert_decode::kConsumers;
using expert_decode::kConsumerThreads;
using expert_decode::kSharedLimit;
using expert_decode::kStageBytes;
using expert_decode::kThreads;
using expert_decode::kWeightWarp;
using moe_layer::Dense;
using moe_layer::kChunk;

using Format = expert_decode::Format<__nv_bfloat16>;
using Shape = expert_decode::Shape<Dense>;

constexpr int kKeeperWarp = kWeightWarp + 1;
constexpr int kRows = kGdnBlockRows;
constexpr int kTokensLimit = 4;  // of a sequence
constexpr int kStateRows = kStageBytes / (kDim * 4);
constexpr int kTileColumns = Dense::kTileColumns;
constexpr int kRowSums = Shape::kDepthWarps * Shape::kPitch;  // floats that one row's sums of a tile take

// With one token a sequence, whose registers allow it, a block takes half of a multiprocessor, so that its neighbours'
// rings fill beside it; the ring is what that leaves, and kLeastStages at least.
constexpr int kStages = 8, kLeastStages = 3;
constexpr int kHalfShared = 112 * 1024;
// Of the stages so many are asked for before x is, which would wait behind them.
constexpr int kEarlyStages = 5;

// The caller's memory: for each block the number of launches, for each unit the number of the last that stored its
// heads; then words that carry the number of their launch, the first product by pairs of columns [rows, projections /
// 2], and sums of squares [rows, value_heads, 8].
constexpr int kMaxBlocks = 512;

struct Control {
    uint64_t full[kStages], empty[kStages];
    uint64_t begun;     // the launch's number is known
    uint64_t prepared;  // the unit's place and slots are known; its taps, history and ring are in shared memory
    uint64_t computed;  // the unit's updates
    uint32_t launch;
    Place place;  // the unit's
    Slots slots;
    float squares[kConsumers];
};

// Dynamic shared memory: the ring; rows of the operand, x and later the heads; two tiles' sums; taps, last inputs and
// new inputs of the unit's channels, by pairs; what the delta rule has; control.
struct Layout {
    int stages, rows, pitch;  // of the operand, in bytes
    int pairs, tokens, delta_bytes;

    __host__ __device__ int operand_offset() const { return stages * kStageBytes; }
    __host__ __device__ int sums_offset() const { return operand_offset() + rows * pitch; }
    __host__ __device__ int taps_offset() const { return sums_offset() + 2 * rows * kRowSums * 4; }
    __host__ __device__ int history_offset() const { return taps_offset() + pairs * 16; }
    __host__ __device__ int inputs_offset() const { return history_offset() + (kTaps - 1) * pairs * 4; }
    __host__ __device__ int delta_offset() const { return inputs_offset() + tokens * pairs * 4; }
    __host__ __device__ int control_offset() const { return delta_offset() + (delta_bytes + 15) / 16 * 16; }
    __host__ __device__ int bytes() const { return control_offset() + static_cast<int>(sizeof(Control)); }
};

// Value rows of a unit: of a key head's group.
__host__ __device__ inline int rows_of_unit(const GatedDeltaRuleDecode& p) {
    return p.value_heads / p.key_heads * kDim / p.split;
}

// Words of a row of the first product.
__host__ __device__ inline int pair_pitch(const GdnBlock& p) {
    return (p.projections + kTileColumns - 1) / kTileColumns * (kTileColumns / 2);
}

inline Layout layout_for(const GdnBlock& p) {
    const int rows = rows_of_unit(p.mixer);
    const delta_rule::Shared shared(nullptr, p.mixer.tokens, rows, p.mixer.ring_rows);
    Layout layout{.stages = 0,
                  .rows = p.tokens,
                  .pitch = Format::row_pitch(std::max(p.hidden, p.mixer.value_heads * kDim)),
                  .pairs = kDim + rows / 2,
                  .tokens = p.mixer.tokens,
                  .delta_bytes = static_cast<int>(shared.bytes)};
    const int limit = p.mixer.tokens == 1 ? kHalfShared : kSharedLimit;
    layout.stages = std::clamp((limit - layout.bytes()) / kStageBytes, kLeastStages, kStages);
    return layout;
}

struct Arguments {
    GdnBlock p;
    Layout layout;
    int pair_pitch;
    uint32_t* flags;       // of the units
    uint64_t* projected;   // [rows, pair_pitch], tagged
    uint64_t* squares;     // [rows, value_heads, 8], tagged
    __nv_bfloat16* heads;  // [rows, value_heads 128]
};

// How many tiles and units there are, and which are a block's: tiles of in_proj from the first block on, the others
// from the last, so that nobody has one more of each.
struct Work {
    int in_tiles, out_tiles, turn;
    bool has_unit;

    __device__ explicit Work(const GdnBlock& p)
        : in_tiles((p.projections + kTileColumns - 1) / kTileColumns),
          out_tiles(p.hidden / kTileColumns),
          turn(static_cast<int>(gridDim.x) - 1 - static_cast<int>(blockIdx.x)),
          has_unit(turn < p.mixer.sequences * p.mixer.key_heads * p.mixer.split) {}

    __device__ Place place(const GatedDeltaRuleDecode& p) const {
        Place at;
        at.rank = turn % p.split;
        at.key_head = turn / p.split % p.key_heads;
        at.sequence = turn / (p.split * p.key_heads);
        at.ratio = p.value_heads / p.key_heads;
        at.rows = rows_of_unit(p);
        at.first_row = at.rank * at.rows;
        return at;
    }
};

// The first of the unit's value rows, of all.
__device__ inline int group_row(const Place& at) {
    return at.key_head * at.ratio * kDim + at.first_row;
}

// The first channel of a pair: those of q, of k, of the unit's values.
__device__ inline int channel_of(const GatedDeltaRuleDecode& p, const Place& at, int pair) {
    if (pair < kDim / 2) return at.key_head * kDim + 2 * pair;
    if (pair < kDim) return (p.key_heads + at.key_head) * kDim + 2 * pair - kDim;
    return 2 * p.key_heads * kDim + group_row(at) + 2 * (pair - kDim);
}

}  // namespace tokenspeed::gdn_layer
