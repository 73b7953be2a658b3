// The two grouped products of a bf16 prefill of the experts (moe_experts_prefill.cu has the whole) by blocks that work
// each alone: moe_experts_prefill_claims.h has what they share with clusters. docs/kernels/moe_prefill.md has what was
// measured.
//
// A tile has up to 192 choices of one expert. Weights are the rows of the product and choices its columns: a warpgroup
// multiplies 128 of the tile's weight rows, twice m64, with all its choices rounded up to 16, n64 to n192, of which the
// matrix unit does no more. An expert's choices are spread over as many tiles as they need. Weight rows lie in shared
// memory in the order in which a thread's sums of a choice are neighbouring columns of the output: it stores them as
// they are, 4 bytes of activations, 8 of down's rows.
//
// budget: product_kernel registers<=168 shared<=0 hot sass=HGMMA
#include <bf16x8.h>

#include "moe_experts_prefill_claims.h"

namespace tokenspeed {
namespace {

using namespace expert_prefill;
using namespace expert_prefill::claims;

constexpr int kLeastColumns = 64;                             // of a product: fewer choices cost as much
constexpr int kUnitRows = 64;                                 // of weights: those of one product
constexpr int kUnits = kTileRows / kUnitRows / kBlockGroups;  // of a warpgroup: gate and up, or two of down
constexpr int kLanePlaces = kStageChoices / 32;               // of a tile's choices, that a lane looks up

using Sum = float[kUnits][kStageChoices / 2];

// sum = the warpgroup's weight rows x the first kColumns choices of a tile, all its depth.
template <bool kGateUp, int kColumns>
__device__ __forceinline__ void multiply(Sum& sum, Storage& storage, Cursor& at, int stages) {
    const int group = threadIdx.x / kGroupThreads - 1;
    int before = -1;  // the slot whose products may still run
    for (int s = 0; s < stages; ++s) {
        ptx::mbarrier_wait(&storage.full[at.slot], at.phase);
        // The choices that threads copied: the matrix unit must be let see them.
        if (kGateUp) ptx::fence_async_shared();
        const uint32_t choices = ptx::shared_address(storage.choices[at.slot]);
        const uint32_t weights = ptx::shared_address(storage.weights[at.slot]) + group * kUnitRows * kRowBytes;
        ptx::wgmma_fence(sum[0], sum[1]);
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k) {
                ptx::wgmma<__nv_bfloat16, kColumns>(sum[unit],
                                                    operand(weights + unit * kBlockGroups * kUnitRows * kRowBytes, k),
                                                    operand(choices, k), s > 0 || k > 0);
            }
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<1>();
        if (before >= 0) release<1>(storage, before);
        before = at.slot;
        at.next(kStages);
    }
    ptx::wgmma_wait<0>(sum[0], sum[1]);
    release<1>(storage, before);
}

// The same with as few columns as hold `count` choices.
template <bool kGateUp, int kColumns = kStageChoices>
__device__ __forceinline__ void multiply_choices(Sum& sum, Storage& storage, Cursor& at, int stages, int count) {
    if constexpr (kColumns > kLeastColumns) {
        if (count <= kColumns - 16) return multiply_choices<kGateUp, kColumns - 16>(sum, storage, at, stages, count);
    }
    multiply<kGateUp, kColumns>(sum, storage, at, stages);
}

struct Alone {
    static constexpr int kBlocks = 1, kTileChoices = kStageChoices;

    // All tiles but the last are alike, of whole products' columns.
    static __device__ int begin(int choices, int i, int tiles) {
        const int sixteens = (choices + 15) / 16;
        return min(i * ((sixteens + tiles - 1) / tiles * 16), choices);
    }

    struct Spans {
        Span first, last;
        __device__ explicit Spans(const Tile& tile)
            : first(tile.choices), last{tile.choices.begin + kBlockGroups * kGroupChoices, tile.choices.end} {}
    };

