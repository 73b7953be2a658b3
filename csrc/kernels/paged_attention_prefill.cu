// Causal attention of a packed batch of prefills over paged KV, with the output gate. Contract:
// tokenspeed/ops/attention.py.
//
// Algorithm. Online softmax over pages of 64 tokens (Milakov and Gimelshein 2018; tiled for the matrix unit by Dao et
// al. 2022): S = Q K^T, m' = max(m, S), P = 2^{S - m'}, O = 2^{m - m'} O + P V, scores in units of log 2. The rows of a
// tile are (token, query head of one KV head) pairs, token first: 128 rows are 8 to 32 tokens, so a short chunk fills
// tiles, and every head that reads a page reads it from the same copy.
//
// Tiles. Their list follows from cu_seqlens on the device. A block a multiprocessor takes one tile in each round, the
// longest first and forwards and backwards by turns, and runs through them without a pause: the producer is ahead in
// the next tile while one consumer group stores the last and the other still computes.
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
// masked; the first page is always visible, so a maximum is finite from then on.
//
// Shared memory: a warpgroup reads 16 x 4 KB for S and 4 x 8 KB for P V a page = 768 of its 1,024 matrix cycles at 128
// bytes a cycle; with the copies in, shared memory is as busy as the matrix unit.
//
// Measured on an H100 (product 775 TFLOP/s in that run), 16:2 heads: 592 TFLOP/s at 1 x 8192, 617 at 1 x 16384, 636 for
// 4096 tokens after 8192, 654 for 2048 after 30720; 589 with 32:2 and 24:4 heads, 608 with 8:2: .92 to 1.11 of cuDNN's
// dense attention on contiguous keys at 8192 tokens, 2.1 to 2.4 times flash. 16 x 1024 tokens: 281 TFLOP/s.
//
// budget: prefill_kernel registers<=168 hot sass=HGMMA
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
constexpr int kConsumers = kConsumerGroups * 128;
constexpr int kThreads = kConsumers + 128;
constexpr int kStages = 5;
constexpr int kQueryBytes = kGroupRows * kDim * 2;  // of a consumer warpgroup: laid out as a box
constexpr uint32_t kFirstGroupBarrier = 1, kConsumerBarrier = 3;

struct Storage {
    alignas(1024) uint8_t query[kConsumerGroups][kQueryBytes];
    alignas(1024) uint8_t ring[kStages][kBoxBytes];
    uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(Storage) <= 227 * 1024);
static_assert(kQueryBytes == kBoxBytes);

// 128 rows of one sequence and KV head.
struct Tile {
    int sequence, head;
    int first_row, rows;  // rows: of the whole sequence, (query heads to a KV head) x tokens
    int first_token;      // of the sequence, in q
    int context;          // tokens before this call
    int pages;            // that the tile sees
};

// Calls visit(tile) for the tiles of this block: the list is dealt out forwards and backwards by turns, so that nobody
// always gets the longer ones. By whole warps.
template <typename Visit>
__device__ __forceinline__ void each_tile(const PagedAttentionPrefill& p, Visit visit) {
    const auto tiles_of = [&](int sequence) {
        return ((p.cu_seqlens[sequence + 1] - p.cu_seqlens[sequence]) * p.group + kRows - 1) / kRows;
    };
    const int tiles = count_all(p.sequences, tiles_of), blocks = gridDim.x, block = blockIdx.x;
    int step = 2 * (blocks - block) - 1;
    for (int item = block; item < tiles * p.kv_heads; item += step, step = 2 * blocks - step) {
        const auto [sequence, index] = locate(p.sequences, tiles - 1 - item / p.kv_heads, tiles_of);
        Tile tile;
        tile.sequence = sequence;
        tile.head = item % p.kv_heads;
        tile.first_token = p.cu_seqlens[sequence];
        tile.first_row = index * kRows;
        const int tokens = p.cu_seqlens[sequence + 1] - tile.first_token;
        tile.rows = tokens * p.group;
        tile.context = p.context_lens[sequence];
        const int last_token = place_of_row(p, min(tile.first_row + kRows, tile.rows) - 1).token;
        tile.pages = (tile.context + last_token) / kPage + 1;
        visit(tile);
    }
}

