// Before the scan of gated_delta_rule_prefill.cu: what follows from a chunk of 64 tokens alone, for all chunks of a
// window at once. See there for the algorithm and for what the tiles hold.
//
// A block takes chunks of a key head in turn: unit keys and queries as fp16 in place of the raw rows, and then, for
// each value head of the key head, L and P from k k^T, q k^T (wgmma) and the head's decays, and A = (I + L)^-1. Two
// heads at a time: each of two warpgroups makes P of one and A of the other. A ninth warp runs ahead: it brings the
// rows by TMA and computes the gates. Finished tiles leave by bulk stores, in the layout that the scan's bulk loads
// find again.
//
// The inverse, by blocks of 16 x 16: diagonal blocks by substitution in fp32, a warp each, then pairs of blocks (32 x
// 32), then pairs of these: A21 = -(A22 L21) A11, both factors in fp16 pairs (high and low part), the product in
// brackets from registers to registers. Two barriers; by rows of blocks it took three and twice the products in line.
//
// Bytes: raw q and k once, 512 a token and key head, and out as many; per value head 16 KB of tiles and 1.8 KB of
// factors a chunk: 208 MB at 8192 tokens of 16:32 heads, 69 us at 3 TB/s, less as far as the scan finds them in L2.
//
// budget: prepare_kernel registers<=128 shared<=0 hot sass=HGMMA
#include <launch.h>

#include <algorithm>

#include "bf16x8.h"
#include "gated_delta_rule_prefill.h"

namespace tokenspeed {
namespace {

using namespace delta_rule_prefill;

constexpr int kWorkers = 2 * kGroupThreads, kThreads = 3 * kGroupThreads;
constexpr int kBlocksTogether = 2;                         // on a multiprocessor
constexpr int kWorkRegisters = 104, kAheadRegisters = 32;  // per thread, of 80 at the start
constexpr uint32_t kWorkersBarrier = 3;                    // 1 and 2 are the warpgroups'
constexpr float kLog2E = 1.44269504f;
constexpr float kLeastSquares = 1e-30f;       // of a row: smaller ones count as this when they are scaled
constexpr float kQueryScale = 0.0883883476f;  // dk^-0.5

struct alignas(16) Gates {  // of a value head
    float total[kChunk], beta[kChunk];
};

struct Inverse {                 // in the making, by one warpgroup
    __half low[kPanel];          // what rounding to fp16 takes from L, then from A
    float diagonal[4][16 * 16];  // a 16 x 16 block of L a warp, then its inverse
};

struct Ahead {       // what the ninth warp leaves
    int begin, end;  // the places of the chunk that the sequence fills; 0, 0: no chunk, and none after it
    Gates gates[kMaxValueHeadsPerKeyHead];
};

struct Shared {
    KeyTiles keys;       // raw rows in bf16 first
    HeadTiles heads[2];  // a pair of value heads
    Inverse inverses[2];
    Ahead ahead[2];  // chunks take turns
    float key_scale[kChunk], query_scale[kChunk];
    uint64_t full, empty;  // the rows and what comes with them
};

template <typename T>
__device__ __forceinline__ uint32_t& pair_at(T* tile, int row, int column) {
    return *reinterpret_cast<uint32_t*>(reinterpret_cast<uint8_t*>(tile) + place(row, column / 8) + column % 8 * 2);
}

// a + b as two fp16 pairs: the rounded values and what rounding took from them.
struct Split {
    uint32_t high, low;

