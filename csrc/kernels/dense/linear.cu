// y = x weight^T for 1 to 16 rows of x: the weights stream once, so the floor is their bytes over the bandwidth
// (64 MB: 15.6 us at 4.3 TB/s); 2 flop a weight and row keep even 16 rows far below the matrix units' rate.
//
// Tiling. A tile is 16 weight rows, a slab 512 columns of it. Eight warps take 64 columns of each slab: mma.sync with
// weights on M = 16 and rows of x on N = 8 or 16. A warp copies its own columns by cp.async, 128 bytes a row, into its
// own ring of shared memory, so nothing but the warp waits for a copy, and the ring fills before the wait for the
// kernel ahead: weights are there already. Both operands are read 16 bytes a lane, eight consecutive columns: a
// permutation of k that is the same for both, hence free; odd rows lie with their halves swapped, which keeps the reads
// off each other's banks.
//
// A block has a multiprocessor's shared memory to itself where its share of the weights is long, for a deep ring is
// what keeps memory busy from one launch to the next: a block starts as one of the kernel ahead leaves, and asks for
// 11 slabs at once. Where the share is short (of one row, no more than the ring) the ring is no longer than the share
// or than half of a multiprocessor, so that the next kernel's fills beside it, and five slabs are asked for before the
// wait, the others once x has been, which would wait behind them: x comes 5 us behind 160 KB. A block of e4m3 does so
// with a share half as long again, since its arithmetic, which begins with x, is twice as much a byte.
//
// x lies in shared memory, all rows of the block's columns. What comes before the product in a layer is done on the
// way, up to eight rows: silu_mul, or the residual sum and its norm, whose sum of squares every block repeats. The
// rounding is that of the separate kernels.
//
// Few tiles or long rows: a cluster of 2, 4 or 8 blocks shares the columns of its tiles and the sums meet in the shared
// memory of one of them, each with its bytes on that block's mbarrier, and are added in a fixed order. The launcher
// picks the cluster that leaves the least idle time.
//
// e4m3 weights are multiplied as fp16, which holds them exactly and which the card converts two an instruction; a slab
// is 1,024 columns of them, so that a warp's part of a row, 128 bytes again, lies under one scale. x becomes fp16 on
// its way to shared memory, each 256 columns of a row times the power of two that brings the largest below 2^15: all
// bits of what is more than 2^-32 of the largest stay. The sums of 128 columns take the scale and the inverse of that
// power. Rows whose x leaves no room for a deep ring get a short one; what does not fit beside that goes in two
// launches.
//
// Rows of bf16 may go on below an e4m3 weight (the gates below a layer's in-projection): some clusters of the grid have
// those, and are blocks of the bf16 kernel, the others are as without them. Their number leaves the busiest block the
// fewest pieces.
//
// What was tried, and where the time between two launches goes: docs/kernels/launch_boundaries.md.
//
// budget: linear_kernel registers<=128 shared<=0 hot sass=HMMA
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <algorithm>
#include <optional>
#include <type_traits>

#include "bf16x8.h"
#include "fp8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kTileRows = 16;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kRowBytes = 128;  // of weights, in a piece: what a warp copies of a slab
constexpr int kPieceBytes = kTileRows * kRowBytes;
constexpr int kSlabBytes = kWarps * kPieceBytes;
constexpr int kChunk = 8;                  // elements of x in 16 bytes
constexpr int kChunks = kRowBytes / 16;    // of 16 bytes, in a row of a piece
constexpr int kRowsAtOnce = 32 / kChunks;  // that a warp's copy instruction covers
constexpr int kSumPitch = kTileRows + 4;   // floats; distinct banks for the four lanes that hold one row's sums
constexpr int kAtOnce = 4;                 // 16-byte loads of x or residual that a thread has under way
constexpr int kMaxClusterTiles = 12;       // tiles a cluster may own: what its exchange buffer holds

// What the type of weights decides: bf16, or E4m3 with a scale for every block of 128 x 128.
template <typename Weight>
struct Format {
    static constexpr bool kScaled = std::is_same_v<Weight, E4m3>;
    static constexpr int kColumns = kRowBytes / static_cast<int>(sizeof(Weight));  // of a slab, per warp
    static constexpr int kSlab = kWarps * kColumns;                                // columns: 512 or 1024
    static constexpr int kXChunks = 2 / static_cast<int>(sizeof(Weight));  // of 16 bytes, that meet 16 of a weight row
    // Elements after a row of the operand: the eight lanes of a read, of two rows, meet each bank once.
    static constexpr int kOperandPad = kScaled ? 8 : 32;

