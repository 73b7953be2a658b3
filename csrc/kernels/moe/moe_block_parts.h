// What the warps of moe_block.cu's kernel do, part by part: norm, products, top-k, sums.
#pragma once
#include <bf16x8.h>
#include <ptx.h>
#include <reduce.h>

#include "dense/add_norm.h"
#include "moe_block.h"
#include "moe_scaled_products.h"
#include "moe_select.h"

namespace tokenspeed::moe_layer {

// The next unit that the block has taken, or -1. A whole warp of those that follow the list.
__device__ __forceinline__ int next_unit(Control& control, Cursor& at) {
    ptx::mbarrier_wait(&control.units_full[at.slot], at.phase);
    const int unit = control.units[at.slot];
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&control.units_empty[at.slot]);
    at.next(kUnitSlots);
    return unit;
}

// The norm of x + residual in `rows`, and the launch's number, which comes behind x: an acquire would go first.
__device__ inline void begin(const Arguments& a, Control& control, uint8_t* rows) {
    uint32_t launches = 0;
    stage_norm(
        a.p, rows, a.layout.row_pitch, control.squares,
        [&] {
            if (threadIdx.x == 0) launches = *a.p.scratch;
        },
        [&] {
            if (threadIdx.x != 0) return;
            control.launch = launches + 1;
            ptx::mbarrier_arrive(&control.begun);
            // Whoever sees this count knows that the number has been read.
            ptx::add_relaxed(&counters_of(a.p.scratch, launches + 1).projected, 1);
        });
}

// sum += the warp's 16 rows x 64 of depth of a stage times the same depth of this lane's token. As in
// moe_experts_decode.cu; `low` and `high`: the fragment's first and last eight rows; `row`: the token's chunk.
__device__ __forceinline__ void multiply_chunk(float (&sum)[2][4], const uint8_t* low, const uint8_t* high,
                                               const uint8_t* row) {
    const int lane = threadIdx.x % 32, quad = lane / 4, piece = lane % 4;
    const int place = quad / 2 + quad % 2 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int offset = place * 128 + ((half * 4 + piece) ^ place) * 16;
        const uint4 upper = *reinterpret_cast<const uint4*>(low + offset);
        const uint4 lower = *reinterpret_cast<const uint4*>(high + offset);
        const uint4 b = *reinterpret_cast<const uint4*>(row + half * 64 + piece * 16);
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
        ptx::mma_m16n8k16<__nv_bfloat16>(sum[0], first, b.x, b.y);
        ptx::mma_m16n8k16<__nv_bfloat16>(sum[1], second, b.z, b.w);
    }
}

// The warps that multiply: where they are in the ring, and which half of the sums they write next.
struct Multiplier {
    Control& control;
    const Layout& layout;
    const uint8_t* ring;
    float* sums;
    Cursor at;
    int turn = 0;

    // Multiplies one unit with rows of `operand`, and returns its sums [depth warp, token, row]. scales: of e4m3, those
    // of the tile's rows.
    template <typename Product, typename Weight>
    __device__ __forceinline__ const float* unit(const uint8_t* operand, int pitch, int depth,
                                                 const float* scales = nullptr) {
        float sum[2][4] = {};
        stages<Product, Weight>(sum, operand, pitch, depth,
                                kScaled<Weight> ? load_scale<Product>(scales, 0, depth) : 0);
        return gather<Product>(sum);
    }

