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
// Of a model split over ranks the experts here are some of all: the others' choices lie outside `offsets`, no row is
// written for them, and the sum leaves them out.
//
// The products have two forms: here blocks work each alone; in moe_experts_prefill_cluster.cu two share weights.
// in_clusters() says which. docs/kernels/moe_prefill.md has what was measured, tried and lost.
//
// budget: gate_up_kernel registers<=168 shared<=0 hot sass=HGMMA
// budget: down_kernel registers<=168 shared<=0 hot sass=HGMMA
// budget: sum_kernel registers<=64 shared<=0 hot
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>
#include <ptx_wgmma.h>

#include "kernels.h"
#include "moe_experts_prefill_tiles.h"

namespace tokenspeed {
namespace {

using namespace expert_prefill;

constexpr int kDepth = kRowBytes / 2;  // of a stage
constexpr int kWgmmaRegisters = 216, kCopyRegisters = 72;

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
        at.next(kStages);
    }
    ptx::wgmma_wait<0>(sum);
    if (lane == 0) ptx::mbarrier_arrive(&storage.empty[before]);
}

__global__ void __launch_bounds__(kThreads, 1)
    gate_up_kernel(const __grid_constant__ CUtensorMap gate_up, const __grid_constant__ Bf16Prefill a) {
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
        for (int index = blockIdx.x; index < count; index += step) {
            const uint8_t* source[Gather::kRows];
#pragma unroll
            for (int i = 0; i < Gather::kRows; ++i) {
                const __nv_bfloat16* row = p.x + gather.choice[i] / p.top_k * p.x_stride;
                source[i] =
                    gather.choice[i] >= 0 ? reinterpret_cast<const uint8_t*>(row) + threadIdx.x % 8 * 16 : nullptr;
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
        ptx::register_increase<kWgmmaRegisters>();
        const int row_of_warp = threadIdx.x / 32 * 16 - kCopyThreads / 2;
        uint8_t* output = storage.output[threadIdx.x / 32 - 4];
        for (int index = blockIdx.x; index < count; index += step) {
            const Tile tile = tiles.find(index);
            const bool has_rows = row_of_warp / kGroupChoices * kGroupChoices < tile.choices;
            float sum[kTileRows / 2];
            multiply_tile<true>(sum, storage, at, stages, has_rows);
            if (!has_rows) continue;
            const auto activation = [&](int j, int i) {
                const int gate = 4 * j + 2 * i, up = gate + kTileRows / 4;
                return pack<__nv_bfloat16>(silu(sum[gate]) * sum[up], silu(sum[gate + 1]) * sum[up + 1]);
            };
            const int column = tile.column_tile * kPairs;
            store_rows(output, activation, p.width - column, [&](int row) -> __nv_bfloat16* {
                const int choice = row_of_warp + row;
                if (choice >= tile.choices) return nullptr;
                return a.activations + int64_t{tile.first + choice} * p.width + column;
            });
        }
    }
}

__global__ void __launch_bounds__(kThreads, 1)
    down_kernel(const __grid_constant__ CUtensorMap activations, const __grid_constant__ CUtensorMap down,
                const __grid_constant__ Bf16Prefill a) {
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
        ptx::register_increase<kWgmmaRegisters>();
        const int row_of_warp = threadIdx.x / 32 * 16 - kCopyThreads / 2;
        uint8_t* output = storage.output[threadIdx.x / 32 - 4];
        for (int index = blockIdx.x; index < count; index += step) {
            const Tile tile = tiles.find(index);
            const bool has_rows = row_of_warp / kGroupChoices * kGroupChoices < tile.choices;
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
                store_rows(output, packed, p.hidden - column, [&](int row) -> __nv_bfloat16* {
                    const int choice = row_of_warp + row;
                    if (choice >= tile.choices) return nullptr;
                    return a.rows + int64_t{p.order[tile.first + choice]} * p.hidden + column;
                });
            }
        }
    }
}

constexpr int kSumThreads = 128, kSumBlocks = 8;  // of a block, and on a multiprocessor
constexpr int kSumRows = 8;                       // that a thread has in flight

// out[token] = the sum over ranks of weight times row: a block a token, a thread eight columns at a time.
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    sum_kernel(const __grid_constant__ MoeExperts p, const __nv_bfloat16* all_rows) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const int64_t first_choice = int64_t{blockIdx.x} * p.top_k;
    const __nv_bfloat16* weights = p.weights + first_choice;
    const int32_t* chosen = p.chosen + first_choice;
    const uint32_t hidden = static_cast<uint32_t>(p.hidden);
    for (uint32_t column = threadIdx.x * 8; column < hidden; column += kSumThreads * 8) {
        const __nv_bfloat16* row = all_rows + first_choice * hidden + column;
        Float8 sum{};
        for (int first = 0; first < p.top_k; first += kSumRows) {
            const int ranks = min(p.top_k - first, kSumRows);
            bool held[kSumRows];  // the row of an expert that another rank holds was not written
            float weight[kSumRows];
#pragma unroll
            for (int i = 0; i < kSumRows; ++i) {
                const uint32_t expert = i < ranks ? chosen[first + i] - p.first_expert : ~0u;
                const float given = i < ranks ? to_float(weights[first + i]) : 0.0f;
                held[i] = expert < static_cast<uint32_t>(p.experts);
                weight[i] = held[i] ? given : 0.0f;
            }
            uint4 packed[kSumRows];  // on their way together
#pragma unroll
            for (int i = 0; i < kSumRows; ++i, row += hidden) packed[i] = ptx::load_16_no_allocate_if(held[i], row);
#pragma unroll
            for (int i = 0; i < kSumRows; ++i) {
                const Float8 values = unpack(packed[i]);
#pragma unroll
                for (int j = 0; j < 8; ++j) sum.v[j] += weight[i] * values.v[j];
            }
        }
        store_16(p.out + int64_t{blockIdx.x} * hidden + column, pack(sum));
    }
}

