// The Gated DeltaNet mixer of a decode layer, up to eight rows, as one persistent launch: residual sum and norm,
// in_proj, convolution, gates, delta rule, gated norm, out_proj.
//
// Bytes. One token of 35B: 50.6 MB of in_proj, 2.1 of state, 16.8 of out_proj: 69.5 MB, 16.7 us at 4.17 TB/s. As three
// launches they take 33: between two of them memory rests.
//
// A block has a list known before it starts, and one ring of 16 KB stages that one thread keeps full in its order,
// without a look at what depends on what:
//     1. tiles of 16 rows of in_proj
//     2. the state of its unit, up to 1 / 8 of a key head's value rows of one sequence
//     3. its tile of out_proj, 16 rows, which memory delivers while the heads are computed
// Eight warps multiply: mma.sync with weights on M = 16 and rows of x on N = 8. A ninth, the keeper, brings what the
// unit reads of its slot beside the state as soon as the kernel ahead is done, and at the end stores what is kept
// there.
//
// Dependencies. Where few read, what is handed on are words with the launch's number in the upper half, and the reader
// spins on the words: the first product as pairs of neighbouring columns, which is what the convolution takes, and the
// sums of squares of 16 rows of a head. The heads, which every block with a tile of out_proj reads, are plain rows, and
// each unit has a flag that is the launch's number when its part is stored (release and acquire). Blocks of a group
// read its slot before they store their sums of squares, so who has seen those of all may store what they share; the
// keeper does, and it stores the updates: a release would wait for them. A block counts launches in a word of its own,
// and in those of blocks that a smaller grid lacks; nothing is reset, so a graph may replay.
//
// Sums are those of linear.cu, unless that splits a tile's depth over a cluster, and of gated_delta_rule_decode.cu,
// whose parts these are: the same bits as the three operators give.
//
// All blocks must be on the device at once, and are: one a multiprocessor, and the next kernel may start only when all
// have. What was measured and tried: docs/kernels/gdn_block.md.
//
// budget: gdn_block_kernel registers<=128 shared<=0 hot sass=HMMA
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>

#include "add_norm.h"
#include "gated_delta_rule_rows.h"
#include "gdn_block.h"
#include "kernels.h"
#include "moe_block_parts.h"

