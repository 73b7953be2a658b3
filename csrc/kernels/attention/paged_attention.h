// What the two kernels of paged attention share: the boxes of the KV arena, and the output gate.
#pragma once
#include <ptx.h>
#include <ptx_tma.h>
#include <reduce.h>
#include <vector.h>

#include <cstdint>
#include <type_traits>

#include "bf16x8.h"
#include "fp8.h"
#include "kernels.h"
#include "ring.h"

namespace tokenspeed::attention {

constexpr int kDim = kHeadDim;
constexpr int kPage = kPageTokens;
constexpr int kGroupRowBytes = 128;  // of a row that lie together in shared memory: the width of a swizzle
constexpr int kGroupBytes = kPage * kGroupRowBytes;
constexpr float kLog2E = 1.44269504f;

// What the type of pages decides. Keys and values in e4m3 are multiplied in fp16, which holds them exactly. The queries
// are scaled to its range row by row, and the weights of tokens, at most 1, by a power of two: they cancel where the
// output is divided by their sum, and 2^-38 is left of the smallest instead of 2^-24.
template <typename Kv>
struct Format {
    static constexpr bool kConverted = std::is_same_v<Kv, E4m3>;
    using Operand = std::conditional_t<kConverted, __half, __nv_bfloat16>;
    static constexpr int kColumns = kGroupRowBytes / sizeof(Kv);  // of a row that lie together
    static constexpr int kGroups = kDim / kColumns;
    static constexpr int kBoxBytes = kGroups * kGroupBytes;  // the keys or the values of one page and head
    static constexpr float kLargestWeightLog2 = kConverted ? 14 : 0;
};

// One layer of the arena as boxes: column, token, column group, (k or v, head), page. A box arrives in shared memory as
// column groups of [64 tokens x 128 bytes], swizzled: the operand layout of both ldmatrix and wgmma.
template <typename Kv>
cudaError_t encode_boxes(CUtensorMap* map, const PagedAttention& p) {
    using F = Format<Kv>;
    constexpr uint64_t kBytes = sizeof(Kv);
    const TensorLayout<5> layout{.base = p.kv,
                                 .sizes = {F::kColumns, kPage, F::kGroups, static_cast<uint64_t>(2 * p.kv_heads),
                                           static_cast<uint64_t>(p.pages)},
                                 .strides = {kBytes, kDim * kBytes, kGroupRowBytes, kPage * kDim * kBytes,
                                             static_cast<uint64_t>(p.page_stride) * kBytes},
                                 .box = {F::kColumns, kPage, F::kGroups, 1, 1}};
    return encode_tensor_map(map, F::kConverted ? TensorElement::kU8 : TensorElement::kBf16, layout, Swizzle::k128);
}

enum Part : int { kKeys = 0, kValues = 1 };

// Starts the copy of a page's keys or values of one head; completes a box's bytes on the barrier.
template <typename Kv>
__device__ __forceinline__ void load_box(void* shared, const CUtensorMap* map, uint64_t* barrier, int part, int head,
                                         int kv_heads, int page) {
    ptx::mbarrier_arrive_expect_tx(barrier, Format<Kv>::kBoxBytes);
    ptx::tma_load<5>(shared, map, barrier, {0, 0, 0, part * kv_heads + head, page});
}

// What kernels read of the arguments beyond what the caller knows.
inline void complete(PagedAttention& p) {
    p.group = p.q_heads / p.kv_heads;
    p.group_inverse = static_cast<uint32_t>(((uint64_t{1} << 32) + static_cast<uint32_t>(p.group) - 1) / p.group);
    p.log2_scale = p.scale * kLog2E;
    constexpr int64_t kMostStride = 1 << 26;  // 16 of them are an offset in 32 bits
    p.gate_vectors = p.gate_stride == 1 && p.gate_token_stride % 4 == 0 && p.gate_head_stride % 4 == 0 &&
                     p.gate_token_stride < kMostStride && p.gate_head_stride * p.group < kMostStride &&
                     reinterpret_cast<uintptr_t>(p.gate) % 8 == 0;
}

// A row of a sequence is a token and one of the query heads that share a KV head.
struct RowPlace {
    int token, head;
};

// Exact below 2^32 / group rows: the inverse is less than group / 2^32 too large.
__device__ __forceinline__ RowPlace place_of_row(const PagedAttention& p, int row) {
    const int token = static_cast<int>(__umulhi(static_cast<uint32_t>(row), p.group_inverse));
    return {token, row - token * p.group};
}

// The sum over the sequences of count(sequence). By whole warps.
template <typename Count>
__device__ __forceinline__ int count_all(int sequences, Count count) {
    int total = 0;
#pragma unroll 1
    for (int sequence = threadIdx.x % 32; sequence < sequences; sequence += 32) total += count(sequence);
    return warp_sum(total);
}

struct Located {
    int sequence;
    int offset;  // in what the sequence has
};

// Where item `index` lies when the sequences lay out their count(sequence) items one after the other; below the sum.
// By whole warps.
template <typename Count>
__device__ __forceinline__ Located locate(int sequences, int index, Count count) {
    const int lane = threadIdx.x % 32;
    for (int first = 0;; first += 32) {
        const int own = first + lane < sequences ? count(first + lane) : 0;
        int through = own;
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int before = __shfl_up_sync(kAllLanes, through, distance);
            if (lane >= distance) through += before;
        }
        const uint32_t beyond = __ballot_sync(kAllLanes, through > index);
        if (beyond != 0) {
            const int found = __ffs(static_cast<int>(beyond)) - 1;
            return {first + found, index - __shfl_sync(kAllLanes, through - own, found)};
        }
        index -= __shfl_sync(kAllLanes, through, 31);
    }
}

