// The expert product of a prefill whose experts are e4m3 with a scale for each block of 128 x 128: that of
// moe_experts_prefill.cu, with activations of e4m3 in groups of 128 columns. What differs from there stands here.
//
// Five launches: the counters of tiles; x is quantised, where the norm before has not written its groups; a grouped
// product with gate and up; one with down; the weighted sum of each token's rows. Half the bytes and, by the datasheet,
// half the time of the matrix unit: 8192 tokens of 35B are 412 Gflop, 0.27 ms at twice 780 TFLOP/s, and 0.8 GB of
// weights, 0.19 ms at 4.3 TB/s.
//
// Weights are the rows of the products and choices their columns, up to 144 of a block (moe_experts_prefill_columns.h).
// The matrix unit sums a stage, 128 of depth, and fp32 registers the stages, times the scales of the choices, which lie
// with them in the ring, and of the weights' block. One warpgroup scales while the other multiplies.
//
// A tile of gate and up is 128 columns of the activations, a whole group of each choice, of which each warpgroup has
// half: they tell each other the largest magnitudes through shared memory.
//
// Blocks work alone where an expert has on average up to 144 choices, in clusters of two that share weights where it
// has more: a block's weights cost 32 KB a stage from L2 alone and 16 KB in a cluster, its choices up to 18 KB.
//
// Measured, and what was tried: docs/kernels/fp8_prefill.md.
//
// budget: product_kernel registers<=168 shared<=0 hot sass=QGMMA
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>
#include <ptx_wgmma.h>
#include <reduce.h>

#include <algorithm>

#include "fp8.h"
#include "kernels.h"
#include "moe_experts_prefill_columns.h"

namespace tokenspeed {
namespace {

using namespace expert_prefill;
using namespace expert_prefill::claims;

constexpr int kColumns = 144;  // choices of a block: more have no registers
constexpr int kLeastColumns = 32;
constexpr int kMultipliers = kBlockGroups * kGroupThreads;
constexpr int kPeakBarrier = 1, kTurnBarrier = 2;        // the latter of the first warpgroup, then the second
constexpr int kPeakChoices = (kColumns + 31) / 32 * 32;  // a warp's lanes each have one of 32
static_assert(kRowBytes == kScaleBlock && kTileRows / 2 == kScaleBlock);

struct Stages : Storage<kColumns> {
    float scale[2 * kStages][kColumns];              // of choices: a stage's outlive its slot
    float peak[2][kMultipliers / 32][kPeakChoices];  // of a warp's share of each choice's group, by turns
};

__device__ __forceinline__ int scale_slot(const Cursor& at) {
    return at.slot + static_cast<int>(at.phase) * kStages;
}

__device__ __forceinline__ void take_turn(int group) {
    ptx::named_barrier_sync(kTurnBarrier + group, kMultipliers);
}

__device__ __forceinline__ void give_turn(int group) {
    ptx::named_barrier_arrive(kTurnBarrier + group, kMultipliers);
}

using Sum = float[kUnits][kColumns / 2];

// sum = the warpgroup's weight rows x the first kN choices of a tile, all its depth. scales: of the weights of each
// unit, one a stage. The warpgroups take turns at the matrix unit: who started together would wait together, and scale
// together.
template <int kBlocks, bool kGateUp, int kN>
__device__ __forceinline__ void multiply(Sum& sum, Stages& storage, Cursor& at, int stages, int group,
                                         const float* const (&scales)[kUnits]) {
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) sum[unit][i] = 0;
    }
    float scale[kUnits];  // of the next stage, asked for one ahead
    const auto ask = [&](int s) {
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) scale[unit] = scales[unit][s];
    };
    ask(0);
#pragma unroll 1
    for (int s = 0; s < stages; ++s) {
        const float of_weights[kUnits] = {scale[0], scale[1]};
        ask(min(s + 1, stages - 1));
        ptx::mbarrier_wait(&storage.ring.full[at.slot], at.phase);
        // The choices that threads copied: the matrix unit must be let see them.
        if (kGateUp) ptx::fence_async_shared();
        const uint32_t choices = ptx::shared_address(storage.choices[at.slot]);
        const auto* of_choices = reinterpret_cast<const float2*>(storage.scale[scale_slot(at)]) + threadIdx.x % 4;
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
            const uint32_t weights = unit_of(storage.weights[at.slot], group, unit);
            float block[kN / 2];
            take_turn(group);
            ptx::wgmma_fence(block);
#pragma unroll
            for (int k = 0; k < kRowBytes / 32; ++k) {
                ptx::wgmma<E4m3, kN>(block, operand(weights, k), operand(choices, k), k > 0);
            }
            ptx::wgmma_commit();
            give_turn(1 - group);
            ptx::wgmma_wait<0>(block);
            if (unit + 1 == kUnits) release<kBlocks>(storage.ring, at.slot);
#pragma unroll
            for (int j = 0; j < kN / 8; ++j) {
                const float2 pair = of_choices[j * 4];
                const float factor[2] = {pair.x * of_weights[unit], pair.y * of_weights[unit]};
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[unit][4 * j + i] += factor[i % 2] * block[4 * j + i];
            }
        }
        at.next(kStages);
    }
}

