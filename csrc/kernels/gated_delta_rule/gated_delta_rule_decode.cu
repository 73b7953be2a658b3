// One decode step of a Gated DeltaNet mixer in one launch: causal convolution, SiLU, unit q and k, gates, 1 to 8
// delta-rule updates, gated RMSNorm, and the state's housekeeping. Contract: tokenspeed/ops/delta_rule.py.
//
// Algorithm. The state of a slot is S (after `cursor` tokens) plus a ring of the updates (k_i, u_i, g_i) of the p
// tokens since. Per value head, with the suffix decays D_i = exp(g_i + ... + g_{p-1}) and G_t = g_0 + ... + g_t of the
// new tokens:
//     S k_t and S q_t of all T tokens in one pass over S, which is read once and not kept,
//     S_c k_t = D_0 S k_t + sum_i D_{i+1} u_i (k_i.k_t), the state with its ring; the same with q_t,
//     u_t = beta_t (v_t - e^{G_t} S_c k_t) - sum_{j<t} [beta_t e^{G_t - G_j} k_t.k_j] u_j,
//     o_t = e^{G_t} S_c q_t + sum_{j<=t} [e^{G_t - G_j} k_j.q_t] u_j.
// The new updates are appended to the ring, so an accepted draft costs nothing and a rejected one is overwritten. Only
// when p + T > R, when the write slot is another than the read slot, or when the sequence starts, a second pass (from
// L2) stores e^{g_0} S_c + u_0 k_0^T (the first new token is certain) and the cursor is set behind it.
//
// Bytes. The state is read once: 64 KB a value head; a fold writes it too, at one step in R + 1; the ring adds (p + T)
// x (512 B a value head + 512 B a key head). Batch 64, Hv 32: 134 MB = 31 us at 4.3 TB/s, + 1/9 of that for folds.
// Flops: 2 T FMA an element of S, and p + 1 in a fold: T = 4, Hv 64, batch 64: 24 us of the fp32 units, hidden.
//
// Tiling. A key head's group (all value heads that read it) belongs to one block, or to a cluster of 2, 4 or 8 that
// split its rows while the batch is small. So whatever is shared (k in the ring, the q and k channels of the window,
// the cursor) is read and written inside one cluster, and a cluster barrier orders its reads before its writes: one
// block writes each element, nobody reads it afterwards. In the pass, eight lanes share a row, 16 columns each: one
// 16-byte load instruction of a warp covers 4 x 128 bytes, a sum needs three shuffles, and 16 rows a warp are in flight
// at once, the first of them before anything else is computed. What follows from the products takes one thread a row,
// in a cluster up to the norm: it holds o in registers. Sums of squares go through 16-row units in a fixed tree, so the
// result does not depend on the split; they reach the cluster by asynchronous stores ahead of the block's stores to
// memory, for which a barrier would wait, and which are the work of threads without a row.
//
// Before the wait for the kernel ahead, weights are read, and, where the caller says that they are settled, the
// sequences' records: a cluster then has the state, the window and the ring's part of the products when its inputs come.
//
// Measured, and what was tried: docs/kernels/gdn_decode.md.
//
// budget: decode_kernel registers<=160 shared<=0 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include "gated_delta_rule_decode.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

using namespace delta_rule;

