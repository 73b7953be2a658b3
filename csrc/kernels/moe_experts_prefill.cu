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
// A tile is 2 x 160 choices of one expert x 256 weight rows, for a cluster of two blocks: 128 gate rows and the 128 up
// rows that they meet, so that both lie in the same thread's accumulators, or 256 rows of down. The blocks halve the
// choices and share the weights: each copies a half to both, by multicast. Weights are the rows of the product and
// choices its columns, so that a tile's choices cost what they are, rounded up to 16 in each block: an expert's choices
// are dealt equally to as many tiles as it needs. 256 choices an expert, give or take 16: one tile, 136 columns a block
// on average, 6% above the choices, where 64 choices as rows of the product cost 12% more than there are.
//
// Three warpgroups: one copies stages of 64 of depth (32 KB of weights, up to 20 KB of choices, four in flight), two
// multiply, each 2 x 64 weight rows by all the block's choices: wgmma m64n16k16 to m64n160k16. Weights, and the choices
// of the second product, come by TMA; rows of x are gathered by cp.async into the layout that TMA would have made. The
// products lie transposed in the registers; stmatrix turns them, 16 choices x 64 weight rows at a time.
//
// Why so: a multiprocessor takes about 30 bytes a cycle from L2 (5 to 7 TB/s over all). With a tile of 128 x 256 to a
// block, a stage of 48 KB feeds 1024 cycles of the matrix unit, and half of the third tile of an expert was idle: 5.7
// GB for 8192 tokens of 35B. With shared weights it is 33 KB for 1088 cycles, 3.3 GB.
//
// Clusters are persistent, one to two multiprocessors, and take every 66th tile. Tiles of an expert are neighbours, its
// choices before its weights: clusters at work at one time share weights and rows in L2. Every block finds the expert
// of a tile in a table of tiles before each expert, which it makes at its start. The copies run up to four stages into
// the next tile while a tile is stored.
//
// Of a model split over ranks the experts here are some of all: the others' choices lie outside `offsets`, no row is
// written for them, and the sum leaves them out.
//
// Measured on an H100 (24 November 2026; read 3071 GB/s, product 802 TFLOP/s): 8192 tokens of 35B 1303 us, 317 TFLOP/s
// of useful products (39%); of 397B, 160 choices an expert, 10.6 ms, 194 TFLOP/s (24%). The torch implementation: 2.39
// and 1.00 times as long. Memory alone would take 0.75 and 5.0 ms there: weights 1.6 / 12.9 GB, rows between the
// kernels 0.7 / 1.7 GB, x once an expert.
//
// Tried and lost, measured together in a second run (same kind of card, product 775 TFLOP/s), 1985 us and 12.7 ms:
//   - a window of four stages ahead, one of the blocks that share a tile asks for its weights, 512 bytes a row, into
//     L2, and for the next tile's choices by whole rows;
//   - weights read evict-first, to leave L2 to x;
//   - tiles left in shared memory by who copies, so that who multiplies need not search for them, and the places of
//     down's rows looked up before the products.
// How much each cost was not measured. Next: a cluster of two blocks that share an expert's weights by multicast.
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
constexpr int kGroupThreads = 128;
constexpr int kBlocks = 2;             // of a cluster: they share a tile's weights
constexpr int kMaxChoices = 160;       // of a block's tile
constexpr int kChoiceStep = 16;        // the product's columns are choices rounded up to this
constexpr int kTileRows = 256;         // of weights
constexpr int kPairs = kTileRows / 2;  // gate rows of a tile, each with its up row
constexpr int kProductRows = 64;       // of weights in one wgmma; a warpgroup has two of them
constexpr int kDepth = 64;             // of a stage: the 128 bytes that a row of a swizzled tile has
constexpr int kStages = 4;
constexpr int kRowBytes = kDepth * 2;
constexpr int kWeightBytes = kTileRows * kRowBytes, kHalfBytes = kWeightBytes / kBlocks;  // a block copies a half
constexpr int kBoxChoices = 32;                                                           // of a copy by TMA
constexpr int kMaxExperts = 512;
constexpr int kOutputBytes = kProductRows * 2;  // of a choice's row, as a warpgroup stores it

