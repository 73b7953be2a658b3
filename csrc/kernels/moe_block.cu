// The mixture of experts of a decode layer, 1 to 8 tokens, as one persistent launch: residual sum and norm, the router
// beside the shared expert's gate and up, top-k, the experts, and the weighted sum with the shared expert in it.
//
// Bytes. One token of 35B: 5.3 MB of the first product, 50.3 of eight experts, 2.1 of the shared expert's down: 57.7
// MB, 13.8 us at 4.17 TB/s. As launches the parts cost 17 us more: each ends, waits and fills its ring anew.
//
// A block has a list of units, cut from the same weights whatever the routing says, and one ring of 16 KB stages that
// one thread keeps full in the order of the list:
//     1. tiles of 16 rows of in_proj            before the wait for the kernel ahead: nobody waits for weights
//     2. tiles of 16 columns of shared_down     the same
//     3. gate_up: 16 gate and 16 up rows of an entry, an expert that a token chose
//     4. down: 64 rows of an entry
// Units go round the blocks, entry by entry, and 4 goes on at the block where 3 ended. So the first entries'
// activations are complete when a block comes to its first unit of down, and the ring is full of down's weights while
// it waits for the last: memory does not rest. Eight warps multiply: mma.sync with weights on M = 16 and tokens on N =
// 8, all of them for each expert: the operand is the same for every unit, and columns of tokens that did not choose the
// expert are not stored. Another warp brings the activations of units of 2 and 4 into shared memory.
//
// Dependencies. Where a wait is all there is to do, what is handed on carries its own flag: the router's logits and the
// rows of down are words with the launch's number in the upper half, and the reader spins on the words. The others are
// counters: one of the first product (for 2), one for each entry (3 to 4); who stores adds with a release, who needs it
// waits with an acquire. Every block repeats norm and top-k, which costs less than to wait for another's. Last, a block
// finishes its own 16 columns of the output, those of its tile of shared_down, ranks in order: no float atomics, the
// same input gives the same bits. All this lies in the caller's memory, since its old content must be known: a launch
// counts itself, uses one of two sets of counters in turn and clears the other, so a graph may replay.
//
// All blocks must be on the device at once, and are: one a multiprocessor, and the next kernel may start only when all
// have. What the kernel ahead still holds it gives back without waiting for us. The next kernel's ring fills where ours
// rests: between the first product and the first expert.
//
// Rounding is that of the operators that the torch implementation names. What depends on the weights' format: the
// tensor maps, Shape, and multiply_chunk.
//
// budget: moe_block_kernel registers<=96 shared<=0 hot sass=HMMA
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>
#include <reduce.h>

#include "kernels.h"
#include "moe_block.h"
#include "moe_select.h"

namespace tokenspeed {
namespace {

using namespace moe_layer;

constexpr int kBatch = 4;        // 16-byte loads of an operand that a thread has under way
constexpr int kRanksAtOnce = 8;  // of a token's rows, four lanes each

struct Maps {
    CUtensorMap in_proj, shared_down, gate_up, down;
};

// Units of a list that goes round the blocks: this block's first. `before`: units that went round before.
__device__ __forceinline__ int first_unit(int before) {
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    const int first = block - before % blocks;
    return first < 0 ? first + blocks : first;
}

// How many units of each kind there are, and who has them.
struct Work {
    int in_tiles, router_tile, router_tiles, column_tiles, gate_up_tiles, down_tiles;

