// The stages of gated_delta_rule_decode.cu around its pass over the state: what each reads, computes and stores. See
// there.
#pragma once
#include <cuda_bf16.h>
#include <ptx.h>
#include <reduce.h>

#include "kernels.h"

namespace tokenspeed::delta_rule {

constexpr int kDim = 128;  // dk = dv
constexpr int kTaps = 4;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kMaxRatio = 4;  // value heads per key head
constexpr int kMaxTokens = 8;
constexpr int kUnitRows = 16;
constexpr int kUnits = kDim / kUnitRows;  // partial sums of squares per head

// T padded to a power of two, for the butterflies.
__host__ __device__ constexpr int padded(int tokens) {
    return tokens <= 2 ? tokens : tokens <= 4 ? 4 : 8;
}

// Dynamic shared memory of a block that owns `rows` value rows of a key head's group; whether others have the rest of
// them (`split`).
struct Shared {
    float* query;            // [T][128], raw
    float* key;              // [T][128], raw
    float* value;            // [T][rows]: v, later o where the block is alone
    float* ring;             // [R][128 + rows]: k, u of the group
    __nv_bfloat16* z;        // [T][rows], of a block that is alone
    float* updates;          // [R][rows], of one that is not: D_{i+1} u_i of the i-th pending token
    float* ring_g;           // [R][ratio]
    float* suffix;           // [ratio][R + 1]: D_i
    float* g;                // [ratio][T]
    float* beta;             // [ratio][T]
    float* decay;            // [ratio][T]: e^{G_t}
    float* coefficient;      // [ratio][T][T]: (t, j <= t) of o; (j, t > j) of u
    float* inverse;          // [2][T]: 1 / |k_t|, 1 / (|q_t| sqrt(dk))
    float* squares;          // [T][ratio][8]: sums of squares of 16 rows of o
    uint64_t* squares_full;  // mbarrier: those of the whole cluster are there
    float* pending;          // [R][2 T']: products of the pending keys with the raw new keys and queries; T' = padded T
    float* sums;             // [rows][2 T']: S k_t and S q_t, raw; later u_0 of the row
    size_t bytes;

