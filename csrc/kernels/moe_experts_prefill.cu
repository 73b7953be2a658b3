// The expert product of a prefill, any number of tokens: out_t = sum_k w_tk down_e(silu(gate_e x_t) * up_e x_t), e the
// k-th expert of token t. The choices come grouped by expert (`order`, `offsets` of moe_route).
//
// Flops: 6 hidden width a choice. 8192 tokens of 35B: 412 Gflop, 0.53 ms at 780 TFLOP/s; the weights of all experts are
// 1.6 GB, 0.37 ms at 4.3 TB/s, beside it. So 256 tokens an expert are about where the matrix unit becomes the bound.
//
// Three launches: a grouped product with gate and up, its epilogue the activation, into bf16 rows in the order of
// `order`; a grouped product with down, into bf16 rows by token and rank; the weighted sum of each token's rows in
// order of rank, in fp32. Written by hand and not on CUTLASS: the gather of x, the pairing of gate with up and the
// scatter are most of the code either way, and this runs on the emulated device.
//
// A tile is 128 choices of one expert x 256 weight rows: 128 gate rows and the 128 up rows that they meet, so that both
// lie in the same thread's accumulators, or 256 rows of down. Three warpgroups: one copies stages of 64 of depth (16 KB
// of choices, 32 KB of weights, four in flight), two multiply 64 choices each, wgmma m64n256k16. Weights, and the
// choices of the second product, come by TMA; rows of x are gathered by cp.async, eight a thread, into the layout that
// TMA would have made. A warpgroup whose 64 rows lie past the end of its expert does not multiply, so the matrix unit
// does an expert's choices rounded up to 64.
//
// Blocks are persistent, one a multiprocessor, and take every gridDim.x-th tile. Tiles of an expert are neighbours, its
// rows before its columns: blocks at work at one time share weights and rows in L2. Every block finds the expert of a
// tile in a table of tiles before each expert, which it makes at its start. The two multiplying warpgroups drift apart
// by up to the ring, so that one stores while the other multiplies.
//
// Depth walks in stages of 128 bytes a row, over all rows of some ten experts at once: strips that memory serves badly.
// So, a window of 4 stages ahead, one of the blocks that share a tile asks for its weights by 512 bytes a row into L2,
// and for the next tile's choices by whole rows. Weights are read evict-first, which leaves L2 to x.
//
// Measured on an H100 (read 3071 GB/s, product 802 TFLOP/s) before that, and when both multiplying warpgroups searched
// for their tile and down looked up the places of its rows after the products, one load behind the other: 8192 tokens
// of 35B 1303 us, 316 TFLOP/s of useful products; of 397B (160 choices an expert) 10.6 ms, 194 TFLOP/s. Memory alone
// would take 0.75 and 5.0 ms there: weights 1.6 / 12.9 GB, rows between the kernels 0.7 / 1.7 GB, x once an expert.
// Predicted now, there: 0.9 and 7 ms. Next: a cluster of two blocks that share an expert's weights by multicast.
//
// budget: gate_up_kernel registers<=168 shared<=0 hot sass=HGMMA
// budget: down_kernel registers<=168 shared<=0 hot sass=HGMMA
// budget: sum_kernel registers<=64 shared<=0 hot
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>
#include <ptx_wgmma.h>

#include <algorithm>

