// The expert product of a decode step, 1 to 64 tokens: out_t = sum_k w_tk down_e(silu(gate_e x_t) * up_e x_t), e the
// k-th expert of token t. The choices come grouped by expert (`order`, `offsets` of moe_route).
//
// Bytes. The weights of every expert that is hit, 6 hidden width bytes each, stream once; all else is small. One token
// of 35B (8 experts of 6.3 MB): 50 MB, 11.7 us at 4.3 TB/s; of 397B (10 of 25 MB): 252 MB, 58.5 us. 64 tokens hit about
// 222 of 256 experts: 1.4 GB, 325 us. Two flop a weight and token: far below the matrix units' rate.
//
// Two launches. gate_up_kernel computes the activations silu(gate) * up of each choice, bf16; down_kernel their
// products with `down`, fp32 rows of each choice, and sums a token's rows in order of rank with its weights. Both are
// persistent, one block a multiprocessor, each with a contiguous share of equal units, so no block is a unit ahead of
// another:
//     entry   up to 16 choices of one expert; an expert with more has several, next to each other, and its weights
//             stream again, from L2
//     tile    16 gate rows and the 16 up rows that they meet, or 64 rows of down: the same 64 rows x depth / 2 bytes
//     unit    a tile of an entry; gate_up walks the tiles of an entry, so that rows of x are loaded once a block and
//             entry; down walks the entries of a tile, so that few blocks share a tile of the output
// In a block one thread streams weights by TMA into a ring of 16 KB stages, one warp copies the choices' rows into
// shared memory, and eight warps multiply: mma.sync with weights on M = 16 and choices on N = 8 or 16. A stage is 32
// rows x 256 of depth (gate_up) or 64 x 128 (down): two or four warps share the rows, four or two the depth, whose sums
// meet in shared memory at the end of the unit. Both operands are read 16 bytes a lane, eight consecutive columns: a
// permutation of k that is the same for both, hence free. Rows of a fragment lie in the order 0, 4, 1, 5, ... of the
// swizzled tile, which keeps the 8 lanes of a read on distinct banks.
//
// Of a model split over ranks the experts here are some of all: the others' choices lie outside `offsets`, are in no
// entry, and the sum over ranks leaves their rows out. With no entry at all, blocks write zeros.
//
// A tile of the output is complete when its units of all entries are: each block adds the units it has done to the
// tile's counter, and the block that completes it sums it. No float atomics: the same input gives the same bits.
//
// Programmatic launch. down_kernel lists its entries and fills its ring before it waits for the activations: gate_up
// has let it start only after moe_route was complete. The weights that it will read first, gate_up's blocks ask into L2
// when they have started their own last copies, so memory does not rest between the two.
//
// e4m3 weights have stages of the same bytes and twice the depth, are multiplied as fp16 (fp8.h), and the sums of 128
// of depth take the scale of their block.
//
// Measured, and what was tried: docs/kernels/moe_decode.md.
//
// budget: gate_up_kernel registers<=128 shared<=0 hot sass=HMMA
// budget: down_kernel registers<=128 shared<=0 hot sass=HMMA
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>
#include <reduce.h>

#include "fp8.h"
#include "kernels.h"
#include "moe_experts_decode.h"
#include "moe_scaled_products.h"

