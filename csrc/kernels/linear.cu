// y = x weight^T for 1 to 16 rows of x: the weights stream once, so the floor is their bytes over the bandwidth
// (64 MB: 15.6 us at 4.3 TB/s); 2 flop a weight and row keep even 16 rows far below the matrix units' rate.
//
// Tiling. A tile is 16 weight rows, a slab 512 columns of it. Eight warps take 64 columns of each slab: mma.sync with
// weights on M = 16 and rows of x on N = 8 or 16. A warp copies its own columns by cp.async, 128 bytes a row, into its
// own ring of shared memory, so nothing but the warp waits for a copy, and the ring fills before the wait for the
// kernel ahead: weights are there already. Shared memory stays below half of a multiprocessor's, so that the next
// kernel's ring fills beside this one. Both operands are read 16 bytes a lane, eight consecutive columns: a permutation
// of k that is the same for both, hence free; odd rows lie with their halves swapped, which keeps the reads off each
// other's banks. One row of x is staged in shared memory. More rows come through L1, one or two slabs ahead, and two
// tiles share them, for L2 would pass x as often as weights.
//
// What comes before the product in a layer is done while x is staged, up to eight rows: silu_mul, or the residual sum
// and its norm, whose sum of squares every block repeats. The rounding is that of the separate kernels.
//
// Few tiles: a cluster of 2, 4 or 8 blocks shares the columns of its tiles and the sums meet in the shared memory of
// one of them at the end, in a fixed order. The launcher picks the cluster that leaves the least idle time.
//
// Measured on an H100 (copy 2.99 TB/s), one row: 17 MB (4096 -> 2048) 7.1 us, 51 MB 21.1, 357 MB 122.9, 1017 MB 332.5
// (102% of copy). With x through L1 instead these were 8.8, 22.4, 125.8 and 335.7. Staging 4 or 8 rows leaves a ring of
// four stages, and lost: 9.7 us against 8.0 at 17 MB; the fused operands pay that where they have several rows.
//
// Tried and lost: x copied into the ring beside its weights, four stages: 8 rows from 6% slower (17 MB, 1024 -> 8192)
// to 2% faster (357 MB).
//
// Tried and lost: a ring filled by one warp with bulk copies of 1 KB a row, mbarriers between it and the others: 0.66
// us a slab whatever its depth, 3.2 TB/s at any size (77% of copy); the copies are too small for their engine.
//
// budget: linear_kernel registers<=128 shared<=0 hot sass=HMMA
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <algorithm>
#include <type_traits>

#include "bf16x8.h"
#include "fp8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kTileRows = 16;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kRowBytes = 128;  // of weights, of a piece: what a warp copies of a slab
constexpr int kPieceBytes = kTileRows * kRowBytes;
constexpr int kChunk = 8;                  // elements of x in 16 bytes
constexpr int kChunks = kRowBytes / 16;    // of 16 bytes, in a row of a piece
constexpr int kRowsAtOnce = 32 / kChunks;  // that a warp's copy instruction covers
constexpr int kSumPitch = kTileRows + 4;   // floats; distinct banks for the four lanes that hold one row's sums
constexpr int kMaxClusterTiles = 12;       // tiles a cluster may own: what its exchange buffer holds

// What the type of weights decides: bf16, or E4m3 with a scale for every block of 128 x 128.
template <typename Weight>
struct Format {
    static constexpr bool kScaled = std::is_same_v<Weight, E4m3>;
    static constexpr int kColumns = kRowBytes / static_cast<int>(sizeof(Weight));  // of a slab, per warp
    static constexpr int kSlab = kWarps * kColumns;                                // columns: 512 or 1024
    static constexpr int kXChunks = 2 / static_cast<int>(sizeof(Weight));  // 16 bytes of x that meet 16 of a row
    // Elements after a row of the staged operand: the eight lanes of a read, of two rows, meet each bank once.
    static constexpr int kOperandPad = kScaled ? 8 : 32;

    // The first column of x chunk i of this lane, from the slab's first.
    __device__ static int x_column(int i) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        return warp * kColumns + i / kXChunks * (kColumns / 2) + (lane % 4 * kXChunks + i % kXChunks) * kChunk;
    }
};
static_assert(Format<E4m3>::kColumns == kScaleBlock && kScaleBlock % kTileRows == 0, "one scale a piece");