constexpr int kWgmmaRegisters = 216, kCopyRegisters = 72;

struct Storage {  // of dynamic shared memory
    uint8_t choices[kStages][kMaxChoices * kRowBytes];
    uint8_t weights[kStages][kWeightBytes];  // gate and up rows, or rows of down; block i of the cluster copies half i
    uint8_t output[2][2][kChoiceStep * kOutputBytes];  // of each multiplying warpgroup, in turns; swizzled
    uint64_t full[kStages], empty[kStages];
    int tiles_before[kMaxExperts + 1];  // tiles of choices of lower experts; the total past the last expert
    int offsets[kMaxExperts + 1];
    int warp_total[kThreads / 32];
};
static_assert(sizeof(Storage) <= 227 * 1024);

struct Arguments {
    MoeExperts p;
    __nv_bfloat16* activations;  // [choices, width], in the order of `order`
    __nv_bfloat16* rows;         // [choices, hidden], by token and rank
};

struct Tile {
    int expert, first, choices, column_tile;  // of this block; first: position in `order`; choices: perhaps none
    int columns;                              // of the product, the same in both blocks
};

// All tiles of one product, this cluster's in order.
class Tiles {
  public:
    __device__ Tiles(const Storage& storage, int columns, int tile_columns)
        : storage_(storage), column_tiles_((columns + tile_columns - 1) / tile_columns) {}

    __device__ static int first() { return static_cast<int>(blockIdx.x) / kBlocks; }
    __device__ static int next(int index) { return index + static_cast<int>(gridDim.x) / kBlocks; }
    __device__ bool holds(int index) const { return index < storage_.tiles_before[kMaxExperts] * column_tiles_; }

    // Called by a whole warp.
    __device__ Tile find(int index) const {
        constexpr int kStride = kMaxExperts / 32;
        const int lane = threadIdx.x % 32;
        const int* before = storage_.tiles_before;
        const int coarse = __popc(__ballot_sync(kAllLanes, before[lane * kStride] * column_tiles_ <= index)) - 1;
        const int* part = before + coarse * kStride + 1;
        const int within = __popc(__ballot_sync(kAllLanes, lane < kStride - 1 && part[lane] * column_tiles_ <= index));
        const int expert = coarse * kStride + within;
        const int local = index - before[expert] * column_tiles_, parts = before[expert + 1] - before[expert];
        const int first = storage_.offsets[expert], choices = storage_.offsets[expert + 1] - first;
        // Equal shares for the expert's tiles and, in a tile, for the two blocks.
        const int share = (choices + parts - 1) / parts, start = local % parts * share;
        const int mine = max(min(choices - start, share), 0), half = (mine + 1) / kBlocks;
        const int rank = static_cast<int>(ptx::cluster_rank());
        return {expert, first + start + rank * half, rank == 0 ? half : mine - half, local / parts,
                (half + kChoiceStep - 1) / kChoiceStep * kChoiceStep};
    }

  private:
    const Storage& storage_;
    int column_tiles_;
};

// Fills the table of tiles and starts the barriers. Called by the whole cluster; ends with its barrier.
__device__ void prepare(Storage& storage, const int32_t* offsets, int experts, int full_arrivals) {
    constexpr int kShare = (kMaxExperts + kThreads - 1) / kThreads, kTileChoices = kBlocks * kMaxChoices;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(&storage.full[i], full_arrivals);
            ptx::mbarrier_init(&storage.empty[i], 8 * kBlocks);  // warps that multiply
        }
        ptx::fence_mbarrier_init();
    }
    int tiles[kShare], mine = 0;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        const int expert = static_cast<int>(threadIdx.x) * kShare + i;
        const int first = offsets[min(expert, experts)], end = offsets[min(expert + 1, experts)];
        if (expert <= kMaxExperts) storage.offsets[expert] = first;
        tiles[i] = (end - first + kTileChoices - 1) / kTileChoices;
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
    ptx::cluster_sync();  // also: the peer's barriers are ready for this block's copies
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
    static constexpr int kRows = kMaxChoices / 16;
    int choice[kRows];  // token * top_k + rank; negative past the tile's end

    __device__ Gather(const MoeExperts& p, const Tile& tile) {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int row = threadIdx.x / 8 + i * 16;
            choice[i] = row < tile.choices ? p.order[tile.first + row] : -1;
        }
    }
};