    // Elements in a row of the operand: the columns of this block, in whole slabs, and the padding.
    __host__ __device__ static constexpr int operand_pitch(int slabs) { return slabs * kSlab + kOperandPad; }
    // Floats behind a row of the operand's rows: what a group of its columns was divided by.
    __host__ __device__ static constexpr int groups(int slabs) { return kScaled ? slabs * kWarps : 0; }
    // Bytes of all that, up to a multiple of 128.
    __host__ __device__ static constexpr int operand_bytes(int rows, bool norm, int slabs) {
        return ((rows + norm) * operand_pitch(slabs) * 2 + rows * groups(slabs) * 4 + 127) / 128 * 128;
    }
};
static_assert(Format<E4m3>::kColumns == kScaleBlock && kScaleBlock % kTileRows == 0, "one scale a piece");
constexpr int kMaxScales = 32;  // slabs of e4m3 a block: a warp's scales of a tile are one a lane

// How x becomes the operand, which is made in shared memory before the first tile: copied, by silu_mul, or by the
// residual sum and its norm.
enum class Operand { kCopied, kSiluMul, kAddNorm };

// Whether rows of bf16 may go on below the weight.
template <typename Weight, Operand kOperand>
constexpr bool kTakesTail = Format<Weight>::kScaled && kOperand != Operand::kSiluMul;

template <int kRows, bool kDeep>
struct alignas(128) Storage {  // of dynamic shared memory; kRows: rows of x, 1, 8 or 16
    static constexpr int kStages = kRows == 1 ? 11 : kDeep ? 8 : 4;
    float partial[2][kWarps][kRows * kSumPitch];           // of one tile; two tiles in turn need one barrier each
    float exchange[kMaxClusterTiles * kRows * kTileRows];  // [source rank][own tile][row of x][weight row]
    float squares[kWarps];
    uint64_t exchanged;  // mbarrier: the sums of this block's tiles are there
    // Then the operand, [rows][operand_pitch], behind it a row of norm weights, [rows][groups] floats, and, from a
    // multiple of 128 bytes on (or each row of a piece would lie in two lines), the ring,
    // [stages][kWarps][kPieceBytes].
};
constexpr int kSharedLimit = 227 * 1024;      // bytes a block
constexpr int kHalfSharedLimit = 113 * 1024;  // where two share a multiprocessor
constexpr int kShortShare = 10;               // pieces
constexpr int kFirstCopies = 5;               // before the wait, of a share that asks for x early

// The longest share, in pieces, of one row that asks for x early: the ring; behind a norm more of e4m3, which takes
// twice the arithmetic a piece, all of it once x is there.
template <typename Weight, Operand kOperand, int kStages>
constexpr int kMaxEarly = Format<Weight>::kScaled && kOperand == Operand::kAddNorm ? kStages * 3 / 2 : kStages;

// A walk over a block's pieces: for every tile, for every slab. source: what this lane copies of the piece first.
template <typename Weight>
struct Walk {
    int tile, slab, first_slab, last_slab, stride;
    const Weight* source;
    int64_t next_tile;  // elements from the first slab of a tile to that of the next

    __device__ void next() {
        source += Format<Weight>::kSlab;
        if (++slab < last_slab) return;
        source += next_tile - int64_t{last_slab - first_slab} * Format<Weight>::kSlab;
        slab = first_slab;
        tile += stride;
    }
};

// Where 16-byte chunk `chunk` of row `row` of a piece lies, in bytes.
__device__ __forceinline__ int place(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row % 2 * (kChunks / 2))) * 16;
}

// The row of a piece that a lane copies first, and the column of a slab that it copies of each.
__device__ __forceinline__ int copied_row() {
    return static_cast<int>(threadIdx.x) % 32 / kChunks;
}
template <typename Weight>
__device__ __forceinline__ int copied_column() {
    using F = Format<Weight>;
    const int warp = threadIdx.x / 32, chunk = threadIdx.x % kChunks;
    return warp * F::kColumns + chunk * (F::kColumns / kChunks);
}

// Starts the copies of this warp's piece of a slab; zeros where the matrix ends.
template <typename Weight>
__device__ __forceinline__ void copy_piece(uint8_t* piece, const Walk<Weight>& at, const Weight* weight, int outputs,
                                           int inputs) {
    const int row = copied_row(), chunk = static_cast<int>(threadIdx.x) % kChunks;
    const int64_t step = int64_t{kRowsAtOnce} * inputs;
    // Rows that are left from this lane's first on, none behind the last column.
    const int left =
        at.slab * Format<Weight>::kSlab + copied_column<Weight>() < inputs ? outputs - at.tile * kTileRows - row : 0;
    const Weight* source = at.source;
    if (__all_sync(kAllLanes, left > kTileRows - kRowsAtOnce)) {
#pragma unroll
        for (int i = 0; i < kTileRows / kRowsAtOnce; ++i, source += step) {
            ptx::cp_async(piece + place(i * kRowsAtOnce + row, chunk), source);
        }
        return;
    }
#pragma unroll
    for (int i = 0; i < kTileRows / kRowsAtOnce; ++i, source += step) {
        const bool inside = i * kRowsAtOnce < left;
        ptx::cp_async(piece + place(i * kRowsAtOnce + row, chunk), inside ? source : weight, inside ? 16 : 0);
    }
}

