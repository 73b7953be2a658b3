// The mixture of experts of a decode layer, 1 to 8 tokens, as one persistent launch: residual sum and norm, the router
// beside the shared expert's gate and up, top-k, the experts, and the weighted sum with the shared expert in it.
//
// Bytes. One token of 35B: 5.3 MB of the first product, 50.3 of eight experts, 2.1 of the shared expert's down: 57.7
// MB, 13.8 us at 4.17 TB/s. As launches the parts cost 17 us more: each ends, waits and fills its ring anew.
//
// A block has a list of units, cut from the same weights whatever the routing says, and one ring of 16 KB stages that
// one thread keeps full in the order of the list:
//     1. tiles of 16 rows of in_proj, before the wait for the kernel ahead: nobody waits for weights
//     2. tiles of 16 columns of shared_down; the first before the wait, too, and beside the ring: its operand comes
//     late,
//        so it is multiplied after the first unit of 3
//     3. gate_up: 16 gate and 16 up rows of an entry, an expert that a token chose
//     4. down: 64 rows of an entry
// Of 1 and 2 a block has its fixed share. 3 and 4 go round the blocks, entry by entry; from three tokens on, each block
// takes the next unit when it asks for the weights of the one before: multiprocessors do not get the same share of
// memory's bandwidth, and with equal shares the slowest ended a tenth after the middle one. When a block comes to its
// first unit of down, the first entries' activations are long complete. Eight warps multiply: mma.sync with weights on
// M = 16 and tokens on N = 8, all of them for each expert: the operand is the same for every unit, and columns of
// tokens that did not choose the expert are not stored. Another warp brings the activations of units of 4 into shared
// memory.
//
// Dependencies. Where a wait is all there is to do, what is handed on carries its own flag: the router's logits, the
// rows of down and the activations of one token are words with the launch's number in the upper half, and the reader
// spins on the words. The others are counters: one of the first product (for 2), one for each entry (3 to 4, of more
// tokens); who stores adds with a release, who needs it waits with an acquire. Every block repeats norm and top-k,
// which costs less than to wait for another's. Last, a block finishes its own 16 columns of the output, those of its
// tile of shared_down, ranks in order: no float atomics, the same input gives the same bits. All this lies in the
// caller's memory, since its old content must be known: a launch counts itself, uses one of two sets of counters in
// turn and clears the other, so a graph may replay.
//
// All blocks must be on the device at once, and are: one a multiprocessor, and the next kernel may start only when all
// have. What the kernel ahead still holds it gives back without waiting for us. The next kernel's ring may fill where
// ours rests, between the first product and the first expert; of several tokens in e4m3 our registers leave its blocks no
// room.
//
// Rounding is that of the operators that the torch implementation names.
//
// Weights in e4m3 (all but the router, whose tiles then come first): a stage holds twice the depth, x becomes fp16 when
// the router's tiles are done, activations as they come into a row slot, and a chunk of 128 columns is multiplied by
// its scale, as in moe_experts_decode.cu. A warp asks for a unit's scales before it finishes the unit ahead; the thread
// that streams asks L2 for them earlier. One token of 35B: 29.9 MB, 7.2 us at 4.17 TB/s.
//
// Padding rows choose nobody, in both formats.
//
// Measured, and what was tried: docs/kernels/moe_block.md.
//
// budget: moe_block_kernel registers<=152 shared<=0 hot sass=HMMA
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>

#include "moe_block_entries.h"
#include "moe_block_products.h"
#include "moe_block_rows.h"
#include "moe_block_sums.h"

