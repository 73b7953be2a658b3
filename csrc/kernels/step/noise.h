// What every kernel that draws ids has in common: the noise of an id, its score, and probability masses as integers.
#pragma once
#include <cuda_bf16.h>
#include <ptx.h>

#include <cstdint>

namespace tokenspeed::sampling {

constexpr float kMass = 1099511627776.0f;  // 2^40, of the likeliest id
constexpr int kPieces = 3;                 // of a mass, in a histogram: sums of 14 bits stay within 32
constexpr int kPieceBits = 14;
constexpr float kLog2E = 1.44269504f;
constexpr int kNoneAllowed = -1, kNotFinite = -2;  // in place of an id

struct Best {
    float value;
    int id;
};

struct Words {
    uint32_t x[4];
};

// Philox 4x32-10 (Salmon et al. 2011).
__device__ __forceinline__ Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#pragma unroll
    for (int i = 0; i < 10; ++i) {
        if (i > 0) k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        const uint32_t high_0 = __umulhi(0xD2511F53u, c0), low_0 = 0xD2511F53u * c0;
        const uint32_t high_1 = __umulhi(0xCD9E8D57u, c2), low_1 = 0xCD9E8D57u * c2;
        c0 = high_1 ^ c1 ^ k0;
        c1 = low_1;
        c2 = high_0 ^ c3 ^ k1;
        c3 = low_0;
    }
    return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ float uniform(uint32_t word) {
    return fminf(static_cast<float>(word) * 0x1p-32f + 0x1p-33f, 1.0f - 0x1p-24f);
}

// Gumbel noise - distance. At most -log(uniform) - distance.
__device__ __forceinline__ float score_of(float uniform, float distance) {
    return -logf(-log1pf(-uniform)) - distance;
}

// What `uniform exp(distance)` must not exceed for the score to reach `needed`, with room for the approximate unit.
// Spares most ids two logarithms.
__device__ __forceinline__ float race_limit_for(float needed) {
    return ptx::exp2_approximate(-needed * kLog2E) * 1.001f;
}
__device__ __forceinline__ float race_of(float uniform, float distance) {
    return uniform * ptx::exp2_approximate(distance * kLog2E);
}

struct Noise {
    uint64_t seed, output;

    __device__ __forceinline__ Words words(int quad) const {  // of ids 4 quad .. 4 quad + 3
        return philox(quad, static_cast<uint32_t>(output), static_cast<uint32_t>(output >> 32), 0,
                      static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    }
    __device__ __forceinline__ float score(int id, float distance) const {
        const Words all = words(id / 4);
        const int which = id % 4;
        const uint32_t word = which < 2 ? (which == 0 ? all.x[0] : all.x[1]) : which == 2 ? all.x[2] : all.x[3];
        return score_of(uniform(word), distance);
    }
};

__device__ __forceinline__ unsigned long long mass_of(float distance) {
    return static_cast<unsigned long long>(expf(-distance) * kMass);
}

// Adds a mass to a bin of a histogram in shared memory, by native 32-bit atomics.
template <int kBins>
__device__ __forceinline__ void add_mass(uint32_t (&pieces)[kPieces][kBins], int bin, unsigned long long mass) {
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
        const auto part = static_cast<uint32_t>(mass >> (piece * kPieceBits)) & ((1u << kPieceBits) - 1);
        if (part != 0) atomicAdd(&pieces[piece][bin], part);
    }
}

}  // namespace tokenspeed::sampling