// By the eight warps that multiply: the largest magnitude among a choice's 128 activations, for the choices of this
// lane: of each 32, number choice_of_lane(). `values`: pairs of neighbouring activations, as products leave them.
template <int kN>
struct Peaks {
    static constexpr int kParts = (kN + 31) / 32;
    float peak[kParts];

    static __device__ int choice_of_lane() {
        const int lane = threadIdx.x % 32;
        return lane / 8 * 8 + lane % 4 * 2 + lane / 4 % 2;
    }
    // The lane of the quad's position that has choice i of the j-th eight.
    static __device__ int lane_of(int j, int i) { return (j % 4 * 2 + i) * 4 + threadIdx.x % 4; }

    __device__ Peaks(const float (&values)[kColumns / 2], float (&shared)[kMultipliers / 32][kPeakChoices]) {
        const int lane = threadIdx.x % 32, choice = choice_of_lane();
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            float of[8];  // the thread's choices of these 32
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const int at = (part * 4 + e / 2) * 4 + e % 2;
                of[e] = at < kN / 2 ? fmaxf(fabsf(values[at]), fabsf(values[at + 2])) : 0;
            }
            // Each step halves the choices and doubles the lanes whose activations they cover.
#pragma unroll
            for (int half = 4; half > 0; half /= 2) {
                const bool upper = lane & half * 4;
#pragma unroll
                for (int e = 0; e < half; ++e) {
                    const float sent = upper ? of[e] : of[e + half], kept = upper ? of[e + half] : of[e];
                    of[e] = fmaxf(kept, __shfl_xor_sync(kAllLanes, sent, half * 4));
                }
            }
            shared[threadIdx.x / 32 - kCopyThreads / 32][part * 32 + choice] = of[0];
        }
        ptx::named_barrier_sync(kPeakBarrier, kMultipliers);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            peak[part] = kSmallestPeak;
#pragma unroll
            for (const auto& warp : shared) peak[part] = fmaxf(peak[part], warp[part * 32 + choice]);
        }
    }
};

template <int kTileBlocks>
struct Scaled : Columns<E4m3, kTileBlocks, kColumns, 16> {
    using Storage = Stages;
    using Base = Columns<E4m3, kTileBlocks, kColumns, 16>;
    static constexpr int kMultiplyRegisters = 232, kCopyRegisters = 40;

    template <bool kGateUp>
    class Scales {
        using Rows = Gather<kColumns>;

      public:
        static constexpr bool kCopied = true;

        __device__ Scales(const Rows& gather, int top_k) {
#pragma unroll
            for (int i = 0; i < Rows::kLookups; ++i) {
                token_[i] = gather.choice[i] >= 0 ? gather.choice[i] / top_k : -1;
            }
        }

        __device__ void operator()(const Prefill& a, const typename Base::template Load<kGateUp>& load, Stages& storage,
                                   const Cursor& at, int s) const {
            float* to = storage.scale[scale_slot(at)];
            const auto stage = static_cast<uint32_t>(s);
            if constexpr (kGateUp) {
                const float* from = a.x_scale + uint64_t{a.x_scale_stride} * stage;
#pragma unroll
                for (int i = 0; i < Rows::kLookups; ++i) {
                    if (token_[i] >= 0) ptx::cp_async<4>(to + Rows::row_of(i), from + token_[i]);
                }
            } else {
                const Span& own = load.choices();
                const float* from = a.activation_scale + uint64_t{a.activation_scale_stride} * stage;
#pragma unroll 1
                for (int choice = own.begin + static_cast<int>(threadIdx.x); choice < own.end; choice += 32) {
                    ptx::cp_async<4>(to + choice - own.begin, from + choice);
                }
            }
        }

      private:
        int token_[Rows::kLookups];  // whose scales this thread brings; negative for none
    };

