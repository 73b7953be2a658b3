// What the two forms of the grouped products in bf16 share: tiles that are claimed, the ring that brings them, the
// gather of x. A form, moe_experts_prefill_alone.cu or moe_experts_prefill_cluster.cu, is a class with
//   kBlocks, kTileChoices      blocks that share a tile, and choices of an expert that it has at most
//   begin(choices, i, tiles)   where of an expert's choices the i-th of so many tiles begins
//   Spans(tile), Load(...)     which choices a block copies, and by one thread how TMA copies a stage
//   multiply_tiles(...)        by the warpgroups that multiply
//
// A tile is choices of one expert x 256 weight rows, 128 of gate and 128 of up, or 256 of down. A block has three
// warpgroups. One copies stages of 64 of depth (24 KB of choices, 32 KB of weights, four in flight): weights, and the
// choices of the second product, by TMA; rows of x are gathered by cp.async, twelve a thread, into the layout that TMA
// would have made. The other two multiply, and drift apart by up to the ring, so that one stores while the other
// multiplies.
//
// Blocks, or clusters of them, are persistent. The first tile of each is its number, the others it claims from a
// counter: tiles differ in size, and who has had large ones takes fewer. Tiles of an expert are neighbours: blocks at
// work at one time share rows in L2. No sum depends on who has a tile.
#pragma once
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>
#include <ptx_wgmma.h>
#include <reduce.h>

#include "kernels.h"
#include "moe_experts_prefill.h"

// Apart from moe_experts_prefill_tiles.h, which has the same names for e4m3.
namespace tokenspeed::expert_prefill::claims {

constexpr int kWgmmaRegisters = 224, kCopyRegisters = 56;
constexpr int kGroupThreads = kCopyThreads;  // of any warpgroup
constexpr int kBlockGroups = 2;              // warpgroups that multiply
constexpr int kTurns = 2 * kStages;          // of tiles whose claims are remembered: a ring brings kStages + 1 at most
constexpr int kGroupBytes = kGroupChoices * kRowBytes;
constexpr int kWeightBytes = kTileRows * kRowBytes;
constexpr int kBoxChoices = kGroupChoices / 2;  // that TMA brings at once
constexpr int kBoxBytes = kBoxChoices * kRowBytes;
constexpr int kDepth = kRowBytes / 2;  // of a stage

// The product with gate and up, or with down.
template <bool kGateUp>
struct Product {
    static constexpr int kKinds = kGateUp ? 2 : 1;                 // of weight rows
    static constexpr int kTileColumns = kTileRows / kKinds;        // of the output
    static constexpr int kCopiers = kGateUp ? kGroupThreads : 32;  // threads that copy
    static __host__ __device__ int depth(const MoeExperts& p) { return kGateUp ? p.hidden : p.width; }
    static __host__ __device__ int columns(const MoeExperts& p) { return kGateUp ? p.width : p.hidden; }
};

struct Span {  // of positions in `order`
    int begin, end;

    __device__ int boxes() const { return (end - begin + kBoxChoices - 1) / kBoxChoices; }
};

struct Tile {
    Span choices;
    int expert, column_tile;  // expert: negative where there is no tile
};

struct Storage {  // of dynamic shared memory
    uint8_t choices[kStages][kStageChoices * kRowBytes];
    uint8_t weights[kStages][kWeightBytes];
    uint64_t full[kStages], empty[kStages];
    Tile tiles[kStages];  // by turn: what the ring brings, whose tiles have a stage at least
    uint64_t announced[kTurns];
    int claimed[kTurns];  // by turn: the tile of the next
    Table table;
};
static_assert(sizeof(Storage) <= kSharedLimit);

// All tiles of one product.
template <typename Form>
class Tiles {
  public:
    __device__ Tiles(const Storage& storage, const int32_t* offsets, int columns, int tile_columns)
        : table_(storage.table), offsets_(offsets), column_tiles_((columns + tile_columns - 1) / tile_columns) {}

    // Called by a whole warp.
    __device__ Tile find(int index) const {
        const int* before = table_.tiles_before;
        if (index >= before[kMaxExperts] * column_tiles_) return {{0, 0}, -1, 0};
        const int expert = table_.expert_of(index, column_tiles_);
        const int local = index - before[expert] * column_tiles_, tiles = before[expert + 1] - before[expert];
        const int first = offsets_[expert], choices = offsets_[expert + 1] - first, i = local % tiles;
        const Span span{first + Form::begin(choices, i, tiles), first + Form::begin(choices, i + 1, tiles)};
        return {span, expert, local / tiles};
    }