namespace tokenspeed {
namespace {

using namespace gdn_layer;

constexpr unsigned kAllLanes = 0xffffffffu;

struct Maps {
    CUtensorMap in_proj, out_proj;
};

// The words of the sums of squares of token `t`, from the unit's first 16 rows on.
__device__ __forceinline__ uint64_t* squares_of(const Arguments& a, const Place& at, int t) {
    const GatedDeltaRuleDecode& p = a.p.mixer;
    const int64_t row = static_cast<int64_t>(at.sequence) * p.tokens + t;
    return a.squares + (row * p.value_heads * kDim + group_row(at)) / delta_rule::kUnitRows;
}

// Keeps the ring full. One thread.
__device__ void stream(const Maps& maps, const Arguments& a, Control& control, uint8_t* ring) {
    const GdnBlock& p = a.p;
    const Work work(p);
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    const int values = p.mixer.value_heads * kDim;
    Cursor at;
    int asked = 0;
    const auto stage = [&](int bytes, auto load) {
        if (asked++ == kEarlyStages) ptx::mbarrier_wait(&control.begun, 0);
        ptx::mbarrier_wait(&control.empty[at.slot], at.phase ^ 1);
        ptx::mbarrier_arrive_expect_tx(&control.full[at.slot], bytes);
        load(ring + at.slot * kStageBytes, &control.full[at.slot]);
        at.next(a.layout.stages);
    };
    const auto stream_tile = [&](const CUtensorMap* map, int tile, int depth) {
        for (int chunk = 0; chunk * kChunk < depth; chunk += Shape::kDepthWarps) {
            stage(kStageBytes, [&](uint8_t* to, uint64_t* full) {
                ptx::tma_load<3>(to, map, full, {0, tile * kTileColumns, chunk});
            });
        }
    };
    for (int tile = block; tile < work.in_tiles; tile += blocks) stream_tile(&maps.in_proj, tile, p.hidden);
    if (work.has_unit) {
        ptx::grid_dependency_wait();
        ptx::mbarrier_wait(&control.prepared, 0);
        const Place place = work.place(p.mixer);
        const int read = control.slots.read;
        const bool reads = control.slots.write >= 0 && control.slots.context > 0;
        for (int row = 0; reads && row < place.rows; row += kStateRows) {
            const int bytes = min(place.rows - row, kStateRows) * kDim * 4;
            stage(bytes, [&](uint8_t* to, uint64_t* full) {
                const float* from =
                    p.mixer.state + read * p.mixer.state_stride + static_cast<int64_t>(group_row(place) + row) * kDim;
                ptx::bulk_load(to, from, bytes, full);
            });
        }
    }
    for (int tile = work.turn; tile < work.out_tiles; tile += blocks) stream_tile(&maps.out_proj, tile, values);
}

// Brings what the unit reads of its slot beside the state, and in the end stores what is kept there: of the window, the
// ring and the cursor. One warp.
template <int kTokens>
__device__ void keep(const Arguments& a, Control& control, uint8_t* memory) {
    const GatedDeltaRuleDecode& p = a.p.mixer;
    const Work work(a.p);
    const int lane = threadIdx.x % 32, block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    const Place at = work.place(p);
    const int pairs = a.layout.pairs;
    if (work.has_unit) {
        uint8_t* taps = memory + a.layout.taps_offset();
        for (int pair = lane; pair < pairs; pair += 32) {
            ptx::cp_async(taps + pair * 16, p.conv_weight + channel_of(p, at, pair) * kTaps);
        }
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    Slots slots{};
    if (work.has_unit) {
        slots.write = p.write_slot[at.sequence];
        slots.read = p.read_slot[at.sequence];
        slots.context = p.context_lens[at.sequence];
    }
    const uint32_t launch = a.p.scratch[block] + 1;
    if (lane == 0) {
        control.launch = launch;
        ptx::mbarrier_arrive(&control.begun);
    }
    __syncwarp();  // every lane has read the number
    for (int i = block + lane * blocks; i < kMaxBlocks; i += 32 * blocks) a.p.scratch[i] = launch;
    if (!work.has_unit) return;
    const delta_rule::Shared shared(memory + a.layout.delta_offset(), kTokens, at.rows, p.ring_rows);
    if (slots.write >= 0) {
        const int cursor = p.cursor[slots.read * p.cursor_stride + at.key_head * at.ratio];
        constexpr int kPairs = 4;  // of channels, in 16 bytes
        auto* history = memory + a.layout.history_offset();
        const auto* window = p.window + slots.read * p.window_stride;
        for (int i = lane; i < (kTaps - 1) * (pairs / kPairs); i += 32) {
            const int back = kTaps - 1 - i / (pairs / kPairs), pair = i % (pairs / kPairs) * kPairs;
            const bool exists = slots.context >= back;
            const int entry = exists ? (slots.context - back) % p.window_entries : 0;
            ptx::cp_async(history + i * 16, window + static_cast<int64_t>(entry) * p.channels + channel_of(p, at, pair),
                          exists ? 16 : 0);
        }
        if (p.ring_vectors) {
            delta_rule::load_ring<16>(p, at, shared, slots.read, slots.context, 0, true, 0, 1);
        } else {
            delta_rule::load_ring<4>(p, at, shared, slots.read, slots.context, 0, true, 0, 1);
        }
        slots.place(p, cursor, kTokens);
    }
    if (lane == 0) {
        control.place = at;
        control.slots = slots;
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(&control.prepared);
    if (slots.write < 0) return;

    ptx::mbarrier_wait(&control.computed, 0);
    for (int row = lane; row < at.rows; row += 32) {
        float u[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) u[t] = shared.sums[row * 2 * delta_rule::padded(kTokens) + t];
        delta_rule::store_updates<kTokens>(p, at, slots, row, u);
    }
    if (lane < p.split) {  // every block of the group has read
        uint32_t word[1][1];
        ptx::wait_tagged(word, squares_of(a, at, 0) + (lane - at.rank) * at.rows / delta_rule::kUnitRows, 0, 1, launch);
    }
    __syncwarp();
    const auto* inputs = reinterpret_cast<const uint32_t*>(memory + a.layout.inputs_offset());
    const delta_rule::WindowPart part(at);
    delta_rule::store_window<kTokens>(p, at, slots, part, lane, 32, [&](int item) {
        // Chunks of q and k stand first where the block stores them.
        const int pair = item % part.chunks * 4 + (part.shared_chunks > 0 ? 0 : kDim);
        return *reinterpret_cast<const uint4*>(inputs + item / part.chunks * pairs + pair);
    });
    if (at.rank == 0) delta_rule::store_shared_state<kTokens>(p, at, shared, slots, lane, 32);
}

// The warps that multiply: where they are in the ring, and which half of the sums they write next.
struct Multiplier {
    Control& control;
    const Layout& layout;
    const uint8_t* ring;
    float* sums;
    Cursor at;
    int turn = 0;

    // Hands the next stage to `use`, and gives it back.
    template <typename Use>
    __device__ __forceinline__ void stage(Use use) {
        ptx::mbarrier_wait(&control.full[at.slot], at.phase);
        use(ring + at.slot * kStageBytes);
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&control.empty[at.slot]);
        at.next(layout.stages);
    }

    // Multiplies a tile with the operand, and returns this thread's sum: row threadIdx.x / 16, column threadIdx.x % 16.
    __device__ __forceinline__ float tile(const uint8_t* operand, int depth) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4;
        const uint8_t* row = operand + min(quad, layout.rows - 1) * layout.pitch;  // columns without a row are dropped
        float sum[2][4] = {};
        for (int chunk = warp; (chunk - warp) * kChunk < depth; chunk += Shape::kDepthWarps) {
            stage([&](const uint8_t* weights) {
                const uint8_t* low = weights + warp * Shape::kRows * 128;
                if (chunk * kChunk < depth) moe_layer::multiply_chunk(sum, low, low + 8 * 128, row + chunk * 128);
            });
        }
        // The other half was read before every warp came to the barrier of the tile before.
        float* mine = sums + turn * layout.rows * kRowSums;
        turn ^= 1;
        const int first = quad / 2 + quad % 2 * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int of_row = lane % 4 * 2 + i % 2;
            if (of_row >= layout.rows) continue;
            mine[of_row * kRowSums + warp * Shape::kPitch + first + i / 2 * 8] = sum[0][i] + sum[1][i];
        }
        ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
        float total = 0;
        const int of_row = threadIdx.x / kTileColumns;
        if (of_row >= layout.rows) return total;
#pragma unroll
        for (int i = 0; i < Shape::kDepthWarps; ++i) {
            total += mine[of_row * kRowSums + i * Shape::kPitch + threadIdx.x % kTileColumns];
        }
        return total;
    }
};

// The delta rule of the block's unit, from the words of in_proj to those of the heads.
template <int kTokens>
__device__ __forceinline__ void step(const Arguments& a, Control& control, Multiplier& multiplier, uint8_t* memory) {
    const GatedDeltaRuleDecode& p = a.p.mixer;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    ptx::mbarrier_wait(&control.prepared, 0);
    const Place at = control.place;
    const int pairs = a.layout.pairs, pitch = a.pair_pitch, values = p.value_heads * kDim;
    const delta_rule::Shared shared(memory + a.layout.delta_offset(), kTokens, at.rows, p.ring_rows);
    const uint64_t* words = a.projected + static_cast<int64_t>(at.sequence) * kTokens * pitch;
    __nv_bfloat16* heads = a.heads + static_cast<int64_t>(at.sequence) * kTokens * values + group_row(at);
    const auto announce = [&] {
        ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
        if (threadIdx.x == 0) ptx::store_release(a.flags + gridDim.x - 1 - blockIdx.x, control.launch);
    };
    const bool has_gate = warp == kConsumers - 1 && lane < at.ratio * kTokens;
    const int gate_head = at.key_head * at.ratio + lane / kTokens;
    const float a_log = has_gate ? p.a_log[gate_head] : 0, dt_bias = has_gate ? p.dt_bias[gate_head] : 0;
    const uint32_t launch = control.launch;
    const Slots slots = control.slots;
    if (slots.write < 0) {  // padding
        for (int i = threadIdx.x; i < kTokens * at.rows; i += kConsumerThreads) {
            heads[i / at.rows * values + i % at.rows] = __float2bfloat16(0.0f);
        }
        announce();
        return;
    }
    if (warp == kConsumers - 1) delta_rule::suffix_decays(p, at, shared, slots);
    const auto* taps = reinterpret_cast<const uint4*>(memory + a.layout.taps_offset());
    const auto* history = reinterpret_cast<const uint32_t*>(memory + a.layout.history_offset());
    auto* inputs = reinterpret_cast<uint32_t*>(memory + a.layout.inputs_offset());
    for (int pair = threadIdx.x; pair < pairs + at.rows / 2; pair += kConsumerThreads) {
        const bool is_gate = pair >= pairs;
        const int column = is_gate ? p.channels + group_row(at) + 2 * (pair - pairs) : channel_of(p, at, pair);
        uint32_t fresh[kTokens][1];
        ptx::wait_tagged(fresh, words + column / 2, pitch, kTokens, launch);
        if (is_gate) {
            auto* z = reinterpret_cast<uint32_t*>(shared.z) + pair - pairs;
#pragma unroll
            for (int t = 0; t < kTokens; ++t) z[t * at.rows / 2] = fresh[t][0];
            continue;
        }
        uint32_t input[kTaps - 1 + kTokens];
#pragma unroll
        for (int i = 0; i < kTaps - 1; ++i) input[i] = history[i * pairs + pair];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) input[kTaps - 1 + t] = inputs[t * pairs + pair] = fresh[t][0];
        float* destination = pair < kDim / 2 ? shared.query + 2 * pair
                             : pair < kDim   ? shared.key + 2 * pair - kDim
                                             : shared.value + 2 * (pair - kDim);
        delta_rule::convolve<kTokens>(input, taps[pair], destination, pair < kDim ? kDim : at.rows);
    }
    if (has_gate) {
        const int column = p.channels + values + gate_head;  // of b; a is value_heads further
        const auto projection = [&](int of) {
            uint32_t word[1][1];
            ptx::wait_tagged(word, words + lane % kTokens * pitch + of / 2, 0, 1, launch);
            return __ushort_as_bfloat16(static_cast<uint16_t>(of % 2 == 0 ? word[0][0] : word[0][0] >> 16));
        };
        delta_rule::gate(shared, lane, projection(column + p.value_heads), projection(column), a_log, dt_bias);
    }
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);

    for (int i = warp; i < kTokens * kTokens + slots.pending; i += kConsumers) {
        if (i < kTokens * kTokens) {
            delta_rule::triangle<kTokens>(at, shared, i / kTokens, i % kTokens);
        } else {
            delta_rule::pending_products<kTokens>(p, at, shared, slots, i - kTokens * kTokens);
        }
    }
    for (int first = 0; slots.context > 0 && first < at.rows; first += kStateRows) {
        multiplier.stage([&](const uint8_t* state) {
            const int row = warp * 4;  // eight lanes a row
            if (first + row >= at.rows) return;
            float4 of_row[1][4];
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                of_row[0][part] =
                    reinterpret_cast<const float4*>(state)[(row + lane / 8) * (kDim / 4) + part * 8 + lane % 8];
            }
            delta_rule::products_of_rows<kTokens>(shared, of_row, first + row);
        });
    }
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);

    for (int row = threadIdx.x; row < at.rows; row += kConsumerThreads) {
        float u[kTokens];
        delta_rule::update_row<kTokens>(p, at, shared, slots, row, u);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) shared.sums[row * 2 * delta_rule::padded(kTokens) + t] = u[t];
    }
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
    if (lane == 0) ptx::mbarrier_arrive(&control.computed);

    // Gated norm, four rows a thread; the sums of squares of 16 rows go to the other blocks of the head.
    const int quads = at.rows / 4, all = kTokens * quads;
    float weight[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int column = (at.first_row + threadIdx.x % quads * 4) % kDim + i;
        weight[i] = p.norm_weight_is_float ? static_cast<const float*>(p.norm_weight)[column]
                                           : __bfloat162float(static_cast<const __nv_bfloat16*>(p.norm_weight)[column]);
    }
    for (int first = 0; first < all; first += kConsumerThreads) {
        const int item = min(first + static_cast<int>(threadIdx.x), all - 1), t = item / quads, row = item % quads * 4;
        const float4 o = *reinterpret_cast<const float4*>(shared.value + t * at.rows + row);
        float squares = delta_rule::dot(o, o);
        squares += __shfl_xor_sync(kAllLanes, squares, 1);
        squares += __shfl_xor_sync(kAllLanes, squares, 2);
        if (first + static_cast<int>(threadIdx.x) >= all || lane % 4 != 0) continue;
        ptx::store_tagged(squares_of(a, at, t) + row / delta_rule::kUnitRows, __float_as_uint(squares), launch);
    }
    for (int item = threadIdx.x; item < all; item += kConsumerThreads) {
        const int t = item / quads, row = item % quads * 4;
        const float4 o = *reinterpret_cast<const float4*>(shared.value + t * at.rows + row);
        const int in_head = (at.first_row + row) % kDim;
        uint32_t bits[delta_rule::kUnits];
        ptx::wait_tagged(bits, squares_of(a, at, t) + (row - in_head) / delta_rule::kUnitRows, launch);
        float sums[delta_rule::kUnits];
#pragma unroll
        for (int i = 0; i < delta_rule::kUnits; ++i) sums[i] = __uint_as_float(bits[i]);
        const float squares = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
        const float inverse = rsqrtf(squares / kDim + p.eps), in[4] = {o.x, o.y, o.z, o.w};
        float result[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float z = __bfloat162float(shared.z[t * at.rows + row + i]);
            result[i] = in[i] * inverse * weight[i] * (z * delta_rule::sigmoid(z));
        }
        *reinterpret_cast<uint2*>(heads + static_cast<int64_t>(t) * values + row) =
            make_uint2(pack<__nv_bfloat16>(result[0], result[1]), pack<__nv_bfloat16>(result[2], result[3]));
    }
    announce();
}

