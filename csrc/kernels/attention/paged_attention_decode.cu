// Attention of a few new tokens a sequence over paged KV, with the output gate. Contract: tokenspeed/ops/attention.py.
//
// Algorithm. The T tokens x (q_heads / kv_heads) query heads that read one KV head are the rows of one product, so KV
// is read once a group: up to 64 rows a block, more in row groups. Softmax runs online over pages of 64 tokens (Milakov
// and Gimelshein 2018), the context is split over blocks (flash-decoding, Dao et al. 2023) and the parts are merged:
//     O = sum_i 2^{m_i - m} O_i / sum_i 2^{m_i - m} l_i,  m = max_i m_i, scores in units of log 2.
//
// Split. All (row group, sequence, page) stand in one line, which is cut into one range a block. So every block streams
// the same number of pages, give or take one, whatever the lengths, the grid depends on the shapes alone, and the work
// follows from context_lens on the device: a captured graph stays right when they change. A range holds whole sequences
// but for its ends, so a block leaves at most two parts in the workspace: slot 2 c for the sequence that it enters in
// the middle or at its start, 2 c + 1 for the one that it leaves unfinished. Whole sequences are finished at once. A
// second launch finds the parts of a sequence by the same arithmetic and merges them. Its grid is the smaller of the
// pairs of a sequence and a row group, and the borders between ranges: a batch of many short sequences has far more
// pairs than sequences that a border cuts, and blocks that only find that out would take longer than the merge.
//
// Launch. What is settled, by the caller's word, is read ahead of the wait for the kernel ahead: lengths, page ids, and
// the boxes of pages that lie wholly before the context. The last page, which the prologue fills up, comes behind it.
//
// Bytes. K and V once: 64 KB a page and KV head; batch 64 x 8192 tokens x 2 heads: 1.07 GB = 250 us at 4.3 TB/s. Parts:
// 1 KB a row and block. Flops: 16 rows x 64 tokens take about 800 cycles of four warps a page, while the page takes
// 3,500 to arrive at a multiprocessor's share of the bandwidth: latency within a page is hidden without overlap.
//
// Tiling. One block a multiprocessor: a producer warp keeps five or six 32 KB boxes in flight (one TMA instruction
// each), four consumer warps compute; 64 rows are shared by two such teams, so that one hides the other's latency. For
// the scores warp w takes tokens 16 w .. 16 w + 15 of the page, for the output columns 64 w .. 64 w + 63 of all tokens,
// so the output needs 32 registers a 16 rows, no warp keeps a maximum of its own and nothing is merged between warps;
// the price is two barriers of four warps a page. (Warps that own tokens to the end, as in FlashMLA, need 128 registers
// a 16 rows and a merge of four outputs a sequence.)
//
// Pages in e4m3: half the bytes, products in fp16, which is exact for them (paged_attention.h). A lane converts what
// ldmatrix gives it, two values an instruction and 128 a page: by estimate 250 cycles of the 1,750 that such a page
// takes to arrive. It holds four neighbouring columns of a key, so the queries' columns change places within 16; of
// values, ldmatrix transposes pairs of columns, so even and odd columns of the output lie in accumulators of their own.
//
// Measured, and what was tried: docs/kernels/attention.md.
//
// budget: decode_kernel registers<=255 hot sass=HMMA
#include <launch.h>
#include <ptx.h>

#include <algorithm>

#include "paged_attention_decode_consumer.h"

namespace tokenspeed {
namespace {

using namespace attention_decode;

// The launch ahead, which a warp waits for once, as late as it may.
class LaunchAhead {
  public:
    __device__ __forceinline__ void wait() {
        if (waited_) return;
        ptx::grid_dependency_wait();
        ptx::grid_dependency_launch();
        waited_ = true;
    }

