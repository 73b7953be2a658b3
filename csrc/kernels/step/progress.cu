// A sequence's progress on the device: small kernels around every decode step. Contracts: tokenspeed/ops/progress.py.
//
// All are latency and nothing else: 256 sequences x 8 tokens are at most 600 KB, 0.1 us at 4.3 TB/s, while a load
// that misses L1 takes 0.3 to 0.6 us. So each issues whatever does not depend on a loaded value at once, and is left
// with two loads behind one another (the sequence's index, then its row of the tables), no shared memory and no
// barrier; a launch and its wait cost about another microsecond.
//
// decode_rows: a block has a sequence, or a part of it, and a thread one of its angles as in paged_rows, one of its
// pages and one of its tokens, as far as there are so many; the first thread also writes what is one a sequence. Every
// thread loads all that says where the sequence stands: a launch of its own for that would cost more. A page is the
// third load behind one another.
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
// budget: decode_rows_kernel registers<=64 shared<=0
// budget: paged_rows_kernel registers<=64 shared<=0
// budget: draft_rows_kernel registers<=40 shared<=0 hot
// budget: accept_tokens_kernel registers<=64 shared<=0 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <algorithm>
#include <cmath>

#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / 32;

// Writes angle `item` of a sequence's rows, and, with the first of a row, its place. first: of the rows.
__device__ __forceinline__ void write_angle(const PagedRows& p, uint32_t sequence, int64_t index, int32_t first,
                                            uint32_t item) {
    const uint32_t frequencies = p.frequencies, token = item / frequencies, frequency = item % frequencies;
    const uint32_t out_row = sequence * p.width + token;
    const float inverse = p.inv_freq[frequency];
    const int64_t row = int64_t{first} + token, position = max(row, int64_t{0}) + p.rope_shift;
    if (frequency == 0) {
        const int64_t place = max(row, int64_t{0});
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

__global__ void __launch_bounds__(kThreads) paged_rows_kernel(const PagedRows p) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const uint32_t item = blockIdx.x * kThreads + threadIdx.x, each = p.width * p.frequencies;
    if (item >= p.sequences * each) return;
    const uint32_t sequence = item / each;
    write_angle(p, sequence, p.index[sequence], p.first[sequence], item % each);
}

__global__ void __launch_bounds__(kThreads) decode_rows_kernel(const DecodeRows p) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const uint32_t sequence = blockIdx.y, item = blockIdx.x * kThreads + threadIdx.x;
    const uint32_t sequences = p.rows.sequences, width = p.rows.width, pages = p.rows.table_width;
    const int64_t index = p.packed[sequence];
    const int32_t read = p.packed[sequences + sequence], write = p.packed[2 * sequences + sequence];
    const int32_t left = p.left[index], length = p.length[index], prompt = p.prompt[index];
    const bool going = write >= 0 && left > 0;
    const int32_t context = going ? length : -1;
    if (item < pages) {
        p.page_table[int64_t{sequence} * pages + item] = p.rows.pages[index * p.rows.pages_stride + item];
    }
    if (item < width) {
        const int64_t out = int64_t{sequence} * width + item;
        p.tokens[out] = p.ids[index * p.ids_stride + item];
        p.outputs[out] = int64_t{context} - prompt + 1 + item;
    }
    if (item == 0) {
        p.index[sequence] = index;
        p.context_lens[sequence] = context;
        p.reads[sequence] = going ? read : -1;
        p.writes[sequence] = going ? write : -1;
    }
    if (item < width * p.rows.frequencies) write_angle(p.rows, sequence, index, context, item);
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

cudaError_t decode_rows(const DecodeRows& arguments, cudaStream_t stream) {
    const PagedRows& rows = arguments.rows;
    const int items = std::max(rows.table_width, rows.width * rows.frequencies);  // of a sequence; tokens are fewer
    return launch(decode_rows_kernel,
                  {.grid = dim3((items + kThreads - 1) / kThreads, rows.sequences),
                   .block = dim3(kThreads),
                   .stream = stream,
                   .programmatic = true},
                  arguments);
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
