// TMA: tensor maps, which the host encodes and a launcher passes as `const __grid_constant__ CUtensorMap`, and the
// copies of boxes between global and shared memory. csrc/emulator/ptx_tma.h has the same names. Async proxy: see ptx.h
// for fences.
#pragma once
#include <cuda.h>
#include <cudaTypedefs.h>
#include <ptx.h>
#include <tensor_layout.h>

namespace tokenspeed {

// The driver's encoder, looked up once; null where there is no driver that has it.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static const auto encoder = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        const auto status =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
        const bool there = status == cudaSuccess && found == cudaDriverEntryPointSuccess;
        return there ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(entry) : nullptr;
    }();
    return encoder;
}

// Host: fills `map`. A status other than success means that the driver refuses the layout, or that there is no driver.
template <int kRank>
cudaError_t encode_tensor_map(CUtensorMap* map, TensorElement element, const TensorLayout<kRank>& layout,
                              Swizzle swizzle) {
    static_assert(kRank >= 1 && kRank <= 5);
    const auto encode = tensor_map_encoder();
    if (encode == nullptr) return cudaErrorNotSupported;
    constexpr CUtensorMapDataType kTypes[] = {CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
                                              CU_TENSOR_MAP_DATA_TYPE_FLOAT32, CU_TENSOR_MAP_DATA_TYPE_UINT8};
    constexpr CUtensorMapSwizzle kSwizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                                CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_128B};
    cuuint64_t sizes[kRank], strides[kRank];
    cuuint32_t box[kRank], steps[kRank];
    for (int i = 0; i < kRank; ++i) {
        sizes[i] = layout.sizes[i];
        strides[i] = i + 1 < kRank ? layout.strides[i + 1] : 0;
        box[i] = layout.box[i];
        steps[i] = 1;
    }
    const auto result = encode(map, kTypes[static_cast<int>(element)], kRank, const_cast<void*>(layout.base), sizes,
                               strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, kSwizzles[static_cast<int>(swizzle)],
                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

namespace ptx {

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// Asks for the box at coordinates c to be in L2 soon.
__device__ __forceinline__ void tma_prefetch_l2(const CUtensorMap* map, const int32_t (&c)[2]) {
    asm volatile("cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%0, {%1, %2}];" ::"l"(map), "r"(c[0]), "r"(c[1])
                 : "memory");
}

// The box at coordinates c (elements, innermost first) to shared memory aligned to 128 bytes. The innermost coordinate
// is a multiple of 16 bytes: the card answers another with an illegal instruction. A box may reach outside the tensor,
// where it reads zeros. Completes the bytes of the whole box on the barrier.
template <int kRank>
__device__ __forceinline__ void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier,
                                         const int32_t (&c)[kRank], CachePolicy policy = CachePolicy::kNormal) {
    static_assert(kRank >= 1 && kRank <= 5);
    const uint32_t to = shared_address(shared), done = shared_address(barrier);
    const auto hint = static_cast<uint64_t>(policy);
    if constexpr (kRank == 1) {
        asm volatile(
            "cp.async.bulk.tensor.1d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1, {%4}], [%2], %3;" ::"r"(to),
            "l"(map), "r"(done), "l"(hint), "r"(c[0])
            : "memory");
    } else if constexpr (kRank == 2) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(to),
            "l"(map), "r"(done), "l"(hint), "r"(c[0]), "r"(c[1])
            : "memory");
    } else if constexpr (kRank == 3) {
        asm volatile(
            "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(to),
            "l"(map), "r"(done), "l"(hint), "r"(c[0]), "r"(c[1]), "r"(c[2])
            : "memory");
    } else if constexpr (kRank == 4) {
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1, {%4, %5, %6, %7}], [%2], %3;" ::"r"(to),
            "l"(map), "r"(done), "l"(hint), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])
            : "memory");
    } else if constexpr (kRank == 5) {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint"
            " [%0], [%1, {%4, %5, %6, %7, %8}], [%2], %3;" ::"r"(to),
            "l"(map), "r"(done), "l"(hint), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
            : "memory");
    }
}

// The same box to the same place in every block of `mask`; completes on the barrier of each.
template <int kRank>
__device__ __forceinline__ void tma_load_multicast(void* shared, const CUtensorMap* map, uint64_t* barrier,
                                                   const int32_t (&c)[kRank], uint16_t mask) {
    static_assert(kRank == 2 || kRank == 5);
    const uint32_t to = shared_address(shared), done = shared_address(barrier);
    const auto hint = static_cast<uint64_t>(CachePolicy::kNormal);
    if constexpr (kRank == 2) {
        asm volatile(
            "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
            ".L2::cache_hint [%0], [%1, {%5, %6}], [%2], %3, %4;" ::"r"(to),
            "l"(map), "r"(done), "h"(mask), "l"(hint), "r"(c[0]), "r"(c[1])
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
            ".L2::cache_hint [%0], [%1, {%5, %6, %7, %8, %9}], [%2], %3, %4;" ::"r"(to),
            "l"(map), "r"(done), "h"(mask), "l"(hint), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
            : "memory");
    }
}

// Shared memory to the box at c, in the calling thread's current bulk group (bulk_commit, bulk_wait); what lies outside
// the tensor is not written.
template <int kRank>
__device__ __forceinline__ void tma_store(const CUtensorMap* map, const void* shared, const int32_t (&c)[kRank]) {
    static_assert(kRank >= 1 && kRank <= 5);
    const uint32_t from = shared_address(shared);
    if constexpr (kRank == 1) {
        asm volatile("cp.async.bulk.tensor.1d.global.shared::cta.tile.bulk_group [%0, {%2}], [%1];" ::"l"(map),
                     "r"(from), "r"(c[0])
                     : "memory");
    } else if constexpr (kRank == 2) {
        asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map),
                     "r"(from), "r"(c[0]), "r"(c[1])
                     : "memory");
    } else if constexpr (kRank == 3) {
        asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map),
                     "r"(from), "r"(c[0]), "r"(c[1]), "r"(c[2])
                     : "memory");
    } else if constexpr (kRank == 4) {
        asm volatile(
            "cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map),
            "r"(from), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3])
            : "memory");
    } else if constexpr (kRank == 5) {
        asm volatile(
            "cp.async.bulk.tensor.5d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
            "r"(from), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]), "r"(c[4])
            : "memory");
    }
}

}  // namespace ptx
}  // namespace tokenspeed