// S k_t and S q_t of every row of the block, raw: eight lanes a row, sixteen columns a lane.
template <int kTokens, int kHeldRows>
__device__ __forceinline__ void products_of_rows(const Shared& shared, const float4 (&rows)[kHeldRows][4], int first) {
    constexpr int kPadded = padded(kTokens), kCount = kHeldRows * 2 * kPadded;
    constexpr int kLeft = kCount > 8 ? kCount / 8 : 1;  // sums that a lane is left with
    const int lane = threadIdx.x % 32;
    float products[kCount] = {};
#pragma unroll
    for (int part = 0; part < 4; ++part) {
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            const float4 key = reinterpret_cast<const float4*>(shared.key + t * kDim)[part * 8 + lane % 8];
            const float4 query = reinterpret_cast<const float4*>(shared.query + t * kDim)[part * 8 + lane % 8];
#pragma unroll
            for (int r = 0; r < kHeldRows; ++r) {
                products[(r * 2 + 0) * kPadded + t] += dot(rows[r][part], key);
                products[(r * 2 + 1) * kPadded + t] += dot(rows[r][part], query);
            }
        }
    }
    butterfly<4, kCount>(products);
    if constexpr (kCount < 8) {
        if (lane % (8 / kCount) != 0) return;  // a copy of the neighbour's
    }
    const int left = lane % 8 * kCount / 8;
    float* row = shared.sums + (first + left / (2 * kPadded) * 4 + lane / 8) * 2 * kPadded;
#pragma unroll
    for (int i = 0; i < kLeft; ++i) row[left % (2 * kPadded) + i] = products[i];
}

// u and o of one row for all new tokens, from its products. pending_update: D_{i+1} u_i of the row.
template <int kTokens, typename PendingUpdate>
__device__ __forceinline__ void update_row(const Place& at, const Shared& shared, const Slots& slots, int row,
                                           float first_suffix, PendingUpdate pending_update, float (&u)[kTokens],
                                           float (&o)[kTokens]) {
    constexpr int kPadded = padded(kTokens);
    const int head = (at.first_row + row) / kDim;
    float* sums = shared.sums + row * 2 * kPadded;
    float sk[kTokens], sq[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        sk[t] = slots.context > 0 ? first_suffix * sums[t] : 0;
        sq[t] = slots.context > 0 ? first_suffix * sums[kPadded + t] : 0;
    }
#pragma unroll 2
    for (int i = 0; i < slots.pending; ++i) {
        const float update = pending_update(i);
        const float* products = shared.pending + i * 2 * kPadded;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            sk[t] += update * products[t];
            sq[t] += update * products[kPadded + t];
        }
    }
    const float* beta = shared.beta + head * kTokens;
    const float* decay = shared.decay + head * kTokens;
    const float* coefficient = shared.coefficient + head * kTokens * kTokens;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        const float value = shared.value[t * at.rows + row];
        u[t] = beta[t] * (value - decay[t] * shared.inverse[t] * sk[t]);
        o[t] = decay[t] * shared.inverse[kTokens + t] * sq[t];
#pragma unroll
        for (int j = 0; j < t; ++j) {
            u[t] -= coefficient[j * kTokens + t] * u[j];
            o[t] += coefficient[t * kTokens + j] * u[j];
        }
        o[t] = rounded(o[t] + coefficient[t * kTokens + t] * u[t]);
    }
    sums[0] = u[0];  // for the fold
}

// Enters u of one row in the ring.
template <int kTokens>
__device__ __forceinline__ void store_updates(const GatedDeltaRuleDecode& p, const Place& at, const Slots& slots,
                                              int row, const float (&u)[kTokens]) {
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        if (slots.fold && t == 0) continue;
        p.ring[slots.write * p.ring_stride + (slots.context + t) % p.ring_rows * int64_t{p.ring_width} +
               (p.key_heads + at.key_head * at.ratio) * kDim + at.first_row + row] = u[t];
    }
}

