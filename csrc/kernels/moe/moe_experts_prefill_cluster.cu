// The two grouped products of a bf16 prefill of the experts (moe_experts_prefill.cu has the whole) by clusters of two
// blocks that share weights: fewer bytes from L2, for which several groups of choices an expert pay.
// docs/kernels/moe_prefill.md counts the bytes and has what was measured, tried and lost.
//
// A tile is a cluster's: up to five groups of 64 choices of one expert x 256 weight rows, 128 of gate and 128 of up, or
// 256 of down. Each block copies half of the weights to both, by multicast, and multiplies two groups with all of them,
// a warpgroup each, m64n256k16. A fifth group, or a third or an only one, is the cluster's: each of its four warpgroups
// multiplies it with a quarter of the weight rows, m64n64k16. So both blocks have the same to do, and the matrix unit
// does an expert's choices rounded up to 64.
//
// A third warpgroup copies stages of 64 of depth (24 KB of choices, 32 KB of weights, four in flight): weights, and the
// choices of the second product, by TMA; rows of x are gathered by cp.async, twelve a thread, into the layout that TMA
// would have made. Weight rows lie in shared memory in the order in which a thread's sums are eight neighbouring
// columns of a row of the output: it stores them as they are, 16 bytes at a time.
//
// Clusters are persistent, one to two multiprocessors. The first tile of each is its number, the others it claims from a
// counter: tiles differ by a factor of four, and a cluster that has had large ones takes fewer. Tiles of an expert are
// neighbours: clusters at work at one time share rows in L2. The multiplying warpgroups drift apart by up to the ring,
// so that one stores while the other multiplies. No sum depends on who has a tile.
//
// budget: product_kernel registers<=168 shared<=0 hot sass=HGMMA
// budget: start_kernel registers<=32 shared<=0 hot
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>
#include <ptx_wgmma.h>
#include <reduce.h>

#include <algorithm>

#include "kernels.h"
#include "moe_experts_prefill.h"

namespace tokenspeed {
namespace {

using namespace expert_prefill;

constexpr int kWgmmaRegisters = 224, kCopyRegisters = 56;
constexpr int kGroupThreads = kCopyThreads;  // of any warpgroup
constexpr int kBlocks = 2;                   // of a cluster
constexpr uint16_t kBothBlocks = 3;
constexpr int kBlockGroups = 2;                     // of 64 choices: one of each warpgroup that multiplies
constexpr int kOwnGroups = kBlockGroups * kBlocks;  // of a cluster's tile, beside the one that is both blocks'
constexpr int kTileGroups = kOwnGroups + 1;
constexpr int kTurns = 2 * kStages;  // of tiles whose claims are remembered: a ring brings kStages + 1 at most
constexpr int kGroupBytes = kGroupChoices * kRowBytes;
constexpr int kHalfBytes = kTileRows / kBlocks * kRowBytes;  // of weights that a block copies, to both
constexpr int kBoxChoices = kGroupChoices / kBlocks;         // that TMA brings at once
constexpr int kBoxBytes = kBoxChoices * kRowBytes;
constexpr int kDepth = kRowBytes / 2;              // of a stage
constexpr int kUnitRows = kTileRows / kOwnGroups;  // of weights: a warpgroup's share in the cluster's group
constexpr int kRun = 32;  // weight rows among which a thread finds eight neighbouring columns of the output

__device__ __forceinline__ int groups_of(int choices) {
    return (choices + kGroupChoices - 1) / kGroupChoices;
}

struct Span {  // of positions in `order`
    int begin, end;

    __device__ int boxes() const { return (end - begin + kBoxChoices - 1) / kBoxChoices; }
};

// Of a cluster.
struct Tile {
    Span choices;
    int expert, column_tile;  // expert: negative where there is no tile

    __device__ int groups() const { return groups_of(choices.end - choices.begin); }

