// The CUDA language for the host compiler: qualifiers, built-in variables, warp intrinsics, atomics and arithmetic that
// the toolkit's headers give to nvcc alone.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "api.h"

#undef __global__
#undef __device__
#undef __host__
#undef __constant__
#undef __shared__
#undef __forceinline__
#undef __noinline__  // the standard library's headers use the word
#undef __launch_bounds__
#undef __cluster_dims__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static_assert(false, "shared memory comes from DYNAMIC_SHARED")
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__

namespace tokenspeed::emulator {

// Where the running thread is; set at each switch.
struct Coordinates {
    uint3 thread, block;
    dim3 block_size, grid_size;
    uint32_t lane;
};
extern Coordinates coordinates;

// Exchanges 64 bits among the lanes of `mask`; returns the payload of every lane. lanes[i] is all ones where i is not
// in mask.
void exchange(uint32_t mask, const char* name, uint64_t value, uint64_t (&lanes)[32]);
// The same for one other lane.
uint64_t exchange_one(uint32_t mask, const char* name, uint64_t value, uint32_t source);
[[noreturn]] void trap(const char* what);

template <typename T>
uint64_t to_bits(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

template <typename T>
T from_bits(uint64_t bits) {
    T value;
    memcpy(static_cast<void*>(&value), &bits, sizeof value);
    return value;
}

template <typename T>
T shuffle(uint32_t mask, const char* name, T value, int source, int width, bool allowed) {
    if (width < 1 || width > 32 || !std::has_single_bit(static_cast<uint32_t>(width))) trap("shuffle width");
    const uint64_t received = exchange_one(mask, name, to_bits(value), static_cast<uint32_t>(source) & 31);
    return allowed ? from_bits<T>(received) : value;
}

template <typename T, typename Operation>
T reduce(uint32_t mask, const char* name, T value, Operation operation) {
    uint64_t lanes[32];
    exchange(mask, name, to_bits(value), lanes);
    bool first = true;
    T result{};
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1)) continue;
        const T other = from_bits<T>(lanes[lane]);
        result = first ? other : operation(result, other);
        first = false;
    }
    return result;
}

template <typename T>
uint32_t ballot(uint32_t mask, const char* name, T value, auto&& predicate) {
    uint64_t lanes[32];
    exchange(mask, name, to_bits(value), lanes);
    uint32_t result = 0;
    for (uint32_t lane = 0; lane < 32; ++lane) {
        if ((mask >> lane & 1) && predicate(lanes[lane])) result |= 1u << lane;
    }
    return result;
}

}  // namespace tokenspeed::emulator

#define threadIdx (::tokenspeed::emulator::coordinates.thread)
#define blockIdx (::tokenspeed::emulator::coordinates.block)
#define blockDim (::tokenspeed::emulator::coordinates.block_size)
#define gridDim (::tokenspeed::emulator::coordinates.grid_size)
#define warpSize 32

// The approximate units: the C library declares these names without defining them.
#define __expf(x) std::exp(static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
#define __log2f(x) std::log2(static_cast<float>(x))
#define __sinf(x) std::sin(static_cast<float>(x))
#define __cosf(x) std::cos(static_cast<float>(x))

// ---- barriers

inline void __syncthreads() {
    ::tokenspeed::emulator::block_barrier(0, ::tokenspeed::emulator::kAllLiveThreads, true);
}

// ---- warp intrinsics

inline void __syncwarp(unsigned mask = 0xffffffffu) {
    ::tokenspeed::emulator::exchange_one(mask, "__syncwarp", 0, 0);
}

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
    const int lane = static_cast<int>(::tokenspeed::emulator::coordinates.lane);
    const int target = (lane & ~(width - 1)) | (source & (width - 1));
    return ::tokenspeed::emulator::shuffle(mask, "__shfl_sync", value, target, width, true);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = static_cast<int>(::tokenspeed::emulator::coordinates.lane);
    const int target = lane - static_cast<int>(delta);
    return ::tokenspeed::emulator::shuffle(mask, "__shfl_up_sync", value, target, width,
                                           target >= (lane & ~(width - 1)));
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
    const int lane = static_cast<int>(::tokenspeed::emulator::coordinates.lane);
    const int target = lane + static_cast<int>(delta);
    return ::tokenspeed::emulator::shuffle(mask, "__shfl_down_sync", value, target, width,
                                           target <= (lane | (width - 1)));
}

