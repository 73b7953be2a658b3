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
// 11 slabs at once. Of one row behind a norm it is two blocks that share a multiprocessor, six slabs each: one of them
// fits beside the kernel ahead (moe_block.cu), and fills its ring while that one waits for its router. Where the share
// is short (of one row, no more than the ring) the ring is no longer than the share or than half of a multiprocessor,
// so that the next kernel's fills beside it, and three slabs are asked for before the wait, the others once x has been,
// which would wait behind them: x comes 5 us behind 160 KB. A block of e4m3 does so with a share half as long again,
// since its arithmetic, which begins with x, is twice as much a byte.
//
// x lies in shared memory, all rows of the block's columns. What comes before the product in a layer is done on the
// way, up to eight rows: silu_mul, or the residual sum and its norm, whose sum of squares every block repeats. The
// rounding is that of the separate kernels.
//
// The warps' sums of a tile meet in shared memory, those of one row four tiles at a time, so that warps seldom wait for
// each other.
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

#include <optional>

#include "linear_grid.h"
#include "linear_operand.h"
#include "linear_pieces.h"

namespace tokenspeed {
namespace {

using namespace linear_product;

// What some clusters of the grid multiply: a weight and where its outputs go.
template <typename Weight>
struct Part {
    const Weight* weight;
    __nv_bfloat16* out;
    int outputs;
    int cluster, clusters;  // this block's among those
};

template <typename Weight, int kRows, bool kDeep, bool kSplit, Operand kOperand>
__device__ __forceinline__ void multiply_part(const Linear& p, const Part<Weight>& part, uint8_t* shared) {
    using F = Format<Weight>;
    constexpr int kSlab = F::kSlab, kXChunks = 2 * F::kXChunks;
    constexpr int kGroups = (kRows + 7) / 8;  // of eight rows of x: the N of one mma
    constexpr int kStages = Storage<kRows, kDeep>::kStages, kHeldTiles = Storage<kRows, kDeep>::kHeldTiles;
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
#pragma unroll 1
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

    // What a thread finishes: of one row of x and every tile, or of a single row and one of the held tiles, one output.
    const int row = kRows == 1 ? 0 : threadIdx.x / kTileRows, output = threadIdx.x % kTileRows;
    const int own_held = kRows == 1 ? threadIdx.x / kTileRows : 0;
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

        const int held = turn % kHeldTiles, set = turn / kHeldTiles % 2;
        float* mine = storage.partial[set][held][warp];
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if (kRows == 1 && lane % 4 * 2 + i % 2 > 0) continue;  // the other seven rows are not there
                mine[(n * 8 + lane % 4 * 2 + i % 2) * kSumPitch + lane / 4 + i / 2 * 8] =
                    F::kScaled ? sum[n][0][i] : sum[n][0][i] + sum[n][1][i];
            }
        }
        if (held + 1 < kHeldTiles && tile + stride < tiles) continue;
        __syncthreads();
        if (row < rows && own_held <= held) {
            const auto& partial = storage.partial[set][own_held];
            float total = 0;
#pragma unroll
            for (int i = 0; i < kWarps; ++i) total += partial[i][row * kSumPitch + output];
            const int behind = held - own_held;  // tiles
            if constexpr (kSplit) {
                const int own_turn = turn - behind, slot = rank * (kMaxClusterTiles / ranks) + own_turn / ranks;
                ptx::store_async_cluster(&storage.exchange[(slot * kRows + row) * kTileRows + output], total,
                                         &storage.exchanged, own_turn % ranks);
            } else {
                store(tile - behind * stride, total);
            }
        }
    }
    if constexpr (kSplit) {  // this block finishes tiles rank, rank + ranks, ... of its cluster's
        ptx::mbarrier_wait_cluster(&storage.exchanged, 0);
        if (row >= rows || own_held > 0) return;
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
    constexpr bool kDeepOnly = kRows == 1 && !kTakesPairs<kRows, kOperand>;
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

bool well_formed(const Linear& p) {
    return p.rows >= 1 && p.rows <= kLinearMaxRows && p.outputs >= 1 && p.inputs >= 32 && p.inputs % 32 == 0 &&
           p.x_stride % 8 == 0 && is_aligned(p.x) && is_aligned(p.weight) && is_aligned(p.tail) &&
           (p.tail == nullptr || (p.scale != nullptr && p.tail_outputs >= 1));
}

}  // namespace

bool linear_supported(const Linear& p) {
    return well_formed(p) && try_halves(p, nullptr);
}

bool add_rms_norm_linear_supported(const Linear& p) {
    return well_formed(p) && p.rows <= kLinearMaxStagedRows && is_aligned(p.residual) && is_aligned(p.norm_weight) &&
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