    __device__ __forceinline__ Split(float a, float b) {
        high = pack<__half>(a, b);
        const float2 rounded = __half22float2(*reinterpret_cast<const __half2*>(&high));
        low = pack<__half>(a - rounded.x, b - rounded.y);
    }
};

// The power of two at or below a positive x, and its inverse.
__device__ __forceinline__ float power_below(float x) {
    return __uint_as_float(__float_as_uint(x) & 0x7f800000u);
}
__device__ __forceinline__ float inverse_of_power(float x) {
    return __uint_as_float(0x7f000000u - __float_as_uint(x));
}

// In place, raw rows of 128 bf16 elements in two panels -> fp16 rows of norm 1/2 to 1, and what makes them unit
// vectors, times `factor`. The elements are only multiplied by a power of two, so they stay exact; the rest of the norm
// waits in fp32. Rows outside the sequence become zeros. Two lanes a row, a panel each.
__device__ __forceinline__ void normalise_rows(__half* tile, int begin, int end, float* scale, float factor) {
    const int row = threadIdx.x % kGroupThreads / 2;
    auto* panel = reinterpret_cast<uint8_t*>(tile + threadIdx.x % 2 * kPanel);
    const bool inside = row >= begin && row < end;
    float squares = 0;
#pragma unroll 2
    for (int piece = 0; piece < 8; ++piece) {
        squares += sum_of_squares(unpack(*reinterpret_cast<const uint4*>(panel + place(row, piece))));
    }
    squares += __shfl_xor_sync(0xffffffffu, squares, 1);
    squares = inside ? squares : 0.0f;
    const float power = power_below(rsqrtf(max(squares, kLeastSquares)));
    if (threadIdx.x % 2 == 0) scale[row] = factor * rsqrtf(squares + 1e-6f) * inverse_of_power(power);
#pragma unroll 2
    for (int piece = 0; piece < 8; ++piece) {
        auto& packed = *reinterpret_cast<uint4*>(panel + place(row, piece));
        const Float8 x = unpack(packed);
        uint4 scaled{};
        if (inside) {
            scaled.x = pack<__half>(x.v[0] * power, x.v[1] * power);
            scaled.y = pack<__half>(x.v[2] * power, x.v[3] * power);
            scaled.z = pack<__half>(x.v[4] * power, x.v[5] * power);
            scaled.w = pack<__half>(x.v[6] * power, x.v[7] * power);
        }
        packed = scaled;
    }
}

// What the scan needs of one token.
__device__ __forceinline__ void store_factors(const Gates& gates, const Shared& shared, HeadTiles& head, int token) {
    const float total = gates.total[token], last = gates.total[kChunk - 1];
    const float from_start = ptx::exp2_approximate(total), key_scale = shared.key_scale[token];
    TokenFactors& factors = head.factors;
    factors.total[token] = total;
    factors.key_scale[token] = key_scale;
    factors.carried[token] = from_start * key_scale;
    head.query_factors[token] = from_start * shared.query_scale[token];
    factors.to_end[token] = ptx::exp2_approximate(last - total) * key_scale;
    if (token == kChunk - 1) factors.decay[0] = from_start;
}

// By the whole block: the parts above the diagonal blocks, which stay zero from here on.
__device__ __forceinline__ void clear_upper(HeadTiles& head) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kChunk * kChunk / 8; i += kThreads) {
        const int row = i / 8, piece = i % 8;
        if (piece / 2 <= row / 16) continue;
        for (__half* tile : {head.solve, head.attention}) {
            *reinterpret_cast<uint4*>(reinterpret_cast<uint8_t*>(tile) + place(row, piece)) = uint4{};
        }
    }
}

// A thread in its warpgroup, asked for anew for each head: what the compiler derives from threadIdx before the loop
// over heads, it keeps, and spills.
struct Thread {
    int warp, lane;

    __device__ __forceinline__ Thread()
        : warp(ptx::warp_id() % 4), lane(__shfl_sync(0xffffffffu, threadIdx.x % 32, threadIdx.x % 32)) {}
};

// What the products of a thread with 8 columns need: row factors, differences of G, and where they lie.
struct Decays {
    int row[2];
    float total[2], scale[2];

    __device__ __forceinline__ Decays(const Thread& thread, const float* totals) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            row[h] = thread.warp * 16 + thread.lane / 4 + 8 * h;
            total[h] = totals[row[h]];
        }
    }
    // The pair's products with scales and decays; `beyond`: how many columns right of the row count.
    __device__ __forceinline__ float2 apply(const float* products, float2 totals, float2 scales, int h, int column,
                                            int beyond) const {
        const float left = products[0] * (scale[h] * scales.x) * ptx::exp2_approximate(total[h] - totals.x);
        const float right = products[1] * (scale[h] * scales.y) * ptx::exp2_approximate(total[h] - totals.y);
        return {column < row[h] + beyond ? left : 0.0f, column + 1 < row[h] + beyond ? right : 0.0f};
    }
};

