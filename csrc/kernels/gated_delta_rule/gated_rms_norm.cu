// The output norm of Gated DeltaNet: every head normalised, then gated.
//
//     out = x rsqrt(mean(x^2) + eps) weight silu(gate)        over 128 dimensions, in fp32, rounded once
//
// Floor: 6 bytes an element (x and gate read, out written). 8192 tokens x 32 heads: 201 MB = 47 us at 4.3 TB/s.
//
// Before a product of e4m3 a head is a group, and out is nothing else: 5.03 bytes an element, where this and
// quantise_groups behind it moved 9.03. 8192 tokens x 32 heads: 303 to 169 MB, 72 to 40 us at 4.2 TB/s.
//
// Tiling: 16 lanes a head, one 16-byte vector a lane of x and of the gate, four shuffles for the mean; a warp does two
// heads and a block 16. Nothing is shared between heads but the weight, which each lane keeps in registers.
//
// Measured, and what was tried: docs/kernels/memory_bound.md.
//
// budget: gated_rms_norm_kernel registers<=64 shared<=0 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <type_traits>

#include "bf16x8.h"
#include "fp8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kThreads = 256;
constexpr int kLanes = kGatedNormWidth / 8;  // per head
constexpr int kBlockHeads = kThreads / kLanes;

// Out: bf16 [total_heads, 128], or Groups, each head one of them.
template <typename Out>
__global__ void __launch_bounds__(kThreads)
    gated_rms_norm_kernel(const __nv_bfloat16* __restrict__ x, int64_t x_token_stride, int64_t x_head_stride,
                          const __nv_bfloat16* __restrict__ gate, int64_t gate_token_stride, int64_t gate_head_stride,
                          const __nv_bfloat16* __restrict__ weight, Out out, uint32_t total_heads, uint32_t heads,
                          float eps) {
    const uint32_t lane = threadIdx.x % kLanes;
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const Float8 w = unpack(ptx::load_16_read_only(weight + lane * 8));

    const uint32_t index = blockIdx.x * kBlockHeads + threadIdx.x / kLanes;
    const bool active = index < total_heads;  // all lanes take part in the shuffles
    const int64_t token = index / heads, head = index % heads;
    uint4 packed_x{}, packed_gate{};
    if (active) {
        packed_x = ptx::load_16_no_allocate(x + token * x_token_stride + head * x_head_stride + lane * 8);
        packed_gate = ptx::load_16_no_allocate(gate + token * gate_token_stride + head * gate_head_stride + lane * 8);
    }
    const Float8 s = unpack(packed_x), z = unpack(packed_gate);
    const float inverse = rsqrtf(warp_sum<kLanes>(sum_of_squares(s)) / kGatedNormWidth + eps);
    Float8 y;
#pragma unroll
    for (int j = 0; j < 8; ++j) y.v[j] = s.v[j] * inverse * w.v[j] * silu(z.v[j]);
    if constexpr (std::is_same_v<Out, Groups>) {
        const auto column = static_cast<int>(head * kGatedNormWidth + lane * 8);
        store_group(out, token, column, static_cast<int>(heads * kGatedNormWidth), unpack(pack(y)), active);
    } else {
        if (active) store_16(out + int64_t(index) * kGatedNormWidth + lane * 8, pack(y));
    }
}

template <typename Out>
cudaError_t start(const __nv_bfloat16* x, int64_t x_token_stride, int64_t x_head_stride, const __nv_bfloat16* gate,
                  int64_t gate_token_stride, int64_t gate_head_stride, const __nv_bfloat16* weight, Out out,
                  int64_t tokens, int heads, float eps, cudaStream_t stream) {
    const auto total = static_cast<uint32_t>(tokens * heads);
    LaunchConfig config;
    config.grid = dim3((total + kBlockHeads - 1) / kBlockHeads);
    config.block = dim3(kThreads);
    config.stream = stream;
    config.programmatic = true;
    return launch(gated_rms_norm_kernel<Out>, config, x, x_token_stride, x_head_stride, gate, gate_token_stride,
                  gate_head_stride, weight, out, total, static_cast<uint32_t>(heads), eps);
}

}  // namespace

cudaError_t gated_rms_norm(const __nv_bfloat16* x, int64_t x_token_stride, int64_t x_head_stride,
                           const __nv_bfloat16* gate, int64_t gate_token_stride, int64_t gate_head_stride,
                           const __nv_bfloat16* weight, __nv_bfloat16* out, int64_t tokens, int heads, float eps,
                           cudaStream_t stream) {
    return start(x, x_token_stride, x_head_stride, gate, gate_token_stride, gate_head_stride, weight, out, tokens,
                 heads, eps, stream);
}

cudaError_t gated_rms_norm_groups(const __nv_bfloat16* x, int64_t x_token_stride, int64_t x_head_stride,
                                  const __nv_bfloat16* gate, int64_t gate_token_stride, int64_t gate_head_stride,
                                  const __nv_bfloat16* weight, const Groups& out, int64_t tokens, int heads, float eps,
                                  cudaStream_t stream) {
    return start(x, x_token_stride, x_head_stride, gate, gate_token_stride, gate_head_stride, weight, out, tokens,
                 heads, eps, stream);
}

}  // namespace tokenspeed
