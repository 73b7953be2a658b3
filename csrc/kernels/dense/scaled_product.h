// The step of a product of e4m3 that the matrix unit sums 128 columns at a time, and fp32 registers beyond: what
// linear_fp8.cu and the experts' product share.
#pragma once
#include <ptx.h>
#include <ptx_wgmma.h>

#include "fp8.h"
#include "kernels.h"

namespace tokenspeed {

constexpr int kBlockRowBytes = kScaleBlock;  // of a stage, in the layout of TMA with Swizzle::k128

// sum[part] += the warpgroup's 64 rows x 128 weight rows of `part`, 128 deep, times their scales. `rows`, `weights`:
// shared addresses; row_scale: of this thread's row and the one eight further. `read` is called when both operands have
// been read, for the last part before its sums are added.
template <int kParts, typename Read>
__device__ __forceinline__ void multiply_scaled(float (&sum)[kParts][kScaleBlock / 2], uint32_t rows, uint32_t weights,
                                                const float (&row_scale)[2], const float (&scale)[kParts], Read read) {
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
        float block[kScaleBlock / 2];
        ptx::wgmma_fence(block);
#pragma unroll
        for (int step = 0; step < kScaleBlock / 32; ++step) {
            const uint64_t a = ptx::matrix_descriptor(rows + step * 32, Swizzle::k128, 16, 8 * kBlockRowBytes);
            const uint64_t b = ptx::matrix_descriptor(weights + part * kScaleBlock * kBlockRowBytes + step * 32,
                                                      Swizzle::k128, 16, 8 * kBlockRowBytes);
            ptx::wgmma<E4m3, kScaleBlock>(block, a, b, step > 0);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>(block);
        if (part + 1 == kParts) read();
        const float factor[2] = {row_scale[0] * scale[part], row_scale[1] * scale[part]};
#pragma unroll
        for (int i = 0; i < kScaleBlock / 2; ++i) sum[part][i] += factor[i / 2 % 2] * block[i];
    }
}

}  // namespace tokenspeed
