// What the forms of the grouped products share: tiles that are claimed, the ring that brings them, the gather of x. A
// form, of moe_experts_prefill_alone.cu, moe_experts_prefill_cluster.cu or moe_experts_prefill_fp8.cu, is a class with
//   Element, Storage           of x and of weights; of shared memory
//   kBlocks, kTileChoices      blocks that share a tile, and choices of an expert that it has at most
//   kGathered, kBoxChoices     choices of a stage whose rows threads gather, and that TMA brings at once
//   kMultiply-, kCopyRegisters of a thread
//   begin(choices, i, tiles)   where of an expert's choices the i-th of so many tiles begins
//   Spans(tile), Load(...)     which choices a block copies, and by one thread how TMA copies a stage
//   Scales(...)                of the choices: what threads copy of them with a stage
//   multiply_tiles(...)        by the warpgroups that multiply
//
// A tile is choices of one expert x 256 weight rows, 128 of gate and 128 of up, or 256 of down. A block has three
// warpgroups. One copies stages of 128 bytes of each row (32 KB of weights, up to 24 KB of choices, four in flight):
// weights, and the choices of the second product, by TMA; rows of x are gathered by cp.async, up to twelve a thread,
// into the layout that TMA would have made. The other two multiply, and in bf16 drift apart by up to the ring, so that
// one stores while the other multiplies.
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

namespace tokenspeed::expert_prefill::claims {

constexpr int kGroupThreads = kCopyThreads;  // of any warpgroup
constexpr int kBlockGroups = 2;              // warpgroups that multiply
constexpr int kTurns = 2 * kStages;          // of tiles whose claims are remembered: a ring brings kStages + 1 at most
constexpr int kGroupBytes = kGroupChoices * kRowBytes;
constexpr int kWeightBytes = kTileRows * kRowBytes;

template <typename Form>
constexpr int kDepth = kRowBytes / sizeof(typename Form::Element);  // of a stage

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

    __device__ int boxes(int size) const { return (end - begin + size - 1) / size; }
};

struct Tile {
    Span choices;
    int expert, column_tile;  // expert: negative where there is no tile
};

struct Ring {
    uint64_t full[kStages], empty[kStages];
    Tile tiles[kStages];  // by turn: what the ring brings, whose tiles have a stage at least
    uint64_t announced[kTurns];
    int claimed[kTurns];  // by turn: the tile of the next
    Table table;
};

template <int kChoices>
struct Storage {  // of dynamic shared memory
    uint8_t choices[kStages][kChoices * kRowBytes];
    uint8_t weights[kStages][kWeightBytes];
    Ring ring;
};

// All tiles of one product.
template <typename Form>
class Tiles {
  public:
    __device__ Tiles(const Ring& ring, const int32_t* offsets, int columns, int tile_columns)
        : table_(ring.table), offsets_(offsets), column_tiles_((columns + tile_columns - 1) / tile_columns) {}

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
    __device__ Claims(Ring& ring, int* next_tile) : ring_(ring), next_tile_(next_tile) {}

    __device__ int turn() const { return turn_.slot; }  // modulo kTurns

    __device__ void ask() {
        if (threadIdx.x != 0) return;
        if (kBlocks > 1) ptx::mbarrier_arrive_expect_tx(&ring_.announced[turn_.slot], sizeof(int));
        if (kBlocks == 1 || ptx::cluster_rank() == 0) claim_ = atomicAdd(next_tile_, 1);
    }

