// How x becomes the operand in shared memory: copied, by silu_mul, or by the residual sum and its norm.
#pragma once
#include <ptx.h>
#include <reduce.h>

#include "bf16x8.h"
#include "linear.h"

namespace tokenspeed::linear_product {

// Where the block's operand goes: rows of 16-bit elements, and of e4m3 weights what each group was divided by.
struct Target {
    __nv_bfloat16* rows;
    int pitch;
    float* divisors;  // [rows][groups]
    int groups;
};

// Stores eight bf16 of a row at the block's column `column`. For e4m3 weights as fp16: a warp calls it together, for
// 256 columns of one row.
template <typename Weight>
__device__ __forceinline__ void store_operand(const Target& to, int row, int column, uint4 packed) {
    if constexpr (Format<Weight>::kScaled) {
        float divisor;
        packed = row_to_half(packed, divisor);
        if (threadIdx.x % kGroupLanes == 0) to.divisors[row * to.groups + column / kScaleBlock] = divisor;
    }
    store_16(to.rows + row * to.pitch + column, packed);
}

// Copies x into the operand, zeros behind the last column: all threads through all rows, four loads ahead of what they
// store. A warp has one row at a time. after_loads is called when a thread's first loads are on their way.
template <typename Weight, typename AfterLoads>
__device__ __forceinline__ void stage_copy(const Target& operand, const Linear& p, int first, int last,
                                           AfterLoads after_loads) {
    const int chunks = (last - first) / kChunk, all = p.rows * chunks;
    if (static_cast<int>(threadIdx.x) >= all) after_loads();
    for (int from = threadIdx.x; from < all; from += kAtOnce * kThreads) {
        uint4 values[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = from + i * kThreads, row = at / chunks, column = first + at % chunks * kChunk;
            // Not the read-only path: the kernel before may write x while this one already runs.
            values[i] = at < all && column < p.inputs ? *reinterpret_cast<const uint4*>(p.x + row * p.x_stride + column)
                                                      : uint4{};
        }
        if (from == static_cast<int>(threadIdx.x)) after_loads();
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = from + i * kThreads;
            if (at < all) store_operand<Weight>(operand, at / chunks, at % chunks * kChunk, values[i]);
        }
    }
}

// Writes silu(x) times its second half into the operand, zeros behind the last column.
template <typename Weight, int kRows>
__device__ __forceinline__ void stage_silu_mul(const Target& operand, const Linear& p, int first, int last) {
    constexpr int kRowThreads = kRows == 1 ? kThreads : 32;
    const int row = threadIdx.x / kRowThreads;
    if (row >= p.rows) return;
    const __nv_bfloat16* gate = p.x + row * p.x_stride;
#pragma unroll 4
    for (int column = first + threadIdx.x % kRowThreads * kChunk; column < last; column += kRowThreads * kChunk) {
        uint4 packed{};
        if (column < p.inputs) {
            const Float8 g = unpack(*reinterpret_cast<const uint4*>(gate + column));
            const Float8 u = unpack(*reinterpret_cast<const uint4*>(gate + p.inputs + column));
            const Float8 y = gated(g, u);
            packed = pack(y);
        }
        store_operand<Weight>(operand, row, column - first, packed);
    }
}

// Starts the copies of this block's norm weights.
__device__ __forceinline__ void copy_norm_weights(__nv_bfloat16* weights, const Linear& p, int first, int last) {
#pragma unroll 1
    for (int column = first + threadIdx.x * kChunk; column < min(last, p.inputs); column += kThreads * kChunk) {
        ptx::cp_async(weights + column - first, p.norm_weight + column);
    }
}

// Writes the norm of x + residual into the operand, and the blocks of one cluster both it and the sum into memory.
// Every block repeats the sum of squares of whole rows: it is less work than to wait for another block's.
// after_loads: as in stage_copy.
template <typename Weight, int kRows, typename AfterLoads>
__device__ __forceinline__ void stage_add_norm(const Target& operand, const __nv_bfloat16* weights, float* squares,
                                               const Linear& p, int first, int last, AfterLoads after_loads) {
    constexpr int kRowThreads = kRows == 1 ? kThreads : 32, kStep = kRowThreads * kChunk;
    const int row = threadIdx.x / kRowThreads, from = threadIdx.x % kRowThreads * kChunk;
    const bool stores = blockIdx.y == 0;
    // One row is one or a few turns, and code that a launch runs once comes from L2, or from a cache two levels away.
    constexpr int kUnrolled = kRows == 1 ? 1 : 4;
    float total = 0;
    for (int base = from; base == from || base < p.inputs; base += kAtOnce * kStep) {  // once by all threads
        uint4 added[kAtOnce], old[kAtOnce];
        const int end = row < p.rows ? p.inputs : 0;
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int column = base + i * kStep;
            if (column >= end) break;
            added[i] = *reinterpret_cast<const uint4*>(p.x + row * p.x_stride + column);
            old[i] = *reinterpret_cast<const uint4*>(p.residual + int64_t{row} * p.inputs + column);
        }
        if (base == from) after_loads();
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int column = base + i * kStep;
            if (column >= end) break;
            const uint4 sum = pack(unpack(added[i]) + unpack(old[i]));
            total += sum_of_squares(unpack(sum));
            if (column >= first && column < last) {
                store_16(operand.rows + row * operand.pitch + column - first, sum);
                if (stores) store_16(p.sum + int64_t{row} * p.inputs + column, sum);
            }
        }
    }
    if constexpr (kRows == 1) {
        total = block_sum<kThreads>(total, squares);
    } else {
        total = warp_sum(total);
    }
    if (row >= p.rows) return;
    const float inverse = rsqrtf(total / p.inputs + p.eps);
    // A thread goes on with the columns it has itself written: the multiple of kStep that `from` is away from.
#pragma unroll(kUnrolled)
    for (int column = from + (first > from ? (first - from + kStep - 1) / kStep * kStep : 0); column < last;
         column += kStep) {
        uint4 packed{};
        if (column < p.inputs) {
            const Float8 s =
                unpack(*reinterpret_cast<const uint4*>(operand.rows + row * operand.pitch + column - first));
            const Float8 w = unpack(*reinterpret_cast<const uint4*>(weights + column - first));
            const Float8 y = normalised(s, inverse, w);
            packed = pack(y);
            if (stores) store_16(p.normed + int64_t{row} * p.inputs + column, packed);
        }
        store_operand<Weight>(operand, row, column - first, packed);
    }
}

}  // namespace tokenspeed::linear_product