    __device__ explicit Work(const MoeBlock& p)
        : in_tiles((p.projections + Dense::kTileColumns - 1) / Dense::kTileColumns),
          router_tile(2 * p.shared / Dense::kTileColumns),
          router_tiles(p.experts / Dense::kTileColumns),
          column_tiles(p.hidden / Dense::kTileColumns),
          gate_up_tiles(p.width / GateUp::kTileColumns),
          down_tiles((p.hidden + Down::kTileColumns - 1) / Down::kTileColumns) {}
    // Whether a tile of in_proj is the router's: its product goes as tagged words.
    __device__ bool routes(int tile) const { return tile >= router_tile && tile < router_tile + router_tiles; }
    // What `projected` counts to.
    __device__ uint32_t projections(int tokens) const {
        return gridDim.x + static_cast<uint32_t>((in_tiles - router_tiles) * tokens);
    }
};

// The copies of one unit; `load` starts that of one stage, given its first chunk of depth. One thread.
template <typename Product, typename Load>
__device__ __forceinline__ void stream_unit(Control& control, uint8_t* ring, int stages, Cursor& at, int depth,
                                            Load load) {
    for (int chunk = 0; chunk * kChunk < depth; chunk += Shape<Product>::kDepthWarps) {
        ptx::mbarrier_wait(&control.empty[at.slot], at.phase ^ 1);
        ptx::mbarrier_arrive_expect_tx(&control.full[at.slot], kStageBytes);
        load(ring + at.slot * kStageBytes, &control.full[at.slot], chunk);
        at.next(stages);
    }
}

__device__ void stream_weights(const Maps& maps, const Arguments& a, Control& control, uint8_t* ring) {
    const MoeBlock& p = a.p;
    const Work work(p);
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x), stages = a.layout.stages;
    Cursor at;
    for (int tile = block; tile < work.in_tiles; tile += blocks) {
        stream_unit<Dense>(control, ring, stages, at, p.hidden, [&](uint8_t* stage, uint64_t* full, int chunk) {
            ptx::tma_load<3>(stage, &maps.in_proj, full, {0, tile * Dense::kTileColumns, chunk});
        });
    }
    for (int tile = block; tile < work.column_tiles; tile += blocks) {
        stream_unit<Dense>(control, ring, stages, at, p.shared, [&](uint8_t* stage, uint64_t* full, int chunk) {
            ptx::tma_load<3>(stage, &maps.shared_down, full, {0, tile * Dense::kTileColumns, chunk});
        });
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    ptx::mbarrier_wait(&control.listed, 0);
    const int units = control.entries * work.gate_up_tiles;
    for (int unit = block; unit < units; unit += blocks) {
        const int expert = control.experts[unit / work.gate_up_tiles], tile = unit % work.gate_up_tiles;
        stream_unit<GateUp>(control, ring, stages, at, p.hidden, [&](uint8_t* stage, uint64_t* full, int chunk) {
            ptx::tma_load<5>(stage, &maps.gate_up, full, {0, tile * GateUp::kTileColumns, 0, chunk, expert});
        });
    }
    const int down_units = control.entries * work.down_tiles;
    for (int unit = first_unit(units); unit < down_units; unit += blocks) {
        const int expert = control.experts[unit / work.down_tiles], tile = unit % work.down_tiles;
        stream_unit<Down>(control, ring, stages, at, p.width, [&](uint8_t* stage, uint64_t* full, int chunk) {
            ptx::tma_load<4>(stage, &maps.down, full, {0, tile * Down::kTileColumns, chunk, expert});
        });
    }
}

// Brings rows into the row slots: first those of the shared expert, silu(gate) * up, then those of each unit of down.
// One warp.
__device__ void bring_rows(const Arguments& a, Control& control, uint8_t* slots) {
    const MoeBlock& p = a.p;
    const Work work(p);
    const int lane = threadIdx.x % 32, blocks = static_cast<int>(gridDim.x);
    const int slot_bytes = a.layout.tokens * a.layout.slot_pitch;
    ptx::mbarrier_wait(&control.begun, 0);
    CounterSet& counters = reinterpret_cast<Header*>(p.scratch)->sets[control.launch % 2];
    Cursor at;
    if (static_cast<int>(blockIdx.x) < work.column_tiles) {
        if (lane == 0) ptx::wait_at_least(&counters.projected, work.projections(p.tokens));
        __syncwarp();
        const int pieces = p.shared / 8;
        const int all = p.tokens * pieces;
        for (int base = lane; base < all; base += kBatch * 32) {
            uint4 gates[kBatch], ups[kBatch];
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int at_piece = base + i * 32;
                if (at_piece >= all) continue;
                const auto* gate = a.projected + at_piece / pieces * a.projected_pitch + at_piece % pieces * 8;
                gates[i] = ptx::load_16_no_allocate(gate);
                ups[i] = ptx::load_16_no_allocate(gate + p.shared);
            }
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int at_piece = base + i * 32;
                if (at_piece >= all) continue;
                const Float8 g = unpack(gates[i]), u = unpack(ups[i]);
                Float8 y;
#pragma unroll
                for (int j = 0; j < 8; ++j) y.v[j] = silu(g.v[j]) * u.v[j];
                store_16(slots + at_piece / pieces * a.layout.slot_pitch + at_piece % pieces * 16, pack(y));
            }
        }
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&control.rows_full[0]);
        at.next(kRowSlots);
    }
    ptx::mbarrier_wait(&control.listed, 0);
    const int units = control.entries * work.down_tiles, pieces = p.width / 8;
    for (int unit = first_unit(control.entries * work.gate_up_tiles); unit < units; unit += blocks) {
        const int entry = unit / work.down_tiles;
        const bool chose = lane < p.tokens && control.ranks[entry][lane] != kNobody;
        unsigned left = __ballot_sync(kAllLanes, chose);
        if (lane == 0) ptx::wait_at_least(&counters.activated[entry], __popc(left) * work.gate_up_tiles);
        __syncwarp();
        ptx::mbarrier_wait(&control.rows_empty[at.slot], at.phase ^ 1);
        uint8_t* slot = slots + at.slot * slot_bytes;
        for (; left != 0; left &= left - 1) {
            const int token = __ffs(static_cast<int>(left)) - 1;
            const auto* row = a.activations + int64_t{token * p.top_k + control.ranks[entry][token]} * p.width;
            for (int base = lane; base < pieces; base += kBatch * 32) {
                uint4 values[kBatch];
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    if (base + i * 32 < pieces) values[i] = ptx::load_16_no_allocate(row + (base + i * 32) * 8);
                }
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    if (base + i * 32 >= pieces) continue;
                    store_16(slot + token * a.layout.slot_pitch + (base + i * 32) * 16, values[i]);
                }
            }
        }
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&control.rows_full[at.slot]);
        at.next(kRowSlots);
    }
}

