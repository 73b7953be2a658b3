// The expert product of a prefill whose experts are e4m3 with a scale for each block of 128 x 128: that of
// moe_experts_prefill.cu, with activations of e4m3 in groups of 128 columns. What differs from there stands here.
//
// Four launches: x is quantised, where the norm before has not written its groups; a grouped product with gate and up;
// one with down; the weighted sum of each token's rows. Half the bytes and, by the datasheet, half the time of the
// matrix unit: 8192 tokens of 35B are 412 Gflop, 0.27 ms at twice 780 TFLOP/s, and 0.8 GB of weights, 0.19 ms at 4.3
// TB/s.
//
// A tile and a stage have the shapes and bytes of bf16, with twice the columns. A tile of gate and up is 128 columns of
// the activations: a whole group of each row, whose four lanes find its largest magnitude and store it as e4m3.
//
// Measured, and what was tried: docs/kernels/fp8_prefill.md.
//
// budget: gate_up_kernel registers<=168 shared<=0 hot sass=QGMMA
// budget: down_kernel registers<=168 shared<=0 hot sass=QGMMA
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>
#include <ptx_wgmma.h>
#include <reduce.h>

#include <algorithm>

#include "dense/scaled_product.h"
#include "fp8.h"
#include "kernels.h"
#include "moe_experts_prefill_tiles.h"

namespace tokenspeed {
namespace {

using namespace expert_prefill;

constexpr int kDepth = kRowBytes;  // of a stage: one block of scales
constexpr int kParts = kTileRows / kScaleBlock;
// Registers of a thread that multiplies and of one that copies; the second product's copies need few.
constexpr int kGateUpRegisters = 232, kGatherRegisters = 40, kDownRegisters = 240, kCopyRegisters = 24;
static_assert(kDepth == kScaleBlock && kPairs == kScaleBlock && kParts == 2);

struct Arguments {
    MoeExperts p;
    uint8_t* x;               // [tokens, hidden] e4m3
    float* x_scale;           // [hidden / 128, tokens]
    uint8_t* activations;     // [choices, width] e4m3, in the order of `order`
    float* activation_scale;  // [choices, width / 128]
    __nv_bfloat16* rows;      // [choices, hidden], by token and rank
};

// sum = this warpgroup's 64 choices x 256 weight rows of a tile, all its depth. row_scales: of this thread's two rows;
// scales: of the two parts; each of `stages` blocks.
template <bool kGathered>
__device__ __forceinline__ void multiply_tile(float (&sum)[kParts][kScaleBlock / 2], Storage& storage, Cursor& at,
                                              int stages, bool has_rows, const float* const (&row_scales)[2],
                                              int64_t row_scale_stride, const float* const (&scales)[kParts]) {
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = 0; i < kScaleBlock / 2; ++i) sum[part][i] = 0;
    }
    float row_scale[2], scale[kParts];  // of the next stage, asked for one ahead
    const auto ask = [&](int s) {
#pragma unroll
        for (int i = 0; i < 2; ++i) row_scale[i] = row_scales[i][s * row_scale_stride];
#pragma unroll
        for (int part = 0; part < kParts; ++part) scale[part] = scales[part][s];
    };
    ask(0);
    for (int s = 0; s < stages; ++s) {
        const float of_rows[2] = {row_scale[0], row_scale[1]}, of_weights[kParts] = {scale[0], scale[1]};
        ask(min(s + 1, stages - 1));
        ptx::mbarrier_wait(&storage.full[at.slot], at.phase);
        const auto read = [&] {
            if (lane == 0) ptx::mbarrier_arrive(&storage.empty[at.slot]);
        };
        if (has_rows) {
            if (kGathered) ptx::fence_async_shared();
            const uint32_t choices = ptx::shared_address(storage.choices[at.slot]) + group * kGroupChoices * kRowBytes;
            multiply_scaled(sum, choices, ptx::shared_address(storage.weights[at.slot]), of_rows, of_weights, read);
        } else {
            read();
        }
        at.next(kStages);
    }
}

// A warp's 16 rows x 128 activations as e4m3, each row a group with a scale. `choice(row)`: its place in `order`, -1 to
// leave it out.
template <typename Choice>
__device__ __forceinline__ void store_activations(uint8_t* staging, const float (&sum)[kParts][kScaleBlock / 2],
                                                  const Arguments& a, int column, Choice choice) {
    const int lane = threadIdx.x % 32, groups = a.p.width / kScaleBlock;
    __syncwarp();  // what the warp stored before has been read
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        float value[kScaleBlock / 4], peak = kSmallestPeak;
#pragma unroll
        for (int i = 0; i < kScaleBlock / 4; ++i) {
            const int at = i / 2 * 4 + half * 2 + i % 2;
            value[i] = silu(sum[0][at]) * sum[1][at];
            peak = fmaxf(peak, fabsf(value[i]));
        }
        peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 1));
        peak = fmaxf(peak, __shfl_xor_sync(kAllLanes, peak, 2));
        const float factor = kLargestE4m3 / peak;
        const int row = lane / 4 + half * 8, to = choice(row);
        if (lane % 4 == 0 && to >= 0)
            a.activation_scale[int64_t{to} * groups + column / kScaleBlock] = peak / kLargestE4m3;