// k k^T -> L, strictly lower, in fp16 pairs; the diagonal blocks in fp32 too. All rows of a thread lie in the block row
// of its warp.
__device__ __forceinline__ void store_lower(const Thread& thread, const float (&kk)[32], const Gates& gates,
                                            const float* key_scale, HeadTiles& head, Inverse& inverse) {
    const int warp = thread.warp;
    Decays decays(thread, gates.total);
#pragma unroll
    for (int h = 0; h < 2; ++h) decays.scale[h] = gates.beta[decays.row[h]] * key_scale[decays.row[h]];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (j / 2 > warp) continue;
        const int column = 8 * j + thread.lane % 4 * 2;
        const float2 totals = *reinterpret_cast<const float2*>(gates.total + column);
        const float2 scales = *reinterpret_cast<const float2*>(key_scale + column);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = decays.row[h];
            const float2 lower = decays.apply(kk + 4 * j + 2 * h, totals, scales, h, column, 0);
            const Split split(lower.x, lower.y);
            pair_at(head.solve, row, column) = split.high;
            pair_at(inverse.low, row, column) = split.low;
            if (j / 2 == warp) {
                *reinterpret_cast<float2*>(inverse.diagonal[warp] + row % 16 * 16 + column % 16) = lower;
            }
        }
    }
}

// q k^T -> P, lower with its diagonal.
__device__ __forceinline__ void store_attention(const Thread& thread, const float (&qk)[32], const Gates& gates,
                                                HeadTiles& head, const Shared& shared) {
    const int warp = thread.warp;
    Decays decays(thread, gates.total);
#pragma unroll
    for (int h = 0; h < 2; ++h) decays.scale[h] = shared.query_scale[decays.row[h]];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (j / 2 > warp) continue;
        const int column = 8 * j + thread.lane % 4 * 2;
        const float2 totals = *reinterpret_cast<const float2*>(gates.total + column);
        const float2 scales = *reinterpret_cast<const float2*>(shared.key_scale + column);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float2 pair = decays.apply(qk + 4 * j + 2 * h, totals, scales, h, column, 1);
            pair_at(head.attention, decays.row[h], column) = pack<__half>(pair.x, pair.y);
        }
    }
}

// (I + L)^-1 of the warp's diagonal block in place, by substitution in fp32: one column a lane, both halves of the warp
// alike.
__device__ __forceinline__ void invert_diagonal(const Thread& thread, float* block) {
    const int column = thread.lane % 16;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        x[i] = i == column ? 1.0f : 0.0f;
#pragma unroll
        for (int k = 0; k < i; k += 4) {
            const float4 row = *reinterpret_cast<const float4*>(block + i * 16 + k);
            x[i] -= row.x * x[k];
            if (k + 1 < i) x[i] -= row.y * x[k + 1];
            if (k + 2 < i) x[i] -= row.z * x[k + 2];
            if (k + 3 < i) x[i] -= row.w * x[k + 3];
        }
    }
    __syncwarp();
    if (thread.lane < 16) {
#pragma unroll
        for (int i = 0; i < 16; ++i) block[i * 16 + column] = x[i];
    }
    __syncwarp();
}

// A 16 x 16 block of products, or of A: to the tiles of the high and of the low parts.
__device__ __forceinline__ void store_block(const Thread& thread, const float (&d)[2][4], HeadTiles& head,
                                            Inverse& inverse, int row_block, int column_block) {
    const int lane = thread.lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Split split(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]);
        const int row = 16 * row_block + lane / 4 + i % 2 * 8, column = 16 * column_block + lane % 4 * 2 + i / 2 * 8;
        pair_at(head.solve, row, column) = split.high;
        pair_at(inverse.low, row, column) = split.low;
    }
}

// A 16 x 16 block in registers as the A operand of a product, in two parts.
struct Operand {
    uint32_t high[4], low[4];

    // d[16 x 16] += this times a block of the tiles, but for the product of the two low parts.
    __device__ __forceinline__ void multiply(const Thread& thread, float (&d)[2][4], const HeadTiles& head,
                                             const Inverse& inverse, int row_block, int column_block) const {
        uint32_t of_high[4], of_low[4];
        load_block(thread.lane, of_high, head.solve, row_block, column_block);
        load_block(thread.lane, of_low, inverse.low, row_block, column_block);
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            ptx::mma_m16n8k16<__half>(d[n], high, of_high[2 * n], of_high[2 * n + 1]);
            ptx::mma_m16n8k16<__half>(d[n], high, of_low[2 * n], of_low[2 * n + 1]);
            ptx::mma_m16n8k16<__half>(d[n], low, of_high[2 * n], of_high[2 * n + 1]);
        }
    }
    // Accumulators become an operand.
    __device__ __forceinline__ void set(const float (&d)[2][4], float sign) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const Split split(sign * d[i / 2][i % 2 * 2], sign * d[i / 2][i % 2 * 2 + 1]);
            high[i] = split.high;
            low[i] = split.low;
        }
    }
};