// Stores the state after the first new token: what was read, the pending updates, and u_0 k_0. A warp takes whole rows.
__device__ __forceinline__ void fold(const GatedDeltaRuleDecode& p, const Place& at, const Shared& shared,
                                     const Slots& slots, int tokens) {
    constexpr int kRows = 4;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t offset = (static_cast<int64_t>(at.key_head) * at.ratio * kDim + at.first_row) * kDim + lane * 4;
    const float* from = p.state + slots.read * p.state_stride + offset;
    float* to = p.state + slots.write * p.state_stride + offset;
    const float4 newest = scaled(reinterpret_cast<const float4*>(shared.key)[lane], shared.inverse[0]);
    for (int row = warp * kRows; row < at.rows; row += kWarps * kRows) {
        const int head = (at.first_row + row) / kDim;
        const float* suffix = shared.suffix + head * (p.ring_rows + 1);
        const float decay = shared.decay[head * tokens];
        float4 rows[kRows] = {};
        if (slots.context > 0) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                const uint4 bits = ptx::load_16_no_allocate(from + (row + r) * kDim);
                rows[r] = scaled(reinterpret_cast<const float4&>(bits), decay * suffix[0]);
            }
        }
        int ring_row = slots.ring_row;
#pragma unroll 2
        for (int i = 0; i < slots.pending; ++i) {
            const float* update = shared.ring + ring_row * (kDim + at.rows);
            const float4 key = scaled(reinterpret_cast<const float4*>(update)[lane], decay * suffix[i + 1]);
            const float4 u = *reinterpret_cast<const float4*>(update + kDim + row);
            add_scaled(rows[0], key, u.x);
            add_scaled(rows[1], key, u.y);
            add_scaled(rows[2], key, u.z);
            add_scaled(rows[3], key, u.w);
            ring_row = ring_row + 1 == p.ring_rows ? 0 : ring_row + 1;
        }
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            add_scaled(rows[r], newest, shared.sums[(row + r) * 2 * padded(tokens)]);
            ptx::store_16(to + (row + r) * kDim, reinterpret_cast<const uint4&>(rows[r]));
        }
    }
}

