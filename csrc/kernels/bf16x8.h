// Eight bf16 elements as the 16 bytes that one load moves, and as the eight floats that arithmetic wants.
#pragma once
#include <ptx.h>
#include <vector.h>

#include <cstdint>

namespace tokenspeed {

struct Float8 {
    float v[8];
};

__device__ __forceinline__ Float8 unpack(uint4 packed) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
    Float8 result;
#pragma unroll
    for (int i = 0; i < 4; ++i) {  // bf16 is the upper half of a float
        result.v[2 * i] = __uint_as_float(words[i] << 16);
        result.v[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    return result;
}

__device__ __forceinline__ uint4 pack(const Float8& x) {
    using T = __nv_bfloat16;
    return make_uint4(pack<T>(x.v[0], x.v[1]), pack<T>(x.v[2], x.v[3]), pack<T>(x.v[4], x.v[5]),
                      pack<T>(x.v[6], x.v[7]));
}

__device__ __forceinline__ Float8 operator+(const Float8& a, const Float8& b) {
    Float8 result;
#pragma unroll
    for (int i = 0; i < 8; ++i) result.v[i] = a.v[i] + b.v[i];
    return result;
}

__device__ __forceinline__ float sum_of_squares(const Float8& x) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += x.v[i] * x.v[i];
    return sum;
}

__device__ __forceinline__ void store_16(void* global, uint4 value) {
    *static_cast<uint4*>(global) = value;
}

// Two special-function instructions; where the power is infinite (x below -88) the result is 0, as it should be.
__device__ __forceinline__ float sigmoid(float x) {
    constexpr float kLog2E = 1.44269504f;
    return ptx::reciprocal_approximate(1.0f + ptx::exp2_approximate(-kLog2E * x));
}

__device__ __forceinline__ float silu(float x) {
    return x * sigmoid(x);
}

// silu(gate) up.
__device__ __forceinline__ Float8 gated(const Float8& gate, const Float8& up) {
    Float8 result;
#pragma unroll
    for (int i = 0; i < 8; ++i) result.v[i] = silu(gate.v[i]) * up.v[i];
    return result;
}

// A norm's output, of a weight that is centred at zero. inverse: of the root of the mean square.
__device__ __forceinline__ Float8 normalised(const Float8& x, float inverse, const Float8& weight) {
    Float8 result;
#pragma unroll
    for (int i = 0; i < 8; ++i) result.v[i] = x.v[i] * inverse * (1.0f + weight.v[i]);
    return result;
}

}  // namespace tokenspeed
