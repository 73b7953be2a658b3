// e4m3 as operands of products in bf16, exactly. The format of weights, blocks and scales: tokenspeed/ops/fp8.py.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <ptx.h>

#include <cstdint>

namespace tokenspeed {

using E4m3 = __nv_fp8_e4m3;  // sign, four bits of exponent (bias 7), three of mantissa

// Four finite e4m3, the first in the lowest byte, as two registers of two bf16 of the same values. Four bits up, with
// its sign repeated above it, an e4m3 is a bf16 whose exponent is 120 too low, subnormal numbers included.
__device__ __forceinline__ void unpack_e4m3(uint32_t four, uint32_t& first, uint32_t& second) {
    constexpr uint32_t kKept = 0x87f087f0u;
    const __nv_bfloat162 scale =
        __halves2bfloat162(__ushort_as_bfloat16(0x7b80), __ushort_as_bfloat16(0x7b80));  // 2^120
    const auto widen = [&](uint32_t signed_bytes) {
        const uint32_t bits = signed_bytes << 4 & kKept;
        const __nv_bfloat162 value = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&bits), scale);
        return *reinterpret_cast<const uint32_t*>(&value);
    };
    first = widen(ptx::permute_bytes(four, 0, 0x9180));
    second = widen(ptx::permute_bytes(four, 0, 0xB3A2));
}

}  // namespace tokenspeed
