// Causal attention of a packed batch of prefills over paged KV, with the output gate. Contract:
// tokenspeed/ops/attention.py.
//
// Algorithm. Online softmax over pages of 64 tokens (Milakov and Gimelshein 2018; tiled for the matrix unit by Dao et
// al. 2022): S = Q K^T, m' = max(m, S), P = 2^{S - m'}, O = 2^{m - m'} O + P V, scores in units of log 2. The rows of a
// tile are (token, query head of one KV head) pairs, token first: 128 rows are 8 to 32 tokens, so a short chunk fills
// tiles, and every head that reads a page reads it from the same copy.
//
// Tiles. Their list follows from the lengths on the device, the tiles that see most pages first, whatever sequence they
// are of. A block a multiprocessor takes one tile in each round, forwards and backwards by turns, and runs through them
// without a pause: the producer is ahead in the next tile while one consumer group stores the last and the other still
// computes. (Sequence after sequence, 16 of 1024 tokens were dealt so that some blocks got only long tiles: 132 pages a
// block on average, 200 at most.)
//
// Ranges. A short turn behind a long prefix has fewer tiles than the card has multiprocessors: 512 tokens of 16:2 heads
// are 64. Then the pages of a tile are cut into ranges (flash-decoding, Dao et al. 2023), a part of each goes to the
// workspace as it is, and a second launch merges and gates them. The cut is the same for all tiles of a sequence, so
// those that run at a time read the same pages: the keys come from memory once. Its length is chosen on the device,
// the same by both kernels, so a captured graph stays right: of 128 numbers of ranges for the longest sequence the one
// that ends first, rounds x (mean pages of an entry + 4) + 4 for the merge, in pages, or the longest entry if that is
// more. Parts: 128 KB an entry, at most three rounds of them. With more than two rounds of tiles nothing is cut.
//
// Flops: 4 x 256 a (row, key) pair; 8192 tokens, 16 heads, causal: 0.55 TFLOP = 0.70 ms at 790 TFLOP/s. Bytes: a tile
// streams its keys and values from L2, 64 KB a page against 8.4 MFLOP: 4.7 TB/s at 600 TFLOP/s, near what L2 gives.
// (Two tiles in a cluster that share their boxes by multicast would halve that.)
//
// Roles. A producer warp (its warpgroup keeps 40 registers) fills a ring of five 32 KB boxes, one TMA instruction each,
// in the order in which they are used: K0 K1 V0 K2 V1 ... Two consumer warpgroups (232 registers) own 64 rows each: O
// takes 128 registers, S 32, P 16. The product with the next keys is under way while P V of the page before runs, and
// the softmax of the next scores runs beside P V. Boxes lie in shared memory with the 128-byte swizzle that wgmma wants
// and plain bulk copies cannot make, hence the tensor map. Pages beyond the diagonal are not read; a page on it is
// masked; the first page of a sequence is always visible, but a later range may hold nothing that a row sees.
//
// Shared memory: a warpgroup reads 16 x 4 KB for S and 4 x 8 KB for P V a page = 768 of its 1,024 matrix cycles at 128
// bytes a cycle; with the copies in, shared memory is as busy as the matrix unit.
//
// Pages in e4m3: TMA brings boxes of 16 KB to a ring of their own, and the producer's three idle neighbours turn them
// into boxes of fp16 (22 pieces of 16 numbers a thread and page, while the page takes 2,900 cycles to multiply), of
// which there are four: the consumers' code is the same. Shared memory then carries 96 KB more a page and the copies 32
// less: predicted 10 to 20% slower than bf16 where the matrix unit is the limit. Not timed.
//
// Measured on an H100 (product 782 to 790 TFLOP/s in that run), 16:2 heads where not said otherwise. Behind 30720 keys:
// 8 tokens 48 us (58 in the decode kernel), 128 tokens 115 us (371 there) = 561 TFLOP/s, 512 tokens 404 us = 644, 768
// tokens 626 us = 625 (512 uncut: 761 us = 341); 256 behind 131072 856 us = 643; 4 x 128 behind 16384 269 us = 512.
// 1 x 8192: 837 us alone, 913 us = 602 in turns with cuDNN's dense attention on contiguous keys, 1.06 of its rate; 32:2
// heads .98, 24:4 1.00, 8:2 1.20. Since then the merge's grid is bounded, as before it cost a fresh prompt, uncut, by
// estimate 12 us at 2048 tokens. Before cuts and gates that are under way ahead of the store: 654 TFLOP/s for 2048
// tokens behind 30720, 617 for 1 x 16384. 16 x 1024: 439 us = 313, .62 of cuDNN, in the order of the sequences. At 1.67
// us a page and 6 us a tile that order takes 430 us by arithmetic and the sorted one 323; sorted, an H200 took 424.
//
// budget: prefill_kernel registers<=168 hot sass=HGMMA
// budget: prefill_merge_kernel registers<=48 hot
#include <launch.h>
#include <ptx.h>
#include <ptx_wgmma.h>

