// Reductions over lanes, a block and a cluster, in a fixed order: the same input gives the same bits.
#pragma once
#include <ptx.h>

#include <cstdint>

namespace tokenspeed {

constexpr uint32_t kAllLanes = 0xffffffffu;  // of a warp

struct Sum {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a + b;
    }
};

struct Maximum {
    template <typename T>
    __device__ __forceinline__ T operator()(T a, T b) const {
        return a > b ? a : b;
    }
};

// Over groups of kWidth neighbouring lanes (a power of two up to 32); every lane of the group gets the result. All 32
// lanes of the warp take part.
template <int kWidth = 32, typename T, typename Operation>
__device__ __forceinline__ T warp_reduce(T value, Operation operation) {
    static_assert(kWidth >= 1 && kWidth <= 32 && (kWidth & (kWidth - 1)) == 0);
#pragma unroll
    for (int distance = kWidth / 2; distance > 0; distance /= 2) {
        value = operation(value, __shfl_xor_sync(kAllLanes, value, distance));
    }
    return value;
}

template <int kWidth = 32, typename T>
__device__ __forceinline__ T warp_sum(T value) {
    return warp_reduce<kWidth>(value, Sum{});
}

template <int kWidth = 32, typename T>
__device__ __forceinline__ T warp_maximum(T value) {
    return warp_reduce<kWidth>(value, Maximum{});
}

// The inclusive sum over the lanes of the warp up to this one. All 32 lanes take part.
template <typename T>
__device__ __forceinline__ T warp_running_sum(T value) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const T below = __shfl_up_sync(kAllLanes, value, distance);
        if (lane >= distance) value += below;
    }
    return value;
}

// Sums every x[i] over the 2 kOffset lanes that differ in the bits below 2 kOffset, and scatters the sums: with n =
// kCount / (2 kOffset), lane l is left with sums n l .. n l + n - 1 in x[0] .. x[n - 1], or for n < 1 with sum floor(n
// l) in x[0].
template <int kOffset, int kCount, int kSize>
__device__ __forceinline__ void butterfly(float (&x)[kSize]) {
    if constexpr (kOffset == 0) {
        return;
    } else if constexpr (kCount > 1) {
        const bool upper = threadIdx.x & kOffset;
#pragma unroll
        for (int i = 0; i < kCount / 2; ++i) {
            const float sent = upper ? x[i] : x[i + kCount / 2];
            const float kept = upper ? x[i + kCount / 2] : x[i];
            x[i] = kept + __shfl_xor_sync(kAllLanes, sent, kOffset);
        }
        butterfly<kOffset / 2, kCount / 2>(x);
    } else {
        x[0] += __shfl_xor_sync(kAllLanes, x[0], kOffset);
        butterfly<kOffset / 2, 1>(x);
    }
}

// Over a one-dimensional block of kThreads threads (a multiple of 32); every thread gets the result. `scratch` is
// kThreads / 32 elements of shared memory, free again after the next __syncthreads.
template <int kThreads, typename T, typename Operation>
__device__ __forceinline__ T block_reduce(T value, Operation operation, T* scratch) {
    static_assert(kThreads % 32 == 0 && kThreads <= 1024);
    constexpr int kWarps = kThreads / 32;
    value = warp_reduce(value, operation);
    if constexpr (kWarps == 1) return value;
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    // Every thread repeats the last step in the same order: cheaper than a second barrier.
    T total = scratch[0];
#pragma unroll
    for (int warp = 1; warp < kWarps; ++warp) total = operation(total, scratch[warp]);
    return total;
}

template <int kThreads, typename T>
__device__ __forceinline__ T block_sum(T value, T* scratch) {
    return block_reduce<kThreads>(value, Sum{}, scratch);
}

template <int kThreads, typename T>
__device__ __forceinline__ T block_maximum(T value, T* scratch) {
    return block_reduce<kThreads>(value, Maximum{}, scratch);
}

// Over the blocks of a cluster, each bringing one value that all its threads hold; every thread gets the result.
// `scratch` is cluster_size elements of shared memory. All threads of all blocks call it, after a cluster_sync that
// says that every block has started and that nobody reads `scratch` any more; on return no block touches another's
// memory.
template <typename T, typename Operation>
__device__ __forceinline__ T cluster_reduce(T value, Operation operation, T* scratch) {
    const uint32_t size = ptx::cluster_size(), rank = ptx::cluster_rank();
    if (threadIdx.x < size) *ptx::cluster_map(scratch + rank, threadIdx.x) = value;
    ptx::cluster_sync();
    T total = scratch[0];
    for (uint32_t other = 1; other < size; ++other) total = operation(total, scratch[other]);
    return total;
}

template <typename T>
__device__ __forceinline__ T cluster_sum(T value, T* scratch) {
    return cluster_reduce(value, Sum{}, scratch);
}

}  // namespace tokenspeed