namespace tokenspeed {
namespace {

using namespace expert_decode;

// Streams the weights of the block's units: one thread. `load` starts the copy of one stage.
template <typename Weight, typename Product, typename Load>
__device__ void stream_weights(Control& control, uint8_t* ring, const Layout& layout, const Work<Product>& work,
                               int depth, Load load) {
    constexpr int kDepth = Shape<Product>::kDepthWarps * Format<Weight>::kChunk;
    const int stages_of_unit = (depth + kDepth - 1) / kDepth;
    Cursor at;
    for (int unit = work.begin; unit < work.end; ++unit) {
        const int expert = control.entries[work.entry(unit)].expert, tile = work.tile(unit);
        for (int s = 0; s < stages_of_unit; ++s) {
            ptx::mbarrier_wait(&control.empty[at.slot], at.phase ^ 1);
            ptx::mbarrier_arrive_expect_tx(&control.full[at.slot], kStageBytes);
            load(ring + at.slot * kStageBytes, &control.full[at.slot], expert, tile, s);
            at.next(layout.stages);
        }
    }
}

// Copies the choices' rows whenever the entry changes: one warp, a lane a row. `row_of` gives the row of a position.
template <typename Product, typename RowOf>
__device__ void copy_rows(Control& control, uint8_t* rows, const Layout& layout, const Work<Product>& work, int depth,
                          RowOf row_of) {
    const int lane = threadIdx.x % 32;
    const uint32_t row_bytes = static_cast<uint32_t>(depth) * 2;
    Cursor at;
    int loaded = -1;
    for (int unit = work.begin; unit < work.end; ++unit) {
        const int index = work.entry(unit);
        if (index == loaded) continue;
        loaded = index;
        const Entry entry = control.entries[index];
        ptx::mbarrier_wait(&control.rows_empty[at.slot], at.phase ^ 1);
        if (lane == 0) ptx::mbarrier_arrive_expect_tx(&control.rows_full[at.slot], entry.choices * row_bytes);
        __syncwarp();
        if (lane < entry.choices) {
            uint8_t* to = rows + (at.slot * kEntryChoices + lane) * layout.row_pitch;
            ptx::bulk_load(to, row_of(entry.first + lane), row_bytes, &control.rows_full[at.slot]);
        }
        at.next(layout.row_slots);
    }
}

// sum += the warp's 16 rows x a chunk of a stage times the same depth of the choices. `low` and `high`: the fragment's
// first and last eight rows; `choices`: the slot's chunk.
__device__ __forceinline__ void multiply_chunk(float (&sum)[kGroups][4], const uint8_t* low, const uint8_t* high,
                                               const uint8_t* choices, int row_pitch, int groups) {
    const int lane = threadIdx.x % 32, quad = lane / 4, piece = lane % 4;
    const int row = quad / 2 + quad % 2 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int offset = row * kChunkBytes + ((half * 4 + piece) ^ row) * 16;
        const uint4 upper = *reinterpret_cast<const uint4*>(low + offset);
        const uint4 lower = *reinterpret_cast<const uint4*>(high + offset);
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
            if (n < groups) {
                const auto* at = choices + (n * 8 + quad) * row_pitch + half * 64 + piece * 16;
                const uint4 b = *reinterpret_cast<const uint4*>(at);
                ptx::mma_m16n8k16<__nv_bfloat16>(sum[n], first, b.x, b.y);
                ptx::mma_m16n8k16<__nv_bfloat16>(sum[n], second, b.z, b.w);
            }
        }
    }
}

// A warp's scales of one unit, one a lane: of its gate and up rows of the even and odd lanes' stage (gate_up), or of
// its rows of the lane's stage (down). Asked for a unit ahead.
template <typename Product>
__device__ __forceinline__ float load_scale(const float* scale, const Work<Product>& work, const Entry* entries,
                                            int unit, int depth) {
    constexpr bool kPairs = std::is_same_v<Product, GateUp>;
    const int lane = threadIdx.x % 32, depth_warp = static_cast<int>(threadIdx.x) / 32 / Product::kRowWarps;
    const int stage = kPairs ? lane / 2 : lane, chunk = stage * Shape<Product>::kDepthWarps + depth_warp;
    const int blocks = depth / kScaleBlock;  // along the depth
    // The tiles of down end where the output does, those of gate_up where the gate rows do and the up rows begin.
    const int halves = kPairs ? 2 : 1, row_blocks = work.tiles * Product::kTileColumns / kScaleBlock;
    if (unit >= work.end || chunk >= blocks) return 0;
    const int row = work.tile(unit) * Product::kTileColumns / kScaleBlock + (kPairs ? lane % 2 * row_blocks : 0);
    return scale[(int64_t{entries[work.entry(unit)].expert} * halves * row_blocks + row) * blocks + chunk];
}

