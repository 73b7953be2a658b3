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
// wait, the others once x has been, which would wait behind them.
//
// x lies in shared memory, all rows of the block's columns. What comes before the product in a layer is done on the
// way, up to eight rows: silu_mul, or the residual sum and its norm, whose sum of squares every block repeats. The
// rounding is that of the separate kernels.
//
// Few tiles or long rows: a cluster of 2, 4 or 8 blocks shares the columns of its tiles and the sums meet in the shared
// memory of one of them, each with its bytes on that block's mbarrier, and are added in a fixed order. The launcher
// picks the cluster that leaves the least idle time.
//
// What was tried, and where the time between two launches goes: docs/kernels/launch_boundaries.md.
//
// budget: linear_kernel registers<=112 shared<=0 hot sass=HMMA
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <algorithm>

#include "bf16x8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kTileRows = 16;
constexpr int kSlab = 512;  // columns
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kColumns = kSlab / kWarps;      // of a slab, per warp
constexpr int kPiece = kTileRows * kColumns;  // elements that a warp copies of a slab
constexpr int kChunk = 8;                     // elements in 16 bytes
constexpr int kChunks = kColumns / kChunk;    // in a row of a piece
constexpr int kRowsAtOnce = 32 / kChunks;     // that a warp's copy instruction covers
constexpr int kSumPitch = kTileRows + 4;      // floats; distinct banks for the four lanes that hold one row's sums
constexpr int kMaxClusterTiles = 12;          // tiles a cluster may own: what its exchange buffer holds

// How x becomes the operand, which is made in shared memory before the first tile: copied, by silu_mul, or by the
// residual sum and its norm.
enum class Operand { kCopied, kSiluMul, kAddNorm };

template <int kRows, bool kDeep>
struct alignas(128) Storage {  // of dynamic shared memory; kRows: rows of x, 1, 8 or 16
    static constexpr int kStages = kRows == 1 ? 11 : kDeep ? 8 : 4;
    float partial[2][kWarps][kRows * kSumPitch];           // of one tile; two tiles in turn need one barrier each
    float exchange[kMaxClusterTiles * kRows * kTileRows];  // [source rank][own tile][row of x][weight row]
    float squares[kWarps];
    uint64_t exchanged;  // mbarrier: the sums of this block's tiles are there
    // Then the operand, [rows][operand_pitch], behind it a row of norm weights, and, from a multiple of 128 bytes on
    // (or each row of a piece would lie in two lines), the ring, [stages][kWarps][kPiece].
};
constexpr int kOperandPad = 32;               // elements; rows of x on each other's other half of the banks
constexpr int kSharedLimit = 227 * 1024;      // bytes a block
constexpr int kHalfSharedLimit = 113 * 1024;  // where two share a multiprocessor
constexpr int kShortShare = 10;               // pieces
constexpr int kFirstCopies = 5;               // before the wait, of a short share
constexpr int kSlabBytes = kTileRows * kSlab * 2;

// Elements in a row of the operand: the columns of this block, in whole slabs, and the padding.
__host__ __device__ constexpr int operand_pitch(int slabs) {
    return slabs * kSlab + kOperandPad;
}

// Elements of `rows` rows, up to a multiple of 128 bytes.
__host__ __device__ constexpr int operand_size(int rows, int slabs) {
    return (rows * operand_pitch(slabs) + 63) / 64 * 64;
}

// A walk over a block's pieces: for every tile, for every slab.
struct Walk {
    int tile, slab, first_slab, last_slab, stride;

    __device__ void next() {
        if (++slab == last_slab) slab = first_slab, tile += stride;
    }
};

// Where 16-byte chunk `chunk` of row `row` of a piece lies.
__device__ __forceinline__ int place(int row, int chunk) {
    return row * kColumns + (chunk ^ (row % 2 * (kChunks / 2))) * kChunk;
}

// Starts the copies of this warp's piece of a slab; zeros where the matrix ends.
__device__ __forceinline__ void copy_piece(__nv_bfloat16* piece, const __nv_bfloat16* weight, int tile, int slab,
                                           int outputs, int inputs) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int chunk = lane % kChunks, column = slab * kSlab + warp * kColumns + chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kTileRows / kRowsAtOnce; ++i) {
        const int row = i * kRowsAtOnce + lane / kChunks, output = tile * kTileRows + row;
        const bool inside = output < outputs && column < inputs;
        const auto* source = inside ? weight + static_cast<int64_t>(output) * inputs + column : weight;
        ptx::cp_async(piece + place(row, chunk), source, inside ? 16 : 0);
    }
}