#include <algorithm>

#include "paged_attention.h"

namespace tokenspeed {
namespace {

using namespace attention;

constexpr int kGroupRows = 64;  // of a consumer warpgroup
constexpr int kConsumerGroups = 2;
constexpr int kRows = kGroupRows * kConsumerGroups;
static_assert(kRows == kPrefillPartRows);
constexpr int kConsumers = kConsumerGroups * 128;
constexpr int kThreads = kConsumers + 128;
constexpr int kGateRows = 8;                        // whose gates a warp loads at a time
constexpr int kWarpRows = 16;                       // of a warp
constexpr int kQueryBytes = kGroupRows * kDim * 2;  // of a consumer warpgroup: laid out as a box
constexpr int kConverters = 96;                     // threads, behind the producer warp
constexpr uint32_t kFirstGroupBarrier = 1, kConsumerBarrier = 3;
constexpr int kWhole = 1 << 30;     // more pages than any sequence has
constexpr int kMaxRanges = 128;     // that a sequence is cut into
constexpr int kLaneSequences = 32;  // one a lane: with more of them tiles are not sorted, and nothing is cut
constexpr int kSplitRounds = 2;     // nor with more tiles than that many rounds
constexpr int kPartRounds = 3;      // rounds that the parts of a cut list may take
constexpr int kEntryPages = 4, kMergePages = 4;  // what an entry and the merge cost, as pages
constexpr int kShortRows = 32;  // at most: the decode kernel streams the keys as fast, and starts faster
// Decode calls that come here: rows of a sequence, at least, for the matrix unit takes them all at once; and sequences,
// at least, for what this kernel takes to start (8 tokens of 32:2 heads behind 8192: 34 us where the other needs 24).
constexpr int kManyRows = 32, kFewSequences = 4;
constexpr int kMergeRounds = 8;  // blocks of the merge a multiprocessor
constexpr int kMergeRows = 4, kMergeThreads = kMergeRows * kDim / 4;

// What all blocks work through.
struct List {
    int entries;    // for one KV head
    int max_pages;  // of an entry
};

template <typename Kv>
struct Storage {
    static constexpr int kStages = 5;
    static constexpr int kFillers = 1;  // arrivals that make a box full

    alignas(1024) uint8_t query[kConsumerGroups][kQueryBytes];
    alignas(1024) uint8_t ring[kStages][kQueryBytes];
    uint64_t full[kStages], empty[kStages];
    List list;
};

// Boxes of e4m3 arrive in a ring of their own, and the producer's neighbours turn them into what products read.
template <>
struct Storage<E4m3> {
    static constexpr int kStages = 4, kRawStages = 2;
    static constexpr int kFillers = kConverters / 32;

    alignas(1024) uint8_t query[kConsumerGroups][kQueryBytes];
    alignas(1024) uint8_t ring[kStages][kQueryBytes];
    alignas(1024) uint8_t raw[kRawStages][Format<E4m3>::kBoxBytes];
    float scale[kRows];  // of the scores of a row
    uint64_t full[kStages], empty[kStages], raw_full[kRawStages], raw_empty[kRawStages];
    List list;
};
static_assert(sizeof(Storage<__nv_bfloat16>) <= 227 * 1024 && sizeof(Storage<E4m3>) <= 227 * 1024);
static_assert(kQueryBytes == Format<__nv_bfloat16>::kBoxBytes && kQueryBytes == 2 * Format<E4m3>::kBoxBytes);

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

// The most pages of one entry of the list: what ends first by the estimate of the file's head, in integers, so that
// both kernels choose the same. By whole warps; each lane tries other numbers of ranges for the longest sequence.
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
            const Extent extent{__shfl_sync(0xffffffffu, own.tiles, sequence),
                                __shfl_sync(0xffffffffu, own.pages, sequence)};
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
    const int chosen = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, least == least_of_all))) - 1;
    return __shfl_sync(0xffffffffu, best, chosen);
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
        const uint32_t sequences = __ballot_sync(0xffffffffu, reaches);
        const int next = warp_maximum(end < level ? end : start < level ? start : 0);
        const int count = __popc(sequences), tiles = count * (level - next);
        if (index < tiles) {
            const bool chosen = reaches && __popc(sequences & ((1u << lane) - 1)) == index % count;
            const int sequence = __ffs(static_cast<int>(__ballot_sync(0xffffffffu, chosen))) - 1;
            return {sequence, level - 1 - index / count - __shfl_sync(0xffffffffu, start, sequence)};
        }
        index -= tiles;
        level = next;
    }
}