    // What this block multiplies by itself, up to a group for each warpgroup.
    __device__ Span own() const {
        const int each = groups() / kBlocks;
        const int first = choices.begin + static_cast<int>(ptx::cluster_rank()) * each * kGroupChoices;
        return {min(first, choices.end), min(first + each * kGroupChoices, choices.end)};
    }

    // The odd group that both blocks multiply, or nothing.
    __device__ Span shared() const {
        const int even = groups() / kBlocks * kBlocks;
        return {min(choices.begin + even * kGroupChoices, choices.end), choices.end};
    }
};

struct Storage {  // of dynamic shared memory
    uint8_t choices[kStages][(kBlockGroups + 1) * kGroupBytes];
    uint8_t weights[kStages][kBlocks * kHalfBytes];  // block i copies half i
    uint64_t full[kStages], empty[kStages];
    Tile tiles[kStages];  // by turn: what the ring brings, whose tiles have a stage at least
    uint64_t announced[kTurns];
    int claimed[kTurns];  // by turn: the tile of the next
    Table table;
};
static_assert(sizeof(Storage) <= kSharedLimit);

// All tiles of one product.
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
    const Table& table_;
    const int32_t* offsets_;
    int column_tiles_;
};

// The cluster's tiles beyond its first, by the threads that copy: asked for at the start of a turn, known to both blocks
// in its middle.
class Claims {
  public:
    __device__ Claims(Storage& storage, int* next_tile) : storage_(storage), next_tile_(next_tile) {}

    __device__ void ask() {
        if (threadIdx.x != 0) return;
        ptx::mbarrier_arrive_expect_tx(&storage_.announced[turn_.slot], sizeof(int));
        if (ptx::cluster_rank() == 0) claim_ = atomicAdd(next_tile_, 1);
    }

    __device__ int answer() {
        if (threadIdx.x == 0 && ptx::cluster_rank() == 0) {
#pragma unroll
            for (int block = 0; block < kBlocks; ++block) {
                ptx::store_async_cluster(&storage_.claimed[turn_.slot], claim_, &storage_.announced[turn_.slot], block);
            }
        }
        ptx::mbarrier_wait_cluster(&storage_.announced[turn_.slot], turn_.phase);
        const int index = storage_.claimed[turn_.slot];
        turn_.next(kTurns);
        return index;
    }

  private:
    Storage& storage_;
    int* next_tile_;
    int claim_ = 0;
    Cursor turn_;
};

// By a warp that has read a slot. It has but read what will be overwritten: no fence, here or where a slot is waited
// for.
__device__ __forceinline__ void release(Storage& storage, int slot) {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < kBlocks) ptx::mbarrier_arrive_cluster_relaxed(&storage.empty[slot], lane);
}

// The product with gate and up, or with down.
template <bool kGateUp>
struct Product {
    static constexpr int kKinds = kGateUp ? 2 : 1;  // of weight rows: gate and up lie in turns of kRun rows
    static constexpr int kUnitColumns = kUnitRows / kKinds, kTileColumns = kTileRows / kKinds;  // of the output
    static constexpr int kCopiers = kGateUp ? kGroupThreads : 32;                               // threads that copy
    static __host__ __device__ int depth(const MoeExperts& p) { return kGateUp ? p.hidden : p.width; }
    static __host__ __device__ int columns(const MoeExperts& p) { return kGateUp ? p.width : p.hidden; }
};

// The rows that a warp gathers of a tile: of every 16 choices four, of each of which a lane has a piece of 16 bytes. A
// lane looks up the choice of every 32nd of these rows.
struct Gather {
    static constexpr int kRows = (kBlockGroups + 1) * kGroupChoices / 16;  // of a lane
    static constexpr int kLookups = (kRows * 4 + 31) / 32;
    int choice[kLookups];  // token * top_k + rank; negative past a group's end