// Brings out_proj's operand into shared memory, once every unit has announced its part.
__device__ __forceinline__ void stage_heads(const Arguments& a, uint32_t launch, uint8_t* operand) {
    constexpr int kAtOnce = 2;
    const GatedDeltaRuleDecode& p = a.p.mixer;
    const int units = p.sequences * p.key_heads * p.split, pieces = p.value_heads * kDim / 8;
    for (int unit = threadIdx.x; unit < units; unit += kConsumerThreads) ptx::wait_equal(a.flags + unit, launch);
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
    for (int row = 0; row < a.p.tokens; ++row) {
        const __nv_bfloat16* from = a.heads + static_cast<int64_t>(row) * p.value_heads * kDim;
        for (int base = threadIdx.x; base < pieces; base += kAtOnce * kConsumerThreads) {
            uint4 values[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int piece = base + i * kConsumerThreads;
                if (piece < pieces) values[i] = ptx::load_16_no_allocate(from + piece * 8);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int piece = base + i * kConsumerThreads;
                if (piece < pieces) store_16(operand + row * a.layout.pitch + piece * 16, values[i]);
            }
        }
    }
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
}

// The warps that multiply, from the norm to the output.
template <int kTokens>
__device__ void multiply(const Arguments& a, Control& control, uint8_t* memory) {
    const GdnBlock& p = a.p;
    const Layout& layout = a.layout;
    const Work work(p);
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    const int row = threadIdx.x / kTileColumns, column = threadIdx.x % kTileColumns;  // what a thread has of a tile
    uint8_t* operand = memory + layout.operand_offset();
    stage_norm(p, operand, layout.pitch, control.squares, [] {}, [] {});
    ptx::mbarrier_wait(&control.begun, 0);
    const uint32_t launch = control.launch;
    Multiplier multiplier{control, layout, memory, reinterpret_cast<float*>(memory + layout.sums_offset()), {}};

    for (int tile = block; tile < work.in_tiles; tile += blocks) {
        const float sum = multiplier.tile(operand, p.hidden);
        if (static_cast<int>(threadIdx.x) / 32 * 2 >= p.tokens) continue;
        const float neighbour = __shfl_down_sync(kAllLanes, sum, 1);
        if (column % 2 != 0 || row >= p.tokens) continue;
        ptx::store_tagged(a.projected + static_cast<int64_t>(row) * a.pair_pitch + (tile * kTileColumns + column) / 2,
                          pack<__nv_bfloat16>(sum, neighbour), launch);
    }
    if (work.has_unit) step<kTokens>(a, control, multiplier, memory);
    if (work.turn < work.out_tiles) stage_heads(a, launch, operand);
    for (int tile = work.turn; tile < work.out_tiles; tile += blocks) {
        const float sum = multiplier.tile(operand, p.mixer.value_heads * kDim);
        if (row >= p.tokens) continue;
        p.out[static_cast<int64_t>(row) * p.hidden + tile * kTileColumns + column] = __float2bfloat16(sum);
    }
    if (!work.has_unit) return;
    const Slots slots = control.slots;
    if (slots.write < 0 || !slots.fold) return;
    const Place at = control.place;
    const delta_rule::Shared shared(memory + layout.delta_offset(), kTokens, at.rows, p.mixer.ring_rows);
    // The sums of a row end with its update, which another warp's thread may have stored.
    ptx::mbarrier_wait(&control.computed, 0);
    delta_rule::fold(p.mixer, at, shared, slots, kTokens);
}