// Calls visit(tile) for the entries of this block. Where keys are cut, a sequence has (range, tile) entries, range by
// range, so that tiles that run at a time read the same pages. The list is dealt out forwards and backwards by turns,
// so that nobody always gets the longer ones. By whole warps.
template <typename Visit>
__device__ __forceinline__ void each_tile(const PagedAttentionPrefill& p, const List& list, Visit visit) {
    const int blocks = gridDim.x, block = blockIdx.x;
    for (int round = 0;; ++round) {
        const int item = round * blocks + (round % 2 == 0 ? block : blocks - 1 - block);
        if (item >= list.entries * p.kv_heads) break;
        const int max_pages = list.max_pages, entry = list.entries - 1 - item / p.kv_heads;
        const bool sorted = max_pages == kWhole && p.sequences <= kLaneSequences;
        const auto [sequence, offset] =
            sorted ? locate_longest(p, item / p.kv_heads) : locate(p.sequences, entry, [&](int candidate) {
                return entries_of(extent_of(p, candidate), max_pages);
            });
        const Extent extent = extent_of(p, sequence);
        const int ranges = ranges_of(extent, max_pages), range = ranges == 1 ? 0 : offset / extent.tiles;
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
        if (tile.first_page < tile.last_page) visit(tile);
    }
}

template <typename Kv>
class Producer {
    static constexpr bool kConverted = Format<Kv>::kConverted;
    using Shared = Storage<Kv>;

  public:
    __device__ __forceinline__ Producer(Shared& storage, const CUtensorMap* map, const PagedAttentionPrefill& p)
        : storage_(storage), map_(map), p_(p) {}

    __device__ __forceinline__ void run(const Tile& tile) {
        PageIds ids(p_, tile.sequence, tile.first_page, tile.last_page);
        int id = ids.id(tile.first_page);
        load(kKeys, tile.head, id);
        prefetch(tile);
        for (int page = tile.first_page + 1; page < tile.last_page; ++page) {
            const int next = ids.id(page);
            load(kKeys, tile.head, next);
            load(kValues, tile.head, id);
            id = next;
        }
        load(kValues, tile.head, id);
    }

  private:
    // Queries and gates into L2: the consumers are behind by the boxes of the ring.
    __device__ __forceinline__ void prefetch(const Tile& tile) const {
        constexpr int kLines = kDim * 2 / 128;
        const bool gates = p_.gate_vectors && tile.part < 0;
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < kRows * kLines; i += 32) {
            const int row = tile.first_row + i / kLines, column = i % kLines * (128 / 2);
            if (row >= tile.rows) break;
            const auto [token, query_head] = place_of_row(p_, row);
            const int head = tile.head * p_.group + query_head;
            ptx::prefetch_l2(p_.q + (tile.first_token + token) * p_.q_stride + head * kDim + column);
            if (gates) ptx::prefetch_l2(gate_of(p_, tile.first_token + token, head, column));
        }
        __syncwarp();
    }

    __device__ __forceinline__ void load(int part, int head, int id) {
        if constexpr (kConverted) {
            load(storage_.raw, storage_.raw_full, storage_.raw_empty, part, head, id);
        } else {
            load(storage_.ring, storage_.full, storage_.empty, part, head, id);
        }
    }

    template <int kStages, int kBytes>
    __device__ __forceinline__ void load(uint8_t (&ring)[kStages][kBytes], uint64_t* full, uint64_t* empty, int part,
                                         int head, int id) {
        ptx::mbarrier_wait(&empty[at_.stage], at_.parity ^ 1);
        if (ptx::elect_one()) load_box<Kv>(ring[at_.stage], map_, &full[at_.stage], part, head, p_.kv_heads, id);
        at_.next();
    }

    static constexpr int stages() {
        if constexpr (kConverted) return Shared::kRawStages;
        return Shared::kStages;
    }

    Shared& storage_;
    const CUtensorMap* map_;
    const PagedAttentionPrefill& p_;
    RingPosition<stages()> at_;
};

// Boxes of e4m3 become boxes of fp16, in the order in which they arrive.
class Converter {
    using Shared = Storage<E4m3>;

  public:
    __device__ __forceinline__ explicit Converter(Shared& storage) : storage_(storage) {}