#pragma unroll
        for (int i = 0; i < kScaleBlock / 4; i += 2) {
            const float2 pair = make_float2(value[i] * factor, value[i + 1] * factor);
            const int piece = (i / 4) ^ row % 8;  // of 16 bytes: two 8 columns
            *reinterpret_cast<uint16_t*>(staging + row * kRowBytes + piece * 16 + i / 2 % 2 * 8 + lane % 4 * 2) =
                __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
        }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int row = i * 4 + lane / 8, piece = lane % 8, to = choice(row);
        if (to < 0) continue;
        store_16(a.activations + int64_t{to} * a.p.width + column + piece * 16,
                 *reinterpret_cast<const uint4*>(staging + row * kRowBytes + (piece ^ row % 8) * 16));
    }
}

__global__ void __launch_bounds__(kThreads, 1)
    gate_up_kernel(const __grid_constant__ CUtensorMap gate_up, const __grid_constant__ Arguments a) {
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
        ptx::register_decrease<kGatherRegisters>();
        if (static_cast<int>(blockIdx.x) >= count) return;
        Tile tile = tiles.find(blockIdx.x);
        Gather gather(p, tile);
        for (int index = blockIdx.x; index < count; index += step) {
            const uint8_t* source[Gather::kRows];
#pragma unroll
            for (int i = 0; i < Gather::kRows; ++i) {
                const uint8_t* row = a.x + int64_t{gather.choice[i] / p.top_k} * p.hidden;
                source[i] = gather.choice[i] >= 0 ? row + threadIdx.x % 8 * 16 : nullptr;
            }
            const Tile current = tile;
            if (index + step < count) {  // the next tile's choices arrive while this one is copied
                tile = tiles.find(index + step);
                gather = Gather(p, tile);
            }
            for (int s = 0; s < stages; ++s) {
                ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
                if (threadIdx.x == 0) {
                    ptx::mbarrier_arrive_expect_tx(&storage.full[at.slot], kWeightBytes);
                    ptx::tma_load<4>(storage.weights[at.slot], &gate_up, &storage.full[at.slot],
                                     {s * kDepth, current.column_tile * kPairs, 0, current.expert});
                }
                copy_choices(storage.choices[at.slot], source, s * kRowBytes);
                ptx::cp_async_mbarrier_arrive(&storage.full[at.slot]);
                at.next(kStages);
            }
        }
    } else {
        ptx::register_increase<kGateUpRegisters>();
        const int row_of_warp = threadIdx.x / 32 * 16 - kCopyThreads / 2, lane = threadIdx.x % 32;
        uint8_t* output = storage.output[threadIdx.x / 32 - 4];
        for (int index = blockIdx.x; index < count; index += step) {
            const Tile tile = tiles.find(index);
            const bool has_rows = row_of_warp / kGroupChoices * kGroupChoices < tile.choices;
            const float *row_scales[2], *scales[kParts];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int choice = min(row_of_warp + lane / 4 + 8 * i, tile.choices - 1);
                row_scales[i] = a.x_scale + p.order[tile.first + choice] / p.top_k;
            }
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const int blocks = p.width / kScaleBlock;  // of rows of gate, then of up
                scales[part] =
                    p.gate_up_scale + (int64_t{tile.expert} * 2 * blocks + part * blocks + tile.column_tile) * stages;
            }
            float sum[kParts][kScaleBlock / 2];
            multiply_tile<true>(sum, storage, at, stages, has_rows, row_scales, p.tokens, scales);
            if (!has_rows) continue;
            store_activations(output, sum, a, tile.column_tile * kPairs, [&](int row) {
                const int choice = row_of_warp + row;
                return choice < tile.choices ? tile.first + choice : -1;
            });
        }
    }
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
    const Tiles tiles(storage, p.offsets, p.hidden, kTileRows);
    const int stages = p.width / kDepth, count = tiles.count(), step = static_cast<int>(gridDim.x);
    Cursor at;
    if (threadIdx.x < kCopyThreads) {
        ptx::register_decrease<kCopyRegisters>();
        if (threadIdx.x >= 32) return;
        copy_activations<kDepth>(storage, tiles, stages, count, step, at, activations, down);
    } else {
        ptx::register_increase<kDownRegisters>();
        const int row_of_warp = threadIdx.x / 32 * 16 - kCopyThreads / 2, lane = threadIdx.x % 32;
        uint8_t* output = storage.output[threadIdx.x / 32 - 4];
        for (int index = blockIdx.x; index < count; index += step) {
            const Tile tile = tiles.find(index);
            const bool has_rows = row_of_warp / kGroupChoices * kGroupChoices < tile.choices;
            const float *row_scales[2], *scales[kParts];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int choice = min(row_of_warp + lane / 4 + 8 * i, tile.choices - 1);
                row_scales[i] = a.activation_scale + int64_t{tile.first + choice} * stages;
            }
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const int blocks = p.hidden / kScaleBlock, block = min(tile.column_tile * kParts + part, blocks - 1);
                scales[part] = p.down_scale + (int64_t{tile.expert} * blocks + block) * stages;
            }
            float sum[kParts][kScaleBlock / 2];
            multiply_tile<false>(sum, storage, at, stages, has_rows, row_scales, 1, scales);
            if (!has_rows) continue;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                const int column = tile.column_tile * kTileRows + part * kOutputColumns;
                const auto packed = [&](int j, int i) {
                    return pack<__nv_bfloat16>(sum[part][4 * j + 2 * i], sum[part][4 * j + 2 * i + 1]);
                };
                store_rows(output, packed, p.hidden - column, [&](int row) -> __nv_bfloat16* {
                    const int choice = row_of_warp + row;
                    if (choice >= tile.choices) return nullptr;
                    return a.rows + int64_t{p.order[tile.first + choice]} * p.hidden + column;
                });
            }
        }
    }
}

}  // namespace

