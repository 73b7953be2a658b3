// What the kernels that draw ids share: which of two ids wins, probability masses as integers, and the noise of an id.
#pragma once
#include <cuda_bf16.h>
#include <ptx.h>

#include <cstdint>

namespace tokenspeed::draw {

constexpr float kMass = 1099511627776.0f;          // 2^40, of the likeliest id
constexpr int kNoneAllowed = -1, kNotFinite = -2;  // in place of an id

struct Best {
    float value;
    int id;
};

// The larger value; of equals the lower id.
__device__ __forceinline__ Best better(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

__device__ __forceinline__ float to_fp32(float x) {
    return x;
}
__device__ __forceinline__ float to_fp32(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

__device__ __forceinline__ unsigned long long mass_of(float distance) {
    return static_cast<unsigned long long>(expf(-distance) * kMass);
}

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

__device__ __forceinline__ float gumbel(float uniform) {
    return -logf(-log1pf(-uniform));
}

// Whether gumbel(uniform) surely stays below `needed`: it is at most -log(uniform). Spares most ids two logarithms.
__device__ __forceinline__ bool cannot_reach(float uniform, float needed) {
    return uniform > ptx::exp2_approximate(needed * -1.44269504f) * 1.001f;
}

// The score of an id by its word of noise: the drawn id has the largest.
__device__ __forceinline__ float score_of(uint32_t word, float distance) {
    return gumbel(uniform(word)) - distance;
}

struct Noise {
    uint64_t seed, index;

    __device__ __forceinline__ Words words(int quad) const {  // of ids 4 quad .. 4 quad + 3
        return philox(quad, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0,
                      static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    }

    __device__ __forceinline__ uint32_t word(int id) const {
        const Words four = words(id / 4);
        const int which = id % 4;
        return which < 2 ? (which == 0 ? four.x[0] : four.x[1]) : which == 2 ? four.x[2] : four.x[3];
    }
};

// The order of floats as that of integers: the sign decides whether the other bits turn.
__device__ __forceinline__ float largest_of_warp(float value) {
    const uint32_t bits = __float_as_uint(value);
    const uint32_t most = __reduce_max_sync(0xffffffffu, bits & 0x80000000u ? ~bits : bits | 0x80000000u);
    return __uint_as_float(most & 0x80000000u ? most & 0x7fffffffu : ~most);
}

}  // namespace tokenspeed::draw
