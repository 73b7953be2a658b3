// What moe_experts_prefill.cu and moe_experts_prefill_fp8.cu share: the tiles of a cluster of two blocks and their order,
// the ring in shared memory and who fills it, the last launch. A stage is 128 bytes of each row: 64 columns of bf16, 128
// of e4m3.
//
// kGroups: groups of 64 choices of a block's tile, which is 2, a warpgroup each, or 3: then an odd group of the
// cluster's is both blocks'.
#pragma once
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>

#include "kernels.h"

namespace tokenspeed::expert_prefill {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 384;  // warpgroup 0 copies, 1 and 2 multiply
constexpr int kGroupThreads = 128;
constexpr int kBlocks = 2;  // of a cluster
constexpr uint16_t kBothBlocks = 3;
constexpr int kGroupChoices = 64;
constexpr int kOwnGroups = 2 * kBlocks;  // of a cluster's tile: one of each warpgroup that multiplies
constexpr int kTileRows = 256;           // of weights
constexpr int kStages = 4;
constexpr int kRowBytes = 128;  // of a stage: what a row of a swizzled tile has
constexpr int kGroupBytes = kGroupChoices * kRowBytes;
constexpr int kHalfBytes = kTileRows / kBlocks * kRowBytes;  // of weights that a block copies, to both
constexpr int kBoxChoices = kGroupChoices / kBlocks;         // that TMA brings at once
constexpr int kBoxBytes = kBoxChoices * kRowBytes;
constexpr int kMaxExperts = 512;

template <int kGroups>
struct Storage {  // of dynamic shared memory
    uint8_t choices[kStages][kGroups * kGroupBytes];
    uint8_t weights[kStages][kBlocks * kHalfBytes];  // block i copies half i
    uint64_t full[kStages], empty[kStages];
    int tiles_before[kMaxExperts + 1];  // tiles of choices of lower experts; the total past the last expert
    int warp_total[kThreads / 32];
};

__device__ __forceinline__ int groups_of(int choices) {
    return (choices + kGroupChoices - 1) / kGroupChoices;
}

struct Span {  // of positions in `order`
    int begin, end;
};

// Of a cluster.
template <int kGroups>
struct Tile {
    Span choices;
    int expert, column_tile;

    __device__ int groups() const { return groups_of(choices.end - choices.begin); }

    // What this block multiplies by itself, up to a group for each warpgroup.
    __device__ Span own() const {
        constexpr int kShared = kGroups - kOwnGroups / kBlocks;
        const int first = (groups() + 1 - kShared) / kBlocks, both = first + groups() / kBlocks;
        const int middle = min(choices.begin + first * kGroupChoices, choices.end);
        if (ptx::cluster_rank() == 0) return {choices.begin, middle};
        return {middle, min(choices.begin + both * kGroupChoices, choices.end)};
    }

    // The odd group that both blocks multiply, or nothing.
    __device__ Span shared() const {
        const int even = groups() / kBlocks * kBlocks;
        return {min(choices.begin + even * kGroupChoices, choices.end), choices.end};
    }
};

// All tiles of one product, this cluster's in order.
template <int kGroups>
class Tiles {
  public:
    // The most groups of a cluster's tile.
    static constexpr int kTileGroups = kOwnGroups + kGroups - kOwnGroups / kBlocks;

    __device__ Tiles(const Storage<kGroups>& storage, const int32_t* offsets, int columns, int tile_columns)
        : storage_(storage), offsets_(offsets), column_tiles_((columns + tile_columns - 1) / tile_columns) {}

    __device__ static int first() { return static_cast<int>(blockIdx.x) / kBlocks; }
    __device__ static int next(int index) { return index + static_cast<int>(gridDim.x) / kBlocks; }
    __device__ bool holds(int index) const { return index < storage_.tiles_before[kMaxExperts] * column_tiles_; }

    // Called by a whole warp.
    __device__ Tile<kGroups> find(int index) const {
        constexpr int kStride = kMaxExperts / 32;
        const int lane = threadIdx.x % 32;
        const int* before = storage_.tiles_before;
        const int coarse = __popc(__ballot_sync(kAllLanes, before[lane * kStride] * column_tiles_ <= index)) - 1;
        const int* part = before + coarse * kStride + 1;
        const int within = __popc(__ballot_sync(kAllLanes, lane < kStride - 1 && part[lane] * column_tiles_ <= index));
        const int expert = coarse * kStride + within;
        const int local = index - before[expert] * column_tiles_, tiles = before[expert + 1] - before[expert];
        const Span all{offsets_[expert], offsets_[expert + 1]};
        const int groups = groups_of(all.end - all.begin);
        // A whole tile has an even number of groups where that makes no more tiles: what is shared is gathered twice.
        const auto begin = [&](int tile) {
            if (tile == tiles) return all.end;
            return all.begin +
                   (groups <= kOwnGroups * tiles + 1 ? kOwnGroups * tile : tile * groups / tiles) * kGroupChoices;
        };
        return {{begin(local % tiles), begin(local % tiles + 1)}, expert, local / tiles};
    }

