// The expert product of a prefill, any number of tokens: out_t = sum_k w_tk down_e(silu(gate_e x_t) * up_e x_t), e the
// k-th expert of token t. The choices come grouped by expert (`order`, `offsets` of moe_route).
//
// Flops: 6 hidden width a choice. 8192 tokens of 35B: 412 Gflop, 0.53 ms at 780 TFLOP/s; the weights of all experts are
// 1.6 GB, 0.37 ms at 4.3 TB/s, beside it. So 256 tokens an expert are about where the matrix unit becomes the bound.
//
// Three launches: a grouped product with gate and up, its epilogue the activation, into bf16 rows in the order of
// `order`; a grouped product with down, into bf16 rows by token and rank; the weighted sum of each token's rows in
// order of rank, in fp32. Written by hand and not on CUTLASS: the gather of x, the pairing of gate with up and the
// scatter are most of the code either way, and this runs on the emulated device.
//
// What binds is bytes from L2 to the multiprocessors, 5 to 6 TB/s over all (docs/kernels/moe_prefill.md counts them and
// has what was tried and lost). So a tile is a cluster's, of two blocks that share its weights: up to five groups of 64
// choices of one expert x 256 weight rows, 128 of gate and 128 of up, or 256 of down. Each block copies half of the
// weights to both, by multicast, and multiplies two groups with all of them, a warpgroup each, m64n256k16. A fifth
// group, or a third or an only one, is the cluster's: each of its four warpgroups multiplies it with a quarter of the
// weight rows, m64n64k16. So both blocks have the same to do, and the matrix unit does an expert's choices rounded up
// to 64.
//
// A third warpgroup copies stages of 64 of depth (24 KB of choices, 32 KB of weights, four in flight): weights, and the
// choices of the second product, by TMA; rows of x are gathered by cp.async, twelve a thread, into the layout that TMA
// would have made. Weight rows lie in shared memory in the order in which a thread's sums are eight neighbouring columns
// of a row of the output: it stores them as they are.
//
// Clusters are persistent, one to two multiprocessors, and take every 66th tile. Tiles of an expert are neighbours:
// clusters at work at one time share rows in L2. Every block finds the expert of a tile in a table of tiles before each
// expert, which it makes at its start. The multiplying warpgroups drift apart by up to the ring, so that one stores
// while the other multiplies.
//
// Of a model split over ranks the experts here are some of all: the others' choices lie outside `offsets`, no row is
// written for them, and the sum leaves them out.
//
// budget: product_kernel registers<=168 shared<=0 hot sass=HGMMA
// budget: sum_kernel registers<=64 shared<=0 hot
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>
#include <ptx_wgmma.h>

#include "kernels.h"
#include "moe_experts_prefill.h"

namespace tokenspeed {
namespace {

using namespace expert_prefill;

constexpr int kWgmmaRegisters = 224, kCopyRegisters = 56;
constexpr int kGroups = 3;
constexpr int kDepth = kRowBytes / 2;              // of a stage
constexpr int kUnitRows = kTileRows / kOwnGroups;  // of weights: a warpgroup's share in the cluster's group
constexpr int kRun = 32;  // weight rows among which a thread finds eight neighbouring columns of the output
static_assert(sizeof(Storage<kGroups>) <= 227 * 1024);

struct Arguments {
    MoeExperts p;
    __nv_bfloat16* activations;  // [choices, width], in the order of `order`
    __nv_bfloat16* rows;         // [choices, hidden], by token and rank
};

// The product with gate and up, or with down.
template <bool kGateUp>
struct Product {
    static constexpr int kKinds = kGateUp ? 2 : 1;  // of weight rows: gate and up lie in turns of kRun rows
    static constexpr int kUnitColumns = kUnitRows / kKinds, kTileColumns = kTileRows / kKinds;  // of the output
    static __device__ int depth(const MoeExperts& p) { return kGateUp ? p.hidden : p.width; }
    static __device__ int columns(const MoeExperts& p) { return kGateUp ? p.width : p.hidden; }
};

// By one thread: a block's half of a stage of weights.
template <bool kGateUp>
struct LoadHalf {
    const CUtensorMap& map;
    int columns;

