// A few elements moved by one instruction: the unit of every memory-bound kernel.
#pragma once
#include <ptx.h>

#include <cstdint>
#include <type_traits>

namespace tokenspeed {

// How a 16-byte load or store treats the caches.
enum class Cache {
    kDefault,    // an ordinary access
    kStreaming,  // read or written once: not kept in L1, first to leave L2
    kL2Only,     // loads: not kept in L1, kept in L2
};

// N elements of T, aligned to their whole size (16 bytes at most): one access when N * sizeof(T) is a power of two.
template <typename T, int N>
struct alignas(sizeof(T) * N <= 16 ? sizeof(T) * N : 16) Vector {
    static_assert((sizeof(T) * N & (sizeof(T) * N - 1)) == 0);
    T data[N];

    __device__ __forceinline__ T& operator[](int i) { return data[i]; }
    __device__ __forceinline__ const T& operator[](int i) const { return data[i]; }
};

// The number of elements in 16 bytes.
template <typename T>
constexpr int kVectorSize = 16 / sizeof(T);

// The global address is aligned to the vector's size; hints other than kDefault need 16 bytes or a multiple of them.
template <int N, Cache kCache = Cache::kDefault, typename T>
__device__ __forceinline__ Vector<T, N> load_vector(const T* source) {
    if constexpr (kCache == Cache::kDefault) {
        return *reinterpret_cast<const Vector<T, N>*>(source);
    } else {
        static_assert(sizeof(Vector<T, N>) % 16 == 0, "cache hints come with 16-byte loads");
        Vector<T, N> result;
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(result) / 16); ++i) {
            const void* from = reinterpret_cast<const uint4*>(source) + i;
            uint4& to = reinterpret_cast<uint4*>(&result)[i];
            if constexpr (kCache == Cache::kStreaming) to = ptx::load_16_streaming(from);
            if constexpr (kCache == Cache::kL2Only) to = ptx::load_16_no_allocate(from);
        }
        return result;
    }
}

template <Cache kCache = Cache::kDefault, typename T, int N>
__device__ __forceinline__ void store_vector(T* destination, const Vector<T, N>& value) {
    static_assert(kCache == Cache::kDefault || kCache == Cache::kStreaming, "stores are ordinary or streaming");
    if constexpr (kCache == Cache::kDefault) {
        *reinterpret_cast<Vector<T, N>*>(destination) = value;
    } else {
        static_assert(sizeof(Vector<T, N>) % 16 == 0, "cache hints come with 16-byte stores");
#pragma unroll
        for (int i = 0; i < static_cast<int>(sizeof(value) / 16); ++i) {
            ptx::store_16_streaming(reinterpret_cast<uint4*>(destination) + i,
                                    reinterpret_cast<const uint4*>(&value)[i]);
        }
    }
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

// Round to nearest even.
template <typename T>
__device__ __forceinline__ T from_float(float x) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16_rn(x);
    } else if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(x);
    } else {
        static_assert(std::is_same_v<T, float>);
        return x;
    }
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
