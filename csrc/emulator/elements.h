// 16-bit element formats.
#pragma once
#include <cuda_fp16.h>

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

}  // namespace tokenspeed::emulator