// The threads of a warpgroup. Constant numbers: for others a block would take all sixteen barriers.
__device__ __forceinline__ void synchronise_group() {
    if (threadIdx.x < kGroupThreads) {
        ptx::named_barrier_sync(1, kGroupThreads);
    } else {
        ptx::named_barrier_sync(2, kGroupThreads);
    }
}

// L -> A = (I + L)^-1 in the tiles of high and low parts, by one warpgroup. Warp i owns block row i; all but the
// diagonal blocks of L are in the tiles already.
__device__ __forceinline__ void invert(const Thread& thread, HeadTiles& head, Inverse& inverse) {
    const int warp = thread.warp, lane = thread.lane;
    float* block = inverse.diagonal[warp];
    __syncwarp();
    invert_diagonal(thread, block);
    float d[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const auto& from = block[(lane / 4 + i % 2 * 8) * 16 + lane % 4 * 2 + i / 2 * 8];
        const float2 pair = *reinterpret_cast<const float2*>(&from);
        d[i / 2][i % 2 * 2] = pair.x;
        d[i / 2][i % 2 * 2 + 1] = pair.y;
    }
    store_block(thread, d, head, inverse, warp, warp);
    Operand diagonal, beside;  // of A: its block (warp, warp), and that left of it in the pair
    diagonal.set(d, 1.0f);
    if (warp % 2 == 1) {
        float e[2][4] = {};
        diagonal.multiply(thread, e, head, inverse, warp, warp - 1);
        beside.set(e, -1.0f);
    }
    synchronise_group();
    if (warp % 2 == 1) {
        float a[2][4] = {};
        beside.multiply(thread, a, head, inverse, warp - 1, warp - 1);
        store_block(thread, a, head, inverse, warp, warp - 1);
        beside.set(a, 1.0f);
    }
    Operand lower[2];  // -A22 L21, a block row of the lower half
    if (warp >= 2) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            float e[2][4] = {};
            if (warp == 3) beside.multiply(thread, e, head, inverse, 2, k);
            diagonal.multiply(thread, e, head, inverse, warp, k);
            lower[k].set(e, -1.0f);
        }
    }
    synchronise_group();
    if (warp >= 2) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float a[2][4] = {};
            if (j == 0) lower[0].multiply(thread, a, head, inverse, 0, 0);
            lower[1].multiply(thread, a, head, inverse, 1, j);
            store_block(thread, a, head, inverse, warp, j);
        }
    }
}

// Columns of A times beta, so that the scan's right-hand side need not know it; by one warpgroup.
__device__ __forceinline__ void scale_columns(HeadTiles& head, const Inverse& inverse, const float* beta) {
    const int thread = threadIdx.x % kGroupThreads, piece = thread % 8;
    const float4 factors[2] = {*reinterpret_cast<const float4*>(beta + 8 * piece),
                               *reinterpret_cast<const float4*>(beta + 8 * piece + 4)};
    const auto scale = [](uint32_t high, uint32_t low, float left, float right) {
        const float2 x = __half22float2(*reinterpret_cast<const __half2*>(&high));
        const float2 y = __half22float2(*reinterpret_cast<const __half2*>(&low));
        return pack<__half>((x.x + y.x) * left, (x.y + y.y) * right);
    };
#pragma unroll 1
    for (int row = thread / 8; row < kChunk; row += kGroupThreads / 8) {
        if (piece / 2 > row / 16) continue;
        const uint32_t at = place(row, piece);
        auto& high = *reinterpret_cast<uint4*>(reinterpret_cast<uint8_t*>(head.solve) + at);
        const uint4 low = *reinterpret_cast<const uint4*>(reinterpret_cast<const uint8_t*>(inverse.low) + at);
        high = {scale(high.x, low.x, factors[0].x, factors[0].y), scale(high.y, low.y, factors[0].z, factors[0].w),
                scale(high.z, low.z, factors[1].x, factors[1].y), scale(high.w, low.w, factors[1].z, factors[1].w)};
    }
}

// d[64 x 64] = a b^T over the 128 elements of rows.
__device__ __forceinline__ void multiply_rows(float (&d)[32], uint64_t a, uint64_t b) {
    ptx::wgmma_fence(d);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        ptx::wgmma<__half, 64>(d, a + step_of_panels(k), b + step_of_panels(k), k > 0);
    }
    ptx::wgmma_commit();
}

