// What a team of consumer warps of the decode attention does with a range of a sequence's pages: scores, softmax, the
// product with the values, and the output or its part.
#pragma once
#include <ptx.h>
#include <reduce.h>

#include "paged_attention_decode_line.h"

namespace tokenspeed::attention_decode {

constexpr int kTileRows = 16;
constexpr int kWarps = 4;  // of a team
constexpr int kTeamThreads = kWarps * 32;
constexpr int kWarpColumns = kDim / kWarps;  // of the output
constexpr uint32_t kFirstTeamBarrier = 1;

template <typename Kv, int kTiles>
struct Storage {
    static constexpr int kRows = kTiles * kTileRows;
    static constexpr int kStages = Format<Kv>::kConverted ? 8 : kTiles < 4 ? 6 : 5;
    static constexpr int kTeams = kTiles < 4 ? 1 : 2;
    static constexpr int kConsumers = kTeams * kTeamThreads, kThreads = kConsumers + 32;

    alignas(1024) uint8_t ring[kStages][Format<Kv>::kBoxBytes];
    alignas(1024) uint8_t query[kRows * kDim * 2];     // rows of 512 bytes, swizzled: see fragment_address
    alignas(1024) uint8_t weights[kRows * kPage * 2];  // of a page, rows of 128 bytes, swizzled
    float maximum[kWarps][kRows];
    float sum[kWarps][kRows];
    float scale[kRows];  // of scores, pages in e4m3 only
    uint64_t full[kStages], empty[kStages];
};

// Where the lane's row of the fragment that ldmatrix_x4 loads begins: rows of the 16 x 16 block at `chunk` (of 8
// columns), a row `row_chunks` wide and swizzled by its lowest three bits.
__device__ __forceinline__ uint32_t fragment_address(uint32_t base, int row, int chunk, int row_chunks) {
    return base + static_cast<uint32_t>((row * row_chunks + (chunk ^ (row & 7))) * 16);
}

// A team has its own tiles of the rows; teams share the boxes alone.
template <typename Kv, int kAllTiles>
class Consumer {
    using F = Format<Kv>;
    using Operand = typename F::Operand;
    using Shared = Storage<Kv, kAllTiles>;
    static constexpr int kParts = F::kConverted ? 2 : 1;  // operands of 16 columns that ldmatrix_x4 loads
    static constexpr int kRows = Shared::kRows;           // of all teams
    static constexpr int kTiles = kAllTiles / Shared::kTeams;

  public:
    __device__ __forceinline__ Consumer(Shared& storage, const PagedAttentionDecode& p)
        : storage_(storage),
          p_(p),
          team_(Shared::kTeams == 1 ? 0 : ptx::warp_id() / kWarps),
          warp_(ptx::warp_id() % kWarps),
          lane_(threadIdx.x % 32) {}

