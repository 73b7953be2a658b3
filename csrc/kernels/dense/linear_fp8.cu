// out = x weight^T of e4m3 operands: x with a scale for each 128 columns of a row, weights with one for each block of
// 128 x 128. What a prefill multiplies.
//
// Flops: 2 rows outputs inputs, at 1,979 TFLOP/s of the matrix unit by its datasheet. A tile is 128 rows x 256 outputs.
// Three warpgroups: one thread of the first copies stages of 128 columns by TMA (16 KB of x, 32 KB of weights, four in
// flight), the other two multiply 64 rows each, wgmma m64n128k32. The matrix unit sums the 128 columns of a block, with
// fewer bits than fp32 has; then each thread adds them, times the scales of its row and of the block, to its sums in
// registers, while the other warpgroup's products run.
//
// Two blocks of a cluster take two tiles of rows of the same outputs and share the weights: each copies half of them to
// both. L2 gives an SM about 25 bytes a cycle; a stage of 1,024 cycles of the matrix unit takes 48 KB alone, 32 KB so.
// Blocks are persistent; tiles that run at one time are neighbours, kBand tiles of rows at a time, and meet in L2.
//
// Measured, and what was tried: docs/kernels/fp8_prefill.md.
//
// budget: linear_fp8_kernel registers<=168 shared<=0 hot sass=QGMMA
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>
#include <ptx_wgmma.h>
#include <vector.h>

#include <algorithm>
#include <type_traits>

#include "bf16x8.h"
#include "kernels.h"
#include "ring.h"
#include "scaled_product.h"

namespace tokenspeed {
namespace {

constexpr int kThreads = 384;  // warpgroup 0 copies, 1 and 2 multiply
constexpr int kCopyThreads = 128;
constexpr int kTileRows = 128;
constexpr int kParts = 2;  // of 128 outputs, each under a scale
constexpr int kTileOutputs = kParts * kScaleBlock;
constexpr int kStages = 4;
constexpr int kXBytes = kTileRows * kBlockRowBytes, kWeightBytes = kTileOutputs * kBlockRowBytes;
constexpr int kGroupRows = kTileRows / 2;  // that one warpgroup multiplies
constexpr int kBand = 16;                  // tiles of rows whose outputs are walked together
constexpr int kOutputBytes = kScaleBlock * 2;
constexpr int kWgmmaRegisters = 232, kCopyRegisters = 40;

struct Storage {  // of dynamic shared memory
    uint8_t x[kStages][kXBytes];
    uint8_t weights[kStages][kWeightBytes];
    uint8_t output[8][16 * kOutputBytes];  // 16 rows a warp, pieces of 16 bytes swizzled
    uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(Storage) <= kSharedLimit);

// The tiles of one block: those of its cluster, which takes kCluster tiles of rows of the same outputs.
template <int kCluster>
struct Tiles {
    int row_groups, output_tiles;