// Copies x into `operand`, zeros behind the last column.
template <int kRows>
__device__ __forceinline__ void stage_copy(__nv_bfloat16* operand, int pitch, const Linear& p, int first, int last) {
    constexpr int kRowThreads = kRows == 1 ? kThreads : 32;
    for (int row = threadIdx.x / kRowThreads; row < p.rows; row += kThreads / kRowThreads) {
#pragma unroll 4
        for (int column = first + threadIdx.x % kRowThreads * kChunk; column < last; column += kRowThreads * kChunk) {
            // Not the read-only path: the kernel before may write x while this one already runs.
            const auto* source = reinterpret_cast<const uint4*>(p.x + row * p.x_stride + column);
            store_16(operand + row * pitch + column - first, column < p.inputs ? *source : uint4{});
        }
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

// Starts the copies of this block's norm weights.
__device__ __forceinline__ void copy_norm_weights(__nv_bfloat16* weights, const Linear& p, int first, int last) {
    for (int column = first + threadIdx.x * kChunk; column < min(last, p.inputs); column += kThreads * kChunk) {
        ptx::cp_async(weights + column - first, p.norm_weight + column);
    }
}

// Writes the norm of x + residual into `operand`, and the blocks of one cluster both it and the sum into memory. Every
// block repeats the sum of squares of whole rows: it is less work than to wait for another block's.
template <int kRows>
__device__ __forceinline__ void stage_add_norm(__nv_bfloat16* operand, int pitch, const __nv_bfloat16* weights,
                                               float* squares, const Linear& p, int first, int last) {
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
            const Float8 w = unpack(*reinterpret_cast<const uint4*>(weights + column - first));
            Float8 y;
#pragma unroll
            for (int j = 0; j < 8; ++j) y.v[j] = s.v[j] * inverse * (1.0f + w.v[j]);
            packed = pack(y);
            if (stores) store_16(p.normed + int64_t{row} * p.inputs + column, packed);
        }
        store_16(place, packed);
    }
}