  private:
    const Storage<kGroups>& storage_;
    const int32_t* offsets_;
    int column_tiles_;
};

// Fills tiles_before and starts the barriers. Called by the whole cluster; ends with its barrier.
template <int kGroups>
__device__ void prepare(Storage<kGroups>& storage, const int32_t* offsets, int experts, int full_arrivals) {
    constexpr int kShare = kMaxExperts / kThreads + 1, kTileGroups = Tiles<kGroups>::kTileGroups;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, first = static_cast<int>(threadIdx.x) * kShare;
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(&storage.full[i], full_arrivals);
            ptx::mbarrier_init(&storage.empty[i], kBlocks * (kThreads - kGroupThreads) / 32);  // warps that multiply
        }
        ptx::fence_mbarrier_init();
    }
    int tiles[kShare], mine = 0;
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        const int choices = first + i < experts ? offsets[first + i + 1] - offsets[first + i] : 0;
        tiles[i] = (groups_of(choices) + kTileGroups - 1) / kTileGroups;
        mine += tiles[i];
    }
    int through = mine;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(kAllLanes, through, distance);
        if (lane >= distance) through += other;
    }
    if (lane == 31) storage.warp_total[warp] = through;
    __syncthreads();
    int before = through - mine;
    for (int w = 0; w < warp; ++w) before += storage.warp_total[w];
#pragma unroll
    for (int i = 0; i < kShare; ++i) {
        if (first + i <= kMaxExperts) storage.tiles_before[first + i] = before;
        before += tiles[i];
    }
    ptx::cluster_sync();
}

// A place in the ring and the parity of its phase.
struct Cursor {
    int slot = 0;
    uint32_t phase = 0;

    __device__ void next() {
        if (++slot == kStages) slot = 0, phase ^= 1;
    }
};

// By a warp that has read a slot. It has but read what will be overwritten: no fence, here or where a slot is waited for.
template <int kGroups>
__device__ __forceinline__ void release(Storage<kGroups>& storage, int slot) {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < kBlocks) ptx::mbarrier_arrive_cluster_relaxed(&storage.empty[slot], lane);
}

// By one thread: its block's half of a stage of weights, by load_half(to, full, tile, stage, mask), to both blocks; where
// they share one group, each needs its own half alone. Announces `other_bytes` more on the barrier.
template <int kGroups, typename LoadHalf>
__device__ __forceinline__ void load_weights(Storage<kGroups>& storage, const Tile<kGroups>& tile, int slot, int stage,
                                             uint32_t other_bytes, LoadHalf load_half) {
    const bool both = kGroups == kOwnGroups / kBlocks || tile.groups() > 1;
    const uint32_t rank = ptx::cluster_rank();
    ptx::mbarrier_arrive_expect_tx(&storage.full[slot], (both ? kBlocks : 1) * kHalfBytes + other_bytes);
    load_half(storage.weights[slot] + rank * kHalfBytes, &storage.full[slot], tile, stage,
              both ? kBothBlocks : static_cast<uint16_t>(1u << rank));
}

// The rows that a warp gathers of a tile: of every 16 choices four, of each of which a lane has a piece of 16 bytes. A
// lane looks up the choice of every 32nd of these rows.
template <int kGroups>
struct Gather {
    static constexpr int kRows = kGroups * kGroupChoices / 16;  // of a lane
    static constexpr int kLookups = (kRows * 4 + 31) / 32;
    int choice[kLookups];  // token * top_k + rank; negative past a group's end

    __device__ Gather(const MoeExperts& p, const Tile<kGroups>& tile) {
        const Span own = tile.own(), shared = tile.shared();
#pragma unroll
        for (int i = 0; i < kLookups; ++i) {
            const int row = (i * 32 + threadIdx.x % 32) / 4 * 16 + threadIdx.x / 32 * 4 + threadIdx.x % 4;
            constexpr int kOwn = kOwnGroups / kBlocks * kGroupChoices;
            const int at = row < kOwn ? own.begin + row : shared.begin + row - kOwn;
            const int end = row < kOwn ? own.end : row < kGroups * kGroupChoices ? shared.end : 0;
            choice[i] = at < end ? p.order[at] : -1;
        }
    }

    // sources[i]: of this lane's row i, how many pieces behind the first row it begins; kNone to leave it out.
    static constexpr uint32_t kNone = ~0u;
    __device__ void find(uint32_t (&sources)[kRows], int top_k, uint32_t row_pieces) const {
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
            const int known = choice[i * 4 / 32];
            const uint32_t source = known >= 0 ? static_cast<uint32_t>(known / top_k) * row_pieces : kNone;
            sources[i] = __shfl_sync(kAllLanes, source, i * 4 % 32 + threadIdx.x % 32 / 8);
        }
    }
};

