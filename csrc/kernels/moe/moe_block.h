// What moe_block.cu's kernel is laid out by: shapes of a stage, the caller's memory, shared memory, who has which
// units.
#pragma once
#include <launch.h>
#include <ptx.h>

#include <algorithm>
#include <cstdint>

#include "kernels.h"
#include "moe_experts_decode.h"

namespace tokenspeed::moe_layer {

using expert_decode::kConsumerBarrier;
using expert_decode::kConsumers;
using expert_decode::kConsumerThreads;
using expert_decode::kRowWarp;
using expert_decode::kStageBytes;
using expert_decode::kThreads;
using expert_decode::kWeightWarp;
using expert_decode::Shape;

template <typename Weight>
constexpr bool kScaled = expert_decode::Format<Weight>::kScaled;
template <typename Weight>
constexpr int kChunk = expert_decode::Format<Weight>::kChunk;  // of depth
using expert_decode::kChunkBytes;

constexpr int kTokens = kMoeBlockTokens;
constexpr int kMaxEntries = kTokens * kMaxTopK;
constexpr int kRowSlots = 2;
constexpr int kUnitSlots = 4;
// With few units a block, equal shares are more even than whatever the blocks take one by one.
constexpr int kMaxTokensOfEqualShares = 2;
// Activations of one token are words with a flag, two in a word; of more, every block would read too many of them. They
// lie in groups of so many pieces of eight columns, in the order in which a lane reads the words of its two together.
constexpr int kWordPieces = 64;
constexpr uint8_t kNobody = 0xff;  // the rank of a token that has not chosen the expert
// Four stages lose nothing to twelve and gain up to a tenth: with more under way, memory is slower.
constexpr int kStages = 4;
// A block takes more than half of what a multiprocessor has, so that no two share one while the kernel ahead ends, and
// of bf16 leaves room for the next kernel's ring where its tokens are few.
constexpr int kLeastShared = 114 * 1024;

// Shapes of a stage, by the warps that share its rows; the others share its depth. In tiles of gate_up half the rows
// are gates, each of which meets an up row.
struct Dense {  // in_proj and shared_down: 16 rows x 512 of depth, or 1024 of e4m3
    static constexpr int kRowWarps = 1;
    static constexpr int kTileColumns = 16;
};
struct GateUp {
    static constexpr int kRowWarps = 2;
    static constexpr int kTileColumns = 16;
};
struct Down {
    static constexpr int kRowWarps = 4;
    static constexpr int kTileColumns = 64;
};

template <typename... Products>
constexpr int max_sums() {
    return std::max({Shape<Products>::kDepthWarps * Shape<Products>::kPitch...});
}
constexpr int kTokenSums = max_sums<Dense, GateUp, Down>();  // floats that one token's sums of a unit take

// The caller's memory: how many launches have used it; two sets of counters, used in turn, of which a launch clears the
// one it does not use; and words that carry the number of their launch, the router's logits [tokens, experts], the rows
// of down [tokens, top_k, hidden], and of one token the activations behind them. There is room for kTokens of the first
// two.
struct CounterSet {
    uint32_t projected;  // blocks that have begun, and what other blocks read of the first product: tiles of each token
    uint32_t padding[31];
    uint32_t taken;  // units of the experts beyond the first of each block
    uint32_t more_padding[31];
    uint32_t activated[kMaxEntries];  // tiles of an expert's activations, a count for each token
};
struct Header {
    uint32_t launches;
    uint32_t padding[31];
    CounterSet sets[2];
    uint32_t padding_behind[32];
};
constexpr int kSetWords = sizeof(CounterSet) / sizeof(uint32_t);
constexpr int kHeaderWords = sizeof(Header) / sizeof(uint32_t);
static_assert(kHeaderWords == 448, "so says the operator");

constexpr int kRanksAtOnce = 8;  // of a token's rows, four lanes each

__device__ inline CounterSet& counters_of(uint32_t* scratch, uint32_t launch) {
    return reinterpret_cast<Header*>(scratch)->sets[launch % 2];
}

struct Control {
    uint64_t full[kStages], empty[kStages];
    uint64_t rows_full[kRowSlots], rows_empty[kRowSlots];
    uint64_t units_full[kUnitSlots], units_empty[kUnitSlots];
    uint64_t shared_full;
    uint64_t begun, listed;  // the launch's number is known; the list of entries is complete
    uint32_t launch;
    int entries;
    int units[kUnitSlots];                // what the block has taken of the experts; -1: nothing is left
    float squares[kConsumers];            // of one row of x, by warp
    float weights[kMaxEntries];           // of the choices, token top_k + rank
    int16_t chosen[kMaxEntries];          // the expert among those here, or -1
    uint8_t entry_of[kMaxEntries];        // of the first choice of an expert
    uint16_t experts[kMaxEntries];        // of the entries
    uint8_t ranks[kMaxEntries][kTokens];  // [entry, token]: the rank that the token gave it, or kNobody
};

// Dynamic shared memory: the ring, a stage of shared_down, rows of x, row slots, two units' sums, the first choice of
// each expert, control.
struct Layout {
    int tokens, row_pitch, slot_pitch, experts;  // pitches in bytes

