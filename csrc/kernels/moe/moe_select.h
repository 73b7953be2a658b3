// Which experts a token takes, and their weights: by one warp, from the token's logits.
//
// Each lane has experts / 32 neighbouring logits as sortable keys in registers: the 16 bits of the logit in the order
// of its value, then the expert counted backwards. So keys differ, the greatest key is the greatest probability, and of
// equal ones the lowest expert. A lane sorts its keys; a round is one warp-wide maximum of the lanes' first, and the
// lane that owns it moves on to its next. Logits whose probability underflows to zero in fp32 are ties, and become
// equal first. The exponential is taken of the chosen only: the sum over all experts cancels when the weights are
// renormalised. NaN has a key like any other value, so a padding row of garbage still gives distinct, valid experts.
#pragma once
#include <ptx.h>
#include <reduce.h>

#include <cstdint>

#include "bf16x8.h"
#include "kernels.h"

namespace tokenspeed {

__device__ __forceinline__ bool is_padding(const SequenceRows& sequences, int token) {
    return sequences.context_lens != nullptr && sequences.context_lens[token / sequences.tokens] < 0;
}

// The rank-th choice of a token, held by lane `rank` of its warp.
struct Choice {
    int expert;
    uint32_t ordered;   // its logit's bits in the order of the values; 0 for all that underflow
    uint32_t greatest;  // of the token, in the same order
};

// 16 bits of bf16, ordered as the values are, and back.
__device__ __forceinline__ uint32_t ordered_bits(float logit) {
    const uint32_t bits = __float_as_uint(logit) >> 16;
    return bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u;
}
__device__ __forceinline__ float from_ordered(uint32_t ordered) {
    return __uint_as_float((ordered & 0x8000u ? ordered & 0x7fffu : ~ordered & 0xffffu) << 16);
}

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

// Batcher's network: the pairs to compare, in order.
template <int kCount>
struct SortingNetwork {
    int pairs = 0;
    uint8_t upper[kCount * 5]{}, lower[kCount * 5]{};

    constexpr SortingNetwork() {
        for (int p = 1; p < kCount; p *= 2) {
            for (int k = p; k >= 1; k /= 2) {
                for (int j = k % p; j + k < kCount; j += 2 * k) {
                    for (int i = j; i < j + k && i + k < kCount; ++i) {
                        if (i / (2 * p) != (i + k) / (2 * p)) continue;
                        upper[pairs] = static_cast<uint8_t>(i);
                        lower[pairs++] = static_cast<uint8_t>(i + k);
                    }
                }
            }
        }
    }
};

// Falling.
template <int kCount>
__device__ __forceinline__ void sort_keys(uint32_t (&key)[kCount]) {
    constexpr SortingNetwork<kCount> kNetwork;
#pragma unroll
    for (int i = 0; i < kNetwork.pairs; ++i) {
        uint32_t& a = key[kNetwork.upper[i]];
        uint32_t& b = key[kNetwork.lower[i]];
        const uint32_t greater = max(a, b);
        b = min(a, b);
        a = greater;
    }
}

// logits: bf16 values, those of experts kPerLane lane and following. Called by a whole warp.
template <int kPerLane>
__device__ __forceinline__ Choice select_experts(const float (&logits)[kPerLane], int top_k) {
    constexpr float kUnderflow = -87.3f;  // exp of less is no normal fp32 number
    const int lane = threadIdx.x % 32;
    float logit[kPerLane];
    uint32_t key[kPerLane];
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        logit[i] = logits[i] + 0.0f;  // -0 becomes 0
        key[i] = ordered_bits(logit[i]);
    }
    const uint32_t most = __reduce_max_sync(kAllLanes, greatest_key(key));
    const float greatest = from_ordered(most);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        if (logit[i] - greatest < kUnderflow) key[i] = 0;
        key[i] = key[i] << 16 | (0xffffu - (lane * kPerLane + i));
    }
    sort_keys(key);
    uint32_t mine = 0;
#pragma unroll 1
    for (int rank = 0; rank < top_k; ++rank) {
        const uint32_t winner = __reduce_max_sync(kAllLanes, key[0]);
        if (lane == rank) mine = winner;
        const bool won = key[0] == winner;
#pragma unroll
        for (int i = 0; i + 1 < kPerLane; ++i) key[i] = won ? key[i + 1] : key[i];
        if (won) key[kPerLane - 1] = 0;
    }
    return {static_cast<int>(0xffffu - (mine & 0xffffu)), mine >> 16, most};
}

// The weight of this lane's choice among the token's. Called by a whole warp.
__device__ __forceinline__ float weight_of(const Choice& choice, int top_k) {
    float weight = 0;
    if (threadIdx.x % 32 < top_k && choice.ordered != 0) {
        weight = expf(from_ordered(choice.ordered) - from_ordered(choice.greatest));
    }
    return weight / warp_sum(weight);
}

}  // namespace tokenspeed
