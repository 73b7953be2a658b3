// What gated_delta_rule_decode.cu and gdn_block.cu do with the rows of a state, once keys, queries and gates are known.
#pragma once
#include <ptx.h>
#include <reduce.h>

#include "gated_delta_rule_decode.h"

namespace tokenspeed::delta_rule {

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

// u and o of one row for all new tokens, from its products; o takes the place of v.
template <int kTokens>
__device__ __forceinline__ void update_row(const GatedDeltaRuleDecode& p, const Place& at, const Shared& shared,
                                           const Slots& slots, int row, float (&u)[kTokens]) {
    constexpr int kPadded = padded(kTokens);
    const int head = (at.first_row + row) / kDim;
    const float* suffix = shared.suffix + head * (p.ring_rows + 1);
    float* sums = shared.sums + row * 2 * kPadded;
    float sk[kTokens], sq[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        sk[t] = slots.context > 0 ? suffix[0] * sums[t] : 0;
        sq[t] = slots.context > 0 ? suffix[0] * sums[kPadded + t] : 0;
    }
    int ring_row = slots.ring_row;
    for (int i = 0; i < slots.pending; ++i) {
        const float u = suffix[i + 1] * shared.ring[ring_row * (kDim + at.rows) + kDim + row];
        const float* products = shared.pending + i * 2 * kPadded;
#pragma unroll
        for (int t = 0; t < kTokens; ++t) {
            sk[t] += u * products[t];
            sq[t] += u * products[kPadded + t];
        }
        ring_row = ring_row + 1 == p.ring_rows ? 0 : ring_row + 1;
    }
    const float* beta = shared.beta + head * kTokens;
    const float* decay = shared.decay + head * kTokens;
    const float* coefficient = shared.coefficient + head * kTokens * kTokens;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        float* value = shared.value + t * at.rows + row;
        u[t] = beta[t] * (*value - decay[t] * shared.inverse[t] * sk[t]);
        float o = decay[t] * shared.inverse[kTokens + t] * sq[t];
#pragma unroll
        for (int j = 0; j < t; ++j) {
            u[t] -= coefficient[j * kTokens + t] * u[j];
            o += coefficient[t * kTokens + j] * u[j];
        }
        o += coefficient[t * kTokens + t] * u[t];
        *value = rounded(o);
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
            *reinterpret_cast<float4*>(to + (row + r) * kDim) = rows[r];
        }
    }
}

}  // namespace tokenspeed::delta_rule