// How x becomes the operand: loaded as it is, a slab ahead; or staged in shared memory before the first tile: copied,
// by silu_mul, or by the residual sum and its norm.
enum class Operand { kLoaded, kCopied, kSiluMul, kAddNorm };

template <typename Weight, int kRows, bool kStaged>
struct Storage {  // of dynamic shared memory; kRows: rows of x, 1, 8 or 16
    static constexpr int kStages = kRows == 1 ? 6 : kRows == 8 ? kStaged ? 4 : 6 : 5;
    uint8_t ring[kWarps][kStages][kPieceBytes];
    float scales[kWarps][Format<Weight>::kScaled ? kStages : 1];
    float partial[2][kWarps][kRows * kSumPitch];           // of one tile; two tiles in turn need one barrier each
    float exchange[kMaxClusterTiles * kRows * kTileRows];  // [source rank][own tile][row of x][weight row]
    float squares[kWarps];
    // The staged operand follows: [rows][columns of this block, in whole slabs, + kOperandPad].
};
constexpr int kHalfMultiprocessor = 113 * 1024;  // bytes of shared memory, less what the system takes of them

// A walk over a block's pieces: for every unit of kTiles tiles, for every slab, the tiles of the unit.
template <int kTiles>
struct Walk {
    int unit, slab, sub, first_slab, last_slab, stride;

    __device__ void next() {
        if (++sub < kTiles) return;
        sub = 0;
        if (++slab == last_slab) slab = first_slab, unit += stride;
    }
};

// Where 16-byte chunk `chunk` of row `row` of a piece lies, in bytes.
__device__ __forceinline__ int place(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row % 2 * (kChunks / 2))) * 16;
}

// Starts the copies of this warp's piece of a slab; zeros where the matrix ends.
template <typename Weight>
__device__ __forceinline__ void copy_piece(uint8_t* piece, const Weight* weight, int tile, int slab, int outputs,
                                           int inputs) {
    using F = Format<Weight>;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int chunk = lane % kChunks, column = slab * F::kSlab + warp * F::kColumns + chunk * (F::kColumns / kChunks);
#pragma unroll
    for (int i = 0; i < kTileRows / kRowsAtOnce; ++i) {
        const int row = i * kRowsAtOnce + lane / kChunks, output = tile * kTileRows + row;
        const bool inside = output < outputs && column < inputs;
        const auto* source = inside ? weight + static_cast<int64_t>(output) * inputs + column : weight;
        ptx::cp_async(piece + place(row, chunk), source, inside ? 16 : 0);
    }
}

// The same of the piece's scale; zero where the matrix ends.
__device__ __forceinline__ void copy_scale(float* to, const float* scale, int tile, int slab, int outputs, int inputs) {
    const int blocks = (inputs + kScaleBlock - 1) / kScaleBlock,
              block = slab * kWarps + static_cast<int>(threadIdx.x) / 32;
    const int row = tile * kTileRows;
    const bool inside = row < outputs && block < blocks;
    const float* source = inside ? scale + int64_t{row / kScaleBlock} * blocks + block : scale;
    if (threadIdx.x % 32 == 0) ptx::cp_async<4>(to, source, inside ? 4 : 0);
}

// This lane's columns of x for a slab, of rows lane / 4 (+ 8).
template <typename Weight, int kGroups>
__device__ __forceinline__ void load_x(uint4 (&values)[2 * Format<Weight>::kXChunks][kGroups], const __nv_bfloat16* x,
                                       int64_t x_stride, int slab, int rows, int inputs) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2 * Format<Weight>::kXChunks; ++i) {
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
            const int row = n * 8 + lane / 4, from = slab * Format<Weight>::kSlab + Format<Weight>::x_column(i);
            values[i][n] = uint4{};
            // Not the read-only path: the kernel before may write x while this one already runs.
            if (row < rows && from < inputs) values[i][n] = *reinterpret_cast<const uint4*>(x + row * x_stride + from);
        }
    }
}