// What some clusters of the grid multiply: a weight and where its outputs go.
template <typename Weight>
struct Part {
    const Weight* weight;
    __nv_bfloat16* out;
    int outputs;
    int cluster, clusters;  // this block's among those
};

// This warp's scales of a tile, of the slab first_slab + lane; zero where there is none.
__device__ __forceinline__ float load_scale(const Linear& p, int tile, int first_slab, int last_slab) {
    const int slab = first_slab + static_cast<int>(threadIdx.x) % 32;
    const int blocks = (p.inputs + kScaleBlock - 1) / kScaleBlock;
    const int block = slab * kWarps + static_cast<int>(threadIdx.x) / 32, row = tile * kTileRows;
    if (slab >= last_slab || block >= blocks || row >= p.outputs) return 0;
    return p.scale[int64_t{row / kScaleBlock} * blocks + block];
}

// Where the block's operand goes: rows of 16-bit elements, and of e4m3 weights what each group was divided by.
struct Target {
    __nv_bfloat16* rows;
    int pitch;
    float* divisors;  // [rows][groups]
    int groups;
};

// Stores eight bf16 of a row at the block's column `column`. For e4m3 weights as fp16: a warp calls it together, for
// 256 columns of one row.
template <typename Weight>
__device__ __forceinline__ void store_operand(const Target& to, int row, int column, uint4 packed) {
    if constexpr (Format<Weight>::kScaled) {
        float divisor;
        packed = row_to_half(packed, divisor);
        if (threadIdx.x % kGroupLanes == 0) to.divisors[row * to.groups + column / kScaleBlock] = divisor;
    }
    store_16(to.rows + row * to.pitch + column, packed);
}

// Copies x into the operand, zeros behind the last column: all threads through all rows, four loads ahead of what they
// store. A warp has one row at a time. after_loads is called when a thread's first loads are on their way.
template <typename Weight, typename AfterLoads>
__device__ __forceinline__ void stage_copy(const Target& operand, const Linear& p, int first, int last,
                                           AfterLoads after_loads) {
    const int chunks = (last - first) / kChunk, all = p.rows * chunks;
    if (static_cast<int>(threadIdx.x) >= all) after_loads();
    for (int from = threadIdx.x; from < all; from += kAtOnce * kThreads) {
        uint4 values[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = from + i * kThreads, row = at / chunks, column = first + at % chunks * kChunk;
            // Not the read-only path: the kernel before may write x while this one already runs.
            values[i] = at < all && column < p.inputs ? *reinterpret_cast<const uint4*>(p.x + row * p.x_stride + column)
                                                      : uint4{};
        }
        if (from == static_cast<int>(threadIdx.x)) after_loads();
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = from + i * kThreads;
            if (at < all) store_operand<Weight>(operand, at / chunks, at % chunks * kChunk, values[i]);
        }
    }
}

// Writes silu(x) times its second half into the operand, zeros behind the last column.
template <typename Weight, int kRows>
__device__ __forceinline__ void stage_silu_mul(const Target& operand, const Linear& p, int first, int last) {
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
        store_operand<Weight>(operand, row, column - first, packed);
    }
}

// Starts the copies of this block's norm weights.
__device__ __forceinline__ void copy_norm_weights(__nv_bfloat16* weights, const Linear& p, int first, int last) {
    for (int column = first + threadIdx.x * kChunk; column < min(last, p.inputs); column += kThreads * kChunk) {
        ptx::cp_async(weights + column - first, p.norm_weight + column);
    }
}

