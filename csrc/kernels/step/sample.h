// What the parts of sample.cu share: logits as they are read, noise, what a row asks for, distances and bins, and the
// memory through which blocks and threads exchange what they found.
#pragma once
#include <ptx.h>
#include <reduce.h>
#include <vector.h>

#include "kernels.h"
#include "noise.h"

namespace tokenspeed::sampling {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kMaxBlocks = 128;  // of a row
constexpr int kBlocksPerMultiprocessor = 3;
constexpr int kRowsAtOnce = 1024;      // of a launch, which bounds the workspace
constexpr int kOctet = 8;              // consecutive ids of a thread: 16 bytes of bf16, two calls of Philox
constexpr int kSegment = 32 * kOctet;  // of a warp; those of a block lie `blocks` segments apart
constexpr int kFewestGroups = 256;     // of a row; less than twice as many
constexpr int kBins = kThreads;
constexpr float kLinearBins = 8;  // per unit of distance
constexpr uint32_t kInfinity = 0x7f800000;
constexpr int kList = 512;       // ids within the bound of top-k, compared each with each
constexpr int kGathered = 2048;  // ids up to the bin of a cut
constexpr int kListTopK = 128;   // the largest top-k that groups bound
constexpr int kHalvesTopK = 48;  // up to here half as many groups do

using Key = unsigned long long;  // a value in the order of floats, then the id counted backwards; 0 is none

// Of one row, in the workspace.
struct alignas(16) RowState {
    Key sums[kBins];  // masses or counts
    Key bests[kBins];
    uint32_t done, listed;
    uint32_t unused[2];
    Best largest[kMaxBlocks];
    float group_largest[2 * kFewestGroups];
    float list_distance[kList];
    int list_id[kList];
};

struct alignas(16) Exchange {
    uint32_t pieces[kPieces][kBins];
    Key bests[kBins];
    float values[2 * kFewestGroups];
    Key warp_values[kWarps];
    Key masses[kList];
    float distances[kGathered];
    int ids[kGathered];
    Key before, own, best;  // of the bin of a cut: masses before it, its own, its best score
    uint32_t bound;
    int found, count, last;
};

// The order of floats as that of integers. -0 is taken for 0.
__device__ __forceinline__ uint32_t ordered(float x) {
    const uint32_t bits = __float_as_uint(x + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t bits) {
    return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

__device__ __forceinline__ Key key_of(float value, int id) {
    return static_cast<Key>(ordered(value)) << 32 | ~static_cast<uint32_t>(id);
}
__device__ __forceinline__ float value_of(Key key) {
    return from_ordered(static_cast<uint32_t>(key >> 32));
}
__device__ __forceinline__ int id_of(Key key) {
    return static_cast<int>(~static_cast<uint32_t>(key));
}

__device__ __forceinline__ Key warp_largest(Key key) {
    const auto high = static_cast<uint32_t>(key >> 32);
    const uint32_t most = __reduce_max_sync(kAllLanes, high);
    const uint32_t low = __reduce_max_sync(kAllLanes, high == most ? static_cast<uint32_t>(key) : 0u);
    return static_cast<Key>(most) << 32 | low;
}

// The largest of the block, for every thread. Ends behind a barrier.
inline __device__ Key block_largest(Exchange& exchange, Key key) {
    key = warp_largest(key);
    if (threadIdx.x % 32 == 0) exchange.warp_values[threadIdx.x / 32] = key;
    __syncthreads();
    for (int i = 0; i < kWarps; ++i) key = max(key, exchange.warp_values[i]);
    __syncthreads();
    return key;
}

// The inclusive sum over the threads of the block up to this one, and that of all. Ends behind a barrier.
inline __device__ Key block_running_sum(Exchange& exchange, Key x, Key& total) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    x = warp_running_sum(x);
    if (lane == 31) exchange.warp_values[warp] = x;
    __syncthreads();
    total = 0;
    for (int i = 0; i < kWarps; ++i) {
        if (i < warp) x += exchange.warp_values[i];
        total += exchange.warp_values[i];
    }
    __syncthreads();
    return x;
}

// Eight consecutive logits, as they lie in memory.
template <typename T>
struct Octet {
    static constexpr int kWords = kOctet * sizeof(T) / 4;
    uint32_t words[kWords];

    __device__ __forceinline__ float operator[](int j) const {
        if constexpr (sizeof(T) == 4) {
            return __uint_as_float(words[j]);
        } else {
            return __uint_as_float(j % 2 == 0 ? words[j / 2] << 16 : words[j / 2] & 0xffff0000u);
        }
    }
};

template <typename T>
struct Logits {
    const T* row;
    int vocabulary;
    bool vectors;  // may be read 16 bytes at a time

    __device__ __forceinline__ bool is_whole(int octet) const { return vectors && (octet + 1) * kOctet <= vocabulary; }
    __device__ __forceinline__ Octet<T> load_whole(int octet) const {
        Octet<T> x;
#pragma unroll
        for (int i = 0; i < Octet<T>::kWords; i += 4) {
            const uint4 four = ptx::load_16_no_allocate(reinterpret_cast<const uint32_t*>(row + octet * kOctet) + i);
            x.words[i] = four.x, x.words[i + 1] = four.y, x.words[i + 2] = four.z, x.words[i + 3] = four.w;
        }
        return x;
    }
    // One by one, and -inf behind the vocabulary.
    __device__ __forceinline__ Octet<T> load_ragged(int octet) const {
        Octet<T> x = {};
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
            const int id = octet * kOctet + j;
            const uint32_t bits = __float_as_uint(id < vocabulary ? to_float(row[id]) : -INFINITY);
            if constexpr (sizeof(T) == 4) {
                x.words[j] = bits;
            } else {
                x.words[j / 2] |= j % 2 == 0 ? bits >> 16 : bits;  // fp32 of bf16: the low half is zero
            }
        }
        return x;
    }
    __device__ __forceinline__ Octet<T> load(int octet) const {
        return is_whole(octet) ? load_whole(octet) : load_ragged(octet);
    }
};

// What a row asks for.
struct Request {
    float temperature, top_p, farthest;  // farthest: the largest distance that min-p keeps
    int top_k;
    bool greedy, lists, bins, counts;