bool moe_experts_prefill_fp8_supported(const MoeExperts& p) {
    return p.gate_up_scale != nullptr && p.down_scale != nullptr && p.tokens >= 1 && p.top_k >= 1 && p.experts >= 1 &&
           p.experts <= kMaxExperts && p.hidden >= kDepth && p.hidden % kDepth == 0 && p.width >= kDepth &&
           p.width % kDepth == 0 && p.x_stride % 8 == 0 && is_aligned(p.x) && is_aligned(p.gate_up) &&
           is_aligned(p.down) && int64_t{p.tokens} * p.hidden / 8 / 256 < INT32_MAX;
}

size_t moe_experts_prefill_fp8_workspace(const MoeExperts& p) {
    const size_t tokens = p.tokens, choices = tokens * p.top_k, hidden = p.hidden, width = p.width;
    return choices * (hidden * sizeof(__nv_bfloat16) + width + width / kScaleBlock * sizeof(float)) +
           tokens * (hidden + hidden / kScaleBlock * sizeof(float));
}

cudaError_t moe_experts_prefill_fp8(const MoeExperts& p, cudaStream_t stream) {
    if (!moe_experts_prefill_fp8_supported(p)) return cudaErrorInvalidValue;
    const int64_t choices = int64_t{p.tokens} * p.top_k;
    Arguments a{.p = p,
                .x = nullptr,
                .x_scale = nullptr,
                .activations = nullptr,
                .activation_scale = nullptr,
                .rows = reinterpret_cast<__nv_bfloat16*>(p.workspace)};
    a.activations = reinterpret_cast<uint8_t*>(a.rows + choices * p.hidden);
    a.x = a.activations + choices * p.width;
    a.activation_scale = reinterpret_cast<float*>(a.x + int64_t{p.tokens} * p.hidden);
    a.x_scale = a.activation_scale + choices * (p.width / kScaleBlock);
    const auto hidden = static_cast<uint64_t>(p.hidden), width = static_cast<uint64_t>(p.width);
    const auto experts = static_cast<uint64_t>(p.experts);
    CUtensorMap gate_up, activations, down;
    const cudaError_t started[] = {encode_tensor_map<4>(&gate_up, TensorElement::kU8,
                                                        {.base = p.gate_up,
                                                         .sizes = {hidden, width, 2, experts},
                                                         .strides = {1, hidden, width * hidden, 2 * width * hidden},
                                                         .box = {kDepth, kPairs, 2, 1}},
                                                        Swizzle::k128),
                                   encode_tensor_map<2>(&activations, TensorElement::kU8,
                                                        {.base = a.activations,
                                                         .sizes = {width, static_cast<uint64_t>(choices)},
                                                         .strides = {1, width},
                                                         .box = {kDepth, kTileChoices}},
                                                        Swizzle::k128),
                                   encode_tensor_map<3>(&down, TensorElement::kU8,
                                                        {.base = p.down,
                                                         .sizes = {width, hidden, experts},
                                                         .strides = {1, width, hidden * width},
                                                         .box = {kDepth, kTileRows, 1}},
                                                        Swizzle::k128)};
    for (const cudaError_t status : started) {
        if (status != cudaSuccess) return status;
    }
    if (p.groups.values != nullptr) {
        a.x = p.groups.values, a.x_scale = p.groups.scales;
    } else {
        const cudaError_t status =
            quantise_groups(p.x, false, p.x_stride, {a.x, a.x_scale, p.tokens}, p.tokens, p.hidden, stream);
        if (status != cudaSuccess) return status;
    }
    const LaunchConfig config = {.grid = dim3(multiprocessor_count()),
                                 .block = dim3(kThreads),
                                 .shared_bytes = sizeof(Storage),
                                 .stream = stream,
                                 .programmatic = true};
    cudaError_t status = launch(gate_up_kernel, config, gate_up, a);
    if (status != cudaSuccess) return status;
    status = launch(down_kernel, config, activations, down, a);
    if (status != cudaSuccess) return status;
    return sum_ranks(p, a.rows, stream);
}

}  // namespace tokenspeed
