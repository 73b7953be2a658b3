// Products of rows with experts' weights in e4m3, by the warps of moe_experts_decode.cu and of moe_block.cu.
#pragma once
#include <ptx.h>

#include <cstdint>

#include "fp8.h"
#include "moe_experts_decode.h"

namespace tokenspeed::expert_decode {

// Turns rows from bf16 to fp16, in place; what each group of 128 columns was divided by stands behind its row. The
// warps kConsumers, who may read the rows afterwards.
__device__ __forceinline__ void convert_rows(uint8_t* rows, int row_pitch, int count, int depth) {
    const int groups = depth / kScaleBlock, pairs = (groups + 1) / 2;
    const int lane = threadIdx.x % kGroupLanes, half = threadIdx.x % 32 / kGroupLanes;
#pragma unroll 1
    for (int i = threadIdx.x / 32; i < count * pairs; i += kConsumers) {
        uint8_t* row = rows + i / pairs * row_pitch;
        const int group = i % pairs * 2 + half;
        auto* at = reinterpret_cast<uint4*>(row + group * kScaleBlock * 2) + lane;
        float divisor;
        const uint4 converted = row_to_half(group < groups ? *at : uint4{}, divisor);
        if (group >= groups) continue;
        *at = converted;
        if (lane == 0) *reinterpret_cast<float*>(row + depth * 2 + group * 4) = divisor;
    }
    ptx::fence_async_shared();  // the next entry's rows come by bulk copies
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
}

// sum += the warp's 16 rows x a chunk of 128 columns of a stage times the same columns of up to 8 kGroups rows, as
// convert_rows leaves them. `low` and `high`: the fragment's first and last eight rows, and their scales;
// `row_of(index)`: a row; `depth`: its length. A lane has 16 weights of each half, four to an mma.
template <int kGroups, typename RowOf>
__device__ __forceinline__ void multiply_scaled_chunk(float (&sum)[kGroups][4], const uint8_t* low, const uint8_t* high,
                                                      RowOf row_of, int depth, int chunk, int groups, float low_scale,
                                                      float high_scale) {
    const int lane = threadIdx.x % 32, quad = lane / 4, piece = lane % 4;
    const int row = quad / 2 + quad % 2 * 4;
    float unscaled[kGroups][2][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int offset = row * kChunkBytes + ((half * 4 + piece) ^ row) * 16;
        const uint4 upper = *reinterpret_cast<const uint4*>(low + offset);
        const uint4 lower = *reinterpret_cast<const uint4*>(high + offset);
        const uint32_t of_upper[4] = {upper.x, upper.y, upper.z, upper.w};
        const uint32_t of_lower[4] = {lower.x, lower.y, lower.z, lower.w};
        uint32_t a[4][4];
#pragma unroll
        for (int four = 0; four < 4; ++four) {
            ptx::unpack_e4m3(of_upper[four], a[four][0], a[four][2]);
            ptx::unpack_e4m3(of_lower[four], a[four][1], a[four][3]);
        }
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
            if (n < groups) {
                const auto* at = row_of(n * 8 + quad) + chunk * kScaleBlock * 2 + half * 128 + piece * 32;
#pragma unroll
                for (int pair = 0; pair < 2; ++pair) {
                    const uint4 b = *reinterpret_cast<const uint4*>(at + pair * 16);
                    ptx::mma_m16n8k16<__half>(unscaled[n][0], a[pair * 2], b.x, b.y);
                    ptx::mma_m16n8k16<__half>(unscaled[n][1], a[pair * 2 + 1], b.z, b.w);
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < kGroups; ++n) {
        if (n >= groups) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const auto* divisors = reinterpret_cast<const float*>(row_of(n * 8 + lane % 4 * 2 + i) + depth * 2);
            sum[n][i] += low_scale * divisors[chunk] * (unscaled[n][0][i] + unscaled[n][1][i]);
            sum[n][i + 2] += high_scale * divisors[chunk] * (unscaled[n][0][i + 2] + unscaled[n][1][i + 2]);
        }
    }
}

}  // namespace tokenspeed::expert_decode