  private:
    bool waited_ = false;
};

template <typename Kv, int kTiles>
__device__ __forceinline__ void produce(Storage<Kv, kTiles>& storage, const CUtensorMap* map,
                                        const PagedAttentionDecode& p, const Line& line, LaunchAhead& ahead) {
    Cursor at;
    each_segment(p, line, [&](const Segment& segment) {
        PageIds ids(p, segment.sequence, segment.first_page, segment.last_page);
        const int head = segment.group / p.row_groups, whole_pages = p.context_lens[segment.sequence] / kPage;
#pragma unroll 1
        for (int page = segment.first_page; page < segment.last_page; ++page) {
            const int id = ids.id(page);
            if (page >= whole_pages) ahead.wait();  // may hold new tokens, which the launch ahead stores
            for (int part = kKeys; part <= kValues; ++part) {
                ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
                if (ptx::elect_one()) {
                    load_box<Kv>(storage.ring[at.slot], map, &storage.full[at.slot], part, head, p.kv_heads, id);
                }
                at.next(Storage<Kv, kTiles>::kStages);
            }
        }
    });
}

// Zeros where a negative context marks padding.
__device__ __forceinline__ void clear_padding(const PagedAttentionDecode& p, int threads) {
    const int vectors = p.tokens * p.q_heads * (kDim / 8);
#pragma unroll 1
    for (int sequence = blockIdx.x; sequence < p.sequences; sequence += gridDim.x) {
        if (p.context_lens[sequence] >= 0) continue;
        auto* out = reinterpret_cast<uint4*>(out_of(p, static_cast<int64_t>(sequence) * p.tokens, 0, 0));
#pragma unroll 1
        for (int i = threadIdx.x; i < vectors; i += threads) out[i] = uint4{};
    }
}

template <typename Kv, int kTiles>
__global__ void __launch_bounds__(Storage<Kv, kTiles>::kThreads, 1)
    decode_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ PagedAttentionDecode p) {
    DYNAMIC_SHARED(raw);
    using Shared = Storage<Kv, kTiles>;
    auto& storage = *reinterpret_cast<Shared*>(raw);
    constexpr int kProducer = Shared::kConsumers / 32;
    const int warp = ptx::warp_id();
    if (threadIdx.x == Shared::kConsumers) {
        ptx::prefetch_tensor_map(&map);
        for (int stage = 0; stage < Shared::kStages; ++stage) {
            ptx::mbarrier_init(&storage.full[stage], 1);
            ptx::mbarrier_init(&storage.empty[stage], kProducer);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    LaunchAhead ahead;
    if (!p.settled) ahead.wait();
    const Line line = line_of(p, gridDim.x);
    if (warp == kProducer) {
        produce(storage, &map, p, line, ahead);
    } else {
        Consumer<Kv, kTiles> consumer(storage, p);
        each_segment(p, line, [&](const Segment& segment) {
            ahead.wait();
            consumer.run(segment);
        });
        ahead.wait();
        clear_padding(p, Shared::kConsumers);
    }
}

template <typename Kv, int kTiles>
cudaError_t launch_tiles(const PagedAttentionDecode& p, int blocks, cudaStream_t stream) {
    CUtensorMap map;
    if (const auto status = encode_boxes<Kv>(&map, p); status != cudaSuccess) return status;
    const auto status = launch(decode_kernel<Kv, kTiles>,
                               {.grid = static_cast<unsigned>(blocks),
                                .block = Storage<Kv, kTiles>::kThreads,
                                .shared_bytes = sizeof(Storage<Kv, kTiles>),
                                .stream = stream,
                                .programmatic = true},
                               map, p);
    return status == cudaSuccess ? merge_parts(p, blocks, Storage<Kv, kTiles>::kRows, stream) : status;
}

template <typename Kv>
cudaError_t launch_decode(const PagedAttentionDecode& p, const PagedAttentionDecodeShape& shape, cudaStream_t stream) {
    if (shape.tiles == 1) return launch_tiles<Kv, 1>(p, shape.blocks, stream);
    return shape.tiles == 2 ? launch_tiles<Kv, 2>(p, shape.blocks, stream)
                            : launch_tiles<Kv, 4>(p, shape.blocks, stream);
}

}  // namespace

PagedAttentionDecodeShape paged_attention_decode_shape(const PagedAttentionDecode& p) {
    const int rows = p.tokens * (p.q_heads / p.kv_heads);
    const int tiles = rows <= kTileRows ? 1 : rows <= 2 * kTileRows ? 2 : 4;
    const int groups = p.kv_heads * ((rows + tiles * kTileRows - 1) / (tiles * kTileRows));
    const int64_t max_units = static_cast<int64_t>(groups) * p.sequences * p.table_width;
    const auto blocks = static_cast<int>(std::min<int64_t>(multiprocessor_count(), max_units));
    return {blocks, tiles, static_cast<int64_t>(2) * blocks * tiles * kTileRows};
}

cudaError_t paged_attention_decode(PagedAttentionDecode p, cudaStream_t stream) {
    const PagedAttentionDecodeShape shape = paged_attention_decode_shape(p);
    const int rows = p.tokens * (p.q_heads / p.kv_heads), rows_of_group = shape.tiles * kTileRows;
    complete(p);
    p.row_groups = (rows + rows_of_group - 1) / rows_of_group;
    return p.kv_is_e4m3 ? launch_decode<E4m3>(p, shape, stream) : launch_decode<__nv_bfloat16>(p, shape, stream);
}

}  // namespace tokenspeed