    // The first half of that, without the sums of other warps. scale: from load_scale.
    template <typename Product, typename Weight>
    __device__ __forceinline__ void stages(float (&sum)[2][4], const uint8_t* operand, int pitch, int depth,
                                           float scale) {
        using S = Shape<Product>;
        const int depth_warp = static_cast<int>(threadIdx.x) / 32 / Product::kRowWarps;
        for (int first = 0, s = 0; first * kChunk<Weight> < depth; first += S::kDepthWarps, ++s) {
            ptx::mbarrier_wait(&control.full[at.slot], at.phase);
            multiply_stage<Product, Weight>(sum, ring + at.slot * kStageBytes, operand, pitch, depth,
                                            first + depth_warp, scale, s);
            __syncwarp();
            if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&control.empty[at.slot]);
            at.next(layout.stages);
        }
    }

    // The same for one stage of Dense that lies beside the ring.
    template <typename Weight>
    __device__ __forceinline__ const float* unit_beside(const uint8_t* stage, const uint8_t* operand, int pitch,
                                                        int depth, const float* scales) {
        const float scale = kScaled<Weight> ? load_scale<Dense>(scales, 0, depth) : 0;
        float sum[2][4] = {};
        multiply_stage<Dense, Weight>(sum, stage, operand, pitch, depth, threadIdx.x / 32, scale, 0);
        return gather<Dense>(sum);
    }

    // The warp's share of a stage, the `s`-th of its unit: chunk `chunk` of the depth. scale: from load_scale.
    template <typename Product, typename Weight>
    __device__ __forceinline__ void multiply_stage(float (&sum)[2][4], const uint8_t* stage, const uint8_t* operand,
                                                   int pitch, int depth, int chunk, float scale, int s) const {
        constexpr int kRowWarps = Product::kRowWarps, kRows = Shape<Product>::kRows;
        const int warp = threadIdx.x / 32, row_warp = warp % kRowWarps, depth_warp = warp / kRowWarps;
        // Of gate_up all gate rows of a chunk come first, then its up rows; else 16 rows of a warp are neighbours.
        constexpr bool kPairs = std::is_same_v<Product, GateUp>;
        const uint8_t* low = stage + (depth_warp * kRows + row_warp * (kPairs ? 8 : 16)) * kChunkBytes;
        const uint8_t* high = low + (kPairs ? kRows / 2 : 8) * kChunkBytes;
        // Columns without a token are not stored.
        const auto row_of = [&](int token) { return operand + min(token, layout.tokens - 1) * pitch; };
        if constexpr (kScaled<Weight>) {
            const float low_scale = __shfl_sync(kAllLanes, scale, kPairs ? 2 * s : s);
            const float high_scale = kPairs ? __shfl_sync(kAllLanes, scale, 2 * s + 1) : low_scale;
            if (chunk * kChunk<Weight> >= depth) return;
            float (&scaled)[1][4] = *reinterpret_cast<float (*)[1][4]>(&sum[0]);
            expert_decode::multiply_scaled_chunk(scaled, low, high, row_of, depth, chunk, 1, low_scale, high_scale);
        } else if (chunk * kChunk<Weight> < depth) {
            multiply_chunk(sum, low, high, row_of(threadIdx.x % 32 / 4) + chunk * kChunkBytes);
        }
    }

    // The warp's scales of a unit: of the gate and the up rows of the even and odd lanes' stage (gate_up), or of all
    // rows of the lane's stage. up_scales: how much further those of the up rows lie.
    template <typename Product>
    __device__ __forceinline__ static float load_scale(const float* scales, int up_scales, int depth) {
        constexpr bool kPairs = std::is_same_v<Product, GateUp>;
        const int lane = threadIdx.x % 32, depth_warp = static_cast<int>(threadIdx.x) / 32 / Product::kRowWarps;
        const int chunk = (kPairs ? lane / 2 : lane) * Shape<Product>::kDepthWarps + depth_warp;
        if (chunk >= depth / kScaleBlock) return 0;
        return scales[(kPairs && lane % 2 ? up_scales : 0) + chunk];
    }

    // All warps' sums of a unit.
    template <typename Product>
    __device__ __forceinline__ const float* gather(const float (&sum)[2][4]) {
        using S = Shape<Product>;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, tokens = layout.tokens;
        const int row_warp = warp % Product::kRowWarps, depth_warp = warp / Product::kRowWarps;
        // The other half was read before every warp came to the barrier of the unit before.
        float* mine = sums + turn * tokens * kTokenSums;
        turn ^= 1;
        const int first_row = row_warp * 16 + quad / 2 + quad % 2 * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = lane % 4 * 2 + i % 2;
            if (token >= tokens) continue;
            mine[(depth_warp * tokens + token) * S::kPitch + first_row + i / 2 * 8] = sum[0][i] + sum[1][i];
        }
        ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
        return mine;
    }

    // A row's sum of a token over the warps that shared the depth.
    template <typename Product>
    __device__ __forceinline__ float total(const float* unit_sums, int token, int row) const {
        float value = 0;
#pragma unroll
        for (int i = 0; i < Shape<Product>::kDepthWarps; ++i) {
            value += unit_sums[(i * layout.tokens + token) * Shape<Product>::kPitch + row];
        }
        return value;
    }
};

