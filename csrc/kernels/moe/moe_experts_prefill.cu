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
// A tile is 128 choices of one expert x 256 weight rows: 128 gate rows and the 128 up rows that they meet, so that both
// lie in the same thread's accumulators, or 256 rows of down. Three warpgroups: one copies stages of 64 of depth (16 KB
// of choices, 32 KB of weights, four in flight), two multiply 64 choices each, wgmma m64n256k16. Weights, and the
// choices of the second product, come by TMA; rows of x are gathered by cp.async, eight a thread, into the layout that
// TMA would have made. A warpgroup whose 64 rows lie past the end of its expert does not multiply, so the matrix unit
// does an expert's choices rounded up to 64.
//
// Blocks are persistent, one a multiprocessor, and take every gridDim.x-th tile. Tiles of an expert are neighbours, its
// rows before its columns: blocks at work at one time share weights and rows in L2. Every block finds the expert of a
// tile in a table of tiles before each expert, which it makes at its start. The two multiplying warpgroups drift apart
// by up to the ring, so that one stores while the other multiplies.
//
// Of a model split over ranks the experts here are some of all: the others' choices lie outside `offsets`, no row is
// written for them, and the sum leaves them out.
//
// Measured on an H100 (24 November 2026; read 3.0 to 3.1 TB/s, product 775 to 802 TFLOP/s), tokens that choose at
// random, one set of weights: 8192 tokens of 35B 1.09 ms, 377 TFLOP/s of useful products; of 397B, 160 choices an
// expert, 10.2 ms, 202 TFLOP/s; 16384 tokens of 397B, 320 choices, 12.9 ms, 320 TFLOP/s. In a benchmark that walks
// through sets of inputs, another run: 1.30 and 10.6 ms for the first two, torch 2.39 and 1.00 times as long. Memory
// alone would take 0.75 and 5.0 ms there: weights 1.6 / 12.9 GB, rows between the kernels 0.7 / 1.7 GB, x once an
// expert.
//
// Where the time goes, 8192 tokens of 35B, in us, with a part of the work left out:
//                             gate_up   down   sum
//     as it is                    628    366   112
//     no gather of x              526    358
//     no copies of gate and up    410
//     no copies at all            392    272   110
//     no fence before products    633    366
// Without copies the products see what lies in shared memory, which spares power, and are still short of the rate that
// 12% of rounded rows (by estimate) leave: 700 TFLOP/s in gate_up, 505 in down, whose tiles are a quarter as deep. The
// copies of weights are what holds gate_up back: 1.07 GB in 628 us are 1.7 TB/s, 56% of what memory can. The decode
// kernel takes 512 bytes of a row at a time, not 128, and reaches 93%: the short runs are suspected, not shown.
//
// Tried and lost:
//   - a cluster of two blocks that halve an expert's choices and share its weights by multicast, with weights as the
//     rows of the product and choices, up to 160 a block in steps of 16, as its columns: predicted 0.86 ms for 8192
//     tokens of 35B, measured 1.24 (gate_up 708, down 437), against 1.09 in the same run. 397B gained, 8.1 ms (256
//     TFLOP/s) and, of 16384 tokens, 12.1 ms. It had 0.52 ms of gate_up at 65 tokens, where there is nothing to do but
//     to read weights: 1.8 TB/s there too, so neither products nor traffic from L2 bind it;
//   - the same with weights read evict-first: 1.34 ms;
//   - together, measured only as a whole (1985 us against 1303, 397B 12.7 ms against 10.6): 512 bytes a row asked into
//     L2 ahead of the copies; weights evict-first; tiles left in shared memory by who copies, and the places of down's
//     rows looked up before the products.
// Next: longer runs of a weight row, by stages of 32 rows x 256 of depth as in the decode kernel, or asked into L2
// ahead without evict-first; then clusters again.
//
// budget: gate_up_kernel registers<=168 shared<=0 hot sass=HGMMA
// budget: down_kernel registers<=168 shared<=0 hot sass=HGMMA
// budget: sum_kernel registers<=64 shared<=0 hot
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>
#include <ptx_wgmma.h>

#include <algorithm>

#include "kernels.h"
#include "moe_experts_prefill.h"