#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 384;  // warpgroup 0 copies, 1 and 2 multiply
constexpr int kCopyThreads = 128;
constexpr int kTileChoices = 128;
constexpr int kTileRows = 256;         // of weights
constexpr int kPairs = kTileRows / 2;  // gate rows of a tile, each with its up row
constexpr int kDepth = 64;             // of a stage: the 128 bytes that a row of a swizzled tile has
constexpr int kStages = 4;
constexpr int kWindow = 4;               // stages whose weights are asked into L2 together, 512 bytes a row
constexpr int kTileSlots = 2 * kStages;  // more than the tiles under way, which have a stage each at least
constexpr int kRowsAStage = 4;           // rows of x of the next tile that are asked into L2: a few at a time
constexpr int kRowBytes = kDepth * 2;
constexpr int kChoiceBytes = kTileChoices * kRowBytes, kWeightBytes = kTileRows * kRowBytes;
constexpr int kGroupChoices = kTileChoices / 2;  // that one warpgroup multiplies
constexpr int kMaxExperts = 512;
constexpr int kOutputColumns = 128;  // that a warp stages at once
constexpr int kOutputBytes = kOutputColumns * 2;

constexpr int kWgmmaRegisters = 216, kCopyRegisters = 72;

struct Tile {
    int expert, first, choices, row_tile, column_tile;  // first: position in `order`; choices <= kTileChoices
};

struct Storage {  // of dynamic shared memory
    uint8_t choices[kStages][kChoiceBytes];
    uint8_t weights[kStages][kWeightBytes];
    uint8_t output[8][16 * kOutputBytes];  // 16 rows a warp, pieces of 16 bytes swizzled
    uint64_t full[kStages], empty[kStages];
    Tile tiles[kTileSlots];             // the block's latest, by turn; a tile lies there once its first stage is full
    int tiles_before[kMaxExperts + 1];  // tiles of rows of lower experts; the total past the last expert
    int warp_total[kThreads / 32];
};
static_assert(sizeof(Storage) <= 227 * 1024);

struct Arguments {
    MoeExperts p;
    __nv_bfloat16* activations;  // [choices, width], in the order of `order`
    __nv_bfloat16* rows;         // [choices, hidden], by token and rank
};

// All tiles of one product, this block's in order.
class Tiles {
  public:
    __device__ Tiles(const Storage& storage, const int32_t* offsets, int columns, int tile_columns)
        : storage_(storage), offsets_(offsets), column_tiles_((columns + tile_columns - 1) / tile_columns) {}

    __device__ int count() const { return storage_.tiles_before[kMaxExperts] * column_tiles_; }

    // Called by a whole warp.
    __device__ Tile find(int index) const {
        constexpr int kStride = kMaxExperts / 32;
        const int lane = threadIdx.x % 32;
        const int* before = storage_.tiles_before;
        const int coarse = __popc(__ballot_sync(kAllLanes, before[lane * kStride] * column_tiles_ <= index)) - 1;
        const int* part = before + coarse * kStride + 1;
        const int within = __popc(__ballot_sync(kAllLanes, lane < kStride - 1 && part[lane] * column_tiles_ <= index));
        const int expert = coarse * kStride + within;
        const int local = index - before[expert] * column_tiles_, row_tiles = before[expert + 1] - before[expert];
        const int row_tile = local % row_tiles, first = offsets_[expert] + row_tile * kTileChoices;
        return {expert, first, min(offsets_[expert + 1] - first, kTileChoices), row_tile, local / row_tiles};
    }

  private:
    const Storage& storage_;
    const int32_t* offsets_;
    int column_tiles_;
};

// Fills tiles_before and starts the barriers. Called by the whole block; ends with a barrier.
__device__ void prepare(Storage& storage, const int32_t* offsets, int experts, int full_arrivals) {
    constexpr int kShare = (kMaxExperts + kThreads - 1) / kThreads;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(&storage.full[i], full_arrivals);
            ptx::mbarrier_init(&storage.empty[i], 8);  // warps that multiply
        }
        ptx::fence_mbarrier_init();
    }
    int tiles[kShare], mine = 0;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        const int expert = static_cast<int>(threadIdx.x) * kShare + i;
        const int choices = expert < experts ? offsets[expert + 1] - offsets[expert] : 0;
        tiles[i] = (choices + kTileChoices - 1) / kTileChoices;
        mine += tiles[i];
    }
    int through = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(kAllLanes, through, distance);
        if (lane >= distance) through += other;
    }
    if (lane == 31) storage.warp_total[warp] = through;
    __syncthreads();
    int before = through - mine;
    for (int w = 0; w < warp; ++w) before += storage.warp_total[w];
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        const int expert = static_cast<int>(threadIdx.x) * kShare + i;
        if (expert <= kMaxExperts) storage.tiles_before[expert] = before;
        before += tiles[i];
    }
    __syncthreads();
}