    __device__ void operator()(void* to, uint64_t* full, const Tile<kGroups>& tile, int stage, uint16_t mask) const {
        using P = Product<kGateUp>;
        const int half = tile.column_tile * kBlocks + static_cast<int>(ptx::cluster_rank());
        const int run = (tile.expert * P::kKinds * columns + half * (P::kTileColumns / kBlocks)) / kRun;
        ptx::tma_load_multicast<5>(to, &map, full, {stage * kDepth, 0, 0, 0, run}, mask);
    }
};

// The 16-byte pieces of kUnitRows weight rows in a thread's sums, at `columns` of the output's row of `place` (the
// thread's two, negative to leave it out). Eight neighbouring columns of a row lie in each thread of a quad: that is the
// order of weight rows in shared memory.
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
            store_16(to, make_uint4(words[0], words[1], words[2], words[3]));
        }
    }
}

// By a warpgroup: its group of every tile's choices times all of the tile's weights, the cluster's group times a unit,
// and the stores.
template <bool kGateUp>
__device__ void multiply_tiles(Storage<kGroups>& storage, const Arguments& a, const Tiles<kGroups>& tiles) {
    using P = Product<kGateUp>;
    const MoeExperts& p = a.p;
    const int group = threadIdx.x / kGroupThreads - 1, lane = threadIdx.x % 32;
    const int unit = static_cast<int>(ptx::cluster_rank()) * (kOwnGroups / kBlocks) + group;
    const int stages = P::depth(p) / kDepth, columns = P::columns(p);
    Cursor at;
    Tile<kGroups> next = tiles.holds(tiles.first()) ? tiles.find(tiles.first()) : Tile<kGroups>{};
    for (int index = tiles.first(); tiles.holds(index); index = tiles.next(index)) {
        const Tile<kGroups> tile = next;
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
                    ptx::wgmma<__nv_bfloat16, kUnitRows>(shared, operand(choices + (kGroups - 1) * kGroupBytes, k),
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
            if (s == 0 && tiles.holds(tiles.next(index))) next = tiles.find(tiles.next(index));
            ptx::wgmma_wait<1>();
            if (before >= 0) release(storage, before);
            before = at.slot;
            at.next();
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
        if (has_shared) store_unit<kGateUp>(shared, output, place[1], columns, column + unit * P::kUnitColumns);
    }
}

template <bool kGateUp>
__global__ void __launch_bounds__(kThreads, 1)
    product_kernel(const __grid_constant__ CUtensorMap weights, const __grid_constant__ CUtensorMap activations,
                   const __grid_constant__ Arguments a) {
    using P = Product<kGateUp>;
    DYNAMIC_SHARED(raw);
    auto& storage = *reinterpret_cast<Storage<kGroups>*>(raw);
    const MoeExperts& p = a.p;
    if (kGateUp) ptx::grid_dependency_wait();  // for down the routing is older than the kernel that is waited for
    prepare(storage, p.offsets, p.experts, kGateUp ? kGroupThreads + 1 : 1);
    if (!kGateUp) ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const Tiles<kGroups> tiles(storage, p.offsets, P::columns(p), P::kTileColumns);
    if (threadIdx.x < kGroupThreads) {
        ptx::register_decrease<kCopyRegisters>();
        const LoadHalf<kGateUp> load_half{weights, P::columns(p)};
        const int stages = P::depth(p) / kDepth;
        if constexpr (kGateUp) {
            copy_gathered(storage, p, tiles, p.x, static_cast<uint32_t>(p.x_stride / 8), stages, load_half);
        } else if (threadIdx.x < 32) {
            copy_activations(storage, tiles, activations, kDepth, stages, load_half);
        }
    } else {
        ptx::register_increase<kWgmmaRegisters>();
        multiply_tiles<kGateUp>(storage, a, tiles);
    }
    ptx::cluster_sync();  // the other block's last copies and arrivals need this one's shared memory
}

constexpr int kSumThreads = 256;

// out[token] = the sum over ranks of weight times row: a thread eight columns.
__global__ void __launch_bounds__(kSumThreads)
    sum_kernel(const __grid_constant__ MoeExperts p, const __nv_bfloat16* all_rows) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const int vectors = p.hidden / 8;
    const int64_t index = int64_t{blockIdx.x} * kSumThreads + threadIdx.x, token = index / vectors;
    if (token >= p.tokens) return;
    const int column = static_cast<int>(index % vectors) * 8;
    const __nv_bfloat16* rows = all_rows + token * p.top_k * p.hidden + column;
    const __nv_bfloat16* weights = p.weights + token * p.top_k;
    const int32_t* chosen = p.chosen + token * p.top_k;
    Float8 sum{};
#pragma unroll 8
    for (int rank = 0; rank < p.top_k; ++rank) {
        // The row of an expert that another rank holds was not written.
        if (static_cast<uint32_t>(chosen[rank] - p.first_expert) >= static_cast<uint32_t>(p.experts)) continue;
        const Float8 row = unpack(ptx::load_16_no_allocate(rows + int64_t{rank} * p.hidden));
        const float weight = to_float(weights[rank]);
#pragma unroll
        for (int i = 0; i < 8; ++i) sum.v[i] += weight * row.v[i];
    }
    store_16(p.out + token * p.hidden + column, pack(sum));
}

}  // namespace

