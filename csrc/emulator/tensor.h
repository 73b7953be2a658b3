// TMA tensor maps and the copies of boxes.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>
#include <tensor_layout.h>

#include <cstdint>

namespace tokenspeed::emulator {

// Refuses what cuTensorMapEncodeTiled refuses, with a report.
cudaError_t encode(CUtensorMap* map, TensorElement element, int rank, const void* base, const uint64_t* sizes,
                   const uint64_t* strides, const uint32_t* box, Swizzle swizzle);

// `mask` names the blocks of the cluster that receive the box, 0 the own block only.
void tensor_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int rank, const int32_t* coordinates,
                 uint16_t mask);
void tensor_store(const CUtensorMap* map, uint32_t shared, int rank, const int32_t* coordinates);

}  // namespace tokenspeed::emulator