    __device__ __forceinline__ void run(const Segment& segment) {
        context_ = p_.context_lens[segment.sequence];
        first_row_ = segment.group % p_.row_groups * kRows;
        load_query(segment);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                maximum_[tile][half] = -INFINITY;
                sum_[tile][half] = 0;
            }
#pragma unroll
            for (int n = 0; n < 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) output_[tile][n][i] = 0;
            }
        }
        barrier();  // the queries are there
        for (int page = segment.first_page; page < segment.last_page; ++page) consume(page * kPage);
        finish(segment);
    }

  private:
    __device__ __forceinline__ void barrier() const {
        ptx::named_barrier_sync(kFirstTeamBarrier + team_, kTeamThreads);
    }

    __device__ __forceinline__ int tile_row(int tile) const { return (team_ * kTiles + tile) * kTileRows; }

    // The rows of the accumulators that a lane holds.
    __device__ __forceinline__ int row_of(int tile, int half) const { return tile_row(tile) + half * 8 + lane_ / 4; }

    // How many tokens of the sequence a row sees.
    __device__ __forceinline__ int visible(int tile, int half) const {
        return context_ + min(place_of_row(p_, first_row_ + row_of(tile, half)).token, p_.tokens - 1) + 1;
    }

    __device__ __forceinline__ int rows_left() const { return p_.tokens * p_.group - first_row_; }

    __device__ __forceinline__ int64_t first_token(const Segment& segment) const {
        return static_cast<int64_t>(segment.sequence) * p_.tokens;
    }

    // Row r of a sequence is token r / group, query head r % group of the KV head; missing rows become zero. For keys
    // in e4m3 the columns of 16 change places: a lane has four neighbours of a key where an mma wants two and, eight
    // further, two.
    __device__ __forceinline__ void load_query(const Segment& segment) {
        constexpr int kChunks = kDim / 8;
        const int head = segment.group / p_.row_groups * p_.group;
#pragma unroll 2
        for (int i = threadIdx.x % kTeamThreads; i < kTiles * kTileRows * kChunks; i += kTeamThreads) {
            const int row = tile_row(0) + i / kChunks, chunk = i % kChunks;
            uint4 values{};
            if (row < rows_left()) {
                const auto [token, query_head] = place_of_row(p_, first_row_ + row);
                values = *reinterpret_cast<const uint4*>(p_.q + (first_token(segment) + token) * p_.q_stride +
                                                         (head + query_head) * kDim + chunk * 8);
            }
            const auto place = [&](int at) { return storage_.query + (row * kChunks + (at ^ (row & 7))) * 16; };
            if constexpr (F::kConverted) {
                float divisor;
                values = row_to_half(values, divisor);  // a warp has one row
                reinterpret_cast<uint2*>(place(chunk & ~1))[chunk % 2] = make_uint2(values.x, values.z);
                reinterpret_cast<uint2*>(place(chunk | 1))[chunk % 2] = make_uint2(values.y, values.w);
                if (chunk == 0) storage_.scale[row] = p_.log2_scale * divisor;
            } else {
                *reinterpret_cast<uint4*>(place(chunk)) = values;
            }
        }
    }

    // To units of log 2.
    __device__ __forceinline__ float score_scale(int row) const {
        if constexpr (F::kConverted) return storage_.scale[row];
        return p_.log2_scale;
    }

    // One page: its first token is `position`.
    __device__ __forceinline__ void consume(int position) {
        float scores[kTiles][2][4];
        wait_for_box();
        multiply_keys(scores);
        release_box();
        if (position < p_.first_key) hide_first(scores);
        float rescale[kTiles][2];
        softmax(scores, rescale, position);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int n = 0; n < 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) output_[tile][n][i] *= rescale[tile][i / 2];
            }
        }
        wait_for_box();
        multiply_values(position);
        release_box();
    }

    __device__ __forceinline__ void wait_for_box() { ptx::mbarrier_wait(&storage_.full[at_.slot], at_.phase); }

    __device__ __forceinline__ void release_box() {
        __syncwarp();
        if (lane_ == 0) ptx::mbarrier_arrive(&storage_.empty[at_.slot]);
        at_.next(Shared::kStages);
    }

    // scores = Q K^T for the warp's 16 tokens.
    __device__ __forceinline__ void multiply_keys(float (&scores)[kTiles][2][4]) {
        constexpr int kSteps = kDim / (16 * kParts), kUnroll = Shared::kTeams > 1 ? 4 : kSteps;  // or two teams spill
        constexpr int kChains = kTiles == 1 ? 2 : 1;  // independent sums, so that one hides the other's latency
        float sums[kChains][kTiles][2][4] = {};
        const uint32_t keys = ptx::shared_address(storage_.ring[at_.slot]);
        const uint32_t query = ptx::shared_address(storage_.query);
        const int token = warp_ * 16 + lane_ % 8 + lane_ / 16 * 8;
#pragma unroll kUnroll
        for (int k = 0; k < kSteps; ++k) {
            uint32_t key[4];
            ptx::ldmatrix_x4(key, fragment_address(keys + k / 4 * kGroupBytes, token, k % 4 * 2 + lane_ / 8 % 2, 8));
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                uint32_t first[2] = {key[0], key[1]}, second[2] = {key[2], key[3]};  // eight tokens each
                if constexpr (F::kConverted) {
                    ptx::unpack_e4m3(key[part], first[0], first[1]);
                    ptx::unpack_e4m3(key[2 + part], second[0], second[1]);
                }
                const int step = k * kParts + part;
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    float (&sum)[2][4] = sums[step % kChains][tile];
                    uint32_t rows[4];
                    ptx::ldmatrix_x4(rows,
                                     fragment_address(query, tile_row(tile) + lane_ % 16, step * 2 + lane_ / 16, 32));
                    ptx::mma_m16n8k16<Operand>(sum[0], rows, first[0], first[1]);
                    ptx::mma_m16n8k16<Operand>(sum[1], rows, second[0], second[1]);
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                scores[tile][i / 4][i % 4] = sums[0][tile][i / 4][i % 4];
                if (kChains > 1) scores[tile][i / 4][i % 4] += sums[kChains - 1][tile][i / 4][i % 4];
            }
        }
    }

    // On the first page alone: nothing before first_key is seen. What is there, NaN included, is overwritten.
    __device__ __forceinline__ void hide_first(float (&scores)[kTiles][2][4]) const {
        const int hidden = p_.first_key - warp_ * 16 - lane_ % 4 * 2;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (n * 8 + i % 2 < hidden) scores[tile][n][i] = -INFINITY;
                }
            }
        }
    }

    // The page's weights into shared memory, and by how much what was summed so far shrinks.
    __device__ __forceinline__ void softmax(float (&scores)[kTiles][2][4], float (&rescale)[kTiles][2], int position) {
        const bool masked = position + kPage > context_ + 1;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // The first column that the row does not see. What is there, NaN included, is overwritten.
                const int invisible = masked ? visible(tile, half) - position - warp_ * 16 - lane_ % 4 * 2 : kPage;
                const float scale = score_scale(row_of(tile, half));
                float maximum = -INFINITY;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& score = scores[tile][i / 2][half * 2 + i % 2];
                    score = i / 2 * 8 + i % 2 < invisible ? score * scale : -INFINITY;
                    maximum = fmaxf(maximum, score);
                }
                maximum = warp_maximum<4>(maximum);
                if (lane_ % 4 == 0) storage_.maximum[warp_][row_of(tile, half)] = maximum;
            }
        }
        barrier();
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = row_of(tile, half);
                float maximum = maximum_[tile][half];
