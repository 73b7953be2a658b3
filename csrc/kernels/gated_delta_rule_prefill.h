// What the warpgroups of gated_delta_rule_prefill.cu hand to each other, and the warpgroup that turns a chunk's raw
// projections into the operands of the scan. See there for the algorithm.
#pragma once
#include <cuda_fp16.h>
#include <ptx.h>
#include <ptx_wgmma.h>
#include <reduce.h>
#include <vector.h>

#include "bf16x8.h"
#include "kernels.h"

namespace tokenspeed::delta_rule_prefill {

constexpr int kChunk = 64;    // tokens
constexpr int kDim = 128;     // dk = dv
constexpr int kColumns = 64;  // value columns of a block: half a value head
constexpr int kStages = 3;
constexpr int kGroupThreads = 128;  // a warpgroup
constexpr uint32_t kKeysBarrier = 1, kPreparersBarrier = 2;
constexpr int kPanel = kChunk * 64;  // elements of 64 rows of 128 bytes, the widest that one swizzle spans
constexpr float kLog2E = 1.44269504f;
constexpr float kLeastSquares = 1e-30f;       // of a row: smaller ones count as this when they are scaled
constexpr float kQueryScale = 0.0883883476f;  // dk^-0.5

// Per token of a chunk; t is the token's place in it. Places outside the sequence have g = beta = 0 and k = q = 0.
struct TokenFactors {
    float total[kChunk];        // G_t log2(e), G_t = g_0 + ... + g_t
    float beta[kChunk];         //
    float key_scale[kChunk];    // r: k = r k', k' what the key tile holds
    float query_scale[kChunk];  // r dk^-0.5, likewise
    float carried[kChunk];      // beta e^{G_t} r of k
    float query[kChunk];        // e^{G_t} r dk^-0.5 of q
    float to_end[kChunk];       // e^{G_end - G_t} r of k
    float decay[4];             // e^{G_end}, and filling
};

// The operands of one chunk. Tiles are [token][...] in rows of 128 bytes whose 16-byte pieces are swizzled: see
// `place`. Keys and queries have two panels of 64 elements. All but the values are the same for both halves of a head.
struct alignas(1024) Stage {
    __half key[2 * kPanel];
    __half query[2 * kPanel];
    __half solve[kPanel];      // A = (I + L)^-1
    __half attention[kPanel];  // P = lower(q k^T e^{G_i - G_j})
    alignas(1024) TokenFactors factors;
    alignas(1024) __nv_bfloat16 value[kPanel];
};
constexpr uint32_t kKeyQueryBytes = sizeof(Stage::key) + sizeof(Stage::query);
constexpr uint32_t kRestBytes = sizeof(Stage::solve) + sizeof(Stage::attention) + sizeof(TokenFactors);

struct Scratch {
    __half low[kPanel];          // what rounding to fp16 takes from L, then from A
    float diagonal[4][16 * 16];  // a 16 x 16 block of L a warp, then its inverse
};

struct alignas(1024) Shared {
    Stage stages[kStages];
    __nv_bfloat16 raw_key[2 * kPanel];  // of the next chunk that this block prepares
    __nv_bfloat16 raw_query[2 * kPanel];
    Scratch scratch;
    __nv_bfloat16 output[kPanel];
    // A stage is full with two arrivals, of whoever loads the values and of whoever made the rest, and the bytes that
    // both announced; it is read when the scan has read it, and empty when both blocks say so, since one prepares it
    // for both.
    uint64_t full[kStages], read[kStages], empty[kStages];
    uint64_t raw_full, raw_empty, output_full, output_empty;
};
static_assert(sizeof(Shared) <= 227 * 1024 && sizeof(TokenFactors) % 16 == 0);

// Byte offset of a 16-byte piece of a row of 128 bytes, as TMA writes it and wgmma reads it with a 128-byte swizzle.
__device__ __forceinline__ uint32_t place(int row, int piece) {
    return row * 128 + ((piece ^ (row & 7)) << 4);
}

template <typename T>
__device__ __forceinline__ uint32_t& pair_at(T* tile, int row, int column) {
    return *reinterpret_cast<uint32_t*>(reinterpret_cast<uint8_t*>(tile) + place(row, column / 8) + column % 8 * 2);
}

// K contiguous: 16 elements further along K are 32 bytes further. With `transposed` operands (M or N contiguous) the
// next 64 of N are one panel further, 16 of K are 16 rows.
__device__ __forceinline__ uint64_t panel_descriptor(const void* panel) {
    return ptx::matrix_descriptor(ptx::shared_address(panel), Swizzle::k128, kPanel * 2, 1024);
}

// What a block works on: half a value head of one sequence.
struct Work {
    int sequence, value_head, key_head, column;
    int start, length, context, read_slot, write_slot;
    int first_chunk, chunks;  // absolute number of the first chunk, and how many
    int rank;                 // of this block among the two halves: it prepares every second chunk