    __device__ __forceinline__ void run(const Tile& tile) {
#pragma unroll 1
        for (int left = 2 * (tile.last_page - tile.first_page); left > 0; --left) {
            ptx::mbarrier_wait(&storage_.raw_full[from_.stage], from_.parity);
            ptx::mbarrier_wait(&storage_.empty[to_.stage], to_.parity ^ 1);
            convert(storage_.raw[from_.stage], storage_.ring[to_.stage]);
            ptx::fence_async_shared();
            __syncwarp();
            if (threadIdx.x % 32 == 0) {
                ptx::mbarrier_arrive(&storage_.raw_empty[from_.stage]);
                ptx::mbarrier_arrive(&storage_.full[to_.stage]);
            }
            from_.next();
            to_.next();
        }
    }

  private:
    // A piece of 16 columns in, two of 8 out. A warp takes four pieces of eight rows; eight lanes those of two rows
    // that differ by 5 in their swizzle, so that neither the reads nor the writes collide in a bank.
    __device__ __forceinline__ static void convert(const uint8_t* raw, uint8_t* box) {
        constexpr int kPieces = Format<E4m3>::kBoxBytes / 16;
#pragma unroll 2
        for (int at = threadIdx.x - kConsumers - 32; at < kPieces; at += kConverters) {
            const int row = (at / 8 % 4 ^ at / 4 % 2 * 5) + at / 64 % 8 * 8;
            const int piece = at % 4 + at / 32 % 2 * 4, group = at / 512;
            const uint4 values =
                *reinterpret_cast<const uint4*>(raw + group * kGroupBytes + (row * 8 + (piece ^ (row & 7))) * 16);
            uint8_t* out = box + (group * 2 + piece / 4) * kGroupBytes;
            const auto place = [&](int chunk) {
                return reinterpret_cast<uint4*>(out + (row * 8 + (chunk ^ (row & 7))) * 16);
            };
            uint4 halves;
            ptx::unpack_e4m3(values.x, halves.x, halves.y);
            ptx::unpack_e4m3(values.y, halves.z, halves.w);
            *place(piece % 4 * 2) = halves;
            ptx::unpack_e4m3(values.z, halves.x, halves.y);
            ptx::unpack_e4m3(values.w, halves.z, halves.w);
            *place(piece % 4 * 2 + 1) = halves;
        }
    }

    Shared& storage_;
    RingPosition<Shared::kRawStages> from_;
    RingPosition<Shared::kStages> to_;
};

template <typename Kv>
class Consumer {
    using F = Format<Kv>;
    using Operand = typename F::Operand;
    using Shared = Storage<Kv>;

  public:
    __device__ __forceinline__ Consumer(Shared& storage, const PagedAttentionPrefill& p)
        : storage_(storage), p_(p), group_(ptx::warp_id() / 4), warp_(ptx::warp_id() % 4), lane_(threadIdx.x % 32) {}