    template <bool kGateUp>
    class Load {
      public:
        __device__ Load(const Tile& tile, int columns) : choices_(tile.choices) {
            const int column = tile.column_tile * Product<kGateUp>::kTileColumns;
            run_ = kGateUp ? column / 16 : (tile.expert * columns + column) / 32;
            kind_ = kGateUp ? 2 * tile.expert : 0;
        }

        __device__ void operator()(Storage& storage, int slot, int depth, const CUtensorMap& weights,
                                   const CUtensorMap& activations) const {
            uint64_t* full = &storage.full[slot];
            const int boxes = kGateUp ? 0 : choices_.boxes();
            ptx::mbarrier_arrive_expect_tx(full, kWeightBytes + boxes * kBoxBytes);
            ptx::tma_load<5>(storage.weights[slot], &weights, full, {depth, 0, 0, run_, kind_});
#pragma unroll 1
            for (int box = 0; box < boxes; ++box) {
                ptx::tma_load<2>(storage.choices[slot] + box * kBoxBytes, &activations, full,
                                 {depth, choices_.begin + box * kBoxChoices});
            }
        }

      private:
        Span choices_;
        int run_, kind_;
    };

    template <bool kGateUp>
    static __device__ __forceinline__ void multiply_tiles(Storage& storage, const Bf16Prefill& a) {
        using P = Product<kGateUp>;
        const MoeExperts& p = a.p;
        const int group = threadIdx.x / kGroupThreads - 1, warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
        const int stages = P::depth(p) / kDepth, columns = P::columns(p);
        Cursor at;
        for (int turn = 0;; ++turn) {
            ptx::mbarrier_wait(&storage.full[at.slot], at.phase);
            const Tile tile = storage.tiles[turn % kStages];
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
            multiply_choices<kGateUp>(sum, storage, at, stages, count);
            // The thread has two columns of activations or four of down from here on.
            constexpr int kUnitColumns = P::kTileColumns / kBlockGroups, kThreadColumns = kUnitColumns / 32;
            const int column =
                tile.column_tile * P::kTileColumns + group * kUnitColumns + (warp * 8 + lane / 4) * kThreadColumns;
            __nv_bfloat16* output = (kGateUp ? a.activations + int64_t{first} * columns : a.rows) + column;
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
                   const __grid_constant__ Bf16Prefill a) {
    DYNAMIC_SHARED(raw);
    run<Alone, kGateUp>(*reinterpret_cast<Storage*>(raw), a, weights, activations);
}

// Rows r and r + 8 of each 16 of a product are in one thread. Of gate and of up they are neighbours; of down, each 32
// columns are 16 rows of the first unit and 16 of the second, of whose four in a thread each has two neighbours.
TensorLayout<5> layout_of_gate_up(const MoeExperts& p) {
    const auto depth = static_cast<uint64_t>(p.hidden), columns = static_cast<uint64_t>(p.width);
    return {.base = p.gate_up,
            .sizes = {depth, 8, 2, columns / 16, 2 * static_cast<uint64_t>(p.experts)},
            .strides = {2, 2 * depth * 2, depth * 2, 16 * depth * 2, columns * depth * 2},
            .box = {kDepth, 8, 2, 8, 2}};
}

TensorLayout<5> layout_of_down(const MoeExperts& p) {
    const auto depth = static_cast<uint64_t>(p.width), columns = static_cast<uint64_t>(p.hidden);
    return {.base = p.down,
            .sizes = {depth, 8, 2, static_cast<uint64_t>(p.experts) * columns / 32, 2},
            .strides = {2, 4 * depth * 2, depth * 2, 32 * depth * 2, 2 * depth * 2},
            .box = {kDepth, 8, 2, 8, 2}};
}

}  // namespace

cudaError_t expert_prefill::products_alone(const Bf16Prefill& a, int blocks, cudaStream_t stream) {
    const cudaError_t status = launch_product(product_kernel<true>, 1, blocks, layout_of_gate_up(a.p), a, stream);
    if (status != cudaSuccess) return status;
    return launch_product(product_kernel<false>, 1, blocks, layout_of_down(a.p), a, stream);
}

}  // namespace tokenspeed