    __device__ explicit Work(const GatedDeltaRulePrefill& p) {
        sequence = blockIdx.z;
        value_head = blockIdx.y;
        key_head = value_head / (p.value_heads / p.key_heads);
        rank = blockIdx.x;
        column = rank * kColumns;
        start = p.cu_seqlens[sequence];
        length = p.cu_seqlens[sequence + 1] - start;
        context = p.context_lens[sequence];
        read_slot = max(p.read_slot[sequence], 0);
        write_slot = p.write_slot[sequence];
        first_chunk = context / kChunk;
        chunks = length > 0 ? (context + length - 1) / kChunk - first_chunk + 1 : 0;
    }

    // The row of qkv where the chunk's place 0 is or would be, and the places that the sequence fills.
    __device__ int row(int chunk) const { return start + (first_chunk + chunk) * kChunk - context; }
    __device__ int begin(int chunk) const { return max(0, context - (first_chunk + chunk) * kChunk); }
    __device__ int end(int chunk) const { return min(kChunk, context + length - (first_chunk + chunk) * kChunk); }
};

// a + b as two fp16 pairs: the rounded values and what rounding took from them.
struct Split {
    uint32_t high, low;

    __device__ __forceinline__ Split(float a, float b) {
        high = pack<__half>(a, b);
        const float2 rounded = __half22float2(*reinterpret_cast<const __half2*>(&high));
        low = pack<__half>(a - rounded.x, b - rounded.y);
    }
};

// The power of two at or below a positive x.
__device__ __forceinline__ float power_below(float x) {
    return __uint_as_float(__float_as_uint(x) & 0x7f800000u);
}

// Raw rows of 128 bf16 elements in two panels -> fp16 rows of norm 1/2 to 1, and what makes them unit vectors, times
// `factor`. The elements are only multiplied by a power of two, so they stay exact; the rest of the norm waits in fp32.
// Rows outside the sequence become zeros.
__device__ __forceinline__ void normalise_rows(const __nv_bfloat16* raw, __half* tile, int begin, int end, float* scale,
                                               float factor) {
    constexpr int kPasses = 8, kRows = kChunk / kPasses;  // sixteen lanes a row
    const int t = threadIdx.x % kGroupThreads, piece = t % 16;
    const auto* from = reinterpret_cast<const uint8_t*>(raw + piece / 8 * kPanel);
    auto* to = reinterpret_cast<uint8_t*>(tile + piece / 8 * kPanel);
    uint4 rows[kPasses];
    float squares[kPasses];
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int row = pass * kRows + t / 16;
        const uint4 packed = *reinterpret_cast<const uint4*>(from + place(row, piece % 8));
        rows[pass] = row >= begin && row < end ? packed : uint4{};
        squares[pass] = sum_of_squares(unpack(rows[pass]));
    }
    butterfly<8, kPasses>(squares);  // two neighbouring lanes are left with a row's sum
    const float power_of_lane = power_below(rsqrtf(max(squares[0], kLeastSquares)));
    if (piece % 2 == 0) {
        scale[piece / 2 * kRows + t / 16] = factor * rsqrtf(squares[0] + 1e-6f) / power_of_lane;
    }
#pragma unroll
    for (int pass = 0; pass < kPasses; ++pass) {
        const int row = pass * kRows + t / 16;
        const float power = __shfl_sync(0xffffffffu, power_of_lane, 2 * pass, 16);
        const Float8 x = unpack(rows[pass]);
        uint4 scaled;
        scaled.x = pack<__half>(x.v[0] * power, x.v[1] * power);
        scaled.y = pack<__half>(x.v[2] * power, x.v[3] * power);
        scaled.z = pack<__half>(x.v[4] * power, x.v[5] * power);
        scaled.w = pack<__half>(x.v[6] * power, x.v[7] * power);
        *reinterpret_cast<uint4*>(to + place(row, piece % 8)) = scaled;
    }
}