// sum += the warp's 16 rows x 64 of depth of a stage times the same depth of this lane's token. As in
// moe_experts_decode.cu; `low` and `high`: the fragment's first and last eight rows; `row`: the token's chunk.
__device__ __forceinline__ void multiply_chunk(float (&sum)[2][4], const uint8_t* low, const uint8_t* high,
                                               const uint8_t* row) {
    const int lane = threadIdx.x % 32, quad = lane / 4, piece = lane % 4;
    const int place = quad / 2 + quad % 2 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int offset = place * 128 + ((half * 4 + piece) ^ place) * 16;
        const uint4 upper = *reinterpret_cast<const uint4*>(low + offset);
        const uint4 lower = *reinterpret_cast<const uint4*>(high + offset);
        const uint4 b = *reinterpret_cast<const uint4*>(row + half * 64 + piece * 16);
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
        ptx::mma_m16n8k16<__nv_bfloat16>(sum[0], first, b.x, b.y);
        ptx::mma_m16n8k16<__nv_bfloat16>(sum[1], second, b.z, b.w);
    }
}

// The warps that multiply: where they are in the ring, and which half of the sums they write next.
struct Multiplier {
    Control& control;
    const Layout& layout;
    const uint8_t* ring;
    float* sums;
    Cursor at;
    int turn = 0;

    // Multiplies one unit with rows of `operand`, and returns its sums [depth warp, token, row].
    template <typename Product>
    __device__ __forceinline__ const float* unit(const uint8_t* operand, int pitch, int depth) {
        constexpr int kRowWarps = Product::kRowWarps;
        using S = Shape<Product>;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4;
        const int row_warp = warp % kRowWarps, depth_warp = warp / kRowWarps, tokens = layout.tokens;
        // Of gate_up all gate rows of a chunk come first, then its up rows; else 16 rows of a warp are neighbours.
        constexpr bool kPairs = std::is_same_v<Product, GateUp>;
        const int low = depth_warp * S::kRows * 128 + row_warp * (kPairs ? 8 : 16) * 128;
        const int high = low + (kPairs ? S::kRows / 2 : 8) * 128;
        const uint8_t* row = operand + min(quad, tokens - 1) * pitch;  // columns without a token are not stored
        float sum[2][4] = {};
        for (int chunk = depth_warp; (chunk - depth_warp) * kChunk < depth; chunk += S::kDepthWarps) {
            ptx::mbarrier_wait(&control.full[at.slot], at.phase);
            const uint8_t* stage = ring + at.slot * kStageBytes;
            if (chunk * kChunk < depth) multiply_chunk(sum, stage + low, stage + high, row + chunk * 128);
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(&control.empty[at.slot]);
            at.next(layout.stages);
        }
        // The other half was read before every warp came to the barrier of the unit before.
        float* mine = sums + turn * tokens * kTokenSums;
        turn ^= 1;
        const int first_row = row_warp * 16 + quad / 2 + quad % 2 * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = lane % 4 * 2 + i % 2;
            if (token >= tokens) continue;
            mine[(depth_warp * tokens + token) * S::kPitch + first_row + i / 2 * 8] = sum[0][i] + sum[1][i];
        }
        ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
        return mine;
    }

    // A row's sum of a token over the warps that shared the depth.
    template <typename Product>
    __device__ __forceinline__ float total(const float* unit_sums, int token, int row) const {
        float value = 0;
#pragma unroll
        for (int i = 0; i < Shape<Product>::kDepthWarps; ++i) {
            value += unit_sums[(i * layout.tokens + token) * Shape<Product>::kPitch + row];
        }
        return value;
    }
};

