// The parts of moe_experts_prefill_fp8.cu, whose blocks work each alone: tiles and their order, the plan of shared
// memory, the gather of rows, the stores.
#pragma once
#include <bf16x8.h>
#include <ptx.h>
#include <ptx_tma.h>

#include "moe_experts_prefill.h"

namespace tokenspeed::expert_prefill {

constexpr int kTileChoices = 2 * kGroupChoices;
constexpr int kPairs = kTileRows / 2;  // gate rows of a tile, each with its up row
constexpr int kChoiceBytes = kTileChoices * kRowBytes, kWeightBytes = kTileRows * kRowBytes;
constexpr int kOutputColumns = 128;  // that a warp stages at once
constexpr int kOutputBytes = kOutputColumns * 2;

struct Storage {  // of dynamic shared memory
    uint8_t choices[kStages][kChoiceBytes];
    uint8_t weights[kStages][kWeightBytes];
    uint8_t output[8][16 * kOutputBytes];  // 16 rows a warp, pieces of 16 bytes swizzled
    uint64_t full[kStages], empty[kStages];
    Table table;
};
static_assert(sizeof(Storage) <= kSharedLimit);

struct Tile {
    int expert, first, choices, column_tile;  // first: position in `order`; choices <= kTileChoices
};

// All tiles of one product, this block's in order.
class Tiles {
  public:
    __device__ Tiles(const Storage& storage, const int32_t* offsets, int columns, int tile_columns)
        : table_(storage.table), offsets_(offsets), column_tiles_((columns + tile_columns - 1) / tile_columns) {}

    __device__ int count() const { return table_.tiles_before[kMaxExperts] * column_tiles_; }

    // Called by a whole warp.
    __device__ Tile find(int index) const {
        const int* before = table_.tiles_before;
        const int expert = table_.expert_of(index, column_tiles_);
        const int local = index - before[expert] * column_tiles_, row_tiles = before[expert + 1] - before[expert];
        const int first = offsets_[expert] + local % row_tiles * kTileChoices;
        return {expert, first, min(offsets_[expert + 1] - first, kTileChoices), local / row_tiles};
    }

  private:
    const Table& table_;
    const int32_t* offsets_;
    int column_tiles_;
};

// Fills the table and starts the barriers. Called by the whole block; ends with a barrier.
__device__ inline void prepare(Storage& storage, const int32_t* offsets, int experts, int full_arrivals) {
    constexpr int kReaders = (kThreads - kCopyThreads) / 32;  // warps that multiply
    if (threadIdx.x == 0) start_ring(storage.full, storage.empty, full_arrivals, kReaders);
    storage.table.fill(offsets, experts, kTileChoices);
    __syncthreads();
}

// What a copying thread gathers of a tile: a piece of 16 bytes of the rows of x of every 16th choice.
struct Gather {
    static constexpr int kRows = kTileChoices / 16;
    int choice[kRows];  // token * top_k + rank; negative past the tile's end

    __device__ Gather(const MoeExperts& p, const Tile& tile) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int row = threadIdx.x / 8 + i * 16;
            choice[i] = row < tile.choices ? p.order[tile.first + row] : -1;
        }
    }
};

// Copies one stage, `offset` bytes into each row. Rows past the end keep what they held: they reach no row of the
// output but their own.
__device__ __forceinline__ void copy_choices(uint8_t* choices, const uint8_t* const (&source)[Gather::kRows],
                                             int64_t offset) {
    const int piece = threadIdx.x % 8, row = threadIdx.x / 8;
    uint8_t* to = choices + row * kRowBytes + (piece ^ row % 8) * 16;
#pragma unroll
    for (int i = 0; i < Gather::kRows; ++i) {
        if (source[i] != nullptr) ptx::cp_async(to + i * 16 * kRowBytes, source[i] + offset);
    }
}

// By one warp: both operands of the product with down, by TMA.
template <int kDepth>
__device__ __forceinline__ void copy_activations(Storage& storage, const Tiles& tiles, int stages, int count, int step,
                                                 Cursor& at, const CUtensorMap& activations, const CUtensorMap& down) {
    for (int index = blockIdx.x; index < count; index += step) {
        const Tile tile = tiles.find(index);
        for (int s = 0; threadIdx.x == 0 && s < stages; ++s) {
            uint64_t* full = &storage.full[at.slot];
            ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
            ptx::mbarrier_arrive_expect_tx(full, kChoiceBytes + kWeightBytes);
            ptx::tma_load<2>(storage.choices[at.slot], &activations, full, {s * kDepth, tile.first});
            ptx::tma_load<3>(storage.weights[at.slot], &down, full,
                             {s * kDepth, tile.column_tile * kTileRows, tile.expert});
            at.next(kStages);
        }
    }
}

// Stores a warp's 16 rows x 128 columns. values[j][i]: the packed pairs of fragment register pair i (rows + 8 i) of
// columns 8 j. `row_pointer(row)` gives where a row's columns go, null to leave it out; `columns` of them exist.
template <typename Values, typename RowPointer>
__device__ __forceinline__ void store_rows(uint8_t* output, Values values, int columns, RowPointer row_pointer) {
    const int lane = threadIdx.x % 32;
    __syncwarp();  // what the warp stored before has been read
    // Lane l names row l % 8 of the four 8 x 8 blocks: upper and lower rows of columns 8 j, then of 8 (j + 1).
    const int row = lane % 16, step = lane / 16;
#pragma unroll
    for (int j = 0; j < kOutputColumns / 8; j += 2) {
        const uint32_t block[4] = {values(j, 0), values(j, 1), values(j + 1, 0), values(j + 1, 1)};
        ptx::stmatrix_x4(ptx::shared_address(output + row * kOutputBytes + ((j + step) ^ row % 8) * 16), block);
    }
    __syncwarp();
    const int piece = lane % 16;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int from = i * 2 + lane / 16;
        __nv_bfloat16* to = row_pointer(from);
        if (to == nullptr || piece * 8 >= columns) continue;
        store_16(to + piece * 8,
                 *reinterpret_cast<const uint4*>(output + from * kOutputBytes + (piece ^ from % 8) * 16));
    }
}

}  // namespace tokenspeed::expert_prefill
