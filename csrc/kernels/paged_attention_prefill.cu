// Causal attention of a packed batch of prefills over paged KV, with the output gate. Contract:
// tokenspeed/ops/attention.py.
//
// Algorithm. Online softmax over pages of 64 tokens (Milakov and Gimelshein 2018; tiled for the matrix unit by Dao et
// al. 2022): S = Q K^T, m' = max(m, S), P = 2^{S - m'}, O = 2^{m - m'} O + P V, scores in units of log 2. The rows of a
// tile are (token, query head of one KV head) pairs, token first: 128 rows are 8 to 32 tokens, so a short chunk fills
// tiles, and every head that reads a page reads it from the same copy.
//
// Tiles. Their list follows from cu_seqlens on the device: the grid is what the shapes allow at most, a block finds its
// tile by a scan, surplus blocks leave. The last tiles of a sequence, which see most keys, start first.
//
// Flops: 4 x 256 a (row, key) pair; 8192 tokens, 16 heads, causal: 0.55 TFLOP = 0.70 ms at 790 TFLOP/s. Bytes: a tile
// streams its keys and values from L2, 64 KB a page against 33.6 MFLOP.
//
// Roles. A producer warp (its warpgroup keeps 24 registers) fills a ring of five 32 KB boxes, one TMA instruction each,
// in the order in which they are used: K0 K1 V0 K2 V1 ... Two consumer warpgroups (240 registers) own 64 rows each: O
// takes 128 registers, S 32, P 16. The product with the next keys is under way while P V of the page before runs, and
// the softmax of the next scores runs beside P V. Boxes lie in shared memory with the 128-byte swizzle that wgmma wants
// and plain bulk copies cannot make, hence the tensor map. Pages beyond the diagonal are not read; a page on it is
// masked; the first page is always visible, so a maximum is finite from then on.
//
// Shared memory: a warpgroup reads 16 x 4 KB for S and 4 x 8 KB for P V a page = 768 of its 1,024 matrix cycles at 128
// bytes a cycle; with the copies in, shared memory is as busy as the matrix unit.
//
// Predicted (not run yet): 500 to 550 TFLOP/s at 8192 tokens.
//
// budget: prefill_kernel registers<=168 hot sass=HGMMA
#include <launch.h>
#include <ptx.h>
#include <ptx_wgmma.h>

#include "paged_attention.h"

namespace tokenspeed {
namespace {

using namespace attention;

constexpr int kGroupRows = 64;  // of a consumer warpgroup
constexpr int kConsumerGroups = 2;
constexpr int kRows = kGroupRows * kConsumerGroups;
constexpr int kConsumers = kConsumerGroups * 128;
constexpr int kThreads = kConsumers + 128;
constexpr int kStages = 5;
constexpr int kQueryGroupBytes = kRows * kColumnGroup * 2;
constexpr uint32_t kFirstGroupBarrier = 1, kConsumerBarrier = 3;

struct Storage {
    alignas(1024) uint8_t query[kColumnGroups * kQueryGroupBytes];  // per column group 128 rows of 128 bytes, swizzled
    alignas(1024) uint8_t ring[kStages][kBoxBytes];
    uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(Storage) <= 227 * 1024);

// 128 rows of one sequence and KV head.
struct Tile {
    int sequence, head;
    int first_row, rows;  // rows: of the whole sequence, (query heads to a KV head) x tokens
    int64_t first_token;  // of the sequence, in q
    int context;          // tokens before this call
    int end;              // tokens of the sequence with this call's
    int pages;            // that the tile sees
};

__device__ __forceinline__ bool find_tile(const PagedAttentionPrefill& p, Tile& tile) {
    const int heads = p.q_heads / p.kv_heads;
    const auto tiles_of = [&](int sequence) {
        return ((p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence]) * heads + kRows - 1) / kRows;
    };
    const int tiles = count_all(p.sequences, tiles_of), from_last = blockIdx.x;
    if (from_last >= tiles) return false;
    const auto [sequence, index] = locate(p.sequences, tiles - 1 - from_last, tiles_of);
    const int begin = p.cu_seqlens[sequence], tokens = p.cu_seqlens[sequence + 1] - begin;
    tile.sequence = sequence;
    tile.head = blockIdx.y;
    tile.first_row = index * kRows;
    tile.rows = tokens * heads;
    tile.first_token = begin;
    tile.context = p.context_lens[sequence];
    tile.end = tile.context + tokens;
    const int last_token = (min(tile.first_row + kRows, tile.rows) - 1) / heads;
    tile.pages = (tile.context + last_token) / kPage + 1;
    return true;
}

__device__ __forceinline__ void produce(Storage& storage, const CUtensorMap* map, const PagedAttentionPrefill& p,
                                        const Tile& tile) {
    RingPosition<kStages> at;
    const auto load = [&](int part, int id) {
        ptx::mbarrier_wait(&storage.empty[at.stage], at.parity ^ 1);
        if (ptx::elect_one()) {
            load_box(storage.ring[at.stage], map, &storage.full[at.stage], part, tile.head, p.kv_heads, id);
        }
        at.next();
    };
    PageIds ids(p, tile.sequence, 0, tile.pages);
    int id = ids.id(0);
    load(kKeys, id);
    for (int page = 1; page < tile.pages; ++page) {
        const int next = ids.id(page);
        load(kKeys, next);
        load(kValues, id);
        id = next;
    }
    load(kValues, id);
}

class Consumer {
  public:
    __device__ __forceinline__ Consumer(Storage& storage, const PagedAttentionPrefill& p, const Tile& tile)
        : storage_(storage),
          p_(p),
          tile_(tile),
          group_(ptx::warp_id() / 4),
          heads_(p.q_heads / p.kv_heads),
          log2_scale_(p.scale * kLog2E) {
        const int first_row = tile.first_row + group_ * kGroupRows;
        row_ = first_row + static_cast<int>(threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4);
        masked_from_ = tile.context + min(first_row, tile.rows - 1) / heads_ + 1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            visible_[half] = tile.context + min(row_ + half * 8, tile.rows - 1) / heads_ + 1;
            maximum_[half] = -INFINITY;
            sum_[half] = 0;
        }
    }