    __host__ __device__ Shared(uint8_t* base, int tokens, int rows, int ring_rows, bool split) {
        const int products = 2 * padded(tokens);
        float* next = reinterpret_cast<float*>(base);
        const auto take = [&next](int count) {
            float* taken = next;
            next += (count + 3) & ~3;
            return taken;
        };
        squares_full = reinterpret_cast<uint64_t*>(take(4));
        query = take(tokens * kDim);
        key = take(tokens * kDim);
        value = take(tokens * rows);
        ring = take(ring_rows * (kDim + rows));
        z = reinterpret_cast<__nv_bfloat16*>(take(split ? 0 : tokens * rows / 2));
        updates = take(split ? ring_rows * rows : 0);
        ring_g = take(ring_rows * kMaxRatio);
        suffix = take(kMaxRatio * (ring_rows + 1));
        g = take(kMaxRatio * tokens);
        beta = take(kMaxRatio * tokens);
        decay = take(kMaxRatio * tokens);
        coefficient = take(kMaxRatio * tokens * tokens);
        inverse = take(2 * tokens);
        squares = take(tokens * kMaxRatio * kUnits);
        pending = take(ring_rows * products);
        sums = take(rows * products);
        bytes = reinterpret_cast<uint8_t*>(next) - base;
    }
};

__device__ __forceinline__ float dot(float4 a, float4 b) {
    return a.x * b.x + a.y * b.y + a.z * b.z + a.w * b.w;
}

__device__ __forceinline__ float4 scaled(float4 a, float s) {
    return {a.x * s, a.y * s, a.z * s, a.w * s};
}

__device__ __forceinline__ void add_scaled(float4& sum, float4 a, float s) {
    sum.x += a.x * s;
    sum.y += a.y * s;
    sum.z += a.z * s;
    sum.w += a.w * s;
}

__device__ __forceinline__ float exponential(float x) {
    return ptx::exp2_approximate(x * 1.44269504f);
}

__device__ __forceinline__ float sigmoid(float x) {
    return 1.0f / (1.0f + exponential(-x));
}

__device__ __forceinline__ float rounded(float x) {
    return __bfloat162float(__float2bfloat16(x));
}

__device__ __forceinline__ float2 unpack(uint32_t pair) {
    return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}

// Where a block stands: its sequence, its key head, and its rows of that head's group.
struct Place {
    int sequence, key_head, rank;
    int ratio;      // value heads in the group
    int rows;       // value rows of this block
    int first_row;  // in the group: value head first_row / 128, ...
};

struct Slots {
    int read, write, context;
    int pending;   // tokens in the ring: D_0 .. D_{pending - 1}
    int ring_row;  // of the oldest pending token
    bool fold;
};

// The inputs of one pair of neighbouring channels ahead of the new tokens, from the window; zeros before the first.
struct Earlier {
    uint32_t input[kTaps - 1];
};
__device__ __forceinline__ Earlier load_earlier(const GatedDeltaRuleDecode& p, const Slots& slots, int channel) {
    Earlier earlier{};
    const auto* window = p.window + slots.read * p.window_stride + channel;
    const int entry = slots.context % p.window_entries;
#pragma unroll
    for (int i = 0; i < kTaps - 1; ++i) {
        const int back = kTaps - 1 - i;
        const int row = entry >= back ? entry - back : entry - back + p.window_entries;
        if (slots.context >= back) {
            earlier.input[i] = *reinterpret_cast<const uint32_t*>(window + static_cast<int64_t>(row) * p.channels);
        }
    }
    return earlier;
}

// Convolution, SiLU and rounding of one pair of neighbouring channels for all new tokens.
template <int kTokens>
__device__ __forceinline__ void convolve(const GatedDeltaRuleDecode& p, const Place& at, const Earlier& earlier,
                                         int channel, uint4 taps, float* out, int out_stride) {
    uint32_t input[kTaps - 1 + kTokens];
#pragma unroll
    for (int i = 0; i < kTaps - 1; ++i) input[i] = earlier.input[i];
    const auto* x = p.qkv + static_cast<int64_t>(at.sequence) * kTokens * p.qkv_stride + channel;
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        input[kTaps - 1 + t] = *reinterpret_cast<const uint32_t*>(x + t * p.qkv_stride);
    }
    const float2 weight[kTaps] = {{unpack(taps.x).x, unpack(taps.z).x},
                                  {unpack(taps.x).y, unpack(taps.z).y},
                                  {unpack(taps.y).x, unpack(taps.w).x},
                                  {unpack(taps.y).y, unpack(taps.w).y}};
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        float2 sum = {0, 0};
#pragma unroll
        for (int i = 0; i < kTaps; ++i) {
            const float2 tap = unpack(input[t + i]);
            sum.x += tap.x * weight[i].x;
            sum.y += tap.y * weight[i].y;
        }
        out[t * out_stride] = rounded(sum.x * sigmoid(sum.x));
        out[t * out_stride + 1] = rounded(sum.y * sigmoid(sum.y));
    }
}

// Starts the copies of the ring into shared memory, one row a warp. With `all`, rows that hold nothing pending come
// along and are not looked at, which takes the cursor off the critical path.
template <int kBytes>
__device__ __forceinline__ void load_ring(const GatedDeltaRuleDecode& p, const Place& at, const Shared& shared,
                                          int read, int context, int cursor, bool all) {
    constexpr int kFloats = kBytes / 4;
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int row = threadIdx.x / 32; row < p.ring_rows; row += kWarps) {
        const int token = context - 1 - (context - 1 - row + p.ring_rows) % p.ring_rows;  // the latest one at this row
        if (!all && token < cursor) continue;
        const float* source = p.ring + read * p.ring_stride + static_cast<int64_t>(row) * p.ring_width;
        float* destination = shared.ring + row * (kDim + at.rows);
        const float* key = source + at.key_head * kDim;
#pragma unroll 1
        for (int i = lane * kFloats; i < kDim; i += 32 * kFloats) ptx::cp_async<kBytes>(destination + i, key + i);
        const float* update = source + (p.key_heads + at.key_head * at.ratio) * kDim + at.first_row;
#pragma unroll 1
        for (int i = lane * kFloats; i < at.rows; i += 32 * kFloats) {
            ptx::cp_async<kBytes>(destination + kDim + i, update + i);
        }
        const float* g = source + (p.key_heads + p.value_heads) * kDim + at.key_head * at.ratio;
        if (lane < at.ratio) ptx::cp_async<4>(shared.ring_g + row * at.ratio + lane, g + lane);
    }
}

