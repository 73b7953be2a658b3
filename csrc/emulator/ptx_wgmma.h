// csrc/kernels/ptx_wgmma.h for the host compiler: the same names, carried out by the emulated device.
#pragma once
#include <cuda_fp8.h>
#include <ptx.h>
#include <tensor_layout.h>

#include "api.h"

namespace tokenspeed::ptx {

inline uint64_t matrix_descriptor(uint32_t shared, Swizzle swizzle, uint32_t leading_bytes, uint32_t stride_bytes) {
    const uint64_t mode = (4 - static_cast<uint64_t>(swizzle)) & 3;  // none 0, 32 bytes 3, 64 bytes 2, 128 bytes 1
    return static_cast<uint64_t>((shared & 0x3FFFF) >> 4) |
           static_cast<uint64_t>((leading_bytes & 0x3FFFF) >> 4) << 16 |
           static_cast<uint64_t>((stride_bytes & 0x3FFFF) >> 4) << 32 | mode << 62;
}

template <int kRegisters>
void hold_registers(float (&)[kRegisters]) {}
template <int kSteps>
void hold_registers(uint32_t (&)[kSteps][4]) {}

template <int... kRegisters>
void wgmma_fence([[maybe_unused]] float (&... d)[kRegisters]) {
    emulator::product_fence();
}

inline void wgmma_commit() {
    emulator::product_commit();
}

template <int kPending, int... kRegisters>
void wgmma_wait([[maybe_unused]] float (&... d)[kRegisters]) {
    __syncwarp();  // the instruction's .sync: a warp goes on together, also where it has nothing to wait for
    emulator::product_wait(kPending);
}

namespace detail {

template <typename T>
constexpr emulator::Element element() {
    if constexpr (std::is_same_v<T, __nv_fp8_e4m3>) return emulator::Element::kE4m3;
    static_assert(std::is_same_v<T, __nv_bfloat16> || std::is_same_v<T, __half> || std::is_same_v<T, __nv_fp8_e4m3>);
    return std::is_same_v<T, __nv_bfloat16> ? emulator::Element::kBf16 : emulator::Element::kF16;
}

}  // namespace detail

template <typename T, int kColumns, bool kTransposedA = false, bool kTransposedB = false, int kRegisters>
void wgmma(float (&d)[kRegisters], uint64_t a, uint64_t b, bool accumulate) {
    static_assert(kColumns % 8 == 0 && kColumns <= 256 && kRegisters >= kColumns / 2);
    static_assert(sizeof(T) == 2 || (!kTransposedA && !kTransposedB));
    emulator::product_issue({.columns = kColumns,
                             .element = detail::element<T>(),
                             .transpose_a = kTransposedA,
                             .transpose_b = kTransposedB,
                             .accumulate = accumulate,
                             .a = a,
                             .b = b},
                            d, nullptr);
}

template <typename T, int kColumns, bool kTransposedB = false>
void wgmma(float (&d)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    static_assert(kColumns % 8 == 0 && kColumns <= 256);
    static_assert(sizeof(T) == 2);
    emulator::product_issue({.columns = kColumns,
                             .element = detail::element<T>(),
                             .a_in_registers = true,
                             .transpose_b = kTransposedB,
                             .accumulate = accumulate,
                             .b = b},
                            d, a);
}

}  // namespace tokenspeed::ptx