// Copies one stage; x points at this thread's piece of the stage's depth. Rows past the end keep what they held: they
// reach no column of the product but their own.
__device__ __forceinline__ void copy_choices(uint8_t* choices, const __nv_bfloat16* x, int64_t stride,
                                             const int (&token)[Gather::kRows]) {
    const int piece = threadIdx.x % 8, row = threadIdx.x / 8;
    uint8_t* to = choices + row * kRowBytes + (piece ^ row % 8) * 16;
#pragma unroll
    for (int i = 0; i < Gather::kRows; ++i) {
        if (token[i] >= 0) ptx::cp_async(to + i * 16 * kRowBytes, x + token[i] * stride);
    }
}

// The block of a multiplying warpgroup among the four of 64 weight rows: its first meets its second in the activation.
__device__ __forceinline__ int group() {
    return threadIdx.x / kGroupThreads - 1;
}

// sum[i] += weight rows kPairs i + 64 group() + 0 .. 63 x kColumns choices of a tile, all its depth. kGathered: the
// choices were written by threads (cp.async), and the matrix unit must be let see it. `sum` comes zeroed: what a
// product overwrites is to ptxas still alive from tile to tile, and one tile's registers of every shape would have to
// fit.
template <bool kGathered, int kColumns>
__device__ __forceinline__ void multiply_tile(float (&sum)[2][kColumns / 2], Storage& storage, Cursor& at, int stages) {
    int before = -1;  // the slot whose products may still run
    for (int s = 0; s < stages; ++s) {
        ptx::mbarrier_wait(&storage.full[at.slot], at.phase);
        if (kGathered) ptx::fence_async_shared();
        const uint32_t choices = ptx::shared_address(storage.choices[at.slot]);
        const uint32_t weights = ptx::shared_address(storage.weights[at.slot]) + group() * kProductRows * kRowBytes;
        ptx::wgmma_fence(sum[0], sum[1]);
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
            const uint64_t b = ptx::matrix_descriptor(choices + k * 32, Swizzle::k128, 16, 8 * kRowBytes);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint64_t a =
                    ptx::matrix_descriptor(weights + i * kHalfBytes + k * 32, Swizzle::k128, 16, 8 * kRowBytes);
                ptx::wgmma<__nv_bfloat16, kColumns>(sum[i], a, b, true);
            }
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (threadIdx.x % 32 < kBlocks && before >= 0) {
            ptx::mbarrier_arrive_cluster(&storage.empty[before], threadIdx.x % 32);
        }
        before = at.slot;
        at.next();
    }
    ptx::wgmma_wait<0>(sum[0], sum[1]);
    if (threadIdx.x % 32 < kBlocks) ptx::mbarrier_arrive_cluster(&storage.empty[before], threadIdx.x % 32);
}

// For a warpgroup whose block has no choices in a tile: its share of the ring's arrivals.
__device__ void skip_tile(Storage& storage, Cursor& at, int stages) {
    for (int s = 0; s < stages; ++s) {
        ptx::mbarrier_wait(&storage.full[at.slot], at.phase);
        if (threadIdx.x % 32 < kBlocks) ptx::mbarrier_arrive_cluster(&storage.empty[at.slot], threadIdx.x % 32);
        at.next();
    }
}

