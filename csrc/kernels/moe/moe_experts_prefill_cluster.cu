// The two grouped products of a bf16 prefill of the experts (moe_experts_prefill.cu has the whole) by clusters of two
// blocks that share weights: fewer bytes from L2, for which several groups of choices an expert pay.
// moe_experts_prefill_claims.h has what they share with blocks that work alone; docs/kernels/moe_prefill.md counts the
// bytes and has what was measured, tried and lost.
//
// A tile is a cluster's: up to five groups of 64 choices of one expert x 256 weight rows. Each block copies half of the
// weights to both, by multicast, and multiplies two groups with all of them, a warpgroup each, m64n256k16. A fifth
// group, or a third or an only one, is the cluster's: each of its four warpgroups multiplies it with a quarter of the
// weight rows, m64n64k16. So both blocks have the same to do, and the matrix unit does an expert's choices rounded up
// to 64.
//
// Weight rows lie in shared memory in the order in which a thread's sums are eight neighbouring columns of a row of the
// output: it stores them as they are, 16 bytes at a time.
//
// budget: product_kernel registers<=168 shared<=0 hot sass=HGMMA
#include <bf16x8.h>

#include "moe_experts_prefill_claims.h"

namespace tokenspeed {
namespace {

using namespace expert_prefill;
using namespace expert_prefill::claims;

using Stages = Storage<kStageChoices>;
constexpr int kStageDepth = kRowBytes / sizeof(__nv_bfloat16);
constexpr int kBoxBytes = kBoxChoices * kRowBytes;

constexpr uint16_t kBothBlocks = 3;
constexpr int kOwnGroups = kBlockGroups * kClusterBlocks;  // of a tile, beside the one that is both blocks'
constexpr int kHalfBytes = kWeightBytes / kClusterBlocks;  // of weights that a block copies, to both
constexpr int kUnitRows = kTileRows / kOwnGroups;          // of weights: a warpgroup's share in the cluster's group
constexpr int kRun = 32;  // weight rows among which a thread finds eight neighbouring columns of the output

__device__ __forceinline__ int groups_of(int choices) {
    return (choices + kGroupChoices - 1) / kGroupChoices;
}

__device__ __forceinline__ int groups_of(const Tile& tile) {
    return groups_of(tile.choices.end - tile.choices.begin);
}

// What this block multiplies by itself, up to a group for each warpgroup.
__device__ __forceinline__ Span own_of(const Tile& tile) {
    const Span all = tile.choices;
    const int each = groups_of(tile) / kClusterBlocks;
    const int first = all.begin + static_cast<int>(ptx::cluster_rank()) * each * kGroupChoices;
    return {min(first, all.end), min(first + each * kGroupChoices, all.end)};
}

// The odd group that both blocks multiply, or nothing.
__device__ __forceinline__ Span shared_of(const Tile& tile) {
    const int even = groups_of(tile) / kClusterBlocks * kClusterBlocks;
    return {min(tile.choices.begin + even * kGroupChoices, tile.choices.end), tile.choices.end};
}

// The 16-byte pieces of kUnitRows weight rows in a thread's sums, at `columns` of the output's row of `place` (the
// thread's two, negative to leave it out). Eight neighbouring columns of a row lie in each thread of a quad: that is
// the order of weight rows in shared memory.
template <bool kGateUp>
__device__ __forceinline__ void store_unit(const float* sum, __nv_bfloat16* output, const int (&place)[2], int columns,
                                           int unit_column) {
    constexpr int kRunSums = kRun / 2;
    const auto value = [&](int i) {
        if constexpr (kGateUp) {
            return silu(sum[i]) * sum[i + kRunSums];
        } else {
            return sum[i];
        }
    };
#pragma unroll
    for (int run = 0; run < kUnitRows / Product<kGateUp>::kKinds / kRun; ++run) {
        const int column = unit_column + run * kRun;
        if (column >= columns) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            uint32_t words[4];
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                const int at = run * kRunSums + w % 2 * 8 + w / 2 + 2 * i;
                words[w] = pack<__nv_bfloat16>(value(at), value(at + 4));
            }
            if (place[i] < 0) continue;
            __nv_bfloat16* to = output + int64_t{place[i]} * columns + column + threadIdx.x % 4 * 8;
            ptx::store_16(to, make_uint4(words[0], words[1], words[2], words[3]));
        }
    }
}

