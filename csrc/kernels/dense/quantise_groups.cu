// Activations in e4m3 with one scale for each 128 columns of a row, what `linear_fp8` multiplies. Memory bound: two
// bytes read and one written an element (8192 x 2048 of bf16: 50 MB, 11.9 us at 4.3 TB/s). Where a norm or SwiGLU comes
// before the product, it writes the groups itself (rms_norm.cu, gated_rms_norm.cu, gated_sums.cu).
//
// Sixteen lanes take a group, eight elements each: one read of 16 bytes (two of fp32), the group's largest magnitude by
// shuffles, one write of 8 bytes. Scales and elements round as tokenspeed/ops/fp8.py says.
//
// budget: quantise_groups_kernel registers<=40 shared<=0 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>
#include <vector.h>

#include "bf16x8.h"
#include "fp8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kThreads = 256;
constexpr int kElements = kScaleBlock / kGroupLanes;  // of a lane

__device__ __forceinline__ Float8 load_8(const __nv_bfloat16* x) {
    return unpack(*reinterpret_cast<const uint4*>(x));
}
__device__ __forceinline__ Float8 load_8(const float* x) {
    Float8 result;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float4 part = reinterpret_cast<const float4*>(x)[i];
        result.v[4 * i] = part.x, result.v[4 * i + 1] = part.y;
        result.v[4 * i + 2] = part.z, result.v[4 * i + 3] = part.w;
    }
    return result;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    quantise_groups_kernel(const T* x, int64_t x_stride, Groups out, int64_t rows, int columns) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const int groups = (columns + kScaleBlock - 1) / kScaleBlock;
    const int64_t group = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kGroupLanes, row = group / groups;
    const int lane = threadIdx.x % kGroupLanes,
              column = static_cast<int>(group % groups) * kScaleBlock + lane * kElements;
    const bool inside = row < rows && column < columns;  // columns are a multiple of kElements
    Float8 y{};
    if (inside) y = load_8(x + row * x_stride + column);
    store_group(out, row, column, columns, y, inside);
}

template <typename T>
cudaError_t launch_groups(const void* x, int64_t x_stride, const Groups& out, int64_t rows, int columns,
                          cudaStream_t stream) {
    const int64_t lanes = rows * ((columns + kScaleBlock - 1) / kScaleBlock) * kGroupLanes;
    const LaunchConfig config = {.grid = dim3(static_cast<unsigned>((lanes + kThreads - 1) / kThreads)),
                                 .block = dim3(kThreads),
                                 .stream = stream,
                                 .programmatic = true};
    return launch(quantise_groups_kernel<T>, config, static_cast<const T*>(x), x_stride, out, rows, columns);
}

}  // namespace

cudaError_t quantise_groups(const void* x, bool x_is_float, int64_t x_stride, const Groups& out, int64_t rows,
                            int columns, cudaStream_t stream) {
    return x_is_float ? launch_groups<float>(x, x_stride, out, rows, columns, stream)
                      : launch_groups<__nv_bfloat16>(x, x_stride, out, rows, columns, stream);
}

}  // namespace tokenspeed
