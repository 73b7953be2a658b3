// One decode step of a Gated DeltaNet mixer in one launch: causal convolution, SiLU, unit q and k, gates, T >= 1
// delta-rule updates, gated RMSNorm, and the state's housekeeping. Contract: tokenspeed/ops/delta_rule.py.
//
// Algorithm. The state of a slot is S (after `cursor` tokens) plus a ring of the updates (k_i, u_i, g_i) of the tokens
// since. Per value head, with the suffix decays D_i = exp(g_i + ... + g_{p-1}) of the p pending tokens,
//     S_c = D_0 S + sum_i D_{i+1} u_i k_i^T                                       (rows in registers, never stored)
// and one pass over it yields S_c k_t and S_c q_t of all T new tokens. A T x T triangle does the rest:
//     u_t = beta_t (v_t - e^{G_t} S_c k_t) - sum_{j<t} [beta_t e^{G_t - G_j} k_t.k_j] u_j
//     o_t = e^{G_t} S_c q_t + sum_{j<=t} [e^{G_t - G_j} k_j.q_t] u_j,             G_t = g_0 + ... + g_t
// The new updates are appended to the ring, so an accepted draft costs nothing and a rejected one is overwritten. Only
// when p + T > R, when the write slot is another than the read slot, or when the sequence starts, is
// e^{g_0} S_c + u_0 k_0^T stored (the first new token is certain) and the cursor set behind it.
//
// Bytes. The state is read once: 64 KB a value head; a fold writes it too, every R tokens; the ring adds (p + T) x
// (512 B a value head + 512 B a key head). Batch 64, Hv 32: 134 MB = 31 us at 4.3 TB/s, + 1/8 of that for folds.
// Flops: per element of S, p + 2T FMA (+ 1 in a fold): at p = 3.5, T = 1 about 7 us of the fp32 units, hidden.
//
// Tiling. A key head's group (all value heads that read it) belongs to one block, or to a cluster of 2, 4 or 8 that
// split its rows while the batch is small. So whatever is shared (k in the ring, the q and k channels of the window,
// the cursor) is read and written inside one cluster, and a cluster barrier orders its reads before its writes: one
// block writes each element, nobody reads it afterwards. Rows are read by 16-byte loads of whole 512-byte rows, 4 or 8
// rows a warp, the next ones in flight while these are worked on; dot products end in a transposing butterfly that
// leaves one sum a lane. Sums of squares go through 16-row units in a fixed tree, so the result does not depend on the
// split. Ahead of the dependency wait the state is only prefetched into L2, where it stays coherent: nothing stale can
// be read, whatever kernel runs before.
//
// Predicted (not run yet): batch 1, Hv 32: 3.6 us; batch 64, Hv 32: 38 us without and 70 us with a fold, 42 averaged;
// T = 4, Hv 64, batch 64: 74 us.
// budget: decode_kernel registers<=128 shared<=0 hot
#include <launch.h>
#include <ptx.h>

#include "gated_delta_rule_decode.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

using namespace delta_rule;

constexpr int kPrefetchBytes = 8192;  // of the state, per warp

constexpr int power_of_two_at_least(int n) {
    return n <= 1 ? 1 : 2 * power_of_two_at_least((n + 1) / 2);
}