namespace tokenspeed {
namespace {

using namespace moe_layer;

struct Maps {
    CUtensorMap in_proj, shared_down, gate_up, down;
    CUtensorMap router;  // of e4m3 weights
};

// The copies of one unit; `load` starts that of one stage, given its first chunk of depth. One thread.
template <typename Product, typename Weight, typename Load>
__device__ __forceinline__ void stream_unit(Control& control, uint8_t* ring, Cursor& at, int depth, Load load) {
#pragma unroll 1
    for (int chunk = 0; chunk * kChunk<Weight> < depth; chunk += Shape<Product>::kDepthWarps) {
        ptx::mbarrier_wait(&control.empty[at.slot], at.phase ^ 1);
        ptx::mbarrier_arrive_expect_tx(&control.full[at.slot], kStageBytes);
        load(ring + at.slot * kStageBytes, &control.full[at.slot], chunk);
        at.next(kStages);
    }
}

template <typename Weight>
__device__ void stream_weights(const Maps& maps, const Arguments& a, Control& control, uint8_t* ring) {
    const MoeBlock& p = a.p;
    const Work<Weight> work(p);
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    Cursor at;
#pragma unroll 1
    for (int tile = block; tile < work.in_tiles; tile += blocks) {
        if (kScaled<Weight> && tile < work.leading_tiles) {
            stream_unit<Dense, __nv_bfloat16>(
                control, ring, at, p.hidden, [&](uint8_t* stage, uint64_t* full, int chunk) {
                    ptx::tma_load<3>(stage, &maps.router, full, {0, tile * Dense::kTileColumns, chunk},
                                     ptx::CachePolicy::kEvictFirst);
                });
            continue;
        }
        const int column = work.first_column(tile);
        stream_unit<Dense, Weight>(control, ring, at, p.hidden, [&](uint8_t* stage, uint64_t* full, int chunk) {
            ptx::tma_load<3>(stage, &maps.in_proj, full, {0, column, chunk}, ptx::CachePolicy::kEvictFirst);
        });
    }
    const bool beside = work.fits_beside(p);
    if (beside && block < work.column_tiles) {
        ptx::mbarrier_arrive_expect_tx(&control.shared_full, kStageBytes);
        ptx::tma_load<3>(ring + a.layout.shared_offset(), &maps.shared_down, &control.shared_full,
                         {0, block * Dense::kTileColumns, 0}, ptx::CachePolicy::kEvictFirst);
    }
    ptx::grid_dependency_wait();
    ptx::mbarrier_wait(&control.begun, 0);  // x is here: the next kernel's weights would have been ahead of it
    ptx::grid_dependency_launch();
    ptx::mbarrier_wait(&control.listed, 0);
    uint32_t* taken = &counters_of(p.scratch, control.launch).taken;
    const int gate_up_units = control.entries * work.gate_up_tiles;
    const int units = gate_up_units + control.entries * work.down_tiles;
    const bool equal_shares = p.tokens <= kMaxTokensOfEqualShares;
    Cursor at_units;
    bool shared_left = true;
    for (int unit = block, item = 0;; ++item) {
        // The next is taken before this one's copies start: the answer takes longer than a stage.
        uint32_t next = static_cast<uint32_t>(unit);
        if (!equal_shares && unit < units) next = ptx::fetch_add_relaxed(taken, 1);
        ptx::mbarrier_wait(&control.units_empty[at_units.slot], at_units.phase ^ 1);
        control.units[at_units.slot] = unit < units ? unit : -1;
        ptx::mbarrier_arrive(&control.units_full[at_units.slot]);
        at_units.next(kUnitSlots);
        if (shared_left && work.is_shared_turn(item, unit < units ? unit : -1, gate_up_units)) {
            shared_left = false;
#pragma unroll 1
            for (int tile = beside ? block + blocks : block; tile < work.column_tiles; tile += blocks) {
                stream_unit<Dense, Weight>(control, ring, at, p.shared, [&](uint8_t* stage, uint64_t* full, int chunk) {
                    ptx::tma_load<3>(stage, &maps.shared_down, full, {0, tile * Dense::kTileColumns, chunk},
                                     ptx::CachePolicy::kEvictFirst);
                });
            }
        }
        if (unit >= units) return;
        if (unit < gate_up_units) {
            const int expert = control.experts[unit / work.gate_up_tiles], tile = unit % work.gate_up_tiles;
            if (kScaled<Weight>) {
                const float* scales = Scales{p}.gate_up(expert, tile * GateUp::kTileColumns);
                ptx::prefetch_l2(scales);
                ptx::prefetch_l2(scales + Scales{p}.up_scales());
            }
            stream_unit<GateUp, Weight>(control, ring, at, p.hidden, [&](uint8_t* stage, uint64_t* full, int chunk) {
                ptx::tma_load<5>(stage, &maps.gate_up, full, {0, tile * GateUp::kTileColumns, 0, chunk, expert},
                                 ptx::CachePolicy::kEvictFirst);
            });
        } else {
            const int of_down = unit - gate_up_units;
            const int expert = control.experts[of_down / work.down_tiles], tile = of_down % work.down_tiles;
            if (kScaled<Weight>) ptx::prefetch_l2(Scales{p}.down(expert, tile * Down::kTileColumns));
            stream_unit<Down, Weight>(control, ring, at, p.width, [&](uint8_t* stage, uint64_t* full, int chunk) {
                ptx::tma_load<4>(stage, &maps.down, full, {0, tile * Down::kTileColumns, chunk, expert},
                                 ptx::CachePolicy::kEvictFirst);
            });
        }
        unit = blocks + static_cast<int>(next);
    }
}

// The warps that multiply, from the norm to the sum.
template <typename Weight, int kPerLane>
__device__ void multiply(const Arguments& a, Control& control, uint8_t* shared_memory) {
    const Layout& layout = a.layout;
    const MoeBlock& p = a.p;
    const Work<Weight> work(p);
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint8_t* x = shared_memory + layout.rows_offset();
    uint8_t* slots = shared_memory + layout.slots_offset();
    auto* first = reinterpret_cast<uint32_t*>(shared_memory + layout.first_offset());
    // What a thread finishes of a tile of 16 columns.
    const int token = threadIdx.x / 16, column = threadIdx.x % 16;
    begin(a, control, x);
    Multiplier multiplier{
        control, layout, shared_memory, reinterpret_cast<float*>(shared_memory + layout.sums_offset()), {}};

    // For e4m3 weights, x is turned to fp16 when the products that want it as it is are done.
    bool as_it_is = kScaled<Weight>;
#pragma unroll 1
    for (int tile = block;; tile += blocks) {
        if (as_it_is && tile >= work.leading_tiles) {
            expert_decode::convert_rows(x, layout.row_pitch, p.tokens, p.hidden);
            as_it_is = false;
        }
        if (tile >= work.in_tiles) break;
        const int first_column = work.first_column(tile);
        const float* sums;
        if (kScaled<Weight> && tile < work.leading_tiles) {
            sums = multiplier.unit<Dense, __nv_bfloat16>(x, layout.row_pitch, p.hidden);
        } else {
            sums = multiplier.unit<Dense, Weight>(x, layout.row_pitch, p.hidden, Scales{p}.in_proj(first_column));
        }
        if (warp * 2 >= p.tokens) continue;
        const int output = first_column + column;
        const bool inside = token < p.tokens && output < p.projections;
        const __nv_bfloat16 value = __float2bfloat16(inside ? multiplier.total<Dense>(sums, token, column) : 0.0f);
        if (work.routes(tile)) {
            if (!inside) continue;
            ptx::store_tagged(a.logits + token * p.experts + output - 2 * p.shared, __float_as_uint(to_float(value)),
                              control.launch);
            continue;
        }
        if (inside) a.projected[token * a.projected_pitch + output] = value;
        __syncwarp();
        if (token < p.tokens && column == 0) ptx::add_release(&counters_of(p.scratch, control.launch).projected, 1);
    }

    list_entries<kPerLane>(a, control, first);
    ptx::mbarrier_wait(&control.listed, 0);

    Cursor at_rows, at_units;
    const auto multiply_shared = [&] {
        if (block >= work.column_tiles) return;
        ptx::mbarrier_wait(&control.rows_full[0], 0);
        if (block == 0) {  // every block has read the launch's number: it is in `projected`
            auto* other = reinterpret_cast<uint32_t*>(&counters_of(p.scratch, control.launch + 1));
#pragma unroll 1
            for (int i = threadIdx.x; i < kSetWords; i += kConsumerThreads) other[i] = 0;
            if (threadIdx.x == 0) *p.scratch = control.launch;
        }
        const bool beside = work.fits_beside(p);
        if (beside) ptx::mbarrier_wait(&control.shared_full, 0);
#pragma unroll 1
        for (int tile = block; tile < work.column_tiles; tile += blocks) {
            const float* scales = Scales{p}.shared_down(tile * Dense::kTileColumns);
            const uint8_t* stage = beside && tile == block ? shared_memory + layout.shared_offset() : nullptr;
            const float* sums = multiplier.unit<Dense, Weight>(slots, layout.slot_pitch, p.shared, scales, stage);
            if (token < p.tokens) {
                a.shared_rows[int64_t{token} * p.hidden + tile * Dense::kTileColumns + column] =
                    __float2bfloat16(multiplier.total<Dense>(sums, token, column));
            }
        }
        if (lane == 0) ptx::mbarrier_arrive(&control.rows_empty[0]);
        at_rows.next(kRowSlots);
    };

    const int gate_up_units = control.entries * work.gate_up_tiles;
    // A unit's scales are asked for before the unit ahead of it is finished.
    const auto scale_of = [&](int unit) -> float {
        if (!kScaled<Weight> || unit < 0) return 0;
        if (unit < gate_up_units) {
            const int entry = unit / work.gate_up_tiles, tile = unit % work.gate_up_tiles;
            const float* scales = Scales{p}.gate_up(control.experts[entry], tile * GateUp::kTileColumns);
            return Multiplier::load_scale<GateUp>(scales, Scales{p}.up_scales(), p.hidden);
        }
        const int of_down = unit - gate_up_units, entry = of_down / work.down_tiles, tile = of_down % work.down_tiles;
        const float* scales = Scales{p}.down(control.experts[entry], tile * Down::kTileColumns);
        return Multiplier::load_scale<Down>(scales, 0, p.width);
    };
    bool shared_left = true;
    int unit = next_unit(control, at_units);
    float scale = scale_of(unit);
    for (int item = 0;; ++item) {
        if (shared_left && work.is_shared_turn(item, unit, gate_up_units)) {
            shared_left = false;
            multiply_shared();
        }
        if (unit < 0) break;
        const int now = unit;
        float sum[2][4] = {};
        if (now < gate_up_units) {
            multiplier.stages<GateUp, Weight>(sum, x, layout.row_pitch, p.hidden, scale);
        } else {
            ptx::mbarrier_wait(&control.rows_full[at_rows.slot], at_rows.phase);
            const uint8_t* slot = slots + at_rows.slot * layout.tokens * layout.slot_pitch;
            multiplier.stages<Down, Weight>(sum, slot, layout.slot_pitch, p.width, scale);
        }
        unit = next_unit(control, at_units);
        scale = scale_of(unit);
        if (now < gate_up_units) {
            const float* sums = multiplier.gather<GateUp>(sum);
            finish_gate_up(a, control, multiplier, sums, now / work.gate_up_tiles, now % work.gate_up_tiles);
            continue;
        }
        const int of_down = now - gate_up_units, entry = of_down / work.down_tiles, tile = of_down % work.down_tiles;
        const float* sums = multiplier.gather<Down>(sum);
        if (lane == 0) ptx::mbarrier_arrive(&control.rows_empty[at_rows.slot]);
        at_rows.next(kRowSlots);
        finish_down(a, control, multiplier, sums, entry, tile);
    }
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);  // this block's shared rows are stored
    finish_columns(a, control, work);
}

// kAlone: the instance for one token, in which the compiler knows that there is one. It has no code for several, which
// every launch would fetch and jump over, and takes fewer registers.
template <typename Weight, int kPerLane, bool kAlone>
__global__ void __launch_bounds__(kThreads, 1)
    moe_block_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments arguments) {
    DYNAMIC_SHARED(shared_memory);
    Arguments a = arguments;  // a copy, in which these are constants
    a.alone = kAlone;
    if (kAlone) a.p.tokens = a.layout.tokens = 1;
    const Layout& layout = a.layout;
    auto& control = *reinterpret_cast<Control*>(shared_memory + layout.control_offset());
    auto* first = reinterpret_cast<uint32_t*>(shared_memory + layout.first_offset());
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == kWeightWarp * 32) {
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(&control.full[i], 1);
            ptx::mbarrier_init(&control.empty[i], kConsumers);
        }
        for (int i = 0; i < kRowSlots; ++i) {
            ptx::mbarrier_init(&control.rows_full[i], 1);
            ptx::mbarrier_init(&control.rows_empty[i], kConsumers);
        }
        for (int i = 0; i < kUnitSlots; ++i) {
            ptx::mbarrier_init(&control.units_full[i], 1);
            ptx::mbarrier_init(&control.units_empty[i], kConsumers + 1);
        }
        ptx::mbarrier_init(&control.shared_full, 1);
        ptx::mbarrier_init(&control.begun, 1);
        ptx::mbarrier_init(&control.listed, 1);
        ptx::fence_mbarrier_init();
        for (const CUtensorMap* map : {&maps.in_proj, &maps.shared_down, &maps.gate_up, &maps.down}) {
            ptx::prefetch_tensor_map(map);
        }
        if (kScaled<Weight>) ptx::prefetch_tensor_map(&maps.router);
    }