// Log decays, their running sum and beta of the chunk, by one warp: two tokens a lane.
__device__ __forceinline__ void compute_gates(const GatedDeltaRulePrefill& p, int value_head, int64_t first_row,
                                              int begin, int end, Gates& gates) {
    const int lane = threadIdx.x % 32;
    const float rate = -expf(p.a_log[value_head]) * kLog2E, bias = p.dt_bias[value_head];
    float a[2], b[2];
    bool inside[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int token = 2 * lane + i;
        inside[i] = token >= begin && token < end;
        const int64_t row = first_row + (inside[i] ? token : begin);
        a[i] = __bfloat162float(p.a[row * p.a_stride + value_head]);
        b[i] = __bfloat162float(p.b[row * p.b_stride + value_head]);
    }
    float g[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float x = a[i] + bias;
        g[i] = inside[i] ? rate * (x > 20.0f ? x : log1pf(expf(x))) : 0.0f;
        gates.beta[2 * lane + i] = inside[i] ? sigmoid(b[i]) : 0.0f;
    }
    float through = g[0] + g[1];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const float other = __shfl_up_sync(0xffffffffu, through, distance);
        if (lane >= distance) through += other;
    }
    const float before = __shfl_up_sync(0xffffffffu, through, 1);
    gates.total[2 * lane] = (lane > 0 ? before : 0.0f) + g[0];
    gates.total[2 * lane + 1] = through;
}

// The slots of a block, one after the other.
__device__ __forceinline__ int slot_of(int turn) {
    return blockIdx.y + turn * gridDim.y;
}

// The ninth warp: rows and gates of the block's chunks.
__device__ __forceinline__ void run_ahead(const GatedDeltaRulePrefill& p, const Window& window, const CUtensorMap& rows,
                                          Shared& shared) {
    const int key_head = blockIdx.x, heads = p.value_heads / p.key_heads;
    const int query = key_head * kDim, key = query + p.key_heads * kDim;
#pragma unroll 1
    for (int turn = 0;; ++turn) {
        const int slot = slot_of(turn);
        Ahead& ahead = shared.ahead[turn % 2];
        const Place place(p, window, slot < window.slots ? slot : INT32_MAX);
        if (turn > 0) ptx::mbarrier_wait(&shared.empty, (turn - 1) & 1);
        if (place.sequence < 0) {
            if (threadIdx.x % 32 == 0) {
                ahead.begin = ahead.end = 0;
                ptx::mbarrier_arrive(&shared.full);
            }
            return;
        }
        const Chunks at(p, place.sequence);
        const int chunk = window.first + slot - place.first_slot;
        const int row = at.row(chunk), begin = at.begin(chunk), end = at.end(chunk);
        if (threadIdx.x % 32 == 0) {
            ptx::mbarrier_expect_tx(&shared.full, sizeof(KeyTiles));
#pragma unroll 1
            for (int panel = 0; panel < 2; ++panel) {
                const int column = panel * kDim / 2, offset = panel * kPanel;
                ptx::tma_load(shared.keys.key + offset, &rows, &shared.full, {key + column, row});
                ptx::tma_load(shared.keys.query + offset, &rows, &shared.full, {query + column, row});
            }
            ahead.begin = begin;
            ahead.end = end;
        }
#pragma unroll 1
        for (int head = 0; head < heads; ++head) {
            compute_gates(p, key_head * heads + head, row, begin, end, ahead.gates[head]);
        }
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.full);
    }
}

__device__ __forceinline__ void synchronise_workers() {
    ptx::named_barrier_sync(kWorkersBarrier, kWorkers);
}