template <int kTokens, bool kSplit>
__global__ void __launch_bounds__(kThreads, 2) decode_kernel(const __grid_constant__ GatedDeltaRuleDecode p) {
    // Rows of the state that a warp works on at once: few while the aim is latency, or T needs the registers.
    constexpr int kRows = kSplit || kTokens > 1 ? 4 : 8;
    constexpr int kPadded = power_of_two_at_least(kTokens);
    constexpr int kSums = kRows * 2 * kPadded;
    DYNAMIC_SHARED(storage);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    Place at;
    at.sequence = blockIdx.z;
    at.key_head = blockIdx.y;
    at.rank = kSplit ? blockIdx.x : 0;
    at.ratio = p.value_heads / p.key_heads;
    at.rows = at.ratio * kDim / gridDim.x;
    at.first_row = at.rank * at.rows;
    const Shared shared(storage, kTokens, at.rows, p.ring_rows);
    const int64_t group_row = static_cast<int64_t>(at.key_head) * at.ratio * kDim + at.first_row;

    // Weights and hints may run ahead of the kernel before; its results may not. A stale slot costs a useless prefetch.
    const auto channel_of = [&](int pair) {
        return pair < kDim / 2 ? at.key_head * kDim + 2 * pair
               : pair < kDim   ? (p.key_heads + at.key_head) * kDim + 2 * pair - kDim
                               : static_cast<int>(2 * p.key_heads * kDim + group_row) + 2 * (pair - kDim);
    };
    const int pairs = kDim + at.rows / 2;
    uint4 taps{};
    if (threadIdx.x < pairs) taps = ptx::load_16_read_only(p.conv_weight + channel_of(threadIdx.x) * kTaps);
    if (lane == 0) {
        const auto hint = ptx::load_acquire(reinterpret_cast<const uint32_t*>(p.read_slot + at.sequence));
        const int bytes = min(at.rows * kDim * 4 / kWarps, kPrefetchBytes);
        if (hint < static_cast<uint32_t>(p.slots)) {
            ptx::bulk_prefetch_l2(p.state + hint * p.state_stride + group_row * kDim + warp * (bytes / 4), bytes);
        }
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    Slots slots;
    slots.write = p.write_slot[at.sequence];
    slots.read = p.read_slot[at.sequence];
    slots.context = p.context_lens[at.sequence];
    auto* out = p.out + static_cast<int64_t>(at.sequence) * kTokens * p.value_heads * kDim + group_row;
    if (slots.write < 0) {  // padding: the same for the whole cluster
        for (int i = threadIdx.x; i < kTokens * at.rows / 8; i += kThreads) {
            const int t = i / (at.rows / 8), row = i % (at.rows / 8) * 8;
            *reinterpret_cast<uint4*>(out + static_cast<int64_t>(t) * p.value_heads * kDim + row) = uint4{};
        }
        return;
    }
    const int cursor = p.cursor[slots.read * p.cursor_stride + at.key_head * at.ratio];

    const int blocks = at.rows / kRows;
    const auto* state = p.state + slots.read * p.state_stride + group_row * kDim + lane * 4;
    const auto load_rows = [&](float4(&rows)[kRows], int block) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
            rows[r] = {0, 0, 0, 0};
            if (slots.context > 0) {
                const uint4 bits = ptx::load_16_no_allocate(state + (block * kRows + r) * kDim);
                rows[r] = reinterpret_cast<const float4&>(bits);
            }
        }
    };
    float4 next[kRows];
    if (warp < blocks) load_rows(next, warp);

    const auto start_ring = [&] {
        if (p.ring_vectors) {
            load_ring<16>(p, at, shared, slots.read, slots.context, cursor, kSplit);
        } else {
            load_ring<4>(p, at, shared, slots.read, slots.context, cursor, kSplit);
        }
    };
    if (kSplit) start_ring();
    for (int i = threadIdx.x; i < kTokens * at.rows / 8; i += kThreads) {
        const int t = i / (at.rows / 8), row = i % (at.rows / 8) * 8;
        ptx::cp_async(shared.z + t * at.rows + row,
                      p.z + (static_cast<int64_t>(at.sequence) * kTokens + t) * p.z_stride + group_row + row);
    }
    for (int pair = threadIdx.x; pair < pairs; pair += kThreads) {
        float* destination = pair < kDim / 2 ? shared.query + 2 * pair
                             : pair < kDim   ? shared.key + 2 * pair - kDim
                                             : shared.value + 2 * (pair - kDim);
        convolve<kTokens>(p, at, slots, channel_of(pair), taps, destination, pair < kDim ? kDim : at.rows);
        if (pair + kThreads < pairs) {
            taps = ptx::load_16_read_only(p.conv_weight + channel_of(pair + kThreads) * kTaps);
        }
    }
    if (!kSplit) start_ring();
    if (warp == kWarps - 1 && lane < at.ratio * kTokens) gate<kTokens>(p, at, shared, lane);

    slots.pending = slots.context > 0 ? max(0, min(slots.context - cursor, p.ring_rows)) : 0;
    slots.ring_row = slots.pending > 0 ? (slots.context - slots.pending) % p.ring_rows : 0;
    slots.fold = slots.pending + kTokens > p.ring_rows || slots.read != slots.write || slots.context == 0;

    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();
    if (kSplit) ptx::cluster_arrive();  // this block has read what the group shares, and its shared memory is alive

    for (int i = warp; i < kTokens * kTokens; i += kWarps) triangle<kTokens>(at, shared, i / kTokens, i % kTokens);
    if (warp == kWarps - 1) suffix_decays(p, at, shared, slots);
    __syncthreads();

    // This lane's four columns of raw keys or queries; they are read again for every block, which leaves registers to
    // rows.
    const auto columns = [lane](const float* vectors, int t) {
        return reinterpret_cast<const float4*>(vectors + t * kDim)[lane];
    };
    for (int block = warp; block < blocks; block += kWarps) {
        float4 rows[kRows];
#pragma unroll
        for (int r = 0; r < kRows; ++r) rows[r] = next[r];
        if (block + kWarps < blocks) load_rows(next, block + kWarps);
        const int row = block * kRows;
        const int head = (at.first_row + row) / kDim;

        // S_c: what the ring holds, folded into the rows.
        const float* suffix = shared.suffix + head * (p.ring_rows + 1);
#pragma unroll
        for (int r = 0; r < kRows; ++r) rows[r] = scaled(rows[r], suffix[0]);
        int ring_row = slots.ring_row;
#pragma unroll 1  // more would spill; the other warps hide the latency
        for (int i = 0; i < slots.pending; ++i) {
            const float* update = shared.ring + ring_row * (kDim + at.rows);
            const float4 k = scaled(reinterpret_cast<const float4*>(update)[lane], suffix[i + 1]);
#pragma unroll
            for (int r = 0; r < kRows; r += 4) {
                const float4 u = *reinterpret_cast<const float4*>(update + kDim + row + r);
                add_scaled(rows[r], k, u.x);
                add_scaled(rows[r + 1], k, u.y);
                add_scaled(rows[r + 2], k, u.z);
                add_scaled(rows[r + 3], k, u.w);
            }
            ring_row = ring_row + 1 == p.ring_rows ? 0 : ring_row + 1;
        }

        float products[kSums];
#pragma unroll
        for (int t = 0; t < kPadded; ++t) {
            const float4 key = columns(shared.key, min(t, kTokens - 1));
            const float4 query = columns(shared.query, min(t, kTokens - 1));
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                products[(r * 2 + 0) * kPadded + t] = t < kTokens ? dot(rows[r], key) : 0;
                products[(r * 2 + 1) * kPadded + t] = t < kTokens ? dot(rows[r], query) : 0;
            }
        }
        const float sum = warp_sum_scattered(products);

        // Lane r has row r; the lanes past kRows repeat them and store nothing.
        const int mine = lane % kRows;
        const bool stores = lane < kRows;
        const float* beta = shared.beta + head * kTokens;
        const float* decay = shared.decay + head * kTokens;
        const float* coefficient = shared.coefficient + head * kTokens * kTokens;
        float u[kTokens];
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            const float sk = __shfl_sync(0xffffffffu, sum, (mine * 2 * kPadded + t) * (32 / kSums)) * shared.inverse[t];
            const float sq = __shfl_sync(0xffffffffu, sum, ((mine * 2 + 1) * kPadded + t) * (32 / kSums)) *
                             shared.inverse[kTokens + t];
            u[t] = beta[t] * (shared.value[t * at.rows + row + mine] - decay[t] * sk);
            float o = decay[t] * sq;