// Writes the norm of x + residual into the operand, and the blocks of one cluster both it and the sum into memory.
// Every block repeats the sum of squares of whole rows: it is less work than to wait for another block's.
// after_loads: as in stage_copy.
template <typename Weight, int kRows, typename AfterLoads>
__device__ __forceinline__ void stage_add_norm(const Target& operand, const __nv_bfloat16* weights, float* squares,
                                               const Linear& p, int first, int last, AfterLoads after_loads) {
    constexpr int kRowThreads = kRows == 1 ? kThreads : 32, kStep = kRowThreads * kChunk;
    const int row = threadIdx.x / kRowThreads, from = threadIdx.x % kRowThreads * kChunk;
    const bool stores = blockIdx.y == 0;
    float total = 0;
    for (int base = from; base == from || base < p.inputs; base += kAtOnce * kStep) {  // once by all threads
        uint4 added[kAtOnce], old[kAtOnce];
        const int end = row < p.rows ? p.inputs : 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int column = base + i * kStep;
            if (column >= end) continue;
            added[i] = *reinterpret_cast<const uint4*>(p.x + row * p.x_stride + column);
            old[i] = *reinterpret_cast<const uint4*>(p.residual + int64_t{row} * p.inputs + column);
        }
        if (base == from) after_loads();
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int column = base + i * kStep;
            if (column >= end) continue;
            const uint4 sum = pack(unpack(added[i]) + unpack(old[i]));
            total += sum_of_squares(unpack(sum));
            if (column >= first && column < last) {
                store_16(operand.rows + row * operand.pitch + column - first, sum);
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
        if (column < p.inputs) {
            const Float8 s =
                unpack(*reinterpret_cast<const uint4*>(operand.rows + row * operand.pitch + column - first));
            const Float8 w = unpack(*reinterpret_cast<const uint4*>(weights + column - first));
            Float8 y;
#pragma unroll
            for (int j = 0; j < 8; ++j) y.v[j] = s.v[j] * inverse * (1.0f + w.v[j]);
            packed = pack(y);
            if (stores) store_16(p.normed + int64_t{row} * p.inputs + column, packed);
        }
        store_operand<Weight>(operand, row, column - first, packed);
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
        const uint32_t first_half[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second_half[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
            ptx::mma_m16n8k16<__nv_bfloat16>(sum[n][0], first_half, x[half][n].x, x[half][n].y);
            ptx::mma_m16n8k16<__nv_bfloat16>(sum[n][1], second_half, x[half][n].z, x[half][n].w);
        }
    }
}

// The same of e4m3, 16 weights a lane and chunk, four to an mma: the sums of a piece, without its scale.
template <int kGroups>
__device__ __forceinline__ void multiply_piece(float (&sum)[kGroups][2][4], const uint8_t* piece,
                                               const uint4 (&x)[4][kGroups]) {
    const int lane = threadIdx.x % 32;
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
            ptx::unpack_e4m3(of_upper[four], a[0], a[2]);
            ptx::unpack_e4m3(of_lower[four], a[1], a[3]);
#pragma unroll
            for (int n = 0; n < kGroups; ++n) {
                const uint4 values = x[half * 2 + four / 2][n];
                ptx::mma_m16n8k16<__half>(sum[n][four % 2], a, four % 2 ? values.z : values.x,
                                          four % 2 ? values.w : values.y);
            }
        }
    }
}