// A place in the ring and the parity of its phase.
struct Cursor {
    int slot = 0;
    uint32_t phase = 0;

    __device__ void next() {
        if (++slot == kStages) slot = 0, phase ^= 1;
    }
};

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

    // Asks for one whole row of x: every thread has another of the tile's.
    __device__ void prefetch(const MoeExperts& p) const {
        const int piece = threadIdx.x % 8;
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            if (i == piece && choice[i] >= 0) {
                ptx::bulk_prefetch_l2(p.x + choice[i] / p.top_k * p.x_stride, p.hidden * 2);
            }
        }
    }
};
static_assert(Gather::kRows == 8, "the eight threads that share rows ask for one each");

// Copies one stage. Rows past the end keep what they held: they reach no row of the output but their own.
__device__ __forceinline__ void copy_choices(uint8_t* choices, const __nv_bfloat16* const (&source)[Gather::kRows],
                                             int depth) {
    const int piece = threadIdx.x % 8, row = threadIdx.x / 8;
    uint8_t* to = choices + row * kRowBytes + (piece ^ row % 8) * 16;
#pragma unroll
    for (int i = 0; i < Gather::kRows; ++i) {
        if (source[i] != nullptr) ptx::cp_async(to + i * 16 * kRowBytes, source[i] + depth);
    }
}

// A part of the weights that will be copied a window after stage s, of this tile or of the next: kPartRows rows of a
// window's depth. Of the blocks that share a tile's weights one asks for them.
constexpr int kPartRows = kTileRows / kWindow;
struct Ahead {
    bool valid;
    int part, depth, column_tile, expert;

    __device__ Ahead(int s, int stages, const Tile& tile, const Tile& next, bool has_next) {
        const int window = s / kWindow * kWindow + kWindow;
        const bool here = window < stages;
        valid = here ? tile.row_tile == 0 : has_next && next.row_tile == 0;
        part = s % kWindow;
        depth = here ? window * kDepth : 0;
        column_tile = here ? tile.column_tile : next.column_tile;
        expert = here ? tile.expert : next.expert;
    }
};

// sum = this warpgroup's 64 choices x 256 weight rows of a tile, all its depth. kGathered: the choices were written by
// threads (cp.async), and the matrix unit must be let see it.
template <bool kGathered>
__device__ __forceinline__ void multiply_tile(float (&sum)[kTileRows / 2], Storage& storage, Cursor& at, int stages,
                                              bool has_rows) {
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    int before = -1;  // the slot whose products may still run
    for (int s = 0; s < stages; ++s) {
        ptx::mbarrier_wait(&storage.full[at.slot], at.phase);
        if (has_rows) {
            if (kGathered) ptx::fence_async_shared();
            const uint32_t choices = ptx::shared_address(storage.choices[at.slot]) + group * kGroupChoices * kRowBytes;
            const uint32_t weights = ptx::shared_address(storage.weights[at.slot]);
            ptx::wgmma_fence(sum);
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k) {
                const uint64_t a = ptx::matrix_descriptor(choices + k * 32, Swizzle::k128, 16, 8 * kRowBytes);
                const uint64_t b = ptx::matrix_descriptor(weights + k * 32, Swizzle::k128, 16, 8 * kRowBytes);
                ptx::wgmma<__nv_bfloat16, kTileRows>(sum, a, b, s > 0 || k > 0);
            }
            ptx::wgmma_commit();
            ptx::wgmma_wait<1>();
        }
        if (lane == 0 && before >= 0) ptx::mbarrier_arrive(&storage.empty[before]);
        before = at.slot;
        at.next();
    }
    ptx::wgmma_wait<0>(sum);
    if (lane == 0) ptx::mbarrier_arrive(&storage.empty[before]);
}