// Log decays, their running sum and beta of the chunk, by one warp: two tokens a lane.
__device__ __forceinline__ void gates(const GatedDeltaRulePrefill& p, const Work& at, int chunk,
                                      TokenFactors& factors) {
    const int lane = threadIdx.x % 32, begin = at.begin(chunk), end = at.end(chunk);
    const int64_t first_row = at.row(chunk);
    const float rate = -expf(p.a_log[at.value_head]) * kLog2E, bias = p.dt_bias[at.value_head];
    float g[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int token = 2 * lane + i;
        float beta = 0;
        g[i] = 0;
        if (token >= begin && token < end) {
            const int64_t row = first_row + token;
            const float x = __bfloat162float(p.a[row * p.a_stride + at.value_head]) + bias;
            g[i] = rate * (x > 20.0f ? x : log1pf(expf(x)));
            beta = 1.0f / (1.0f + expf(-__bfloat162float(p.b[row * p.b_stride + at.value_head])));
        }
        factors.beta[token] = beta;
    }
    float through = g[0] + g[1];
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const float other = __shfl_up_sync(0xffffffffu, through, distance);
        if (lane >= distance) through += other;
    }
    const float before = __shfl_up_sync(0xffffffffu, through, 1);
    factors.total[2 * lane] = (lane > 0 ? before : 0.0f) + g[0];
    factors.total[2 * lane + 1] = through;
}

// Everything that follows from the gates and the scales of one token.
__device__ __forceinline__ void derive(TokenFactors& factors, int token) {
    const float total = factors.total[token], last = factors.total[kChunk - 1];
    const float from_start = ptx::exp2_approximate(total);
    factors.carried[token] = factors.beta[token] * from_start * factors.key_scale[token];
    factors.query[token] = from_start * factors.query_scale[token];
    factors.to_end[token] = ptx::exp2_approximate(last - total) * factors.key_scale[token];
    if (token == kChunk - 1) factors.decay[0] = from_start;
}

// By the whole block: the parts above the diagonal blocks, which stay zero from here on.
__device__ __forceinline__ void clear_upper(Stage& stage) {
    for (int i = threadIdx.x; i < kChunk * kChunk / 8; i += blockDim.x) {
        const int row = i / 8, piece = i % 8;
        if (piece / 2 <= row / 16) continue;
        for (__half* tile : {stage.solve, stage.attention}) {
            *reinterpret_cast<uint4*>(reinterpret_cast<uint8_t*>(tile) + place(row, piece)) = uint4{};
        }
    }
}

// What the products of a thread with 8 columns need: row factors, differences of G, and where they lie.
struct Decays {
    int row[2];
    float total[2], scale[2];

    __device__ __forceinline__ Decays(const TokenFactors& factors) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            row[h] = threadIdx.x % kGroupThreads / 32 * 16 + threadIdx.x % 32 / 4 + 8 * h;
            total[h] = factors.total[row[h]];
        }
    }
    // The pair's products with scales and decays; `beyond`: how many columns right of the row count.
    template <bool kMasked>
    __device__ __forceinline__ float2 apply(const float* products, float2 totals, float2 scales, int h, int column,
                                            int beyond) const {
        const float left = products[0] * (scale[h] * scales.x) * ptx::exp2_approximate(total[h] - totals.x);
        const float right = products[1] * (scale[h] * scales.y) * ptx::exp2_approximate(total[h] - totals.y);
        if constexpr (!kMasked) return {left, right};
        return {column < row[h] + beyond ? left : 0.0f, column + 1 < row[h] + beyond ? right : 0.0f};
    }
};

// k k^T -> L, strictly lower: fp16 pairs beside the diagonal blocks, fp32 within them. All rows of a thread lie in the
// block row of its warp.
__device__ __forceinline__ void store_lower(const float (&kk)[32], Stage& stage, Scratch& scratch) {
    const int warp = threadIdx.x % kGroupThreads / 32;
    const TokenFactors& factors = stage.factors;
    Decays decays(factors);
#pragma unroll
    for (int h = 0; h < 2; ++h) decays.scale[h] = factors.beta[decays.row[h]] * factors.key_scale[decays.row[h]];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (j / 2 > warp) continue;
        const int column = 8 * j + threadIdx.x % 4 * 2;
        const float2 totals = *reinterpret_cast<const float2*>(factors.total + column);
        const float2 scales = *reinterpret_cast<const float2*>(factors.key_scale + column);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float* products = kk + 4 * j + 2 * h;
            if (j / 2 == warp) {
                const float2 lower = decays.apply<true>(products, totals, scales, h, column, 0);
                *reinterpret_cast<float2*>(scratch.diagonal[warp] + decays.row[h] % 16 * 16 + column % 16) = lower;
            } else {
                const float2 lower = decays.apply<false>(products, totals, scales, h, column, 0);
                const Split split(lower.x, lower.y);
                pair_at(stage.solve, decays.row[h], column) = split.high;
                pair_at(scratch.low, decays.row[h], column) = split.low;
            }
        }
    }
}