// Multiplies the units of the block: the warps kConsumers. `begin(unit, entry)` runs before a unit's products,
// `finish(unit, entry)` after its sums lie in control.sums; both by all these threads.
template <typename Weight, typename Product, typename Begin, typename Finish>
__device__ void multiply(Control& control, const uint8_t* ring, uint8_t* rows, const Layout& layout,
                         const Work<Product>& work, int depth, const float* scale, Begin begin, Finish finish) {
    constexpr int kRowWarps = Product::kRowWarps;
    using F = Format<Weight>;
    using S = Shape<Product>;
    constexpr int kDepth = S::kDepthWarps * F::kChunk;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4;
    const int row_warp = warp % kRowWarps, depth_warp = warp / kRowWarps;
    const int chunks = depth / F::kChunk, stages_of_unit = (depth + kDepth - 1) / kDepth;
    // Of gate_up all gate rows of a chunk come first, then its up rows; of down 16 rows of a warp are neighbours.
    constexpr bool kPairs = std::is_same_v<Product, GateUp>;
    const int low = depth_warp * S::kRows * kChunkBytes + row_warp * (kPairs ? 8 : 16) * kChunkBytes;
    const int high = low + (kPairs ? S::kRows / 2 : 8) * kChunkBytes;
    Cursor at, at_rows;
    int held = -1;
    float scales = 0, next_scales = 0;
    if (F::kScaled) next_scales = load_scale(scale, work, control.entries, work.begin, depth);
    for (int unit = work.begin; unit < work.end; ++unit) {
        const int index = work.entry(unit);
        const Entry entry = control.entries[index];
        const int groups = (entry.choices + 7) / 8;
        begin(unit, entry);
        if (F::kScaled) {
            scales = next_scales;
            next_scales = load_scale(scale, work, control.entries, unit + 1, depth);
        }
        uint8_t* choices = rows + at_rows.slot * kEntryChoices * layout.row_pitch;
        if (index != held) {
            ptx::mbarrier_wait(&control.rows_full[at_rows.slot], at_rows.phase);
            held = index;
            if (F::kScaled) convert_rows(choices, layout.row_pitch, entry.choices, depth);
        }
        float sum[kGroups][4] = {};
        for (int s = 0; s < stages_of_unit; ++s) {
            ptx::mbarrier_wait(&control.full[at.slot], at.phase);
            const int chunk = s * S::kDepthWarps + depth_warp;
            const uint8_t* stage = ring + at.slot * kStageBytes;
            if constexpr (F::kScaled) {
                const float low_scale = __shfl_sync(kAllLanes, scales, kPairs ? 2 * s : s);
                const float high_scale = kPairs ? __shfl_sync(kAllLanes, scales, 2 * s + 1) : low_scale;
                if (chunk < chunks) {
                    multiply_scaled_chunk(
                        sum, stage + low, stage + high, [&](int choice) { return choices + choice * layout.row_pitch; },
                        depth, chunk, groups, low_scale, high_scale);
                }
            } else if (chunk < chunks) {
                multiply_chunk(sum, stage + low, stage + high, choices + chunk * F::kChunk * 2, layout.row_pitch,
                               groups);
            }
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(&control.empty[at.slot]);
            at.next(layout.stages);
        }
        if (unit + 1 == work.end || work.entry(unit + 1) != index) {
            if (lane == 0) ptx::mbarrier_arrive(&control.rows_empty[at_rows.slot]);
            at_rows.next(layout.row_slots);
            held = -1;
        }

        ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);  // the sums of the unit before are read
        const int row = row_warp * 16 + quad / 2 + quad % 2 * 4;
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int choice = n * 8 + lane % 4 * 2 + i % 2;
                control.sums[(depth_warp * kEntryChoices + choice) * S::kPitch + row + i / 2 * 8] = sum[n][i];
            }
        }
        ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
        finish(unit, entry);
    }
}

// A row's sum of a choice over the warps that shared the depth.
template <typename Product>
__device__ __forceinline__ float total(const Control& control, int choice, int row) {
    float value = 0;
#pragma unroll
    for (int i = 0; i < Shape<Product>::kDepthWarps; ++i) {
        value += control.sums[(i * kEntryChoices + choice) * Shape<Product>::kPitch + row];
    }
    return value;
}