// A warp stores 16 rows, two at once: the row that this lane has a part in at turn i.
constexpr int kRowsOfLane = 8;
__device__ __forceinline__ int stored_row(int i) {
    return i * 2 + threadIdx.x % 32 / 16;
}

// Stores a warp's 16 rows x 128 columns. values(j, i): the packed pair of registers of rows 8 i and columns 8 j of the
// fragments. `row_pointer(i)`: where the columns of stored_row(i) go, null to leave it out; `columns` of them exist.
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
    for (int i = 0; i < kRowsOfLane; ++i) {
        const int from = stored_row(i);
        __nv_bfloat16* to = row_pointer(i);
        if (to == nullptr || piece * 8 >= columns) continue;
        store_16(to + piece * 8,
                 *reinterpret_cast<const uint4*>(output + from * kOutputBytes + (piece ^ from % 8) * 16));
    }
}

__global__ void __launch_bounds__(kThreads, 1)
    gate_up_kernel(const __grid_constant__ CUtensorMap gate_up, const __grid_constant__ CUtensorMap window,
                   const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(raw);
    auto& storage = *reinterpret_cast<Storage*>(raw);
    const MoeExperts& p = a.p;
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    prepare(storage, p.offsets, p.experts, kCopyThreads + 1);
    const Tiles tiles(storage, p.offsets, p.width, kPairs);
    const int stages = p.hidden / kDepth, count = tiles.count(), step = static_cast<int>(gridDim.x);
    Cursor at;
    if (threadIdx.x < kCopyThreads) {
        ptx::register_decrease<kCopyRegisters>();
        if (static_cast<int>(blockIdx.x) >= count) return;
        Tile tile = tiles.find(blockIdx.x);
        Gather gather(p, tile);
        int turn = 0;
        for (int index = blockIdx.x; index < count; index += step, ++turn) {
            const __nv_bfloat16* source[Gather::kRows];
#pragma unroll
            for (int i = 0; i < Gather::kRows; ++i) {
                const __nv_bfloat16* row = p.x + gather.choice[i] / p.top_k * p.x_stride;
                source[i] = gather.choice[i] >= 0 ? row + threadIdx.x % 8 * 8 : nullptr;
            }
            const Tile current = tile;
            const bool has_next = index + step < count;
            if (has_next) {  // the next tile's choices arrive while this one is copied
                tile = tiles.find(index + step);
                gather = Gather(p, tile);
            }
            for (int s = 0; s < stages; ++s) {
                ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
                if (threadIdx.x == 0) {
                    if (s == 0) storage.tiles[turn % kTileSlots] = current;
                    ptx::mbarrier_arrive_expect_tx(&storage.full[at.slot], kWeightBytes);
                    ptx::tma_load<4>(storage.weights[at.slot], &gate_up, &storage.full[at.slot],
                                     {s * kDepth, current.column_tile * kPairs, 0, current.expert},
                                     ptx::CachePolicy::kEvictFirst);
                    const Ahead ahead(s, stages, current, tile, has_next);
                    if (ahead.valid) {
                        const int row = ahead.part * kPartRows;  // gate rows, then up rows
                        ptx::tma_prefetch_l2<4>(&window, {ahead.depth, ahead.column_tile * kPairs + row % kPairs,
                                                          row / kPairs, ahead.expert});
                    }
                }
                copy_choices(storage.choices[at.slot], source, s * kDepth);
                if (has_next && tile.column_tile == 0 && static_cast<int>(threadIdx.x) / kRowsAStage == s) {
                    gather.prefetch(p);
                }
                ptx::cp_async_mbarrier_arrive(&storage.full[at.slot]);
                at.next();
            }
        }
    } else {
        ptx::register_increase<kWgmmaRegisters>();
        const int row_of_warp = threadIdx.x / 32 * 16 - kCopyThreads / 2;
        uint8_t* output = storage.output[threadIdx.x / 32 - 4];
        int turn = 0;
        for (int index = blockIdx.x; index < count; index += step, ++turn) {
            ptx::mbarrier_wait(&storage.full[at.slot], at.phase);
            const Tile tile = storage.tiles[turn % kTileSlots];
            const bool has_rows = row_of_warp / kGroupChoices * kGroupChoices < tile.choices;
            float sum[kTileRows / 2];
            multiply_tile<true>(sum, storage, at, stages, has_rows);
            if (!has_rows) continue;
            const auto activation = [&](int j, int i) {
                const int gate = 4 * j + 2 * i, up = gate + kTileRows / 4;
                return pack<__nv_bfloat16>(silu(sum[gate]) * sum[up], silu(sum[gate + 1]) * sum[up + 1]);
            };
            const int column = tile.column_tile * kPairs;
            store_rows(output, activation, p.width - column, [&](int i) -> __nv_bfloat16* {
                const int choice = row_of_warp + stored_row(i);
                if (choice >= tile.choices) return nullptr;
                return a.activations + int64_t{tile.first + choice} * p.width + column;
            });
        }
    }
}