#pragma unroll
            for (int j = 0; j < t; ++j) {
                u[t] -= coefficient[j * kTokens + t] * u[j];
                o += coefficient[t * kTokens + j] * u[j];
            }
            o += coefficient[t * kTokens + t] * u[t];
            __syncwarp();
            if (stores) {
                shared.value[t * at.rows + row + mine] = rounded(o);
                if (!slots.fold || t > 0) {
                    p.ring[slots.write * p.ring_stride + (slots.context + t) % p.ring_rows * int64_t{p.ring_width} +
                           p.key_heads * kDim + group_row + row + mine] = u[t];
                }
            }
        }
        if (slots.fold) {
            const float4 key = scaled(columns(shared.key, 0), shared.inverse[0]);
            auto* folded = p.state + slots.write * p.state_stride + (group_row + row) * kDim + lane * 4;
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
                float4 sum_row = scaled(rows[r], decay[0]);
                add_scaled(sum_row, key, __shfl_sync(0xffffffffu, u[0], r));
                *reinterpret_cast<float4*>(folded + r * kDim) = sum_row;
            }
        }
    }
    __syncthreads();

    // Gated norm: four rows a thread. A unit of 16 rows is four neighbouring lanes, a head eight units.
    const int quads = at.rows / 4;
    if (kSplit) ptx::cluster_wait();
    if (!kSplit) store_shared_state<kTokens>(p, at, shared, slots);
    if (!kSplit) store_window<kTokens>(p, at, slots);
    for (int first = 0; first < kTokens * quads; first += kThreads) {
        const int item = first + threadIdx.x;
        const bool valid = item < kTokens * quads;
        const int t = valid ? item / quads : 0, row = valid ? item % quads * 4 : 0;
        const float4 o = *reinterpret_cast<const float4*>(shared.value + t * at.rows + row);
        float squares = dot(o, o);
        squares += __shfl_xor_sync(0xffffffffu, squares, 1);
        squares += __shfl_xor_sync(0xffffffffu, squares, 2);
        const int unit = (at.first_row + row) / kUnitRows;
        if constexpr (kSplit) {  // one pass: a split block has at most 256 quads
            float* sums = shared.squares + t * kMaxRatio * kUnits;
            if (valid) {
                for (int peer = lane % 4; peer < gridDim.x; peer += 4) ptx::cluster_map(sums, peer)[unit] = squares;
            }
            ptx::cluster_arrive();
            if (at.rank == 0) store_shared_state<kTokens>(p, at, shared, slots);
            store_window<kTokens>(p, at, slots);
            ptx::cluster_wait();
            const auto* units = reinterpret_cast<const float4*>(sums + unit / kUnits * kUnits);
            const float4 low = units[0], high = units[1];
            squares = ((low.x + low.y) + (low.z + low.w)) + ((high.x + high.y) + (high.z + high.w));
        } else {
#pragma unroll
            for (int offset = 4; offset < 32; offset *= 2) squares += __shfl_xor_sync(0xffffffffu, squares, offset);
        }
        if (!valid) continue;
        const float inverse = rsqrtf(squares / kDim + p.eps);
        const int column = (at.first_row + row) % kDim;
        const float in[4] = {o.x, o.y, o.z, o.w};
        float result[4];
        for (int i = 0; i < 4; ++i) {
            const float weight = p.norm_weight_is_float
                                     ? static_cast<const float*>(p.norm_weight)[column + i]
                                     : __bfloat162float(static_cast<const __nv_bfloat16*>(p.norm_weight)[column + i]);
            const float z = __bfloat162float(shared.z[t * at.rows + row + i]);
            result[i] = in[i] * inverse * weight * (z * sigmoid(z));
        }
        const __nv_bfloat162 low = __floats2bfloat162_rn(result[0], result[1]);
        const __nv_bfloat162 high = __floats2bfloat162_rn(result[2], result[3]);
        *reinterpret_cast<uint2*>(out + static_cast<int64_t>(t) * p.value_heads * kDim + row) = {
            reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
    }
}

