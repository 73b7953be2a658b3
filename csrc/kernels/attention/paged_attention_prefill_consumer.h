// What a consumer warpgroup of the prefill attention does with its 64 rows of a tile: scores, softmax, the product with
// the values, and the output.
#pragma once
#include <ptx.h>
#include <ptx_wgmma.h>
#include <reduce.h>

#include <algorithm>

#include "paged_attention_prefill_boxes.h"

namespace tokenspeed::attention_prefill {

constexpr int kWarpRows = 16;       // of a warp
constexpr int kStagedColumns = 64;  // of the output, at a time: a line of two rows, four columns a lane
constexpr int kRowTurns = kWarpRows / 2;
constexpr uint32_t kFirstGroupBarrier = 1, kConsumerBarrier = 3, kFirstTurnBarrier = 4;

template <typename Kv>
class Consumer {
    using F = Format<Kv>;
    using Operand = typename F::Operand;
    using Shared = Storage<Kv>;

  public:
    __device__ __forceinline__ Consumer(Shared& storage, const PagedAttentionPrefill& p)
        : storage_(storage), p_(p), group_(ptx::warp_id() / 4), warp_(ptx::warp_id() % 4), lane_(threadIdx.x % 32) {}

    // Before all tiles.
    __device__ __forceinline__ void give_first_turn() const {
        if (group_ == 1) give_turn();
    }

    // Waits for the next tile's queries; false after the last tile.
    __device__ __forceinline__ bool next_tile() {
        ptx::mbarrier_wait(&storage_.query_full, phase_);
        return tile().rows > 0;
    }

    // Of pages in e4m3.
    __device__ __forceinline__ void run(const Tile& tile) {
        own_tile_ = tile;
        run();
    }

    __device__ __forceinline__ void run() {
        first_row_ = tile().first_row + group_ * kGroupRows;
        if (first_row_ >= tile().rows) return hand_on();
        masked_from_ = (tile().context + place_of_row(p_, first_row_).token + 1) / kPage;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            maximum_[half] = -INFINITY;
            sum_[half] = 0;
        }
        if constexpr (F::kConverted) load_query();
        Held held;
        hold_queries(held);
        float scores[kPage / 2], output[kDim / 2];
        uint32_t weights[kPage / 16][4];
        float rescale[2];
        wait_for_box();
        ptx::wgmma_fence(scores);
        multiply_keys(scores, held);
        ptx::wgmma_wait<0>(scores);
        release_keys(at_.slot, tile().first_page);
        at_.next(Shared::kStages);
        softmax(scores, rescale, tile().first_page);
        pack_weights(weights, scores);
        for (int page = tile().first_page + 1; page < tile().last_page; ++page) {
            wait_for_box();
            const int keys = at_.slot;
            take_turn();
            ptx::wgmma_fence(scores, output);
            multiply_keys(scores, held);
            at_.next(Shared::kStages);
            wait_for_box();
            ptx::wgmma_fence(output);  // without this second one ptxas inserts it, and serialises (C7520)
            multiply_values(output, weights, page > tile().first_page + 1);
            give_turn();
            ptx::wgmma_wait<1>(scores);
            release_keys(keys, page);
            softmax(scores, rescale, page);
            // From some page on the maxima hardly change. The wait stands in both branches: ahead of them, ptxas would
            // move it further, ahead of the softmax that is to run beside the product.
            if (__any_sync(kAllLanes, rescale[0] != 1 || rescale[1] != 1)) {
                ptx::wgmma_wait<0>(output);
                release_box();
#pragma unroll
                for (int i = 0; i < kDim / 2; ++i) output[i] *= rescale[i / 2 % 2];
            } else {
                ptx::wgmma_wait<0>(output);
                release_box();
            }
            pack_weights(weights, scores);
        }
        wait_for_box();
        silence_missing_values();
        ptx::wgmma_fence(output);
        multiply_values(output, weights, tile().last_page > tile().first_page + 1);
        // Opaque, or the addresses that follow from it are computed ahead of all tiles and spilled through the products.
        const int lane = __shfl_sync(kAllLanes, lane_, lane_);
        Rows rows;
        uint2 gates[kRowTurns];
        if (tile().part < 0) {
            rows = rows_of(lane);
            if (kGatesAhead && p_.gate_vectors) load_gates(gates, rows, lane, 0);
        }
        ptx::wgmma_wait<0>(output);
        release_box();
        if (tile().part < 0) {
            store(output, rows, gates, lane);
        } else {
            leave_part(output);
        }
        if constexpr (!F::kConverted) {
            ptx::fence_async_shared();
            __syncwarp();
            release(last_keys_);
        }
        phase_ ^= 1;
    }