// Each token's choices by a warp, then the list of entries by the first: experts here that any token chose, in the
// order of the first choice. Weights come after the list: nobody waits for them.
template <int kPerLane>
__device__ void list_entries(const Arguments& a, Control& control, uint32_t* first) {
    const MoeBlock& p = a.p;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, choices = p.tokens * p.top_k;
    Choice choice{};
    if (warp < p.tokens) {
        uint32_t bits[kPerLane];
        ptx::wait_tagged(bits, a.logits + warp * p.experts + lane * kPerLane, control.launch);
        __syncwarp();
        float logits[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) logits[i] = __uint_as_float(bits[i]);
        choice = select_experts(logits, p.top_k);
        const int flat = warp * p.top_k + lane, here = choice.expert - p.first_expert;
        const bool held = lane < p.top_k && here >= 0 && here < p.held && !is_padding(p.sequences, warp);
        if (lane < p.top_k) control.chosen[flat] = static_cast<int16_t>(held ? here : -1);
        if (p.tokens == 1) {  // no two choices are the same
            const unsigned all = __ballot_sync(kAllLanes, held);
            if (held) {
                const int entry = __popc(all & ((1u << lane) - 1));
                control.experts[entry] = static_cast<uint16_t>(here);
                control.ranks[entry][0] = static_cast<uint8_t>(lane);
            }
            if (lane == 0) control.entries = __popc(all);
        } else if (held) {
            atomicMin(first + here, static_cast<uint32_t>(flat));
        }
    }
    if (p.tokens > 1) {
        ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
        if (warp == 0) {
            int entries = 0;
            for (int base = 0; base < choices; base += 32) {
                const int flat = base + lane, here = flat < choices ? control.chosen[flat] : -1;
                const bool leads = here >= 0 && first[here] == static_cast<uint32_t>(flat);
                const unsigned leaders = __ballot_sync(kAllLanes, leads);
                if (leads) {
                    const int entry = entries + __popc(leaders & ((1u << lane) - 1));
                    control.experts[entry] = static_cast<uint16_t>(here);
                    control.entry_of[flat] = static_cast<uint8_t>(entry);
                }
                entries += __popc(leaders);
            }
            __syncwarp();
            for (int flat = lane; flat < choices; flat += 32) {
                const int here = control.chosen[flat];
                if (here < 0) continue;
                const int token = flat / p.top_k;
                control.ranks[control.entry_of[first[here]]][token] = static_cast<uint8_t>(flat - token * p.top_k);
            }
            if (lane == 0) control.entries = entries;
        }
    }
    if (warp == 0) {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&control.listed);
    }
    if (warp < p.tokens) {
        const float weight = weight_of(choice, p.top_k);
        if (lane < p.top_k) control.weights[warp * p.top_k + lane] = to_float(__float2bfloat16(weight));
    }
}