    __device__ __forceinline__ void run(const Tile& tile) {
        tile_ = tile;
        first_row_ = tile.first_row + group_ * kGroupRows;
        if (first_row_ >= tile.rows) return hand_on();
        masked_from_ = tile.context + place_of_row(p_, min(first_row_, tile.rows - 1)).token + 1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            maximum_[half] = -INFINITY;
            sum_[half] = 0;
        }
        load_query();
        float scores[kPage / 2], output[kDim / 2];
        uint32_t weights[kPage / 16][4];
        float rescale[2];
        wait_for_box();
        ptx::wgmma_fence(scores);
        multiply_keys(scores);
        ptx::wgmma_wait<0>(scores);
        release_box();
        softmax(scores, rescale, tile_.first_page);
        pack_weights(weights, scores);
        for (int page = tile_.first_page + 1; page < tile_.last_page; ++page) {
            wait_for_box();
            const int keys = at_.stage;
            ptx::wgmma_fence(scores, output);
            multiply_keys(scores);
            at_.next();
            wait_for_box();
            ptx::wgmma_fence(output);  // without this second one ptxas inserts it, and serialises (C7520)
            multiply_values(output, weights, page > tile_.first_page + 1);
            ptx::wgmma_wait<1>(scores);
            release(keys);
            softmax(scores, rescale, page);
            ptx::wgmma_wait<0>(output);
            release_box();
            // From some page on the maxima hardly change.
            if (__any_sync(0xffffffffu, rescale[0] != 1 || rescale[1] != 1)) {
#pragma unroll
                for (int i = 0; i < kDim / 2; ++i) output[i] *= rescale[i / 2 % 2];
            }
            pack_weights(weights, scores);
        }
        wait_for_box();
        silence_missing_values();
        ptx::wgmma_fence(output);
        multiply_values(output, weights, tile_.last_page > tile_.first_page + 1);
        uint2 gates[kGateRows];
        if (tile_.part < 0 && p_.gate_vectors) load_rows_of_gates(gates, 0, lane_ * 4);
        ptx::wgmma_wait<0>(output);
        release_box();
        if (tile_.part < 0) {
            store(output, gates);
        } else {
            leave_part(output);
        }
    }

  private:
    // None of the group's rows exists: the boxes are the other group's.
    __device__ __forceinline__ void hand_on() {
#pragma unroll 1
        for (int left = 2 * (tile_.last_page - tile_.first_page); left > 0; --left) {
            wait_for_box();
            if (left == 1) silence_missing_values();
            release_box();
        }
    }

    __device__ __forceinline__ void barrier() const { ptx::named_barrier_sync(kFirstGroupBarrier + group_, 128); }

    // The group's rows; missing ones become zero. All loads are under way at once, or, lest registers spill, four.
    __device__ __forceinline__ void load_query() {
        constexpr int kChunks = kDim / 8, kSteps = kGroupRows * kChunks / 128, kUnroll = F::kConverted ? 4 : kSteps;
#pragma unroll kUnroll
        for (int i = 0; i < kSteps; ++i) {
            const int at = i * 128 + static_cast<int>(threadIdx.x % 128), row = at / kChunks, chunk = at % kChunks;
            const int of_sequence = first_row_ + row;
            uint4 values{};
            if (of_sequence < tile_.rows) {
                const auto [token, head] = place_of_row(p_, of_sequence);
                values = ptx::load_16_no_allocate(p_.q + (tile_.first_token + token) * p_.q_stride +
                                                  (tile_.head * p_.group + head) * kDim + chunk * 8);
            }
            if constexpr (F::kConverted) {
                float divisor;
                values = row_to_half(values, divisor);  // a warp has one row
                if (chunk == 0) storage_.scale[group_ * kGroupRows + row] = p_.log2_scale * divisor;
            }
            *reinterpret_cast<uint4*>(storage_.query[group_] + chunk / 8 * kGroupBytes +
                                      (row * 8 + (chunk % 8 ^ (row & 7))) * 16) = values;
        }
        ptx::fence_async_shared();
        barrier();
    }

    // Of scores, to units of log 2. From shared memory each time: there is no register left.
    __device__ __forceinline__ float score_scale(int half) const {
        if constexpr (F::kConverted) {
            return storage_.scale[threadIdx.x / 32 * kWarpRows + threadIdx.x % 32 / 4 + half * 8];
        }
        return p_.log2_scale;
    }

    __device__ __forceinline__ void wait_for_box() { ptx::mbarrier_wait(&storage_.full[at_.stage], at_.parity); }

    __device__ __forceinline__ void release(int stage) {
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&storage_.empty[stage]);
    }

    __device__ __forceinline__ void release_box() {
        release(at_.stage);
        at_.next();
    }

    // scores = Q K^T, started and committed.
    __device__ __forceinline__ void multiply_keys(float (&scores)[kPage / 2]) {
        const uint64_t query =
            ptx::matrix_descriptor(ptx::shared_address(storage_.query[group_]), Swizzle::k128, 16, 1024);
        const uint64_t keys =
            ptx::matrix_descriptor(ptx::shared_address(storage_.ring[at_.stage]), Swizzle::k128, 16, 1024);
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {  // addresses in a descriptor count 16 bytes
            ptx::wgmma<Operand, kPage>(scores, query + (k / 4 * kGroupBytes + k % 4 * 32) / 16,
                                       keys + (k / 4 * kGroupBytes + k % 4 * 32) / 16, k > 0);
        }
        ptx::wgmma_commit();
    }

    // output (+)= weights V, started and committed.
    __device__ __forceinline__ void multiply_values(float (&output)[kDim / 2], const uint32_t (&weights)[kPage / 16][4],
                                                    bool accumulate) {
        const uint64_t values =
            ptx::matrix_descriptor(ptx::shared_address(storage_.ring[at_.stage]), Swizzle::k128, kGroupBytes, 1024);
#pragma unroll
        for (int k = 0; k < kPage / 16; ++k) {
            ptx::wgmma<Operand, kDim, true>(output, weights[k], values + k * 16 * kGroupRowBytes / 16,
                                            accumulate || k > 0);
        }
        ptx::wgmma_commit();
    }

    // Scores become weights; rescale says by how much what was summed before shrinks.
    __device__ __forceinline__ void softmax(float (&scores)[kPage / 2], float (&rescale)[2], int page) {
        if ((page + 1) * kPage > masked_from_) {
            int invisible[2];  // the first column that a row does not see
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = min(first_row_ + warp_ * 16 + lane_ / 4 + half * 8, tile_.rows - 1);
                invisible[half] = tile_.context + place_of_row(p_, row).token + 1 - page * kPage;
            }
#pragma unroll
            for (int i = 0; i < kPage / 2; ++i) {
                if (lane_ % 4 * 2 + i / 4 * 8 + i % 2 >= invisible[i / 2 % 2]) scores[i] = -INFINITY;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float maximum = maximum_[half];
#pragma unroll
            for (int i = 0; i < kPage / 4; ++i) maximum = fmaxf(maximum, scores[i / 2 * 4 + half * 2 + i % 2]);
            maximum = warp_maximum<4>(maximum);
            // A row that sees nothing of the range so far: any finite number gives weights of zero.
            const float scale = score_scale(half), base = maximum == -INFINITY ? 0 : maximum * scale;
            rescale[half] = ptx::exp2_approximate(maximum_[half] * scale - base);
            maximum_[half] = maximum;
            const float origin = base - F::kLargestWeightLog2;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < kPage / 4; ++i) {
                float& score = scores[i / 2 * 4 + half * 2 + i % 2];
                score = ptx::exp2_approximate(score * scale - origin);
                sum += score;
            }
            sum_[half] = sum_[half] * rescale[half] + sum;
        }
    }

    // Accumulators of 64 columns as the A operands of four steps of 16 tokens.
    __device__ __forceinline__ static void pack_weights(uint32_t (&weights)[kPage / 16][4],
                                                        const float (&scores)[kPage / 2]) {
#pragma unroll
        for (int i = 0; i < kPage / 4; ++i) {
            weights[i / 4][i % 4] = pack<Operand>(scores[2 * i], scores[2 * i + 1]);
        }
        ptx::hold_registers(weights);
    }

    // The rows of the last page beyond the sequence may hold NaN, which a weight of zero would not silence.
    __device__ __forceinline__ void silence_missing_values() {
        const int end = tile_.context + place_of_row(p_, tile_.rows).token;
        const int first = end - (tile_.last_page - 1) * kPage;
        if (first >= kPage) return;
#pragma unroll 1
        for (int i = threadIdx.x; i < (kPage - first) * (kDim / 8); i += kConsumers) {
            const int row = first + i / (kDim / 8), chunk = i % (kDim / 8);
            *reinterpret_cast<uint4*>(storage_.ring[at_.stage] + chunk / 8 * kGroupBytes + (row * 8 + chunk % 8) * 16) =
                uint4{};
        }
        ptx::fence_async_shared();
        ptx::named_barrier_sync(kConsumerBarrier, kConsumers);
    }

    // The warp's rows one after the other, as offsets: a division for the first alone. It stays at the last row that
    // exists.
    class Rows {
      public:
        __device__ __forceinline__ Rows(const PagedAttentionPrefill& p, const Tile& tile, int first)
            : p_(p), left_(tile.rows - 1 - first) {
            const auto [token, head] = place_of_row(p, min(first, tile.rows - 1));
            head_ = head;
            gate = gate_of(p, tile.first_token + token, tile.head * p.group + head, 0);
            out = out_of(p, tile.first_token + token, tile.head * p.group + head, 0);
        }

        __device__ __forceinline__ bool exists() const { return left_ >= 0; }

        __device__ __forceinline__ void next() {
            if (--left_ < 0) return;
            gate += p_.gate_head_stride;
            out += kDim;
            if (++head_ == p_.group) {
                head_ = 0;
                gate += p_.gate_token_stride - p_.group * p_.gate_head_stride;
                out += (p_.q_heads - p_.group) * kDim;
            }
        }

        const __nv_bfloat16* gate;
        __nv_bfloat16* out;

      private:
        const PagedAttentionPrefill& p_;
        int left_, head_;
    };

    // The gates of some of the warp's rows, four columns a lane and as bits, or each would take a register. Only where
    // they may be read so.
    __device__ __forceinline__ void load_rows_of_gates(uint2 (&gates)[kGateRows], int first, int column) const {
        Rows rows(p_, tile_, first_row_ + warp_ * kWarpRows + first);
#pragma unroll
        for (int row = 0; row < kGateRows; ++row, rows.next()) {
            gates[row] = *reinterpret_cast<const uint2*>(rows.gate + column);
        }
    }

    // Through shared memory, where the queries lay, half the columns at a time: a warp then stores 256 bytes of a row.
    // gates: of the first rows, if p.gate_vectors; those of the next are under way while some are stored.
    __device__ __forceinline__ void store(const float (&output)[kDim / 2], uint2 (&gates)[kGateRows]) {
        constexpr int kHalf = kDim / 2;
        // Opaque, or the addresses that follow from it are computed ahead of all tiles and spilled through the
        // products.
        const int lane = __shfl_sync(0xffffffffu, lane_, lane_);
        uint8_t* staging = storage_.query[group_] + warp_ * (kQueryBytes / 4);  // 16 rows of 512 bytes
        // A row's 16-byte chunks are permuted so that neither the writes nor the reads collide in a bank.
        const auto place = [&](int row, int chunk) { return staging + (row * 32 + (chunk ^ (row & 3) * 2)) * 16; };
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) inverse[half] = 1 / warp_sum<4>(sum_[half]);
        barrier();  // nobody in the group reads queries any more
