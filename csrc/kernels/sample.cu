// One id a row by temperature, top-k, top-p and min-p, without a sort. Contract: tokenspeed/ops/sampling.py.
//
// A cluster of eight blocks holds a row in shared memory (248,320 logits: 121 KB a block), so device memory sees each
// logit once: 0.5 MB a row in bf16, 0.1 us of bandwidth; what counts is the chain of cluster barriers.
//   1. scale, largest value (and its lowest id, which is the answer at temperature 0)
//   2. distances d = max - x >= 0, whose bits order as integers
//   3. top-k, then top-p: the smallest distance at which a running sum (of ones, of masses) reaches its target, by
//      histograms that narrow the range of bits: the first level has linear bins of 1/16, where logits spread evenly
//      and no bin is crowded, the others 512 equal ranges of bits, usually two more levels to the very value
//   4. Philox noise for what is left, four ids a call, and the largest Gumbel score
// Masses are integers (2^40 the likeliest) summed in three 14-bit pieces by native 32-bit atomics, so no order of
// threads or blocks changes a sum; scores compare with the id as the tie-break. One pass of a level is about 30
// shared-memory atomics a thread and two cluster barriers.
//
// Tried and lost: two-byte loads by 512 threads and two logarithms for every id: greedy 13 us, temperature 37 us, top-k
// and top-p 56 us for one row. Now 16-byte loads, and a bound on the noise that spares the logarithms of ids that
// cannot win.
//
// Predicted: one row of 248,320 bf16, greedy 6 us, temperature 13 us, top-k and top-p 28 us.
//
// budget: sample_kernel registers<=64 shared<=0 hot
#include <launch.h>
#include <ptx.h>

#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kBlocks = 8;  // per row: one cluster
constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = kThreads;
constexpr int kPieces = 3;
constexpr int kPieceBits = 14;
constexpr float kMass = 1099511627776.0f;  // 2^40
constexpr float kLinearBins = 32;          // per unit of distance
constexpr uint32_t kInfinity = 0x7f800000;

struct Best {
    float value;
    int id;
};

struct Exchange {  // of dynamic shared memory, before the row
    uint32_t bins[kPieces][kBins];
    unsigned long long warp_totals[kWarps];
    Best warp_best[kWarps];
    Best block_best[2];  // of the largest logit, of the largest score; the cluster reads them
    unsigned long long found_before;
    int found_bin;
};

__device__ __forceinline__ Best better(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

// The best of the cluster, for every thread. `slot`: each slot serves once a launch.
__device__ Best cluster_best(Exchange& exchange, Best best, int slot) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        best = better(
            best, {__shfl_xor_sync(0xffffffffu, best.value, offset), __shfl_xor_sync(0xffffffffu, best.id, offset)});
    }
    if (lane == 0) exchange.warp_best[warp] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < kWarps; ++i) best = better(best, exchange.warp_best[i]);
        exchange.block_best[slot] = best;
    }
    ptx::cluster_sync();
    best = *ptx::cluster_map(&exchange.block_best[slot], 0);
    for (int i = 1; i < kBlocks; ++i) best = better(best, *ptx::cluster_map(&exchange.block_best[slot], i));
    return best;
}

__device__ __forceinline__ unsigned long long mass_of(float distance) {
    return static_cast<unsigned long long>(expf(-distance) * kMass);
}

// The inclusive sum over the threads of the block up to this one.
__device__ unsigned long long block_running_sum(Exchange& exchange, unsigned long long x) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const unsigned long long below = __shfl_up_sync(0xffffffffu, x, offset);
        if (lane >= offset) x += below;
    }
    if (lane == 31) exchange.warp_totals[warp] = x;
    __syncthreads();
    for (int i = 0; i < warp; ++i) x += exchange.warp_totals[i];
    return x;
}