// Stores 64 weight rows x kColumns choices of a warpgroup, transposed. values(j, i): the packed pair of choices
// 8 j + 2 (lane % 4) and the next, of row lane / 4 + 8 i of the warp's 16. `row_pointer(step)` gives where the row of
// choice 16 step + thread / 8 goes, null to leave it out.
template <int kColumns, typename Values, typename RowPointer>
__device__ __forceinline__ void store_tile(Storage& storage, int& turn, Values values, RowPointer row_pointer) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % kGroupThreads / 32;
    // Lane l names row l % 8 of the four 8 x 8 blocks: lower and upper weight rows of 8 choices, then of the next 8.
    const int row = lane / 16 * 8 + lane % 8, piece = warp * 2 + lane / 8 % 2;
    const int from = threadIdx.x % kGroupThreads / 8, from_piece = threadIdx.x % 8;
#pragma unroll
    for (int step = 0; step < kColumns / kChoiceStep; ++step) {
        uint8_t* output = storage.output[group()][turn];
        turn ^= 1;
        const uint32_t block[4] = {values(2 * step, 0), values(2 * step, 1), values(2 * step + 1, 0),
                                   values(2 * step + 1, 1)};
        ptx::stmatrix_x4_transposed(ptx::shared_address(output + row * kOutputBytes + (piece ^ row % 8) * 16), block);
        // The other half of `output` was read before this barrier by all who pass it.
        ptx::named_barrier_sync(1 + group(), kGroupThreads);
        __nv_bfloat16* to = row_pointer(step);
        if (to == nullptr) continue;
        store_16(to + from_piece * 8,
                 *reinterpret_cast<const uint4*>(output + from * kOutputBytes + (from_piece ^ from % 8) * 16));
    }
}

template <int kValue>
struct Columns {
    static constexpr int value = kValue;
};

// Calls work(Columns<columns>()): the shape of a product is part of its instruction.
template <typename Work>
__device__ __forceinline__ void with_columns(int columns, Work work) {
    switch (columns) {
        case 16:
            return work(Columns<16>());
        case 32:
            return work(Columns<32>());
        case 48:
            return work(Columns<48>());
        case 64:
            return work(Columns<64>());
        case 80:
            return work(Columns<80>());
        case 96:
            return work(Columns<96>());
        case 112:
            return work(Columns<112>());
        case 128:
            return work(Columns<128>());
        case 144:
            return work(Columns<144>());
        default:
            return work(Columns<kMaxChoices>());
    }
}

