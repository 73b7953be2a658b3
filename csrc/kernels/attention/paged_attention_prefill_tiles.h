// Which tiles a block of the prefill attention works on, and how their pages are cut into ranges:
// paged_attention_prefill.cu says why. What the lengths on the device decide here, both of its kernels find alike.
#pragma once
#include <reduce.h>

#include "paged_attention.h"

namespace tokenspeed::attention_prefill {

using namespace attention;

constexpr int kRows = kPrefillPartRows;  // of a tile
constexpr int kWhole = 1 << 30;          // more pages than any sequence has
constexpr int kMaxRanges = 128;          // that a sequence is cut into
constexpr int kLaneSequences = 32;       // one a lane: with more of them tiles are not sorted, and nothing is cut
constexpr int kEntryPages = 4, kMergePages = 4;  // what an entry and the merge cost, as pages

// What all blocks work through.
struct List {
    int entries;    // for one KV head
    int max_pages;  // of an entry
};

// Where a sequence's tokens begin; those of the one behind the last are their end.
__device__ __forceinline__ int first_token_of(const PagedAttentionPrefill& p, int sequence) {
    int first = sequence;
    if (p.cu_seqlens != nullptr) first = p.cu_seqlens[sequence];
    return first * p.tokens_each;
}

// None where a negative context marks padding.
__device__ __forceinline__ int tokens_of(const PagedAttentionPrefill& p, int sequence) {
    if (p.context_lens[sequence] < 0) return 0;
    return first_token_of(p, sequence + 1) - first_token_of(p, sequence);
}

// A sequence's share of the list: its tiles of one KV head, and the pages that the last of them sees.
struct Extent {
    int tiles, pages;
};

__device__ __forceinline__ Extent extent_of(const PagedAttentionPrefill& p, int sequence) {
    const int tokens = tokens_of(p, sequence);
    if (tokens == 0) return {0, 0};
    return {(tokens * p.group + kRows - 1) / kRows, (p.context_lens[sequence] + tokens + kPage - 1) / kPage};
}

__device__ __forceinline__ int quotient_up(int dividend, int divisor) {
    return static_cast<int>((static_cast<uint32_t>(dividend) + divisor - 1) / static_cast<uint32_t>(divisor));
}

__device__ __forceinline__ int ranges_of(const Extent& extent, int max_pages) {
    return extent.pages <= max_pages ? 1 : quotient_up(extent.pages, max_pages);
}

__device__ __forceinline__ int entries_of(const Extent& extent, int max_pages) {
    return extent.tiles * ranges_of(extent, max_pages);
}

// The most pages of one entry of the list: what ends first by the estimate of the head of that file, in integers, so
// that both kernels choose the same. By whole warps; each lane tries other numbers of ranges for the longest sequence.
__device__ __forceinline__ int choose_max_pages(const PagedAttentionPrefill& p, int blocks) {
    if (p.max_parts == 0) return kWhole;
    const int lane = threadIdx.x % 32;
    const Extent own = lane < p.sequences ? extent_of(p, lane) : Extent{0, 0};
    const int own_tokens = lane < p.sequences ? tokens_of(p, lane) : 0;
    const int longest = warp_maximum(own.pages);
    // Twice the mean pages of a tile: those of the last and of the first.
    const int pages = warp_sum(own.tiles * (2 * own.pages - own_tokens / kPage)) * p.kv_heads / 2;
    uint32_t least = ~0u;
    int best = kWhole;
#pragma unroll 1
    for (int first = 1; first <= min(kMaxRanges, longest); first += 32) {
        const int ranges = first + lane, max_pages = max(quotient_up(longest, ranges), 1);
        int entries = 0;
#pragma unroll 1
        for (int sequence = 0; sequence < p.sequences; ++sequence) {
            const Extent extent{__shfl_sync(kAllLanes, own.tiles, sequence),
                                __shfl_sync(kAllLanes, own.pages, sequence)};
            entries += entries_of(extent, max_pages);
        }
        entries *= p.kv_heads;
        const uint32_t rounds = quotient_up(entries, blocks);
        const uint32_t mean = rounds * static_cast<uint32_t>(pages + kEntryPages * entries) / entries;
        const uint32_t cost =
            max(mean, static_cast<uint32_t>(max_pages + kEntryPages)) + (ranges > 1 ? kMergePages : 0);
        const bool fits = ranges == 1 || (ranges <= longest && entries <= p.max_parts);
        if (fits && cost < least) {
            least = cost;
            best = ranges > 1 ? max_pages : kWhole;
        }
    }
    const uint32_t least_of_all = warp_reduce(least, [](uint32_t a, uint32_t b) { return min(a, b); });
    const int chosen = __ffs(static_cast<int>(__ballot_sync(kAllLanes, least == least_of_all))) - 1;
    return __shfl_sync(kAllLanes, best, chosen);
}

// 128 rows of one sequence and KV head, and a range of the pages that they see.
struct Tile {
    int sequence, head;
    int first_row, rows;  // rows: of the whole sequence, (query heads to a KV head) x tokens
    int first_token;      // of the sequence, in q
    int context;          // tokens before this call
    int first_page, last_page;
    int part;  // its place in the workspace; negative: the range is all that the tile sees
};

// The pages that a tile sees.
__device__ __forceinline__ int visible_pages(const PagedAttentionPrefill& p, int first_row, int rows, int context) {
    return (context + place_of_row(p, min(first_row + kRows, rows) - 1).token) / kPage + 1;
}

// By whole warps.
__device__ __forceinline__ List list_of(const PagedAttentionPrefill& p, int blocks) {
    const int max_pages = choose_max_pages(p, blocks);
    return {count_all(p.sequences, [&](int sequence) { return entries_of(extent_of(p, sequence), max_pages); }),
            max_pages};
}

// The tile at `index` of one KV head when the tiles of at most kLaneSequences sequences stand in the order of the
// pages that they see, the most first. In tiles, a sequence reaches from its context to its end, so this counts down
// from the longest end, and a step goes to the next end or context. By whole warps.
__device__ __forceinline__ Located locate_longest(const PagedAttentionPrefill& p, int index) {
    const int lane = threadIdx.x % 32;
    int start = 0, end = 0;
    if (lane < p.sequences) {
        start = static_cast<int>(static_cast<int64_t>(max(p.context_lens[lane], 0)) * p.group / kRows);
        end = start + extent_of(p, lane).tiles;
    }
    for (int level = warp_maximum(end);;) {
        const bool reaches = start < level && level <= end;
        const uint32_t sequences = __ballot_sync(kAllLanes, reaches);
        const int next = warp_maximum(end < level ? end : start < level ? start : 0);
        const int count = __popc(sequences), tiles = count * (level - next);
        if (index < tiles) {
            const bool chosen = reaches && __popc(sequences & ((1u << lane) - 1)) == index % count;
            const int sequence = __ffs(static_cast<int>(__ballot_sync(kAllLanes, chosen))) - 1;
            return {sequence, level - 1 - index / count - __shfl_sync(kAllLanes, start, sequence)};
        }
        index -= tiles;
        level = next;
    }
}

// Where the entry of an item stands that was dealt out, or that was claimed of more than kLaneSequences sequences. By
// whole warps.
__device__ __forceinline__ Located locate_item(const PagedAttentionPrefill& p, const List& list, int item) {
    const int index = item / p.kv_heads;
    if (list.max_pages == kWhole && p.sequences <= kLaneSequences) return locate_longest(p, index);
    return locate(p.sequences, list.entries - 1 - index,
                  [&](int other) { return entries_of(extent_of(p, other), list.max_pages); });
}

// The tile at `item` of the list, which has the KV heads of an entry beside each other. Where keys are cut, a sequence
// has (range, tile) entries, range by range, so that tiles that run at a time read the same pages. By whole warps.
__device__ __forceinline__ Tile tile_at(const PagedAttentionPrefill& p, const List& list, int item,
                                        const Located& located) {
    const int entry = list.entries - 1 - item / p.kv_heads, sequence = located.sequence, offset = located.offset;
    const Extent extent = extent_of(p, sequence);
    const int ranges = ranges_of(extent, list.max_pages), range = ranges == 1 ? 0 : offset / extent.tiles;
    Tile tile;
    tile.sequence = sequence;
    tile.head = item % p.kv_heads;
    tile.first_token = first_token_of(p, sequence);
    tile.first_row = (offset - range * extent.tiles) * kRows;
    tile.rows = (first_token_of(p, sequence + 1) - tile.first_token) * p.group;
    tile.context = p.context_lens[sequence];
    const int pages = visible_pages(p, tile.first_row, tile.rows, tile.context);
    const int range_pages = quotient_up(extent.pages, ranges);
    tile.first_page = range * range_pages;
    tile.last_page = min(tile.first_page + range_pages, pages);
    tile.part = tile.last_page - tile.first_page == pages ? -1 : entry * p.kv_heads + tile.head;
    return tile;
}

// The item that a block gets in a round.
__device__ __forceinline__ int dealt(int round) {
    const int blocks = gridDim.x, block = blockIdx.x;
    return round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
}

// The items that a block works on. The list is dealt out forwards and backwards by turns, so that nobody always gets
// the longer ones; or a block claims the next one while it works on the one before. At most kLaneSequences sequences then
// stand one after the other, the one that ends last first, each from its last tile on. By whole warps.
class Items {
  public:
    __device__ __forceinline__ Items(const PagedAttentionPrefill& p, const List& list)
        : p_(p), list_(list), ranked_(p.next_item != nullptr && p.sequences <= kLaneSequences) {
        if (!ranked_) return;
        const int lane = threadIdx.x % 32;
        const Extent own = lane < p.sequences ? extent_of(p, lane) : Extent{0, 0};
#pragma unroll 1
        for (int other = 0; other < p.sequences; ++other) {
            const int tiles = __shfl_sync(kAllLanes, own.tiles, other),
                      pages = __shfl_sync(kAllLanes, own.pages, other);
            if (pages > own.pages || (pages == own.pages && other < lane)) before_ += tiles;
        }
        through_ = before_ + own.tiles;
    }

