// From the raw projection of full attention to rotated queries and filled KV pages, in one launch.
//
//     q head h:  out[h] = rope(norm(qkv[2hD : 2hD + D]; q_weight))            its gate, the next D values, stays in
//     place k head h:  page[0][h][row] = rope(norm(k; k_weight)),   v head h:  page[1][h][row] = v      at
//     kv_slots[token] norm(x; w) = x rsqrt(mean(x^2) + eps) (1 + w);  rope turns (x[j], x[j + R/2]) by the token's
//     angle j, j < R/2
//
// Floor: 4 bytes a value of q, k and v, plus the angles: 16:2 heads, 8192 tokens: 170 MB = 39 us at 4.3 TB/s.
//
// Tiling: a warp does one head of one token, D = 256 as one 16-byte vector a lane; the mean takes five shuffles, the
// rope partner sits R / 16 lanes away (one shuffle an element). v is a copy and shares the code path up to the norm.
// Everything a warp needs (head, angles, slot) is loaded before the first shuffle.
//
// Predicted: 8192 tokens 16:2 46 us (85% of copy); 1 to 8 tokens 2.0 us in a graph.
//
// budget: attention_prologue_kernel registers<=64 shared<=0 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include "bf16x8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kWarps = 8;
constexpr int kLaneElements = kHeadDim / 32;

// The lane's 8 angles: `offset` 0 for cosines, rotary / 2 for sines.
__device__ Float8 load_angles(const float* angles, int offset) {
    const auto* source = reinterpret_cast<const float4*>(angles + offset);
    const float4 a = source[0], b = source[1];
    return Float8{{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

__global__ void __launch_bounds__(kWarps * 32) attention_prologue_kernel(const AttentionPrologue p) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t heads = p.q_heads + 2 * p.kv_heads;
    const int64_t unit = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
    const int64_t token = unit / heads;
    const int head = static_cast<int>(unit % heads);
    const bool is_q = head < p.q_heads;
    const bool is_v = head >= p.q_heads + p.kv_heads;
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (token >= p.tokens) return;
    const Float8 weight = unpack(ptx::load_16_read_only((is_q ? p.q_weight : p.k_weight) + lane * kLaneElements));

    // The gates lie between the queries, so query head h stands at 2h and what follows them at q_heads + head.
    const int64_t column = int64_t(is_q ? 2 * head : p.q_heads + head) * kHeadDim + lane * kLaneElements;
    const uint4 packed = ptx::load_16_streaming(p.qkv + token * p.qkv_stride + column);
    const int half_lanes = p.rotary / (2 * kLaneElements);  // lanes that hold the first elements of the pairs
    const bool rotates = lane < 2 * half_lanes;
    Float8 cosine{}, sine{};
    if (!is_v && rotates) {
        const float* angles = p.cos_sin + token * p.rotary + (lane % half_lanes) * kLaneElements;
        cosine = load_angles(angles, 0);
        sine = load_angles(angles, p.rotary / 2);
    }
    const int64_t slot = is_q ? 0 : p.kv_slots[token];
    if (slot < 0) return;

    uint4 result = packed;
    if (!is_v) {
        Float8 x = unpack(packed);
        const float inverse = rsqrtf(warp_sum(sum_of_squares(x)) / kHeadDim + p.eps);
        const float sign = lane < half_lanes ? -1.0f : 1.0f;
#pragma unroll
        for (int j = 0; j < kLaneElements; ++j) x.v[j] *= inverse * (1.0f + weight.v[j]);
#pragma unroll
        for (int j = 0; j < kLaneElements; ++j) {
            const float partner = __shfl_xor_sync(0xffffffffu, x.v[j], half_lanes);
            if (rotates) x.v[j] = x.v[j] * cosine.v[j] + sign * partner * sine.v[j];
        }
        result = pack(x);
    }
    if (is_q) {
        store_16(p.q + (token * p.q_heads + head) * kHeadDim + lane * kLaneElements, result);
        return;
    }
    const int64_t page = slot / p.page_size, row = slot % p.page_size;
    const int box = head - p.q_heads;  // k heads, then v heads: the order of the page
    store_16(p.kv + page * p.page_stride + (int64_t(box) * p.page_size + row) * kHeadDim + lane * kLaneElements,
             result);
}

}  // namespace

cudaError_t attention_prologue(const AttentionPrologue& arguments, cudaStream_t stream) {
    const int64_t units = arguments.tokens * (arguments.q_heads + 2 * arguments.kv_heads);
    LaunchConfig config;
    config.grid = dim3(static_cast<unsigned>((units + kWarps - 1) / kWarps));
    config.block = dim3(kWarps * 32);
    config.stream = stream;
    config.programmatic = true;
    return launch(attention_prologue_kernel, config, arguments);
}

}  // namespace tokenspeed