  private:
    const Table& table_;
    const int32_t* offsets_;
    int column_tiles_;
};

// The tiles of a block or a cluster beyond its first, by the threads that copy: asked for at the start of a turn, known
// to all its blocks in its middle.
template <int kBlocks>
class Claims {
  public:
    __device__ Claims(Storage& storage, int* next_tile) : storage_(storage), next_tile_(next_tile) {}

    __device__ void ask() {
        if (threadIdx.x != 0) return;
        if (kBlocks > 1) ptx::mbarrier_arrive_expect_tx(&storage_.announced[turn_.slot], sizeof(int));
        if (kBlocks == 1 || ptx::cluster_rank() == 0) claim_ = atomicAdd(next_tile_, 1);
    }

    __device__ int answer() {
        int* claimed = &storage_.claimed[turn_.slot];
        uint64_t* announced = &storage_.announced[turn_.slot];
        if constexpr (kBlocks == 1) {  // st.async is for clusters
            if (threadIdx.x == 0) {
                *claimed = claim_;
                ptx::mbarrier_arrive(announced);
            }
            ptx::mbarrier_wait(announced, turn_.phase);
        } else {
            if (threadIdx.x == 0 && ptx::cluster_rank() == 0) {
#pragma unroll
                for (int block = 0; block < kBlocks; ++block) {
                    ptx::store_async_cluster(claimed, claim_, announced, block);
                }
            }
            ptx::mbarrier_wait_cluster(announced, turn_.phase);
        }
        turn_.next(kTurns);
        return *claimed;
    }

  private:
    Storage& storage_;
    int* next_tile_;
    int claim_ = 0;
    Cursor turn_;
};

// By a warp that has read a slot. It has but read what will be overwritten: no fence, here or where a slot is waited
// for.
template <int kBlocks>
__device__ __forceinline__ void release(Storage& storage, int slot) {
    const uint32_t lane = threadIdx.x % 32;
    if constexpr (kBlocks == 1) {
        if (lane == 0) ptx::mbarrier_arrive(&storage.empty[slot]);
    } else if (lane < kBlocks) {
        ptx::mbarrier_arrive_cluster_relaxed(&storage.empty[slot], lane);
    }
}

// K contiguous: 16 columns from the k-th 16 of a stage on.
__device__ __forceinline__ uint64_t operand(uint32_t address, int k) {
    return ptx::matrix_descriptor(address + k * 32, Swizzle::k128, 16, 8 * kRowBytes);
}

// The rows that a warp gathers of a tile: of every 16 choices four, of each of which a lane has a piece of 16 bytes. A
// lane looks up the choice of every 32nd of these rows.
struct Gather {
    static constexpr int kRows = kStageChoices / 16;  // of a lane
    static constexpr int kLookups = (kRows * 4 + 31) / 32;
    int choice[kLookups];  // token * top_k + rank; negative past the end