// Copies by warpgroup 0: weights by TMA, rows of tokens, `row_pieces` pieces each, by cp.async into the layout that TMA
// would have made. Rows past the end keep what they held: they reach no row of the output but their own.
template <int kGroups, typename LoadHalf>
__device__ __forceinline__ void copy_gathered(Storage<kGroups>& storage, const MoeExperts& p,
                                              const Tiles<kGroups>& tiles, const void* rows, uint32_t row_pieces,
                                              int stages, LoadHalf load_half) {
    using G = Gather<kGroups>;
    if (!tiles.holds(tiles.first())) return;
    const int piece = threadIdx.x % 8, row = threadIdx.x / 8;
    Cursor at;
    Tile<kGroups> tile = tiles.find(tiles.first());
    G gather(p, tile);
    for (int index = tiles.first(); tiles.holds(index); index = tiles.next(index)) {
        uint32_t sources[G::kRows];
        gather.find(sources, p.top_k, row_pieces);
        const Tile<kGroups> current = tile;
        if (tiles.holds(tiles.next(index))) {  // the next tile's choices arrive while this one is copied
            tile = tiles.find(tiles.next(index));
            gather = G(p, tile);
        }
#pragma unroll 1
        for (int s = 0; s < stages; ++s) {
            ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
            if (threadIdx.x == 0) load_weights(storage, current, at.slot, s, 0, load_half);
            const auto* from = static_cast<const uint4*>(rows) + s * (kRowBytes / 16) + piece;
            uint8_t* to = storage.choices[at.slot] + row * kRowBytes + (piece ^ row % 8) * 16;
#pragma unroll
            for (int i = 0; i < G::kRows; ++i) {
                if (sources[i] != G::kNone) ptx::cp_async(to + i * 16 * kRowBytes, from + sources[i]);
            }
            ptx::cp_async_mbarrier_arrive(&storage.full[at.slot]);
            at.next();
        }
    }
}

// Copies by one warp: both operands by TMA, `depth` columns a stage, of the cluster's group each block a box to both.
// Rows past the end of a group are the next expert's, or stay what they were.
template <int kGroups, typename LoadHalf>
__device__ __forceinline__ void copy_activations(Storage<kGroups>& storage, const Tiles<kGroups>& tiles,
                                                 const CUtensorMap& activations, int depth, int stages,
                                                 LoadHalf load_half) {
    const int rank = static_cast<int>(ptx::cluster_rank());
    Cursor at;
    for (int index = tiles.first(); tiles.holds(index); index = tiles.next(index)) {
        const Tile<kGroups> tile = tiles.find(index);
        if (threadIdx.x != 0) continue;
        const Span own = tile.own(), shared = tile.shared();
        const bool has_shared = kGroups > kOwnGroups / kBlocks;
        const auto boxes_of = [](const Span& span) { return (span.end - span.begin + kBoxChoices - 1) / kBoxChoices; };
        const int own_boxes = boxes_of(own), shared_boxes = has_shared ? boxes_of(shared) : 0;
#pragma unroll 1
        for (int s = 0; s < stages; ++s) {
            ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
            uint64_t* full = &storage.full[at.slot];
            load_weights(storage, tile, at.slot, s, (own_boxes + shared_boxes) * kBoxBytes, load_half);
            uint8_t* to = storage.choices[at.slot];
#pragma unroll 1
            for (int box = 0; box < own_boxes; ++box) {
                ptx::tma_load<2>(to + box * kBoxBytes, &activations, full, {s * depth, own.begin + box * kBoxChoices});
            }
            if (rank < shared_boxes) {
                ptx::tma_load_multicast<2>(to + kOwnGroups / kBlocks * kGroupBytes + rank * kBoxBytes, &activations,
                                           full, {s * depth, shared.begin + rank * kBoxChoices}, kBothBlocks);
            }
            at.next();
        }
    }
}

// The launch of a product, but for its shared memory.
inline LaunchConfig product_config(size_t shared_bytes, cudaStream_t stream) {
    const int clusters = multiprocessor_count() / kBlocks;
    return {.grid = dim3(static_cast<unsigned>((clusters > 0 ? clusters : 1) * kBlocks)),
            .block = dim3(kThreads),
            .shared_bytes = shared_bytes,
            .stream = stream,
            .cluster = dim3(kBlocks),
            .programmatic = true};
}

// The sum of each token's rows, [choices, hidden] by token and rank, in order of rank, with its weights: the last
// launch.
cudaError_t sum_ranks(const MoeExperts& p, const __nv_bfloat16* rows, cudaStream_t stream);

}  // namespace tokenspeed::expert_prefill