// Over groups of kLanes neighbouring lanes: neighbours first, so that a lane that starts with the sum of four others'
// values, added in pairs, ends with the same bits.
template <int kLanes>
__device__ __forceinline__ float warp_sum_upwards(float x) {
#pragma unroll
    for (int distance = 1; distance < kLanes; distance *= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
}

// The ring's part of what a row will need: its pending updates, with their decays, oldest first. Each thread its row.
__device__ __forceinline__ void scale_updates(const GatedDeltaRuleDecode& p, const Place& at, const Shared& shared,
                                              const Slots& slots) {
    const int row = threadIdx.x;
    if (row >= at.rows) return;
    const float* suffix = shared.suffix + (at.first_row + row) / kDim * (p.ring_rows + 1);
    int ring_row = slots.ring_row;
#pragma unroll 1
    for (int i = 0; i < slots.pending; ++i) {
        shared.updates[i * at.rows + row] = suffix[i + 1] * shared.ring[ring_row * (kDim + at.rows) + kDim + row];
        ring_row = ring_row + 1 == p.ring_rows ? 0 : ring_row + 1;
    }
}

template <int kTokens, bool kSplit>
__global__ void __launch_bounds__(kThreads, kTokens > 4 ? 1 : 2)
    decode_kernel(const __grid_constant__ GatedDeltaRuleDecode p) {
    constexpr int kHeldRows = kSplit || kTokens > 4 ? 2 : 4;  // of the state, by sixteen columns, in a lane's registers
    constexpr int kBlockRows = 4 * kHeldRows;                 // eight lanes a row
    DYNAMIC_SHARED(storage);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Place at;
    at.sequence = blockIdx.z;
    at.key_head = blockIdx.y;
    at.rank = kSplit ? blockIdx.x : 0;
    at.ratio = p.value_heads / p.key_heads;
    at.rows = at.ratio * kDim / gridDim.x;
    at.first_row = at.rank * at.rows;
    const Shared shared(storage, kTokens, at.rows, p.ring_rows, kSplit);
    if (kSplit && threadIdx.x == 0) {
        ptx::mbarrier_init(shared.squares_full, 1);
        ptx::fence_mbarrier_init();
    }
    const int64_t group_row = static_cast<int64_t>(at.key_head) * at.ratio * kDim + at.first_row;

    // Weights may be read ahead of the wait for the kernel before, and the sequences' records where they are settled.
    const auto channel_of = [&](int pair) {
        return pair < kDim / 2 ? at.key_head * kDim + 2 * pair
               : pair < kDim   ? (p.key_heads + at.key_head) * kDim + 2 * pair - kDim
                               : static_cast<int>(2 * p.key_heads * kDim + group_row) + 2 * (pair - kDim);
    };
    const int pairs = kDim + at.rows / 2;
    uint4 taps{};
    if (threadIdx.x < pairs) taps = ptx::load_16_read_only(p.conv_weight + channel_of(threadIdx.x) * kTaps);
    const auto norm_weight_of = [&](int row) {
        const int column = (at.first_row + row) % kDim;
        return p.norm_weight_is_float ? static_cast<const float*>(p.norm_weight)[column]
                                      : __bfloat162float(static_cast<const __nv_bfloat16*>(p.norm_weight)[column]);
    };
    const bool has_row = threadIdx.x < at.rows;  // of its own, where a block is not alone
    const float norm_weight = kSplit && has_row ? norm_weight_of(threadIdx.x) : 0;
    const bool has_gate = warp == kWarps - 1 && lane < at.ratio * kTokens;
    const int gate_head = at.key_head * at.ratio + lane / kTokens;
    const float a_log = has_gate ? p.a_log[gate_head] : 0, dt_bias = has_gate ? p.dt_bias[gate_head] : 0;
    if (!p.settled) ptx::grid_dependency_wait();

    Slots slots;
    slots.write = p.write_slot[at.sequence];
    slots.read = p.read_slot[at.sequence];
    slots.context = p.context_lens[at.sequence];
    auto* out = p.out + static_cast<int64_t>(at.sequence) * kTokens * p.value_heads * kDim + group_row;
    if (slots.write < 0) {  // padding: the same for the whole cluster
        ptx::grid_dependency_wait();
        ptx::grid_dependency_launch();
#pragma unroll 1
        for (int i = threadIdx.x; i < kTokens * at.rows / 8; i += kThreads) {
            const int t = i / (at.rows / 8), row = i % (at.rows / 8) * 8;
            *reinterpret_cast<uint4*>(out + static_cast<int64_t>(t) * p.value_heads * kDim + row) = uint4{};
        }
        return;
    }
    const int cursor = p.cursor[slots.read * p.cursor_stride + at.key_head * at.ratio];

    const int blocks = at.rows / kBlockRows;
    const auto* state = p.state + slots.read * p.state_stride + (group_row + lane / 8) * kDim + lane % 8 * 4;
    float4 rows[kHeldRows][4];
    const auto load_rows = [&](int block) {
#pragma unroll
        for (int r = 0; r < kHeldRows; ++r) {
#pragma unroll
            for (int part = 0; part < 4; ++part) {
                const uint4 bits = ptx::load_16_streaming(state + (block * kBlockRows + r * 4) * kDim + part * 32);
                rows[r][part] = reinterpret_cast<const float4&>(bits);
            }
        }
    };
    const int first_block = slots.context > 0 ? warp : blocks;  // a sequence that starts has no state to read
    if (first_block < blocks) load_rows(first_block);
    Earlier earlier{};
    if (kSplit && threadIdx.x < pairs) earlier = load_earlier(p, slots, channel_of(threadIdx.x));

    const auto start_ring = [&] {
        if (p.ring_vectors) {
            load_ring<16>(p, at, shared, slots.read, slots.context, cursor, kSplit);
        } else {
            load_ring<4>(p, at, shared, slots.read, slots.context, cursor, kSplit);
        }
    };
    const auto find_pending = [&] {
        slots.pending = slots.context > 0 ? max(0, min(slots.context - cursor, p.ring_rows)) : 0;
        slots.ring_row = slots.pending > 0 ? (slots.context - slots.pending) % p.ring_rows : 0;
        slots.fold = slots.pending + kTokens > p.ring_rows || slots.read != slots.write || slots.context == 0;
    };
    if constexpr (kSplit) {  // while the kernel before still runs: what the ring has to say
        start_ring();
        find_pending();
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        __syncthreads();
        if (warp == kWarps - 1) suffix_decays(p, at, shared, slots);
        __syncthreads();
        scale_updates(p, at, shared, slots);
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    // Who has no row stores what the step leaves behind: threads from the last on.
    const int keeper = kSplit ? kThreads - 1 - static_cast<int>(threadIdx.x) : static_cast<int>(threadIdx.x);
    const WindowPart part(at);
    uint4 input{};
    __nv_bfloat16 z[kTokens];
    if constexpr (kSplit) {
        if (keeper < part.chunks * kTokens) input = load_input<kTokens>(p, at, part, keeper);
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            const int64_t token = static_cast<int64_t>(at.sequence) * kTokens + t;
            if (has_row) z[t] = p.z[token * p.z_stride + group_row + threadIdx.x];
        }
    } else {
#pragma unroll 1  // the registers hold rows of the state
        for (int i = threadIdx.x; i < kTokens * at.rows / 8; i += kThreads) {
            const int t = i / (at.rows / 8), row = i % (at.rows / 8) * 8;
            ptx::cp_async(shared.z + t * at.rows + row,
                          p.z + (static_cast<int64_t>(at.sequence) * kTokens + t) * p.z_stride + group_row + row);
        }
    }
#pragma unroll 1
    for (int pair = threadIdx.x; pair < pairs; pair += kThreads) {
        float* destination = pair < kDim / 2 ? shared.query + 2 * pair
                             : pair < kDim   ? shared.key + 2 * pair - kDim
                                             : shared.value + 2 * (pair - kDim);
        if (!kSplit) earlier = load_earlier(p, slots, channel_of(pair));
        convolve<kTokens>(p, at, earlier, channel_of(pair), taps, destination, pair < kDim ? kDim : at.rows);
        if (kSplit) break;  // 256 pairs at most
        if (pair + kThreads < pairs) {
            taps = ptx::load_16_read_only(p.conv_weight + channel_of(pair + kThreads) * kTaps);
        }
    }
    if (!kSplit) start_ring();
    if (has_gate) gate<kTokens>(p, at, shared, lane, a_log, dt_bias);
    if constexpr (!kSplit) {
        find_pending();
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
    }
    __syncthreads();
    if (kSplit) ptx::cluster_arrive_relaxed();  // this block has read what the group shares; its barrier is ready

#pragma unroll 1
    for (int i = kWarps - 1 - warp; i < kTokens * kTokens + slots.pending; i += kWarps) {
        if (i < kTokens * kTokens) {
            triangle<kTokens>(at, shared, i / kTokens, i % kTokens);
        } else {
            pending_products<kTokens>(p, at, shared, slots, i - kTokens * kTokens);
        }
    }
    if (!kSplit && warp == kWarps - 1) suffix_decays(p, at, shared, slots);
    for (int block = first_block; block < blocks; block += kWarps) {
        products_of_rows<kTokens>(shared, rows, block * kBlockRows);
        if (block + kWarps < blocks) load_rows(block + kWarps);
    }
    __syncthreads();

    // Gated norm. A unit of 16 rows has its sum of squares by neighbours, by neighbours of those, and so on; a head has
    // eight units.
    const auto head_squares = [](const float* units) {
        const float4 low = reinterpret_cast<const float4*>(units)[0], high = reinterpret_cast<const float4*>(units)[1];
        return ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
    };
    if constexpr (kSplit) {  // a block has 256 rows at most, each thread one
        const int row = threadIdx.x, head = (at.first_row + row) / kDim;
        float u[kTokens], o[kTokens], gates[kTokens];
        if (has_row) {
            update_row<kTokens>(
                at, shared, slots, row, shared.suffix[head * (p.ring_rows + 1)],
                [&](int i) { return shared.updates[i * at.rows + row]; }, u, o);
        }
        // The units' sums go to the whole cluster first: a barrier behind the stores would wait for them.
        ptx::cluster_wait();
        if (threadIdx.x == 0) {
            ptx::mbarrier_arrive_expect_tx(shared.squares_full, kTokens * at.ratio * kUnits * sizeof(float));
        }
        if (warp * 32 < at.rows) {
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                const float squares = warp_sum_upwards<kUnitRows>(has_row ? __fmul_rn(o[t], o[t]) : 0);
                if (!has_row || lane % kUnitRows >= gridDim.x) continue;
                ptx::store_async_cluster(shared.squares + t * kMaxRatio * kUnits + (at.first_row + row) / kUnitRows,
                                         squares, shared.squares_full, lane % kUnitRows);
            }
        }
        if (has_row) {
            store_updates<kTokens>(p, at, slots, row, u);
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                const float gate = __bfloat162float(z[t]);
                gates[t] = gate * sigmoid(gate);
            }
        }
        if (at.rank == 0) store_shared_state<kTokens>(p, at, shared, slots, keeper);
        store_window<kTokens>(p, at, slots, part, keeper, input);
        ptx::mbarrier_wait_cluster(shared.squares_full, 0);
        if (has_row) {
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
                const float squares = head_squares(shared.squares + (t * kMaxRatio + head) * kUnits);
                const float inverse = rsqrtf(squares / kDim + p.eps);
                out[static_cast<int64_t>(t) * p.value_heads * kDim + row] =
                    __float2bfloat16(o[t] * inverse * norm_weight * gates[t]);
            }
        }
        if (slots.fold) __syncthreads();  // u_0 of every row is there
    } else {
        for (int row = threadIdx.x; row < at.rows; row += kThreads) {
            const float* suffix = shared.suffix + (at.first_row + row) / kDim * (p.ring_rows + 1);
            int ring_row = slots.ring_row;
            float u[kTokens], o[kTokens];
            update_row<kTokens>(
                at, shared, slots, row, suffix[0],
                [&](int i) {
                    const float* update = shared.ring + ring_row * (kDim + at.rows) + kDim;
                    ring_row = ring_row + 1 == p.ring_rows ? 0 : ring_row + 1;
                    return suffix[i + 1] * update[row];
                },
                u, o);
#pragma unroll
            for (int t = 0; t < kTokens; ++t) shared.value[t * at.rows + row] = o[t];
            store_updates<kTokens>(p, at, slots, row, u);
        }
        __syncthreads();
        store_shared_state<kTokens>(p, at, shared, slots, keeper);
        if (keeper < part.chunks * kTokens) input = load_input<kTokens>(p, at, part, keeper);
        store_window<kTokens>(p, at, slots, part, keeper, input);
        // Four rows a thread: a unit is four neighbouring lanes.
        const int quads = at.rows / 4;
        float norm_weights[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) norm_weights[i] = norm_weight_of(static_cast<int>(threadIdx.x) % quads * 4 + i);
        for (int first = 0; first < kTokens * quads; first += kThreads) {
            const int item = min(first + static_cast<int>(threadIdx.x), kTokens * quads - 1);
            const int t = item / quads, row = item % quads * 4;
            const float4 o = *reinterpret_cast<const float4*>(shared.value + t * at.rows + row);
            float squares = (__fmul_rn(o.x, o.x) + __fmul_rn(o.y, o.y)) + (__fmul_rn(o.z, o.z) + __fmul_rn(o.w, o.w));
            squares = warp_sum_upwards<32>(squares);
            if (first + threadIdx.x >= kTokens * quads) continue;
            const float inverse = rsqrtf(squares / kDim + p.eps);
            const float in[4] = {o.x, o.y, o.z, o.w};
            float result[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float z = __bfloat162float(shared.z[t * at.rows + row + i]);
                result[i] = in[i] * inverse * norm_weights[i] * (z * sigmoid(z));
            }
            const __nv_bfloat162 low = __floats2bfloat162_rn(result[0], result[1]);
            const __nv_bfloat162 high = __floats2bfloat162_rn(result[2], result[3]);
            *reinterpret_cast<uint2*>(out + static_cast<int64_t>(t) * p.value_heads * kDim + row) = {
                reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
        }
    }
    if (slots.fold) fold(p, at, shared, slots, kTokens);
}

