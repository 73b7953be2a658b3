// The two elementwise sums of the feed-forward block.
//
//     silu_mul:           out = silu(x[:, :width]) x[:, width:]
//     add_sigmoid_gated:  y += sigmoid(gate) x                     one gate a row
//
// Floor: 6 bytes an output element each (two reads, one write). 8192 x 9216 silu_mul: 453 MB = 105 us; 8192 x 2048
// add_sigmoid_gated: 101 MB = 23 us, at 4.3 TB/s. Before a product of e4m3 silu_mul_groups writes groups in place of
// bf16: 5.03 bytes an element, where silu_mul and quantise_groups behind it moved 9.03. 8192 x 17408: 1.29 to 0.72 GB,
// 307 to 171 us at 4.2 TB/s.
//
// Tiling: rows are cut into vectors of 8 elements, numbered through; a thread does one. Small blocks and ordinary
// loads: both cost nothing here and every cleverness did.
//
// Measured, and what was tried: docs/kernels/memory_bound.md.
//
// budget: silu_mul_kernel registers<=64 shared<=0 hot
// budget: silu_mul_groups_kernel registers<=64 shared<=0 hot
// budget: add_sigmoid_gated_kernel registers<=64 shared<=0 hot
#include <launch.h>
#include <ptx.h>

#include "bf16x8.h"
#include "fp8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kThreads = 128;

__global__ void __launch_bounds__(kThreads)
    silu_mul_kernel(const __nv_bfloat16* x, int64_t x_stride, __nv_bfloat16* out, uint32_t total_vectors,
                    uint32_t row_vectors) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
    if (index >= total_vectors) return;
    const __nv_bfloat16* source = x + index / row_vectors * x_stride + index % row_vectors * 8;
    const uint4 gate = ptx::load_16_no_allocate(source), up = ptx::load_16_no_allocate(source + row_vectors * 8);
    const Float8 g = unpack(gate), u = unpack(up);
    const Float8 y = gated(g, u);
    store_16(out + int64_t(index) * 8, pack(y));
}

// Rows of whole groups: sixteen neighbouring lanes have one.
__global__ void __launch_bounds__(kThreads) silu_mul_groups_kernel(const __nv_bfloat16* x, int64_t x_stride, Groups out,
                                                                   uint32_t total_vectors, uint32_t row_vectors) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const uint32_t index = blockIdx.x * kThreads + threadIdx.x, row = index / row_vectors;
    const uint32_t vector = index % row_vectors;
    const bool inside = index < total_vectors;  // all lanes take part in a group's shuffles
    uint4 gate{}, up{};
    if (inside) {
        const __nv_bfloat16* source = x + row * x_stride + vector * 8;
        gate = ptx::load_16_no_allocate(source);
        up = ptx::load_16_no_allocate(source + row_vectors * 8);
    }
    const Float8 y = unpack(pack(gated(unpack(gate), unpack(up))));  // rounded as silu_mul rounds
    store_group(out, row, static_cast<int>(vector * 8), static_cast<int>(row_vectors * 8), y, inside);
}

__global__ void __launch_bounds__(kThreads)
    add_sigmoid_gated_kernel(__nv_bfloat16* y, int64_t y_stride, const __nv_bfloat16* x, int64_t x_stride,
                             const __nv_bfloat16* gate, int64_t gate_stride, uint32_t total_vectors,
                             uint32_t row_vectors) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const uint32_t index = blockIdx.x * kThreads + threadIdx.x;
    if (index >= total_vectors) return;
    const int64_t row = index / row_vectors, column = index % row_vectors * 8;
    __nv_bfloat16* target = y + row * y_stride + column;
    const uint4 sum = ptx::load_16_no_allocate(target), added = ptx::load_16_no_allocate(x + row * x_stride + column);
    const float weight = sigmoid(__bfloat162float(gate[row * gate_stride]));
    Float8 s = unpack(sum);
    const Float8 a = unpack(added);
#pragma unroll
    for (int j = 0; j < 8; ++j) s.v[j] += weight * a.v[j];
    store_16(target, pack(s));
}

LaunchConfig elementwise(uint32_t total_vectors, cudaStream_t stream) {
    LaunchConfig config;
    config.grid = dim3((total_vectors + kThreads - 1) / kThreads);
    config.block = dim3(kThreads);
    config.stream = stream;
    config.programmatic = true;
    return config;
}

}  // namespace

cudaError_t silu_mul(const __nv_bfloat16* x, int64_t x_stride, __nv_bfloat16* out, int64_t rows, int width,
                     cudaStream_t stream) {
    const auto row_vectors = static_cast<uint32_t>(width / 8);
    const auto total = static_cast<uint32_t>(rows * row_vectors);
    return launch(silu_mul_kernel, elementwise(total, stream), x, x_stride, out, total, row_vectors);
}

cudaError_t silu_mul_groups(const __nv_bfloat16* x, int64_t x_stride, const Groups& out, int64_t rows, int width,
                            cudaStream_t stream) {
    if (width % kScaleBlock != 0) return cudaErrorInvalidValue;
    const auto row_vectors = static_cast<uint32_t>(width / 8);
    const auto total = static_cast<uint32_t>(rows * row_vectors);
    return launch(silu_mul_groups_kernel, elementwise(total, stream), x, x_stride, out, total, row_vectors);
}

cudaError_t add_sigmoid_gated(__nv_bfloat16* y, int64_t y_stride, const __nv_bfloat16* x, int64_t x_stride,
                              const __nv_bfloat16* gate, int64_t gate_stride, int64_t rows, int width,
                              cudaStream_t stream) {
    const auto row_vectors = static_cast<uint32_t>(width / 8);
    const auto total = static_cast<uint32_t>(rows * row_vectors);
    return launch(add_sigmoid_gated_kernel, elementwise(total, stream), y, y_stride, x, x_stride, gate, gate_stride,
                  total, row_vectors);
}

}  // namespace tokenspeed