#pragma unroll
        for (int columns = 0; columns < 2; ++columns) {
#pragma unroll
            for (int n = 0; n < kHalf / 8; ++n) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float* pair = output + (columns * (kHalf / 8) + n) * 4 + half * 2;
                    uint8_t* chunk = place(lane / 4 + half * 8, n * 2 + lane % 4 / 2);
                    reinterpret_cast<float2*>(chunk)[lane % 2] =
                        make_float2(pair[0] * inverse[half], pair[1] * inverse[half]);
                }
            }
            __syncwarp();
            const int column = columns * kHalf + lane * 4;
            Rows rows(p_, tile_, first_row_ + warp_ * kWarpRows);
            const auto store_row = [&](int row, const float4& of_row) {
                store_gated(rows.out + column, *reinterpret_cast<const float4*>(place(row, lane)), of_row);
            };
            if (p_.gate_vectors) {
#pragma unroll
                for (int first = 0; first < kWarpRows; first += kGateRows) {
                    uint2 next[kGateRows];
                    if (first + kGateRows < kWarpRows) {
                        load_rows_of_gates(next, first + kGateRows, column);
                    } else if (columns == 0) {
                        load_rows_of_gates(next, 0, column + kHalf);
                    }
#pragma unroll
                    for (int row = 0; row < kGateRows; ++row, rows.next()) {
                        if (rows.exists()) store_row(first + row, unpack_gates(gates[row]));
                        gates[row] = next[row];
                    }
                }
            } else {
#pragma unroll 1
                for (int row = 0; row < kWarpRows && rows.exists(); ++row, rows.next()) {
                    const __nv_bfloat16* gate = rows.gate + column * p_.gate_stride;
                    store_row(row, make_float4(__bfloat162float(gate[0]), __bfloat162float(gate[p_.gate_stride]),
                                               __bfloat162float(gate[2 * p_.gate_stride]),
                                               __bfloat162float(gate[3 * p_.gate_stride])));
                }
            }
            __syncwarp();
        }
        barrier();  // the next queries may come
    }

    // What a range of the pages adds, as it is, for the merge.
    __device__ __forceinline__ void leave_part(const float (&output)[kDim / 2]) const {
        const int lane = __shfl_sync(0xffffffffu, lane_, lane_);  // opaque, as above
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = warp_sum<4>(sum_[half]);
            const int row = group_ * kGroupRows + warp_ * kWarpRows + lane / 4 + half * 8;
            if (tile_.first_row + row >= tile_.rows) continue;
            const int64_t at = static_cast<int64_t>(tile_.part) * kRows + row;
            float* part = p_.parts + at * kDim + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < kDim / 8; ++n) {
                *reinterpret_cast<float2*>(part + n * 8) =
                    make_float2(output[n * 4 + half * 2], output[n * 4 + half * 2 + 1]);
            }
            if (lane % 4 == 0) p_.part_sums[at] = make_float2(maximum_[half] * score_scale(half), sum);
        }
        barrier();  // nobody in the group reads queries any more: the next ones may come
    }

    Shared& storage_;
    const PagedAttentionPrefill& p_;
    const int group_, warp_, lane_;
    Tile tile_;
    int first_row_;              // of the group, in the sequence
    int masked_from_;            // tokens that all rows of the group see
    float maximum_[2], sum_[2];  // sum_: over the lane's own columns
    RingPosition<Shared::kStages> at_;
};