// Writes the norm of x + residual into `rows`, and this block's share of the sum into memory. One token: all threads
// have a part of it, and the first part of the norm's weight comes before the wait; else a warp has a token.
__device__ void stage_norm(const Arguments& a, Control& control, uint8_t* rows) {
    const MoeBlock& p = a.p;
    const bool alone = p.tokens == 1;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int token = alone ? 0 : warp, from = (alone ? threadIdx.x : lane) * 8;
    const int step = (alone ? kConsumerThreads : 32) * 8;
    uint4 early{};
    if (from < p.hidden) early = ptx::load_16_read_only(p.norm_weight + from);
    ptx::grid_dependency_wait();
    uint8_t* mine = rows + token * a.layout.row_pitch;
    float total = 0;
    uint32_t launches = 0;
    if (token < p.tokens) {
        const __nv_bfloat16* x = p.x + token * p.x_stride;
        const __nv_bfloat16* residual = p.residual + int64_t{token} * p.hidden;
        for (int base = from; base < p.hidden; base += kBatch * step) {
            uint4 added[kBatch], old[kBatch];  // all on their way before the first is used
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int column = base + i * step;
                if (column >= p.hidden) continue;
                added[i] = ptx::load_16_no_allocate(x + column);
                old[i] = ptx::load_16_no_allocate(residual + column);
            }
            if (threadIdx.x == 0 && base == from) launches = *p.scratch;  // behind x: an acquire would go first
#pragma unroll
            for (int i = 0; i < kBatch; ++i) {
                const int column = base + i * step;
                if (column >= p.hidden) continue;
                const uint4 sum = pack(unpack(added[i]) + unpack(old[i]));
                total += sum_of_squares(unpack(sum));
                store_16(mine + column * 2, sum);
                if (column / 8 % gridDim.x == blockIdx.x) store_16(p.sum + int64_t{token} * p.hidden + column, sum);
            }
        }
    }
    if (threadIdx.x == 0) {
        control.launch = launches + 1;
        ptx::mbarrier_arrive(&control.begun);
        // Whoever sees this count knows that the number has been read.
        ptx::add_relaxed(&reinterpret_cast<Header*>(p.scratch)->sets[(launches + 1) % 2].projected, 1);
    }
    total = warp_sum(total);
    if (alone) {
        if (lane == 0) control.squares[warp] = total;
        ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
        total = 0;
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) total += control.squares[i];
    }
    if (token < p.tokens) {
        const float inverse = rsqrtf(total / p.hidden + p.eps);
        for (int column = from; column < p.hidden; column += step) {
            uint8_t* place = mine + column * 2;
            const Float8 s = unpack(*reinterpret_cast<const uint4*>(place));
            const Float8 w = unpack(column == from ? early : ptx::load_16_read_only(p.norm_weight + column));
            Float8 y;
#pragma unroll
            for (int j = 0; j < 8; ++j) y.v[j] = s.v[j] * inverse * (1.0f + w.v[j]);
            store_16(place, pack(y));
        }
    }
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
}