    __host__ __device__ int shared_offset() const { return kStages * kStageBytes; }
    __host__ __device__ int rows_offset() const { return (kStages + 1) * kStageBytes; }
    __host__ __device__ int slots_offset() const { return rows_offset() + tokens * row_pitch; }
    __host__ __device__ int sums_offset() const { return slots_offset() + kRowSlots * tokens * slot_pitch; }
    __host__ __device__ int first_offset() const { return sums_offset() + 2 * tokens * kTokenSums * 4; }
    __host__ __device__ int control_offset() const { return (first_offset() + experts * 4 + 15) / 16 * 16; }
    __host__ __device__ int bytes() const { return control_offset() + static_cast<int>(sizeof(Control)); }
};

template <typename Weight>
Layout layout_for(const MoeBlock& p) {
    using F = expert_decode::Format<Weight>;
    return {p.tokens, F::row_pitch(p.hidden), F::row_pitch(std::max(p.width, p.shared)), p.held};
}

struct Arguments {
    MoeBlock p;
    Layout layout;
    bool alone = false;                    // the kernel is the one for one token
    int projected_pitch;                   // elements
    __nv_bfloat16* projected = nullptr;    // [tokens, projected_pitch]
    uint64_t* logits = nullptr;            // [tokens, experts], tagged
    uint64_t* rows = nullptr;              // [choices, hidden], by token and rank, tagged
    __nv_bfloat16* activations = nullptr;  // [choices, width], by token and rank
    uint64_t* words = nullptr;             // the same, alone: [choices, words_pitch], tagged, behind `rows`
    __nv_bfloat16* shared_rows = nullptr;  // [tokens, hidden]
};

// Words of a choice's activations, and where those of its piece of eight columns begin.
__host__ __device__ constexpr int words_pitch(int width) {
    return (width / 8 + kWordPieces - 1) / kWordPieces * kWordPieces * 4;
}
__device__ __forceinline__ int words_of(int piece) {
    return (piece / kWordPieces * kWordPieces + piece % 32 * 2 + piece / 32 % 2) * 4;
}

// How many units of each kind there are, and who has them. Of the first product, tiles in bf16 come before those in
// e4m3, which want x in fp16.
template <typename Weight>
struct Work {
    int in_tiles, leading_tiles, router_column, router_tiles, column_tiles, gate_up_tiles, down_tiles;

    __device__ explicit Work(const MoeBlock& p)
        : in_tiles((p.projections + Dense::kTileColumns - 1) / Dense::kTileColumns),
          leading_tiles(kScaled<Weight> ? in_tiles - 2 * p.shared / Dense::kTileColumns : in_tiles),
          router_column(2 * p.shared),
          router_tiles(p.experts / Dense::kTileColumns),
          column_tiles(p.hidden / Dense::kTileColumns),
          gate_up_tiles(p.width / GateUp::kTileColumns),
          down_tiles((p.hidden + Down::kTileColumns - 1) / Down::kTileColumns) {}
    // The block's first tile of shared_down lies beside the ring, if it is one stage; others pass through it.
    __device__ static bool fits_beside(const MoeBlock& p) {
        return p.shared <= Shape<Dense>::kDepthWarps * kChunk<Weight>;
    }
    // The shared expert's turn is after a block's first unit, or before it if that wants rows, or if there is none: by
    // then its activations are there.
    __device__ static bool is_shared_turn(int item, int unit, int gate_up_units) {
        return item == 1 || unit < 0 || unit >= gate_up_units;
    }
    // The first column that a tile makes of the first product.
    __device__ int first_column(int tile) const {
        if (!kScaled<Weight>) return tile * Dense::kTileColumns;
        return tile < leading_tiles ? router_column + tile * Dense::kTileColumns
                                    : (tile - leading_tiles) * Dense::kTileColumns;
    }
    // Whether a tile of the first product is the router's: its product goes as tagged words.
    __device__ bool routes(int tile) const {
        const int column = first_column(tile);
        return column >= router_column && column < router_column + router_tiles * Dense::kTileColumns;
    }
    // What `projected` counts to.
    __device__ uint32_t projections(int tokens) const {
        return gridDim.x + static_cast<uint32_t>((in_tiles - router_tiles) * tokens);
    }
};

// Where the scales of a tile's rows begin, one for each 128 of depth; those of the up rows lie up_scales() further.
struct Scales {
    const MoeBlock& p;

    __device__ int depth() const { return p.hidden / kScaleBlock; }
    __device__ const float* in_proj(int column) const { return p.in_scale + column / kScaleBlock * depth(); }
    __device__ const float* shared_down(int column) const {
        return p.shared_scale + column / kScaleBlock * (p.shared / kScaleBlock);
    }
    __device__ const float* gate_up(int expert, int column) const {
        return p.gate_up_scale + (int64_t{expert} * 2 * (p.width / kScaleBlock) + column / kScaleBlock) * depth();
    }
    __device__ int up_scales() const { return p.width / kScaleBlock * depth(); }
    __device__ const float* down(int expert, int column) const {
        return p.down_scale + (int64_t{expert} * depth() + column / kScaleBlock) * (p.width / kScaleBlock);
    }
};

}  // namespace tokenspeed::moe_layer
