// Weights, keys and values in e4m3 as operands of products in fp16, which holds them exactly; the card converts two an
// instruction. The format of weights, blocks and scales: tokenspeed/ops/fp8.py.
#pragma once
#include <cuda_fp8.h>
#include <ptx.h>
#include <reduce.h>
#include <vector.h>

#include <cstdint>

#include "bf16x8.h"
#include "kernels.h"

namespace tokenspeed {

using E4m3 = __nv_fp8_e4m3;  // sign, four bits of exponent (bias 7), three of mantissa

constexpr float kLargestE4m3 = 448.0f;
constexpr float kSmallestPeak = 0x1p-100f;  // of a group of activations, so that its scale is no subnormal

constexpr int kGroupLanes = kScaleBlock / 8;

// The other operand, which may be of any size, in fp16: eight bf16 a lane, of one row in kLanes neighbouring lanes,
// times the power of two that brings their largest below 2^15; `divisor` is its inverse, for the sums. What is more
// than 2^-32 of the largest keeps all its bits. All lanes of the warp call it.
template <int kLanes = 32>
__device__ __forceinline__ uint4 row_to_half(uint4 packed, float& divisor) {
    const Float8 x = unpack(packed);
    float most = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) most = fmaxf(most, fabsf(x.v[i]));
    const uint32_t lanes = kLanes == 32 ? 0xffffffffu : ((1u << kLanes % 32) - 1) << threadIdx.x % 32 / kLanes * kLanes;
    const uint32_t peak = __reduce_max_sync(lanes, __float_as_uint(most));  // no float here is below zero
    // peak * factor lies in [2^14, 2^15), but for a peak below 2^-112 and one that is infinite.
    const int exponent = min(max(static_cast<int>(peak >> 23), 15), 254);
    const float factor = __uint_as_float(static_cast<uint32_t>(268 - exponent) << 23);
    divisor = __uint_as_float(static_cast<uint32_t>(exponent - 14) << 23);
    const auto two = [&](int i) { return pack<__half>(x.v[i] * factor, x.v[i + 1] * factor); };
    return make_uint4(two(0), two(2), two(4), two(6));
}

// Rounded to the nearest, ties to even; what is too large, infinity included, becomes +-448.
__device__ __forceinline__ uint2 pack_e4m3(const Float8& x) {
    const auto two = [&](int i) {
        return uint32_t{__nv_cvt_float2_to_fp8x2(make_float2(x.v[i], x.v[i + 1]), __NV_SATFINITE, __NV_E4M3)};
    };
    return make_uint2(two(0) | two(2) << 16, two(4) | two(6) << 16);
}

// Eight columns of a row of `columns`, from `column` on, a multiple of eight, as a part of their group of 128, whose
// other parts are in the neighbouring lanes. Scale and elements round as tokenspeed/ops/fp8.py says. What is not inside
// is zero, and not stored. All lanes of the warp call it.
__device__ __forceinline__ void store_group(const Groups& to, int64_t row, int column, int columns, Float8 x,
                                            bool inside) {
    float peak = kSmallestPeak;
#pragma unroll
    for (int i = 0; i < 8; ++i) peak = fmaxf(peak, fabsf(x.v[i]));
    peak = warp_maximum<kGroupLanes>(peak);
    if (!inside) return;
    const float factor = kLargestE4m3 / peak;
#pragma unroll
    for (int i = 0; i < 8; ++i) x.v[i] *= factor;
    *reinterpret_cast<uint2*>(to.values + row * columns + column) = pack_e4m3(x);
    if (column % kScaleBlock == 0) to.scales[column / kScaleBlock * to.scale_stride + row] = peak / kLargestE4m3;
}

}  // namespace tokenspeed