#pragma unroll 1
    for (int i = threadIdx.x; i < layout.experts; i += kThreads) first[i] = UINT32_MAX;
#pragma unroll 1
    for (int i = threadIdx.x; i < a.p.tokens * a.p.top_k * kTokens; i += kThreads) {
        control.ranks[i / kTokens][i % kTokens] = kNobody;
    }
    __syncthreads();
    if (warp == kWeightWarp) {
        if (lane != 0) return;
        stream_weights<Weight>(maps, a, control, shared_memory);
    } else if (warp == kRowWarp) {
        ptx::grid_dependency_wait();
        bring_rows<Weight>(a, control, shared_memory + layout.slots_offset());
    } else {
        multiply<Weight, kPerLane>(a, control, shared_memory);
    }
}

template <typename Weight>
constexpr TensorElement kElement = kScaled<Weight> ? TensorElement::kU8 : TensorElement::kBf16;

// Boxes of 16 rows x a stage's depth of a matrix.
template <typename Weight>
cudaError_t encode_dense(CUtensorMap* map, const void* weight, int rows, int columns) {
    constexpr uint64_t kBytes = sizeof(Weight);
    const auto width = static_cast<uint64_t>(columns);
    return encode_tensor_map<3>(map, kElement<Weight>,
                                {.base = weight,
                                 .sizes = {kChunk<Weight>, static_cast<uint64_t>(rows), width / kChunk<Weight>},
                                 .strides = {kBytes, width * kBytes, kChunkBytes},
                                 .box = {kChunk<Weight>, Dense::kTileColumns, Shape<Dense>::kDepthWarps}},
                                Swizzle::k128);
}

