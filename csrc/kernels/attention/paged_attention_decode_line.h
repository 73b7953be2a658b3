// How the decode attention cuts its work: the line of all pages, a block's range of it, and the pieces of sequences
// that lie there. paged_attention_decode.cu says why; its merge finds the parts of a sequence by the same arithmetic.
#pragma once
#include "paged_attention.h"

namespace tokenspeed::attention_decode {

using namespace attention;

__device__ __forceinline__ int pages_of(const PagedAttentionDecode& p, int sequence) {
    const int context = p.context_lens[sequence];
    return context < 0 ? 0 : static_cast<int>((static_cast<uint32_t>(context) + p.tokens + kPage - 1) / kPage);
}

// The line of all units, and how it is cut: the first blocks get one unit more where it does not divide.
struct Line {
    int pages;   // of all sequences
    int units;   // pages times row groups
    int blocks;  // that have any

    __device__ __forceinline__ int start_of(int block) const {
        return block * (units / blocks) + min(block, units % blocks);
    }
    __device__ __forceinline__ int owner_of(int unit) const {
        const int share = units / blocks, longer = units % blocks * (share + 1);
        return unit < longer ? unit / (share + 1) : units % blocks + (unit - longer) / share;
    }
};

__device__ __forceinline__ Line line_of(const PagedAttentionDecode& p, int blocks) {
    const int pages = count_all(p.sequences, [&](int sequence) { return pages_of(p, sequence); });
    const int units = pages * p.kv_heads * p.row_groups;
    return {pages, units, min(blocks, units)};
}

// A run of pages of one sequence for one row group.
struct Segment {
    int group, sequence;
    int first_page, last_page;
    bool whole;  // all pages of the sequence
};

// Calls visit(segment) for what this block has to do, in order. By whole warps.
template <typename Visit>
__device__ __forceinline__ void each_segment(const PagedAttentionDecode& p, const Line& line, Visit visit) {
    const int block = blockIdx.x;
    if (block >= line.blocks) return;
    int unit = line.start_of(block), group = unit / line.pages;
    const int end = line.start_of(block + 1);
    auto [sequence, page] =
        locate(p.sequences, unit % line.pages, [&](int candidate) { return pages_of(p, candidate); });
    while (unit < end) {
        const int pages = pages_of(p, sequence);
        const int taken = min(pages - page, end - unit);
        if (taken > 0) visit(Segment{group, sequence, page, page + taken, taken == pages});
        unit += taken;
        page = 0;
        if (++sequence == p.sequences) {
            sequence = 0;
            ++group;
        }
    }
}

// paged_attention_decode_merge.cu: finishes the sequences that a border between the ranges of `blocks` blocks cuts.
// rows_of_part: rows of a slot of the workspace.
cudaError_t merge_parts(const PagedAttentionDecode& p, int blocks, int rows_of_part, cudaStream_t stream);

}  // namespace tokenspeed::attention_decode