__global__ void __launch_bounds__(kThreads, 1)
    gate_up_kernel(const __grid_constant__ CUtensorMap gate_up, const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(raw);
    auto& storage = *reinterpret_cast<Storage*>(raw);
    const MoeExperts& p = a.p;
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    prepare(storage, p.offsets, p.experts, kGroupThreads + 1);
    const Tiles tiles(storage, p.width, kPairs);
    const int stages = p.hidden / kDepth;
    Cursor at;
    if (threadIdx.x < kGroupThreads) {
        ptx::register_decrease<kCopyRegisters>();
        const int rank = static_cast<int>(ptx::cluster_rank());
        Tile tile = tiles.holds(Tiles::first()) ? tiles.find(Tiles::first()) : Tile{};
        Gather gather(p, tile);
        for (int index = Tiles::first(); tiles.holds(index); index = Tiles::next(index)) {
            int token[Gather::kRows];
#pragma unroll
            for (int i = 0; i < Gather::kRows; ++i) {
                token[i] = gather.choice[i] >= 0 ? gather.choice[i] / p.top_k : -1;
            }
            const Tile current = tile;
            if (tiles.holds(Tiles::next(index))) {  // the next tile's choices arrive while this one is copied
                tile = tiles.find(Tiles::next(index));
                gather = Gather(p, tile);
            }
            for (int s = 0; s < stages; ++s) {
                ptx::mbarrier_wait_cluster(&storage.empty[at.slot], at.phase ^ 1);
                if (threadIdx.x == 0) {
                    ptx::mbarrier_arrive_expect_tx(&storage.full[at.slot], kWeightBytes);
                    ptx::tma_load_multicast<4>(storage.weights[at.slot] + rank * kHalfBytes, &gate_up,
                                               &storage.full[at.slot],
                                               {s * kDepth, current.column_tile * kPairs, rank, current.expert}, 3);
                }
                copy_choices(storage.choices[at.slot], p.x + s * kDepth + threadIdx.x % 8 * 8, p.x_stride, token);
                ptx::cp_async_mbarrier_arrive(&storage.full[at.slot]);
                at.next();
            }
        }
    } else {
        ptx::register_increase<kWgmmaRegisters>();
        int turn = 0;
        for (int index = Tiles::first(); tiles.holds(index); index = Tiles::next(index)) {
            const Tile tile = tiles.find(index);
            if (tile.choices == 0) {
                skip_tile(storage, at, stages);
                continue;
            }
            const int column = tile.column_tile * kPairs + group() * kProductRows;
            const int choice = threadIdx.x % kGroupThreads / 8;
            with_columns(tile.columns, [&](auto columns) {
                constexpr int kColumns = decltype(columns)::value;
                float sum[2][kColumns / 2] = {};
                multiply_tile<true, kColumns>(sum, storage, at, stages);
                if (column >= p.width) return;
                const auto activation = [&](int j, int i) {
                    const int pair = 4 * j + 2 * i;
                    return pack<__nv_bfloat16>(silu(sum[0][pair]) * sum[1][pair],
                                               silu(sum[0][pair + 1]) * sum[1][pair + 1]);
                };
                store_tile<kColumns>(storage, turn, activation, [&](int step) -> __nv_bfloat16* {
                    const int mine = choice + step * kChoiceStep;
                    if (mine >= tile.choices) return nullptr;
                    return a.activations + int64_t{tile.first + mine} * p.width + column;
                });
            });
        }
    }
    ptx::cluster_sync();  // the peer's last copies and arrivals need this block's shared memory
}

__global__ void __launch_bounds__(kThreads, 1)
    down_kernel(const __grid_constant__ CUtensorMap activations, const __grid_constant__ CUtensorMap down,
                const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(raw);
    auto& storage = *reinterpret_cast<Storage*>(raw);
    const MoeExperts& p = a.p;
    prepare(storage, p.offsets, p.experts, 1);  // the routing is older than the kernel that is waited for
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const Tiles tiles(storage, p.hidden, kTileRows);
    const int stages = p.width / kDepth;
    Cursor at;
    if (threadIdx.x < kGroupThreads) {
        ptx::register_decrease<kCopyRegisters>();
        const int rank = static_cast<int>(ptx::cluster_rank());
        for (int index = Tiles::first(); threadIdx.x < 32 && tiles.holds(index); index = Tiles::next(index)) {
            const Tile tile = tiles.find(index);
            const int boxes = (tile.choices + kBoxChoices - 1) / kBoxChoices;
            for (int s = 0; threadIdx.x == 0 && s < stages; ++s) {
                uint64_t* full = &storage.full[at.slot];
                ptx::mbarrier_wait_cluster(&storage.empty[at.slot], at.phase ^ 1);
                ptx::mbarrier_arrive_expect_tx(full, kWeightBytes + boxes * kBoxChoices * kRowBytes);
                ptx::tma_load_multicast<3>(
                    storage.weights[at.slot] + rank * kHalfBytes, &down, full,
                    {s * kDepth, tile.column_tile * kTileRows + rank * kTileRows / kBlocks, tile.expert}, 3);
                for (int box = 0; box < boxes; ++box) {
                    ptx::tma_load<2>(storage.choices[at.slot] + box * kBoxChoices * kRowBytes, &activations, full,
                                     {s * kDepth, tile.first + box * kBoxChoices});
                }
                at.next();
            }
        }
    } else {
        ptx::register_increase<kWgmmaRegisters>();
        int turn = 0;
        for (int index = Tiles::first(); tiles.holds(index); index = Tiles::next(index)) {
            const Tile tile = tiles.find(index);
            if (tile.choices == 0) {
                skip_tile(storage, at, stages);
                continue;
            }
            const int column = tile.column_tile * kTileRows + group() * kProductRows;
            const int choice = threadIdx.x % kGroupThreads / 8;
            with_columns(tile.columns, [&](auto columns) {
                constexpr int kColumns = decltype(columns)::value;
                int place[kColumns / kChoiceStep];  // asked for here, they arrive during the products
#pragma unroll
                for (int i = 0; i < kColumns / kChoiceStep; ++i) {
                    const int mine = choice + i * kChoiceStep;
                    place[i] = mine < tile.choices ? p.order[tile.first + mine] : -1;
                }
                float sum[2][kColumns / 2] = {};
                multiply_tile<false, kColumns>(sum, storage, at, stages);
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const int from = column + half * kPairs;
                    if (from >= p.hidden) return;
                    const auto packed = [&](int j, int i) {
                        const int pair = 4 * j + 2 * i;
                        return pack<__nv_bfloat16>(sum[half][pair], sum[half][pair + 1]);
                    };
                    store_tile<kColumns>(storage, turn, packed, [&](int step) -> __nv_bfloat16* {
                        return place[step] < 0 ? nullptr : a.rows + int64_t{place[step]} * p.hidden + from;
                    });
                }
            });
        }
    }
    ptx::cluster_sync();  // the peer's last copies and arrivals need this block's shared memory
}