    __device__ Gather(const MoeExperts& p, const Tile& tile) {
        const Span own = tile.own(), shared = tile.shared();
#pragma unroll
        for (int i = 0; i < kLookups; ++i) {
            const int row = (i * 32 + threadIdx.x % 32) / 4 * 16 + threadIdx.x / 32 * 4 + threadIdx.x % 4;
            constexpr int kOwn = kBlockGroups * kGroupChoices;
            const int at = row < kOwn ? own.begin + row : shared.begin + row - kOwn;
            const int end = row < kOwn ? own.end : row < kRows * 16 ? shared.end : 0;
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

// By the threads that copy: tile after tile into the ring. Rows past the end of a group keep what they held, or are the
// next expert's: they reach no row of the output but their own.
template <bool kGateUp>
__device__ __forceinline__ void copy_tiles(Storage& storage, const MoeExperts& p, int* next_tile,
                                           const CUtensorMap& weights, const CUtensorMap& activations) {
    using P = Product<kGateUp>;
    const int stages = P::depth(p) / kDepth, columns = P::columns(p), rank = static_cast<int>(ptx::cluster_rank());
    const int piece = threadIdx.x % 8, row = threadIdx.x / 8;
    const Tiles tiles(storage, p.offsets, columns, P::kTileColumns);
    Claims claims(storage, next_tile);
    Cursor at;
    Tile next = tiles.find(static_cast<int>(blockIdx.x) / kBlocks);
    Gather gather(p, next);
    for (int turn = 0;; ++turn) {
        const Tile tile = next;
        uint32_t sources[Gather::kRows];
        if (kGateUp) gather.find(sources, p.top_k, static_cast<uint32_t>(p.x_stride / 8));
        ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
        if (threadIdx.x == 0) storage.tiles[turn % kStages] = tile;
        if (tile.expert < 0) break;
        claims.ask();
        const Span own = tile.own(), shared = tile.shared();
        const int own_boxes = own.boxes(), shared_boxes = shared.boxes();
        // Of an only group each block needs its own half of the weights alone.
        const bool both = tile.groups() > 1;
        const int half = tile.column_tile * kBlocks + rank;
        const int run = (tile.expert * P::kKinds * columns + half * (P::kTileColumns / kBlocks)) / kRun;
#pragma unroll 1
        for (int s = 0; s < stages; ++s) {
            if (s == stages / 2) {  // the next tile's choices arrive while this one is copied
                next = tiles.find(claims.answer());
                if (kGateUp) gather = Gather(p, next);
            }
            uint64_t* full = &storage.full[at.slot];
            ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
            uint8_t* to = storage.choices[at.slot];
            if (threadIdx.x == 0) {
                const int other_bytes = kGateUp ? 0 : (own_boxes + shared_boxes) * kBoxBytes;
                ptx::mbarrier_arrive_expect_tx(full, (both ? kBlocks : 1) * kHalfBytes + other_bytes);
                ptx::tma_load_multicast<5>(storage.weights[at.slot] + rank * kHalfBytes, &weights, full,
                                           {s * kDepth, 0, 0, 0, run},
                                           both ? kBothBlocks : static_cast<uint16_t>(1u << rank));
                if (!kGateUp) {
#pragma unroll 1
                    for (int box = 0; box < own_boxes; ++box) {
                        ptx::tma_load<2>(to + box * kBoxBytes, &activations, full,
                                         {s * kDepth, own.begin + box * kBoxChoices});
                    }
                    if (rank < shared_boxes) {  // a box of each block, to both
                        ptx::tma_load_multicast<2>(to + kBlockGroups * kGroupBytes + rank * kBoxBytes, &activations,
                                                   full, {s * kDepth, shared.begin + rank * kBoxChoices}, kBothBlocks);
                    }
                }
            }
            if (kGateUp) {
                const auto* from = reinterpret_cast<const uint4*>(p.x) + s * (kRowBytes / 16) + piece;
                to += row * kRowBytes + (piece ^ row % 8) * 16;
#pragma unroll
                for (int i = 0; i < Gather::kRows; ++i) {
                    if (sources[i] != Gather::kNone) ptx::cp_async(to + i * 16 * kRowBytes, from + sources[i]);
                }
                ptx::cp_async_mbarrier_arrive(full);
            }
            at.next(kStages);
        }
    }
    // A turn without a tile fills its slot with nothing.
    if (threadIdx.x == 0) ptx::mbarrier_arrive(&storage.full[at.slot]);
    if (kGateUp) ptx::mbarrier_arrive(&storage.full[at.slot]);
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
    for (int run = 0; run < Product<kGateUp>::kUnitColumns / kRun; ++run) {
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

// By a warpgroup: its group of every tile's choices times all of the tile's weights, the cluster's group times a unit,
// and the stores.
template <bool kGateUp>
__device__ __forceinline__ void multiply_tiles(Storage& storage, const Bf16Prefill& a) {
    using P = Product<kGateUp>;
    const MoeExperts& p = a.p;
    const int group = threadIdx.x / kGroupThreads - 1, lane = threadIdx.x % 32;
    const int unit = static_cast<int>(ptx::cluster_rank()) * kBlockGroups + group;
    const int stages = P::depth(p) / kDepth, columns = P::columns(p);
    Cursor at;
    for (int turn = 0;; ++turn) {
        ptx::mbarrier_wait(&storage.full[at.slot], at.phase);
        const Tile tile = storage.tiles[turn % kStages];
        if (tile.expert < 0) return;
        const Span spans[2] = {tile.own(), tile.shared()};
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
            ptx::mbarrier_wait(&storage.full[at.slot], at.phase);
            // The choices that threads copied: the matrix unit must be let see them.
            if (kGateUp) ptx::fence_async_shared();
            const uint32_t choices = ptx::shared_address(storage.choices[at.slot]);
            const uint32_t weights = ptx::shared_address(storage.weights[at.slot]);
            const auto operand = [](uint32_t address, int k) {
                return ptx::matrix_descriptor(address + k * 32, Swizzle::k128, 16, 8 * kRowBytes);
            };
            // The own group's products come last: one group of them may run on below.
            if (has_shared) {
                ptx::wgmma_fence(shared);
#pragma unroll
                for (int k = 0; k < kDepth / 16; ++k) {
                    ptx::wgmma<__nv_bfloat16, kUnitRows>(shared, operand(choices + kBlockGroups * kGroupBytes, k),
                                                         operand(weights + unit * kUnitRows * kRowBytes, k),
                                                         s > 0 || k > 0);
                }
                ptx::wgmma_commit();
            }
            if (has_own) {
                ptx::wgmma_fence(own);
#pragma unroll
                for (int k = 0; k < kDepth / 16; ++k) {
                    ptx::wgmma<__nv_bfloat16, kTileRows>(own, operand(choices + group * kGroupBytes, k),
                                                         operand(weights, k), s > 0 || k > 0);
                }
                ptx::wgmma_commit();
            }
            ptx::wgmma_wait<1>();
            if (before >= 0) release(storage, before);
            before = at.slot;
            at.next(kStages);
        }
        ptx::wgmma_wait<0>(own, shared);
        release(storage, before);
        __nv_bfloat16* output = kGateUp ? a.activations : a.rows;
        const int column = tile.column_tile * P::kTileColumns;
        if (has_own) {
#pragma unroll
            for (int i = 0; i < kOwnGroups; ++i) {
                store_unit<kGateUp>(own + i * (kUnitRows / 2), output, place[0], columns, column + i * P::kUnitColumns);
            }
        }
        if (has_shared) {
            store_unit<kGateUp>(shared, output, place[1], columns, column + unit * P::kUnitColumns);
        }
    }
}

template <bool kGateUp>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap activations,
                   const __grid_constant__ Bf16Prefill a) {
    DYNAMIC_SHARED(raw);
    auto& storage = *reinterpret_cast<Storage*>(raw);
    const MoeExperts& p = a.p;
    if (kGateUp) ptx::grid_dependency_wait();  // for down the routing is older than the kernel that is waited for
    if (threadIdx.x == 0) {
        for (auto& barrier : storage.announced) ptx::mbarrier_init(&barrier, 1);
        constexpr int kReaders = kBlocks * (kThreads - kCopyThreads) / 32;  // warps that multiply
        start_ring(storage.full, storage.empty, kGateUp ? kGroupThreads + 1 : 1, kReaders);
    }
    storage.table.fill(p.offsets, p.experts, kTileGroups * kGroupChoices);
    ptx::cluster_sync();
    if (!kGateUp) ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (threadIdx.x < kGroupThreads) {
        ptx::register_decrease<kCopyRegisters>();
        if (threadIdx.x < Product<kGateUp>::kCopiers) {
            copy_tiles<kGateUp>(storage, p, a.next_tiles + !kGateUp, weights, activations);
        }
    } else {
        ptx::register_increase<kWgmmaRegisters>();
        multiply_tiles<kGateUp>(storage, a);
    }
    ptx::cluster_sync();  // the other block's last copies and arrivals need this one's shared memory
}

// Before both products: the first tile of each cluster is its number.
__global__ void __launch_bounds__(32) start_kernel(int* next_tiles, int clusters) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (threadIdx.x < 2) next_tiles[threadIdx.x] = clusters;
}

// Of weights [experts, kinds, columns, depth]: of each kRun rows, eight of every fourth. Column i of a lane t's pair in
// the j-th eight columns of a product is column 8 t + 4 i + j of the run. Then from gate to up, and to the next run.
template <bool kGateUp>
cudaError_t launch_product(const Bf16Prefill& a, int clusters, cudaStream_t stream) {
    using P = Product<kGateUp>;
    constexpr uint32_t kKinds = P::kKinds;
    const MoeExperts& p = a.p;
    const auto depth = static_cast<uint64_t>(P::depth(p));
    const auto columns = static_cast<uint64_t>(P::columns(p));
    const uint64_t runs = (kKinds * static_cast<uint64_t>(p.experts) - (kKinds - 1)) * columns / kRun;
    const auto width = static_cast<uint64_t>(p.width), choices = static_cast<uint64_t>(p.tokens) * p.top_k;
    CUtensorMap weights, activations;
    const cudaError_t encoded[] = {
        encode_tensor_map<5>(&weights, TensorElement::kBf16,
                             {.base = kGateUp ? p.gate_up : p.down,
                              .sizes = {depth, 8, 4, kKinds, runs},
                              .strides = {2, 4 * depth * 2, depth * 2, columns * depth * 2, kRun * depth * 2},
                              .box = {kDepth, 8, 4, kKinds, kTileRows / kBlocks / kRun / kKinds}},
                             Swizzle::k128),
        encode_tensor_map<2>(
            &activations, TensorElement::kBf16,
            {.base = a.activations, .sizes = {width, choices}, .strides = {2, width * 2}, .box = {kDepth, kBoxChoices}},
            Swizzle::k128)};
    for (const cudaError_t status : encoded) {
        if (status != cudaSuccess) return status;
    }
    const LaunchConfig config = {.grid = dim3(static_cast<unsigned>(clusters * kBlocks)),
                                 .block = dim3(kThreads),
                                 .shared_bytes = sizeof(Storage),
                                 .stream = stream,
                                 .cluster = dim3(kBlocks),
                                 .programmatic = true};
    return launch(product_kernel<kGateUp>, config, weights, activations, a);
}

}  // namespace

cudaError_t expert_prefill::products_in_clusters(const Bf16Prefill& arguments, cudaStream_t stream) {
    const int clusters = std::max(multiprocessor_count() / kBlocks, 1);
    const LaunchConfig one_warp = {.grid = dim3(1), .block = dim3(32), .stream = stream, .programmatic = true};
    cudaError_t status = launch(start_kernel, one_warp, arguments.next_tiles, clusters);
    if (status == cudaSuccess) status = launch_product<true>(arguments, clusters, stream);
    if (status == cudaSuccess) status = launch_product<false>(arguments, clusters, stream);
    return status;
}

}  // namespace tokenspeed