template <int kTokens>
__global__ void __launch_bounds__(kThreads, kTokens == 1 ? 2 : 1)
    gdn_block_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(memory);
    auto& control = *reinterpret_cast<Control*>(memory + a.layout.control_offset());
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == kWeightWarp * 32) {
        for (int i = 0; i < a.layout.stages; ++i) {
            ptx::mbarrier_init(&control.full[i], 1);
            ptx::mbarrier_init(&control.empty[i], kConsumers);
        }
        ptx::mbarrier_init(&control.begun, 1);
        ptx::mbarrier_init(&control.prepared, 1);
        ptx::mbarrier_init(&control.computed, kConsumers);
        ptx::fence_mbarrier_init();
        for (const CUtensorMap* map : {&maps.in_proj, &maps.out_proj}) ptx::prefetch_tensor_map(map);
    }
    __syncthreads();
    if (warp == kWeightWarp) {
        if (threadIdx.x % 32 == 0) stream(maps, a, control, memory);
    } else if (warp == kKeeperWarp) {
        keep<kTokens>(a, control, memory);
    } else {
        multiply<kTokens>(a, control, memory);
    }
}

// Boxes of 16 rows x 512 columns of a matrix.
cudaError_t encode(CUtensorMap* map, const __nv_bfloat16* weight, int rows, int columns) {
    const auto width = static_cast<uint64_t>(columns);
    return encode_tensor_map<3>(map, TensorElement::kBf16,
                                {.base = weight,
                                 .sizes = {kChunk, static_cast<uint64_t>(rows), width / kChunk},
                                 .strides = {2, width * 2, kChunk * 2},
                                 .box = {kChunk, kTileColumns, Shape::kDepthWarps}},
                                Swizzle::k128);
}