template <typename Weight>
cudaError_t encode(Maps* maps, const MoeBlock& p) {
    constexpr uint64_t kBytes = sizeof(Weight);
    constexpr int kColumns = kChunk<Weight>;
    const auto hidden = static_cast<uint64_t>(p.hidden), width = static_cast<uint64_t>(p.width);
    const auto held = static_cast<uint64_t>(p.held);
    const int projections = kScaled<Weight> ? 2 * p.shared : p.projections;
    const cudaError_t encoded[] = {
        encode_dense<Weight>(&maps->in_proj, p.in_proj, projections, p.hidden),
        kScaled<Weight> ? encode_dense<__nv_bfloat16>(&maps->router, p.router, p.projections - projections, p.hidden)
                        : cudaSuccess,
        encode_dense<Weight>(&maps->shared_down, p.shared_down, p.hidden, p.shared),
        encode_tensor_map<5>(
            &maps->gate_up, kElement<Weight>,
            {.base = p.gate_up,
             .sizes = {kColumns, width, 2, hidden / kColumns, held},
             .strides = {kBytes, hidden * kBytes, width * hidden * kBytes, kChunkBytes, 2 * width * hidden * kBytes},
             .box = {kColumns, GateUp::kTileColumns, 2, Shape<GateUp>::kDepthWarps, 1}},
            Swizzle::k128),
        encode_tensor_map<4>(&maps->down, kElement<Weight>,
                             {.base = p.down,
                              .sizes = {kColumns, hidden, width / kColumns, held},
                              .strides = {kBytes, width * kBytes, kChunkBytes, hidden * width * kBytes},
                              .box = {kColumns, Down::kTileColumns, Shape<Down>::kDepthWarps, 1}},
                             Swizzle::k128)};
    for (const cudaError_t status : encoded) {
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

int projected_pitch(const MoeBlock& p) {
    return (p.projections + 7) / 8 * 8;
}

template <typename Weight>
cudaError_t launch_block(const MoeBlock& p, cudaStream_t stream) {
    Arguments arguments{.p = p, .layout = layout_for<Weight>(p), .projected_pitch = projected_pitch(p)};
    arguments.logits = reinterpret_cast<uint64_t*>(p.scratch + kHeaderWords);
    arguments.rows = arguments.logits + int64_t{kTokens} * p.experts;
    arguments.activations = reinterpret_cast<__nv_bfloat16*>(p.workspace);
    arguments.words = arguments.rows + int64_t{p.top_k} * p.hidden;
    // Rows of tokens that are not there leave room for the words, of all but the oddest sizes.
    const bool alone = p.tokens == 1 && words_pitch(p.width) <= (kTokens - 1) * p.hidden;
    arguments.projected = arguments.activations + int64_t{p.tokens} * p.top_k * p.width;
    arguments.shared_rows = arguments.projected + int64_t{p.tokens} * arguments.projected_pitch;
    Maps maps{};
    const cudaError_t status = encode<Weight>(&maps, p);
    if (status != cudaSuccess) return status;
    const LaunchConfig config = {.grid = dim3(multiprocessor_count()),
                                 .block = dim3(kThreads),
                                 .shared_bytes = static_cast<size_t>(std::max(arguments.layout.bytes(), kLeastShared)),
                                 .stream = stream,
                                 .programmatic = true};
    const auto kernel_of = [&]<bool kAlone>() {
        return p.experts == 256 ? moe_block_kernel<Weight, 8, kAlone> : moe_block_kernel<Weight, 16, kAlone>;
    };
    const auto kernel = alone ? kernel_of.template operator()<true>() : kernel_of.template operator()<false>();
    // Blocks wait for each other: all must be on the device at once.
    if (max_resident_blocks(kernel, config) < static_cast<int>(config.grid.x)) {
        return cudaErrorCooperativeLaunchTooLarge;
    }
    return launch(kernel, config, maps, arguments);
}

}  // namespace

int64_t moe_block_scratch(const MoeBlock& p) {
    return kHeaderWords + int64_t{2} * kTokens * (p.experts + int64_t{p.top_k} * p.hidden);
}

bool moe_block_supported(const MoeBlock& p) {
    const bool scaled = p.router != nullptr;
    const int unit = scaled ? kChunk<E4m3> : kChunk<__nv_bfloat16>;
    const auto whole = [&](int size) { return size >= unit && size % unit == 0; };
    for (const float* scale : {p.in_scale, p.gate_up_scale, p.down_scale, p.shared_scale}) {
        if ((scale != nullptr) != scaled) return false;
    }
    const Layout layout = scaled ? layout_for<E4m3>(p) : layout_for<__nv_bfloat16>(p);
    return p.tokens >= 1 && p.tokens <= kTokens && p.top_k >= 1 && p.top_k <= kMaxTopK &&
           (p.experts == 256 || p.experts == 512) && p.held >= 1 && p.held <= p.experts && whole(p.hidden) &&
           p.hidden <= expert_decode::kMaxDepth && whole(p.width) && whole(p.shared) &&
           p.width <= expert_decode::kMaxDepth && p.shared <= expert_decode::kMaxDepth &&
           p.projections >= 2 * p.shared + p.experts + 1 && p.x_stride % 8 == 0 && is_aligned(p.x) &&
           is_aligned(p.residual) && is_aligned(p.norm_weight) && is_aligned(p.in_proj) && is_aligned(p.router) &&
           is_aligned(p.gate_up) && is_aligned(p.down) && is_aligned(p.shared_down) && is_aligned(p.scratch) &&
           layout.bytes() <= kSharedLimit;
}

size_t moe_block_workspace(const MoeBlock& p) {
    const size_t tokens = p.tokens;
    return tokens * (p.top_k * p.width + p.hidden + projected_pitch(p)) * sizeof(__nv_bfloat16);
}

cudaError_t moe_block(const MoeBlock& p, cudaStream_t stream) {
    if (!moe_block_supported(p)) return cudaErrorInvalidValue;
    return p.router != nullptr ? launch_block<E4m3>(p, stream) : launch_block<__nv_bfloat16>(p, stream);
}

}  // namespace tokenspeed