constexpr int kSumThreads = 256;

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
#pragma unroll 8
    for (int rank = 0; rank < p.top_k; ++rank) {
        // The row of an expert that another rank holds was not written.
        if (static_cast<uint32_t>(chosen[rank] - p.first_expert) >= static_cast<uint32_t>(p.experts)) continue;
        const Float8 row = unpack(ptx::load_16_no_allocate(rows + int64_t{rank} * p.hidden));
        const float weight = to_float(weights[rank]);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum.v[i] += weight * row.v[i];
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
    CUtensorMap gate_up, activations, down;
    const cudaError_t encoded[] = {
        encode_tensor_map<4>(&gate_up, TensorElement::kBf16,
                             {.base = p.gate_up,
                              .sizes = {hidden, width, 2, experts},
                              .strides = {2, hidden * 2, width * hidden * 2, 2 * width * hidden * 2},
                              .box = {kDepth, kPairs, 1, 1}},
                             Swizzle::k128),
        encode_tensor_map<2>(&activations, TensorElement::kBf16,
                             {.base = arguments.activations,
                              .sizes = {width, static_cast<uint64_t>(choices)},
                              .strides = {2, width * 2},
                              .box = {kDepth, kBoxChoices}},
                             Swizzle::k128),
        encode_tensor_map<3>(&down, TensorElement::kBf16,
                             {.base = p.down,
                              .sizes = {width, hidden, experts},
                              .strides = {2, width * 2, hidden * width * 2},
                              .box = {kDepth, kTileRows / kBlocks, 1}},
                             Swizzle::k128)};
    for (const cudaError_t status : encoded) {
        if (status != cudaSuccess) return status;
    }
    LaunchConfig config = {.grid = dim3(std::max(multiprocessor_count() / kBlocks, 1) * kBlocks),
                           .block = dim3(kThreads),
                           .shared_bytes = sizeof(Storage),
                           .stream = stream,
                           .cluster = dim3(kBlocks),
                           .programmatic = true};
    cudaError_t status = launch(gate_up_kernel, config, gate_up, arguments);
    if (status != cudaSuccess) return status;
    status = launch(down_kernel, config, activations, down, arguments);
    if (status != cudaSuccess) return status;
    const int64_t vectors = int64_t{p.tokens} * p.hidden / 8;
    config.grid = dim3(static_cast<unsigned>((vectors + kSumThreads - 1) / kSumThreads));
    config.block = dim3(kSumThreads);
    config.shared_bytes = 0;
    config.cluster = dim3(1);
    return launch(sum_kernel, config, arguments);
}

}  // namespace tokenspeed