// Asks for the pieces after those in the ring, a whole slab a warp, so that they stand in L2 when the ring gets there.
template <typename Weight, int kTiles>
__device__ __forceinline__ void prefetch_pieces(Walk<kTiles> at, const Weight* weight, int units, int outputs,
                                                int inputs) {
    constexpr int kSlab = Format<Weight>::kSlab;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < warp; ++i) at.next();
    const int output = (at.unit * kTiles + at.sub) * kTileRows + lane;
    if (at.unit < units && lane < kTileRows && output < outputs) {
        ptx::bulk_prefetch_l2(weight + static_cast<int64_t>(output) * inputs + at.slab * kSlab,
                              min(kSlab, inputs - at.slab * kSlab) * sizeof(Weight));
    }
}

// Copies x into `operand`, zeros behind the last column.
template <int kRows>
__device__ __forceinline__ void stage_copy(__nv_bfloat16* operand, int pitch, const Linear& p, int first, int last) {
    constexpr int kRowThreads = kRows == 1 ? kThreads : 32;
    const int row = threadIdx.x / kRowThreads;
    if (row >= p.rows) return;
#pragma unroll 4
    for (int column = first + threadIdx.x % kRowThreads * kChunk; column < last; column += kRowThreads * kChunk) {
        const auto* source = reinterpret_cast<const uint4*>(p.x + row * p.x_stride + column);
        store_16(operand + row * pitch + column - first, column < p.inputs ? *source : uint4{});
    }
}

// Writes silu(x) times its second half into `operand`, zeros behind the last column.
template <int kRows>
__device__ __forceinline__ void stage_silu_mul(__nv_bfloat16* operand, int pitch, const Linear& p, int first,
                                               int last) {
    constexpr int kRowThreads = kRows == 1 ? kThreads : 32;
    const int row = threadIdx.x / kRowThreads;
    if (row >= p.rows) return;
    const __nv_bfloat16* gate = p.x + row * p.x_stride;
#pragma unroll 4
    for (int column = first + threadIdx.x % kRowThreads * kChunk; column < last; column += kRowThreads * kChunk) {
        uint4 packed{};
        if (column < p.inputs) {
            const Float8 g = unpack(*reinterpret_cast<const uint4*>(gate + column));
            const Float8 u = unpack(*reinterpret_cast<const uint4*>(gate + p.inputs + column));
            Float8 y;
#pragma unroll
            for (int j = 0; j < 8; ++j) y.v[j] = silu(g.v[j]) * u.v[j];
            packed = pack(y);
        }
        store_16(operand + row * pitch + column - first, packed);
    }
}

// Writes the norm of x + residual into `operand`, and the blocks of one cluster both it and the sum into memory. Every
// block repeats the sum of squares of whole rows: it is less work than to wait for another block's.
template <int kRows>
__device__ __forceinline__ void stage_add_norm(__nv_bfloat16* operand, int pitch, float* squares, const Linear& p,
                                               int first, int last) {
    constexpr int kRowThreads = kRows == 1 ? kThreads : 32, kStep = kRowThreads * kChunk;
    const int row = threadIdx.x / kRowThreads, from = threadIdx.x % kRowThreads * kChunk;
    const bool stores = blockIdx.y == 0;
    float total = 0;
    if (row < p.rows) {
#pragma unroll 4
        for (int column = from; column < p.inputs; column += kStep) {
            const uint4 added = *reinterpret_cast<const uint4*>(p.x + row * p.x_stride + column);
            const uint4 old = *reinterpret_cast<const uint4*>(p.residual + int64_t{row} * p.inputs + column);
            const uint4 sum = pack(unpack(added) + unpack(old));
            total += sum_of_squares(unpack(sum));
            if (column >= first && column < last) {
                store_16(operand + row * pitch + column - first, sum);
                if (stores) store_16(p.sum + int64_t{row} * p.inputs + column, sum);
            }
        }
    }
    if constexpr (kRows == 1) {
        total = block_sum<kThreads>(total, squares);
    } else {
        total = warp_sum(total);
    }
    if (row >= p.rows) return;
    const float inverse = rsqrtf(total / p.inputs + p.eps);
    // A thread goes on with the columns it has itself written: the multiple of kStep that `from` is away from.
#pragma unroll 4
    for (int column = from + (first > from ? (first - from + kStep - 1) / kStep * kStep : 0); column < last;
         column += kStep) {
        uint4 packed{};
        __nv_bfloat16* place = operand + row * pitch + column - first;
        if (column < p.inputs) {
            const Float8 s = unpack(*reinterpret_cast<const uint4*>(place));
            const Float8 w = unpack(ptx::load_16_read_only(p.norm_weight + column));
            Float8 y;
#pragma unroll
            for (int j = 0; j < 8; ++j) y.v[j] = s.v[j] * inverse * (1.0f + w.v[j]);
            packed = pack(y);
            if (stores) store_16(p.normed + int64_t{row} * p.inputs + column, packed);
        }
        store_16(place, packed);
    }
}

