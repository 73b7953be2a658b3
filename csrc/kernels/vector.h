// A few elements moved by one instruction: the unit of every memory-bound kernel.
#pragma once
#include <ptx.h>

#include <cstdint>
#include <type_traits>

namespace tokenspeed {

// N elements of T, aligned to their whole size (16 bytes at most): one access when N * sizeof(T) is a power of two.
template <typename T, int N>
struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Vector {
    static_assert((sizeof(T) * N & (sizeof(T) * N - 1)) == 0);
    T data[N];

    __device__ __forceinline__ T& operator[](int i) { return data[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return data[i]; }
};

// The address is aligned to the vector's size.
template <int N, typename T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* source) {
    return *reinterpret_cast<const Vector<T, N>*>(source);
}

__device__ __forceinline__ float to_float(float x) {
    return x;
}
__device__ __forceinline__ float to_float(__nv_bfloat16 x) {
    return __bfloat162float(x);
}
__device__ __forceinline__ float to_float(__half x) {
    return __half2float(x);
}

// Two floats as one register of 16-bit elements, `low` in the lower half: the operand format of mma and wgmma.
template <typename T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&both);
    } else {
        static_assert(std::is_same_v<T, __half>);
        const __half2 both = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&both);
    }
}

}  // namespace tokenspeed