__global__ void __launch_bounds__(kThreads, 1)
    down_kernel(const __grid_constant__ CUtensorMap activations, const __grid_constant__ CUtensorMap down,
                const __grid_constant__ CUtensorMap window, const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(raw);
    auto& storage = *reinterpret_cast<Storage*>(raw);
    const MoeExperts& p = a.p;
    prepare(storage, p.offsets, p.experts, 1);  // the routing is older than the kernel that is waited for
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const Tiles tiles(storage, p.offsets, p.hidden, kTileRows);
    const int stages = p.width / kDepth, count = tiles.count(), step = static_cast<int>(gridDim.x);
    Cursor at;
    if (threadIdx.x < kCopyThreads) {
        ptx::register_decrease<kCopyRegisters>();
        if (threadIdx.x >= 32 || static_cast<int>(blockIdx.x) >= count) return;
        Tile tile = tiles.find(blockIdx.x);
        int turn = 0;
        for (int index = blockIdx.x; index < count; index += step, ++turn) {
            const Tile current = tile;
            const bool has_next = index + step < count;
            if (has_next) tile = tiles.find(index + step);
            // The next tile's choices are asked into L2 by as many bytes a stage as the stage copies.
            const int next_bytes = has_next && tile.column_tile == 0 ? tile.choices * p.width * 2 : 0;
            const auto* next_choices = reinterpret_cast<const uint8_t*>(a.activations + int64_t{tile.first} * p.width);
            for (int s = 0; threadIdx.x == 0 && s < stages; ++s) {
                uint64_t* full = &storage.full[at.slot];
                ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
                if (s == 0) storage.tiles[turn % kTileSlots] = current;
                ptx::mbarrier_arrive_expect_tx(full, kChoiceBytes + kWeightBytes);
                ptx::tma_load<2>(storage.choices[at.slot], &activations, full, {s * kDepth, current.first});
                ptx::tma_load<3>(storage.weights[at.slot], &down, full,
                                 {s * kDepth, current.column_tile * kTileRows, current.expert},
                                 ptx::CachePolicy::kEvictFirst);
                const int asked = s * kChoiceBytes;
                if (asked < next_bytes)
                    ptx::bulk_prefetch_l2(next_choices + asked, min(kChoiceBytes, next_bytes - asked));
                const Ahead ahead(s, stages, current, tile, has_next);
                if (ahead.valid) {
                    ptx::tma_prefetch_l2<3>(
                        &window, {ahead.depth, ahead.column_tile * kTileRows + ahead.part * kPartRows, ahead.expert});
                }
                at.next();
            }
        }
    } else {
        ptx::register_increase<kWgmmaRegisters>();
        const int row_of_warp = threadIdx.x / 32 * 16 - kCopyThreads / 2;
        uint8_t* output = storage.output[threadIdx.x / 32 - 4];
        int turn = 0;
        for (int index = blockIdx.x; index < count; index += step, ++turn) {
            ptx::mbarrier_wait(&storage.full[at.slot], at.phase);
            const Tile tile = storage.tiles[turn % kTileSlots];
            const bool has_rows = row_of_warp / kGroupChoices * kGroupChoices < tile.choices;
            int flat[kRowsOfLane];  // where the rows that this lane stores go; loaded while the tile is multiplied
#pragma unroll
            for (int i = 0; i < kRowsOfLane; ++i) {
                const int choice = row_of_warp + stored_row(i);
                flat[i] = choice < tile.choices ? p.order[tile.first + choice] : -1;
            }
            float sum[kTileRows / 2];
            multiply_tile<false>(sum, storage, at, stages, has_rows);
            if (!has_rows) continue;
#pragma unroll
            for (int part = 0; part < kTileRows / kOutputColumns; ++part) {
                const int column = tile.column_tile * kTileRows + part * kOutputColumns;
                const auto packed = [&](int j, int i) {
                    const int at_register = part * kOutputColumns / 2 + 4 * j + 2 * i;
                    return pack<__nv_bfloat16>(sum[at_register], sum[at_register + 1]);
                };
                store_rows(output, packed, p.hidden - column, [&](int i) -> __nv_bfloat16* {
                    return flat[i] < 0 ? nullptr : a.rows + int64_t{flat[i]} * p.hidden + column;
                });
            }
        }
    }
}