// sum += the piece's 16 rows times this lane's columns of x, in two chains of mma, so that one hides the other's
// latency.
template <int kGroups>
__device__ __forceinline__ void multiply_piece(float (&sum)[kGroups][2][4], const uint8_t* piece,
                                               const uint4 (&x)[2][kGroups]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int chunk = half * (kChunks / 2) + lane % 4;
        const uint4 upper = *reinterpret_cast<const uint4*>(piece + place(lane / 4, chunk));
        const uint4 lower = *reinterpret_cast<const uint4*>(piece + place(lane / 4 + 8, chunk));
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
            ptx::mma_m16n8k16<__nv_bfloat16>(sum[n][0], first, x[half][n].x, x[half][n].y);
            ptx::mma_m16n8k16<__nv_bfloat16>(sum[n][1], second, x[half][n].z, x[half][n].w);
        }
    }
}

// The same of a piece of e4m3, whose sums take its scale: 16 weights a lane and chunk, four to an mma.
template <int kGroups>
__device__ __forceinline__ void multiply_piece(float (&sum)[kGroups][1][4], const uint8_t* piece, float scale,
                                               const uint4 (&x)[4][kGroups]) {
    const int lane = threadIdx.x % 32;
    float unscaled[kGroups][2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int chunk = half * (kChunks / 2) + lane % 4;
        const uint4 upper = *reinterpret_cast<const uint4*>(piece + place(lane / 4, chunk));
        const uint4 lower = *reinterpret_cast<const uint4*>(piece + place(lane / 4 + 8, chunk));
        const uint32_t of_upper[4] = {upper.x, upper.y, upper.z, upper.w};
        const uint32_t of_lower[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
        for (int four = 0; four < 4; ++four) {
            uint32_t a[4];
            unpack_e4m3(of_upper[four], a[0], a[2]);
            unpack_e4m3(of_lower[four], a[1], a[3]);
#pragma unroll
            for (int n = 0; n < kGroups; ++n) {
                const uint4 values = x[half * 2 + four / 2][n];
                ptx::mma_m16n8k16<__nv_bfloat16>(unscaled[n][four % 2], a, four % 2 ? values.z : values.x,
                                                 four % 2 ? values.w : values.y);
            }
        }
    }
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) sum[n][0][i] += scale * (unscaled[n][0][i] + unscaled[n][1][i]);
    }
}

