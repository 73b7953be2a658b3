// The second launch of the decode attention: merges the parts of sequences that the borders between blocks cut, and
// gates them.
//
// budget: merge_kernel registers<=64 hot
#include <launch.h>
#include <ptx.h>

#include <algorithm>

#include "paged_attention_decode_line.h"

namespace tokenspeed {
namespace {

using namespace attention_decode;

constexpr float kLowest = -3e38f;  // below any score; two of them may be subtracted, unlike two infinities

// The forms of the merge: over borders between blocks, or over pairs of a row group and a sequence; a few pairs have
// many parts each, and columns to spread over blocks.
enum class Over { kBorders, kPairs, kFewPairs };

constexpr int kFewestPairs = 8;  // that are not few

template <Over kOver>
struct MergeShape {
    static constexpr int kLanes = kOver == Over::kBorders ? 2 : kOver == Over::kPairs ? 8 : 32;  // that share the parts
    static constexpr int kThreads = kOver == Over::kBorders ? 128 : 512;
    static constexpr int kQuads = kThreads / kLanes;   // of columns
    static constexpr int kSlices = kDim / 4 / kQuads;  // of a row, each a block
    // Parts that a lane asks for at once: their loads are a round trip to L2, and of 132 blocks a pair of two has 67.
    static constexpr int kAtOnce = 3;
    static constexpr int kSharedBytes = kThreads * sizeof(float4) + kLanes * sizeof(float2);
};

// A slice of an output row: merges the parts that the blocks left; nothing where a block had it all. Lengths and gates
// are older than the decode kernel, so they are read, and the parts are found, while it still runs.
// Over borders, blockIdx.x + 1 is a block that may enter its range within a sequence, which is merged here if that is
// the first of its borders. Otherwise blockIdx.x is a pair of row group and sequence. blockIdx.y: row of the group, and
// slice.
// Over pairs, three blocks of 512 threads are to share a multiprocessor: many wait there while the decode kernel ends,
// and one fits beside a block of it.
template <Over kOver>
__global__ void __launch_bounds__(MergeShape<kOver>::kThreads, kOver == Over::kPairs ? 3 : 2)
    merge_kernel(const __grid_constant__ PagedAttentionDecode p, int blocks, int rows_of_part) {
    using Shape = MergeShape<kOver>;
    constexpr bool kBorders = kOver == Over::kBorders;
    constexpr int kLanes = Shape::kLanes, kQuads = Shape::kQuads, kAtOnce = Shape::kAtOnce;
    DYNAMIC_SHARED(raw);
    auto* sums = reinterpret_cast<float4*>(raw);                       // [kLanes][kQuads]
    auto* states = reinterpret_cast<float2*>(sums + Shape::kThreads);  // [kLanes]: maximum, sum
    const int quad = threadIdx.x % kQuads, share = threadIdx.x / kQuads;
    const int row_of_part = static_cast<int>(blockIdx.y) / Shape::kSlices;
    const int column = (static_cast<int>(blockIdx.y) % Shape::kSlices * kQuads + quad) * 4;
    const auto pages = [&](int candidate) { return pages_of(p, candidate); };
    const auto row_of = [&](int group) { return group % p.row_groups * rows_of_part + row_of_part; };
    Vector<__nv_bfloat16, 4> gates{};
    const auto read_gates = [&](int group, int sequence) {
        if (share > 0 || row_of(group) >= p.tokens * p.group || p.context_lens[sequence] < 0) return;
        const auto [token, head] = place_of_row(p, row_of(group));
        gates = load_gates(p, static_cast<int64_t>(sequence) * p.tokens + token, group / p.row_groups * p.group + head,
                           column);
    };
    int group = blockIdx.x / p.sequences, sequence = blockIdx.x % p.sequences, first = 0, last = 0, first_unit = 0;
    if (!kBorders) read_gates(group, sequence);
    const Line line = line_of(p, blocks);
    const int border = blockIdx.x + 1;
    bool cut = true;
    if (kBorders) {
        cut = border < line.blocks;
        if (cut) {
            const int unit = line.start_of(border);
            const Located located = locate(p.sequences, unit % line.pages, pages);
            group = unit / line.pages;
            sequence = located.sequence;
            first_unit = unit - located.offset;
            read_gates(group, sequence);
        }
    } else {
        first_unit = group * line.pages + count_all(sequence, pages);
        cut = pages(sequence) > 0;
    }
    if (cut) {
        first = line.owner_of(first_unit);
        last = line.owner_of(first_unit + pages(sequence) - 1);
        if (kBorders && first + 1 != border) last = first;
    }
    const bool entered_earlier = first < last && line.start_of(first) != first_unit;
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (first == last || row_of(group) >= p.tokens * p.group) return;
    float maximum = kLowest, weight_sum = 0;
    float4 sum{};
#pragma unroll 1
    for (int next = first + share; next <= last; next += kAtOnce * kLanes) {
        float2 state[kAtOnce];
        float4 values[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int block = min(next + i * kLanes, last);
            // The first block may have entered its range in another sequence; all others entered it in this one.
            const int slot = 2 * block + (block == first && entered_earlier ? 1 : 0);
            const int64_t part = static_cast<int64_t>(slot) * rows_of_part + row_of_part;
            values[i] = *reinterpret_cast<const float4*>(p.parts + part * kDim + column);
            state[i] = p.part_sums[part];
        }
        float larger = maximum;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) larger = fmaxf(larger, state[i].x);
        const float kept = ptx::exp2_approximate(maximum - larger);
        maximum = larger;
        weight_sum *= kept;
        add_scaled(sum, kept, sum, 0);
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const float weight = next + i * kLanes <= last ? ptx::exp2_approximate(state[i].x - larger) : 0;
            weight_sum += weight * state[i].y;
            add_scaled(sum, 1, values[i], weight);
        }
    }
    sums[threadIdx.x] = sum;
    if (quad == 0) states[share] = make_float2(maximum, weight_sum);
    __syncthreads();
    if (share > 0) return;
#pragma unroll
    for (int other = 1; other < kLanes; ++other) maximum = fmaxf(maximum, states[other].x);
    sum = float4{};
    weight_sum = 0;
#pragma unroll 8
    for (int other = 0; other < kLanes; ++other) {
        const float weight = ptx::exp2_approximate(states[other].x - maximum);
        weight_sum += weight * states[other].y;
        add_scaled(sum, 1, sums[other * kQuads + quad], weight);
    }
    const float inverse = 1 / weight_sum;
    const auto [token, head] = place_of_row(p, row_of(group));
    store_quad(p, static_cast<int64_t>(sequence) * p.tokens + token, group / p.row_groups * p.group + head, column,
               make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse), gates);
}

