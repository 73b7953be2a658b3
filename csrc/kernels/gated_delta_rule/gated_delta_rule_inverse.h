// A = (I + diag(beta) M)^-1 diag(beta) for a strictly lower M of 64 x 64, by one warpgroup in shared memory: see
// gated_delta_rule_prepare.cu for the algorithm.
#pragma once
#include <ptx.h>
#include <reduce.h>
#include <vector.h>

#include "gated_delta_rule_prefill.h"

namespace tokenspeed::delta_rule_prefill {

constexpr int kDiagonalPitch = 20;  // floats; so that a warp reads pairs of eight rows off distinct banks

struct Inverse {                             // in the making, by one warpgroup
    __half low[kPanel];                      // what rounding to fp16 takes from M, then from A
    float diagonal[4][16 * kDiagonalPitch];  // a 16 x 16 block of L = diag(beta) M a warp, then A's
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

// A thread in its warpgroup, asked for anew for each head: what the compiler derives from threadIdx before the loop
// over heads, it keeps, and spills.
struct Thread {
    int warp, lane;

    __device__ __forceinline__ Thread()
        : warp(ptx::warp_id() % 4), lane(__shfl_sync(kAllLanes, threadIdx.x % 32, threadIdx.x % 32)) {}
};

// L -> A of the warp's diagonal block in place, by substitution in fp32: one column a lane, both halves of the warp
// alike. `beta` is the block's.
__device__ __forceinline__ void invert_diagonal(const Thread& thread, float* block, const float* beta) {
    const int column = thread.lane % 16;
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        x[i] = i == column ? beta[column] : 0.0f;
        float odd = 0;  // two sums, each half as long a chain
#pragma unroll
        for (int k = 0; k < i; k += 4) {
            const float4 row = *reinterpret_cast<const float4*>(block + i * kDiagonalPitch + k);
            x[i] -= row.x * x[k];
            if (k + 1 < i) odd += row.y * x[k + 1];
            if (k + 2 < i) x[i] -= row.z * x[k + 2];
            if (k + 3 < i) odd += row.w * x[k + 3];
        }
        x[i] -= odd;
    }
    __syncwarp();
    if (thread.lane < 16) {
#pragma unroll
        for (int i = 0; i < 16; ++i) block[i * kDiagonalPitch + column] = x[i];
    }
    __syncwarp();
}

// A 16 x 16 block of A: to the tile of the high parts, and to that of the low ones where a product will read it.
template <bool kLow>
__device__ __forceinline__ void store_block(const Thread& thread, const float (&d)[2][4], HeadTiles& head,
                                            Inverse& inverse, int row_block, int column_block) {
    const int lane = thread.lane;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const Split split(d[i / 2][i % 2 * 2], d[i / 2][i % 2 * 2 + 1]);
        const int row = 16 * row_block + lane / 4 + i % 2 * 8, column = 16 * column_block + lane % 4 * 2 + i / 2 * 8;
        pair_at(head.solve, row, column) = split.high;
        if (kLow) pair_at(inverse.low, row, column) = split.low;
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

constexpr uint32_t kTeamBarriers = 3;  // of each team, from barrier 1 on

// The threads of a warpgroup.
__device__ __forceinline__ void synchronise_group() {
    ptx::named_barrier_sync(1 + threadIdx.x / kGroupThreads + kTeamBarriers * threadIdx.y, kGroupThreads);
}

// M -> A in the tiles of high and low parts, by one warpgroup. Warp i owns block row i; the blocks below the diagonal
// ones are in the tiles already.
__device__ __forceinline__ void invert(const Thread& thread, HeadTiles& head, Inverse& inverse, const float* beta) {
    const int warp = thread.warp, lane = thread.lane;
    float* block = inverse.diagonal[warp];
    __syncwarp();
    invert_diagonal(thread, block, beta + 16 * warp);
    float d[2][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const auto& from = block[(lane / 4 + i % 2 * 8) * kDiagonalPitch + lane % 4 * 2 + i / 2 * 8];
        const float2 pair = *reinterpret_cast<const float2*>(&from);
        d[i / 2][i % 2 * 2] = pair.x;
        d[i / 2][i % 2 * 2 + 1] = pair.y;
    }
    store_block<true>(thread, d, head, inverse, warp, warp);
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
        store_block<true>(thread, a, head, inverse, warp, warp - 1);
        beside.set(a, 1.0f);
    }
    Operand lower[2];  // -A22 M21, a block row of the lower half
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
        const Thread thread;
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            float a[2][4] = {};
            if (j == 0) lower[0].multiply(thread, a, head, inverse, 0, 0);
            lower[1].multiply(thread, a, head, inverse, 1, j);
            store_block<false>(thread, a, head, inverse, warp, j);
        }
    }
}

}  // namespace tokenspeed::delta_rule_prefill