template <typename Weight>
__global__ void __launch_bounds__(kThreads, 1)
    gate_up_kernel(const __grid_constant__ CUtensorMap gate_up, const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(ring);
    const Layout& layout = a.layout;
    const MoeExperts& p = a.p;
    uint8_t* rows = ring + layout.rows_offset();
    auto& control = *reinterpret_cast<Control*>(ring + layout.control_offset());
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == kWeightWarp * 32) ptx::prefetch_tensor_map(&gate_up);
    initialise_barriers(control, layout);
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const int entries = list_entries(control, p.offsets, p.experts), output_tiles = p.hidden / Down::kTileColumns;
    const Work<GateUp> work(entries, p.width / GateUp::kTileColumns);

    if (warp == kWeightWarp) {
        if (lane != 0) return;
        stream_weights<Weight>(
            control, ring, layout, work, p.hidden, [&](uint8_t* stage, uint64_t* full, int expert, int tile, int s) {
                const int chunk = s * Shape<GateUp>::kDepthWarps;
                ptx::tma_load<5>(stage, &gate_up, full, {0, tile * GateUp::kTileColumns, 0, chunk, expert},
                                 ptx::CachePolicy::kEvictFirst);
            });
        const Work<Down> next(entries, output_tiles);
        const auto* down = static_cast<const Weight*>(p.down);
        const int64_t tile_elements = int64_t{Down::kTileColumns} * p.width;
        const auto tile_bytes = static_cast<uint32_t>(tile_elements * sizeof(Weight));
        uint32_t asked = 0;
        for (int unit = next.begin; unit < next.end && asked < kPrefetchBytes; ++unit, asked += tile_bytes) {
            const int64_t expert = control.entries[next.entry(unit)].expert;
            ptx::bulk_prefetch_l2<ptx::CachePolicy::kEvictFirst>(
                down + (expert * output_tiles + next.tile(unit)) * tile_elements, tile_bytes);
        }
        return;
    }
    if (warp == kRowWarp) {
        copy_rows(control, rows, layout, work, p.hidden,
                  [&](int position) { return p.x + p.order[position] / p.top_k * p.x_stride; });
        return;
    }
    if (blockIdx.x == 0) {
        for (int i = threadIdx.x; i < output_tiles; i += kConsumerThreads) a.done[i] = 0;
    }
    multiply<Weight>(
        control, ring, rows, layout, work, p.hidden, p.gate_up_scale, [](int, const Entry&) {},
        [&](int unit, const Entry& entry) {
            const int choice = threadIdx.x / 16, column = threadIdx.x % 16;
            const int row = column / 8 * 16 + column % 8;  // each warp's gate rows, then its up rows
            if (choice >= entry.choices) return;
            const float gate = total<GateUp>(control, choice, row), up = total<GateUp>(control, choice, row + 8);
            a.activations[int64_t{entry.first + choice} * p.width + work.tile(unit) * 16 + column] =
                __float2bfloat16(silu(gate) * up);
        });
}

// out of one tile: four columns of a token a thread.
__device__ __forceinline__ void sum_ranks(const Arguments& a, int tile) {
    constexpr int kVectors = Down::kTileColumns / 4;
    const MoeExperts& p = a.p;
    for (int i = threadIdx.x; i < p.tokens * kVectors; i += kConsumerThreads) {
        const int token = i / kVectors, column = tile * Down::kTileColumns + i % kVectors * 4;
        const float* rows = a.rows + int64_t{token} * p.top_k * p.hidden + column;
        const __nv_bfloat16* weights = p.weights + token * p.top_k;
        const int32_t* chosen = p.chosen + token * p.top_k;
        float sum[4] = {};
#pragma unroll 8
        for (int rank = 0; rank < p.top_k; ++rank) {
            const uint4 row = ptx::load_16_no_allocate(rows + int64_t{rank} * p.hidden);
            const float weight = to_float(weights[rank]);
            // Loaded in any case, not to wait for `chosen` first; a row of an expert elsewhere holds anything.
            if (static_cast<uint32_t>(chosen[rank] - p.first_expert) >= static_cast<uint32_t>(p.experts)) continue;
            sum[0] += weight * __uint_as_float(row.x);
            sum[1] += weight * __uint_as_float(row.y);
            sum[2] += weight * __uint_as_float(row.z);
            sum[3] += weight * __uint_as_float(row.w);
        }
        *reinterpret_cast<uint2*>(p.out + int64_t{token} * p.hidden + column) =
            make_uint2(pack<__nv_bfloat16>(sum[0], sum[1]), pack<__nv_bfloat16>(sum[2], sum[3]));
    }
}