// Each token's choices by a warp, then the list of entries by the first: experts here that any token chose, in the
// order of the first choice. Weights come after the list: nobody waits for them.
template <int kPerLane>
__device__ void list_entries(const Arguments& a, Control& control, uint32_t* first) {
    const MoeBlock& p = a.p;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, choices = p.tokens * p.top_k;
    Choice choice{};
    if (warp < p.tokens) {
        uint32_t bits[kPerLane];
        ptx::wait_tagged(bits, a.logits + warp * p.experts + lane * kPerLane, control.launch);
        __syncwarp();
        float logits[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) logits[i] = __uint_as_float(bits[i]);
        choice = select_experts(logits, p.top_k);
        const int flat = warp * p.top_k + lane, here = choice.expert - p.first_expert;
        const bool held = lane < p.top_k && here >= 0 && here < p.held;
        if (lane < p.top_k) control.chosen[flat] = static_cast<int16_t>(held ? here : -1);
        if (p.tokens == 1) {  // no two choices are the same
            const unsigned all = __ballot_sync(kAllLanes, held);
            if (held) {
                const int entry = __popc(all & ((1u << lane) - 1));
                control.experts[entry] = static_cast<uint16_t>(here);
                control.ranks[entry][0] = static_cast<uint8_t>(lane);
            }
            if (lane == 0) control.entries = __popc(all);
        } else if (held) {
            atomicMin(first + here, static_cast<uint32_t>(flat));
        }
    }
    if (p.tokens > 1) {
        ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
        if (warp == 0) {
            int entries = 0;
            for (int base = 0; base < choices; base += 32) {
                const int flat = base + lane, here = flat < choices ? control.chosen[flat] : -1;
                const bool leads = here >= 0 && first[here] == static_cast<uint32_t>(flat);
                const unsigned leaders = __ballot_sync(kAllLanes, leads);
                if (leads) {
                    const int entry = entries + __popc(leaders & ((1u << lane) - 1));
                    control.experts[entry] = static_cast<uint16_t>(here);
                    control.entry_of[flat] = static_cast<uint8_t>(entry);
                }
                entries += __popc(leaders);
            }
            __syncwarp();
            for (int flat = lane; flat < choices; flat += 32) {
                const int here = control.chosen[flat];
                if (here < 0) continue;
                const int token = flat / p.top_k;
                control.ranks[control.entry_of[first[here]]][token] = static_cast<uint8_t>(flat - token * p.top_k);
            }
            if (lane == 0) control.entries = entries;
        }
    }
    if (warp == 0) {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&control.listed);
    }
    if (warp < p.tokens) {
        const float weight = weight_of(choice, p.top_k);
        if (lane < p.top_k) control.weights[warp * p.top_k + lane] = to_float(__float2bfloat16(weight));
    }
}

// out of this block's columns: a warp has 16 of them of one token, a lane four of one of its ranks.
__device__ void finish_columns(const Arguments& a, const Control& control, const Work& work) {
    const MoeBlock& p = a.p;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = static_cast<int>(gridDim.x);
    const int block = static_cast<int>(blockIdx.x);
    const int tiles = block < work.column_tiles ? (work.column_tiles - block + blocks - 1) / blocks : 0;
    for (int item = warp; item < tiles * p.tokens; item += kConsumers) {
        const int token = item % p.tokens, first = token * p.top_k;
        const int column = (block + item / p.tokens * blocks) * Dense::kTileColumns + lane % 4 * 4;
        const uint2 shared = *reinterpret_cast<const uint2*>(a.shared_rows + int64_t{token} * p.hidden + column);
        const float share = sigmoid(to_float(a.projected[token * a.projected_pitch + 2 * p.shared + p.experts]));
        float sum[4] = {};
        for (int base = 0; base < p.top_k; base += kRanksAtOnce) {
            const int rank = base + lane / 4;
            uint32_t values[4] = {};
            if (rank < p.top_k && control.chosen[first + rank] >= 0) {
                ptx::wait_tagged(values, a.rows + int64_t{first + rank} * p.hidden + column, control.launch);
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kRanksAtOnce; ++i) {
                const bool counts = base + i < p.top_k && control.chosen[first + base + i] >= 0;
                const float weight = counts ? control.weights[first + base + i] : 0.0f;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const uint32_t value = __shfl_sync(kAllLanes, values[j], i * 4 + lane % 4);
                    if (counts) sum[j] += weight * __uint_as_float(value);
                }
            }
        }
        const float added[4] = {__uint_as_float(shared.x << 16), __uint_as_float(shared.x & 0xffff0000u),
                                __uint_as_float(shared.y << 16), __uint_as_float(shared.y & 0xffff0000u)};
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] = to_float(__float2bfloat16(sum[j])) + share * added[j];
        if (lane >= 4) continue;
        *reinterpret_cast<uint2*>(p.out + int64_t{token} * p.hidden + column) =
            make_uint2(pack<__nv_bfloat16>(sum[0], sum[1]), pack<__nv_bfloat16>(sum[2], sum[3]));
    }
}