template <typename Weight, int kRows, bool kDeep, bool kSplit, Operand kOperand>
__device__ __forceinline__ void multiply_part(const Linear& p, const Part<Weight>& part, uint8_t* shared) {
    using F = Format<Weight>;
    constexpr int kSlab = F::kSlab, kXChunks = 2 * F::kXChunks;
    constexpr int kGroups = (kRows + 7) / 8;  // of eight rows of x: the N of one mma
    constexpr int kStages = Storage<kRows, kDeep>::kStages;
    auto& storage = *reinterpret_cast<Storage<kRows, kDeep>*>(shared);
    const Weight* weight = part.weight;
    const int rows = p.rows, outputs = part.outputs, inputs = p.inputs;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int slabs = (inputs + kSlab - 1) / kSlab, tiles = (outputs + kTileRows - 1) / kTileRows;
    const int cluster = part.cluster, stride = part.clusters;
    const int rank = kSplit ? blockIdx.x : 0, ranks = kSplit ? gridDim.x : 1;
    const int first_slab = slabs * rank / ranks, last_slab = slabs * (rank + 1) / ranks;
    const int first = first_slab * kSlab, last = last_slab * kSlab;
    // The same in every block of the cluster, whose shares may differ by a slab.
    const int share = (slabs + ranks - 1) / ranks, pitch = F::operand_pitch(share);
    auto* operand_rows = reinterpret_cast<__nv_bfloat16*>(&storage + 1);
    __nv_bfloat16* norm_weights = operand_rows + rows * pitch;
    constexpr bool kNorm = kOperand == Operand::kAddNorm;
    auto* divisors = reinterpret_cast<float*>(norm_weights + (kNorm ? pitch : 0));
    const Target operand = {operand_rows, pitch, divisors, F::groups(share)};
    uint8_t* ring = reinterpret_cast<uint8_t*>(operand_rows) + F::operand_bytes(rows, kNorm, share);
    const auto piece_of = [&](int stage) { return ring + (stage * kWarps + warp) * kPieceBytes; };
    const int own_turns = kSplit ? (tiles - cluster + stride - 1) / stride : 0;
    if constexpr (kSplit) {
        if (threadIdx.x == 0) {
            const int own = (own_turns - rank + ranks - 1) / ranks;  // tiles rank, rank + ranks, ... of the cluster's
            ptx::mbarrier_init(&storage.exchanged, 1);
            ptx::fence_mbarrier_init();
            ptx::mbarrier_arrive_expect_tx(&storage.exchanged, own * ranks * rows * kTileRows * sizeof(float));
        }
        __syncthreads();
        ptx::cluster_arrive_relaxed();  // the peers may write into this block's exchange buffer from now on
    }

    const int64_t first_row = int64_t{cluster} * kTileRows + copied_row();
    Walk<Weight> ahead = {cluster,
                          first_slab,
                          first_slab,
                          last_slab,
                          stride,
                          weight + first_row * inputs + first + copied_column<Weight>(),
                          int64_t{stride} * kTileRows * inputs};
    const auto copy_next = [&](int stage) {
        if (ahead.tile < tiles) copy_piece(piece_of(stage), ahead, weight, outputs, inputs);
        ptx::cp_async_commit();  // an empty group at the end keeps the count
        ahead.next();
    };
    if constexpr (kOperand == Operand::kAddNorm) {
        copy_norm_weights(norm_weights, p, first, last);
        ptx::cp_async_commit();
    }
    float scales = 0, next_scales[2] = {};  // of the two tiles to come
    if (F::kScaled) {
        next_scales[0] = load_scale(p, cluster, first_slab, last_slab);
        next_scales[1] = load_scale(p, cluster + stride, first_slab, last_slab);
    }
    const bool is_early = kRows == 1 && (tiles + stride - 1) / stride * share <= kMaxEarly<Weight, kOperand, kStages>;
    const int first_copies = is_early ? kFirstCopies : kStages - 1;
    for (int stage = 0; stage < first_copies; ++stage) copy_next(stage);
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const auto copy_others = [&] {
        for (int stage = first_copies; stage < kStages - 1; ++stage) copy_next(stage);
    };
    if constexpr (kOperand == Operand::kCopied) stage_copy<Weight>(operand, p, first, last, copy_others);
    if constexpr (kOperand == Operand::kSiluMul) {
        stage_silu_mul<Weight, kRows>(operand, p, first, last);
        copy_others();
    }
    if constexpr (kOperand == Operand::kAddNorm) {
        if (is_early) {
            ptx::cp_async_wait<kFirstCopies>();
        } else {
            ptx::cp_async_wait<kStages - 1>();
        }
        __syncthreads();  // every thread's norm weights are there
        stage_add_norm<Weight, kRows>(operand, norm_weights, storage.squares, p, first, last, copy_others);
    }
    __syncthreads();
    if (kSplit) ptx::cluster_wait();

    // What a thread finishes of every tile: one row of x, one output.
    const int row = threadIdx.x / kTileRows, output = threadIdx.x % kTileRows;
    const auto store = [&](int tile, float total) {
        const int column = tile * kTileRows + output;
        if (column >= outputs) return;
        __nv_bfloat16 value = __float2bfloat16(total);
        __nv_bfloat16& target = part.out[row * p.out_stride + column];
        if (kOperand == Operand::kSiluMul && p.gate != nullptr) {
            const float share = sigmoid(__bfloat162float(p.gate[row * p.gate_stride]));
            value = __float2bfloat16(__bfloat162float(target) + share * __bfloat162float(value));
        }
        target = value;
    };
    int stage = 0, turn = 0;
    for (int tile = cluster; tile < tiles; tile += stride, ++turn) {
        float sum[kGroups][2][4] = {};
        if (F::kScaled) {
            scales = next_scales[0];
            next_scales[0] = next_scales[1];
            next_scales[1] = load_scale(p, tile + 2 * stride, first_slab, last_slab);
        }
        for (int slab = first_slab; slab < last_slab; ++slab) {
            const __nv_bfloat16* mine = operand.rows + (kRows == 1 ? 0 : lane / 4 * pitch) +
                                        (slab - first_slab) * kSlab + warp * F::kColumns +
                                        lane % 4 * F::kXChunks * kChunk;
            uint4 values[kXChunks][kGroups];
#pragma unroll
            for (int i = 0; i < kXChunks; ++i) {
#pragma unroll
                for (int n = 0; n < kGroups; ++n) {
                    const auto* from =
                        mine + n * 8 * pitch + i / F::kXChunks * (F::kColumns / 2) + i % F::kXChunks * kChunk;
                    // Of one row all eight columns of the product are that row's.
                    values[i][n] =
                        kRows == 1 || n * 8 + lane / 4 < rows ? *reinterpret_cast<const uint4*>(from) : uint4{};
                }
            }
            ptx::cp_async_wait<kStages - 2>();
            __syncwarp();  // every lane's copies are here, and every lane is done with the stage before
            copy_next(stage == 0 ? kStages - 1 : stage - 1);
            if constexpr (F::kScaled) {
                float unscaled[kGroups][2][4] = {};
                multiply_piece(unscaled, piece_of(stage), values);
                const float scale = __shfl_sync(kAllLanes, scales, slab - first_slab);
                const float* divisor = divisors + (slab - first_slab) * kWarps + warp;
#pragma unroll
                for (int n = 0; n < kGroups; ++n) {
#pragma unroll
                    for (int i = 0; i < 2; ++i) {
                        if (kRows == 1 && i > 0) continue;
                        const int of_row = kRows == 1 ? 0 : n * 8 + lane % 4 * 2 + i;
                        const float factor =
                            kRows == 1 || of_row < rows ? scale * divisor[of_row * operand.groups] : 0.0f;
                        sum[n][0][i] += factor * (unscaled[n][0][i] + unscaled[n][1][i]);
                        sum[n][0][i + 2] += factor * (unscaled[n][0][i + 2] + unscaled[n][1][i + 2]);
                    }
                }
            } else {
                multiply_piece(sum, piece_of(stage), values);
            }
            if (++stage == kStages) stage = 0;
        }

        float* mine = storage.partial[turn % 2][warp];
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (kRows == 1 && lane % 4 * 2 + i % 2 > 0) continue;  // the other seven rows are not there
                mine[(n * 8 + lane % 4 * 2 + i % 2) * kSumPitch + lane / 4 + i / 2 * 8] =
                    F::kScaled ? sum[n][0][i] : sum[n][0][i] + sum[n][1][i];
            }
        }
        __syncthreads();
        if (row < rows) {
            const auto& partial = storage.partial[turn % 2];
            float total = 0;
#pragma unroll
            for (int i = 0; i < kWarps; ++i) total += partial[i][row * kSumPitch + output];
            if constexpr (kSplit) {
                const int slot = rank * (kMaxClusterTiles / ranks) + turn / ranks;
                ptx::store_async_cluster(&storage.exchange[(slot * kRows + row) * kTileRows + output], total,
                                         &storage.exchanged, turn % ranks);
            } else {
                store(tile, total);
            }
        }
    }
    if constexpr (kSplit) {  // this block finishes tiles rank, rank + ranks, ... of its cluster's
        ptx::mbarrier_wait_cluster(&storage.exchanged, 0);
        if (row >= rows) return;
        for (int own = rank; own < turn; own += ranks) {
            float total = 0;
            for (int i = 0; i < ranks; ++i) {
                const int slot = i * (kMaxClusterTiles / ranks) + own / ranks;
                total += storage.exchange[(slot * kRows + row) * kTileRows + output];
            }
            store(cluster + own * stride, total);
        }
    }
}