    // first: in the stage's places for kBlockGroups groups; last: behind them.
    __device__ Gather(const MoeExperts& p, const Span& first, const Span& last) {
#pragma unroll
        for (int i = 0; i < kLookups; ++i) {
            const int row = (i * 32 + threadIdx.x % 32) / 4 * 16 + threadIdx.x / 32 * 4 + threadIdx.x % 4;
            constexpr int kFirst = kBlockGroups * kGroupChoices;
            const int at = row < kFirst ? first.begin + row : last.begin + row - kFirst;
            const int end = row < kFirst ? first.end : row < kRows * 16 ? last.end : 0;
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

// By the threads that copy: tile after tile into the ring. Rows past the end of a span keep what they held, or are the
// next expert's: they reach no row of the output but their own.
template <typename Form, bool kGateUp>
__device__ __forceinline__ void copy_tiles(Storage& storage, const MoeExperts& p, int* next_tile,
                                           const CUtensorMap& weights, const CUtensorMap& activations) {
    using P = Product<kGateUp>;
    const int stages = P::depth(p) / kDepth, columns = P::columns(p);
    const int piece = threadIdx.x % 8, row = threadIdx.x / 8;
    const Tiles<Form> tiles(storage, p.offsets, columns, P::kTileColumns);
    const auto gather_of = [&](const Tile& tile) {
        const typename Form::Spans spans(tile);
        return Gather(p, spans.first, spans.last);
    };
    Claims<Form::kBlocks> claims(storage, next_tile);
    Cursor at;
    Tile next = tiles.find(static_cast<int>(blockIdx.x) / Form::kBlocks);
    Gather gather = gather_of(next);
    for (int turn = 0;; ++turn) {
        const Tile tile = next;
        uint32_t sources[Gather::kRows];
        if (kGateUp) gather.find(sources, p.top_k, static_cast<uint32_t>(p.x_stride / 8));
        ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
        if (threadIdx.x == 0) storage.tiles[turn % kStages] = tile;
        if (tile.expert < 0) break;
        claims.ask();
        const typename Form::template Load<kGateUp> load(tile, columns);
#pragma unroll 1
        for (int s = 0; s < stages; ++s) {
            if (s == stages / 2) {  // the next tile's choices arrive while this one is copied
                next = tiles.find(claims.answer());
                if (kGateUp) gather = gather_of(next);
            }
            ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
            if (threadIdx.x == 0) load(storage, at.slot, s * kDepth, weights, activations);
            if (kGateUp) {
                const auto* from = reinterpret_cast<const uint4*>(p.x) + s * (kRowBytes / 16) + piece;
                uint8_t* to = storage.choices[at.slot] + row * kRowBytes + (piece ^ row % 8) * 16;
#pragma unroll
                for (int i = 0; i < Gather::kRows; ++i) {
                    if (sources[i] != Gather::kNone) ptx::cp_async(to + i * 16 * kRowBytes, from + sources[i]);
                }
                ptx::cp_async_mbarrier_arrive(&storage.full[at.slot]);
            }
            at.next(kStages);
        }
    }
    // A turn without a tile fills its slot with nothing.
    if (threadIdx.x == 0) ptx::mbarrier_arrive(&storage.full[at.slot]);
    if (kGateUp) ptx::mbarrier_arrive(&storage.full[at.slot]);
}

// A whole kernel.
template <typename Form, bool kGateUp>
__device__ __forceinline__ void run(Storage& storage, const Bf16Prefill& a, const CUtensorMap& weights,
                                    const CUtensorMap& activations) {
    const MoeExperts& p = a.p;
    if (kGateUp) ptx::grid_dependency_wait();  // for down the routing is older than the kernel that is waited for
    if (threadIdx.x == 0) {
        for (auto& barrier : storage.announced) ptx::mbarrier_init(&barrier, 1);
        constexpr int kReaders = Form::kBlocks * (kThreads - kCopyThreads) / 32;  // warps that multiply
        start_ring(storage.full, storage.empty, kGateUp ? kGroupThreads + 1 : 1, kReaders);
    }
    storage.table.fill(p.offsets, p.experts, Form::kTileChoices);
    if constexpr (Form::kBlocks == 1) {
        __syncthreads();
    } else {
        ptx::cluster_sync();
    }
    if (!kGateUp) ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (threadIdx.x < kGroupThreads) {
        ptx::register_decrease<kCopyRegisters>();
        if (threadIdx.x < Product<kGateUp>::kCopiers) {
            copy_tiles<Form, kGateUp>(storage, p, a.next_tiles + !kGateUp, weights, activations);
        }
    } else {
        ptx::register_increase<kWgmmaRegisters>();
        Form::template multiply_tiles<kGateUp>(storage, a);
    }
    // The other block's last copies and arrivals need this one's shared memory.
    if constexpr (Form::kBlocks > 1) ptx::cluster_sync();
}

using Kernel = void (*)(CUtensorMap weights, CUtensorMap activations, Bf16Prefill a);

inline cudaError_t launch_product(Kernel kernel, int blocks, int takers, const TensorLayout<5>& weights,
                                  const Bf16Prefill& a, cudaStream_t stream) {
    const auto width = static_cast<uint64_t>(a.p.width), choices = static_cast<uint64_t>(a.p.tokens) * a.p.top_k;
    CUtensorMap of_weights, of_activations;
    const cudaError_t encoded[] = {
        encode_tensor_map<5>(&of_weights, TensorElement::kBf16, weights, Swizzle::k128),
        encode_tensor_map<2>(
            &of_activations, TensorElement::kBf16,
            {.base = a.activations, .sizes = {width, choices}, .strides = {2, width * 2}, .box = {kDepth, kBoxChoices}},
            Swizzle::k128)};
    for (const cudaError_t status : encoded) {
        if (status != cudaSuccess) return status;
    }
    const LaunchConfig config = {.grid = dim3(static_cast<unsigned>(takers * blocks)),
                                 .block = dim3(kThreads),
                                 .shared_bytes = sizeof(Storage),
                                 .stream = stream,
                                 .cluster = dim3(static_cast<unsigned>(blocks)),
                                 .programmatic = true};
    return launch(kernel, config, of_weights, of_activations, a);
}

}  // namespace tokenspeed::expert_prefill::claims