// The warps that multiply, from the norm to the sum.
template <int kPerLane>
__device__ void multiply(const Arguments& a, Control& control, uint8_t* shared_memory) {
    const Layout& layout = a.layout;
    const MoeBlock& p = a.p;
    const Work work(p);
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    uint8_t* x = shared_memory + layout.rows_offset();
    uint8_t* slots = shared_memory + layout.slots_offset();
    auto* first = reinterpret_cast<uint32_t*>(shared_memory + layout.first_offset());
    // What a thread finishes of a tile of 16 columns.
    const int token = threadIdx.x / 16, column = threadIdx.x % 16;
    stage_norm(a, control, x);
    auto& header = *reinterpret_cast<Header*>(p.scratch);
    const uint32_t launch = control.launch;
    CounterSet& counters = header.sets[launch % 2];
    Multiplier multiplier{
        control, layout, shared_memory, reinterpret_cast<float*>(shared_memory + layout.sums_offset()), {}};

    for (int tile = block; tile < work.in_tiles; tile += blocks) {
        const float* sums = multiplier.unit<Dense>(x, layout.row_pitch, p.hidden);
        if (warp * 2 >= p.tokens) continue;
        const int output = tile * Dense::kTileColumns + column;
        const bool inside = token < p.tokens && output < p.projections;
        const __nv_bfloat16 value = __float2bfloat16(inside ? multiplier.total<Dense>(sums, token, column) : 0.0f);
        if (work.routes(tile)) {
            if (!inside) continue;
            ptx::store_tagged(a.logits + token * p.experts + output - 2 * p.shared, __float_as_uint(to_float(value)),
                              launch);
            continue;
        }
        if (inside) a.projected[token * a.projected_pitch + output] = value;
        __syncwarp();
        if (token < p.tokens && column == 0) ptx::add_release(&counters.projected, 1);
    }

    list_entries<kPerLane>(a, control, first);
    ptx::mbarrier_wait(&control.listed, 0);

    Cursor at_rows;
    if (block < work.column_tiles) {
        ptx::mbarrier_wait(&control.rows_full[0], 0);  // and all blocks have read the launch's number
        if (block == 0) {
            auto* other = reinterpret_cast<uint32_t*>(&header.sets[(launch + 1) % 2]);
            for (int i = threadIdx.x; i < kSetWords; i += kConsumerThreads) other[i] = 0;
            if (threadIdx.x == 0) header.launches = launch;
        }
        for (int tile = block; tile < work.column_tiles; tile += blocks) {
            const float* sums = multiplier.unit<Dense>(slots, layout.slot_pitch, p.shared);
            if (token < p.tokens) {
                a.shared_rows[int64_t{token} * p.hidden + tile * Dense::kTileColumns + column] =
                    __float2bfloat16(multiplier.total<Dense>(sums, token, column));
            }
        }
        if (lane == 0) ptx::mbarrier_arrive(&control.rows_empty[0]);
        at_rows.next(kRowSlots);
    }

    const int units = control.entries * work.gate_up_tiles;
    for (int unit = block; unit < units; unit += blocks) {
        const float* sums = multiplier.unit<GateUp>(x, layout.row_pitch, p.hidden);
        constexpr int kColumns = GateUp::kTileColumns;
        if (warp * 32 >= p.tokens * kColumns) continue;
        const int entry = unit / work.gate_up_tiles, tile = unit % work.gate_up_tiles;
        const int of = threadIdx.x / kColumns, output = threadIdx.x % kColumns;
        const int rank = of < p.tokens ? control.ranks[entry][of] : kNobody;
        if (rank != kNobody) {
            const int row = output / 8 * 16 + output % 8;  // each warp's gate rows, then its up rows
            const float gate = multiplier.total<GateUp>(sums, of, row);
            const float up = multiplier.total<GateUp>(sums, of, row + 8);
            a.activations[int64_t{of * p.top_k + rank} * p.width + tile * kColumns + output] =
                __float2bfloat16(silu(gate) * up);
        }
        __syncwarp();
        if (rank != kNobody && output == 0) ptx::add_release(&counters.activated[entry], 1);
    }

    const int down_units = control.entries * work.down_tiles;
    for (int unit = first_unit(units); unit < down_units; unit += blocks) {
        const int entry = unit / work.down_tiles, tile = unit % work.down_tiles;
        ptx::mbarrier_wait(&control.rows_full[at_rows.slot], at_rows.phase);
        const uint8_t* slot = slots + at_rows.slot * layout.tokens * layout.slot_pitch;
        const float* sums = multiplier.unit<Down>(slot, layout.slot_pitch, p.width);
        if (lane == 0) ptx::mbarrier_arrive(&control.rows_empty[at_rows.slot]);
        at_rows.next(kRowSlots);
        for (int i = threadIdx.x; i < p.tokens * Down::kTileColumns; i += kConsumerThreads) {
            const int of = i / Down::kTileColumns, output = i % Down::kTileColumns;  // a warp has one token
            const int rank = control.ranks[entry][of];
            if (rank == kNobody || tile * Down::kTileColumns + output >= p.hidden) continue;
            ptx::store_tagged(a.rows + int64_t{of * p.top_k + rank} * p.hidden + tile * Down::kTileColumns + output,
                              __float_as_uint(multiplier.total<Down>(sums, of, output)), launch);
        }
    }
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);  // this block's shared rows are stored
    finish_columns(a, control, work);
}