template <int kTokens>
cudaError_t launch_tokens(const GatedDeltaRuleDecode& p, cudaStream_t stream) {
    const int rows = p.value_heads / p.key_heads * kDim / p.split;
    const LaunchConfig config = {.grid = dim3(p.split, p.key_heads, p.sequences),
                                 .block = dim3(kThreads),
                                 .shared_bytes = Shared(nullptr, kTokens, rows, p.ring_rows).bytes,
                                 .stream = stream,
                                 .cluster = dim3(p.split),
                                 .programmatic = true};
    return launch(p.split > 1 ? decode_kernel<kTokens, true> : decode_kernel<kTokens, false>, config, p);
}

// Blocks per key head: waves x (rows a block streams + what its start costs, in rows), two blocks on a multiprocessor.
int choose_split(const GatedDeltaRuleDecode& p) {
    const int resident = 2 * multiprocessor_count();
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
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    const bool shapes = p.key_heads > 0 && p.value_heads % p.key_heads == 0 &&
                        p.value_heads / p.key_heads <= kMaxRatio && p.tokens >= 1 && p.tokens <= 4 &&
                        p.sequences <= 65535 && p.channels == (2 * p.key_heads + p.value_heads) * kDim &&
                        p.ring_rows >= p.tokens - 1 && p.ring_rows <= 16 && p.window_entries >= p.tokens + kTaps - 2 &&
                        p.window_entries >= kTaps - 1;
    const bool strides =
        p.qkv_stride % 8 == 0 && p.z_stride % 8 == 0 && p.state_stride % 4 == 0 && p.window_stride % 8 == 0;
    return shapes && strides && aligned(p.qkv) && aligned(p.z) && aligned(p.state) && aligned(p.window) &&
           aligned(p.conv_weight) && aligned(p.out);
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
        default:
            return launch_tokens<4>(p, stream);
    }
}

}  // namespace tokenspeed