// Writes eight columns of a row of activations, piece `piece`, into a row slot, if they are there; for e4m3 weights as
// fp16 and, behind the row, what each group of 128 was divided by. A whole warp; lanes of a group have neighbours.
template <typename Weight>
__device__ __forceinline__ void store_piece(uint8_t* row, int piece, int depth, uint4 packed, bool inside) {
    if constexpr (kScaled<Weight>) {
        float divisor;
        packed = row_to_half<kGroupLanes>(inside ? packed : uint4{}, divisor);
        if (inside && piece % kGroupLanes == 0) {
            *reinterpret_cast<float*>(row + depth * 2 + piece / kGroupLanes * 4) = divisor;
        }
    }
    if (inside) store_16(row + piece * 16, packed);
}

// Brings a choice's activations from tagged words into a row slot. One warp.
template <typename Weight>
__device__ inline void bring_words(const uint64_t* words, uint8_t* row, int width, uint32_t launch) {
    const int lane = threadIdx.x % 32, pieces = width / 8;
    for (int base = 0; base < pieces; base += kWordPieces) {
        const int piece = base + lane;
        uint32_t values[8] = {};
        uint32_t (&first)[4] = *reinterpret_cast<uint32_t (*)[4]>(values);
        if (piece + 32 < pieces) {
            ptx::wait_tagged(values, words + words_of(piece), launch);
        } else if (piece < pieces) {
            ptx::wait_tagged(first, words + words_of(piece), launch);
        }
        __syncwarp();
        store_piece<Weight>(row, piece, width, make_uint4(values[0], values[1], values[2], values[3]), piece < pieces);
        if (base + 32 >= pieces) break;
        store_piece<Weight>(row, piece + 32, width, make_uint4(values[4], values[5], values[6], values[7]),
                            piece + 32 < pieces);
    }
}

// Writes the shared expert's activations, silu(gate) * up, into a row slot. One warp.
template <typename Weight>
__device__ inline void activate_shared(const Arguments& a, uint8_t* slot) {
    const MoeBlock& p = a.p;
    const int lane = threadIdx.x % 32, pieces = p.shared / 8, all = p.tokens * pieces;
    for (int base = 0; base < all; base += kBatch * 32) {
        uint4 gates[kBatch], ups[kBatch];
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int piece = base + i * 32 + lane;
            if (piece >= all) continue;
            const __nv_bfloat16* gate = a.projected + piece / pieces * a.projected_pitch + piece % pieces * 8;
            gates[i] = ptx::load_16_no_allocate(gate);
            ups[i] = ptx::load_16_no_allocate(gate + p.shared);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            const int piece = base + i * 32 + lane;
            if (base + i * 32 >= all) break;
            uint4 packed{};
            if (piece < all) {
                const Float8 g = unpack(gates[i]), u = unpack(ups[i]);
                Float8 y;
#pragma unroll
                for (int j = 0; j < 8; ++j) y.v[j] = silu(g.v[j]) * u.v[j];
                packed = pack(y);
            }
            uint8_t* row = slot + piece / pieces * a.layout.slot_pitch;
            store_piece<Weight>(row, piece % pieces, p.shared, packed, piece < all);
        }
    }
}

// Stores a tile of an entry's activations, and counts it for each token that chose the expert.
__device__ __forceinline__ void finish_gate_up(const Arguments& a, const Control& control, const Multiplier& multiplier,
                                               const float* sums, int entry, int tile) {
    constexpr int kColumns = GateUp::kTileColumns;
    const MoeBlock& p = a.p;
    if (static_cast<int>(threadIdx.x) / 32 * 32 >= p.tokens * kColumns) return;
    const int token = threadIdx.x / kColumns, output = threadIdx.x % kColumns;
    const int rank = token < p.tokens ? control.ranks[entry][token] : kNobody;
    const int64_t choice = token * p.top_k + rank;
    float value = 0;
    if (rank != kNobody) {
        const int row = output / 8 * 16 + output % 8;  // each warp's gate rows, then its up rows
        const float gate = multiplier.total<GateUp>(sums, token, row);
        const float up = multiplier.total<GateUp>(sums, token, row + 8);
        value = silu(gate) * up;
    }
    if (a.words != nullptr) {
        __syncwarp();
        const float next = __shfl_down_sync(kAllLanes, value, 1);
        if (rank == kNobody || output % 2 != 0) return;
        const int column = tile * kColumns + output;
        ptx::store_tagged(a.words + choice * words_pitch(p.width) + words_of(column / 8) + column % 8 / 2,
                          pack<__nv_bfloat16>(value, next), control.launch);
        return;
    }
    if (rank != kNobody) {
        a.activations[choice * p.width + tile * kColumns + output] = __float2bfloat16(value);
    }
    __syncwarp();
    if (rank != kNobody && output == 0) ptx::add_release(&counters_of(p.scratch, control.launch).activated[entry], 1);
}