// The two warpgroups.
__device__ __forceinline__ void work(const GatedDeltaRulePrefill& p, const Window& window, Shared& shared) {
    const int group = ptx::warp_id() / 4, key_head = blockIdx.x, heads = p.value_heads / p.key_heads;
#pragma unroll 1
    for (int turn = 0;; ++turn) {
        const Ahead& ahead = shared.ahead[turn % 2];
        ptx::mbarrier_wait(&shared.full, turn & 1);
        if (ahead.end == 0) break;
        normalise_rows(group == 0 ? shared.keys.key : shared.keys.query, ahead.begin, ahead.end,
                       group == 0 ? shared.key_scale : shared.query_scale, group == 0 ? 1.0f : kQueryScale);
        ptx::fence_async_shared();
        if (threadIdx.x == 0) ptx::bulk_wait_read<0>();  // the tiles of the heads may be written again
        synchronise_workers();
        if (threadIdx.x == 0) {
            ptx::bulk_store(window.keys + int64_t{slot_of(turn)} * p.key_heads + key_head, &shared.keys,
                            sizeof(KeyTiles));
            ptx::bulk_commit();
        }
#pragma unroll 1
        for (int first = 0; first < heads; first += 2) {
            float products[32];
            if (first > 0) {
                if (threadIdx.x == 0) ptx::bulk_wait_read<0>();
                synchronise_workers();
            }
            if (first + (group ^ 1) < heads) {
                HeadTiles& tiles = shared.heads[group ^ 1];
                const Gates& gates = ahead.gates[first + (group ^ 1)];
                multiply_rows(products, panel_descriptor(shared.keys.query), panel_descriptor(shared.keys.key));
                const int token = threadIdx.x % kGroupThreads;
                if (token < kChunk) store_factors(gates, shared, tiles, token);
                ptx::wgmma_wait<0>(products);
                store_attention(Thread(), products, gates, tiles, shared);
            }
            HeadTiles& tiles = shared.heads[group];
            const bool mine = first + group < heads;
            if (mine) {
                multiply_rows(products, panel_descriptor(shared.keys.key), panel_descriptor(shared.keys.key));
                ptx::wgmma_wait<0>(products);
            }
            if (first + 2 >= heads) {  // all products are made
                if (threadIdx.x == 0) ptx::bulk_wait_read<0>();
                synchronise_workers();
                if (threadIdx.x == 0) ptx::mbarrier_arrive(&shared.empty);
            }
            if (mine) {
                const Gates& gates = ahead.gates[first + group];
                store_lower(Thread(), products, gates, shared.key_scale, tiles, shared.inverses[group]);
                invert(Thread(), tiles, shared.inverses[group]);
                synchronise_group();
                scale_columns(tiles, shared.inverses[group], gates.beta);
            }
            ptx::fence_async_shared();
            synchronise_workers();
            if (threadIdx.x == 0) {
                HeadTiles* out = window.heads + int64_t{slot_of(turn)} * p.value_heads + key_head * heads + first;
                ptx::bulk_store(out, &shared.heads[0], kHeadBytes);
                if (first + 1 < heads) ptx::bulk_store(out + 1, &shared.heads[1], kHeadBytes);
                ptx::bulk_commit();
            }
        }
    }
    if (threadIdx.x == 0) ptx::bulk_wait<0>();
}

__global__ void __launch_bounds__(kThreads, kBlocksTogether)
    prepare_kernel(const __grid_constant__ GatedDeltaRulePrefill p, const __grid_constant__ CUtensorMap rows,
                   const __grid_constant__ Window window) {
    DYNAMIC_SHARED(storage);
    auto& shared = *reinterpret_cast<Shared*>(storage);
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&rows);
        ptx::mbarrier_init(&shared.full, 1);
        ptx::mbarrier_init(&shared.empty, 1);
        ptx::fence_mbarrier_init();
    }
#pragma unroll 1
    for (HeadTiles& head : shared.heads) clear_upper(head);
    __syncthreads();
    // Later windows read only what the kernels ahead of the first wrote, and write where nobody reads any more.
    if (window.first == 0) ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (ptx::warp_id() < kWorkers / 32) {
        ptx::register_increase<kWorkRegisters>();
        work(p, window, shared);
    } else {
        ptx::register_decrease<kAheadRegisters>();
        if (ptx::warp_id() == kWorkers / 32) run_ahead(p, window, rows, shared);
    }
    // One block for all: the scan that waits for this grid may count on all kernels ahead of it.
    if (window.first > 0 && blockIdx.x == 0 && blockIdx.y == 0) ptx::grid_dependency_wait();
}

}  // namespace

cudaError_t delta_rule_prefill::gated_delta_rule_prepare(const GatedDeltaRulePrefill& p, const CUtensorMap& rows,
                                                         const Window& window, cudaStream_t stream) {
    const int resident = std::max(kBlocksTogether * multiprocessor_count() / p.key_heads, 1);
    const LaunchConfig config{.grid = dim3(p.key_heads, std::min(window.slots, resident)),
                              .block = kThreads,
                              .shared_bytes = sizeof(Shared),
                              .stream = stream,
                              .programmatic = true,
                              .blocks_together = kBlocksTogether};
    return launch(prepare_kernel, config, p, rows, window);
}

}  // namespace tokenspeed