// Zeros where a negative context marks padding, which a batch of sequences of one length may hold. By the producer's
// idle neighbours.
__device__ __forceinline__ void clear_padding(const PagedAttentionPrefill& p) {
    if (p.cu_seqlens != nullptr) return;
    const int vectors = p.tokens_each * p.q_heads * (kDim / 8);
    for (int sequence = blockIdx.x; sequence < p.sequences; sequence += gridDim.x) {
        if (p.context_lens[sequence] >= 0) continue;
        auto* out = reinterpret_cast<uint4*>(out_of(p, static_cast<int64_t>(sequence) * p.tokens_each, 0, 0));
        for (int i = threadIdx.x - kConsumers - 32; i < vectors; i += kThreads - kConsumers - 32) out[i] = uint4{};
    }
}

template <typename Kv>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ PagedAttentionPrefill p) {
    DYNAMIC_SHARED(raw);
    using Shared = Storage<Kv>;
    auto& storage = *reinterpret_cast<Shared*>(raw);
    const uint32_t warp = ptx::warp_id();
    if (threadIdx.x == kConsumers) {
        ptx::prefetch_tensor_map(&map);
        for (int stage = 0; stage < Shared::kStages; ++stage) {
            ptx::mbarrier_init(&storage.full[stage], Shared::kFillers);
            ptx::mbarrier_init(&storage.empty[stage], kConsumers / 32);
        }
        if constexpr (Format<Kv>::kConverted) {
            for (int stage = 0; stage < Shared::kRawStages; ++stage) {
                ptx::mbarrier_init(&storage.raw_full[stage], 1);
                ptx::mbarrier_init(&storage.raw_empty[stage], Shared::kFillers);
            }
        }
        ptx::fence_mbarrier_init();
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (warp == 0) {
        const List list = list_of(p, gridDim.x);
        if (threadIdx.x == 0) storage.list = list;
    }
    __syncthreads();
    if (warp >= kConsumers / 32) {
        ptx::register_decrease<40>();
        if (warp > kConsumers / 32) {
            clear_padding(p);
            if constexpr (Format<Kv>::kConverted) {
                Converter converter(storage);
                each_tile(p, storage.list, [&](const Tile& tile) { converter.run(tile); });
            }
            return;
        }
        Producer<Kv> producer(storage, &map, p);
        each_tile(p, storage.list, [&](const Tile& tile) { producer.run(tile); });
    } else {
        ptx::register_increase<232>();
        Consumer<Kv> consumer(storage, p);
        each_tile(p, storage.list, [&](const Tile& tile) { consumer.run(tile); });
    }
}

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
    const int sequence = __popc(__ballot_sync(0xffffffffu, lane < p.sequences && first_token_of(p, lane + 1) <= token));
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

template <typename Kv>
cudaError_t launch_prefill(const PagedAttentionPrefill& p, int blocks, cudaStream_t stream) {
    CUtensorMap map;
    if (const auto status = encode_boxes<Kv>(&map, p); status != cudaSuccess) return status;
    return launch(prefill_kernel<Kv>,
                  {.grid = static_cast<unsigned>(blocks),
                   .block = kThreads,
                   .shared_bytes = sizeof(Storage<Kv>),
                   .stream = stream,
                   .programmatic = true},
                  map, p);
}

// At most as many tiles as the sequences may have for one KV head.
int64_t max_tiles(const PagedAttention& p, int64_t tokens) {
    return tokens * (p.q_heads / p.kv_heads) / kRows + p.sequences;
}

}  // namespace

