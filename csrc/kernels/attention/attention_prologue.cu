// From the raw projection of full attention to rotated queries and filled KV pages, in one launch.
//
//     q head h:  out[h] = rope(norm(qkv[2hD : 2hD + D]; q_weight))            its gate, the next D values, stays in
//     place k head h:  page[0][h][row] = rope(norm(k; k_weight)),   v head h:  page[1][h][row] = v      at
//     kv_slots[token] norm(x; w) = x rsqrt(mean(x^2) + eps) (1 + w);  rope turns (x[j], x[j + R/2]) by the token's
//     angle j, j < R/2;  pages in e4m3 get the nearest number, at most 448
//
// Floor: 4 bytes a value of q, k and v, plus the angles: 16:2 heads, 8192 tokens: 170 MB = 39 us at 4.3 TB/s.
//
// Tiling: a warp does one head of one token, or kMaxHeads neighbouring heads where there are tokens enough to fill the
// card: D = 256 is one 16-byte vector a lane and head, and all of a warp's loads (heads, angles, weights, slot) are in
// flight before the first shuffle. The mean takes five shuffles, the rope partner sits R / 16 lanes away. v is a copy.
//
// Measured, and what was tried: docs/kernels/attention.md.
//
// budget: attention_prologue_kernel registers<=96 shared<=0 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include "bf16x8.h"
#include "fp8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kWarps = 4;
constexpr int kMaxHeads = 4;  // per warp; every published model's q + 2 kv heads are a multiple of it
constexpr int kLaneElements = kHeadDim / 32;

// The lane's 8 angles: `offset` 0 for cosines, rotary / 2 for sines.
__device__ Float8 load_angles(const float* angles, int offset) {
    const auto* source = reinterpret_cast<const float4*>(angles + offset);
    const float4 a = source[0], b = source[1];
    return Float8{{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}

// kHeads divides the heads of a token: q heads, then k heads, then v heads. Kv: bf16 or E4m3.
template <typename Kv, int kHeads>
__global__ void __launch_bounds__(kWarps * 32) attention_prologue_kernel(const AttentionPrologue p) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t groups = (p.q_heads + 2 * p.kv_heads) / kHeads;
    const uint32_t unit = blockIdx.x * kWarps + threadIdx.x / 32;
    const int64_t token = unit / groups;
    const int first = static_cast<int>(unit % groups) * kHeads;
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (token >= p.tokens) return;

    uint4 packed[kHeads], weight[kHeads];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
        // The gates lie between the queries, so query head h stands at 2h and what follows them at q_heads + head.
        const int head = first + i, place = head < p.q_heads ? 2 * head : p.q_heads + head;
        const __nv_bfloat16* heads = p.qkv + token * p.qkv_stride + int64_t(place) * kHeadDim;
        packed[i] = ptx::load_16_no_allocate(heads + lane * kLaneElements);
    }
    const int half_lanes = p.rotary / (2 * kLaneElements);  // lanes that hold the first elements of the pairs
    const bool rotates = lane < 2 * half_lanes;
    Float8 cosine{}, sine{};
    if (rotates) {
        const float* angles = p.cos_sin + token * p.rotary + (lane % half_lanes) * kLaneElements;
        cosine = load_angles(angles, 0);
        sine = load_angles(angles, p.rotary / 2);
    }
    const int64_t slot = p.kv_slots[token];
#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
        const __nv_bfloat16* weights = first + i < p.q_heads ? p.q_weight : p.k_weight;
        weight[i] = ptx::load_16_read_only(weights + lane * kLaneElements);
    }
    const int64_t page = slot / p.page_size, row = slot % p.page_size;
    const float sign = lane < half_lanes ? -1.0f : 1.0f;

#pragma unroll
    for (int i = 0; i < kHeads; ++i) {
        const int head = first + i;
        const bool is_q = head < p.q_heads, is_v = head >= p.q_heads + p.kv_heads;
        if (!is_q && slot < 0) return;  // padding, and only keys and values follow
        Float8 x = unpack(packed[i]);
        if (!is_v) {
            const Float8 w = unpack(weight[i]);
            const float inverse = rsqrtf(warp_sum(sum_of_squares(x)) / kHeadDim + p.eps);
#pragma unroll
            for (int j = 0; j < kLaneElements; ++j) x.v[j] *= inverse * (1.0f + w.v[j]);
#pragma unroll
            for (int j = 0; j < kLaneElements; ++j) {
                const float partner = __shfl_xor_sync(kAllLanes, x.v[j], half_lanes);
                if (rotates) x.v[j] = x.v[j] * cosine.v[j] + sign * partner * sine.v[j];
            }
            packed[i] = pack(x);
        }
        if (is_q) {
            store_16(p.q + (token * p.q_heads + head) * kHeadDim + lane * kLaneElements, packed[i]);
        } else {
            const int64_t box = head - p.q_heads;  // k heads, then v heads: the order of the page
            Kv* rows = static_cast<Kv*>(p.kv) + page * p.page_stride + (box * p.page_size + row) * kHeadDim;
            if constexpr (std::is_same_v<Kv, E4m3>) {
                *reinterpret_cast<uint2*>(rows + lane * kLaneElements) = pack_e4m3(x);
            } else {
                store_16(rows + lane * kLaneElements, packed[i]);
            }
        }
    }
}

}  // namespace

cudaError_t attention_prologue(const AttentionPrologue& arguments, cudaStream_t stream) {
    const int heads = arguments.q_heads + 2 * arguments.kv_heads;
    const bool many =
        heads % kMaxHeads == 0 && arguments.tokens * heads >= kWarps * kMaxHeads * 4 * multiprocessor_count();
    const int64_t units = arguments.tokens * heads / (many ? kMaxHeads : 1);
    LaunchConfig config;
    config.grid = dim3(static_cast<unsigned>((units + kWarps - 1) / kWarps));
    config.block = dim3(kWarps * 32);
    config.stream = stream;
    config.programmatic = true;
    if (arguments.kv_is_e4m3) {
        return launch(many ? attention_prologue_kernel<E4m3, kMaxHeads> : attention_prologue_kernel<E4m3, 1>, config,
                      arguments);
    }
    return launch(
        many ? attention_prologue_kernel<__nv_bfloat16, kMaxHeads> : attention_prologue_kernel<__nv_bfloat16, 1>,
        config, arguments);
}

}  // namespace tokenspeed