    __device__ explicit Tiles(const LinearFp8& p)
        : row_groups((p.rows + kTileRows * kCluster - 1) / (kTileRows * kCluster)),
          output_tiles((p.outputs + kTileOutputs - 1) / kTileOutputs) {}
    __device__ int count() const { return row_groups * output_tiles; }
    // The first row of the block's tile and its first output.
    __device__ int2 find(int index) const {
        constexpr int kGroups = kBand / kCluster;
        const int band = index / (kGroups * output_tiles), first = band * kGroups;
        const int groups = min(kGroups, row_groups - first), within = index - first * output_tiles;
        const int rank = static_cast<int>(blockIdx.x) % kCluster;
        return make_int2(((first + within % groups) * kCluster + rank) * kTileRows, within / groups * kTileOutputs);
    }
};

// Stores a warp's 16 rows x 128 outputs of bf16 from `row`, `column` on.
__device__ __forceinline__ void store_part(uint8_t* staging, const float (&sum)[kScaleBlock / 2], const LinearFp8& p,
                                           int row, int column) {
    const int lane = threadIdx.x % 32;
    __syncwarp();  // what the warp stored before has been read
    // Lane l names row l % 8 of the four 8 x 8 blocks: upper and lower rows of outputs 8 j, then of 8 (j + 1).
#pragma unroll
    for (int j = 0; j < kScaleBlock / 8; j += 2) {
        uint32_t block[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) block[i] = pack<__nv_bfloat16>(sum[4 * j + 2 * i], sum[4 * j + 2 * i + 1]);
        const int to = lane % 16, piece = (j + lane / 16) ^ to % 8;
        ptx::stmatrix_x4(ptx::shared_address(staging + to * kOutputBytes + piece * 16), block);
    }
    __syncwarp();
    const int piece = lane % 16, at = column + piece * 8;
    const bool vectors = p.outputs % 8 == 0;
    auto* out = static_cast<__nv_bfloat16*>(p.out);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int from = i * 2 + lane / 16;
        if (row + from >= p.rows || at >= p.outputs) continue;
        const uint8_t* source = staging + from * kOutputBytes + (piece ^ from % 8) * 16;
        __nv_bfloat16* to = out + int64_t{row + from} * p.outputs + at;
        if (vectors) {
            store_16(to, *reinterpret_cast<const uint4*>(source));
        } else {
            for (int j = 0; j < 8 && at + j < p.outputs; ++j) to[j] = reinterpret_cast<const __nv_bfloat16*>(source)[j];
        }
    }
}

// The same of fp32, straight from registers: four lanes write the 32 bytes of a sector.
__device__ __forceinline__ void store_part(const float (&sum)[kScaleBlock / 2], const LinearFp8& p, int row,
                                           int column) {
    const int lane = threadIdx.x % 32;
    auto* out = static_cast<float*>(p.out);
#pragma unroll
    for (int j = 0; j < kScaleBlock / 2; ++j) {
        const int at_row = row + lane / 4 + j / 2 % 2 * 8, at = column + j / 4 * 8 + lane % 4 * 2 + j % 2;
        if (at_row < p.rows && at < p.outputs) out[int64_t{at_row} * p.outputs + at] = sum[j];
    }
}

template <typename Out, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    linear_fp8_kernel(const __grid_constant__ CUtensorMap x, const __grid_constant__ CUtensorMap weight,
                      const __grid_constant__ LinearFp8 p) {
    DYNAMIC_SHARED(raw);
    auto& storage = *reinterpret_cast<Storage*>(raw);
    const int blocks = (p.inputs + kScaleBlock - 1) / kScaleBlock;
    const Tiles<kCluster> tiles(p);
    const int cluster = static_cast<int>(blockIdx.x) / kCluster, clusters = static_cast<int>(gridDim.x) / kCluster;
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&x);
        ptx::prefetch_tensor_map(&weight);
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(&storage.full[i], 1);
            ptx::mbarrier_init(&storage.empty[i], 8 * kCluster);  // warps that multiply
        }
        ptx::fence_mbarrier_init();
    }
    if constexpr (kCluster > 1) {
        ptx::cluster_sync();  // a peer copies into this block's shared memory
    } else {
        __syncthreads();
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    Cursor at;
    if (threadIdx.x < kCopyThreads) {
        ptx::register_decrease<kCopyRegisters>();
        const int rank = static_cast<int>(blockIdx.x) % kCluster;
        for (int index = cluster; threadIdx.x == 0 && index < tiles.count(); index += clusters) {
            const int2 tile = tiles.find(index);
            for (int block = 0; block < blocks; ++block) {
                uint64_t* full = &storage.full[at.slot];
                ptx::mbarrier_wait_cluster(&storage.empty[at.slot], at.phase ^ 1);
                ptx::mbarrier_arrive_expect_tx(full, kXBytes + kWeightBytes);
                ptx::tma_load<2>(storage.x[at.slot], &x, full, {block * kScaleBlock, tile.x});
                if constexpr (kCluster > 1) {
                    constexpr int kShare = kTileOutputs / kCluster;
                    ptx::tma_load_multicast<2>(storage.weights[at.slot] + rank * kShare * kBlockRowBytes, &weight, full,
                                               {block * kScaleBlock, tile.y + rank * kShare}, (1 << kCluster) - 1);
                } else {
                    ptx::tma_load<2>(storage.weights[at.slot], &weight, full, {block * kScaleBlock, tile.y});
                }
                at.next(kStages);
            }
        }
    } else {
        ptx::register_increase<kWgmmaRegisters>();
        const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
        const int row_of_warp = threadIdx.x / 32 * 16 - kCopyThreads / 2;
        const int last_row = p.rows - 1, last_block = (p.outputs - 1) / kScaleBlock;
        for (int index = cluster; index < tiles.count(); index += clusters) {
            const int2 tile = tiles.find(index);
            const float *row_scales[2], *scales[kParts];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int row = tile.x + row_of_warp + lane / 4 + 8 * i;
                row_scales[i] = p.x_scale + min(row, last_row) * p.x_scale_row_stride;
            }
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                scales[part] = p.scale + int64_t{min(tile.y / kScaleBlock + part, last_block)} * blocks;
            }
            float sum[kParts][kScaleBlock / 2] = {};
            float row_scale[2], scale[kParts];  // of the next block, asked for one ahead
            const auto ask = [&](int block) {
#pragma unroll
                for (int i = 0; i < 2; ++i) row_scale[i] = row_scales[i][block * p.x_scale_block_stride];
#pragma unroll
                for (int part = 0; part < kParts; ++part) scale[part] = scales[part][block];
            };
            ask(0);
            for (int block = 0; block < blocks; ++block) {
                const float of_rows[2] = {row_scale[0], row_scale[1]}, of_weights[kParts] = {scale[0], scale[1]};
                ask(min(block + 1, blocks - 1));
                ptx::mbarrier_wait(&storage.full[at.slot], at.phase);
                const uint32_t rows = ptx::shared_address(storage.x[at.slot]) + group * kGroupRows * kBlockRowBytes;
                multiply_scaled(sum, rows, ptx::shared_address(storage.weights[at.slot]), of_rows, of_weights, [&] {
                    if (lane != 0) return;
                    if constexpr (kCluster > 1) {
#pragma unroll
                        for (int rank = 0; rank < kCluster; ++rank) {
                            ptx::mbarrier_arrive_cluster_relaxed(&storage.empty[at.slot], rank);
                        }
                    } else {
                        ptx::mbarrier_arrive(&storage.empty[at.slot]);
                    }
                });
                at.next(kStages);
            }
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const int row = tile.x + row_of_warp, column = tile.y + part * kScaleBlock;
                if constexpr (std::is_same_v<Out, float>) {
                    store_part(sum[part], p, row, column);
                } else {
                    store_part(storage.output[threadIdx.x / 32 - 4], sum[part], p, row, column);
                }
            }
        }
    }
    if constexpr (kCluster > 1) ptx::cluster_sync();  // a peer may still arrive on this block's barriers
}