class Producer {
  public:
    __device__ __forceinline__ Producer(Storage& storage, const CUtensorMap* map, const PagedAttentionPrefill& p)
        : storage_(storage), map_(map), p_(p) {}

    __device__ __forceinline__ void run(const Tile& tile) {
        PageIds ids(p_, tile.sequence, 0, tile.pages);
        int id = ids.id(0);
        load(kKeys, tile.head, id);
        for (int page = 1; page < tile.pages; ++page) {
            const int next = ids.id(page);
            load(kKeys, tile.head, next);
            load(kValues, tile.head, id);
            id = next;
        }
        load(kValues, tile.head, id);
    }

  private:
    __device__ __forceinline__ void load(int part, int head, int id) {
        ptx::mbarrier_wait(&storage_.empty[at_.stage], at_.parity ^ 1);
        if (ptx::elect_one()) {
            load_box(storage_.ring[at_.stage], map_, &storage_.full[at_.stage], part, head, p_.kv_heads, id);
        }
        at_.next();
    }

    Storage& storage_;
    const CUtensorMap* map_;
    const PagedAttentionPrefill& p_;
    RingPosition<kStages> at_;
};

class Consumer {
  public:
    __device__ __forceinline__ Consumer(Storage& storage, const PagedAttentionPrefill& p)
        : storage_(storage), p_(p), group_(ptx::warp_id() / 4), warp_(ptx::warp_id() % 4), lane_(threadIdx.x % 32) {}