template <typename Weight, int kRows, bool kDeep, bool kSplit, Operand kOperand>
__global__ void __launch_bounds__(kThreads, 1) linear_kernel(const Linear p) {
    DYNAMIC_SHARED(shared);
    const int cluster = static_cast<int>(blockIdx.y), clusters = static_cast<int>(gridDim.y) - p.tail_clusters;
    if constexpr (kTakesTail<Weight, kOperand>) {
        if (cluster >= clusters) {
            const Part<__nv_bfloat16> tail = {p.tail, p.out + p.outputs, p.tail_outputs, cluster - clusters,
                                              p.tail_clusters};
            multiply_part<__nv_bfloat16, kRows, kDeep, kSplit, kOperand>(p, tail, shared);
            return;
        }
    }
    const Part<Weight> whole = {static_cast<const Weight*>(p.weight), p.out, p.outputs, cluster, clusters};
    multiply_part<Weight, kRows, kDeep, kSplit, kOperand>(p, whole, shared);
}

// The grid and the shared memory of a call. clusters: of the grid, `tail_clusters` of them for the tail.
struct Grid {
    int ranks, clusters, tail_clusters;
    bool deep;
    size_t shared_bytes;
};

// Of a block with so many pieces. A ring holds no more stages than that.
template <typename Weight, int kRows, bool kDeep, Operand kOperand>
size_t shared_bytes_of(int rows, int slabs, int64_t pieces) {
    const auto stages = std::min<int64_t>(Storage<kRows, kDeep>::kStages, pieces);
    return sizeof(Storage<kRows, kDeep>) + Format<Weight>::operand_bytes(rows, kOperand == Operand::kAddNorm, slabs) +
           stages * kSlabBytes;
}