struct Cluster {
    using Element = __nv_bfloat16;
    using Storage = Stages;
    static constexpr int kGathered = kStageChoices, kBoxChoices = expert_prefill::kBoxChoices;
    static constexpr int kMultiplyRegisters = 224, kCopyRegisters = 56;
    template <bool kGateUp>
    using Scales = NoScales;
    static constexpr int kBlocks = kClusterBlocks, kTileChoices = (kOwnGroups + 1) * kGroupChoices;

    // A whole tile has an even number of groups where that makes no more tiles: what is shared is gathered twice.
    static __device__ int begin(int choices, int i, int tiles) {
        if (i == tiles) return choices;
        const int groups = groups_of(choices);
        return (groups <= kOwnGroups * tiles + 1 ? kOwnGroups * i : i * groups / tiles) * kGroupChoices;
    }

    struct Spans {
        Span first, last;
        __device__ explicit Spans(const Tile& tile) : first(own_of(tile)), last(shared_of(tile)) {}
    };

    template <bool kGateUp>
    class Load {
        using P = Product<kGateUp>;

      public:
        __device__ Load(const Tile& tile, int columns)
            : own_(own_of(tile)), shared_(shared_of(tile)), rank_(static_cast<int>(ptx::cluster_rank())) {
            both_ = groups_of(tile) > 1;
            const int half = tile.column_tile * kBlocks + rank_;
            run_ = (tile.expert * P::kKinds * columns + half * (P::kTileColumns / kBlocks)) / kRun;
        }

        __device__ void operator()(Stages& storage, int slot, int depth, const CUtensorMap& weights,
                                   const CUtensorMap& activations) const {
            uint64_t* full = &storage.ring.full[slot];
            uint8_t* choices = storage.choices[slot];
            const int own_boxes = kGateUp ? 0 : own_.boxes(kBoxChoices),
                      shared_boxes = kGateUp ? 0 : shared_.boxes(kBoxChoices);
            ptx::mbarrier_arrive_expect_tx(full,
                                           (both_ ? kBlocks : 1) * kHalfBytes + (own_boxes + shared_boxes) * kBoxBytes);
            ptx::tma_load_multicast<5>(storage.weights[slot] + rank_ * kHalfBytes, &weights, full,
                                       {depth, 0, 0, 0, run_},
                                       both_ ? kBothBlocks : static_cast<uint16_t>(1u << rank_));
#pragma unroll 1
            for (int box = 0; box < own_boxes; ++box) {
                ptx::tma_load<2>(choices + box * kBoxBytes, &activations, full,
                                 {depth, own_.begin + box * kBoxChoices});
            }
            if (rank_ < shared_boxes) {  // a box of each block, to both
                ptx::tma_load_multicast<2>(choices + kBlockGroups * kGroupBytes + rank_ * kBoxBytes, &activations, full,
                                           {depth, shared_.begin + rank_ * kBoxChoices}, kBothBlocks);
            }
        }

      private:
        Span own_, shared_;
        int rank_, run_;
        bool both_;  // of an only group each block needs its own half of the weights alone
    };

