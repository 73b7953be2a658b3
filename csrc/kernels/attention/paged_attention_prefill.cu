// Causal attention of a packed batch of prefills over paged KV, with the output gate. Contract:
// tokenspeed/ops/attention.py.
//
// Algorithm. Online softmax over pages of 64 tokens (Milakov and Gimelshein 2018; tiled for the matrix unit by Dao et
// al. 2022): S = Q K^T, m' = max(m, S), P = 2^{S - m'}, O = 2^{m - m'} O + P V, scores in units of log 2. The rows of a
// tile are (token, query head of one KV head) pairs, token first: 128 rows are 8 to 32 tokens, so a short chunk fills
// tiles, and every head that reads a page reads it from the same copy.
//
// Tiles. Their list follows from the lengths on the device: sequence after sequence, the one that ends last first, each
// from its last tile on. A block a multiprocessor claims one after the other from a counter, so that who got short ones
// gets more, and runs through them without a pause: the producer is ahead in the next tile, and its neighbours bring
// the next queries as soon as the last keys have been multiplied, so that of a tile's end the groups have the store
// alone, through the box of those keys. Up to two rounds of tiles, and those of pages in e4m3, are dealt out instead,
// forwards and backwards by turns, the tiles that see most pages first, whatever sequence they are of. More than 32
// sequences are not sorted, the last of the batch comes first, and beyond one round their tiles are claimed.
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
//
// Roles. A producer warp (its warpgroup keeps 40 registers) fills a ring of five 32 KB boxes, one TMA instruction each,
// in the order in which they are used: K0 K1 V0 K2 V1 ... Two consumer warpgroups (232 registers) own 64 rows each: O
// takes 128 registers, S 32, P 16, a quarter of Q 16. The product with the next keys is under way while P V of the page
// before runs, the softmax of the next scores runs beside P V, and the groups start their products by turns. Boxes lie
// in shared memory with the 128-byte swizzle that wgmma wants and plain bulk copies cannot make, hence the tensor map.
// Pages beyond the diagonal are not read; a page on it is masked; the first page of a sequence is always visible, but a
// later range may hold nothing that a row sees.
//
// Shared memory: a warpgroup reads 16 x 4 KB for S, less 4 x 2 for the queries in registers, and 4 x 8 KB for P V a page
// = 704 of its 1,024 matrix cycles at 128 bytes a cycle; with the copies in, shared memory is busy 94% of that time.
//
// Pages in e4m3: TMA brings boxes of 16 KB to a ring of their own, and the producer's three idle neighbours turn them
// into boxes of fp16 (22 pieces of 16 numbers a thread and page, while the page takes 2,900 cycles to multiply), of
// which there are four. So the groups load their queries themselves, at the start of a tile, and store through them;
// they hold none of them in registers, and take no turns. Shared memory then carries 96 KB more a page and the copies 32
// less.
//
// Measured, and what was tried: docs/kernels/attention.md.
//
// budget: prefill_kernel registers<=168 hot sass=HGMMA
// budget: clear_kernel registers<=16
#include <launch.h>
#include <ptx.h>

#include <algorithm>

#include "paged_attention_prefill_consumer.h"

namespace tokenspeed {
namespace {

using namespace attention_prefill;

constexpr int kSplitRounds = 2;  // rounds of tiles, beyond which nothing is cut
constexpr int kPartRounds = 3;   // rounds that the parts of a cut list may take
constexpr int kShortRows = 32;   // at most: the decode kernel streams the keys as fast, and starts faster
// Decode calls that come here: rows of a sequence, at least, for the matrix unit takes them all at once; and sequences,
// at least, for what this kernel takes to start.
constexpr int kManyRows = 32, kFewSequences = 4;

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
        } else {
            for (int turn = 0; turn < kAnnounced; ++turn) ptx::mbarrier_init(&storage.announced[turn], 1);
            ptx::mbarrier_init(&storage.query_full, kHelpers / 32);
            ptx::mbarrier_init(&storage.query_empty, kConsumers / 32);
            ptx::mbarrier_init(&storage.keys_read, kConsumers / 32);
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
            } else {
                QueryLoader(storage, p).run_all();
            }
            return;
        }
        Producer<Kv> producer(storage, &map, p);
        if constexpr (Format<Kv>::kConverted) {
            each_tile(p, storage.list, [&](const Tile& tile) { producer.run(tile, [] {}); });
        } else {
            producer.run_all();
        }
    } else {
        ptx::register_increase<232>();
        Consumer<Kv> consumer(storage, p);
        if constexpr (Format<Kv>::kConverted) {
            each_tile(p, storage.list, [&](const Tile& tile) { consumer.run(tile); });
        } else {
            consumer.give_first_turn();
            while (consumer.next_tile()) consumer.run();
        }
    }
}

// No tile has been claimed.
__global__ void __launch_bounds__(32) clear_kernel(int* next_item) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (threadIdx.x == 0) *next_item = 0;
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
    if (p.max_parts > 0 || p.kv_is_e4m3 || tiles <= blocks) p.next_item = nullptr;
    if (p.next_item != nullptr) {
        const auto status =
            launch(clear_kernel, {.grid = 1, .block = 32, .stream = stream, .programmatic = true}, p.next_item);
        if (status != cudaSuccess) return status;
    }
    const auto status =
        p.kv_is_e4m3 ? launch_prefill<E4m3>(p, blocks, stream) : launch_prefill<__nv_bfloat16>(p, blocks, stream);
    if (status != cudaSuccess || p.max_parts == 0) return status;
    return merge_ranges(p, blocks, stream);
}

}  // namespace tokenspeed