    template <bool kGateUp>
    static __device__ __forceinline__ void multiply_tiles(Stages& storage, const Prefill& a) {
        using P = Product<kGateUp>;
        const MoeExperts& p = a.p;
        const int group = multiplying_group(), warp = threadIdx.x / 32 % 4;
        const int stages = P::depth(p) / kDepth<Scaled>, columns = P::columns(p);
        Cursor at;
        if (group == 1) give_turn(0);  // the first
        for (int turn = 0;; ++turn) {
            ptx::mbarrier_wait(&storage.ring.full[at.slot], at.phase);
            const Tile tile = storage.ring.tiles[turn % kStages];
            if (tile.expert < 0) return;
            const Span own = Base::own_of(tile);
            const int first = own.begin, count = own.end - first;
            const float* scales[kUnits];
#pragma unroll
            for (int unit = 0; unit < kUnits; ++unit) {
                const int blocks = columns / kScaleBlock;  // of gate's rows, then of up's, or of down's
                if constexpr (kGateUp) {
                    scales[unit] = p.gate_up_scale + ((tile.expert * 2 + unit) * blocks + tile.column_tile) * stages;
                } else {
                    const int block = min(tile.column_tile * kBlockGroups + group, blocks - 1);
                    scales[unit] = p.down_scale + (tile.expert * blocks + block) * stages;
                }
            }
            with_columns<kLeastColumns, kColumns>(count, [&](auto n) {
                constexpr int kN = decltype(n)::value;
                Sum sum;
                multiply<kTileBlocks, kGateUp, kN>(sum, storage, at, stages, group, scales);
                if constexpr (kGateUp) {
                    store_activations<kN>(storage, sum, a, tile.column_tile, group, warp, first, count, turn % 2);
                } else {
                    store_rows<kN>(sum, a, tile.column_tile, group, warp, first, count);
                }
            });
        }
    }

    // Of kN columns, which are as few as hold `count`.
    template <int kN>
    static __device__ __forceinline__ bool is_choice(int choice, int j, int count) {
        return (kN > kLeastColumns && j < kN / 8 - 2) || choice < count;
    }

    // The thread has two neighbouring columns of activations of every choice that it has.
    template <int kN>
    static __device__ __forceinline__ void store_activations(Stages& storage, Sum& sum, const Prefill& a,
                                                             int column_tile, int group, int warp, int first, int count,
                                                             int turn) {
        float (&values)[kColumns / 2] = sum[0];
#pragma unroll
        for (int i = 0; i < kN / 2; ++i) values[i] = silu(values[i]) * sum[1][i];
        const Peaks<kN> peaks(values, storage.peak[turn]);
        float factor[Peaks<kN>::kParts];
        const int part_of_warp = static_cast<int>(ptx::warp_id()) - kCopyThreads / 32;  // whose scales it stores
        float peak = 0;
#pragma unroll
        for (int part = 0; part < Peaks<kN>::kParts; ++part) {
            factor[part] = kLargestE4m3 / peaks.peak[part];
            if (part == part_of_warp) peak = peaks.peak[part];
        }
        const int scaled = part_of_warp * 32 + Peaks<kN>::choice_of_lane();
        if (scaled < count) {
            const int64_t of_group = int64_t{a.activation_scale_stride} * column_tile;
            a.activation_scale[of_group + first + scaled] = peak / kLargestE4m3;
        }
        // Two lanes whose columns are neighbours have four of one choice each, of the two that both have.
        const int lane = threadIdx.x % 32, which = lane / 4 % 2, within = lane % 4 * 2 + which;
        const uint32_t bytes = which ? 0x1054 : 0x5410;  // own bytes behind or before
        const int column = column_tile * kScaleBlock + group * kUnitRows + warp * 16 + lane / 8 * 4;
        uint8_t* output = static_cast<uint8_t*>(a.activations) + int64_t{first + within} * a.p.width + column;
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
            uint32_t words[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const float by = __shfl_sync(kAllLanes, factor[j / 4], Peaks<kN>::lane_of(j, i));
                const float2 pair = make_float2(values[4 * j + i] * by, values[4 * j + 2 + i] * by);
                words[i] = __nv_cvt_float2_to_fp8x2(pair, __NV_SATFINITE, __NV_E4M3);
            }
            const uint32_t others = __shfl_xor_sync(kAllLanes, which ? words[0] : words[1], 4);
            const uint32_t four = __byte_perm(which ? words[1] : words[0], others, bytes);
            if (is_choice<kN>(j * 8 + within, j, count)) *reinterpret_cast<uint32_t*>(output) = four;
            output += int64_t{8} * a.p.width;
        }
    }

    // The thread has four neighbouring columns of down's rows.
    template <int kN>
    static __device__ __forceinline__ void store_rows(const Sum& sum, const Prefill& a, int column_tile, int group,
                                                      int warp, int first, int count) {
        const int lane = threadIdx.x % 32;
        const int column = column_tile * kTileRows + group * kScaleBlock + (warp * 8 + lane / 4) * 4;
        int place[(kN + 31) / 32];  // of every 32nd choice
#pragma unroll
        for (int part = 0; part < (kN + 31) / 32; ++part) {
            const int choice = part * 32 + lane;
            place[part] = choice < count ? a.p.order[first + choice] : 0;
        }
        const bool inside = column < a.p.hidden;
#pragma unroll
        for (int j = 0; j < kN / 8; ++j) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int within = lane % 4 * 2 + i;
                const int row = __shfl_sync(kAllLanes, place[j / 4], j % 4 * 8 + within);
                const float *v = sum[0] + 4 * j + i, *w = sum[1] + 4 * j + i;
                const uint2 words = make_uint2(pack<__nv_bfloat16>(v[0], v[2]), pack<__nv_bfloat16>(w[0], w[2]));
                if (inside && is_choice<kN>(j * 8 + within, j, count)) {
                    ptx::store_8(a.rows + int64_t{row} * a.p.hidden + column, words);
                }
            }
        }
    }
};