// The bits of the smallest distance up to which the row's sum reaches its target. kMasses: the sum is of the masses of
// distances of at most `last`, the target `share` of all of it; else it is the count and the target `share`.
template <bool kMasses>
__device__ uint32_t search(Exchange& exchange, const float* distances, int count, uint32_t last, double share) {
    uint32_t low = 0, high = kInfinity;
    unsigned long long below = 0;  // sum of what lies under `low`
    double target = share;
    for (int level = 0; low < high; ++level) {
        int shift = 0;
        while (level > 0 && ((high - low) >> shift) >= kBins) ++shift;
        for (int i = 0; i < kPieces; ++i) exchange.bins[i][threadIdx.x] = 0;
        if (threadIdx.x == 0) exchange.found_bin = -1;
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += kThreads) {
            const uint32_t bits = __float_as_uint(distances[i]);
            if (bits < low || bits > high || bits > last) continue;
            const int bin = level == 0 ? static_cast<int>(fminf(distances[i] * kLinearBins, kBins - 1))
                                       : static_cast<int>((bits - low) >> shift);
            if constexpr (kMasses) {
                const unsigned long long mass = mass_of(distances[i]);
                if (mass == 0) continue;
                for (int piece = 0; piece < kPieces; ++piece) {
                    const auto part = static_cast<uint32_t>(mass >> (piece * kPieceBits)) & ((1u << kPieceBits) - 1);
                    if (part != 0) atomicAdd(&exchange.bins[piece][bin], part);
                }
            } else {
                atomicAdd(&exchange.bins[0][bin], 1u);
            }
        }
        ptx::cluster_sync();
        unsigned long long mine = 0;
        for (int block = 0; block < kBlocks; ++block) {
            for (int piece = 0; piece < (kMasses ? kPieces : 1); ++piece) {
                const uint32_t part = *ptx::cluster_map(&exchange.bins[piece][threadIdx.x], block);
                mine += static_cast<unsigned long long>(part) << (piece * kPieceBits);
            }
        }
        const unsigned long long sum = below + block_running_sum(exchange, mine);
        if (kMasses && level == 0) {
            unsigned long long total = 0;
            for (int i = 0; i < kWarps; ++i) total += exchange.warp_totals[i];
            target = fmax(share * static_cast<double>(total), 1.0);
        }
        if (static_cast<double>(sum) >= target && static_cast<double>(sum - mine) < target) {
            exchange.found_bin = threadIdx.x;  // one thread at most
            exchange.found_before = sum - mine;
        }
        ptx::cluster_sync();  // also: the peers have read this block's bins
        const int bin = exchange.found_bin;
        if (bin < 0) return kInfinity;
        below = exchange.found_before;
        if (level == 0) {
            low = __float_as_uint(static_cast<float>(bin) / kLinearBins);
            high = bin == kBins - 1 ? kInfinity : __float_as_uint(static_cast<float>(bin + 1) / kLinearBins) - 1;
        } else {
            low += static_cast<uint32_t>(bin) << shift;
            high = min(high, low + ((1u << shift) - 1));
        }
        __syncthreads();  // before found_bin is cleared
    }
    return low;
}

struct Words {
    uint32_t x[4];
};

// Philox 4x32-10 (Salmon et al. 2011).
__device__ __forceinline__ Words philox(uint32_t c0, uint32_t c1, uint32_t c2, uint32_t c3, uint32_t k0, uint32_t k1) {
#pragma unroll
    for (int i = 0; i < 10; ++i) {
        if (i > 0) k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
        const uint32_t high_0 = __umulhi(0xD2511F53u, c0), low_0 = 0xD2511F53u * c0;
        const uint32_t high_1 = __umulhi(0xCD9E8D57u, c2), low_1 = 0xCD9E8D57u * c2;
        c0 = high_1 ^ c1 ^ k0;
        c1 = low_1;
        c2 = high_0 ^ c3 ^ k1;
        c3 = low_0;
    }
    return {{c0, c1, c2, c3}};
}

__device__ __forceinline__ float uniform(uint32_t word) {
    return fminf(static_cast<float>(word) * 0x1p-32f + 0x1p-33f, 1.0f - 0x1p-24f);
}

__device__ __forceinline__ float gumbel(float uniform) {
    return -logf(-log1pf(-uniform));
}

// Whether gumbel(uniform) surely stays below `needed`: it is at most -log(uniform). Spares most ids two logarithms.
__device__ __forceinline__ bool cannot_reach(float uniform, float needed) {
    return uniform > ptx::exp2_approximate(needed * -1.44269504f) * 1.001f;
}