// g and beta of (value head, token) `i` of the group; a_log and dt_bias are the head's.
template <int kTokens>
__device__ __forceinline__ void gate(const GatedDeltaRuleDecode& p, const Place& at, const Shared& shared, int i,
                                     float a_log, float dt_bias) {
    const int head = at.key_head * at.ratio + i / kTokens;
    const int64_t row = static_cast<int64_t>(at.sequence) * kTokens + i % kTokens;
    const float x = __bfloat162float(p.a[row * p.a_stride + head]) + dt_bias;
    const float softplus = x > 20.0f ? x : log1pf(expf(x));
    shared.g[i] = -expf(a_log) * softplus;
    shared.beta[i] = 1.0f / (1.0f + expf(-__bfloat162float(p.b[row * p.b_stride + head])));
}

// Product (t, j) of the triangle, by one warp: k_j . q_t for j <= t, k_t . k_j for j > t, with the decays between them;
// the diagonal also leaves the inverse norms.
template <int kTokens>
__device__ __forceinline__ void triangle(const Place& at, const Shared& shared, int t, int j) {
    const int lane = threadIdx.x % 32;
    const float4 x = reinterpret_cast<const float4*>(shared.key + j * kDim)[lane];
    const float4 y = reinterpret_cast<const float4*>((j > t ? shared.key : shared.query) + t * kDim)[lane];
    float products[4] = {dot(x, x), dot(y, y), dot(x, y), 0};
    butterfly<16, 4>(products);
    const float inverse_x = rsqrtf(__shfl_sync(kAllLanes, products[0], 0) + 1e-6f);
    const float inverse_y = rsqrtf(__shfl_sync(kAllLanes, products[0], 8) + 1e-6f) * (j > t ? 1.0f : rsqrtf(kDim));
    const float product = __shfl_sync(kAllLanes, products[0], 16) * inverse_x * inverse_y;
    if (t == j && lane == 0) {
        shared.inverse[t] = inverse_x;
        shared.inverse[kTokens + t] = inverse_y;
    }
    if (lane < at.ratio) {
        const int earlier = min(t, j), later = max(t, j);
        float total = 0, between = 0;
#pragma unroll 1
        for (int i = 0; i <= later; ++i) {
            total += shared.g[lane * kTokens + i];
            if (i > earlier) between += shared.g[lane * kTokens + i];
        }
        const float scale = j > t ? shared.beta[lane * kTokens + j] : 1.0f;
        shared.coefficient[(lane * kTokens + t) * kTokens + j] = scale * exponential(between) * product;
        if (t == j) shared.decay[lane * kTokens + t] = exponential(total);
    }
}

// Products of the key of pending token `i` with the new keys and queries, by one warp.
template <int kTokens>
__device__ __forceinline__ void pending_products(const GatedDeltaRuleDecode& p, const Place& at, const Shared& shared,
                                                 const Slots& slots, int i) {
    constexpr int kPadded = padded(kTokens), kCount = 2 * kPadded;
    const int lane = threadIdx.x % 32;
    const int row = slots.ring_row + i;
    const float* update = shared.ring + (row >= p.ring_rows ? row - p.ring_rows : row) * (kDim + at.rows);
    const float4 key = reinterpret_cast<const float4*>(update)[lane];
    float products[kCount] = {};
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
        products[t] = dot(key, reinterpret_cast<const float4*>(shared.key + t * kDim)[lane]);
        products[kPadded + t] = dot(key, reinterpret_cast<const float4*>(shared.query + t * kDim)[lane]);
    }
    butterfly<16, kCount>(products);
    if (lane % (32 / kCount) == 0) shared.pending[i * kCount + lane / (32 / kCount)] = products[0];
}

// D_i of every head of the group, by one warp.
__device__ __forceinline__ void suffix_decays(const GatedDeltaRuleDecode& p, const Place& at, const Shared& shared,
                                              const Slots& slots) {
#pragma unroll 1
    for (int i = threadIdx.x % 32; i < at.ratio * (slots.pending + 1); i += 32) {
        const int head = i / (slots.pending + 1), first = i % (slots.pending + 1);
        float sum = 0;
#pragma unroll 1
        for (int j = slots.pending - 1; j >= first; --j) {
            const int row = slots.ring_row + j;
            sum += shared.ring_g[(row >= p.ring_rows ? row - p.ring_rows : row) * at.ratio + head];
        }
        shared.suffix[head * (p.ring_rows + 1) + first] = exponential(sum);
    }
}