int block_count() {
    return std::min(multiprocessor_count(), kMaxBlocks);
}

// As many units as the blocks take, one each; 0 where a sequence's key heads are more.
int choose_split(const GatedDeltaRuleDecode& p) {
    int split = 8;
    while (split > 0 && int64_t{p.sequences} * p.key_heads * split > block_count()) split /= 2;
    return split;
}

// With what the launcher sets.
GdnBlock completed(GdnBlock p) {
    GatedDeltaRuleDecode& mixer = p.mixer;
    mixer.split = choose_split(mixer);
    mixer.ring_vectors =
        reinterpret_cast<uintptr_t>(mixer.ring) % 16 == 0 && mixer.ring_stride % 4 == 0 && mixer.ring_width % 4 == 0;
    return p;
}

template <int kTokens>
cudaError_t launch_tokens(const Maps& maps, const Arguments& arguments, cudaStream_t stream) {
    const LaunchConfig config = {.grid = dim3(block_count()),
                                 .block = dim3(kThreads),
                                 .shared_bytes = static_cast<size_t>(arguments.layout.bytes()),
                                 .stream = stream,
                                 .programmatic = true};
    // Blocks wait for each other: all must be on the device at once.
    if (max_resident_blocks(gdn_block_kernel<kTokens>, config) < static_cast<int>(config.grid.x)) {
        return cudaErrorCooperativeLaunchTooLarge;
    }
    return launch(gdn_block_kernel<kTokens>, config, maps, arguments);
}

}  // namespace