    __device__ __forceinline__ bool left() const { return item_ < list_.entries * p_.kv_heads; }

    __device__ __forceinline__ Tile tile() const {
        if (!ranked_) return tile_at(p_, list_, item_, locate_item(p_, list_, item_));
        const int index = item_ / p_.kv_heads;
        const uint32_t holds = __ballot_sync(kAllLanes, before_ <= index && index < through_);
        const int sequence = __ffs(static_cast<int>(holds)) - 1;
        return tile_at(p_, list_, item_, {sequence, __shfl_sync(kAllLanes, through_, sequence) - 1 - index});
    }

    // Ahead of next(), which waits for the answer.
    __device__ __forceinline__ void ask() {
        if (p_.next_item != nullptr && threadIdx.x % 32 == 0) claim_ = atomicAdd(p_.next_item, 1);
    }

    __device__ __forceinline__ void next() {
        const int blocks = gridDim.x;
        if (p_.next_item != nullptr) {
            item_ = blocks + __shfl_sync(kAllLanes, claim_, 0);
        } else {
            item_ = dealt(static_cast<uint32_t>(item_) / static_cast<uint32_t>(blocks) + 1);
        }
    }

  private:
    const PagedAttentionPrefill& p_;
    const List& list_;
    const bool ranked_;
    int before_ = 0, through_ = 0;  // tiles of the sequences ahead of the lane's, and with its own
    int item_ = blockIdx.x, claim_ = 0;
};

// Calls visit(tile) for the tiles of this block, where they are dealt out. By whole warps.
template <typename Visit>
__device__ __forceinline__ void each_tile(const PagedAttentionPrefill& p, const List& list, Visit visit) {
    for (int round = 0;; ++round) {
        const int item = dealt(round);
        if (item >= list.entries * p.kv_heads) break;
        const Tile tile = tile_at(p, list, item, locate_item(p, list, item));
        if (tile.first_page < tile.last_page) visit(tile);
    }
}

// paged_attention_prefill_merge.cu: the output rows of tiles whose pages were cut, for a list of `blocks` blocks.
cudaError_t merge_ranges(const PagedAttentionPrefill& p, int blocks, cudaStream_t stream);

}  // namespace tokenspeed::attention_prefill