// The page ids of a sequence, 32 at a time in the lanes of a warp: id(page) costs a shuffle, and a load every 32 pages.
class PageIds {
  public:
    __device__ __forceinline__ PageIds(const PagedAttention& p, int sequence, int first, int last)
        : row_(p.page_table + sequence * p.table_stride), first_(first), last_(last) {}

    // Called by the whole warp with pages in rising order from `first`.
    __device__ __forceinline__ int id(int page) {
        const int offset = (page - first_) % 32, lane = threadIdx.x % 32;
        if (offset == 0 && page + lane < last_) ids_ = row_[page + lane];
        return __shfl_sync(kAllLanes, ids_, offset);
    }

  private:
    const int32_t* row_;
    int first_, last_, ids_ = 0;
};

__device__ __forceinline__ float output_gate(__nv_bfloat16 gate) {
    return sigmoid(__bfloat162float(gate));
}

__device__ __forceinline__ const __nv_bfloat16* gate_of(const PagedAttention& p, int64_t token, int head, int column) {
    return p.gate + token * p.gate_token_stride + head * p.gate_head_stride + column * p.gate_stride;
}

__device__ __forceinline__ __nv_bfloat16* out_of(const PagedAttention& p, int64_t token, int head, int column) {
    return p.out + (token * p.q_heads + head) * kDim + column;
}

// The gates of two neighbouring columns.
__device__ __forceinline__ Vector<__nv_bfloat16, 2> load_pair_of_gates(const PagedAttention& p, int64_t token, int head,
                                                                       int column) {
    const __nv_bfloat16* gate = gate_of(p, token, head, column);
    if (p.gate_vectors) return load_vector<2>(gate);
    return {gate[0], gate[p.gate_stride]};
}

// Two neighbouring columns of an output row, gated.
__device__ __forceinline__ void store_pair(__nv_bfloat16* out, float first, float second,
                                           const Vector<__nv_bfloat16, 2>& gates) {
    *reinterpret_cast<uint32_t*>(out) =
        pack<__nv_bfloat16>(first * output_gate(gates[0]), second * output_gate(gates[1]));
}

// The gates of four neighbouring columns.
__device__ __forceinline__ Vector<__nv_bfloat16, 4> load_gates(const PagedAttention& p, int64_t token, int head,
                                                               int column) {
    const __nv_bfloat16* gate = gate_of(p, token, head, column);
    if (p.gate_vectors) return load_vector<4>(gate);
    return {gate[0], gate[p.gate_stride], gate[2 * p.gate_stride], gate[3 * p.gate_stride]};
}

__device__ __forceinline__ float4 unpack_gates(uint2 bits) {
    return make_float4(__uint_as_float(bits.x << 16), __uint_as_float(bits.x & 0xffff0000u),
                       __uint_as_float(bits.y << 16), __uint_as_float(bits.y & 0xffff0000u));
}

// Of two gates, with one reciprocal: the gates of a tile would keep the special-function units busy for as long as a page
// and a half. Below -41.6 a gate counts as that, or the product would be infinite; one that is NaN makes both NaN.
__device__ __forceinline__ float2 sigmoids(float first, float second) {
    constexpr float kMost = 60;
    const auto power = [](float gate) {
        const float exponent = -kLog2E * gate;
        return ptx::exp2_approximate(exponent > kMost ? kMost : exponent);  // unlike fminf, keeps NaN
    };
    const float a = 1 + power(first), b = 1 + power(second);
    const float inverse = ptx::reciprocal_approximate(a * b);
    return make_float2(inverse * b, inverse * a);
}

__device__ __forceinline__ uint2 gated(const float4& values, const float4& gates) {
    const float2 low = sigmoids(gates.x, gates.y), high = sigmoids(gates.z, gates.w);
    return make_uint2(pack<__nv_bfloat16>(values.x * low.x, values.y * low.y),
                      pack<__nv_bfloat16>(values.z * high.x, values.w * high.y));
}

__device__ __forceinline__ void store_quad(const PagedAttention& p, int64_t token, int head, int column,
                                           const float4& values, const Vector<__nv_bfloat16, 4>& gates) {
    *reinterpret_cast<uint2*>(out_of(p, token, head, column)) =
        gated(values, make_float4(__bfloat162float(gates[0]), __bfloat162float(gates[1]), __bfloat162float(gates[2]),
                                  __bfloat162float(gates[3])));
}

// sum = kept sum + weight values
__device__ __forceinline__ void add_scaled(float4& sum, float kept, const float4& values, float weight) {
    sum.x = kept * sum.x + weight * values.x;
    sum.y = kept * sum.y + weight * values.y;
    sum.z = kept * sum.z + weight * values.z;
    sum.w = kept * sum.w + weight * values.w;
}

}  // namespace tokenspeed::attention