template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32) {
    const int lane = static_cast<int>(::tokenspeed::emulator::coordinates.lane);
    const int target = lane ^ lane_mask;
    return ::tokenspeed::emulator::shuffle(mask, "__shfl_xor_sync", value, target, width,
                                           target <= (lane | (width - 1)));
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return ::tokenspeed::emulator::ballot(mask, "__ballot_sync", predicate != 0,
                                          [](uint64_t bits) { return bits != 0; });
}
inline int __any_sync(unsigned mask, int predicate) {
    return ::tokenspeed::emulator::ballot(mask, "__any_sync", predicate != 0,
                                          [](uint64_t bits) { return bits != 0; }) != 0;
}
inline int __all_sync(unsigned mask, int predicate) {
    return ::tokenspeed::emulator::ballot(mask, "__all_sync", predicate != 0,
                                          [](uint64_t bits) { return bits != 0; }) == mask;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value) {
    const uint64_t own = ::tokenspeed::emulator::to_bits(value);
    return ::tokenspeed::emulator::ballot(mask, "__match_any_sync", value, [=](uint64_t bits) { return bits == own; });
}

template <typename T>
T __reduce_add_sync(unsigned mask, T value) {
    return ::tokenspeed::emulator::reduce(mask, "__reduce_add_sync", value, [](T a, T b) { return a + b; });
}
template <typename T>
T __reduce_min_sync(unsigned mask, T value) {
    return ::tokenspeed::emulator::reduce(mask, "__reduce_min_sync", value, [](T a, T b) { return a < b ? a : b; });
}
template <typename T>
T __reduce_max_sync(unsigned mask, T value) {
    return ::tokenspeed::emulator::reduce(mask, "__reduce_max_sync", value, [](T a, T b) { return a > b ? a : b; });
}

// ---- atomics
// One host thread runs everything and a switch happens only at a wait, so plain reads and writes are atomic.

template <typename T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    *address = static_cast<T>(old + value);
    return old;
}
template <typename T>
T atomicMax(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    *address = old > value ? old : value;
    return old;
}
template <typename T>
T atomicMin(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    *address = old < value ? old : value;
    return old;
}
template <typename T>
T atomicExch(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    *address = value;
    return old;
}
template <typename T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    const T old = *address;
    if (old == expected) *address = value;
    return old;
}
template <typename T>
T atomicOr(T* address, std::type_identity_t<T> value) {
    const T old = *address;
    *address = old | value;
    return old;
}

// ---- arithmetic

inline unsigned __float_as_uint(float x) {
    return std::bit_cast<unsigned>(x);
}
inline float __uint_as_float(unsigned x) {
    return std::bit_cast<float>(x);
}
inline int __float2int_rn(float x) {
    return static_cast<int>(std::nearbyint(x));
}
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __fmul_rn(float a, float b) {
    return a * b;
}
inline float __frcp_rn(float x) {
    return 1.0f / x;
}
inline float rsqrtf(float x) {
    return 1.0f / std::sqrt(x);
}
inline double rsqrt(double x) {
    return 1.0 / std::sqrt(x);
}
inline int __popc(unsigned x) {
    return std::popcount(x);
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline int __clz(int x) {
    return std::countl_zero(static_cast<unsigned>(x));
}
inline unsigned __brev(unsigned x) {
    unsigned result = 0;
    for (int bit = 0; bit < 32; ++bit) result |= (x >> bit & 1) << (31 - bit);
    return result;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned pick = selector >> (4 * i) & 7;  // the fourth bit of each is ignored
        result |= (static_cast<unsigned>(bytes >> (8 * pick)) & 255) << (8 * i);
    }
    return result;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
    return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32);
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}

inline int min(int a, int b) {
    return a < b ? a : b;
}
inline int max(int a, int b) {
    return a > b ? a : b;
}
inline unsigned min(unsigned a, unsigned b) {
    return a < b ? a : b;
}
inline unsigned max(unsigned a, unsigned b) {
    return a > b ? a : b;
}
inline unsigned min(int a, unsigned b) {
    return min(static_cast<unsigned>(a), b);
}
inline unsigned max(int a, unsigned b) {
    return max(static_cast<unsigned>(a), b);
}
inline unsigned min(unsigned a, int b) {
    return min(a, static_cast<unsigned>(b));
}
inline unsigned max(unsigned a, int b) {
    return max(a, static_cast<unsigned>(b));
}
inline long min(long a, long b) {
    return a < b ? a : b;
}
inline long max(long a, long b) {
    return a > b ? a : b;
}
inline unsigned long min(unsigned long a, unsigned long b) {
    return a < b ? a : b;
}
inline unsigned long max(unsigned long a, unsigned long b) {
    return a > b ? a : b;
}
inline long long min(long long a, long long b) {
    return a < b ? a : b;
}
inline long long max(long long a, long long b) {
    return a > b ? a : b;
}
inline unsigned long long min(unsigned long long a, unsigned long long b) {
    return a < b ? a : b;
}
inline unsigned long long max(unsigned long long a, unsigned long long b) {
    return a > b ? a : b;
}
inline float min(float a, float b) {
    return std::fmin(a, b);
}
inline float max(float a, float b) {
    return std::fmax(a, b);
}
inline double min(double a, double b) {
    return std::fmin(a, b);
}
inline double max(double a, double b) {
    return std::fmax(a, b);
}