#pragma unroll
                for (int warp = 0; warp < kWarps; ++warp) maximum = fmaxf(maximum, storage_.maximum[warp][row]);
                // A row that has seen no token yet: any finite number gives weights of zero.
                const float base = maximum == -INFINITY ? 0 : maximum;
                rescale[tile][half] = ptx::exp2_approximate(maximum_[tile][half] - base);
                maximum_[tile][half] = maximum;
                const float origin = base - F::kLargestWeightLog2;
                float sum = 0;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const float first = ptx::exp2_approximate(scores[tile][n][half * 2] - origin);
                    const float second = ptx::exp2_approximate(scores[tile][n][half * 2 + 1] - origin);
                    sum += first + second;
                    uint8_t* chunk = storage_.weights + (row * 8 + ((warp_ * 2 + n) ^ (row & 7))) * 16;
                    reinterpret_cast<uint32_t*>(chunk)[lane_ % 4] = pack<Operand>(first, second);
                }
                sum_[tile][half] = sum_[tile][half] * rescale[tile][half] + sum;
            }
        }
        barrier();
    }

    // output += weights V for the warp's 64 columns.
    __device__ __forceinline__ void multiply_values(int position) {
        constexpr int kWarpChunks = kWarpColumns * sizeof(Kv) / 16;
        const int first_chunk = warp_ * kWarpChunks % 8;
        const uint32_t values = ptx::shared_address(storage_.ring[at_.slot]) + warp_ * kWarpChunks / 8 * kGroupBytes;
        const uint32_t weights = ptx::shared_address(storage_.weights);
        // Rows outside the sequence may hold NaN, and a weight of zero would not silence it.
        uint32_t low[kPage / 16], high[kPage / 16];
        const int lane_token = position + lane_ % 4 * 2;
#pragma unroll
        for (int k = 0; k < kPage / 16; ++k) {
            low[k] = existing(lane_token + k * 16);
            high[k] = existing(lane_token + k * 16 + 8);
        }
        if (position < p_.first_key) {
#pragma unroll
            for (int k = 0; k < kPage / 16; ++k) {
                low[k] &= seen(lane_token + k * 16);
                high[k] &= seen(lane_token + k * 16 + 8);
            }
        }
#pragma unroll
        for (int k = 0; k < kPage / 16; ++k) {
            uint32_t rows[kTiles][4];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                ptx::ldmatrix_x4(rows[tile],
                                 fragment_address(weights, tile_row(tile) + lane_ % 16, k * 2 + lane_ / 16, 8));
            }
#pragma unroll
            for (int pair = 0; pair < kWarpChunks / 2; ++pair) {
                uint32_t value[4];
                ptx::ldmatrix_x4_transposed(
                    value, fragment_address(values, k * 16 + lane_ % 16, first_chunk + pair * 2 + lane_ / 16, 8));
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    uint32_t first[2] = {value[0], value[1]}, second[2] = {value[2], value[3]};  // eight columns each
                    if constexpr (F::kConverted) {
                        unpack_columns(value[2 * part], first[0], second[0]);
                        unpack_columns(value[2 * part + 1], first[1], second[1]);
                    }
                    const int columns = (pair * kParts + part) * 2;
#pragma unroll
                    for (int tile = 0; tile < kTiles; ++tile) {
                        ptx::mma_m16n8k16<Operand>(output_[tile][columns], rows[tile], first[0] & low[k],
                                                   first[1] & high[k]);
                        ptx::mma_m16n8k16<Operand>(output_[tile][columns + 1], rows[tile], second[0] & low[k],
                                                   second[1] & high[k]);
                    }
                }
            }
        }
    }

    // What ldmatrix_x4_transposed gives of e4m3, two columns of two tokens: each column as a register of two fp16.
    __device__ __forceinline__ static void unpack_columns(uint32_t columns, uint32_t& even, uint32_t& odd) {
        ptx::unpack_e4m3(__byte_perm(columns, 0, 0x3120), even, odd);
    }

    // The lane's pair of neighbouring output columns `pair`, of eight, and where they stand. Of values in e4m3, even
    // and odd columns of 16 lie in accumulators of their own.
    __device__ __forceinline__ float2 output_pair(int tile, int half, int pair) const {
        const auto& of_tile = output_[tile];
        if constexpr (F::kConverted) {
            const int element = half * 2 + pair % 2;
            return make_float2(of_tile[pair / 2 * 2][element], of_tile[pair / 2 * 2 + 1][element]);
        }
        return make_float2(of_tile[pair][half * 2], of_tile[pair][half * 2 + 1]);
    }
    __device__ __forceinline__ static int pair_column(int pair) {
        return F::kConverted ? pair / 2 * 16 + pair % 2 * 2 : pair * 8;
    }

    // Which halves of a register with the values of `token` and the next belong to tokens of the sequence.
    __device__ __forceinline__ uint32_t existing(int token) const {
        const int end = context_ + p_.tokens;
        return token + 1 < end ? 0xffffffffu : token < end ? 0x0000ffffu : 0u;
    }

    // The same for tokens from first_key on.
    __device__ __forceinline__ uint32_t seen(int token) const {
        return token >= p_.first_key ? 0xffffffffu : token + 1 >= p_.first_key ? 0xffff0000u : 0u;
    }

    // Gates and stores a whole sequence, or leaves its part in the workspace.
    __device__ __forceinline__ void finish(const Segment& segment) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = warp_sum<4>(sum_[tile][half]);
                if (lane_ % 4 == 0) storage_.sum[warp_][row_of(tile, half)] = sum;
            }
        }
        barrier();
        const bool entered_here = segments_++ == 0;
        const int64_t slot = 2 * static_cast<int64_t>(blockIdx.x) + (entered_here ? 0 : 1);
        const int head = segment.group / p_.row_groups * p_.group;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = row_of(tile, half);
                if (row >= rows_left()) continue;
                float sum = 0;