template <int kBlocks, bool kGateUp>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap activations,
                   const __grid_constant__ Prefill a) {
    DYNAMIC_SHARED(raw);
    run<Scaled<kBlocks>, kGateUp>(*reinterpret_cast<Stages*>(raw), a, weights, activations);
}

template <int kBlocks>
cudaError_t products(const Prefill& a, int takers, cudaStream_t stream) {
    return launch_products<Scaled<kBlocks>>(product_kernel<kBlocks, true>, product_kernel<kBlocks, false>, a, takers,
                                            stream);
}

}  // namespace

bool moe_experts_prefill_fp8_supported(const MoeExperts& p) {
    return p.gate_up_scale != nullptr && p.down_scale != nullptr && p.tokens >= 1 && p.top_k >= 1 && p.experts >= 1 &&
           p.experts <= kMaxExperts && p.hidden >= kRowBytes && p.hidden % kRowBytes == 0 && p.width >= kRowBytes &&
           p.width % kRowBytes == 0 && p.x_stride % 8 == 0 && is_aligned(p.x) && is_aligned(p.gate_up) &&
           is_aligned(p.down) && int64_t{p.tokens} * p.hidden / 8 / 256 < INT32_MAX;
}

size_t moe_experts_prefill_fp8_workspace(const MoeExperts& p) {
    const size_t tokens = p.tokens, choices = tokens * p.top_k, hidden = p.hidden, width = p.width;
    return choices * (hidden * sizeof(__nv_bfloat16) + width + width / kScaleBlock * sizeof(float)) +
           tokens * (hidden + hidden / kScaleBlock * sizeof(float)) + 2 * sizeof(int);
}

cudaError_t moe_experts_prefill_fp8(const MoeExperts& p, cudaStream_t stream) {
    if (!moe_experts_prefill_fp8_supported(p)) return cudaErrorInvalidValue;
    const int64_t tokens = p.tokens, choices = tokens * p.top_k;
    auto* rows = reinterpret_cast<__nv_bfloat16*>(p.workspace);
    auto* activations = reinterpret_cast<uint8_t*>(rows + choices * p.hidden);
    uint8_t* x = activations + choices * p.width;
    auto* activation_scale = reinterpret_cast<float*>(x + tokens * p.hidden);
    float* x_scale = activation_scale + choices * (p.width / kScaleBlock);
    auto* next_tiles = reinterpret_cast<int*>(x_scale + tokens * (p.hidden / kScaleBlock));
    const bool given = p.groups.values != nullptr;
    const Prefill a{.p = p,
                    .x = given ? p.groups.values : x,
                    .x_pieces = static_cast<uint32_t>(p.hidden / 16),
                    .activations = activations,
                    .rows = rows,
                    .next_tiles = next_tiles,
                    .x_scale = given ? p.groups.scales : x_scale,
                    .activation_scale = activation_scale,
                    .x_scale_stride = static_cast<uint32_t>(given ? p.groups.scale_stride : tokens),
                    .activation_scale_stride = static_cast<uint32_t>(choices)};
    const bool clusters = has_more_choices(p, kColumns);
    const int takers = std::max(multiprocessor_count() / (clusters ? kClusterBlocks : 1), 1);
    cudaError_t status = start_tiles(next_tiles, takers, stream);
    if (status != cudaSuccess) return status;
    if (!given) {
        status = quantise_groups(p.x, false, p.x_stride, {x, x_scale, p.tokens}, p.tokens, p.hidden, stream);
        if (status != cudaSuccess) return status;
    }
    status = clusters ? products<kClusterBlocks>(a, takers, stream) : products<1>(a, takers, stream);
    if (status != cudaSuccess) return status;
    return sum_ranks(p, rows, stream);
}

}  // namespace tokenspeed