namespace tokenspeed {
namespace {

using namespace expert_prefill;

constexpr int kDepth = kRowBytes / 2;  // of a stage
constexpr int kWgmmaRegisters = 216, kCopyRegisters = 72;

struct Arguments {
    MoeExperts p;
    __nv_bfloat16* activations;  // [choices, width], in the order of `order`
    __nv_bfloat16* rows;         // [choices, hidden], by token and rank
};

// sum = this warpgroup's 64 choices x 256 weight rows of a tile, all its depth. kGathered: the choices were written by
// threads (cp.async), and the matrix unit must be let see it.
template <bool kGathered>
__device__ __forceinline__ void multiply_tile(float (&sum)[kTileRows / 2], Storage& storage, Cursor& at, int stages,
                                              bool has_rows) {
    const int group = threadIdx.x / 128 - 1, lane = threadIdx.x % 32;
    int before = -1;  // the slot whose products may still run
    for (int s = 0; s < stages; ++s) {
        ptx::mbarrier_wait(&storage.full[at.slot], at.phase);
        if (has_rows) {
            if (kGathered) ptx::fence_async_shared();
            const uint32_t choices = ptx::shared_address(storage.choices[at.slot]) + group * kGroupChoices * kRowBytes;
            const uint32_t weights = ptx::shared_address(storage.weights[at.slot]);
            ptx::wgmma_fence(sum);
#pragma unroll
            for (int k = 0; k < kDepth / 16; ++k) {
                const uint64_t a = ptx::matrix_descriptor(choices + k * 32, Swizzle::k128, 16, 8 * kRowBytes);
                const uint64_t b = ptx::matrix_descriptor(weights + k * 32, Swizzle::k128, 16, 8 * kRowBytes);
                ptx::wgmma<__nv_bfloat16, kTileRows>(sum, a, b, s > 0 || k > 0);
            }
            ptx::wgmma_commit();
            ptx::wgmma_wait<1>();
        }
        if (lane == 0 && before >= 0) ptx::mbarrier_arrive(&storage.empty[before]);
        before = at.slot;
        at.next();
    }
    ptx::wgmma_wait<0>(sum);
    if (lane == 0) ptx::mbarrier_arrive(&storage.empty[before]);
}

__global__ void __launch_bounds__(kThreads, 1)
    gate_up_kernel(const __grid_constant__ CUtensorMap gate_up, const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(raw);
    auto& storage = *reinterpret_cast<Storage*>(raw);
    const MoeExperts& p = a.p;
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    prepare(storage, p.offsets, p.experts, kCopyThreads + 1);
    const Tiles tiles(storage, p.offsets, p.width, kPairs);
    const int stages = p.hidden / kDepth, count = tiles.count(), step = static_cast<int>(gridDim.x);
    Cursor at;
    if (threadIdx.x < kCopyThreads) {
        ptx::register_decrease<kCopyRegisters>();
        if (static_cast<int>(blockIdx.x) >= count) return;
        Tile tile = tiles.find(blockIdx.x);
        Gather gather(p, tile);
        for (int index = blockIdx.x; index < count; index += step) {
            const uint8_t* source[Gather::kRows];
#pragma unroll
            for (int i = 0; i < Gather::kRows; ++i) {
                const __nv_bfloat16* row = p.x + gather.choice[i] / p.top_k * p.x_stride;
                source[i] =
                    gather.choice[i] >= 0 ? reinterpret_cast<const uint8_t*>(row) + threadIdx.x % 8 * 16 : nullptr;
            }
            const Tile current = tile;
            if (index + step < count) {  // the next tile's choices arrive while this one is copied
                tile = tiles.find(index + step);
                gather = Gather(p, tile);
            }
            for (int s = 0; s < stages; ++s) {
                ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
                if (threadIdx.x == 0) {
                    ptx::mbarrier_arrive_expect_tx(&storage.full[at.slot], kWeightBytes);
                    ptx::tma_load<4>(storage.weights[at.slot], &gate_up, &storage.full[at.slot],
                                     {s * kDepth, current.column_tile * kPairs, 0, current.expert});
                }
                copy_choices(storage.choices[at.slot], source, s * kRowBytes);
                ptx::cp_async_mbarrier_arrive(&storage.full[at.slot]);
                at.next();
            }
        }
    } else {
        ptx::register_increase<kWgmmaRegisters>();
        const int row_of_warp = threadIdx.x / 32 * 16 - kCopyThreads / 2;
        uint8_t* output = storage.output[threadIdx.x / 32 - 4];
        for (int index = blockIdx.x; index < count; index += step) {
            const Tile tile = tiles.find(index);
            const bool has_rows = row_of_warp / kGroupChoices * kGroupChoices < tile.choices;
            float sum[kTileRows / 2];
            multiply_tile<true>(sum, storage, at, stages, has_rows);
            if (!has_rows) continue;
            const auto activation = [&](int j, int i) {
                const int gate = 4 * j + 2 * i, up = gate + kTileRows / 4;
                return pack<__nv_bfloat16>(silu(sum[gate]) * sum[up], silu(sum[gate + 1]) * sum[up + 1]);
            };
            const int column = tile.column_tile * kPairs;
            store_rows(output, activation, p.width - column, [&](int row) -> __nv_bfloat16* {
                const int choice = row_of_warp + row;
                if (choice >= tile.choices) return nullptr;
                return a.activations + int64_t{tile.first + choice} * p.width + column;
            });
        }
    }
}

__global__ void __launch_bounds__(kThreads, 1)
    down_kernel(const __grid_constant__ CUtensorMap activations, const __grid_constant__ CUtensorMap down,
                const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(raw);
    auto& storage = *reinterpret_cast<Storage*>(raw);
    const MoeExperts& p = a.p;
    prepare(storage, p.offsets, p.experts, 1);  // the routing is older than the kernel that is waited for
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const Tiles tiles(storage, p.offsets, p.hidden, kTileRows);
    const int stages = p.width / kDepth, count = tiles.count(), step = static_cast<int>(gridDim.x);
    Cursor at;
    if (threadIdx.x < kCopyThreads) {
        ptx::register_decrease<kCopyRegisters>();
        if (threadIdx.x >= 32) return;
        for (int index = blockIdx.x; index < count; index += step) {
            const Tile tile = tiles.find(index);
            for (int s = 0; threadIdx.x == 0 && s < stages; ++s) {
                uint64_t* full = &storage.full[at.slot];
                ptx::mbarrier_wait(&storage.empty[at.slot], at.phase ^ 1);
                ptx::mbarrier_arrive_expect_tx(full, kChoiceBytes + kWeightBytes);
                ptx::tma_load<2>(storage.choices[at.slot], &activations, full, {s * kDepth, tile.first});
                ptx::tma_load<3>(storage.weights[at.slot], &down, full,
                                 {s * kDepth, tile.column_tile * kTileRows, tile.expert});
                at.next();
            }
        }
    } else {
        ptx::register_increase<kWgmmaRegisters>();
        const int row_of_warp = threadIdx.x / 32 * 16 - kCopyThreads / 2;
        uint8_t* output = storage.output[threadIdx.x / 32 - 4];
        for (int index = blockIdx.x; index < count; index += step) {
            const Tile tile = tiles.find(index);
            const bool has_rows = row_of_warp / kGroupChoices * kGroupChoices < tile.choices;
            float sum[kTileRows / 2];
            multiply_tile<false>(sum, storage, at, stages, has_rows);
            if (!has_rows) continue;
#pragma unroll
            for (int part = 0; part < kTileRows / kOutputColumns; ++part) {
                const int column = tile.column_tile * kTileRows + part * kOutputColumns;
                const auto packed = [&](int j, int i) {
                    const int at_register = part * kOutputColumns / 2 + 4 * j + 2 * i;
                    return pack<__nv_bfloat16>(sum[at_register], sum[at_register + 1]);
                };
                store_rows(output, packed, p.hidden - column, [&](int row) -> __nv_bfloat16* {
                    const int choice = row_of_warp + row;
                    if (choice >= tile.choices) return nullptr;
                    return a.rows + int64_t{p.order[tile.first + choice]} * p.hidden + column;
                });
            }
        }
    }
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
    CUtensorMap gate_up, activations, down;
    const cudaError_t encoded[] = {
        encode_tensor_map<4>(&gate_up, TensorElement::kBf16,
                             {.base = p.gate_up,
                              .sizes = {hidden, width, 2, experts},
                              .strides = {2, hidden * 2, width * hidden * 2, 2 * width * hidden * 2},
                              .box = {kDepth, kPairs, 2, 1}},
                             Swizzle::k128),
        encode_tensor_map<2>(&activations, TensorElement::kBf16,
                             {.base = arguments.activations,
                              .sizes = {width, static_cast<uint64_t>(choices)},
                              .strides = {2, width * 2},
                              .box = {kDepth, kTileChoices}},
                             Swizzle::k128),
        encode_tensor_map<3>(&down, TensorElement::kBf16,
                             {.base = p.down,
                              .sizes = {width, hidden, experts},
                              .strides = {2, width * 2, hidden * width * 2},
                              .box = {kDepth, kTileRows, 1}},
                             Swizzle::k128)};
    for (const cudaError_t status : encoded) {
        if (status != cudaSuccess) return status;
    }
    const LaunchConfig config = {.grid = dim3(multiprocessor_count()),
                                 .block = dim3(kThreads),
                                 .shared_bytes = sizeof(Storage),
                                 .stream = stream,
                                 .programmatic = true};
    cudaError_t status = launch(gate_up_kernel, config, gate_up, arguments);
    if (status != cudaSuccess) return status;
    status = launch(down_kernel, config, activations, down, arguments);
    if (status != cudaSuccess) return status;
    return sum_ranks(p, arguments.rows, stream);
}

}  // namespace tokenspeed