template <typename Out, int kCluster>
cudaError_t launch_tiles(const LinearFp8& p, cudaStream_t stream) {
    const auto inputs = static_cast<uint64_t>(p.inputs);
    CUtensorMap x, weight;
    const cudaError_t encoded[] = {encode_tensor_map<2>(&x, TensorElement::kU8,
                                                        {.base = p.x,
                                                         .sizes = {inputs, static_cast<uint64_t>(p.rows)},
                                                         .strides = {1, inputs},
                                                         .box = {kScaleBlock, kTileRows}},
                                                        Swizzle::k128),
                                   encode_tensor_map<2>(&weight, TensorElement::kU8,
                                                        {.base = p.weight,
                                                         .sizes = {inputs, static_cast<uint64_t>(p.outputs)},
                                                         .strides = {1, inputs},
                                                         .box = {kScaleBlock, kTileOutputs / kCluster}},
                                                        Swizzle::k128)};
    for (const cudaError_t status : encoded) {
        if (status != cudaSuccess) return status;
    }
    const int row_groups = (p.rows + kTileRows * kCluster - 1) / (kTileRows * kCluster);
    const int64_t tiles = int64_t{row_groups} * ((p.outputs + kTileOutputs - 1) / kTileOutputs);
    const int clusters = static_cast<int>(std::min<int64_t>(tiles, std::max(multiprocessor_count() / kCluster, 1)));
    const LaunchConfig config = {.grid = dim3(clusters * kCluster),
                                 .block = dim3(kThreads),
                                 .shared_bytes = sizeof(Storage),
                                 .stream = stream,
                                 .cluster = dim3(kCluster),
                                 .programmatic = true};
    return launch(linear_fp8_kernel<Out, kCluster>, config, x, weight, p);
}

template <typename Out>
cudaError_t launch_linear(const LinearFp8& p, cudaStream_t stream) {
    return p.rows > kTileRows ? launch_tiles<Out, 2>(p, stream) : launch_tiles<Out, 1>(p, stream);
}

}  // namespace

bool linear_fp8_supported(const LinearFp8& p) {
    const int64_t row_tiles = (int64_t{p.rows} + kTileRows - 1) / kTileRows;
    return p.rows >= 1 && p.outputs >= 1 && p.inputs >= 16 && p.inputs % 16 == 0 && is_aligned(p.x) &&
           is_aligned(p.weight) && is_aligned(p.out) &&
           row_tiles * ((int64_t{p.outputs} + kTileOutputs - 1) / kTileOutputs) < INT32_MAX / 2 &&
           int64_t{p.rows} + 2 * kTileRows < INT32_MAX && int64_t{p.outputs} + 2 * kTileOutputs < INT32_MAX;
}

cudaError_t linear_fp8(const LinearFp8& p, cudaStream_t stream) {
    if (!linear_fp8_supported(p)) return cudaErrorInvalidValue;
    return p.out_is_float ? launch_linear<float>(p, stream) : launch_linear<__nv_bfloat16>(p, stream);
}

}  // namespace tokenspeed