__device__ __forceinline__ float to_fp32(float x) {
    return x;
}
__device__ __forceinline__ float to_fp32(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ Sample p) {
    DYNAMIC_SHARED(storage);
    auto& exchange = *reinterpret_cast<Exchange*>(storage);
    auto* distances = reinterpret_cast<float*>(storage + sizeof(Exchange));
    const int row = blockIdx.y, chunk = p.chunk;
    const int first = blockIdx.x * chunk, count = max(0, min(chunk, p.vocabulary - first));
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    const float temperature = p.temperature[row];
    const bool greedy = !(temperature > 0);
    const auto* logits = static_cast<const T*>(p.logits) + row * p.logits_stride + first;
    Best best = {-INFINITY, INT32_MAX};
    const auto take = [&](int i, float logit) {
        const float x = greedy ? logit : logit / temperature;
        if (!greedy) distances[i] = x;
        best = better(best, {x, first + i});
    };
    constexpr int kVector = 16 / sizeof(T);
    const int vectors = p.vectors ? count / kVector : 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
        const uint4 bits = ptx::load_16_no_allocate(logits + i * kVector);
#pragma unroll
        for (int j = 0; j < kVector; ++j) take(i * kVector + j, to_fp32(reinterpret_cast<const T*>(&bits)[j]));
    }
    for (int i = vectors * kVector + threadIdx.x; i < count; i += kThreads) take(i, to_fp32(logits[i]));
    best = cluster_best(exchange, best, 0);
    if (!greedy) {
        for (int i = threadIdx.x; i < count; i += kThreads) distances[i] = best.value - distances[i];
        const int top_k = p.top_k[row];
        const float top_p = p.top_p[row];
        uint32_t last = kInfinity;
        __syncthreads();
        if (top_k > 0 && top_k < p.vocabulary) last = search<false>(exchange, distances, count, last, top_k);
        if (top_p < 1) last = search<true>(exchange, distances, count, last, top_p);
        const float limit = fminf(__uint_as_float(last), -logf(p.min_p[row]));

        const auto seed = static_cast<uint64_t>(p.seed[row]), index = static_cast<uint64_t>(p.index[row]);
        best = {-INFINITY, INT32_MAX};
        for (int i = threadIdx.x * 4; i < count; i += kThreads * 4) {
            bool kept = false;
            for (int j = 0; j < 4; ++j) kept = kept || (i + j < count && distances[i + j] <= limit);
            if (!kept) continue;
            const Words words =
                philox((first + i) / 4, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0,
                       static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (i + j >= count || !(distances[i + j] <= limit)) continue;
                const float noise = uniform(words.x[j]);
                if (cannot_reach(noise, best.value + distances[i + j])) continue;
                best = better(best, {gumbel(noise) - distances[i + j], first + i + j});
            }
        }
        best = cluster_best(exchange, best, 1);
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) p.ids[row] = best.id == INT32_MAX ? 0 : best.id;
    ptx::cluster_sync();  // nobody leaves while a peer may read its shared memory
}

}  // namespace

bool sample_supported(const Sample& p) {
    return p.rows >= 1 && p.rows <= 65535 && p.vocabulary >= 1 && p.vocabulary <= kSampleMaxVocabulary;
}

cudaError_t sample(Sample p, cudaStream_t stream) {
    if (!sample_supported(p)) return cudaErrorInvalidValue;
    p.chunk = ((p.vocabulary + kBlocks - 1) / kBlocks + 7) / 8 * 8;  // whole vectors; a Philox call serves four ids
    const int vector = p.logits_are_float ? 4 : 8;
    p.vectors = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && p.logits_stride % vector == 0;
    const LaunchConfig config = {.grid = dim3(kBlocks, p.rows),
                                 .block = dim3(kThreads),
                                 .shared_bytes = sizeof(Exchange) + p.chunk * sizeof(float),
                                 .stream = stream,
                                 .cluster = dim3(kBlocks),
                                 .programmatic = true};
    return launch(p.logits_are_float ? sample_kernel<float> : sample_kernel<__nv_bfloat16>, config, p);
}

}  // namespace tokenspeed
