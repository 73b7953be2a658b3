// How the persistent kernels of a decode layer begin (moe_block.cu, ffn_block.cu): the residual sum of up to eight rows
// and its norm, in shared memory, by the warps that multiply.
#pragma once
#include <bf16x8.h>
#include <ptx.h>
#include <reduce.h>

#include "moe/moe_experts_decode.h"

namespace tokenspeed {

constexpr int kBatch = 4;  // 16-byte loads of an operand that a thread has under way

// Writes the norm of x + residual into `rows`, `pitch` bytes each, and this block's share of the sum into memory.
// kAlone: there is one token, and all threads have a part of it; else a warp has a token. The norm's first weights come
// before the wait for the kernel ahead. Every block repeats it: that costs less than to wait for another's.
//
// Layer: a struct of kernels.h with x, x_stride, residual, norm_weight, eps, sum, tokens and hidden. squares: a float
// for each warp. after_loads is called when a thread's first loads are on their way, after_sum when it has its part of
// the sum. All consumer threads; ends with their barrier.
template <bool kAlone, typename Layer, typename AfterLoads, typename AfterSum>
__device__ __forceinline__ void stage_norm(const Layer& p, uint8_t* rows, int pitch, float* squares,
                                           AfterLoads after_loads, AfterSum after_sum) {
    using namespace expert_decode;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    constexpr int kLoads = kAlone ? kBatch / 2 : kBatch;  // one token is a turn or two: less code to fetch
    const int token = kAlone ? 0 : warp, from = (kAlone ? threadIdx.x : lane) * 8;
    const int step = (kAlone ? kConsumerThreads : 32) * 8;
    uint4 weights[kLoads]{};  // the first of the norm's
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
        if (from + i * step < p.hidden) weights[i] = ptx::load_16_read_only(p.norm_weight + from + i * step);
    }
    ptx::grid_dependency_wait();
    uint8_t* mine = rows + token * pitch;
    float total = 0;
    if (token < p.tokens) {
        const __nv_bfloat16* x = p.x + token * p.x_stride;
        const __nv_bfloat16* residual = p.residual + int64_t{token} * p.hidden;
        for (int base = from; base < p.hidden; base += kLoads * step) {
            uint4 added[kLoads], old[kLoads];  // all on their way before the first is used
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const int column = base + i * step;
                if (column >= p.hidden) break;
                added[i] = ptx::load_16_no_allocate(x + column);
                old[i] = ptx::load_16_no_allocate(residual + column);
            }
            if (base == from) after_loads();
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const int column = base + i * step;
                if (column >= p.hidden) break;
                const uint4 sum = pack(unpack(added[i]) + unpack(old[i]));
                total += sum_of_squares(unpack(sum));
                store_16(mine + column * 2, sum);
                if (column / 8 % gridDim.x == blockIdx.x) store_16(p.sum + int64_t{token} * p.hidden + column, sum);
            }
        }
    }
    after_sum();
    total = warp_sum(total);
    if constexpr (kAlone) {
        if (lane == 0) squares[warp] = total;
        ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
        total = 0;
#pragma unroll
        for (int i = 0; i < kConsumers; ++i) total += squares[i];
    }
    if (token < p.tokens) {
        const float inverse = rsqrtf(total / p.hidden + p.eps);
        for (int base = from; base < p.hidden; base += kLoads * step) {
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                const int column = base + i * step;
                if (base == from || column >= p.hidden) break;
                weights[i] = ptx::load_16_read_only(p.norm_weight + column);
            }
#pragma unroll
            for (int i = 0; i < kLoads; ++i) {
                if (base + i * step >= p.hidden) break;
                uint8_t* place = mine + (base + i * step) * 2;
                const Float8 s = unpack(*reinterpret_cast<const uint4*>(place)), w = unpack(weights[i]);
                const Float8 y = normalised(s, inverse, w);
                store_16(place, pack(y));
            }
        }
    }
    ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
}

}  // namespace tokenspeed