    __device__ __forceinline__ void run() {
        load_query();
        float scores[kPage / 2], output[kDim / 2];
        uint32_t weights[kPage / 16][4];
        float rescale[2];
        wait_for_box();
        ptx::wgmma_fence(scores);
        multiply_keys(scores);
        ptx::wgmma_wait<0>(scores);
        release_box();
        softmax(scores, rescale, 0);
        pack_weights(weights, scores);
        for (int page = 1; page < tile_.pages; ++page) {
            wait_for_box();
            const int keys = at_.stage;
            ptx::wgmma_fence(scores, output);
            multiply_keys(scores);
            at_.next();
            wait_for_box();
            ptx::wgmma_fence(output);  // without this second one ptxas inserts it, and serialises (C7520)
            multiply_values(output, weights, page > 1);
            ptx::wgmma_wait<1>(scores);
            release(keys);
            softmax(scores, rescale, page);
            ptx::wgmma_wait<0>(output);
            release_box();
#pragma unroll
            for (int i = 0; i < kDim / 2; ++i) output[i] *= rescale[i / 2 % 2];
            pack_weights(weights, scores);
        }
        wait_for_box();
        silence_missing_values();
        ptx::wgmma_fence(output);
        multiply_values(output, weights, tile_.pages > 1);
        ptx::wgmma_wait<0>(output);
        store(output);
    }