cudaError_t launch_gate_up(const Bf16Prefill& a, const LaunchConfig& config) {
    const MoeExperts& p = a.p;
    const auto hidden = static_cast<uint64_t>(p.hidden), width = static_cast<uint64_t>(p.width);
    CUtensorMap gate_up;
    const cudaError_t status =
        encode_tensor_map<4>(&gate_up, TensorElement::kBf16,
                             {.base = p.gate_up,
                              .sizes = {hidden, width, 2, static_cast<uint64_t>(p.experts)},
                              .strides = {2, hidden * 2, width * hidden * 2, 2 * width * hidden * 2},
                              .box = {kDepth, kPairs, 2, 1}},
                             Swizzle::k128);
    return status != cudaSuccess ? status : launch(gate_up_kernel, config, gate_up, a);
}

cudaError_t launch_down(const Bf16Prefill& a, const LaunchConfig& config) {
    const MoeExperts& p = a.p;
    const auto hidden = static_cast<uint64_t>(p.hidden), width = static_cast<uint64_t>(p.width);
    CUtensorMap activations, down;
    const cudaError_t encoded[] = {encode_tensor_map<2>(&activations, TensorElement::kBf16,
                                                        {.base = a.activations,
                                                         .sizes = {width, static_cast<uint64_t>(p.tokens) * p.top_k},
                                                         .strides = {2, width * 2},
                                                         .box = {kDepth, kTileChoices}},
                                                        Swizzle::k128),
                                   encode_tensor_map<3>(&down, TensorElement::kBf16,
                                                        {.base = p.down,
                                                         .sizes = {width, hidden, static_cast<uint64_t>(p.experts)},
                                                         .strides = {2, width * 2, hidden * width * 2},
                                                         .box = {kDepth, kTileRows, 1}},
                                                        Swizzle::k128)};
    for (const cudaError_t status : encoded) {
        if (status != cudaSuccess) return status;
    }
    return launch(down_kernel, config, activations, down, a);
}

cudaError_t products_alone(const Bf16Prefill& a, cudaStream_t stream) {
    const LaunchConfig config = {.grid = dim3(multiprocessor_count()),
                                 .block = dim3(kThreads),
                                 .shared_bytes = sizeof(Storage),
                                 .stream = stream,
                                 .programmatic = true};
    const cudaError_t status = launch_gate_up(a, config);
    return status != cudaSuccess ? status : launch_down(a, config);
}

// Whether blocks share weights, two in a cluster: where an expert has on average more choices than a tile of a block
// alone, which reads its weights again beyond them. Of the averages that were measured, 64 is faster in blocks alone,
// and 160 and 256 in clusters (docs/kernels/moe_prefill.md). Of a model split over ranks by experts, choices that are
// elsewhere count too: the host does not know `offsets`.
bool in_clusters(const MoeExperts& p) {
    return int64_t{p.tokens} * p.top_k > int64_t{p.experts} * kTileChoices;
}

}  // namespace

cudaError_t expert_prefill::sum_ranks(const MoeExperts& p, const __nv_bfloat16* rows, cudaStream_t stream) {
    const LaunchConfig config = {.grid = dim3(static_cast<unsigned>(p.tokens)),
                                 .block = dim3(kSumThreads),
                                 .stream = stream,
                                 .programmatic = true};
    return launch(sum_kernel, config, p, rows);
}

bool moe_experts_prefill_supported(const MoeExperts& p) {
    return p.gate_up_scale == nullptr && p.down_scale == nullptr && p.tokens >= 1 && p.top_k >= 1 && p.experts >= 1 &&
           p.experts <= kMaxExperts && p.hidden >= kDepth && p.hidden % kDepth == 0 && p.width >= kDepth &&
           p.width % kDepth == 0 && p.x_stride % 8 == 0 && is_aligned(p.x) && is_aligned(p.gate_up) &&
           is_aligned(p.down);
}

size_t moe_experts_prefill_workspace(const MoeExperts& p) {
    return static_cast<size_t>(p.tokens) * p.top_k * (p.hidden + p.width) * sizeof(__nv_bfloat16) + 2 * sizeof(int);
}

cudaError_t moe_experts_prefill(const MoeExperts& p, cudaStream_t stream) {
    if (!moe_experts_prefill_supported(p)) return cudaErrorInvalidValue;
    auto* rows = reinterpret_cast<__nv_bfloat16*>(p.workspace);
    auto* activations = rows + int64_t{p.tokens} * p.top_k * p.hidden;
    auto* next_tiles = reinterpret_cast<int*>(activations + int64_t{p.tokens} * p.top_k * p.width);
    const Bf16Prefill a{p, activations, rows, next_tiles};
    const cudaError_t status = in_clusters(p) ? products_in_clusters(a, stream) : products_alone(a, stream);
    if (status != cudaSuccess) return status;
    return sum_ranks(p, rows, stream);
}

}  // namespace tokenspeed
