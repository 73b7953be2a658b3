// What becomes of the sums of moe_block.cu's units: activations, rows of the experts, and the weighted sum of a block's
// columns.
#pragma once
#include <bf16x8.h>
#include <ptx.h>
#include <reduce.h>

#include "moe_block_products.h"

namespace tokenspeed::moe_layer {

// Stores a tile of an entry's activations, and counts it for each token that chose the expert.
__device__ __forceinline__ void finish_gate_up(const Arguments& a, const Control& control, const Multiplier& multiplier,
                                               const float* sums, int entry, int tile) {
    constexpr int kColumns = GateUp::kTileColumns;
    const MoeBlock& p = a.p;
    if (static_cast<int>(threadIdx.x) / 32 * 32 >= p.tokens * kColumns) return;
    const int token = threadIdx.x / kColumns, output = threadIdx.x % kColumns;
    const int rank = token < p.tokens ? control.ranks[entry][token] : kNobody;
    const int64_t choice = token * p.top_k + rank;
    float value = 0;
    if (rank != kNobody) {
        const int row = output / 8 * 16 + output % 8;  // each warp's gate rows, then its up rows
        const float gate = multiplier.total<GateUp>(sums, token, row);
        const float up = multiplier.total<GateUp>(sums, token, row + 8);
        value = silu(gate) * up;
    }
    if (a.alone) {
        __syncwarp();
        const float next = __shfl_down_sync(kAllLanes, value, 1);
        if (rank == kNobody || output % 2 != 0) return;
        const int column = tile * kColumns + output;
        ptx::store_tagged(a.words + choice * words_pitch(p.width) + words_of(column / 8) + column % 8 / 2,
                          pack<__nv_bfloat16>(value, next), control.launch);
        return;
    }
    if (rank != kNobody) {
        a.activations[choice * p.width + tile * kColumns + output] = __float2bfloat16(value);
    }
    __syncwarp();
    if (rank != kNobody && output == 0) ptx::add_release(&counters_of(p.scratch, control.launch).activated[entry], 1);
}

// Stores a tile of the rows that the tokens of an entry will sum.
__device__ __forceinline__ void finish_down(const Arguments& a, const Control& control, const Multiplier& multiplier,
                                            const float* sums, int entry, int tile) {
    constexpr int kColumns = Down::kTileColumns;
    const MoeBlock& p = a.p;
#pragma unroll 1
    for (int i = threadIdx.x; i < p.tokens * kColumns; i += kConsumerThreads) {
        const int token = i / kColumns, output = tile * kColumns + i % kColumns;
        const int rank = control.ranks[entry][token];
        if (rank == kNobody || output >= p.hidden) continue;
        ptx::store_tagged(a.rows + int64_t{token * p.top_k + rank} * p.hidden + output,
                          __float_as_uint(multiplier.total<Down>(sums, token, i % kColumns)), control.launch);
    }
}

// out of this block's columns: a warp has 16 of them of one token, a lane four of one of its ranks.
template <typename Weight>
__device__ inline void finish_columns(const Arguments& a, const Control& control, const Work<Weight>& work) {
    const MoeBlock& p = a.p;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = static_cast<int>(gridDim.x);
    const int block = static_cast<int>(blockIdx.x);
    const int tiles = block < work.column_tiles ? (work.column_tiles - block + blocks - 1) / blocks : 0;
#pragma unroll 1
    for (int item = warp; item < tiles * p.tokens; item += kConsumers) {
        const int token = item % p.tokens, first = token * p.top_k;
        const int column = (block + item / p.tokens * blocks) * Dense::kTileColumns + lane % 4 * 4;
        const uint2 shared = *reinterpret_cast<const uint2*>(a.shared_rows + int64_t{token} * p.hidden + column);
        const __nv_bfloat16 gate = a.projected[token * a.projected_pitch + 2 * p.shared + p.experts];
        float sum[4] = {};
#pragma unroll 1
        for (int base = 0; base < p.top_k; base += kRanksAtOnce) {
            const int rank = base + lane / 4;
            uint32_t values[4] = {};
            if (rank < p.top_k && control.chosen[first + rank] >= 0) {
                ptx::wait_tagged(values, a.rows + int64_t{first + rank} * p.hidden + column, control.launch);
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < kRanksAtOnce; ++i) {
                const bool counts = base + i < p.top_k && control.chosen[first + base + i] >= 0;
                const float weight = counts ? control.weights[first + base + i] : 0.0f;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const uint32_t value = __shfl_sync(kAllLanes, values[j], i * 4 + lane % 4);
                    if (counts) sum[j] += weight * __uint_as_float(value);
                }
            }
        }
        const float added[4] = {__uint_as_float(shared.x << 16), __uint_as_float(shared.x & 0xffff0000u),
                                __uint_as_float(shared.y << 16), __uint_as_float(shared.y & 0xffff0000u)};
        const float share = sigmoid(to_float(gate));
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] = to_float(__float2bfloat16(sum[j])) + share * added[j];
        if (lane >= 4) continue;
        *reinterpret_cast<uint2*>(p.out + int64_t{token} * p.hidden + column) =
            make_uint2(pack<__nv_bfloat16>(sum[0], sum[1]), pack<__nv_bfloat16>(sum[2], sum[3]));
    }
}

}  // namespace tokenspeed::moe_layer