// q k^T -> P, lower with its diagonal.
__device__ __forceinline__ void store_attention(const float (&qk)[32], Stage& stage) {
    const int warp = threadIdx.x % kGroupThreads / 32;
    const TokenFactors& factors = stage.factors;
    Decays decays(factors);
#pragma unroll
    for (int h = 0; h < 2; ++h) decays.scale[h] = factors.query_scale[decays.row[h]];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        if (j / 2 > warp) continue;
        const int column = 8 * j + threadIdx.x % 4 * 2;
        const float2 totals = *reinterpret_cast<const float2*>(factors.total + column);
        const float2 scales = *reinterpret_cast<const float2*>(factors.key_scale + column);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float2 pair = decays.apply<true>(qk + 4 * j + 2 * h, totals, scales, h, column, 1);
            pair_at(stage.attention, decays.row[h], column) = pack<__half>(pair.x, pair.y);
        }
    }
}

// (I + L)^-1 of the warp's diagonal block in place, by substitution in fp32: one column a lane, both halves of the warp
// alike.
__device__ __forceinline__ void invert_diagonal(float* block) {
    const int column = threadIdx.x % 16;
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
    if (threadIdx.x % 32 < 16) {
#pragma unroll
        for (int i = 0; i < 16; ++i) block[i * 16 + column] = x[i];
    }
    __syncwarp();
}

// The 16 x 16 block of a tile as B operand: b[0], b[1] for its columns 0..7, b[2], b[3] for 8..15.
__device__ __forceinline__ void load_block(uint32_t (&b)[4], const __half* tile, int row_block, int column_block) {
    const int lane = threadIdx.x % 32;
    const int row = 16 * row_block + lane % 16, piece = 2 * column_block + lane / 16;
    ptx::ldmatrix_x4_transposed(b, ptx::shared_address(tile) + place(row, piece));
}

// d[16 x 16] += a b with operands of twice fp16's precision, but for the product of the two low parts.
__device__ __forceinline__ void multiply_split(float (&d)[2][4], const uint32_t (&a_high)[4],
                                               const uint32_t (&a_low)[4], const uint32_t (&b_high)[4],
                                               const uint32_t (&b_low)[4]) {
#pragma unroll
    for (int n = 0; n < 2; ++n) {
        ptx::mma_m16n8k16<__half>(d[n], a_high, b_high[2 * n], b_high[2 * n + 1]);
        ptx::mma_m16n8k16<__half>(d[n], a_high, b_low[2 * n], b_low[2 * n + 1]);
        ptx::mma_m16n8k16<__half>(d[n], a_low, b_high[2 * n], b_high[2 * n + 1]);
    }
}

// Accumulators of a 16 x 16 block as the A operand of the next product, negated.
__device__ __forceinline__ void negated_operand(const float (&d)[2][4], uint32_t (&high)[4], uint32_t (&low)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Split split(-d[i / 2][i % 2 * 2], -d[i / 2][i % 2 * 2 + 1]);
        high[i] = split.high;
        low[i] = split.low;
    }
}

