// The products of moe_block.cu: a unit's stages times rows in shared memory, and the sums of all warps.
#pragma once
#include <ptx.h>
#include <reduce.h>

#include <type_traits>

#include "moe_block.h"
#include "moe_scaled_products.h"

namespace tokenspeed::moe_layer {

// sum += the warp's 16 rows x 64 of depth of a stage times the same depth of this lane's token. As in
// moe_experts_decode.cu; `low` and `high`: the fragment's first and last eight rows; `row`: the token's chunk.
__device__ __forceinline__ void multiply_chunk(float (&sum)[2][4], const uint8_t* low, const uint8_t* high,
                                               const uint8_t* row) {
    const int lane = threadIdx.x % 32, quad = lane / 4, piece = lane % 4;
    const int place = quad / 2 + quad % 2 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int offset = place * 128 + ((half * 4 + piece) ^ place) * 16;
        const uint4 upper = *reinterpret_cast<const uint4*>(low + offset);
        const uint4 lower = *reinterpret_cast<const uint4*>(high + offset);
        const uint4 b = *reinterpret_cast<const uint4*>(row + half * 64 + piece * 16);
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
        ptx::mma_m16n8k16<__nv_bfloat16>(sum[0], first, b.x, b.y);
        ptx::mma_m16n8k16<__nv_bfloat16>(sum[1], second, b.z, b.w);
    }
}

// The warps that multiply: where they are in the ring, and which half of the sums they write next.
struct Multiplier {
    Control& control;
    const Layout& layout;
    const uint8_t* ring;
    float* sums;
    Cursor at;
    int turn = 0;

    // Multiplies one unit with rows of `operand`, and returns its sums [depth warp, token, row]. scales: of e4m3, those
    // of the tile's rows. beside: where its only stage lies, if that is not in the ring.
    template <typename Product, typename Weight>
    __device__ __forceinline__ const float* unit(const uint8_t* operand, int pitch, int depth,
                                                 const float* scales = nullptr, const uint8_t* beside = nullptr) {
        float sum[2][4] = {};
        stages<Product, Weight>(sum, operand, pitch, depth, kScaled<Weight> ? load_scale<Product>(scales, 0, depth) : 0,
                                beside);
        return gather<Product>(sum);
    }

    // The first half of that, without the sums of other warps. scale: from load_scale.
    template <typename Product, typename Weight>
    __device__ __forceinline__ void stages(float (&sum)[2][4], const uint8_t* operand, int pitch, int depth,
                                           float scale, const uint8_t* beside = nullptr) {
        using S = Shape<Product>;
        const int depth_warp = static_cast<int>(threadIdx.x) / 32 / Product::kRowWarps;
#pragma unroll 1
        for (int first = 0, s = 0; first * kChunk<Weight> < depth; first += S::kDepthWarps, ++s) {
            if (beside == nullptr) ptx::mbarrier_wait(&control.full[at.slot], at.phase);
            multiply_stage<Product, Weight>(sum, beside != nullptr ? beside : ring + at.slot * kStageBytes, operand,
                                            pitch, depth, first + depth_warp, scale, s);
            if (beside != nullptr) return;
            __syncwarp();
            if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&control.empty[at.slot]);
            at.next(kStages);
        }
    }

    // The warp's share of a stage, the `s`-th of its unit: chunk `chunk` of the depth. scale: from load_scale.
    template <typename Product, typename Weight>
    __device__ __forceinline__ void multiply_stage(float (&sum)[2][4], const uint8_t* stage, const uint8_t* operand,
                                                   int pitch, int depth, int chunk, float scale, int s) const {
        constexpr int kRowWarps = Product::kRowWarps, kRows = Shape<Product>::kRows;
        const int warp = threadIdx.x / 32, row_warp = warp % kRowWarps, depth_warp = warp / kRowWarps;
        // Of gate_up all gate rows of a chunk come first, then its up rows; else 16 rows of a warp are neighbours.
        constexpr bool kPairs = std::is_same_v<Product, GateUp>;
        const uint8_t* low = stage + (depth_warp * kRows + row_warp * (kPairs ? 8 : 16)) * kChunkBytes;
        const uint8_t* high = low + (kPairs ? kRows / 2 : 8) * kChunkBytes;
        // Columns without a token are not stored.
        const auto row_of = [&](int token) { return operand + min(token, layout.tokens - 1) * pitch; };
        if constexpr (kScaled<Weight>) {
            const float low_scale = __shfl_sync(kAllLanes, scale, kPairs ? 2 * s : s);
            const float high_scale = kPairs ? __shfl_sync(kAllLanes, scale, 2 * s + 1) : low_scale;
            if (chunk * kChunk<Weight> >= depth) return;
            float (&scaled)[1][4] = *reinterpret_cast<float (*)[1][4]>(&sum[0]);
            expert_decode::multiply_scaled_chunk(scaled, low, high, row_of, depth, chunk, 1, low_scale, high_scale);
        } else if (chunk * kChunk<Weight> < depth) {
            multiply_chunk(sum, low, high, row_of(threadIdx.x % 32 / 4) + chunk * kChunkBytes);
        }
    }

    // The warp's scales of a unit: of the gate and the up rows of the even and odd lanes' stage (gate_up), or of all
    // rows of the lane's stage. up_scales: how much further those of the up rows lie.
    template <typename Product>
    __device__ __forceinline__ static float load_scale(const float* scales, int up_scales, int depth) {
        constexpr bool kPairs = std::is_same_v<Product, GateUp>;
        const int lane = threadIdx.x % 32, depth_warp = static_cast<int>(threadIdx.x) / 32 / Product::kRowWarps;
        const int chunk = (kPairs ? lane / 2 : lane) * Shape<Product>::kDepthWarps + depth_warp;
        if (chunk >= depth / kScaleBlock) return 0;
        return scales[(kPairs && lane % 2 ? up_scales : 0) + chunk];
    }

    // All warps' sums of a unit.
    template <typename Product>
    __device__ __forceinline__ const float* gather(const float (&sum)[2][4]) {
        using S = Shape<Product>;
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4, tokens = layout.tokens;
        const int row_warp = warp % Product::kRowWarps, depth_warp = warp / Product::kRowWarps;
        // The other half was read before every warp came to the barrier of the unit before.
        float* mine = sums + turn * tokens * kTokenSums;
        turn ^= 1;
        const int first_row = row_warp * 16 + quad / 2 + quad % 2 * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int token = lane % 4 * 2 + i % 2;
            if (token >= tokens) continue;
            mine[(depth_warp * tokens + token) * S::kPitch + first_row + i / 2 * 8] = sum[0][i] + sum[1][i];
        }
        ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
        return mine;
    }

    // A row's sum of a token over the warps that shared the depth.
    template <typename Product>
    __device__ __forceinline__ float total(const float* unit_sums, int token, int row) const {
        float value = 0;
#pragma unroll
        for (int i = 0; i < Shape<Product>::kDepthWarps; ++i) {
            value += unit_sums[(i * layout.tokens + token) * Shape<Product>::kPitch + row];
        }
        return value;
    }
};

}  // namespace tokenspeed::moe_layer