// kTiles tiles share the loads of x.
template <typename Weight, int kRows, int kTiles, bool kSplit, Operand kOperand>
__global__ void __launch_bounds__(kThreads, 2) linear_kernel(const Linear p) {
    using F = Format<Weight>;
    constexpr bool kStaged = kOperand != Operand::kLoaded;
    constexpr int kGroups = (kRows + 7) / 8;  // of eight rows of x: the N of one mma
    constexpr int kSlab = F::kSlab, kXChunks = 2 * F::kXChunks, kChains = F::kScaled ? 1 : 2;
    constexpr int kStages = Storage<Weight, kRows, kStaged>::kStages;
    constexpr int kDistance =
        kRows <= 8 ? 2 : 1;  // slabs that x is ahead: its latency under load is longer than a slab
    static_assert(kTiles <= 2, "each tile of a unit needs a buffer of partial sums");
    DYNAMIC_SHARED(shared);
    auto& storage = *reinterpret_cast<Storage<Weight, kRows, kStaged>*>(shared);
    auto* operand = reinterpret_cast<__nv_bfloat16*>(&storage + 1);
    const auto* weight = static_cast<const Weight*>(p.weight);
    const int rows = p.rows, outputs = p.outputs, inputs = p.inputs;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int slabs = (inputs + kSlab - 1) / kSlab, tiles = (outputs + kTileRows - 1) / kTileRows;
    const int units = (tiles + kTiles - 1) / kTiles, first_unit = blockIdx.y, stride = gridDim.y;
    const int rank = kSplit ? blockIdx.x : 0, ranks = kSplit ? gridDim.x : 1;
    const int first_slab = slabs * rank / ranks, last_slab = slabs * (rank + 1) / ranks;
    const int pitch = (last_slab - first_slab) * kSlab + F::kOperandPad;
    if (kSplit) ptx::cluster_arrive();  // the peers may write into this block's exchange buffer from now on

    Walk<kTiles> ahead = {first_unit, first_slab, 0, first_slab, last_slab, stride};
    const auto copy_next = [&](int stage) {
        if (ahead.unit < units) {
            const int tile = ahead.unit * kTiles + ahead.sub;
            copy_piece(storage.ring[warp][stage], weight, tile, ahead.slab, outputs, inputs);
            if (F::kScaled) copy_scale(&storage.scales[warp][stage], p.scale, tile, ahead.slab, outputs, inputs);
        }
        ptx::cp_async_commit();  // an empty group at the end keeps the count
        ahead.next();
    };
    if (kOperand == Operand::kAddNorm && threadIdx.x == 0) ptx::bulk_prefetch_l2(p.norm_weight, inputs * 2);
    for (int stage = 0; stage < kStages - 1; ++stage) copy_next(stage);
    prefetch_pieces(ahead, weight, units, outputs, inputs);
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    uint4 values[kXChunks][kGroups], coming[kDistance][kXChunks][kGroups];
    if constexpr (kStaged) {
        const int first = first_slab * kSlab, last = last_slab * kSlab;
        if constexpr (kOperand == Operand::kCopied) stage_copy<kRows>(operand, pitch, p, first, last);
        if constexpr (kOperand == Operand::kSiluMul) stage_silu_mul<kRows>(operand, pitch, p, first, last);
        if constexpr (kOperand == Operand::kAddNorm) {
            stage_add_norm<kRows>(operand, pitch, storage.squares, p, first, last);
        }
        __syncthreads();
    } else {
#pragma unroll
        for (int i = 0; i < kDistance; ++i) {
            load_x<Weight>(coming[i], p.x, p.x_stride, first_slab + i % (last_slab - first_slab), rows, inputs);
        }
    }
    if (kSplit) ptx::cluster_wait();

    // What a thread finishes of every tile: one row of x, one output.
    const int row = threadIdx.x / kTileRows, output = threadIdx.x % kTileRows;
    const auto store = [&](int tile, float total) {
        const int column = tile * kTileRows + output;
        if (column >= outputs) return;
        __nv_bfloat16 value = __float2bfloat16(total);
        __nv_bfloat16& target = p.out[row * p.out_stride + column];
        if (kOperand == Operand::kSiluMul && p.gate != nullptr) {
            const float share = sigmoid(__bfloat162float(p.gate[row * p.gate_stride]));
            value = __float2bfloat16(__bfloat162float(target) + share * __bfloat162float(value));
        }
        target = value;
    };
    int stage = 0, turn = 0;
    for (int unit = first_unit; unit < units; unit += stride, ++turn) {
        float sum[kTiles][kGroups][kChains][4] = {};
        for (int slab = first_slab; slab < last_slab; ++slab) {
            if constexpr (kStaged) {
                const __nv_bfloat16* mine = operand + lane / 4 * pitch + (slab - first_slab) * kSlab;
#pragma unroll
                for (int i = 0; i < kXChunks; ++i) {
                    values[i][0] = lane / 4 < rows ? *reinterpret_cast<const uint4*>(mine + F::x_column(i)) : uint4{};
                }
            } else {
#pragma unroll
                for (int i = 0; i < kXChunks; ++i) {
#pragma unroll
                    for (int n = 0; n < kGroups; ++n) {
                        values[i][n] = coming[0][i][n];
                        if (kDistance > 1) coming[0][i][n] = coming[kDistance - 1][i][n];
                    }
                }
                const int later = slab + kDistance;
                load_x<Weight>(coming[kDistance - 1], p.x, p.x_stride,
                               later < last_slab ? later : first_slab + (later - last_slab) % (last_slab - first_slab),
                               rows, inputs);
            }
#pragma unroll
            for (int sub = 0; sub < kTiles; ++sub) {
                ptx::cp_async_wait<kStages - 2>();
                __syncwarp();  // every lane's copies are here, and every lane is done with the stage before
                copy_next(stage == 0 ? kStages - 1 : stage - 1);
                const uint8_t* piece = storage.ring[warp][stage];
                if constexpr (F::kScaled) {
                    multiply_piece(sum[sub], piece, storage.scales[warp][stage], values);
                } else {
                    multiply_piece(sum[sub], piece, values);
                }
                if (++stage == kStages) stage = 0;
            }
        }

        if (kTiles > 1) __syncthreads();  // the sums of the unit before are read
#pragma unroll
        for (int sub = 0; sub < kTiles; ++sub) {
            float* mine = storage.partial[kTiles > 1 ? sub : turn % 2][warp];
#pragma unroll
            for (int n = 0; n < kGroups; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (kRows == 1 && lane % 4 * 2 + i % 2 > 0) continue;  // the other seven rows are not there
                    mine[(n * 8 + lane % 4 * 2 + i % 2) * kSumPitch + lane / 4 + i / 2 * 8] =
                        sum[sub][n][0][i] + (kChains > 1 ? sum[sub][n][kChains - 1][i] : 0.0f);
                }
            }
        }
        __syncthreads();
        if (row < rows) {
#pragma unroll
            for (int sub = 0; sub < kTiles; ++sub) {
                const auto& partial = storage.partial[kTiles > 1 ? sub : turn % 2];
                float total = 0;
#pragma unroll
                for (int i = 0; i < kWarps; ++i) total += partial[i][row * kSumPitch + output];
                if constexpr (kSplit) {
                    const int own = turn * kTiles + sub, slot = rank * (kMaxClusterTiles / ranks) + own / ranks;
                    ptx::cluster_map(storage.exchange, own % ranks)[(slot * kRows + row) * kTileRows + output] = total;
                } else {
                    store(unit * kTiles + sub, total);
                }
            }
        }
    }
    if constexpr (kSplit) {  // this block finishes tiles rank, rank + ranks, ... of its cluster's
        ptx::cluster_sync();
        if (row >= rows) return;
        for (int own = rank; own < turn * kTiles; own += ranks) {
            float total = 0;
            for (int i = 0; i < ranks; ++i) {
                const int slot = i * (kMaxClusterTiles / ranks) + own / ranks;
                total += storage.exchange[(slot * kRows + row) * kTileRows + output];
            }
            store((first_unit + own / kTiles * stride) * kTiles + own % kTiles, total);
        }
    }
}

