// A = (I + diag(beta) M)^-1 diag(beta) for a strictly lower M of 64 x 64, by one warpgroup: see
// gated_delta_rule_prepare.cu for what M is.
//
// By blocks of 16 x 16, warp w block row w. Diagonal blocks first, all at once: two blocks of 8 x 8 by substitution in
// fp32, a row of the inverse a lane, and what is between them as everywhere else: A_wj = -A_ww sum_k M_wk A_kj. It is
// made transposed, V_j = -sum_k A_kj^T M_wk^T, A_wj^T = V_j A_ww^T: M and A_ww are operands of the products as they lie
// in the accumulators of k k^T, V as it lies in its own. All of them in fp16 pairs (high and low part), but for the
// products of two low parts. Only rows of A go through shared memory: from warp to warp in pairs, the high parts in
// the tile that leaves.
#pragma once
#include <ptx.h>
#include <reduce.h>
#include <vector.h>

#include "gated_delta_rule_prefill.h"

namespace tokenspeed::delta_rule_prefill {

constexpr int kSmallPitch = 12, kSmallBlock = 100;  // floats, of 8 x 8 blocks: quarters of a warp read distinct banks

// Where `across` has block 1, 2 or 3.
__host__ __device__ constexpr int block_of_across(int block) {
    return 8 * block * (block - 1);
}

struct alignas(16) Gates {  // of a value head; blocks are of 16 tokens
    float total[kChunk], beta[kChunk];
    float within[kChunk];              // the decay from the first token of the token's block
    float across[block_of_across(4)];  // from each token before a block to the first of the block
};

struct alignas(128) Inverse {            // in the making, by one warpgroup
    __half low[kPanel];                  // what rounding to fp16 takes from A
    float diagonal[4][2 * kSmallBlock];  // of a warp: 8 x 8 blocks of diag(beta) M^T, then of A
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

// A thread in its warpgroup, asked for anew for each head: what the compiler derives from threadIdx before the loop
// over heads, it keeps, and spills.
struct Thread {
    int warp, lane;

    __device__ __forceinline__ Thread()
        : warp(ptx::warp_id() % 4), lane(__shfl_sync(kAllLanes, threadIdx.x % 32, threadIdx.x % 32)) {}
};

__device__ __forceinline__ float2 product(const float* a, const float* b) {
    const float2 x = *reinterpret_cast<const float2*>(a), y = *reinterpret_cast<const float2*>(b);
    return {x.x * y.x, x.y * y.y};
}

// A 16 x 16 block as it lies in accumulators, in two parts: word 2 h + i has rows 8 h .., columns 8 i ... So its
// transpose is a B operand.
struct Block {
    uint32_t high[4], low[4];

    __device__ __forceinline__ void set(int i, const Split& split) {
        high[i] = split.high;
        low[i] = split.low;
    }
};

// d[16 x 16] += a b^T, with b as above and both parts of an A operand.
__device__ __forceinline__ void multiply(float (&d)[2][4], const uint32_t (&high)[4], const uint32_t (&low)[4],
                                         const Block& b) {
#pragma unroll
    for (int h = 0; h < 2; ++h) ptx::mma_m16n8k16<__half>(d[h], high, b.high[2 * h], b.high[2 * h + 1]);
#pragma unroll
    for (int h = 0; h < 2; ++h) ptx::mma_m16n8k16<__half>(d[h], high, b.low[2 * h], b.low[2 * h + 1]);
#pragma unroll
    for (int h = 0; h < 2; ++h) ptx::mma_m16n8k16<__half>(d[h], low, b.high[2 * h], b.high[2 * h + 1]);
}

// The block of A on the diagonal from -M's, as the accumulators of k k^T have it above the diagonal: `upper` is [rows
// 0..7][columns 0..7], [0..7][8..15], [8..15][8..15] of the transpose. The first and the last are scaled with beta.
__device__ __forceinline__ void invert_diagonal(int lane, const float2 (&upper)[3], float beta, float* small,
                                                Block& inverse) {
    const int row = lane / 4, column = lane % 4 * 2;
    float* const pair = small + row * kSmallPitch + column;
    *reinterpret_cast<float2*>(pair) = upper[0];
    *reinterpret_cast<float2*>(pair + kSmallBlock) = upper[2];
    const Split between(upper[1].x, upper[1].y);
    __syncwarp();
    // A row of the inverse a lane, from its end: x_j = beta_j (e_j - sum_{k > j} x_k M_kj).
    float* const block = small + lane / 8 % 2 * kSmallBlock;
    float x[8];
#pragma unroll
    for (int j = 7; j >= 0; --j) {
        x[j] = lane % 8 == j ? beta : 0.0f;
        float odd = 0;  // two sums, each half as long a chain
#pragma unroll
        for (int k = 4; k >= j / 4 * 4; k -= 4) {
            if (j == 7) continue;
            const float4 m = *reinterpret_cast<const float4*>(block + j * kSmallPitch + k);
            if (k + 3 > j) odd += m.w * x[k + 3];
            if (k + 2 > j) x[j] += m.z * x[k + 2];
            if (k + 1 > j) odd += m.y * x[k + 1];
            if (k > j) x[j] += m.x * x[k];
        }
        x[j] += odd;
    }
    __syncwarp();
    if (lane < 16) {
        auto* to = reinterpret_cast<float4*>(block + lane % 8 * kSmallPitch);
        to[0] = float4{x[0], x[1], x[2], x[3]};
        to[1] = float4{x[4], x[5], x[6], x[7]};
    }
    __syncwarp();
    const float2 first = *reinterpret_cast<const float2*>(pair);
    const float2 last = *reinterpret_cast<const float2*>(pair + kSmallBlock);
    const float* const transposed = small + column * kSmallPitch + row;
    const Split a11(first.x, first.y), a22(last.x, last.y), right(transposed[0], transposed[kSmallPitch]);
    // Products of 8 x 8: the low part of the left factor takes the place of further columns.
    const auto multiply_small = [](const Split& a, const Split& b) {
        float d[4] = {};
        ptx::mma_m16n8k16<__half>(d, {a.high, 0, a.low, 0}, b.high, b.high);
        ptx::mma_m16n8k16<__half>(d, {a.high, 0, 0, 0}, b.low, 0);
        return Split(d[0], d[1]);
    };
    inverse.set(0, a11);
    inverse.high[1] = inverse.low[1] = 0;
    inverse.set(2, multiply_small(multiply_small(a22, between), right));
    inverse.set(3, a22);
}

constexpr uint32_t kTeamBarriers = 3;  // of each team, from barrier 1 on

// The barrier of a warpgroup, for what its warps hand on: the diagonal blocks to all, then row 1 to warps 2 and 3, row
// 2 to warp 3.
struct RowBarrier {
    uint32_t id = 1 + threadIdx.x / kGroupThreads + kTeamBarriers * threadIdx.y;

