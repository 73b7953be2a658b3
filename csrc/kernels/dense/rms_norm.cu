// RMSNorm with a zero-centred weight, alone or after the residual add, in one pass.
//
//     s = x (+ residual, rounded to bf16 and stored);  out = s rsqrt(mean(s^2) + eps) (1 + weight)
//
// Floor: rms_norm moves 4 bytes an element (read, write), add_rms_norm 8 (two reads, two writes); the weight stays in
// L1. 4096 x 4096: 67 MB = 16 us, and 134 MB = 31 us, at 4.3 TB/s.
//
// add_rms_norm_groups, before a product of e4m3, writes the norm in groups as well, 1.03 bytes an element: 9.03 where
// add_rms_norm and quantise_groups behind it moved 11.03. 8192 x 2048: 185 to 152 MB, 44 to 36 us at 4.2 TB/s.
//
// Tiling: a row belongs to 1..32 warps, each thread holds 1, 2 or 4 vectors of 8 elements of it in registers, so a row
// is read once. Few rows: one vector a thread, so that a row's chain is one load, one reduction, one store. Many rows:
// at least 4 warps a block, and as many vectors as measured best: rms_norm 2, or 4 from 4097 elements on; add_rms_norm,
// which has two loads a vector, 1. The weight is loaded after the dependency wait like the rest: it arrives with the
// row, and a caller may have computed it just before.
//
// Measured, and what was tried: docs/kernels/memory_bound.md.
//
// budget: rms_norm_kernel registers<=80 shared<=128 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include "bf16x8.h"
#include "fp8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kVectorElements = 8;
constexpr int kWarp = 32;

// Block: (threads of a row, rows). kVectors: vectors of a row per thread. kGroups: the norm goes to `groups` too.
template <int kVectors, bool kAdd, bool kGroups = false>
__global__ void __launch_bounds__(kRmsNormMaxWidth / kVectorElements / kVectors)
    rms_norm_kernel(const __nv_bfloat16* __restrict__ x, int64_t x_stride, const __nv_bfloat16* __restrict__ residual,
                    const __nv_bfloat16* __restrict__ weight, __nv_bfloat16* __restrict__ out,
                    __nv_bfloat16* __restrict__ total, Groups groups, int64_t rows, int width, float eps) {
    DYNAMIC_SHARED(shared);
    auto* partial = reinterpret_cast<float*>(shared);  // [rows of the block, warps of a row]
    const int vectors = width / kVectorElements;
    const int64_t row = int64_t(blockIdx.x) * blockDim.y + threadIdx.y;
    const bool active = row < rows;

    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    uint4 sum[kVectors]{}, old[kVectors]{};  // packed: half the registers of fp32
    float squares = 0;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int v = threadIdx.x + i * blockDim.x;
        if (!active || v >= vectors) continue;
        sum[i] = ptx::load_16_no_allocate(x + row * x_stride + v * kVectorElements);
        if constexpr (kAdd) old[i] = ptx::load_16_no_allocate(residual + row * width + v * kVectorElements);
    }
    uint4 scale[kVectors]{};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int v = threadIdx.x + i * blockDim.x;
        if (v < vectors) scale[i] = ptx::load_16_read_only(weight + v * kVectorElements);
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int v = threadIdx.x + i * blockDim.x;
        if (!active || v >= vectors) continue;
        if constexpr (kAdd) {
            sum[i] = pack(unpack(sum[i]) + unpack(old[i]));
            store_16(total + row * width + v * kVectorElements, sum[i]);
        }
        squares += sum_of_squares(unpack(sum[i]));
    }
    squares = warp_sum(squares);
    const int warps = blockDim.x / kWarp;
    if (warps > 1) {
        float* row_partial = partial + threadIdx.y * warps;
        if (threadIdx.x % kWarp == 0) row_partial[threadIdx.x / kWarp] = squares;
        __syncthreads();
        squares = 0;
        for (int w = 0; w < warps; ++w) squares += row_partial[w];
    }
    const float inverse = rsqrtf(squares / width + eps);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
        const int v = threadIdx.x + i * blockDim.x;
        const bool inside = active && v < vectors;
        if (!kGroups && !inside) continue;  // all lanes take part in a group's shuffles
        const Float8 s = unpack(sum[i]), w = unpack(scale[i]);
        Float8 y;
#pragma unroll
        for (int j = 0; j < kVectorElements; ++j) y.v[j] = s.v[j] * inverse * (1.0f + w.v[j]);
        const uint4 rounded = pack(y);
        if (inside) store_16(out + row * width + v * kVectorElements, rounded);
        if constexpr (kGroups) store_group(groups, row, v * kVectorElements, width, unpack(rounded), inside);
    }
}

template <bool kAdd, bool kGroups = false>
cudaError_t start(const __nv_bfloat16* x, int64_t x_stride, const __nv_bfloat16* residual, const __nv_bfloat16* weight,
                  __nv_bfloat16* out, __nv_bfloat16* total, const Groups& groups, int64_t rows, int width, float eps,
                  cudaStream_t stream) {
    constexpr int kManyRows = 1024;  // from here on the card is full with several vectors a thread
    const int per_thread = rows < kManyRows || kAdd ? 1 : width <= 4096 ? 2 : 4;
    const int warps = (width / kVectorElements + kWarp * per_thread - 1) / (kWarp * per_thread);
    const unsigned block_rows = warps < 4 ? 4 / warps : 1;
    LaunchConfig config;
    config.grid = dim3(static_cast<unsigned>((rows + block_rows - 1) / block_rows));
    config.block = dim3(static_cast<unsigned>(warps * kWarp), block_rows);
    config.shared_bytes = warps * block_rows * sizeof(float);
    config.stream = stream;
    config.programmatic = true;
    auto* kernel = rms_norm_kernel<1, kAdd, kGroups>;
    if constexpr (!kAdd) {
        if (per_thread == 2) kernel = rms_norm_kernel<2, kAdd>;
        if (per_thread == 4) kernel = rms_norm_kernel<4, kAdd>;
    }
    return launch(kernel, config, x, x_stride, residual, weight, out, total, groups, rows, width, eps);
}

}  // namespace

cudaError_t rms_norm(const __nv_bfloat16* x, int64_t x_stride, const __nv_bfloat16* weight, __nv_bfloat16* out,
                     int64_t rows, int width, float eps, cudaStream_t stream) {
    return start<false>(x, x_stride, nullptr, weight, out, nullptr, {}, rows, width, eps, stream);
}

cudaError_t add_rms_norm(const __nv_bfloat16* x, int64_t x_stride, const __nv_bfloat16* residual,
                         const __nv_bfloat16* weight, __nv_bfloat16* out, __nv_bfloat16* total, int64_t rows, int width,
                         float eps, cudaStream_t stream) {
    return start<true>(x, x_stride, residual, weight, out, total, {}, rows, width, eps, stream);
}

cudaError_t add_rms_norm_groups(const __nv_bfloat16* x, int64_t x_stride, const __nv_bfloat16* residual,
                                const __nv_bfloat16* weight, __nv_bfloat16* out, __nv_bfloat16* total,
                                const Groups& groups, int64_t rows, int width, float eps, cudaStream_t stream) {
    return start<true, true>(x, x_stride, residual, weight, out, total, groups, rows, width, eps, stream);
}

}  // namespace tokenspeed
