// The second launch of the prefill attention where pages of tiles were cut into ranges: merges the parts that
// paged_attention_prefill.cu left in the workspace, and gates them.
//
// budget: prefill_merge_kernel registers<=48 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <algorithm>

#include "paged_attention_prefill_tiles.h"

namespace tokenspeed {
namespace {

using namespace attention_prefill;

constexpr int kMergeRounds = 8;  // blocks of the merge a multiprocessor
constexpr int kMergeRows = 4, kMergeThreads = kMergeRows * kDim / 4;

// Where the parts of an output row lie.
struct CutRow {
    int parts;  // fewer than two where its tile was not cut
    int64_t first, stride;
    Vector<__nv_bfloat16, 4> gates;
};

// By whole warps.
__device__ __forceinline__ CutRow find_row(const PagedAttentionPrefill& p, int max_pages, int token, int query_head,
                                           int column) {
    // How many sequences end before the token. There may be tokens behind the last one.
    const int lane = threadIdx.x % 32;
    const int sequence = __popc(__ballot_sync(kAllLanes, lane < p.sequences && first_token_of(p, lane + 1) <= token));
    if (sequence == p.sequences) return {};
    const Extent extent = extent_of(p, sequence);
    if (extent.tiles == 0) return {};
    const int first_token = first_token_of(p, sequence), rows = tokens_of(p, sequence) * p.group;
    const int head = query_head / p.group, row = (token - first_token) * p.group + query_head % p.group;
    const int tile = row / kRows, pages = visible_pages(p, tile * kRows, rows, p.context_lens[sequence]);
    const int before = count_all(sequence, [&](int other) { return entries_of(extent_of(p, other), max_pages); });
    CutRow found{quotient_up(pages, quotient_up(extent.pages, ranges_of(extent, max_pages))),
                 (static_cast<int64_t>(before + tile) * p.kv_heads + head) * kRows + row % kRows,
                 static_cast<int64_t>(extent.tiles) * p.kv_heads * kRows,
                 {}};
    if (found.parts > 1) found.gates = load_gates(p, token, query_head, column);
    return found;
}

// Output rows of tiles whose pages were cut, 64 lanes a row: O = sum_i 2^{m_i - m} O_i / sum_i 2^{m_i - m} l_i. Lengths
// and gates are older than the prefill kernel, so a block finds its first row while that one still runs; and blocks are
// few, as it may turn out that nothing was cut.
__global__ void __launch_bounds__(kMergeThreads)
    prefill_merge_kernel(const __grid_constant__ PagedAttentionPrefill p, int blocks) {
    const int max_pages = choose_max_pages(p, blocks), column = threadIdx.x % (kDim / 4) * 4;
    const int rows = static_cast<int>(p.tokens) * p.q_heads, step = gridDim.x * kMergeRows;
    int row = blockIdx.x * kMergeRows + threadIdx.x / (kDim / 4);
    CutRow found{};
    if (max_pages < kWhole && row < rows) found = find_row(p, max_pages, row / p.q_heads, row % p.q_heads, column);
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (max_pages == kWhole) return;
    while (row < rows) {
        if (found.parts > 1) {
            float maximum = -INFINITY, weight_sum = 0;
            float4 sum{};
#pragma unroll 8
            for (int i = 0; i < found.parts; ++i) {
                const int64_t part = found.first + i * found.stride;
                const float2 state = p.part_sums[part];
                const float4 values = *reinterpret_cast<const float4*>(p.parts + part * kDim + column);
                // The first part sees token 0, so from it on the maximum is finite.
                const float larger = fmaxf(maximum, state.x);
                const float kept = ptx::exp2_approximate(maximum - larger);
                const float weight = ptx::exp2_approximate(state.x - larger);
                maximum = larger;
                weight_sum = kept * weight_sum + weight * state.y;
                add_scaled(sum, kept, values, weight);
            }
            const float inverse = 1 / weight_sum;
            store_quad(p, row / p.q_heads, row % p.q_heads, column,
                       make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse), found.gates);
        }
        row += step;
        if (row < rows) found = find_row(p, max_pages, row / p.q_heads, row % p.q_heads, column);
    }
}

}  // namespace

cudaError_t attention_prefill::merge_ranges(const PagedAttentionPrefill& p, int blocks, cudaStream_t stream) {
    const int64_t merge_blocks = (p.tokens * p.q_heads + kMergeRows - 1) / kMergeRows;
    return launch(
        prefill_merge_kernel,
        {.grid = static_cast<unsigned>(std::min<int64_t>(merge_blocks, kMergeRounds * multiprocessor_count())),
         .block = kMergeThreads,
         .stream = stream,
         .programmatic = true},
        p, blocks);
}

}  // namespace tokenspeed