template <int kPerLane>
__global__ void __launch_bounds__(kThreads, 2)
    moe_block_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(shared_memory);
    const Layout& layout = a.layout;
    auto& control = *reinterpret_cast<Control*>(shared_memory + layout.control_offset());
    auto* first = reinterpret_cast<uint32_t*>(shared_memory + layout.first_offset());
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == kWeightWarp * 32) {
        for (int i = 0; i < layout.stages; ++i) {
            ptx::mbarrier_init(&control.full[i], 1);
            ptx::mbarrier_init(&control.empty[i], kConsumers);
        }
        for (int i = 0; i < kRowSlots; ++i) {
            ptx::mbarrier_init(&control.rows_full[i], 1);
            ptx::mbarrier_init(&control.rows_empty[i], kConsumers);
        }
        ptx::mbarrier_init(&control.begun, 1);
        ptx::mbarrier_init(&control.listed, 1);
        ptx::fence_mbarrier_init();
        for (const CUtensorMap* map : {&maps.in_proj, &maps.shared_down, &maps.gate_up, &maps.down}) {
            ptx::prefetch_tensor_map(map);
        }
    }
    for (int i = threadIdx.x; i < layout.experts; i += kThreads) first[i] = UINT32_MAX;
    for (int i = threadIdx.x; i < a.p.tokens * a.p.top_k * kTokens; i += kThreads) {
        control.ranks[i / kTokens][i % kTokens] = kNobody;
    }
    __syncthreads();
    if (warp == kWeightWarp) {
        if (lane != 0) return;
        stream_weights(maps, a, control, shared_memory);
    } else if (warp == kRowWarp) {
        ptx::grid_dependency_wait();
        bring_rows(a, control, shared_memory + layout.slots_offset());
    } else {
        multiply<kPerLane>(a, control, shared_memory);
    }
}

// Boxes of 16 rows x 512 columns of a matrix.
cudaError_t encode_dense(CUtensorMap* map, const __nv_bfloat16* weight, int rows, int columns) {
    const auto width = static_cast<uint64_t>(columns);
    return encode_tensor_map<3>(map, TensorElement::kBf16,
                                {.base = weight,
                                 .sizes = {kChunk, static_cast<uint64_t>(rows), width / kChunk},
                                 .strides = {2, width * 2, kChunk * 2},
                                 .box = {kChunk, Dense::kTileColumns, Shape<Dense>::kDepthWarps}},
                                Swizzle::k128);
}