    __device__ int answer() {
        int* claimed = &ring_.claimed[turn_.slot];
        uint64_t* announced = &ring_.announced[turn_.slot];
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
    Ring& ring_;
    int* next_tile_;
    int claim_ = 0;
    Cursor turn_;
};

// By a warp that has read a slot. It has but read what will be overwritten: no fence, here or where a slot is waited
// for.
template <int kBlocks>
__device__ __forceinline__ void release(Ring& ring, int slot) {
    const uint32_t lane = threadIdx.x % 32;
    if constexpr (kBlocks == 1) {
        if (lane == 0) ptx::mbarrier_arrive(&ring.empty[slot]);
    } else if (lane < kBlocks) {
        ptx::mbarrier_arrive_cluster_relaxed(&ring.empty[slot], lane);
    }
}

// Of the warpgroups that multiply, the thread's: in a uniform register, where the matrix unit takes the addresses of its
// operands from.
__device__ __forceinline__ int multiplying_group() {
    return static_cast<int>(ptx::warp_id()) / (kGroupThreads / 32) - 1;
}

// K contiguous: 32 bytes of depth from the k-th 32 of a stage on.
__device__ __forceinline__ uint64_t operand(uint32_t address, int k) {
    return ptx::matrix_descriptor(address + k * 32, Swizzle::k128, 16, 8 * kRowBytes);
}

// The rows that a warp gathers of a tile: of every 16 choices four, of each of which a lane has a piece of 16 bytes. A
// lane looks up the choice of every 32nd of these rows.
template <int kChoices>
struct Gather {
    static constexpr int kRows = kChoices / 16;  // of a lane
    static constexpr int kLookups = (kRows * 4 + 31) / 32;
    int choice[kLookups];  // token * top_k + rank, of row_of(i); negative past the end

    static __device__ int row_of(int i) {
        return (i * 32 + threadIdx.x % 32) / 4 * 16 + threadIdx.x / 32 * 4 + threadIdx.x % 4;
    }