    __device__ __forceinline__ void give(int row) const { ptx::named_barrier_arrive(id, kGroupThreads - 32 * row); }
    __device__ __forceinline__ void take(int row) const { ptx::named_barrier_sync(id, kGroupThreads - 32 * row); }
};

// k k^T -> A in the tile of the head, by one warpgroup.
__device__ __forceinline__ void invert(const Thread& thread, const float (&kk)[32], const Gates& gates,
                                       const float* key_scale, HeadTiles& head, Inverse& inverse) {
    const int warp = thread.warp, lane = thread.lane, row = 16 * warp + lane / 4, column = lane % 4 * 2;
    const RowBarrier barrier;
    const float scale[2] = {key_scale[row], key_scale[row + 8]};
    float diagonal[3][2];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if (k != warp) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            diagonal[0][i] = kk[8 * k + i];
            diagonal[1][i] = kk[8 * k + 4 + i];
            diagonal[2][i] = kk[8 * k + 6 + i];
        }
    }
    float2 upper[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        const int h = i / 2, at = 16 * warp + (i + 1) / 2 * 8 + column;
        const float2 totals = *reinterpret_cast<const float2*>(gates.total + at);
        const float2 scales = *reinterpret_cast<const float2*>(key_scale + at);
        const float total = gates.total[row + 8 * h], factor = -scale[h] * (i == 1 ? 1.0f : gates.beta[row + 8 * h]);
        upper[i].x = diagonal[i][0] * (factor * scales.x) * ptx::exp2_approximate(totals.x - total);
        upper[i].y = diagonal[i][1] * (factor * scales.y) * ptx::exp2_approximate(totals.y - total);
    }
    Block own;
    invert_diagonal(lane, upper, gates.beta[16 * warp + lane % 16], inverse.diagonal[warp], own);

    const uint32_t at = place(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    const uint32_t high = ptx::shared_address(head.solve) + at, low = ptx::shared_address(inverse.low) + at;
    const auto block = [](uint32_t tile, int i, int j) { return (tile ^ 32 * j) + 2048 * i; };
    ptx::stmatrix_x4(block(high, warp, warp), own.high);
    if (warp < 3) ptx::stmatrix_x4(block(low, warp, warp), own.low);
    if (warp == 0) {
        barrier.give(0);
        return;
    }
    const float left[2] = {-scale[0] * gates.within[row], -scale[1] * gates.within[row + 8]};
    float v[3][2][4] = {};
    const auto finish = [&](int j) {  // V_j to A_wj
        Block operand, result;        // accumulators of V as an A operand: rows come before columns in words
        float d[2][4] = {};
#pragma unroll
        for (int i = 0; i < 4; ++i) operand.set(i, {v[j][i / 2][i % 2 * 2], v[j][i / 2][i % 2 * 2 + 1]});
        multiply(d, operand.high, operand.low, own);
#pragma unroll
        for (int i = 0; i < 4; ++i) result.set(i, {d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]});
        ptx::stmatrix_x4_transposed(block(high, warp, j), result.high);
        if (warp < 3) ptx::stmatrix_x4_transposed(block(low, warp, j), result.low);
    };
#pragma unroll
    for (int k = 0; k < 3; ++k) {
        if (k >= warp) continue;
        Block lower;  // -M_wk
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int first = 16 * k + 8 * i + column;
            const float2 right = product(gates.across + block_of_across(warp) + first, key_scale + first);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float* products = kk + 8 * k + 4 * i + 2 * h;
                lower.set(2 * h + i, {products[0] * left[h] * right.x, products[1] * left[h] * right.y});
            }
        }
        if (k == 0) barrier.take(0);
#pragma unroll
        for (int j = k; j >= 0; --j) {
            if (j == k - 1) {  // the diagonal block was there before
                if (k + 1 == warp) finish(k);
                barrier.take(k);
            }
            uint32_t of_high[4], of_low[4];
            ptx::ldmatrix_x4_transposed(of_high, block(high, k, j));
            ptx::ldmatrix_x4_transposed(of_low, block(low, k, j));
            multiply(v[j], of_high, of_low, lower);
        }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
        if (j < max(warp - 1, 1)) finish(j);
    }
    if (warp == 1) barrier.give(1);
    if (warp == 2) barrier.give(2);
}

}  // namespace tokenspeed::delta_rule_prefill
