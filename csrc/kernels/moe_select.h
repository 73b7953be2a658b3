// Which experts a token takes, and their weights: by one warp, from the token's logits.
//
// Each lane has experts / 32 neighbouring logits as sortable keys in registers: the 16 bits of the logit in the order
// of its value, then the expert counted backwards. So keys differ, the greatest key is the greatest probability, and of
// equal ones the lowest expert. A round is one warp-wide maximum, and the lane that owns it strikes it out. Logits
// whose probability underflows to zero in fp32 are ties, and become equal first. The exponential is taken of the chosen
// only: the sum over all experts cancels when the weights are renormalised. NaN has a key like any other value, so a
// padding row of garbage still gives distinct, valid experts.
#pragma once
#include <ptx.h>
#include <reduce.h>

#include <cstdint>

#include "bf16x8.h"

namespace tokenspeed {

constexpr unsigned kAllLanes = 0xffffffffu;

// The rank-th choice of a token, held by lane `rank` of its warp.
struct Choice {
    int expert;
    float weight;
};

// As a tree: a chain of maxima would take most of a round.
template <int kCount>
__device__ __forceinline__ uint32_t greatest_key(const uint32_t (&key)[kCount]) {
    uint32_t level[kCount / 2];
#pragma unroll
    for (int i = 0; i < kCount / 2; ++i) level[i] = max(key[i], key[i + kCount / 2]);
    if constexpr (kCount == 2) {
        return level[0];
    } else {
        return greatest_key(level);
    }
}

// kPerLane: logits per lane, a multiple of 8. Called by a whole warp.
template <int kPerLane>
__device__ __forceinline__ Choice select_experts(const __nv_bfloat16* logits, int top_k) {
    constexpr float kUnderflow = -87.3f;  // exp of less is no normal fp32 number
    const int lane = threadIdx.x % 32;
    uint32_t key[kPerLane];
    float greatest = -INFINITY;
    uint4 packed[kPerLane / 8];
#pragma unroll
    for (int i = 0; i < kPerLane / 8; ++i) packed[i] = ptx::load_16_no_allocate(logits + lane * kPerLane + i * 8);
#pragma unroll
    for (int i = 0; i < kPerLane / 8; ++i) {
        const Float8 x = unpack(packed[i]);
#pragma unroll
        for (int j = 0; j < 8; ++j) greatest = fmaxf(greatest, x.v[j]);
    }
    greatest = warp_maximum(greatest);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        const Float8 x = unpack(packed[i / 8]);
        const float logit = x.v[i % 8] + 0.0f;  // -0 becomes 0
        const uint32_t bits = __float_as_uint(logit) >> 16;
        uint32_t ordered = bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u;
        if (logit - greatest < kUnderflow) ordered = 0;
        key[i] = ordered << 16 | (0xffffu - (lane * kPerLane + i));
    }
    uint32_t best = greatest_key(key);
    uint32_t mine = 0;
    for (int rank = 0; rank < top_k; ++rank) {
        const uint32_t winner = __reduce_max_sync(kAllLanes, best);
        if (lane == rank) mine = winner;
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) {
            if (key[i] == winner) key[i] = 0;
        }
        best = greatest_key(key);
    }
    Choice choice{static_cast<int>(0xffffu - (mine & 0xffffu)), 0.0f};
    const uint32_t ordered = mine >> 16;
    const uint32_t bits = ordered & 0x8000u ? ordered & 0x7fffu : ~ordered & 0xffffu;
    if (lane < top_k) choice.weight = ordered == 0 ? 0.0f : expf(__uint_as_float(bits << 16) - greatest);
    choice.weight /= warp_sum(choice.weight);
    return choice;
}

}  // namespace tokenspeed