int64_t gdn_block_scratch(const GdnBlock& p) {
    return 2 * kMaxBlocks + int64_t{2} * kRows * (pair_pitch(p) + p.mixer.value_heads * delta_rule::kUnits);
}

size_t gdn_block_workspace(const GdnBlock& p) {
    return static_cast<size_t>(p.tokens) * p.mixer.value_heads * kDim * sizeof(__nv_bfloat16);
}

bool gdn_block_supported(const GdnBlock& p) {
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    const GatedDeltaRuleDecode& mixer = p.mixer;
    if (!gated_delta_rule_decode_supported(mixer)) return false;
    const int values = mixer.value_heads * kDim;
    const bool shapes = p.tokens >= 1 && p.tokens <= kRows && mixer.tokens <= kTokensLimit &&
                        p.tokens == mixer.sequences * mixer.tokens && p.hidden % kChunk == 0 && p.hidden >= kChunk &&
                        p.projections >= mixer.channels + values + 2 * mixer.value_heads &&
                        p.projections <= INT32_MAX / 2 && choose_split(mixer) > 0;
    return shapes && p.x_stride % 8 == 0 && aligned(p.x) && aligned(p.residual) && aligned(p.norm_weight) &&
           aligned(p.in_proj) && aligned(p.out_proj) && aligned(p.scratch) &&
           layout_for(completed(p)).bytes() <= kSharedLimit;
}

