// A sequence's progress on the device: small kernels around every decode step. Contracts: tokenspeed/ops/progress.py.
//
// All are latency and nothing else: 256 sequences x 8 tokens are at most 600 KB, 0.1 us at 4.3 TB/s, while a load
// that misses L1 takes 0.3 to 0.6 us. So each issues whatever does not depend on a loaded value at once, and is left
// with two loads behind one another (the sequence's index, then its row of the tables), no shared memory and no
// barrier; a launch and its wait cost about another microsecond.
//
// next_tokens: a thread is one token of a sequence; the first of a sequence also writes what is one a sequence.
//
// paged_rows: a thread is one angle of a row; the first of a row also finds its place. The page is loaded beside the
// capacity, from a place that is clamped to the table, and dropped where the capacity says so. The angle is the fp32
// product of position and frequency, as in the published models; sincosf reduces it exactly however large it is, which
// the approximate instructions do not. (Beyond 105,615 radians its reduction keeps a few words in local memory, which
// is why the budget does not say hot.)
//
// draft_rows: a thread is one draft of a sequence; the first of a sequence also fetches its last id.
//
// accept_tokens: a warp is a sequence and a lane one of its tokens. Whether drafts agree and where an end stands are
// two ballots, so the count is two searches for a bit. Rows of padding touch no table, so they may share an index with
// any.
//
// budget: next_tokens_kernel registers<=40 shared<=0 hot
// budget: paged_rows_kernel registers<=64 shared<=0
// budget: draft_rows_kernel registers<=40 shared<=0 hot
// budget: accept_tokens_kernel registers<=64 shared<=0 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <cmath>

#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

__global__ void __launch_bounds__(kThreads) next_tokens_kernel(const NextTokens p) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const uint32_t item = blockIdx.x * kThreads + threadIdx.x, width = p.width;
    if (item >= p.sequences * width) return;
    const uint32_t sequence = item / width, column = item % width;
    const int64_t index = p.index[sequence];
    const int32_t read = p.read_slot[sequence], write = p.write_slot[sequence];
    const int32_t left = p.left[index], length = p.length[index], prompt = p.prompt[index];
    const int64_t id = p.ids[index * p.ids_stride + column];
    const bool going = write >= 0 && left > 0;
    const int32_t context = going ? length : -1;
    p.tokens[item] = id;
    p.outputs[item] = int64_t{context} - prompt + 1 + column;
    if (column > 0) return;
    p.context_lens[sequence] = context;
    p.reads[sequence] = going ? read : -1;
    p.writes[sequence] = going ? write : -1;
}

__global__ void __launch_bounds__(kThreads) paged_rows_kernel(const PagedRows p) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const uint32_t item = blockIdx.x * kThreads + threadIdx.x, width = p.width, frequencies = p.frequencies;
    if (item >= p.sequences * width * frequencies) return;
    const uint32_t out_row = item / frequencies, frequency = item % frequencies, sequence = out_row / width;
    const int32_t first = p.first[sequence];
    const float inverse = p.inv_freq[frequency];
    const int64_t row = int64_t{first} + out_row % width, position = max(row, int64_t{0}) + p.rope_shift;
    if (frequency == 0) {
        const int64_t index = p.index[sequence], place = max(row, int64_t{0});
        const int64_t column = min(place / p.page_size, int64_t{p.table_width - 1});
        const int32_t capacity = p.capacity[index], page = p.pages[index * p.pages_stride + column];
        const bool stored = first >= 0 && row < capacity;
        p.kv_slots[out_row] = stored ? int64_t{page} * p.page_size + place % p.page_size : -1;
    }
    float sine, cosine;
    sincosf(static_cast<float>(position) * inverse, &sine, &cosine);
    float* angles = p.cos_sin + int64_t{out_row} * 2 * frequencies + frequency;
    angles[0] = cosine * p.rope_scale;
    angles[frequencies] = sine * p.rope_scale;
}