bool paged_attention_decode_as_prefill(const PagedAttention& p, int64_t tokens) {
    return tokens / p.sequences * (p.q_heads / p.kv_heads) >= kManyRows && p.sequences >= kFewSequences &&
           p.sequences <= kLaneSequences;
}

bool paged_attention_prefill_is_short(const PagedAttention& p, int64_t tokens) {
    return tokens * (p.q_heads / p.kv_heads) <= kShortRows;
}

int paged_attention_prefill_parts(const PagedAttention& p, int64_t tokens) {
    const int64_t tiles = max_tiles(p, tokens) * p.kv_heads;
    const int blocks = multiprocessor_count();
    if (p.sequences > kLaneSequences || tiles > kSplitRounds * blocks) return 0;
    return static_cast<int>(std::min<int64_t>(kPartRounds * blocks, tiles * std::min(p.table_width, kMaxRanges)));
}

cudaError_t paged_attention_prefill(PagedAttentionPrefill p, cudaStream_t stream) {
    complete(p);
    const int64_t tiles = max_tiles(p, p.tokens) * p.kv_heads;
    const auto blocks =
        static_cast<int>(std::min<int64_t>(multiprocessor_count(), p.max_parts > 0 ? p.max_parts : tiles));
    const auto status =
        p.kv_is_e4m3 ? launch_prefill<E4m3>(p, blocks, stream) : launch_prefill<__nv_bfloat16>(p, blocks, stream);
    if (status != cudaSuccess || p.max_parts == 0) return status;
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