#pragma unroll
                for (int warp = 0; warp < kWarps; ++warp) sum += storage_.sum[warp][row];
                const int column = warp_ * kWarpColumns + lane_ % 4 * 2 * kParts;
                if (segment.whole) {
                    const auto [token, query_head] = place_of_row(p_, first_row_ + row);
                    const float inverse = 1 / sum;
                    // Ahead of all stores, or each load would wait behind the store before it.
                    Vector<__nv_bfloat16, 2> gates[8];
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        gates[n] = load_pair_of_gates(p_, first_token(segment) + token, head + query_head,
                                                      column + pair_column(n));
                    }
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        const float2 pair = output_pair(tile, half, n);
                        store_pair(out_of(p_, first_token(segment) + token, head + query_head, column + pair_column(n)),
                                   pair.x * inverse, pair.y * inverse, gates[n]);
                    }
                } else {
                    float* part = p_.parts + (slot * kRows + row) * kDim + column;
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        *reinterpret_cast<float2*>(part + pair_column(n)) = output_pair(tile, half, n);
                    }
                    if (warp_ == 0 && lane_ % 4 == 0) {
                        p_.part_sums[slot * kRows + row] = make_float2(maximum_[tile][half], sum);
                    }
                }
            }
        }
    }

    Shared& storage_;
    const PagedAttentionDecode& p_;
    const int team_, warp_, lane_;
    int context_ = 0;
    int first_row_ = 0;
    int segments_ = 0;
    Cursor at_;
    float maximum_[kTiles][2], sum_[kTiles][2];  // sum_: over the lane's own tokens
    float output_[kTiles][8][4];
};

}  // namespace tokenspeed::attention_decode