template <Over kOver>
cudaError_t launch_merge(const PagedAttentionDecode& p, int items, int blocks, int rows_of_part, cudaStream_t stream) {
    using Shape = MergeShape<kOver>;
    const int rows = std::min(p.tokens * p.group, rows_of_part);
    return launch(merge_kernel<kOver>,
                  {.grid = dim3(static_cast<unsigned>(items), static_cast<unsigned>(rows * Shape::kSlices)),
                   .block = Shape::kThreads,
                   .shared_bytes = Shape::kSharedBytes,
                   .stream = stream,
                   .programmatic = true},
                  p, blocks, rows_of_part);
}

}  // namespace

cudaError_t attention_decode::merge_parts(const PagedAttentionDecode& p, int blocks, int rows_of_part,
                                          cudaStream_t stream) {
    const int64_t pairs = static_cast<int64_t>(p.kv_heads) * p.row_groups * p.sequences;
    const auto items = static_cast<int>(std::min<int64_t>(pairs, blocks - 1));
    if (pairs >= blocks) return launch_merge<Over::kBorders>(p, items, blocks, rows_of_part, stream);
    return pairs >= kFewestPairs ? launch_merge<Over::kPairs>(p, items, blocks, rows_of_part, stream)
                                 : launch_merge<Over::kFewPairs>(p, items, blocks, rows_of_part, stream);
}

}  // namespace tokenspeed
