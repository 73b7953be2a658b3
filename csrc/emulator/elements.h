// Element formats of the matrix unit.
#pragma once
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>
#include <cstring>

namespace tokenspeed::emulator {

inline float to_float(uint16_t bits, bool bf16) {
    if (!bf16) {
        __half_raw raw;
        raw.x = bits;
        return __half2float(__half(raw));
    }
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    memcpy(&value, &wide, sizeof value);
    return value;
}

inline float to_float(uint8_t e4m3) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(e4m3, __NV_E4M3)));
}

}  // namespace tokenspeed::emulator