template <int kRows, bool kDeep, bool kSplit, Operand kOperand>
__global__ void __launch_bounds__(kThreads, 1) linear_kernel(const Linear p) {
    constexpr int kGroups = (kRows + 7) / 8;  // of eight rows of x: the N of one mma
    constexpr int kStages = Storage<kRows, kDeep>::kStages;
    DYNAMIC_SHARED(shared);
    auto& storage = *reinterpret_cast<Storage<kRows, kDeep>*>(shared);
    auto* operand = reinterpret_cast<__nv_bfloat16*>(&storage + 1);
    const __nv_bfloat16* weight = p.weight;
    const int rows = p.rows, outputs = p.outputs, inputs = p.inputs;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int slabs = (inputs + kSlab - 1) / kSlab, tiles = (outputs + kTileRows - 1) / kTileRows;
    const int stride = gridDim.y;
    const int rank = kSplit ? blockIdx.x : 0, ranks = kSplit ? gridDim.x : 1;
    const int first_slab = slabs * rank / ranks, last_slab = slabs * (rank + 1) / ranks;
    const int first = first_slab * kSlab, last = last_slab * kSlab;
    // The same in every block of the cluster, whose shares may differ by a slab.
    const int share = (slabs + ranks - 1) / ranks, pitch = operand_pitch(share);
    __nv_bfloat16* norm_weights = operand + rows * pitch;
    __nv_bfloat16* ring = operand + operand_size(rows + (kOperand == Operand::kAddNorm), share);
    const auto piece_of = [&](int stage) { return ring + (stage * kWarps + warp) * kPiece; };
    const int own_turns = kSplit ? (tiles - static_cast<int>(blockIdx.y) + stride - 1) / stride : 0;
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

    Walk ahead = {static_cast<int>(blockIdx.y), first_slab, first_slab, last_slab, stride};
    const auto copy_next = [&](int stage) {
        if (ahead.tile < tiles) copy_piece(piece_of(stage), weight, ahead.tile, ahead.slab, outputs, inputs);
        ptx::cp_async_commit();  // an empty group at the end keeps the count
        ahead.next();
    };
    if constexpr (kOperand == Operand::kAddNorm) {
        copy_norm_weights(norm_weights, p, first, last);
        ptx::cp_async_commit();
    }
    const bool is_short = kRows == 1 && (tiles + stride - 1) / stride * share <= kStages;
    const int first_copies = is_short ? kFirstCopies : kStages - 1;
    for (int stage = 0; stage < first_copies; ++stage) copy_next(stage);
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if constexpr (kOperand == Operand::kCopied) stage_copy<kRows>(operand, pitch, p, first, last);
    if constexpr (kOperand == Operand::kSiluMul) stage_silu_mul<kRows>(operand, pitch, p, first, last);
    if constexpr (kOperand == Operand::kAddNorm) {
        if (is_short) {
            ptx::cp_async_wait<kFirstCopies>();
        } else {
            ptx::cp_async_wait<kStages - 1>();
        }
        __syncthreads();  // every thread's norm weights are there
        stage_add_norm<kRows>(operand, pitch, norm_weights, storage.squares, p, first, last);
    }
    for (int stage = first_copies; stage < kStages - 1; ++stage) copy_next(stage);
    __syncthreads();
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
    for (int tile = blockIdx.y; tile < tiles; tile += stride, ++turn) {
        float sum[kGroups][2][4] = {};  // two chains of mma, so that one hides the other's latency
        for (int slab = first_slab; slab < last_slab; ++slab) {
            const __nv_bfloat16* mine =
                operand + lane / 4 * pitch + (slab - first_slab) * kSlab + warp * kColumns + lane % 4 * kChunk;
            uint4 values[2][kGroups];
#pragma unroll
            for (int half = 0; half < 2; ++half) {
#pragma unroll
                for (int n = 0; n < kGroups; ++n) {
                    const auto* from = mine + n * 8 * pitch + half * (kColumns / 2);
                    values[half][n] = n * 8 + lane / 4 < rows ? *reinterpret_cast<const uint4*>(from) : uint4{};
                }
            }
            ptx::cp_async_wait<kStages - 2>();
            __syncwarp();  // every lane's copies are here, and every lane is done with the stage before
            copy_next(stage == 0 ? kStages - 1 : stage - 1);
            const __nv_bfloat16* piece = piece_of(stage);
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int chunk = half * (kChunks / 2) + lane % 4;
                const uint4 upper = *reinterpret_cast<const uint4*>(piece + place(lane / 4, chunk));
                const uint4 lower = *reinterpret_cast<const uint4*>(piece + place(lane / 4 + 8, chunk));
                const uint32_t first_half[4] = {upper.x, lower.x, upper.y, lower.y};
                const uint32_t second_half[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
                for (int n = 0; n < kGroups; ++n) {
                    ptx::mma_m16n8k16<__nv_bfloat16>(sum[n][0], first_half, values[half][n].x, values[half][n].y);
                    ptx::mma_m16n8k16<__nv_bfloat16>(sum[n][1], second_half, values[half][n].z, values[half][n].w);
                }
            }
            if (++stage == kStages) stage = 0;
        }

        float* mine = storage.partial[turn % 2][warp];
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (kRows == 1 && lane % 4 * 2 + i % 2 > 0) continue;  // the other seven rows are not there
                mine[(n * 8 + lane % 4 * 2 + i % 2) * kSumPitch + lane / 4 + i / 2 * 8] = sum[n][0][i] + sum[n][1][i];
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
            store(blockIdx.y + own * stride, total);
        }
    }
}

// The grid and the shared memory of a call.
struct Plan {
    int ranks, clusters;
    bool deep;
    size_t shared_bytes;
};

// Of a block with so many pieces. A ring holds no more stages than that.
template <int kRows, bool kDeep, Operand kOperand>
size_t shared_bytes_of(int rows, int slabs, int64_t pieces) {
    rows += kOperand == Operand::kAddNorm;
    const auto stages = std::min<int64_t>(Storage<kRows, kDeep>::kStages, pieces);
    return sizeof(Storage<kRows, kDeep>) + operand_size(rows, slabs) * sizeof(__nv_bfloat16) + stages * kSlabBytes;
}