  private:
    // Of the queries, 16 columns each, that stay in registers: wgmma then reads less shared memory for the scores.
    static constexpr int kHeldSteps = F::kConverted ? 0 : 4;
    using Held = uint32_t[std::max(kHeldSteps, 1)][4];
    // How far weights may exceed 1, in units of log 2, before what was summed is scaled down (as in FlashAttention-4):
    // in a sequence's first pages the maximum of some row grows with each page, a little. fp16 lacks the room.
    static constexpr float kSlackLog2 = F::kConverted ? 0 : 8;
    static constexpr bool kGatesAhead = !F::kConverted;  // of columns, by those stored before: else registers spill

    // What a lane loads and stores of the staged columns, in its first turn. `lane` may be opaque.
    __device__ __forceinline__ static int staged_row(uint32_t lane) { return lane / (kStagedColumns / 4); }
    __device__ __forceinline__ static int staged_column(uint32_t lane) { return lane % (kStagedColumns / 4) * 4; }

    __device__ __forceinline__ const Tile& tile() const {
        if constexpr (F::kConverted) {
            return own_tile_;
        } else {
            return storage_.tile[phase_];
        }
    }

    // None of the group's rows exists: the boxes are the other group's.
    __device__ __forceinline__ void hand_on() {
        __syncwarp();  // all lanes know that the group has no rows
        finish_keys();
#pragma unroll 1
        for (int left = 2 * (tile().last_page - tile().first_page); left > 0; --left) {
            wait_for_box();
            if (left % 2 == 0 && left > 2) {  // a turn for each page behind the first
                take_turn();
                give_turn();
            }
            if (left == 1) silence_missing_values();
            release_box();
        }
        phase_ ^= 1;
    }

    // The groups start the products of a page by turns: one multiplies while the other is at its softmax.
    __device__ __forceinline__ void take_turn() const {
        if constexpr (!F::kConverted) ptx::named_barrier_sync(kFirstTurnBarrier + group_, kConsumers);
    }
    __device__ __forceinline__ void give_turn() const {
        if constexpr (!F::kConverted) ptx::named_barrier_arrive(kFirstTurnBarrier + (group_ ^ 1), kConsumers);
    }
    __device__ __forceinline__ void barrier() const { ptx::named_barrier_sync(kFirstGroupBarrier + group_, 128); }

