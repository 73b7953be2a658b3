// What moe_block.cu's kernel is laid out by: the third shape of a tile, counters, shared memory, the workspace.
#pragma once
#include <launch.h>
#include <ptx.h>

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "moe_experts_decode.h"

namespace tokenspeed::moe_layer {

using expert_decode::Cursor;
using expert_decode::Down;
using expert_decode::GateUp;
using expert_decode::kChunk;
using expert_decode::kConsumerBarrier;
using expert_decode::kConsumers;
using expert_decode::kConsumerThreads;
using expert_decode::kLeastStages;
using expert_decode::kMaxStages;
using expert_decode::kRowPadding;
using expert_decode::kRowWarp;
using expert_decode::kSharedLimit;
using expert_decode::kStageBytes;
using expert_decode::kThreads;
using expert_decode::kWeightWarp;
using expert_decode::Shape;

constexpr int kTokens = kMoeBlockTokens;
constexpr int kMaxEntries = kTokens * kMaxTopK;
constexpr int kRowSlots = 2;
constexpr uint8_t kNobody = 0xff;  // the rank of a token that has not chosen the expert
// Of the ring that leaves room for a neighbouring kernel's: what a block may have of a multiprocessor then.
constexpr int kTogetherStages = 6;
constexpr int kHalfMultiprocessor = 113 * 1024;

// A product that every token takes part in: a stage is 16 rows x 512 of depth, whose warps meet at the end.
struct Dense {
    static constexpr int kRowWarps = 1;
    static constexpr int kTileColumns = 16;
};

template <typename... Products>
constexpr int most_sums() {
    return std::max({Shape<Products>::kDepthWarps * Shape<Products>::kPitch...});
}
constexpr int kTokenSums = most_sums<Dense, GateUp, Down>();  // floats that one token's sums of a unit take

// In the caller's memory: a word whose last bit says which of two sets the next launch counts in, and the sets. A
// launch clears the set that it does not use.
constexpr int kMaxOutputTiles = 320;
struct CounterSet {
    uint32_t projected;  // tiles of the first product, a count for each token, and blocks without one
    uint32_t padding[31];
    uint32_t activated[kMaxEntries];  // tiles of an expert's activations, a count for each token
    uint32_t done[kMaxOutputTiles];   // rows of an output tile, two counts each
};
struct Counters {
    uint32_t turn;
    uint32_t padding[31];
    CounterSet sets[2];
};
constexpr int kSetWords = sizeof(CounterSet) / sizeof(uint32_t);
static_assert(sizeof(Counters) <= 1024 * sizeof(uint32_t), "the operator asks for 1024");

struct Control {
    uint64_t full[kMaxStages], empty[kMaxStages];
    uint64_t rows_full[kRowSlots], rows_empty[kRowSlots];
    uint64_t begun, listed;               // the turn is known; the list of entries is complete
    int turn, entries, local_choices;     // local: of experts that are here
    float squares[kConsumers];            // of one row of x, by warp
    float weights[kMaxEntries];           // of the choices, token top_k + rank
    int16_t chosen[kMaxEntries];          // the expert among those here, or -1
    uint8_t entry_of[kMaxEntries];        // of the first choice of an expert
    uint16_t experts[kMaxEntries];        // of the entries
    uint8_t ranks[kMaxEntries][kTokens];  // [entry, token]: the rank that the token gave it, or kNobody
};

// Dynamic shared memory: the ring, rows of x, row slots, two units' sums, the first choice of each expert, control.
struct Layout {
    int stages, tokens, row_pitch, slot_pitch, experts;  // pitches in bytes

    __host__ __device__ int rows_offset() const { return stages * kStageBytes; }
    __host__ __device__ int slots_offset() const { return rows_offset() + tokens * row_pitch; }
    __host__ __device__ int sums_offset() const { return slots_offset() + kRowSlots * tokens * slot_pitch; }
    __host__ __device__ int first_offset() const { return sums_offset() + 2 * tokens * kTokenSums * 4; }
    __host__ __device__ int control_offset() const { return (first_offset() + experts * 4 + 15) / 16 * 16; }
    __host__ __device__ int bytes() const { return control_offset() + static_cast<int>(sizeof(Control)); }
};

// Six stages where that leaves room for a neighbour, else the deepest ring that fits.
inline Layout layout_for(const MoeBlock& p) {
    Layout layout{kTogetherStages, p.tokens, p.hidden * 2 + kRowPadding, std::max(p.width, p.shared) * 2 + kRowPadding,
                  p.held};
    if (layout.bytes() <= kHalfMultiprocessor) return layout;
    layout.stages = 0;
    layout.stages = std::min((kSharedLimit - layout.bytes()) / kStageBytes, kMaxStages);
    return layout;
}

struct Arguments {
    MoeBlock p;
    Layout layout;
    int projected_pitch;         // elements
    __nv_bfloat16* projected;    // [tokens, projected_pitch]
    __nv_bfloat16* activations;  // [choices, width], by token and rank
    float* rows;                 // [choices, hidden], by token and rank
    __nv_bfloat16* shared_rows;  // [tokens, hidden]
};

}  // namespace tokenspeed::moe_layer