// What the busiest block of `clusters` has of a weight.
struct Share {
    int turns, slabs;

    int64_t pieces() const { return int64_t{turns} * slabs; }
};

int tiles_of(int outputs) {
    return (outputs + kTileRows - 1) / kTileRows;
}

template <typename Weight>
Share share_of(int outputs, int inputs, int clusters, int ranks) {
    const int slabs = (inputs + Format<Weight>::kSlab - 1) / Format<Weight>::kSlab;
    return {(tiles_of(outputs) + clusters - 1) / clusters, (slabs + ranks - 1) / ranks};
}

// How many of so many clusters have the tail: the most that leave the busiest block the fewest pieces.
template <typename Weight>
int tail_clusters_of(const Linear& p, int clusters, int ranks) {
    if (p.tail == nullptr) return 0;
    int best = 1;
    int64_t fewest = INT64_MAX;
    for (int tail = 1; tail <= std::min(tiles_of(p.tail_outputs), clusters - 1); ++tail) {
        const int64_t pieces = std::max(share_of<Weight>(p.outputs, p.inputs, clusters - tail, ranks).pieces(),
                                        share_of<__nv_bfloat16>(p.tail_outputs, p.inputs, tail, ranks).pieces());
        if (pieces > fewest) continue;
        fewest = pieces;
        best = tail;
    }
    return best;
}

// The cheapest way to share tiles x slabs, in halves of a piece: the pieces of the busiest block, its part of x, and
// what the exchange in a cluster takes (0.7 us on an H200); by the class of rows, so that a row's sums have the same
// order in every batch of the class, unless x fits in one of them and not in another.
template <typename Weight, int kRows, Operand kOperand>
Grid pick_grid(const Linear& p) {
    using F = Format<Weight>;
    const int tiles = tiles_of(p.outputs), slabs = (p.inputs + F::kSlab - 1) / F::kSlab;
    const int tail_tiles = p.tail == nullptr ? 0 : tiles_of(p.tail_outputs),
              fewest_clusters = p.tail == nullptr ? 1 : 2;
    const int multiprocessors = multiprocessor_count();
    Grid best{};
    int64_t best_cost = INT64_MAX;
    for (int ranks = 1; ranks <= std::min(8, slabs); ranks *= 2) {
        // How many clusters of more than two fit at once depends on how the multiprocessors of a card are grouped.
        const int usable = ranks > 2 ? std::max(multiprocessors * 3 / 4, ranks) : multiprocessors;
        const int clusters = std::min(tiles + tail_tiles, std::max(fewest_clusters, usable / ranks));
        const int tail_clusters = tail_clusters_of<Weight>(p, clusters, ranks);
        const Share share = share_of<Weight>(p.outputs, p.inputs, clusters - tail_clusters, ranks);
        Share tail{};
        if (tail_clusters > 0) tail = share_of<__nv_bfloat16>(p.tail_outputs, p.inputs, tail_clusters, ranks);
        if (ranks > 1 && std::max(share.turns, tail.turns) > kMaxClusterTiles / ranks * ranks) continue;
        if (F::kScaled && share.slabs > kMaxScales) continue;
        const int64_t pieces = std::max(share.pieces(), tail.pieces());
        const auto bytes_of = [&]<bool kDeep>(int rows) {
            const size_t bytes = shared_bytes_of<Weight, kRows, kDeep, kOperand>(rows, share.slabs, share.pieces());
            if (tail_clusters == 0) return bytes;
            return std::max(bytes,
                            shared_bytes_of<__nv_bfloat16, kRows, kDeep, kOperand>(rows, tail.slabs, tail.pieces()));
        };
        const auto bytes = [&](bool deep, int rows) {
            return deep ? bytes_of.template operator()<true>(rows) : bytes_of.template operator()<false>(rows);
        };
        bool deep = kRows == 1 || pieces > kShortShare || bytes(false, kRows) > kHalfSharedLimit;
        // x of e4m3 weights takes twice the room beside as many bytes of them.
        if (F::kScaled && kRows > 1 && bytes(deep, p.rows) > kSharedLimit) deep = false;
        const size_t shared_bytes = bytes(deep, p.rows);
        if (shared_bytes > kSharedLimit) continue;
        const int64_t cost = 2 * pieces + kRows * share.slabs * F::kXChunks / kTileRows * 2 + (ranks > 1 ? 3 : 0);
        if (cost < best_cost) {
            best_cost = cost;
            best = {ranks, clusters, tail_clusters, deep, shared_bytes};
        }
    }
    return best;  // no clusters: x does not fit
}