cudaError_t expert_prefill::sum_ranks(const MoeExperts& p, const __nv_bfloat16* rows, cudaStream_t stream) {
    const int64_t vectors = int64_t{p.tokens} * p.hidden / 8;
    const LaunchConfig config = {.grid = dim3(static_cast<unsigned>((vectors + kSumThreads - 1) / kSumThreads)),
                                 .block = dim3(kSumThreads),
                                 .stream = stream,
                                 .programmatic = true};
    return launch(sum_kernel, config, p, rows);
}

bool moe_experts_prefill_supported(const MoeExperts& p) {
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    return p.gate_up_scale == nullptr && p.down_scale == nullptr && p.tokens >= 1 && p.top_k >= 1 && p.experts >= 1 &&
           p.experts <= kMaxExperts && p.hidden >= kDepth && p.hidden % kDepth == 0 && p.width >= kDepth &&
           p.width % kDepth == 0 && p.x_stride % 8 == 0 && aligned(p.x) && aligned(p.gate_up) && aligned(p.down) &&
           int64_t{p.tokens} * p.hidden / 8 / kSumThreads < INT32_MAX;
}

size_t moe_experts_prefill_workspace(const MoeExperts& p) {
    return static_cast<size_t>(p.tokens) * p.top_k * (p.hidden + p.width) * sizeof(__nv_bfloat16);
}

cudaError_t moe_experts_prefill(const MoeExperts& p, cudaStream_t stream) {
    if (!moe_experts_prefill_supported(p)) return cudaErrorInvalidValue;
    const int64_t choices = int64_t{p.tokens} * p.top_k;
    auto* rows = reinterpret_cast<__nv_bfloat16*>(p.workspace);
    const Arguments arguments{p, rows + choices * p.hidden, rows};
    const auto hidden = static_cast<uint64_t>(p.hidden), width = static_cast<uint64_t>(p.width);
    const auto experts = static_cast<uint64_t>(p.experts);
    // Of each kRun rows, eight of every fourth: column i of a lane t's pair in the j-th eight columns of a product is
    // column 8 t + 4 i + j of the run. Then from gate to up, and to the next run.
    const auto weight_map = [](CUtensorMap* map, const void* base, uint64_t depth, uint64_t rows, uint32_t kinds,
                               uint64_t kind_rows) {
        return encode_tensor_map<5>(map, TensorElement::kBf16,
                                    {.base = base,
                                     .sizes = {depth, 8, 4, kinds, rows / kRun},
                                     .strides = {2, 4 * depth * 2, depth * 2, kind_rows * depth * 2, kRun * depth * 2},
                                     .box = {kDepth, 8, 4, kinds, kTileRows / kBlocks / kRun / kinds}},
                                    Swizzle::k128);
    };
    CUtensorMap gate_up, activations, down;
    const cudaError_t encoded[] = {weight_map(&gate_up, p.gate_up, hidden, (2 * experts - 1) * width, 2, width),
                                   weight_map(&down, p.down, width, experts * hidden, 1, hidden),
                                   encode_tensor_map<2>(&activations, TensorElement::kBf16,
                                                        {.base = arguments.activations,
                                                         .sizes = {width, static_cast<uint64_t>(choices)},
                                                         .strides = {2, width * 2},
                                                         .box = {kDepth, kBoxChoices}},
                                                        Swizzle::k128)};
    for (const cudaError_t status : encoded) {
        if (status != cudaSuccess) return status;
    }
    const LaunchConfig config = product_config(sizeof(Storage<kGroups>), stream);
    cudaError_t status = launch(product_kernel<true>, config, gate_up, activations, arguments);
    if (status != cudaSuccess) return status;
    status = launch(product_kernel<false>, config, down, activations, arguments);
    if (status != cudaSuccess) return status;
    return expert_prefill::sum_ranks(p, arguments.rows, stream);
}

}  // namespace tokenspeed