constexpr int kSumThreads = 256;
constexpr int kRanksAtOnce = 4;  // rows in flight a thread

// out[token] = the sum over ranks of weight times row: a thread eight columns.
__global__ void __launch_bounds__(kSumThreads) sum_kernel(const __grid_constant__ Arguments a) {
    const MoeExperts& p = a.p;
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const int vectors = p.hidden / 8;
    const int64_t index = int64_t{blockIdx.x} * kSumThreads + threadIdx.x, token = index / vectors;
    if (token >= p.tokens) return;
    const int column = static_cast<int>(index % vectors) * 8;
    const __nv_bfloat16* rows = a.rows + token * p.top_k * p.hidden + column;
    const __nv_bfloat16* weights = p.weights + token * p.top_k;
    const int32_t* chosen = p.chosen + token * p.top_k;
    Float8 sum{};
    for (int first = 0; first < p.top_k; first += kRanksAtOnce) {
        uint4 row[kRanksAtOnce];
#pragma unroll
        for (int i = 0; i < kRanksAtOnce; ++i) {
            if (first + i < p.top_k) row[i] = ptx::load_16_no_allocate(rows + int64_t{first + i} * p.hidden);
        }
#pragma unroll
        for (int i = 0; i < kRanksAtOnce; ++i) {
            if (first + i >= p.top_k) break;
            // Loaded in any case, not to wait for `chosen` first; a row of an expert elsewhere holds anything.
            const auto expert = static_cast<uint32_t>(chosen[first + i] - p.first_expert);
            if (expert >= static_cast<uint32_t>(p.experts)) continue;
            const float weight = to_float(weights[first + i]);
            const Float8 x = unpack(row[i]);
#pragma unroll
            for (int j = 0; j < 8; ++j) sum.v[j] += weight * x.v[j];
        }
    }
    store_16(p.out + token * p.hidden + column, pack(sum));
}

}  // namespace