// Which part of the window a block stores: its value channels, and of one block those of q and k, which every block of
// the group has. 8 channels a chunk.
struct WindowPart {
    int shared_chunks, chunks;

    __device__ __forceinline__ explicit WindowPart(const Place& at)
        : shared_chunks(at.rank == 0 ? 2 * kDim / 8 : 0), chunks(shared_chunks + at.rows / 8) {}

    __device__ __forceinline__ int channel(const GatedDeltaRuleDecode& p, const Place& at, int chunk) const {
        if (chunk < shared_chunks) {
            return at.key_head * kDim + (chunk < kDim / 8 ? chunk * 8 : p.key_heads * kDim + chunk * 8 - kDim);
        }
        return (2 * p.key_heads + at.key_head * at.ratio) * kDim + at.first_row + (chunk - shared_chunks) * 8;
    }
};

// Input `item` of the new ones that the block stores: token item / chunks, chunk item % chunks.
template <int kTokens>
__device__ __forceinline__ uint4 load_input(const GatedDeltaRuleDecode& p, const Place& at, const WindowPart& part,
                                            int item) {
    const int64_t row = static_cast<int64_t>(at.sequence) * kTokens + item / part.chunks;
    return *reinterpret_cast<const uint4*>(p.qkv + row * p.qkv_stride + part.channel(p, at, item % part.chunks));
}

// The window of the write slot: the new inputs, of which this thread's first was loaded before (`ahead`), and the
// entries before them when it is another slot. thread: threads count from here.
template <int kTokens>
__device__ __forceinline__ void store_window(const GatedDeltaRuleDecode& p, const Place& at, const Slots& slots,
                                             const WindowPart& part, int thread, uint4 ahead) {
    auto* window = p.window + slots.write * p.window_stride;
#pragma unroll 1
    for (int i = thread; i < part.chunks * kTokens; i += kThreads) {
        const int entry = (slots.context + i / part.chunks) % p.window_entries;
        const uint4 input = i < kThreads ? ahead : load_input<kTokens>(p, at, part, i);
        *reinterpret_cast<uint4*>(window + static_cast<int64_t>(entry) * p.channels +
                                  part.channel(p, at, i % part.chunks)) = input;
    }
    if (slots.read == slots.write || slots.context == 0) return;
    const auto* from = p.window + slots.read * p.window_stride;
    const int newest = slots.context % p.window_entries;
#pragma unroll 1
    for (int i = thread; i < part.chunks * p.window_entries; i += kThreads) {
        const int entry = i / part.chunks;
        const int token = entry >= newest ? entry - newest : entry - newest + p.window_entries;
        if (token < kTokens) continue;
        const int64_t offset = static_cast<int64_t>(entry) * p.channels + part.channel(p, at, i % part.chunks);
        *reinterpret_cast<uint4*>(window + offset) = *reinterpret_cast<const uint4*>(from + offset);
    }
}

// What the blocks of a group share and one of them stores: k and g of the ring's new rows, and the cursor.
template <int kTokens>
__device__ __forceinline__ void store_shared_state(const GatedDeltaRuleDecode& p, const Place& at, const Shared& shared,
                                                   const Slots& slots, int thread) {
    const int first_head = at.key_head * at.ratio;
    if (slots.fold && thread < at.ratio) {
        p.cursor[slots.write * p.cursor_stride + first_head + thread] = slots.context + 1;
    }
#pragma unroll 1
    for (int i = thread; i < kTokens * kDim; i += kThreads) {
        const int t = i / kDim, column = i % kDim;
        if (slots.fold && t == 0) continue;
        auto* row = p.ring + slots.write * p.ring_stride + (slots.context + t) % p.ring_rows * int64_t{p.ring_width};
        row[at.key_head * kDim + column] = shared.key[i] * shared.inverse[t];
        if (column < at.ratio) {
            row[(p.key_heads + p.value_heads) * kDim + first_head + column] = shared.g[column * kTokens + t];
        }
    }
}

}  // namespace tokenspeed::delta_rule
