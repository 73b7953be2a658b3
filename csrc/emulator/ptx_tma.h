// csrc/kernels/ptx_tma.h for the host compiler: the same names, carried out by the emulated device.
#pragma once
#include <ptx.h>
#include <tensor_layout.h>

#include "tensor.h"

namespace tokenspeed {

template <int kRank>
cudaError_t encode_tensor_map(CUtensorMap* map, TensorElement element, const TensorLayout<kRank>& layout,
                              Swizzle swizzle) {
    static_assert(kRank >= 1 && kRank <= 5);
    return emulator::encode(map, element, kRank, layout.base, layout.sizes, layout.strides, layout.box, swizzle);
}

namespace ptx {

inline void prefetch_tensor_map(const CUtensorMap*) {}
inline void tma_prefetch_l2(const CUtensorMap*, const int32_t (&)[2]) {}

template <int kRank>
void tma_load(void* shared, const CUtensorMap* map, uint64_t* barrier, const int32_t (&c)[kRank],
              CachePolicy = CachePolicy::kNormal) {
    emulator::tensor_load(shared_address(shared), map, shared_address(barrier), kRank, c, 0);
}

template <int kRank>
void tma_load_multicast(void* shared, const CUtensorMap* map, uint64_t* barrier, const int32_t (&c)[kRank],
                        uint16_t mask) {
    emulator::tensor_load(shared_address(shared), map, shared_address(barrier), kRank, c, mask);
}

template <int kRank>
void tma_store(const CUtensorMap* map, const void* shared, const int32_t (&c)[kRank]) {
    emulator::tensor_store(map, shared_address(shared), kRank, c);
}

}  // namespace ptx
}  // namespace tokenspeed
