// A warp's pieces of the weight, 16 rows x 128 bytes each: in which order it walks through them, how it copies them
// into its ring, and how it multiplies one with x.
#pragma once
#include <ptx.h>
#include <reduce.h>

#include "linear.h"

namespace tokenspeed::linear_product {

// A walk over a block's pieces: for every tile, for every slab. source: what this lane copies of the piece first.
template <typename Weight>
struct Walk {
    int tile, slab, first_slab, last_slab, stride;
    const Weight* source;
    int64_t next_tile;  // elements from the first slab of a tile to that of the next

    __device__ void next() {
        source += Format<Weight>::kSlab;
        if (++slab < last_slab) return;
        source += next_tile - int64_t{last_slab - first_slab} * Format<Weight>::kSlab;
        slab = first_slab;
        tile += stride;
    }
};

// Where 16-byte chunk `chunk` of row `row` of a piece lies, in bytes.
__device__ __forceinline__ int place(int row, int chunk) {
    return row * kRowBytes + (chunk ^ (row % 2 * (kChunks / 2))) * 16;
}

// The row of a piece that a lane copies first, and the column of a slab that it copies of each.
__device__ __forceinline__ int copied_row() {
    return static_cast<int>(threadIdx.x) % 32 / kChunks;
}
template <typename Weight>
__device__ __forceinline__ int copied_column() {
    using F = Format<Weight>;
    const int warp = threadIdx.x / 32, chunk = threadIdx.x % kChunks;
    return warp * F::kColumns + chunk * (F::kColumns / kChunks);
}

// Starts the copies of this warp's piece of a slab; zeros where the matrix ends. Weights are the first to leave L2:
// what is small and read in every layer, code and scales too, stays there.
template <typename Weight>
__device__ __forceinline__ void copy_piece(uint8_t* piece, const Walk<Weight>& at, const Weight* weight, int outputs,
                                           int inputs) {
    const int row = copied_row(), chunk = static_cast<int>(threadIdx.x) % kChunks;
    const int64_t step = int64_t{kRowsAtOnce} * inputs;
    // Rows that are left from this lane's first on, none behind the last column.
    const int left =
        at.slab * Format<Weight>::kSlab + copied_column<Weight>() < inputs ? outputs - at.tile * kTileRows - row : 0;
    const Weight* source = at.source;
    static_assert(kRowsAtOnce % 2 == 0, "a lane's rows have their halves alike");
    const uint32_t to = ptx::opaque(ptx::shared_address(piece + place(row, chunk)));
    const auto copy = [&](int i, const Weight* from, int bytes) {
        ptx::cp_async_evict_first(to + i * kRowsAtOnce * kRowBytes, from, bytes);
    };
    if (__all_sync(kAllLanes, left > kTileRows - kRowsAtOnce)) {
#pragma unroll
        for (int i = 0; i < kTileRows / kRowsAtOnce; ++i, source += step) copy(i, source, 16);
        return;
    }
#pragma unroll
    for (int i = 0; i < kTileRows / kRowsAtOnce; ++i, source += step) {
        const bool inside = i * kRowsAtOnce < left;
        copy(i, inside ? source : weight, inside ? 16 : 0);
    }
}

// This warp's scales of a tile, of the slab first_slab + lane; zero where there is none.
__device__ __forceinline__ float load_scale(const Linear& p, int tile, int first_slab, int last_slab) {
    const int slab = first_slab + static_cast<int>(threadIdx.x) % 32;
    const int blocks = (p.inputs + kScaleBlock - 1) / kScaleBlock;
    const int block = slab * kWarps + static_cast<int>(threadIdx.x) / 32, row = tile * kTileRows;
    if (slab >= last_slab || block >= blocks || row >= p.outputs) return 0;
    return p.scale[int64_t{row / kScaleBlock} * blocks + block];
}

// sum += the piece's 16 rows times this lane's columns of x, in two chains of mma, so that one hides the other's
// latency.
template <int kGroups>
__device__ __forceinline__ void multiply_piece(float (&sum)[kGroups][2][4], const uint8_t* piece,
                                               const uint4 (&x)[2][kGroups]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int chunk = half * (kChunks / 2) + lane % 4;
        const uint4 upper = *reinterpret_cast<const uint4*>(piece + place(lane / 4, chunk));
        const uint4 lower = *reinterpret_cast<const uint4*>(piece + place(lane / 4 + 8, chunk));
        const uint32_t first_half[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second_half[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
        for (int n = 0; n < kGroups; ++n) {
            ptx::mma_m16n8k16<__nv_bfloat16>(sum[n][0], first_half, x[half][n].x, x[half][n].y);
            ptx::mma_m16n8k16<__nv_bfloat16>(sum[n][1], second_half, x[half][n].z, x[half][n].w);
        }
    }
}

// The same of e4m3, 16 weights a lane and chunk, four to an mma: the sums of a piece, without its scale.
template <int kGroups>
__device__ __forceinline__ void multiply_piece(float (&sum)[kGroups][2][4], const uint8_t* piece,
                                               const uint4 (&x)[4][kGroups]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int chunk = half * (kChunks / 2) + lane % 4;
        const uint4 upper = *reinterpret_cast<const uint4*>(piece + place(lane / 4, chunk));
        const uint4 lower = *reinterpret_cast<const uint4*>(piece + place(lane / 4 + 8, chunk));
        const uint32_t of_upper[4] = {upper.x, upper.y, upper.z, upper.w};
        const uint32_t of_lower[4] = {lower.x, lower.y, lower.z, lower.w};
#pragma unroll
        for (int four = 0; four < 4; ++four) {
            uint32_t a[4];
            ptx::unpack_e4m3(of_upper[four], a[0], a[2]);
            ptx::unpack_e4m3(of_lower[four], a[1], a[3]);
#pragma unroll
            for (int n = 0; n < kGroups; ++n) {
                const uint4 values = x[half * 2 + four / 2][n];
                ptx::mma_m16n8k16<__half>(sum[n][four % 2], a, four % 2 ? values.z : values.x,
                                          four % 2 ? values.w : values.y);
            }
        }
    }
}

}  // namespace tokenspeed::linear_product