  private:
    // The group's rows; missing ones become zero.
    __device__ __forceinline__ void load_query() {
        constexpr int kChunks = kDim / 8;
#pragma unroll 4
        for (int i = threadIdx.x % 128; i < kGroupRows * kChunks; i += 128) {
            const int row = group_ * kGroupRows + i / kChunks, chunk = i % kChunks;
            const int of_sequence = tile_.first_row + row;
            uint4 values{};
            if (of_sequence < tile_.rows) {
                values =
                    *reinterpret_cast<const uint4*>(p_.q + (tile_.first_token + of_sequence / heads_) * p_.q_stride +
                                                    (tile_.head * heads_ + of_sequence % heads_) * kDim + chunk * 8);
            }
            *reinterpret_cast<uint4*>(storage_.query + chunk / 8 * kQueryGroupBytes +
                                      (row * 8 + (chunk % 8 ^ (row & 7))) * 16) = values;
        }
        ptx::fence_async_shared();
        ptx::named_barrier_sync(kFirstGroupBarrier + group_, 128);
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
        const uint64_t query = ptx::matrix_descriptor(
            ptx::shared_address(storage_.query) + group_ * kGroupRows * kColumnGroup * 2, Swizzle::k128, 16, 1024);
        const uint64_t keys =
            ptx::matrix_descriptor(ptx::shared_address(storage_.ring[at_.stage]), Swizzle::k128, 16, 1024);
#pragma unroll
        for (int k = 0; k < kDim / 16; ++k) {  // addresses in a descriptor count 16 bytes
            ptx::wgmma<__nv_bfloat16, kPage>(scores, query + (k / 4 * kQueryGroupBytes + k % 4 * 32) / 16,
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
            ptx::wgmma<__nv_bfloat16, kDim, true>(output, weights[k], values + k * 16 * kColumnGroup * 2 / 16,
                                                  accumulate || k > 0);
        }
        ptx::wgmma_commit();
    }

    // Scores become weights; rescale says by how much what was summed before shrinks.
    __device__ __forceinline__ void softmax(float (&scores)[kPage / 2], float (&rescale)[2], int page) {
        if ((page + 1) * kPage > masked_from_) {
            const int token = page * kPage + static_cast<int>(threadIdx.x % 4 * 2);
#pragma unroll
            for (int i = 0; i < kPage / 2; ++i) {
                if (token + i / 4 * 8 + i % 2 >= visible_[i / 2 % 2]) scores[i] = -INFINITY;
            }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float maximum = maximum_[half];
#pragma unroll
            for (int i = 0; i < kPage / 4; ++i) maximum = fmaxf(maximum, scores[i / 2 * 4 + half * 2 + i % 2]);
            maximum = warp_maximum<4>(maximum);
            const float base = maximum * log2_scale_;
            rescale[half] = ptx::exp2_approximate(maximum_[half] * log2_scale_ - base);
            maximum_[half] = maximum;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < kPage / 4; ++i) {
                float& score = scores[i / 2 * 4 + half * 2 + i % 2];
                score = ptx::exp2_approximate(score * log2_scale_ - base);
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
            weights[i / 4][i % 4] = pack<__nv_bfloat16>(scores[2 * i], scores[2 * i + 1]);
        }
        ptx::hold_registers(weights);
    }

    // The rows of the last page beyond the sequence may hold NaN, which a weight of zero would not silence.
    __device__ __forceinline__ void silence_missing_values() {
        const int first = tile_.end - (tile_.pages - 1) * kPage;
        if (first >= kPage) return;
        for (int i = threadIdx.x; i < (kPage - first) * (kDim / 8); i += kConsumers) {
            const int row = first + i / (kDim / 8), chunk = i % (kDim / 8);
            *reinterpret_cast<uint4*>(storage_.ring[at_.stage] + chunk / 8 * kGroupBytes + (row * 8 + chunk % 8) * 16) =
                uint4{};
        }
        ptx::fence_async_shared();
        ptx::named_barrier_sync(kConsumerBarrier, kConsumers);
    }

    __device__ __forceinline__ void store(const float (&output)[kDim / 2]) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float inverse = 1 / warp_sum<4>(sum_[half]);
            const int row = row_ + half * 8;
            if (row >= tile_.rows) continue;
            const int64_t token = tile_.first_token + row / heads_;
            const int head = tile_.head * heads_ + row % heads_, column = threadIdx.x % 4 * 2;
#pragma unroll
            for (int n = 0; n < kDim / 8; ++n) {
                store_pair(p_, token, head, n * 8 + column, output[n * 4 + half * 2] * inverse,
                           output[n * 4 + half * 2 + 1] * inverse);
            }
        }
    }

    Storage& storage_;
    const PagedAttentionPrefill& p_;
    const Tile& tile_;
    const int group_;
    const int heads_;  // query heads to a KV head
    const float log2_scale_;
    int row_;                    // the first of the lane's two, in the sequence
    int masked_from_;            // tokens that all rows of the group see
    int visible_[2];             // tokens that a row sees
    float maximum_[2], sum_[2];  // sum_: over the lane's own columns
    RingPosition<kStages> at_;
};

__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ PagedAttentionPrefill p) {
    DYNAMIC_SHARED(raw);
    auto& storage = *reinterpret_cast<Storage*>(raw);
    const uint32_t warp = ptx::warp_id();
    if (threadIdx.x == kConsumers) {
        ptx::prefetch_tensor_map(&map);
        for (int stage = 0; stage < kStages; ++stage) {
            ptx::mbarrier_init(&storage.full[stage], 1);
            ptx::mbarrier_init(&storage.empty[stage], kConsumers / 32);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    Tile tile;
    if (!find_tile(p, tile)) return;
    if (warp >= kConsumers / 32) {
        ptx::register_decrease<24>();
        if (warp == kConsumers / 32) produce(storage, &map, p, tile);
    } else {
        ptx::register_increase<240>();
        Consumer(storage, p, tile).run();
    }
}

}  // namespace

cudaError_t paged_attention_prefill(const PagedAttentionPrefill& p, cudaStream_t stream) {
    CUtensorMap map;
    if (const auto status = encode_boxes(&map, p); status != cudaSuccess) return status;
    const int64_t most_tiles = p.tokens * (p.q_heads / p.kv_heads) / kRows + p.sequences;
    return launch(prefill_kernel,
                  {.grid = dim3(static_cast<unsigned>(most_tiles), static_cast<unsigned>(p.kv_heads)),
                   .block = kThreads,
                   .shared_bytes = sizeof(Storage),
                   .stream = stream,
                   .programmatic = true},
                  map, p);
}

}  // namespace tokenspeed