// Whether the kernel of so many rows takes the call; starts it if `stream` is given.
template <typename Weight, int kRows, Operand kOperand>
std::optional<cudaError_t> try_rows(const Linear& p, const cudaStream_t* stream) {
    const Grid grid = pick_grid<Weight, kRows, kOperand>(p);
    if (grid.clusters == 0) return std::nullopt;
    if (stream == nullptr) return cudaSuccess;
    Linear arguments = p;
    arguments.tail_clusters = grid.tail_clusters;
    const LaunchConfig config = {.grid = dim3(grid.ranks, grid.clusters),
                                 .block = dim3(kThreads),
                                 .shared_bytes = grid.shared_bytes,
                                 .stream = *stream,
                                 .cluster = dim3(grid.ranks),
                                 .programmatic = true};
    constexpr bool kDeepOnly = kRows == 1;
    if (grid.deep) {
        return launch(grid.ranks > 1 ? linear_kernel<Weight, kRows, true, true, kOperand>
                                     : linear_kernel<Weight, kRows, true, false, kOperand>,
                      config, arguments);
    }
    return launch(grid.ranks > 1 ? linear_kernel<Weight, kRows, kDeepOnly, true, kOperand>
                                 : linear_kernel<Weight, kRows, kDeepOnly, false, kOperand>,
                  config, arguments);
}

template <typename Weight, Operand kOperand>
std::optional<cudaError_t> try_weight(const Linear& p, const cudaStream_t* stream) {
    if (p.rows == 1) return try_rows<Weight, 1, kOperand>(p, stream);
    if (p.rows <= 8) return try_rows<Weight, 8, kOperand>(p, stream);
    if constexpr (kOperand == Operand::kCopied) return try_rows<Weight, 16, kOperand>(p, stream);
    return std::nullopt;
}

template <Operand kOperand>
std::optional<cudaError_t> try_launch(const Linear& p, const cudaStream_t* stream) {
    return p.scale != nullptr ? try_weight<E4m3, kOperand>(p, stream) : try_weight<__nv_bfloat16, kOperand>(p, stream);
}

// The same of some of its rows.
Linear rows_from(const Linear& p, int first, int rows) {
    Linear part = p;
    part.x += first * p.x_stride;
    part.out += first * p.out_stride;
    part.rows = rows;
    return part;
}

// Rows of e4m3 weights whose x fits no shared memory go in two launches, for nothing else is as exact.
std::optional<cudaError_t> try_halves(const Linear& p, const cudaStream_t* stream) {
    const auto whole = try_launch<Operand::kCopied>(p, stream);
    if (whole || p.scale == nullptr || p.rows == 1) return whole;
    const int half = p.rows / 2;
    for (const Linear& part : {rows_from(p, 0, half), rows_from(p, half, p.rows - half)}) {
        const auto status = try_halves(part, stream);
        if (!status || *status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

bool aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

bool well_formed(const Linear& p) {
    return p.rows >= 1 && p.rows <= kLinearMaxRows && p.outputs >= 1 && p.inputs >= 32 && p.inputs % 32 == 0 &&
           p.x_stride % 8 == 0 && aligned(p.x) && aligned(p.weight) && aligned(p.tail) &&
           (p.tail == nullptr || (p.scale != nullptr && p.tail_outputs >= 1));
}

}  // namespace

bool linear_supported(const Linear& p) {
    return well_formed(p) && try_halves(p, nullptr);
}

bool add_rms_norm_linear_supported(const Linear& p) {
    return well_formed(p) && p.rows <= kLinearMaxStagedRows && aligned(p.residual) && aligned(p.norm_weight) &&
           try_launch<Operand::kAddNorm>(p, nullptr);
}

bool silu_mul_linear_supported(const Linear& p) {
    return well_formed(p) && p.tail == nullptr && p.rows <= kLinearMaxStagedRows &&
           try_launch<Operand::kSiluMul>(p, nullptr);
}

cudaError_t linear(const Linear& p, cudaStream_t stream) {
    return linear_supported(p) ? *try_halves(p, &stream) : cudaErrorInvalidValue;
}

cudaError_t add_rms_norm_linear(const Linear& p, cudaStream_t stream) {
    return add_rms_norm_linear_supported(p) ? *try_launch<Operand::kAddNorm>(p, &stream) : cudaErrorInvalidValue;
}

cudaError_t silu_mul_linear(const Linear& p, cudaStream_t stream) {
    return silu_mul_linear_supported(p) ? *try_launch<Operand::kSiluMul>(p, &stream) : cudaErrorInvalidValue;
}

}  // namespace tokenspeed