    // Where pages are in e4m3: the group's rows, in fp16; missing ones become zero. Four loads are under way at a time,
    // lest registers spill.
    __device__ __forceinline__ void load_query() {
        constexpr int kChunks = kDim / 8, kSteps = kGroupRows * kChunks / 128;
#pragma unroll 4
        for (int i = 0; i < kSteps; ++i) {
            const int at = i * 128 + static_cast<int>(threadIdx.x % 128), row = at / kChunks, chunk = at % kChunks;
            const int of_sequence = first_row_ + row;
            uint4 values{};
            if (of_sequence < tile().rows) {
                const auto [token, head] = place_of_row(p_, of_sequence);
                values = ptx::load_16_no_allocate(p_.q + (tile().first_token + token) * p_.q_stride +
                                                  (tile().head * p_.group + head) * kDim + chunk * 8);
            }
            float divisor;
            values = row_to_half(values, divisor);  // a warp has one row
            if (chunk == 0) storage_.scale[group_ * kGroupRows + row] = p_.log2_scale * divisor;
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

    __device__ __forceinline__ void wait_for_box() { ptx::mbarrier_wait(&storage_.full[at_.slot], at_.phase); }

    __device__ __forceinline__ void release(int stage) {
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&storage_.empty[stage]);
    }

    __device__ __forceinline__ void release_box() {
        release(at_.slot);
        at_.next(Shared::kStages);
    }

    // After the last keys the next queries may come, and the output goes through their box, which stays.
    __device__ __forceinline__ void release_keys(int stage, int page) {
        if (F::kConverted || page + 1 < tile().last_page) return release(stage);
        last_keys_ = stage;
        finish_keys();
    }

    __device__ __forceinline__ void finish_keys() const {
        if constexpr (!F::kConverted) {
            if (threadIdx.x % 32 == 0) {
                ptx::mbarrier_arrive(&storage_.keys_read);  // first: the next tile's must not count for this one
                ptx::mbarrier_arrive(&storage_.query_empty);
            }
        }
    }

    __device__ __forceinline__ void hold_queries(Held& held) const {
        const int lane = __shfl_sync(kAllLanes, lane_, lane_);  // opaque, as in run
        const int row = warp_ * kWarpRows + lane % 16;
#pragma unroll
        for (int k = 0; k < kHeldSteps; ++k) {
            ptx::ldmatrix_x4(held[k], ptx::shared_address(storage_.query[group_] + k / 4 * kGroupBytes +
                                                          (row * 8 + ((k % 4 * 2 + lane / 16) ^ (row & 7))) * 16));
        }
        if constexpr (kHeldSteps > 0) ptx::hold_registers(held);
    }

    // scores = Q K^T, started and committed.
    __device__ __forceinline__ void multiply_keys(float (&scores)[kPage / 2], const Held& held) {
        const uint64_t query =
            ptx::matrix_descriptor(ptx::shared_address(storage_.query[group_]), Swizzle::k128, 16, 1024);
        const uint64_t keys =
            ptx::matrix_descriptor(ptx::shared_address(storage_.ring[at_.slot]), Swizzle::k128, 16, 1024);
#pragma unroll
        for (int k = 0; k < kHeldSteps; ++k) {
            ptx::wgmma<Operand, kPage>(scores, held[k], keys + (k / 4 * kGroupBytes + k % 4 * 32) / 16, k > 0);
        }
#pragma unroll
        for (int k = kHeldSteps; k < kDim / 16; ++k) {  // addresses in a descriptor count 16 bytes
            ptx::wgmma<Operand, kPage>(scores, query + (k / 4 * kGroupBytes + k % 4 * 32) / 16,
                                       keys + (k / 4 * kGroupBytes + k % 4 * 32) / 16, k > 0);
        }
        ptx::wgmma_commit();
    }

    // output (+)= weights V, started and committed.
    __device__ __forceinline__ void multiply_values(float (&output)[kDim / 2], const uint32_t (&weights)[kPage / 16][4],
                                                    bool accumulate) {
        const uint64_t values =
            ptx::matrix_descriptor(ptx::shared_address(storage_.ring[at_.slot]), Swizzle::k128, kGroupBytes, 1024);
#pragma unroll
        for (int k = 0; k < kPage / 16; ++k) {
            ptx::wgmma<Operand, kDim, true>(output, weights[k], values + k * 16 * kGroupRowBytes / 16,
                                            accumulate || k > 0);
        }
        ptx::wgmma_commit();
    }

    // Scores become weights; rescale says by how much what was summed before shrinks.
    __device__ __forceinline__ void softmax(float (&scores)[kPage / 2], float (&rescale)[2], int page) {
        if (page >= masked_from_) {
            int invisible[2];  // the first column that a row does not see
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = min(first_row_ + warp_ * 16 + lane_ / 4 + half * 8, tile().rows - 1);
                invisible[half] = tile().context + place_of_row(p_, row).token + 1 - page * kPage;
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
            const float scale = score_scale(half);
            if (kSlackLog2 > 0 && (maximum - maximum_[half]) * scale <= kSlackLog2) maximum = maximum_[half];
            // A row that sees nothing of the range so far: any finite number gives weights of zero.
            const float base = maximum == -INFINITY ? 0 : maximum * scale;
            // Exactly 1 where the maximum stays: the difference may be fused, and is then what `base` was rounded by.
            rescale[half] = maximum == maximum_[half] ? 1.0f : ptx::exp2_approximate(maximum_[half] * scale - base);
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
        const int end = tile().context + place_of_row(p_, tile().rows).token;
        const int first = end - (tile().last_page - 1) * kPage;
        if (first >= kPage) return;
#pragma unroll 1
        for (int i = threadIdx.x; i < (kPage - first) * (kDim / 8); i += kConsumers) {
            const int row = first + i / (kDim / 8), chunk = i % (kDim / 8);
            *reinterpret_cast<uint4*>(storage_.ring[at_.slot] + chunk / 8 * kGroupBytes + (row * 8 + chunk % 8) * 16) =
                uint4{};
        }
        ptx::fence_async_shared();
        ptx::named_barrier_sync(kConsumerBarrier, kConsumers);
    }

    // Where the warp's rows begin: a lane has the offset of one of them, from the first of their tokens, for all.
    struct Rows {
        const __nv_bfloat16* gate;  // of the lane's first column
        __nv_bfloat16* out;
        int gate_offset, out_offset;
        int left;  // rows from the first one on that the lane stores

        __device__ __forceinline__ const __nv_bfloat16* gate_of_row(int row) const {
            return gate + __shfl_sync(kAllLanes, gate_offset, row);
        }
        __device__ __forceinline__ __nv_bfloat16* out_of_row(int row) const {
            return out + __shfl_sync(kAllLanes, out_offset, row);
        }
    };

    __device__ __forceinline__ Rows rows_of(int lane) const {
        const int first = first_row_ + warp_ * kWarpRows, last = tile().rows - 1;
        const int first_token = place_of_row(p_, min(first, last)).token;
        const auto [token, head] = place_of_row(p_, min(first + lane % kWarpRows, last));
        const int64_t base_token = tile().first_token + first_token;
        return {gate_of(p_, base_token, tile().head * p_.group, 0) + staged_column(lane),
                out_of(p_, base_token, tile().head * p_.group, staged_column(lane)),
                (token - first_token) * static_cast<int>(p_.gate_token_stride) +
                    head * static_cast<int>(p_.gate_head_stride),
                ((token - first_token) * p_.q_heads + head) * kDim, last + 1 - first - staged_row(lane)};
    }

    // Four columns a lane and row, as bits, or each would take a register. Only where they may be read so.
    __device__ __forceinline__ static void load_gates(uint2 (&gates)[kRowTurns], const Rows& rows, int lane,
                                                      int column) {
#pragma unroll
        for (int turn = 0; turn < kRowTurns; ++turn) {
            gates[turn] = *reinterpret_cast<const uint2*>(rows.gate_of_row(staged_row(lane) + turn * 2) + column);
        }
    }

    // Through shared memory, where the last keys lay or, for pages in e4m3, the queries, so many columns at a time: a
    // warp then stores whole lines of a row.
    // gates: of the first columns, if p.gate_vectors; those of the next are under way while some are stored.
    __device__ __forceinline__ void store(const float (&output)[kDim / 2], const Rows& rows, uint2 (&gates)[kRowTurns],
                                          int lane) {
        constexpr int kSteps = kDim / kStagedColumns;
        constexpr int kChunks = kStagedColumns / 4;  // of a row, of 16 bytes
        uint8_t* staging = staging_of_group() + warp_ * (kWarpRows * kStagedColumns * 4);
        // A row's 16-byte chunks are permuted so that neither the writes nor the reads collide in a bank.
        const auto place = [&](int row, int chunk) { return staging + (row * kChunks + (chunk ^ (row & 3) * 2)) * 16; };
        const uint8_t* const staged_first[2] = {
            place(staged_row(lane), staged_column(lane) / 4),
            place(staged_row(lane) + 2, staged_column(lane) / 4) - 2 * kChunks * 16};
        float inverse[2];
#pragma unroll
        for (int half = 0; half < 2; ++half) inverse[half] = 1 / warp_sum<4>(sum_[half]);
        wait_for_staging();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
            const int column = step * kStagedColumns;
#pragma unroll
            for (int n = 0; n < kStagedColumns / 8; ++n) {
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float* pair = output + (step * (kStagedColumns / 8) + n) * 4 + half * 2;
                    uint8_t* chunk = place(lane / 4 + half * 8, n * 2 + lane % 4 / 2);
                    reinterpret_cast<float2*>(chunk)[lane % 2] =
                        make_float2(pair[0] * inverse[half], pair[1] * inverse[half]);
                }
            }
            __syncwarp();
            if (p_.gate_vectors) {
                uint2 next[kRowTurns];
                if (!kGatesAhead) load_gates(gates, rows, lane, column);
                if (kGatesAhead && step + 1 < kSteps) load_gates(next, rows, lane, column + kStagedColumns);
#pragma unroll
                for (int turn = 0; turn < kRowTurns; ++turn) {
                    __nv_bfloat16* out = rows.out_of_row(staged_row(lane) + turn * 2) + column;
                    // Not within the branch: the rows then hide each other's latencies.
                    const auto* staged =
                        reinterpret_cast<const float4*>(staged_first[turn % 2] + turn * 2 * kChunks * 16);
                    const uint2 values = gated(*staged, unpack_gates(gates[turn]));
                    if (turn * 2 < rows.left) *reinterpret_cast<uint2*>(out) = values;
                    if (kGatesAhead) gates[turn] = next[turn];
                }
            } else {
#pragma unroll 1
                for (int turn = 0; turn < kRowTurns && turn * 2 < rows.left; ++turn) {
                    const int row = staged_row(lane) + turn * 2, own = staged_column(lane);
                    const auto [token, head] = place_of_row(p_, first_row_ + warp_ * kWarpRows + row);
                    const int query_head = tile().head * p_.group + head;
                    store_quad(p_, tile().first_token + token, query_head, column + own,
                               *reinterpret_cast<const float4*>(place(row, own / 4)),
                               attention::load_gates(p_, tile().first_token + token, query_head, column + own));
                }
            }
            __syncwarp();
        }
        if constexpr (F::kConverted) barrier();  // the next queries may come
    }

