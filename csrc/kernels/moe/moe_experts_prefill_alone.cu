// The two grouped products of a bf16 prefill of the experts (moe_experts_prefill.cu has the whole) by blocks that work
// each alone. docs/kernels/moe_prefill.md has what was measured.
//
// A tile has up to 192 choices of one expert: moe_experts_prefill_columns.h has what it shares with e4m3. A thread stores
// its sums as they are, 4 bytes of activations, 8 of down's rows.
//
// budget: product_kernel registers<=168 shared<=0 hot sass=HGMMA
#include <bf16x8.h>

#include "moe_experts_prefill_columns.h"

namespace tokenspeed {
namespace {

using namespace expert_prefill;
using namespace expert_prefill::claims;

using Stages = Storage<kStageChoices>;
constexpr int kStageDepth = kRowBytes / sizeof(__nv_bfloat16);
constexpr int kLeastColumns = 64;                // of a product: fewer choices cost as much
constexpr int kLanePlaces = kStageChoices / 32;  // of a tile's choices, that a lane looks up

using Sum = float[kUnits][kStageChoices / 2];

// sum = the warpgroup's weight rows x the first kColumns choices of a tile, all its depth.
template <bool kGateUp, int kColumns>
__device__ __forceinline__ void multiply(Sum& sum, Stages& storage, Cursor& at, int stages, int group) {
    int before = -1;  // the slot whose products may still run
    for (int s = 0; s < stages; ++s) {
        ptx::mbarrier_wait(&storage.ring.full[at.slot], at.phase);
        // The choices that threads copied: the matrix unit must be let see them.
        if (kGateUp) ptx::fence_async_shared();
        const uint32_t choices = ptx::shared_address(storage.choices[at.slot]);
        ptx::wgmma_fence(sum[0], sum[1]);
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
            const uint32_t weights = unit_of(storage.weights[at.slot], group, unit);
#pragma unroll
            for (int k = 0; k < kStageDepth / 16; ++k) {
                ptx::wgmma<__nv_bfloat16, kColumns>(sum[unit], operand(weights, k), operand(choices, k),
                                                    s > 0 || k > 0);
            }
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (before >= 0) release<1>(storage.ring, before);
        before = at.slot;
        at.next(kStages);
    }
    ptx::wgmma_wait<0>(sum[0], sum[1]);
    release<1>(storage.ring, before);
}

struct Alone : Columns<__nv_bfloat16, 1, kStageChoices, kBoxChoices> {
    using Storage = Stages;
    static constexpr int kMultiplyRegisters = 224, kCopyRegisters = 56;
    template <bool kGateUp>
    using Scales = NoScales;

    template <bool kGateUp>
    static __device__ __forceinline__ void multiply_tiles(Stages& storage, const Prefill& a) {
        using P = Product<kGateUp>;
        const MoeExperts& p = a.p;
        const int group = multiplying_group(), warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const int stages = P::depth(p) / kStageDepth, columns = P::columns(p);
        Cursor at;
        for (int turn = 0;; ++turn) {
            ptx::mbarrier_wait(&storage.ring.full[at.slot], at.phase);
            const Tile tile = storage.ring.tiles[turn % kStages];
            if (tile.expert < 0) return;
            const int first = tile.choices.begin, count = tile.choices.end - first;
            int place[kLanePlaces];  // in down's output, of every 32nd choice
            if (!kGateUp) {
#pragma unroll
                for (int i = 0; i < kLanePlaces; ++i) {
                    const int choice = i * 32 + lane;
                    place[i] = choice < count ? p.order[first + choice] : 0;
                }
            }
            Sum sum;
            with_columns<kLeastColumns, kStageChoices>(
                count, [&](auto n) { multiply<kGateUp, decltype(n)::value>(sum, storage, at, stages, group); });
            // The thread has two columns of activations or four of down from here on.
            constexpr int kUnitColumns = P::kTileColumns / kBlockGroups, kThreadColumns = kUnitColumns / 32;
            const int column =
                tile.column_tile * P::kTileColumns + group * kUnitColumns + (warp * 8 + lane / 4) * kThreadColumns;
            auto* activations = static_cast<__nv_bfloat16*>(a.activations);
            __nv_bfloat16* output = (kGateUp ? activations + int64_t{first} * columns : a.rows) + column;
            const bool inside = column < columns;
#pragma unroll
            for (int j = 0; j < kStageChoices / 8; ++j) {
                if (j * 8 >= count) break;
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int within = lane % 4 * 2 + i, choice = j * 8 + within;
                    const float *v = sum[0] + 4 * j + i, *w = sum[1] + 4 * j + i;
                    if constexpr (kGateUp) {
                        const uint32_t word = pack<__nv_bfloat16>(silu(v[0]) * w[0], silu(v[2]) * w[2]);
                        if (inside && choice < count) {
                            *reinterpret_cast<uint32_t*>(output + int64_t{choice} * columns) = word;
                        }
                    } else {
                        const int row = __shfl_sync(kAllLanes, place[j / 4], j % 4 * 8 + within);
                        const uint2 words =
                            make_uint2(pack<__nv_bfloat16>(v[0], v[2]), pack<__nv_bfloat16>(w[0], w[2]));
                        if (inside && choice < count) ptx::store_8(output + int64_t{row} * columns, words);
                    }
                }
            }
        }
    }
};

template <bool kGateUp>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap activations,
                   const __grid_constant__ Prefill a) {
    DYNAMIC_SHARED(raw);
    run<Alone, kGateUp>(*reinterpret_cast<Stages*>(raw), a, weights, activations);
}

}  // namespace

cudaError_t expert_prefill::products_alone(const Prefill& a, int blocks, cudaStream_t stream) {
    return launch_products<Alone>(product_kernel<true>, product_kernel<false>, a, blocks, stream);
}

}  // namespace tokenspeed