    // at: where the row's values stand.
    __device__ __forceinline__ Request(const Sample& p, int64_t at) {
        temperature = p.temperature[at];
        top_p = p.top_p[at];
        farthest = -logf(p.min_p[at]);
        top_k = p.top_k[at] < p.vocabulary ? max(p.top_k[at], 0) : 0;
        greedy = !(temperature > 0);
        lists = !greedy && top_k > 0 && top_k <= kListTopK;
        counts = !greedy && top_k > kListTopK;
        bins = counts || (!greedy && top_k == 0 && top_p < 1);
    }
    // Whether scores are wanted of what a block has, and not of what the last block has listed.
    __device__ __forceinline__ bool scores() const { return !greedy && !lists && !counts; }
};

// From logits to distances.
struct Scale {
    float largest_logit, largest, temperature;  // largest: scaled

    __device__ __forceinline__ float distance(float logit) const { return largest - logit / temperature; }
    // Logits below are surely farther than `distance`.
    __device__ __forceinline__ float least_logit(float distance) const {
        const float least = largest_logit - distance * temperature;
        return least - (fabsf(largest_logit) + fabsf(least)) * 0x1p-20f;
    }
};

// Bins of distance. The first has the likeliest alone, and those that tie with it.
struct Bins {
    float per_unit;

    __device__ __forceinline__ explicit Bins(const Request& request)
        : per_unit(request.counts ? kLinearBins * request.temperature : kLinearBins) {}
    __device__ __forceinline__ int of(float distance) const {
        return distance > 0 ? 1 + static_cast<int>(fminf(distance * per_unit, kBins - 2)) : 0;
    }
    // A distance that no id of the bin exceeds.
    __device__ __forceinline__ float end(int bin) const {
        return bin == kBins - 1 ? INFINITY : static_cast<float>(bin) / per_unit * 1.0001f;
    }
};

}  // namespace tokenspeed::sampling