// Stores a tile of the rows that the tokens of an entry will sum.
__device__ __forceinline__ void finish_down(const Arguments& a, const Control& control, const Multiplier& multiplier,
                                            const float* sums, int entry, int tile) {
    constexpr int kColumns = Down::kTileColumns;
    const MoeBlock& p = a.p;
    for (int i = threadIdx.x; i < p.tokens * kColumns; i += kConsumerThreads) {
        const int token = i / kColumns, output = tile * kColumns + i % kColumns;
        const int rank = control.ranks[entry][token];
        if (rank == kNobody || output >= p.hidden) continue;
        ptx::store_tagged(a.rows + int64_t{token * p.top_k + rank} * p.hidden + output,
                          __float_as_uint(multiplier.total<Down>(sums, token, i % kColumns)), control.launch);
    }
}

// out of this block's columns: a warp has 16 of them of one token, a lane four of one of its ranks.
template <typename Weight>
__device__ inline void finish_columns(const Arguments& a, const Control& control, const Work<Weight>& work) {
    const MoeBlock& p = a.p;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = static_cast<int>(gridDim.x);
    const int block = static_cast<int>(blockIdx.x);
    const int tiles = block < work.column_tiles ? (work.column_tiles - block + blocks - 1) / blocks : 0;
    for (int item = warp; item < tiles * p.tokens; item += kConsumers) {
        const int token = item % p.tokens, first = token * p.top_k;
        const int column = (block + item / p.tokens * blocks) * Dense::kTileColumns + lane % 4 * 4;
        const uint2 shared = *reinterpret_cast<const uint2*>(a.shared_rows + int64_t{token} * p.hidden + column);
        const __nv_bfloat16 gate = a.projected[token * a.projected_pitch + 2 * p.shared + p.experts];
        float sum[4] = {};
        for (int base = 0; base < p.top_k; base += kRanksAtOnce) {
            const int rank = base + lane / 4;
            uint32_t values[4] = {};
            if (rank < p.top_k && control.chosen[first + rank] >= 0) {
                ptx::wait_tagged(values, a.rows + int64_t{first + rank} * p.hidden + column, control.launch);
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kRanksAtOnce; ++i) {
                const bool counts = base + i < p.top_k && control.chosen[first + base + i] >= 0;
                const float weight = counts ? control.weights[first + base + i] : 0.0f;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const uint32_t value = __shfl_sync(kAllLanes, values[j], i * 4 + lane % 4);
                    if (counts) sum[j] += weight * __uint_as_float(value);
                }
            }
        }
        const float added[4] = {__uint_as_float(shared.x << 16), __uint_as_float(shared.x & 0xffff0000u),
                                __uint_as_float(shared.y << 16), __uint_as_float(shared.y & 0xffff0000u)};
        const float share = sigmoid(to_float(gate));
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] = to_float(__float2bfloat16(sum[j])) + share * added[j];
        if (lane >= 4) continue;
        *reinterpret_cast<uint2*>(p.out + int64_t{token} * p.hidden + column) =
            make_uint2(pack<__nv_bfloat16>(sum[0], sum[1]), pack<__nv_bfloat16>(sum[2], sum[3]));
    }
}

}  // namespace tokenspeed::moe_layer