cudaError_t encode(Maps* maps, const MoeBlock& p) {
    const auto hidden = static_cast<uint64_t>(p.hidden), width = static_cast<uint64_t>(p.width);
    const auto held = static_cast<uint64_t>(p.held);
    cudaError_t status = encode_dense(&maps->in_proj, p.in_proj, p.projections, p.hidden);
    if (status != cudaSuccess) return status;
    status = encode_dense(&maps->shared_down, p.shared_down, p.hidden, p.shared);
    if (status != cudaSuccess) return status;
    status = encode_tensor_map<5>(&maps->gate_up, TensorElement::kBf16,
                                  {.base = p.gate_up,
                                   .sizes = {kChunk, width, 2, hidden / kChunk, held},
                                   .strides = {2, hidden * 2, width * hidden * 2, kChunk * 2, 2 * width * hidden * 2},
                                   .box = {kChunk, GateUp::kTileColumns, 2, Shape<GateUp>::kDepthWarps, 1}},
                                  Swizzle::k128);
    if (status != cudaSuccess) return status;
    return encode_tensor_map<4>(&maps->down, TensorElement::kBf16,
                                {.base = p.down,
                                 .sizes = {kChunk, hidden, width / kChunk, held},
                                 .strides = {2, width * 2, kChunk * 2, hidden * width * 2},
                                 .box = {kChunk, Down::kTileColumns, Shape<Down>::kDepthWarps, 1}},
                                Swizzle::k128);
}

int projected_pitch(const MoeBlock& p) {
    return (p.projections + 7) / 8 * 8;
}

}  // namespace

int64_t moe_block_scratch(const MoeBlock& p) {
    return kHeaderWords + int64_t{2} * kTokens * (p.experts + int64_t{p.top_k} * p.hidden);
}

bool moe_block_supported(const MoeBlock& p) {
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    const auto whole = [](int size) { return size >= kChunk && size % kChunk == 0; };
    return p.tokens >= 1 && p.tokens <= kTokens && p.top_k >= 1 && p.top_k <= kMaxTopK &&
           (p.experts == 256 || p.experts == 512) && p.held >= 1 && p.held <= p.experts && whole(p.hidden) &&
           p.hidden <= expert_decode::kMaxDepth && whole(p.width) && whole(p.shared) &&
           p.width <= expert_decode::kMaxDepth && p.shared <= expert_decode::kMaxDepth &&
           p.projections >= 2 * p.shared + p.experts + 1 && p.x_stride % 8 == 0 && aligned(p.x) &&
           aligned(p.residual) && aligned(p.norm_weight) && aligned(p.in_proj) && aligned(p.gate_up) &&
           aligned(p.down) && aligned(p.shared_down) && aligned(p.scratch) && layout_for(p).bytes() <= kSharedLimit;
}

size_t moe_block_workspace(const MoeBlock& p) {
    const size_t tokens = p.tokens;
    return tokens * (p.top_k * p.width + p.hidden + projected_pitch(p)) * sizeof(__nv_bfloat16);
}

cudaError_t moe_block(const MoeBlock& p, cudaStream_t stream) {
    if (!moe_block_supported(p)) return cudaErrorInvalidValue;
    Arguments arguments{.p = p, .layout = layout_for(p), .projected_pitch = projected_pitch(p)};
    arguments.logits = reinterpret_cast<uint64_t*>(p.scratch + kHeaderWords);
    arguments.rows = arguments.logits + int64_t{kTokens} * p.experts;
    arguments.activations = reinterpret_cast<__nv_bfloat16*>(p.workspace);
    arguments.projected = arguments.activations + int64_t{p.tokens} * p.top_k * p.width;
    arguments.shared_rows = arguments.projected + int64_t{p.tokens} * arguments.projected_pitch;
    Maps maps;
    const cudaError_t status = encode(&maps, p);
    if (status != cudaSuccess) return status;
    const LaunchConfig config = {.grid = dim3(multiprocessor_count()),
                                 .block = dim3(kThreads),
                                 .shared_bytes = static_cast<size_t>(std::max(arguments.layout.bytes(), kLeastShared)),
                                 .stream = stream,
                                 .programmatic = true};
    const auto kernel = p.experts == 256 ? moe_block_kernel<8> : moe_block_kernel<16>;
    // Blocks wait for each other: all must be on the device at once.
    if (max_resident_blocks(kernel, config) < static_cast<int>(config.grid.x)) {
        return cudaErrorCooperativeLaunchTooLarge;
    }
    return launch(kernel, config, maps, arguments);
}

}  // namespace tokenspeed