    // first: in the stage's places for kBlockGroups groups; last: behind them.
    __device__ Gather(const MoeExperts& p, const Span& first, const Span& last) {
#pragma unroll
        for (int i = 0; i < kLookups; ++i) {
            const int row = row_of(i);
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

// Of choices without scales.
struct NoScales {
    static constexpr bool kCopied = false;
    template <typename Gather>
    __device__ NoScales(const Gather&, int) {}
    template <typename Load, typename Storage>
    __device__ void operator()(const Prefill&, const Load&, Storage&, const Cursor&, int) const {}
};

// By the threads that copy: tile after tile into the ring. Rows past the end of a span keep what they held, or are the
// next expert's: they reach no row of the output but their own.
template <typename Form, bool kGateUp>
__device__ __forceinline__ void copy_tiles(typename Form::Storage& storage, const Prefill& a,
                                           const CUtensorMap& weights, const CUtensorMap& activations) {
    using P = Product<kGateUp>;
    using Rows = Gather<Form::kGathered>;
    using Scales = typename Form::template Scales<kGateUp>;
    const MoeExperts& p = a.p;
    Ring& ring = storage.ring;
    const int stages = P::depth(p) / kDepth<Form>, columns = P::columns(p);
    const int piece = threadIdx.x % 8, row = threadIdx.x / 8;
    const Tiles<Form> tiles(ring, p.offsets, columns, P::kTileColumns);
    const auto gather_of = [&](const Tile& tile) {
        const typename Form::Spans spans(tile);
        return Rows(p, spans.first, spans.last);
    };
    // Lanes that copy nothing wait for no slot: left behind by two rounds, they would wait for a phase that is over.
    const bool copies = kGateUp || Scales::kCopied || threadIdx.x == 0;
    Claims<Form::kBlocks> claims(ring, a.next_tiles + !kGateUp);
    Cursor at;
    Tile next = tiles.find(static_cast<int>(blockIdx.x) / Form::kBlocks);
    Rows gather = gather_of(next);
    for (;;) {
        const Tile tile = next;
        const Scales scales(gather, p.top_k);
        uint32_t sources[Rows::kRows];
        if (kGateUp) gather.find(sources, p.top_k, a.x_pieces);
        if (copies) ptx::mbarrier_wait(&ring.empty[at.slot], at.phase ^ 1);
        if (threadIdx.x == 0) ring.tiles[claims.turn() % kStages] = tile;
        if (tile.expert < 0) break;
        claims.ask();
        const typename Form::template Load<kGateUp> load(tile, columns);
#pragma unroll 1
        for (int s = 0; s < stages; ++s) {
            if (s == stages / 2) {  // the next tile's choices arrive while this one is copied
                next = tiles.find(claims.answer());
                if (kGateUp) gather = gather_of(next);
            }
            if (copies) ptx::mbarrier_wait(&ring.empty[at.slot], at.phase ^ 1);
            if (threadIdx.x == 0) load(storage, at.slot, s * kDepth<Form>, weights, activations);
            if (kGateUp) {
                const auto* from = static_cast<const uint4*>(a.x) + s * (kRowBytes / 16) + piece;
                uint8_t* to = storage.choices[at.slot] + row * kRowBytes + (piece ^ row % 8) * 16;
#pragma unroll
                for (int i = 0; i < Rows::kRows; ++i) {
                    if (sources[i] != Rows::kNone) ptx::cp_async(to + i * 16 * kRowBytes, from + sources[i]);
                }
            }
            scales(a, load, storage, at, s);
            if (kGateUp || Scales::kCopied) ptx::cp_async_mbarrier_arrive(&ring.full[at.slot]);
            at.next(kStages);
        }
    }
    // A turn without a tile fills its slot with nothing.
    if (threadIdx.x == 0) ptx::mbarrier_arrive(&ring.full[at.slot]);
    if (kGateUp || Scales::kCopied) ptx::mbarrier_arrive(&ring.full[at.slot]);
}

// A whole kernel.
template <typename Form, bool kGateUp>
__device__ __forceinline__ void run(typename Form::Storage& storage, const Prefill& a, const CUtensorMap& weights,
                                    const CUtensorMap& activations) {
    static_assert(sizeof(storage) <= kSharedLimit);
    constexpr int kCopiers = Product<kGateUp>::kCopiers;
    const MoeExperts& p = a.p;
    Ring& ring = storage.ring;
    if (kGateUp) ptx::grid_dependency_wait();  // for down the routing is older than the kernel that is waited for
    if (threadIdx.x == 0) {
        for (auto& barrier : ring.announced) ptx::mbarrier_init(&barrier, 1);
        constexpr int kReaders = Form::kBlocks * (kThreads - kCopyThreads) / 32;  // warps that multiply
        constexpr bool kThreadsFill = kGateUp || Form::template Scales<kGateUp>::kCopied;
        start_ring(ring.full, ring.empty, kThreadsFill ? kCopiers + 1 : 1, kReaders);
    }
    ring.table.fill(p.offsets, p.experts, Form::kTileChoices);
    if constexpr (Form::kBlocks == 1) {
        __syncthreads();
    } else {
        ptx::cluster_sync();
    }
    if (!kGateUp) ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (threadIdx.x < kGroupThreads) {
        ptx::register_decrease<Form::kCopyRegisters>();
        if (threadIdx.x < kCopiers) copy_tiles<Form, kGateUp>(storage, a, weights, activations);
    } else {
        ptx::register_increase<Form::kMultiplyRegisters>();
        Form::template multiply_tiles<kGateUp>(storage, a);
    }
    // The other block's last copies and arrivals need this one's shared memory.
    if constexpr (Form::kBlocks > 1) ptx::cluster_sync();
}

using Kernel = void (*)(CUtensorMap weights, CUtensorMap activations, Prefill a);

template <typename Form>
cudaError_t launch_product(Kernel kernel, int takers, const TensorLayout<5>& weights, const Prefill& a,
                           cudaStream_t stream) {
    constexpr uint64_t kBytes = sizeof(typename Form::Element);
    constexpr auto kElement = kBytes == 1 ? TensorElement::kU8 : TensorElement::kBf16;
    const auto width = static_cast<uint64_t>(a.p.width), choices = static_cast<uint64_t>(a.p.tokens) * a.p.top_k;
    CUtensorMap of_weights, of_activations;
    const cudaError_t encoded[] = {encode_tensor_map<5>(&of_weights, kElement, weights, Swizzle::k128),
                                   encode_tensor_map<2>(&of_activations, kElement,
                                                        {.base = a.activations,
                                                         .sizes = {width, choices},
                                                         .strides = {kBytes, width * kBytes},
                                                         .box = {kDepth<Form>, Form::kBoxChoices}},
                                                        Swizzle::k128)};
    for (const cudaError_t status : encoded) {
        if (status != cudaSuccess) return status;
    }
    const LaunchConfig config = {.grid = dim3(static_cast<unsigned>(takers * Form::kBlocks)),
                                 .block = dim3(kThreads),
                                 .shared_bytes = sizeof(typename Form::Storage),
                                 .stream = stream,
                                 .cluster = dim3(static_cast<unsigned>(Form::kBlocks)),
                                 .programmatic = true};
    return launch(kernel, config, of_weights, of_activations, a);
}

}  // namespace tokenspeed::expert_prefill::claims
