// The expert product of a prefill, any number of tokens: out_t = sum_k w_tk down_e(silu(gate_e x_t) * up_e x_t), e the
// k-th expert of token t. The choices come grouped by expert (`order`, `offsets` of moe_route).
//
// Flops: 6 hidden width a choice. 8192 tokens of 35B: 412 Gflop, 0.53 ms at 780 TFLOP/s; the weights of all experts are
// 1.6 GB, 0.37 ms at 4.3 TB/s, beside it. So 256 tokens an expert are about where the matrix unit becomes the bound.
//
// Four launches: one warp starts the counters of tiles; a grouped product with gate and up, its epilogue the activation,
// into bf16 rows in the order of `order`; a grouped product with down, into bf16 rows by token and rank; the weighted
// sum of each token's rows in order of rank, in fp32. Written by hand and not on CUTLASS: the gather of x, the pairing
// of gate with up and the scatter are most of the code either way, and this runs on the emulated device.
//
// Of a model split over ranks the experts here are some of all: the others' choices lie outside `offsets`, no row is
// written for them, and the sum leaves them out.
//
// The products have two forms: in moe_experts_prefill_alone.cu blocks work each alone, in moe_experts_prefill_cluster.cu
// two share weights. in_clusters() says which. docs/kernels/moe_prefill.md has what was measured, tried and lost.
//
// budget: start_kernel registers<=32 shared<=0 hot
// budget: sum_kernel registers<=64 shared<=0 hot
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>

#include <algorithm>

#include "kernels.h"
#include "moe_experts_prefill.h"

namespace tokenspeed {
namespace {

using namespace expert_prefill;

constexpr int kDepth = kRowBytes / sizeof(__nv_bfloat16);  // of a stage

// The first tile of each block or cluster is its number.
__global__ void __launch_bounds__(32) start_kernel(int* next_tiles, int takers) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (threadIdx.x < 2) next_tiles[threadIdx.x] = takers;
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

// Whether blocks share weights, two in a cluster: where an expert has on average more choices than a tile of a block
// alone, which reads its weights again beyond them. Of the averages that were measured, 64 and 160 are faster in blocks
// alone, and 256 in clusters or even (docs/kernels/moe_prefill.md).
bool in_clusters(const MoeExperts& p) {
    return has_more_choices(p, kStageChoices);
}

}  // namespace

cudaError_t expert_prefill::start_tiles(int* next_tiles, int takers, cudaStream_t stream) {
    const LaunchConfig one_warp = {.grid = dim3(1), .block = dim3(32), .stream = stream, .programmatic = true};
    return launch(start_kernel, one_warp, next_tiles, takers);
}

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
    const Prefill a{.p = p,
                    .x = p.x,
                    .x_pieces = static_cast<uint32_t>(p.x_stride / 8),
                    .activations = activations,
                    .rows = rows,
                    .next_tiles = next_tiles};
    const bool clusters = in_clusters(p);
    const int takers = std::max(multiprocessor_count() / (clusters ? kClusterBlocks : 1), 1);
    cudaError_t status = start_tiles(next_tiles, takers, stream);
    if (status != cudaSuccess) return status;
    status = clusters ? products_in_clusters(a, takers, stream) : products_alone(a, takers, stream);
    if (status != cudaSuccess) return status;
    return sum_ranks(p, rows, stream);
}

}  // namespace tokenspeed