// The cheapest way to share tiles x slabs, in halves of a piece: the pieces of the busiest block, its part of x, and
// what the exchange in a cluster takes (0.7 us on an H200); by the class of rows, so that a row's sums have the same
// order in every batch of the class, unless x fits in one of them and not in another.
template <int kRows, Operand kOperand>
Plan plan(const Linear& p) {
    const int tiles = (p.outputs + kTileRows - 1) / kTileRows, slabs = (p.inputs + kSlab - 1) / kSlab;
    const int multiprocessors = multiprocessor_count();
    Plan best{};
    int64_t best_cost = INT64_MAX;
    for (int ranks = 1; ranks <= std::min(8, slabs); ranks *= 2) {
        // How many clusters of more than two fit at once depends on how the multiprocessors of a card are grouped.
        const int usable = ranks > 2 ? std::max(multiprocessors * 3 / 4, ranks) : multiprocessors;
        const int clusters = std::min(tiles, std::max(1, usable / ranks));
        const int turns = (tiles + clusters - 1) / clusters, share = (slabs + ranks - 1) / ranks;
        if (ranks > 1 && turns > kMaxClusterTiles / ranks * ranks) continue;
        const int64_t pieces = int64_t{turns} * share;
        const bool deep = kRows == 1 || pieces > kShortShare ||
                          shared_bytes_of<kRows, false, kOperand>(kRows, share, pieces) > kHalfSharedLimit;
        const size_t shared_bytes = deep ? shared_bytes_of<kRows, true, kOperand>(p.rows, share, pieces)
                                         : shared_bytes_of<kRows, false, kOperand>(p.rows, share, pieces);
        if (shared_bytes > kSharedLimit) continue;
        const int64_t cost = 2 * pieces + kRows * share / kTileRows * 2 + (ranks > 1 ? 3 : 0);
        if (cost < best_cost) {
            best_cost = cost;
            best = {ranks, clusters, deep, shared_bytes};
        }
    }
    return best;  // no clusters: x does not fit
}

template <int kRows, Operand kOperand>
cudaError_t launch_rows(const Linear& p, cudaStream_t stream) {
    const Plan shares = plan<kRows, kOperand>(p);
    const LaunchConfig config = {.grid = dim3(shares.ranks, shares.clusters),
                                 .block = dim3(kThreads),
                                 .shared_bytes = shares.shared_bytes,
                                 .stream = stream,
                                 .cluster = dim3(shares.ranks),
                                 .programmatic = true};
    constexpr bool kDeepOnly = kRows == 1;
    if (shares.deep) {
        return launch(
            shares.ranks > 1 ? linear_kernel<kRows, true, true, kOperand> : linear_kernel<kRows, true, false, kOperand>,
            config, p);
    }
    return launch(shares.ranks > 1 ? linear_kernel<kRows, kDeepOnly, true, kOperand>
                                   : linear_kernel<kRows, kDeepOnly, false, kOperand>,
                  config, p);
}

bool aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

template <Operand kOperand>
bool fits(const Linear& p) {
    if (p.rows == 1) return plan<1, kOperand>(p).clusters > 0;
    return (p.rows <= 8 ? plan<8, kOperand>(p) : plan<16, kOperand>(p)).clusters > 0;
}

template <Operand kOperand>
cudaError_t launch_few(const Linear& p, cudaStream_t stream) {
    return p.rows == 1 ? launch_rows<1, kOperand>(p, stream) : launch_rows<8, kOperand>(p, stream);
}

bool well_formed(const Linear& p) {
    return p.rows >= 1 && p.rows <= kLinearMaxRows && p.outputs >= 1 && p.inputs >= 32 && p.inputs % 32 == 0 &&
           p.x_stride % 8 == 0 && aligned(p.x) && aligned(p.weight);
}

}  // namespace

bool linear_supported(const Linear& p) {
    return well_formed(p) && fits<Operand::kCopied>(p);
}

bool add_rms_norm_linear_supported(const Linear& p) {
    return well_formed(p) && p.rows <= kLinearMaxStagedRows && aligned(p.residual) && aligned(p.norm_weight) &&
           fits<Operand::kAddNorm>(p);
}

bool silu_mul_linear_supported(const Linear& p) {
    return well_formed(p) && p.rows <= kLinearMaxStagedRows && fits<Operand::kSiluMul>(p);
}

cudaError_t linear(const Linear& p, cudaStream_t stream) {
    if (!linear_supported(p)) return cudaErrorInvalidValue;
    return p.rows <= 8 ? launch_few<Operand::kCopied>(p, stream) : launch_rows<16, Operand::kCopied>(p, stream);
}

cudaError_t add_rms_norm_linear(const Linear& p, cudaStream_t stream) {
    return add_rms_norm_linear_supported(p) ? launch_few<Operand::kAddNorm>(p, stream) : cudaErrorInvalidValue;
}

cudaError_t silu_mul_linear(const Linear& p, cudaStream_t stream) {
    return silu_mul_linear_supported(p) ? launch_few<Operand::kSiluMul>(p, stream) : cudaErrorInvalidValue;
}

}  // namespace tokenspeed