// A = (I + L)^-1 by 16 x 16 blocks: D_i the inverse of a diagonal block, E_ik = D_i L_ik, then row by row
// A_ii = D_i, A_ij = -sum_{j <= k < i} E_ik A_kj. Warp i owns block row i.
__device__ __forceinline__ void invert(Stage& stage, Scratch& scratch) {
    const int warp = threadIdx.x % kGroupThreads / 32, lane = threadIdx.x % 32;
    const int row = lane / 4, column = lane % 4 * 2;
    float* block = scratch.diagonal[warp];
    __syncwarp();
    invert_diagonal(block);

    uint32_t diagonal_high[4], diagonal_low[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float2 x = *reinterpret_cast<const float2*>(block + (row + i % 2 * 8) * 16 + column + i / 2 * 8);
        const Split split(x.x, x.y);
        diagonal_high[i] = split.high;
        diagonal_low[i] = split.low;
        const int tile_row = 16 * warp + row + i % 2 * 8, tile_column = 16 * warp + column + i / 2 * 8;
        pair_at(stage.solve, tile_row, tile_column) = split.high;
        pair_at(scratch.low, tile_row, tile_column) = split.low;
    }
    uint32_t e_high[3][4], e_low[3][4];
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        if (k >= warp) continue;
        uint32_t high[4], low[4];
        load_block(high, stage.solve, warp, k);
        load_block(low, scratch.low, warp, k);
        float e[2][4] = {};
        multiply_split(e, diagonal_high, diagonal_low, high, low);
        negated_operand(e, e_high[k], e_low[k]);
    }
#pragma unroll 1
    for (int step = 1; step < 4; ++step) {
        ptx::named_barrier_sync(kKeysBarrier, kGroupThreads);  // the block rows above are complete
        if (step != warp) continue;
#pragma unroll
        for (int j = 0; j < 3; ++j) {
            if (j >= warp) continue;
            float a[2][4] = {};
#pragma unroll
            for (int k = j; k < 3; ++k) {
                if (k >= warp) continue;
                uint32_t high[4], low[4];
                load_block(high, stage.solve, k, j);
                load_block(low, scratch.low, k, j);
                multiply_split(a, e_high[k], e_low[k], high, low);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const Split split(a[i / 2][i % 2 * 2], a[i / 2][i % 2 * 2 + 1]);
                const int tile_row = 16 * warp + row + i % 2 * 8, tile_column = 16 * j + column + i / 2 * 8;
                pair_at(stage.solve, tile_row, tile_column) = split.high;
                pair_at(scratch.low, tile_row, tile_column) = split.low;
            }
        }
    }
}

// d[64 x 64] = a b^T over the 128 elements of rows.
__device__ __forceinline__ void multiply_rows(float (&d)[32], uint64_t a, uint64_t b) {
    ptx::wgmma_fence(d);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const uint64_t step = (k / 4 * kPanel * 2 + k % 4 * 32) >> 4;
        ptx::wgmma<__half, 64>(d, a + step, b + step, k > 0);
    }
    ptx::wgmma_commit();
}

__device__ __forceinline__ void synchronise_preparers() {
    ptx::fence_async_shared();
    ptx::named_barrier_sync(kPreparersBarrier, 2 * kGroupThreads);
}

// The two warpgroups that prepare a chunk meet when keys and queries are unit vectors, and when all is done.
__device__ __forceinline__ void prepare_keys(const Work& at, int chunk, Shared& shared, Stage& stage) {
    normalise_rows(shared.raw_key, stage.key, at.begin(chunk), at.end(chunk), stage.factors.key_scale, 1.0f);
    synchronise_preparers();
    float kk[32];
    multiply_rows(kk, panel_descriptor(stage.key), panel_descriptor(stage.key));
    if (threadIdx.x % kGroupThreads == 0) {
        ptx::mbarrier_arrive(&shared.raw_empty);
        ptx::bulk_copy_cluster(stage.key, stage.key, kKeyQueryBytes, &shared.full[chunk % kStages], at.rank ^ 1);
    }
    ptx::wgmma_wait<0>(kk);
    store_lower(kk, stage, shared.scratch);
    invert(stage, shared.scratch);
    synchronise_preparers();
    if (threadIdx.x % kGroupThreads == 0) {
        ptx::mbarrier_arrive(&shared.full[chunk % kStages]);
        ptx::bulk_copy_cluster(stage.solve, stage.solve, kRestBytes, &shared.full[chunk % kStages], at.rank ^ 1);
    }
}

__device__ __forceinline__ void prepare_queries(const Work& at, int chunk, Shared& shared, Stage& stage) {
    normalise_rows(shared.raw_query, stage.query, at.begin(chunk), at.end(chunk), stage.factors.query_scale,
                   kQueryScale);
    synchronise_preparers();
    float qk[32];
    multiply_rows(qk, panel_descriptor(stage.query), panel_descriptor(stage.key));
    const int token = threadIdx.x % kGroupThreads;
    if (token < kChunk) derive(stage.factors, token);
    ptx::wgmma_wait<0>(qk);
    store_attention(qk, stage);
    synchronise_preparers();
}

}  // namespace tokenspeed::delta_rule_prefill
