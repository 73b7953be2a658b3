// Grouped products whose rows are weights and whose columns are choices: what bf16 (moe_experts_prefill_alone.cu) and
// e4m3 (moe_experts_prefill_fp8.cu) share of that form of moe_experts_prefill_claims.h.
//
// A warpgroup multiplies 128 of the tile's 256 weight rows, two units of m64, with all choices of its block rounded up
// to 16, of which the matrix unit does no more. An expert's choices are spread over as many tiles as they need. In a
// cluster each block has its own choices, and copies half of the weights, to both.
//
// Weight rows lie in shared memory in the order in which a thread's sums of a choice are neighbouring columns of the
// output: two of activations, four of down's rows.
#pragma once
#include <type_traits>

#include "moe_experts_prefill_claims.h"

namespace tokenspeed::expert_prefill::claims {

constexpr int kUnitRows = 64;                                 // of weights: those of one product
constexpr int kUnits = kTileRows / kUnitRows / kBlockGroups;  // of a warpgroup: gate and up, or two of down

// Calls multiply(n) with the least n that holds `count` choices, a std::integral_constant, of kLeast, kLeast + 16, ..
// kMost.
template <int kLeast, int kMost, typename Multiply>
__device__ __forceinline__ void with_columns(int count, Multiply multiply) {
    if constexpr (kMost > kLeast) {
        if (count <= kMost - 16) return with_columns<kLeast, kMost - 16>(count, multiply);
    }
    multiply(std::integral_constant<int, kMost>());
}

// The shared address of the warpgroup's rows of a unit of the weights in a slot.
__device__ __forceinline__ uint32_t unit_of(const uint8_t* weights, int group, int unit) {
    return ptx::shared_address(weights) + (unit * kBlockGroups + group) * kUnitRows * kRowBytes;
}

// kMost: choices of a block.
template <typename E, int kTileBlocks, int kMost, int kBox>
struct Columns {
    using Element = E;
    static constexpr int kBlocks = kTileBlocks, kTileChoices = kMost * kBlocks, kGathered = kMost, kBoxChoices = kBox;

    static __device__ int rank() { return kBlocks == 1 ? 0 : static_cast<int>(ptx::cluster_rank()); }

    // The i-th of so many shares: all but the last are alike, of whole products' columns.
    static __device__ int begin(int choices, int i, int shares) {
        const int sixteens = (choices + 15) / 16;
        return min(i * ((sixteens + shares - 1) / shares * 16), choices);
    }

    // What the block multiplies of a tile.
    static __device__ Span own_of(const Tile& tile) {
        const int first = tile.choices.begin, count = tile.choices.end - first;
        return {first + begin(count, rank(), kBlocks), first + begin(count, rank() + 1, kBlocks)};
    }

    struct Spans {
        Span first, last;
        __device__ explicit Spans(const Tile& tile) : first(own_of(tile)) {
            last = {first.begin + kBlockGroups * kGroupChoices, first.end};
        }
    };

    template <bool kGateUp>
    class Load {
        using P = Product<kGateUp>;

      public:
        __device__ Load(const Tile& tile, int columns) : choices_(own_of(tile)) {
            const int column = tile.column_tile * P::kTileColumns;
            run_ = kGateUp ? column / 16 : (tile.expert * columns + column) / 32;
            kind_ = kGateUp ? 2 * tile.expert : 0;
        }

        template <typename Storage>
        __device__ void operator()(Storage& storage, int slot, int depth, const CUtensorMap& weights,
                                   const CUtensorMap& activations) const {
            constexpr int kBoxBytes = kBoxChoices * kRowBytes;
            uint64_t* full = &storage.ring.full[slot];
            ptx::mbarrier_arrive_expect_tx(full,
                                           kWeightBytes + (kGateUp ? 0 : choices_.boxes(kBoxChoices) * kBoxBytes));
            if constexpr (kBlocks == 1) {
                ptx::tma_load<5>(storage.weights[slot], &weights, full, {depth, 0, 0, run_, kind_});
            } else {
                const int half = rank();
                ptx::tma_load_multicast<5>(storage.weights[slot] + half * (kWeightBytes / kBlocks), &weights, full,
                                           {depth, 0, 0, run_, kind_ + half}, (1 << kBlocks) - 1);
            }
            if (kGateUp) return;
            uint8_t* to = storage.choices[slot];
#pragma unroll 1
            for (int choice = choices_.begin; choice < choices_.end; choice += kBoxChoices, to += kBoxBytes) {
                ptx::tma_load<2>(to, &activations, full, {depth, choice});
            }
        }

        __device__ const Span& choices() const { return choices_; }

      private:
        Span choices_;
        int run_, kind_;
    };
};

// Rows r and r + 8 of each 16 of a product are in one thread. Of gate and of up they are neighbours; of down, each 32
// columns are 16 rows of the first unit and 16 of the second, of whose four in a thread each has two neighbours. The
// last size is what a cluster's blocks halve.
template <typename Form, bool kGateUp>
TensorLayout<5> layout(const MoeExperts& p) {
    using P = Product<kGateUp>;
    constexpr uint64_t kBytes = sizeof(typename Form::Element);
    const auto experts = static_cast<uint64_t>(p.experts), columns = static_cast<uint64_t>(P::columns(p));
    const uint64_t depth = static_cast<uint64_t>(P::depth(p)), row = depth * kBytes;
    const uint64_t runs = kGateUp ? columns / 16 : experts * columns / 32, last = kGateUp ? 2 * experts : 2;
    return {.base = kGateUp ? p.gate_up : p.down,
            .sizes = {depth, 8, 2, runs, last},
            .strides = {kBytes, (kGateUp ? 2 : 4) * row, row, (kGateUp ? 16 : 32) * row, (kGateUp ? columns : 2) * row},
            .box = {kDepth<Form>, 8, 2, 8, kUnits / Form::kBlocks}};
}

template <typename Form>
cudaError_t launch_products(Kernel gate_up, Kernel down, const Prefill& a, int takers, cudaStream_t stream) {
    const cudaError_t status = launch_product<Form>(gate_up, takers, layout<Form, true>(a.p), a, stream);
    if (status != cudaSuccess) return status;
    return launch_product<Form>(down, takers, layout<Form, false>(a.p), a, stream);
}

}  // namespace tokenspeed::expert_prefill::claims
