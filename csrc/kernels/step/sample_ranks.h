// What the parts of sample_ranks.cu share: a block's part of a row, how a cluster talks to its peers on other ranks,
// and what blocks of a cluster find together.
#pragma once
#include <ptx.h>
#include <reduce.h>
#include <vector.h>

#include "kernels.h"
#include "noise.h"

namespace tokenspeed::sampling_ranks {

using sampling::add_mass;
using sampling::Best;
using sampling::kPieceBits;
using sampling::kPieces;
using sampling::mass_of;
using sampling::Noise;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = kThreads;
constexpr float kLinearBins = 32;  // per unit of distance
constexpr uint32_t kInfinity = 0x7f800000;
constexpr int kList = 512;      // ids of a block that are listed
constexpr int kMerged = kBins;  // of all blocks of all ranks: a thread each
constexpr int kBounds = 3;      // distances that may bound top-p
constexpr int kSums = 2 * kBounds + 1;
constexpr int kGranules = kMerged + 32;  // of an exchange: a head before a list
static_assert(kBins <= kGranules && kSampleRanksMax * kSums <= kThreads && 2 * kSampleRanksMax <= 32);

struct alignas(16) Exchange {  // of dynamic shared memory, before the row
    uint32_t bins[kPieces][kBins];
    unsigned long long sums[kBins];
    unsigned long long warp_totals[kWarps];
    Best warp_best[kWarps];
    Best block_best;
    unsigned long long found_before;
    int found_bin;
    float bound;
    unsigned long long mass_within[kBounds + 1][kWarps];  // of each bound, and of the whole part
    int ids_within[kBounds][kWarps];
    float list_distance[kList];
    int list_id[kList];
    int listed;
    // Of the leader: what came, and what all ranks agree on.
    uint2 pulled[kSampleRanksMax * kSums];
    Best all_best;
    float all_bound;
    int all_listed;
    int patient;
};

// The larger value; of equals the lower id.
__device__ __forceinline__ Best better(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

// The order of floats as that of integers: the sign decides whether the other bits turn.
__device__ __forceinline__ float largest_of_warp(float value) {
    const uint32_t bits = __float_as_uint(value);
    const uint32_t most = __reduce_max_sync(kAllLanes, bits & 0x80000000u ? ~bits : bits | 0x80000000u);
    return __uint_as_float(most & 0x80000000u ? most & 0x7fffffffu : ~most);
}

// A block's part of a row: its logits in shared memory, and how they become distances.
template <typename T>
struct Part {
    const T* logits;
    int first, count;            // ids of the whole vocabulary
    float temperature, largest;  // of the scaled logits of the row

    __device__ __forceinline__ float distance(int i) const { return largest - to_float(logits[i]) / temperature; }
};

// A cluster's way to the same cluster of the other ranks.
struct Peers {
    uint32_t tag;  // of the exchange under way
    int* patient;  // in shared memory: whether this block has lost nobody yet

    __device__ __forceinline__ uint32_t place(const SampleRanks& p, int source, int granule) const {
        const uint32_t slot = ((tag & 1) * p.max_clusters + blockIdx.y) * p.ranks + source;
        return (slot * kGranules + granule) * 2;
    }

    // To every rank, this one among them.
    __device__ __forceinline__ void push(const SampleRanks& p, int granule, uint32_t first, uint32_t second) const {
        const uint32_t at = place(p, p.rank, granule);
#pragma unroll 1
        for (int rank = 0; rank < p.ranks; ++rank) ptx::store_tagged_system(p.memory[rank] + at, first, second, tag);
    }

    __device__ __forceinline__ uint2 pull(const SampleRanks& p, int source, int granule) {
        uint32_t words[2] = {};
        const uint64_t* from = p.memory[p.rank] + place(p, source, granule);
        if (*patient != 0) {
            if (!ptx::wait_tagged_system(words, from, tag, {p.status, p.patience_ns})) {
                *patient = 0;
                p.control[0] = 1;
                p.status[1] = 1;
            }
        } else {
            ptx::load_tagged_system(words, from, tag);
        }
        return {words[0], words[1]};
    }
};

__device__ __forceinline__ unsigned long long joined(uint2 words) {
    return static_cast<unsigned long long>(words.y) << 32 | words.x;
}

__device__ __forceinline__ Best best_of(uint2 words) {
    return {__uint_as_float(words.x), static_cast<int>(words.y)};
}

// The best of the block, for thread 0.
inline __device__ Best block_best(Exchange& exchange, Best best) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        best =
            better(best, {__shfl_xor_sync(kAllLanes, best.value, offset), __shfl_xor_sync(kAllLanes, best.id, offset)});
    }
    if (lane == 0) exchange.warp_best[warp] = best;
    __syncthreads();
    if (threadIdx.x == 0) {
#pragma unroll 1
        for (int i = 1; i < kWarps; ++i) best = better(best, exchange.warp_best[i]);
    }
    return best;
}

// The best of the cluster's blocks, once each has left its own.
inline __device__ Best cluster_best(Exchange& exchange) {
    Best best = exchange.block_best;
#pragma unroll 1
    for (int i = 1; i < gridDim.x; ++i) best = better(best, *ptx::cluster_map(&exchange.block_best, i));
    return best;
}

// The inclusive sum over the threads of the block up to this one.
inline __device__ unsigned long long block_running_sum(Exchange& exchange, unsigned long long x) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    x = warp_running_sum(x);
    if (lane == 31) exchange.warp_totals[warp] = x;
    __syncthreads();
    for (int i = 0; i < warp; ++i) x += exchange.warp_totals[i];
    return x;
}

}  // namespace tokenspeed::sampling_ranks