template <typename Weight>
__global__ void __launch_bounds__(kThreads, 1)
    down_kernel(const __grid_constant__ CUtensorMap down, const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(ring);
    const Layout& layout = a.layout;
    const MoeExperts& p = a.p;
    uint8_t* rows = ring + layout.rows_offset();
    auto& control = *reinterpret_cast<Control*>(ring + layout.control_offset());
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == kWeightWarp * 32) ptx::prefetch_tensor_map(&down);
    initialise_barriers(control, layout);
    const int entries = list_entries(control, p.offsets, p.experts);
    const Work<Down> work(entries, p.hidden / Down::kTileColumns);

    if (warp == kWeightWarp) {
        if (lane != 0) return;
        stream_weights<Weight>(control, ring, layout, work, p.width,
                               [&](uint8_t* stage, uint64_t* full, int expert, int tile, int s) {
                                   const int chunk = s * Shape<Down>::kDepthWarps;
                                   ptx::tma_load<4>(stage, &down, full, {0, tile * Down::kTileColumns, chunk, expert},
                                                    ptx::CachePolicy::kEvictFirst);
                               });
        return;
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (warp == kRowWarp) {
        copy_rows(control, rows, layout, work, p.width,
                  [&](int position) { return a.activations + int64_t{position} * p.width; });
        return;
    }
    if (entries == 0) {  // every choice is of an expert elsewhere: no unit would complete a tile
        for (int tile = blockIdx.x; tile < work.tiles; tile += gridDim.x) sum_ranks(a, tile);
        return;
    }
    constexpr int kPerThread = kEntryChoices * Down::kTileColumns / kConsumerThreads;
    constexpr int kChoicesAtOnce = kConsumerThreads / Down::kTileColumns;
    const int column = threadIdx.x % Down::kTileColumns, first_choice = threadIdx.x / Down::kTileColumns;
    int flat[kPerThread];  // choices that this thread finishes, loaded while the weights come
    int units_done = 0;    // of the tile at hand
    multiply<Weight>(
        control, ring, rows, layout, work, p.width, p.down_scale,
        [&](int, const Entry& entry) {
#pragma unroll
            for (int i = 0; i < kPerThread; ++i) {
                const int choice = first_choice + i * kChoicesAtOnce;
                flat[i] = choice < entry.choices ? p.order[entry.first + choice] : -1;
            }
        },
        [&](int unit, const Entry&) {
            const int tile = work.tile(unit);
#pragma unroll
            for (int i = 0; i < kPerThread; ++i) {
                if (flat[i] < 0) continue;
                a.rows[int64_t{flat[i]} * p.hidden + tile * Down::kTileColumns + column] =
                    total<Down>(control, first_choice + i * kChoicesAtOnce, column);
            }
            ++units_done;
            if (unit + 1 < work.end && work.tile(unit + 1) == tile) return;
            ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);  // all of the block's rows are stored
            if (threadIdx.x == 0) {
                const auto others = static_cast<int>(ptx::fetch_add_acq_rel(a.done + tile, units_done));
                control.completes_tile = others + units_done == work.entries;
            }
            units_done = 0;
            ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
            if (control.completes_tile) sum_ranks(a, tile);
        });
}

template <typename Weight>
cudaError_t encode_gate_up(CUtensorMap* map, const MoeExperts& p) {
    constexpr int kChunk = Format<Weight>::kChunk;
    const auto width = static_cast<uint64_t>(p.width), row = static_cast<uint64_t>(p.hidden) * sizeof(Weight);
    return encode_tensor_map<5>(
        map, Format<Weight>::kScaled ? TensorElement::kU8 : TensorElement::kBf16,
        {.base = p.gate_up,
         .sizes = {kChunk, width, 2, static_cast<uint64_t>(p.hidden / kChunk), static_cast<uint64_t>(p.experts)},
         .strides = {sizeof(Weight), row, width * row, kChunkBytes, 2 * width * row},
         .box = {kChunk, GateUp::kTileColumns, 2, Shape<GateUp>::kDepthWarps, 1}},
        Swizzle::k128);
}