template <int kTokens>
cudaError_t launch_tokens(const GatedDeltaRuleDecode& p, cudaStream_t stream) {
    const int rows = p.value_heads / p.key_heads * kDim / p.split;
    const LaunchConfig config = {.grid = dim3(p.split, p.key_heads, p.sequences),
                                 .block = dim3(kThreads),
                                 .shared_bytes = Shared(nullptr, kTokens, rows, p.ring_rows, p.split > 1).bytes,
                                 .stream = stream,
                                 .cluster = dim3(p.split),
                                 .programmatic = true};
    return launch(p.split > 1 ? decode_kernel<kTokens, true> : decode_kernel<kTokens, false>, config, p);
}

// Blocks per key head: waves x (rows a block streams + what its start costs, in rows). One block on a multiprocessor
// counts as a wave, for then the next kernel's blocks find room beside it.
int choose_split(const GatedDeltaRuleDecode& p) {
    const int resident = multiprocessor_count();
    int best = 1;
    int64_t best_cost = INT64_MAX;
    for (int split = 1; split <= 8; split *= 2) {
        const int64_t waves = (int64_t{p.sequences} * p.key_heads * split + resident - 1) / resident;
        const int64_t cost = waves * (p.value_heads / p.key_heads * kDim / split + 64);
        if (cost < best_cost) {
            best = split;
            best_cost = cost;
        }
    }
    return best;
}

}  // namespace