    __device__ __forceinline__ void run(const Tile& tile) {
        tile_ = tile;
        first_row_ = tile.first_row + group_ * kGroupRows;
        masked_from_ = tile.context + place_of_row(p_, min(first_row_, tile.rows - 1)).token + 1;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            maximum_[half] = -INFINITY;
            sum_[half] = 0;
        }
        load_query();
        prefetch_gates();
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
        multiply_values(output, weights, tile_.pages > 1);
        ptx::wgmma_wait<0>(output);
        release_box();
        store(output);
    }

  private:
    __device__ __forceinline__ void barrier() const { ptx::named_barrier_sync(kFirstGroupBarrier + group_, 128); }

    // The group's rows; missing ones become zero. All loads are under way at once.
    __device__ __forceinline__ void load_query() {
        constexpr int kChunks = kDim / 8;
#pragma unroll
        for (int i = 0; i < kGroupRows * kChunks / 128; ++i) {
            const int at = i * 128 + static_cast<int>(threadIdx.x % 128), row = at / kChunks, chunk = at % kChunks;
            const int of_sequence = first_row_ + row;
            uint4 values{};
            if (of_sequence < tile_.rows) {
                const auto [token, head] = place_of_row(p_, of_sequence);
                values = ptx::load_16_no_allocate(p_.q + (tile_.first_token + token) * p_.q_stride +
                                                  (tile_.head * p_.group + head) * kDim + chunk * 8);
            }
            *reinterpret_cast<uint4*>(storage_.query[group_] + chunk / 8 * kGroupBytes +
                                      (row * 8 + (chunk % 8 ^ (row & 7))) * 16) = values;
        }
        ptx::fence_async_shared();
        barrier();
    }

    // Into L2: the end of the tile waits for them.
    __device__ __forceinline__ void prefetch_gates() const {
        constexpr int kLines = kDim * 2 / 128;
        if (!p_.gate_vectors) return;
#pragma unroll
        for (int i = 0; i < kGroupRows * kLines / 128; ++i) {
            const int at = i * 128 + static_cast<int>(threadIdx.x % 128);
            const auto [token, head] = place_of_row(p_, min(first_row_ + at / kLines, tile_.rows - 1));
            ptx::prefetch_l2(gate_of(p_, tile_.first_token + token, tile_.head * p_.group + head, at % kLines * 64));
        }
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
            ptx::wgmma<__nv_bfloat16, kPage>(scores, query + (k / 4 * kGroupBytes + k % 4 * 32) / 16,
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
            const float base = maximum * p_.log2_scale;
            rescale[half] = ptx::exp2_approximate(maximum_[half] * p_.log2_scale - base);
            maximum_[half] = maximum;
            float sum = 0;
#pragma unroll
            for (int i = 0; i < kPage / 4; ++i) {
                float& score = scores[i / 2 * 4 + half * 2 + i % 2];
                score = ptx::exp2_approximate(score * p_.log2_scale - base);
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
        const int end = tile_.context + place_of_row(p_, tile_.rows).token;
        const int first = end - (tile_.pages - 1) * kPage;
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

    // Through shared memory, where the queries lay, half the columns at a time: a warp then stores 256 bytes of a row.
    __device__ __forceinline__ void store(const float (&output)[kDim / 2]) {
        constexpr int kHalf = kDim / 2, kUnroll = 4;
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
            const int first = first_row_ + warp_ * 16, column = columns * kHalf + lane * 4;
#pragma unroll 1
            for (int row = 0; row < min(16, tile_.rows - first); row += kUnroll) {
                Vector<__nv_bfloat16, 4> gates[kUnroll];
#pragma unroll
                for (int i = 0; i < kUnroll; ++i) {  // a row that does not exist reads the last one's
                    const auto [token, head] = place_of_row(p_, min(first + row + i, tile_.rows - 1));
                    gates[i] = load_gates(p_, tile_.first_token + token, tile_.head * p_.group + head, column);
                }
#pragma unroll
                for (int i = 0; i < kUnroll; ++i) {
                    if (first + row + i >= tile_.rows) break;
                    const auto [token, head] = place_of_row(p_, first + row + i);
                    store_quad(p_, tile_.first_token + token, tile_.head * p_.group + head, column,
                               *reinterpret_cast<const float4*>(place(row + i, lane)), gates[i]);
                }
            }
            __syncwarp();
        }
        barrier();  // the next queries may come
    }

    Storage& storage_;
    const PagedAttentionPrefill& p_;
    const int group_, warp_, lane_;
    Tile tile_;
    int first_row_;              // of the group, in the sequence
    int masked_from_;            // tokens that all rows of the group see
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
    if (warp >= kConsumers / 32) {
        ptx::register_decrease<40>();
        if (warp > kConsumers / 32) return;
        Producer producer(storage, &map, p);
        each_tile(p, [&](const Tile& tile) { producer.run(tile); });
    } else {
        ptx::register_increase<232>();
        Consumer consumer(storage, p);
        each_tile(p, [&](const Tile& tile) { consumer.run(tile); });
    }
}

}  // namespace

bool paged_attention_prefill_is_short(const PagedAttention& p, int64_t tokens) {
    // Predicted: a page takes 128 rows here 1.3 us, 64 rows there 1.7 us, and there all multiprocessors share it. So at
    // a quarter of the card, 66 groups of 64 rows against 33 tiles, splitting takes 0.85 us a page against 1.3.
    const int64_t tiles = (tokens * (p.q_heads / p.kv_heads) + kRows - 1) / kRows * p.kv_heads;
    return tiles <= multiprocessor_count() / 4;
}

cudaError_t paged_attention_prefill(PagedAttentionPrefill p, cudaStream_t stream) {
    complete(p);
    CUtensorMap map;
    if (const auto status = encode_boxes(&map, p); status != cudaSuccess) return status;
    const int64_t most_tiles = p.tokens * (p.q_heads / p.kv_heads) / kRows + p.sequences;
    const int64_t blocks = std::min<int64_t>(multiprocessor_count(), most_tiles * p.kv_heads);
    return launch(prefill_kernel,
                  {.grid = static_cast<unsigned>(blocks),
                   .block = kThreads,
                   .shared_bytes = sizeof(Storage),
                   .stream = stream,
                   .programmatic = true},
                  map, p);
}

}  // namespace tokenspeed