__global__ void __launch_bounds__(kThreads) draft_rows_kernel(const DraftRows p) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const uint32_t item = blockIdx.x * kThreads + threadIdx.x, sequences = p.sequences;
    if (item >= sequences * p.drafts) return;
    const uint32_t draft = item / sequences, sequence = item % sequences;
    const int64_t index = p.index[sequence];
    const int32_t context = p.context[sequence];
    const int32_t capacity = p.capacity[index], prompt = p.prompt[index];
    const int64_t row = int64_t{context} + draft;
    p.rows[item] = context >= 0 && row < capacity ? static_cast<int32_t>(row) : -1;
    p.outputs[item] = row - prompt + 1;
    if (draft == 0) p.tokens[sequence] = p.ids[index * p.ids_stride];
}

__global__ void __launch_bounds__(kThreads) accept_tokens_kernel(const AcceptTokens p) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const int sequence = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (sequence >= p.sequences) return;
    const int64_t index = p.index[sequence];
    const int32_t context = p.context_lens[sequence];
    const bool has_token = lane < p.tokens_each, has_draft = lane + 1 < p.tokens_each;
    const int64_t at = int64_t{sequence} * p.tokens_each + lane;
    const int64_t chosen = has_token ? p.chosen[at] : 0;
    const int64_t draft = has_draft ? p.tokens[at + 1] : 0;
    const int64_t output = has_token ? p.outputs[at] : 0;
    const int32_t left = p.left[index], earliest = p.min_tokens[index];
    bool stop = false;
#pragma unroll 4
    for (int i = 0; i < p.stop_count; ++i) stop |= p.stops[index * p.stop_count + i] == chosen;
    const bool ends = has_token && (chosen < 0 || (stop && output + 1 >= earliest));  // negative: no id could be chosen
    // Behind the last token stands no draft, so a first disagreement is always found.
    const uint32_t disagreed = __ballot_sync(kAllLanes, !has_draft || chosen != draft);
    const uint32_t ended = __ballot_sync(kAllLanes, ends);
    const int agreed = __ffs(static_cast<int>(disagreed)) - 1;
    const int before_end = ended != 0 ? __ffs(static_cast<int>(ended)) - 1 : p.tokens_each;
    const int32_t count = context < 0 ? 0 : min(min(agreed, before_end) + 1, left);
    const int last = max(count - 1, 0);
    if (lane == 0) p.counts[sequence] = count;
    if (lane != last || context < 0) return;
    p.length[index] = context + count;
    p.left[index] = ends && count > 0 ? 0 : left - count;
    p.ids[index * p.ids_stride] = max(chosen, int64_t{0});
}

template <typename Arguments>
cudaError_t start(void (*kernel)(Arguments), int64_t items, int items_of_block, const Arguments& arguments,
                  cudaStream_t stream) {
    return launch(kernel,
                  {.grid = static_cast<unsigned>((items + items_of_block - 1) / items_of_block),
                   .block = kThreads,
                   .stream = stream,
                   .programmatic = true},
                  arguments);
}

}  // namespace

cudaError_t next_tokens(const NextTokens& arguments, cudaStream_t stream) {
    return start(next_tokens_kernel, int64_t{arguments.sequences} * arguments.width, kThreads, arguments, stream);
}

cudaError_t paged_rows(const PagedRows& arguments, cudaStream_t stream) {
    const int64_t angles = int64_t{arguments.sequences} * arguments.width * arguments.frequencies;
    return start(paged_rows_kernel, angles, kThreads, arguments, stream);
}

cudaError_t draft_rows(const DraftRows& arguments, cudaStream_t stream) {
    return start(draft_rows_kernel, int64_t{arguments.sequences} * arguments.drafts, kThreads, arguments, stream);
}

cudaError_t accept_tokens(const AcceptTokens& arguments, cudaStream_t stream) {
    return start(accept_tokens_kernel, arguments.sequences, kWarps, arguments, stream);
}

}  // namespace tokenspeed