struct Partition {
    int ranks, clusters;
};

// Blocks per unit and clusters: the fewest slabs for the busiest block; a cluster costs about half a slab.
Partition partition(int units, int tiles_per_unit, int slabs) {
    const int multiprocessors = multiprocessor_count();
    Partition best = {1, std::min(units, multiprocessors)};
    int64_t best_cost = INT64_MAX;
    for (int ranks = 1; ranks <= std::min(8, slabs); ranks *= 2) {
        // Clusters of more than two may leave a few multiprocessors of a large processing cluster over.
        const int usable = ranks > 2 ? std::max(multiprocessors / 16 * 16, ranks) : multiprocessors;
        const int clusters = std::min(units, std::max(1, usable / ranks));
        const int turns = (units + clusters - 1) / clusters;
        if (ranks > 1 && turns * tiles_per_unit > kMaxClusterTiles / ranks * ranks) continue;
        const int64_t cost = 2 * int64_t{turns} * tiles_per_unit * ((slabs + ranks - 1) / ranks) + (ranks > 1);
        if (cost < best_cost) {
            best_cost = cost;
            best = {ranks, clusters};
        }
    }
    return best;
}

// The grid and the shared memory of a call.
struct Plan {
    Partition partition;
    size_t shared_bytes;
};

template <typename Weight, int kRows, int kTiles, bool kStaged>
Plan plan(const Linear& p) {
    using F = Format<Weight>;
    const int tiles = (p.outputs + kTileRows - 1) / kTileRows, slabs = (p.inputs + F::kSlab - 1) / F::kSlab;
    const Partition shares = partition((tiles + kTiles - 1) / kTiles, kTiles, slabs);
    const int most = (slabs + shares.ranks - 1) / shares.ranks;
    const size_t operand = kStaged ? size_t(p.rows) * (most * F::kSlab + F::kOperandPad) * sizeof(__nv_bfloat16) : 0;
    return {shares, sizeof(Storage<Weight, kRows, kStaged>) + operand};
}