bool moe_experts_prefill_supported(const MoeExperts& p) {
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    return p.tokens >= 1 && p.top_k >= 1 && p.experts >= 1 && p.experts <= kMaxExperts && p.hidden >= kDepth &&
           p.hidden % kDepth == 0 && p.width >= kDepth && p.width % kDepth == 0 && p.x_stride % 8 == 0 &&
           aligned(p.x) && aligned(p.gate_up) && aligned(p.down) &&
           int64_t{p.tokens} * p.hidden / 8 / kSumThreads < INT32_MAX;
}

size_t moe_experts_prefill_workspace(const MoeExperts& p) {
    return static_cast<size_t>(p.tokens) * p.top_k * (p.hidden + p.width) * sizeof(__nv_bfloat16);
}

cudaError_t moe_experts_prefill(const MoeExperts& p, cudaStream_t stream) {
    if (!moe_experts_prefill_supported(p)) return cudaErrorInvalidValue;
    const int64_t choices = int64_t{p.tokens} * p.top_k;
    auto* rows = reinterpret_cast<__nv_bfloat16*>(p.workspace);
    const Arguments arguments{p, rows + choices * p.hidden, rows};
    const auto hidden = static_cast<uint64_t>(p.hidden), width = static_cast<uint64_t>(p.width);
    const auto experts = static_cast<uint64_t>(p.experts);
    const auto of_gate_up = [&](CUtensorMap* map, uint32_t depth, uint32_t rows, uint32_t halves, Swizzle swizzle) {
        return encode_tensor_map<4>(map, TensorElement::kBf16,
                                    {.base = p.gate_up,
                                     .sizes = {hidden, width, 2, experts},
                                     .strides = {2, hidden * 2, width * hidden * 2, 2 * width * hidden * 2},
                                     .box = {depth, rows, halves, 1}},
                                    swizzle);
    };
    const auto of_down = [&](CUtensorMap* map, uint32_t depth, uint32_t rows, Swizzle swizzle) {
        return encode_tensor_map<3>(map, TensorElement::kBf16,
                                    {.base = p.down,
                                     .sizes = {width, hidden, experts},
                                     .strides = {2, width * 2, hidden * width * 2},
                                     .box = {depth, rows, 1}},
                                    swizzle);
    };
    CUtensorMap gate_up, gate_up_window, activations, down, down_window;
    const cudaError_t encoded[] = {of_gate_up(&gate_up, kDepth, kPairs, 2, Swizzle::k128),
                                   of_gate_up(&gate_up_window, kWindow * kDepth, kPartRows, 1, Swizzle::kNone),
                                   of_down(&down, kDepth, kTileRows, Swizzle::k128),
                                   of_down(&down_window, kWindow * kDepth, kPartRows, Swizzle::kNone),
                                   encode_tensor_map<2>(&activations, TensorElement::kBf16,
                                                        {.base = arguments.activations,
                                                         .sizes = {width, static_cast<uint64_t>(choices)},
                                                         .strides = {2, width * 2},
                                                         .box = {kDepth, kTileChoices}},
                                                        Swizzle::k128)};
    for (const cudaError_t status : encoded) {
        if (status != cudaSuccess) return status;
    }
    LaunchConfig config = {.grid = dim3(multiprocessor_count()),
                           .block = dim3(kThreads),
                           .shared_bytes = sizeof(Storage),
                           .stream = stream,
                           .programmatic = true};
    cudaError_t status = launch(gate_up_kernel, config, gate_up, gate_up_window, arguments);
    if (status != cudaSuccess) return status;
    status = launch(down_kernel, config, activations, down, down_window, arguments);
    if (status != cudaSuccess) return status;
    const int64_t vectors = int64_t{p.tokens} * p.hidden / 8;
    config.grid = dim3(static_cast<unsigned>((vectors + kSumThreads - 1) / kSumThreads));
    config.block = dim3(kSumThreads);
    config.shared_bytes = 0;
    return launch(sum_kernel, config, arguments);
}

}  // namespace tokenspeed