    // By a warpgroup: its group of every tile's choices times all of the tile's weights, the cluster's group times a
    // unit, and the stores.
    template <bool kGateUp>
    static __device__ __forceinline__ void multiply_tiles(Stages& storage, const Prefill& a) {
        using P = Product<kGateUp>;
        const MoeExperts& p = a.p;
        const int group = multiplying_group(), lane = threadIdx.x % 32;
        const int unit = static_cast<int>(ptx::cluster_rank()) * kBlockGroups + group;
        constexpr int kUnitColumns = kUnitRows / P::kKinds;
        const int stages = P::depth(p) / kStageDepth, columns = P::columns(p);
        Cursor at;
        for (int turn = 0;; ++turn) {
            ptx::mbarrier_wait(&storage.ring.full[at.slot], at.phase);
            const Tile tile = storage.ring.tiles[turn % kStages];
            if (tile.expert < 0) return;
            const Span spans[2] = {own_of(tile), shared_of(tile)};
            const int begins[2] = {spans[0].begin + group * kGroupChoices, spans[1].begin};
            const bool has_own = begins[0] < spans[0].end, has_shared = begins[1] < spans[1].end;
            int place[2][2];  // of the thread's rows in the output; negative past the end
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int choice = begins[i / 2] + threadIdx.x % kGroupThreads / 32 * 16 + lane / 4 + i % 2 * 8;
                place[i / 2][i % 2] = choice >= spans[i / 2].end ? -1 : kGateUp ? choice : p.order[choice];
            }
            float own[kTileRows / 2], shared[kUnitRows / 2];
            int before = -1;  // the slot whose products may still run
            for (int s = 0; s < stages; ++s) {
                ptx::mbarrier_wait(&storage.ring.full[at.slot], at.phase);
                // The choices that threads copied: the matrix unit must be let see them.
                if (kGateUp) ptx::fence_async_shared();
                const uint32_t choices = ptx::shared_address(storage.choices[at.slot]);
                const uint32_t weights = ptx::shared_address(storage.weights[at.slot]);
                // The own group's products come last: one group of them may run on below.
                if (has_shared) {
                    ptx::wgmma_fence(shared);
#pragma unroll
                    for (int k = 0; k < kStageDepth / 16; ++k) {
                        ptx::wgmma<__nv_bfloat16, kUnitRows>(shared, operand(choices + kBlockGroups * kGroupBytes, k),
                                                             operand(weights + unit * kUnitRows * kRowBytes, k),
                                                             s > 0 || k > 0);
                    }
                    ptx::wgmma_commit();
                }
                if (has_own) {
                    ptx::wgmma_fence(own);
#pragma unroll
                    for (int k = 0; k < kStageDepth / 16; ++k) {
                        ptx::wgmma<__nv_bfloat16, kTileRows>(own, operand(choices + group * kGroupBytes, k),
                                                             operand(weights, k), s > 0 || k > 0);
                    }
                    ptx::wgmma_commit();
                }
                ptx::wgmma_wait<1>();
                if (before >= 0) release<kClusterBlocks>(storage.ring, before);
                before = at.slot;
                at.next(kStages);
            }
            ptx::wgmma_wait<0>(own, shared);
            release<kClusterBlocks>(storage.ring, before);
            auto* output = kGateUp ? static_cast<__nv_bfloat16*>(a.activations) : a.rows;
            const int column = tile.column_tile * P::kTileColumns;
            if (has_own) {
#pragma unroll
                for (int i = 0; i < kOwnGroups; ++i) {
                    store_unit<kGateUp>(own + i * (kUnitRows / 2), output, place[0], columns,
                                        column + i * kUnitColumns);
                }
            }
            if (has_shared) {
                store_unit<kGateUp>(shared, output, place[1], columns, column + unit * kUnitColumns);
            }
        }
    }
};

template <bool kGateUp>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap activations,
                   const __grid_constant__ Prefill a) {
    DYNAMIC_SHARED(raw);
    run<Cluster, kGateUp>(*reinterpret_cast<Stages*>(raw), a, weights, activations);
}

// Of weights [experts, kinds, columns, depth]: of each kRun rows, eight of every fourth. Column i of a lane t's pair in
// the j-th eight columns of a product is column 8 t + 4 i + j of the run. Then from gate to up, and to the next run.
template <bool kGateUp>
TensorLayout<5> layout(const MoeExperts& p) {
    using P = Product<kGateUp>;
    constexpr uint32_t kKinds = P::kKinds;
    const auto depth = static_cast<uint64_t>(P::depth(p)), columns = static_cast<uint64_t>(P::columns(p));
    const uint64_t runs = (kKinds * static_cast<uint64_t>(p.experts) - (kKinds - 1)) * columns / kRun;
    return {.base = kGateUp ? p.gate_up : p.down,
            .sizes = {depth, 8, 4, kKinds, runs},
            .strides = {2, 4 * depth * 2, depth * 2, columns * depth * 2, kRun * depth * 2},
            .box = {kStageDepth, 8, 4, kKinds, kTileRows / kClusterBlocks / kRun / kKinds}};
}

}  // namespace

cudaError_t expert_prefill::products_in_clusters(const Prefill& a, int clusters, cudaStream_t stream) {
    const cudaError_t status = launch_product<Cluster>(product_kernel<true>, clusters, layout<true>(a.p), a, stream);
    if (status != cudaSuccess) return status;
    return launch_product<Cluster>(product_kernel<false>, clusters, layout<false>(a.p), a, stream);
}

}  // namespace tokenspeed