bool gated_delta_rule_decode_supported(const GatedDeltaRuleDecode& p) {
    const bool shapes = p.key_heads > 0 && p.value_heads % p.key_heads == 0 &&
                        p.value_heads / p.key_heads <= kMaxRatio && p.tokens >= 1 && p.tokens <= kMaxTokens &&
                        p.sequences <= 65535 && p.channels == (2 * p.key_heads + p.value_heads) * kDim &&
                        p.ring_rows >= p.tokens - 1 && p.ring_rows <= 16 && p.window_entries >= p.tokens + kTaps - 2 &&
                        p.window_entries >= kTaps - 1;
    const bool strides =
        p.qkv_stride % 8 == 0 && p.z_stride % 8 == 0 && p.state_stride % 4 == 0 && p.window_stride % 8 == 0;
    return shapes && strides && is_aligned(p.qkv) && is_aligned(p.z) && is_aligned(p.state) && is_aligned(p.window) &&
           is_aligned(p.conv_weight) && is_aligned(p.out);
}

cudaError_t gated_delta_rule_decode(GatedDeltaRuleDecode p, cudaStream_t stream) {
    if (!gated_delta_rule_decode_supported(p)) return cudaErrorInvalidValue;
    if (p.split == 0) p.split = choose_split(p);
    p.ring_vectors = reinterpret_cast<uintptr_t>(p.ring) % 16 == 0 && p.ring_stride % 4 == 0 && p.ring_width % 4 == 0;
    switch (p.tokens) {
        case 1:
            return launch_tokens<1>(p, stream);
        case 2:
            return launch_tokens<2>(p, stream);
        case 3:
            return launch_tokens<3>(p, stream);
        case 4:
            return launch_tokens<4>(p, stream);
        case 5:
            return launch_tokens<5>(p, stream);
        case 6:
            return launch_tokens<6>(p, stream);
        case 7:
            return launch_tokens<7>(p, stream);
        default:
            return launch_tokens<8>(p, stream);
    }
}

}  // namespace tokenspeed