template <typename Weight>
cudaError_t encode_down(CUtensorMap* map, const MoeExperts& p) {
    constexpr int kChunk = Format<Weight>::kChunk;
    const auto hidden = static_cast<uint64_t>(p.hidden), row = static_cast<uint64_t>(p.width) * sizeof(Weight);
    return encode_tensor_map<4>(
        map, Format<Weight>::kScaled ? TensorElement::kU8 : TensorElement::kBf16,
        {.base = p.down,
         .sizes = {kChunk, hidden, static_cast<uint64_t>(p.width / kChunk), static_cast<uint64_t>(p.experts)},
         .strides = {sizeof(Weight), row, kChunkBytes, hidden * row},
         .box = {kChunk, Down::kTileColumns, Shape<Down>::kDepthWarps, 1}},
        Swizzle::k128);
}

template <typename Weight>
bool sizes_supported(const MoeExperts& p) {
    constexpr int kChunk = Format<Weight>::kChunk;
    return p.hidden >= kChunk && p.hidden % kChunk == 0 && p.width >= kChunk && p.width % kChunk == 0 &&
           p.hidden <= kMaxDepth && p.width <= kMaxDepth &&
           layout_for<Weight, GateUp>(p.hidden).stages >= kLeastStages &&
           layout_for<Weight, Down>(p.width).stages >= kLeastStages;
}

template <typename Weight>
cudaError_t launch_experts(const MoeExperts& p, cudaStream_t stream) {
    const int64_t choices = int64_t{p.tokens} * p.top_k;
    Arguments arguments{p, nullptr, reinterpret_cast<float*>(p.workspace), nullptr,
                        layout_for<Weight, GateUp>(p.hidden)};
    arguments.activations = reinterpret_cast<__nv_bfloat16*>(arguments.rows + choices * p.hidden);
    arguments.done = reinterpret_cast<uint32_t*>(arguments.activations + choices * p.width);
    CUtensorMap gate_up, down;
    cudaError_t status = encode_gate_up<Weight>(&gate_up, p);
    if (status != cudaSuccess) return status;
    status = encode_down<Weight>(&down, p);
    if (status != cudaSuccess) return status;

    LaunchConfig config = {.grid = dim3(multiprocessor_count()),
                           .block = dim3(kThreads),
                           .shared_bytes = static_cast<size_t>(arguments.layout.bytes()),
                           .stream = stream,
                           .programmatic = true};
    status = launch(gate_up_kernel<Weight>, config, gate_up, arguments);
    if (status != cudaSuccess) return status;
    arguments.layout = layout_for<Weight, Down>(p.width);
    config.shared_bytes = static_cast<size_t>(arguments.layout.bytes());
    return launch(down_kernel<Weight>, config, down, arguments);
}

}  // namespace

bool moe_experts_decode_supported(const MoeExperts& p) {
    const bool scaled = p.gate_up_scale != nullptr && p.down_scale != nullptr;
    const bool sizes =
        scaled ? sizes_supported<E4m3>(p) : p.gate_up_scale == p.down_scale && sizes_supported<__nv_bfloat16>(p);
    return sizes && p.tokens >= 1 && p.tokens <= kMoeDecodeTokens && p.top_k >= 1 && p.top_k <= kMaxTopK &&
           p.experts >= 1 && p.experts <= UINT16_MAX && p.x_stride % 8 == 0 && is_aligned(p.x) &&
           is_aligned(p.gate_up) && is_aligned(p.down);
}

size_t moe_experts_decode_workspace(const MoeExperts& p) {
    const size_t choices = static_cast<size_t>(p.tokens) * p.top_k;
    return choices * (p.hidden * sizeof(float) + p.width * sizeof(__nv_bfloat16)) +
           p.hidden / Down::kTileColumns * sizeof(uint32_t);
}

cudaError_t moe_experts_decode(const MoeExperts& p, cudaStream_t stream) {
    if (!moe_experts_decode_supported(p)) return cudaErrorInvalidValue;
    return p.gate_up_scale != nullptr ? launch_experts<E4m3>(p, stream) : launch_experts<__nv_bfloat16>(p, stream);
}

}  // namespace tokenspeed