template <typename Weight, int kRows, int kTiles, Operand kOperand>
cudaError_t launch_rows(const Linear& p, cudaStream_t stream) {
    const auto [shares, shared_bytes] = plan<Weight, kRows, kTiles, kOperand != Operand::kLoaded>(p);
    const LaunchConfig config = {.grid = dim3(shares.ranks, shares.clusters),
                                 .block = dim3(kThreads),
                                 .shared_bytes = shared_bytes,
                                 .stream = stream,
                                 .cluster = dim3(shares.ranks),
                                 .programmatic = true};
    const auto kernel = shares.ranks > 1 ? linear_kernel<Weight, kRows, kTiles, true, kOperand>
                                         : linear_kernel<Weight, kRows, kTiles, false, kOperand>;
    return launch(kernel, config, p);
}

bool aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <typename Weight>
bool staged_fits(const Linear& p) {
    const auto bytes =
        p.rows == 1 ? plan<Weight, 1, 1, true>(p).shared_bytes : plan<Weight, 8, 2, true>(p).shared_bytes;
    return bytes <= kHalfMultiprocessor;
}

bool staged_supported(const Linear& p) {
    if (!linear_supported(p) || p.rows > kLinearMaxStagedRows) return false;
    return p.scale != nullptr ? staged_fits<E4m3>(p) : staged_fits<__nv_bfloat16>(p);
}

template <typename Weight, Operand kOperand>
cudaError_t launch_staged(const Linear& p, cudaStream_t stream) {
    return p.rows == 1 ? launch_rows<Weight, 1, 1, kOperand>(p, stream)
                       : launch_rows<Weight, 8, 2, kOperand>(p, stream);
}

template <Operand kOperand>
cudaError_t launch_staged(const Linear& p, cudaStream_t stream) {
    return p.scale != nullptr ? launch_staged<E4m3, kOperand>(p, stream)
                              : launch_staged<__nv_bfloat16, kOperand>(p, stream);
}

template <typename Weight>
cudaError_t launch_linear(const Linear& p, cudaStream_t stream) {
    constexpr auto kLoaded = Operand::kLoaded;
    if (p.rows == 1) {
        return staged_supported(p) ? launch_rows<Weight, 1, 1, Operand::kCopied>(p, stream)
                                   : launch_rows<Weight, 1, 1, kLoaded>(p, stream);
    }
    // Already two rows are faster where two tiles share the loads of x (4 rows: 12.8 us against 11.2 at 34 MB).
    return p.rows <= 8 ? launch_rows<Weight, 8, 2, kLoaded>(p, stream) : launch_rows<Weight, 16, 2, kLoaded>(p, stream);
}

}  // namespace

bool linear_supported(const Linear& p) {
    return p.rows >= 1 && p.rows <= kLinearMaxRows && p.outputs >= 1 && p.inputs >= 32 && p.inputs % 32 == 0 &&
           p.x_stride % 8 == 0 && aligned(p.x) && aligned(p.weight);
}

bool add_rms_norm_linear_supported(const Linear& p) {
    return staged_supported(p) && aligned(p.residual) && aligned(p.norm_weight);
}

bool silu_mul_linear_supported(const Linear& p) {
    return staged_supported(p);
}

cudaError_t linear(const Linear& p, cudaStream_t stream) {
    if (!linear_supported(p)) return cudaErrorInvalidValue;
    return p.scale != nullptr ? launch_linear<E4m3>(p, stream) : launch_linear<__nv_bfloat16>(p, stream);
}

cudaError_t add_rms_norm_linear(const Linear& p, cudaStream_t stream) {
    return add_rms_norm_linear_supported(p) ? launch_staged<Operand::kAddNorm>(p, stream) : cudaErrorInvalidValue;
}

cudaError_t silu_mul_linear(const Linear& p, cudaStream_t stream) {
    return silu_mul_linear_supported(p) ? launch_staged<Operand::kSiluMul>(p, stream) : cudaErrorInvalidValue;
}

}  // namespace tokenspeed