    __device__ __forceinline__ uint8_t* staging_of_group() const {
        if constexpr (F::kConverted) return storage_.query[group_];
        return storage_.ring[last_keys_] + group_ * (kQueryBytes / 2);
    }

    __device__ __forceinline__ void wait_for_staging() const {
        if constexpr (F::kConverted) {
            barrier();  // nobody in the group reads queries any more
        } else {
            ptx::mbarrier_wait(&storage_.keys_read, phase_);
        }
    }

    // What a range of the pages adds, as it is, for the merge.
    __device__ __forceinline__ void leave_part(const float (&output)[kDim / 2]) const {
        const int lane = __shfl_sync(kAllLanes, lane_, lane_);  // opaque, as in run
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float sum = warp_sum<4>(sum_[half]);
            const int row = group_ * kGroupRows + warp_ * kWarpRows + lane / 4 + half * 8;
            if (tile().first_row + row >= tile().rows) continue;
            const int64_t at = static_cast<int64_t>(tile().part) * kRows + row;
            float* part = p_.parts + at * kDim + lane % 4 * 2;
#pragma unroll
            for (int n = 0; n < kDim / 8; ++n) {
                *reinterpret_cast<float2*>(part + n * 8) =
                    make_float2(output[n * 4 + half * 2], output[n * 4 + half * 2 + 1]);
            }
            if (lane % 4 == 0) p_.part_sums[at] = make_float2(maximum_[half] * score_scale(half), sum);
        }
        if constexpr (F::kConverted) barrier();  // nobody in the group reads queries any more: the next ones may come
    }

    Shared& storage_;
    const PagedAttentionPrefill& p_;
    const int group_, warp_, lane_;
    Tile own_tile_;              // where pages are in e4m3
    int first_row_;              // of the group, in the sequence
    int masked_from_;            // the first page that not all rows of the group see whole
    float maximum_[2], sum_[2];  // sum_: over the lane's own columns
    Cursor at_;
    int last_keys_ = 0;   // the box of the tile's last keys
    uint32_t phase_ = 0;  // of the tile
};

}  // namespace tokenspeed::attention_prefill