cudaError_t gdn_block(const GdnBlock& p, cudaStream_t stream) {
    if (!gdn_block_supported(p)) return cudaErrorInvalidValue;
    Arguments arguments{};
    arguments.p = completed(p);
    arguments.layout = layout_for(arguments.p);
    arguments.pair_pitch = pair_pitch(p);
    arguments.flags = p.scratch + kMaxBlocks;
    arguments.projected = reinterpret_cast<uint64_t*>(p.scratch + 2 * kMaxBlocks);
    arguments.squares = arguments.projected + int64_t{kRows} * pair_pitch(p);
    arguments.heads = reinterpret_cast<__nv_bfloat16*>(p.workspace);
    Maps maps;
    cudaError_t status = encode(&maps.in_proj, p.in_proj, p.projections, p.hidden);
    if (status != cudaSuccess) return status;
    status = encode(&maps.out_proj, p.out_proj, p.hidden, p.mixer.value_heads * kDim);
    if (status != cudaSuccess) return status;
    switch (p.mixer.tokens) {
        case 1:
            return launch_tokens<1>(maps, arguments, stream);
        case 2:
            return launch_tokens<2>(maps, arguments, stream);
        case 3:
            return launch_tokens<3>(maps, arguments, stream);
        default:
            return launch_tokens<4>(maps, arguments, stream);
    }
}

}  // namespace tokenspeed
