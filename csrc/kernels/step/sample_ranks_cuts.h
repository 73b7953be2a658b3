// How sample_ranks.cu cuts a row by top-k, top-p and min-p: a bound and the lists of the few ids within it, or
// histograms over all ranks.
#pragma once
#include <algorithm>

#include "sample_ranks.h"

namespace tokenspeed::sampling_ranks {

// The bits of the smallest distance up to which the row's sum over all ranks reaches its target. kMasses: the sum is of
// the masses of distances of at most `last`, the target `share` of all of it; else it is the count and the target
// `share`. One exchange a level.
template <bool kMasses, typename T>
__device__ __forceinline__ uint32_t search(const SampleRanks& p, Exchange& exchange, Peers& peers,
                                           const Part<T>& part_of_row, uint32_t last, float share) {
    constexpr int kUnroll = sizeof(T) == 2 ? 2 : 1;  // what registers allow
    uint32_t low = 0, high = kInfinity;
    unsigned long long below = 0;  // sum of what lies under `low`
    double target = share;
    for (int level = 0; low < high; ++level) {
        int shift = 0;
        while (level > 0 && ((high - low) >> shift) >= kBins) ++shift;
        for (int i = 0; i < kPieces; ++i) exchange.bins[i][threadIdx.x] = 0;
        if (threadIdx.x == 0) exchange.found_bin = -1;
        __syncthreads();
#pragma unroll kUnroll
        for (int i = threadIdx.x; i < part_of_row.count; i += kThreads) {
            const float distance = part_of_row.distance(i);
            const uint32_t bits = __float_as_uint(distance);
            if (bits < low || bits > high || bits > last) continue;
            const int bin = level == 0 ? static_cast<int>(fminf(distance * kLinearBins, kBins - 1))
                                       : static_cast<int>((bits - low) >> shift);
            if constexpr (kMasses) {
                const unsigned long long mass = mass_of(distance);
                if (mass == 0) continue;
                add_mass(exchange.bins, bin, mass);
            } else {
                atomicAdd(&exchange.bins[0][bin], 1u);
            }
        }
        ptx::cluster_sync();
        ++peers.tag;
        if (blockIdx.x == 0) {
            unsigned long long own = 0;
#pragma unroll 1
            for (int block = 0; block < gridDim.x; ++block) {
                for (int piece = 0; piece < (kMasses ? kPieces : 1); ++piece) {
                    const uint32_t part = *ptx::cluster_map(&exchange.bins[piece][threadIdx.x], block);
                    own += static_cast<unsigned long long>(part) << (piece * kPieceBits);
                }
            }
            peers.push(p, threadIdx.x, static_cast<uint32_t>(own), static_cast<uint32_t>(own >> 32));
            unsigned long long all = 0;
#pragma unroll 1
            for (int source = 0; source < p.ranks; ++source) all += joined(peers.pull(p, source, threadIdx.x));
            exchange.sums[threadIdx.x] = all;
        }
        ptx::cluster_sync();
        const unsigned long long mine = ptx::cluster_map(exchange.sums, 0)[threadIdx.x];
        const unsigned long long sum = below + block_running_sum(exchange, mine);
        if (kMasses && level == 0) {
            unsigned long long total = 0;
            for (int i = 0; i < kWarps; ++i) total += exchange.warp_totals[i];
            target = fmax(static_cast<double>(share) * static_cast<double>(total), 1.0);
        }
        if (static_cast<double>(sum) >= target && static_cast<double>(sum - mine) < target) {
            exchange.found_bin = threadIdx.x;  // one thread at most
            exchange.found_before = sum - mine;
        }
        __syncthreads();
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

// The k-th largest of the largest logits of the cluster's warps: no fewer than k ids of this rank reach it. Called by
// one block.
inline __device__ float bound_of_top_k(Exchange& exchange, const float* warp_largest, int k) {
    auto* all = reinterpret_cast<float*>(exchange.bins[0]);
    const int warps = gridDim.x * kWarps, mine = threadIdx.x;
    if (mine < warps) all[mine] = ptx::cluster_map(warp_largest, mine / kWarps)[mine % kWarps];
    if (mine == 0) exchange.bound = -INFINITY;
    __syncthreads();
    if (mine < warps) {
        int larger = 0;
        for (int i = 0; i < warps; ++i) larger += all[i] > all[mine] || (all[i] == all[mine] && i < mine);
        if (larger == k - 1) exchange.bound = all[mine];
    }
    __syncthreads();
    return exchange.bound;
}

// The smallest of a few distances within which `share` of the row's mass lies, and the mass of the row; infinity where
// none holds it, or more ids than the lists take. One exchange.
template <typename T>
__device__ __forceinline__ float bound_of_top_p(const SampleRanks& p, Exchange& exchange, Peers& peers,
                                                const Part<T>& part, float share, unsigned long long& row_mass) {
    constexpr float kDistances[kBounds] = {2.0f, 5.0f, 12.0f};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned long long sums[kBounds + 1] = {};
    uint32_t counts = 0;  // of each bound, 8 bits: a thread has 196 ids at most
    static_assert(kBounds <= 4 && kSampleMaxVocabulary / (2 * kThreads) < 255);
#pragma unroll 2
    for (int i = threadIdx.x; i < part.count; i += kThreads) {
        const float distance = part.distance(i);
        if (!(distance <= INFINITY)) continue;
        const unsigned long long mass = mass_of(distance);
#pragma unroll
        for (int j = 0; j < kBounds; ++j) {
            sums[j] += distance <= kDistances[j] ? mass : 0;
            counts += distance <= kDistances[j] ? 1u << (8 * j) : 0;
        }
        sums[kBounds] += mass;
    }
#pragma unroll
    for (int j = 0; j < kBounds; ++j) {
        const int ids = __reduce_add_sync(kAllLanes, static_cast<int>(counts >> (8 * j) & 0xff));
        if (lane == 0) exchange.ids_within[j][warp] = ids;
    }
#pragma unroll
    for (int j = 0; j <= kBounds; ++j) {
#pragma unroll
        for (int offset = 16; offset > 0; offset /= 2) sums[j] += __shfl_xor_sync(kAllLanes, sums[j], offset);
        if (lane == 0) exchange.mass_within[j][warp] = sums[j];
    }
    __syncthreads();
    const int which = threadIdx.x;  // of the sums: masses within the bounds, the row's, and counts
    if (which < kSums) {
        unsigned long long total = 0;
        for (int i = 0; i < kWarps; ++i) {
            total += which <= kBounds ? exchange.mass_within[which][i] : exchange.ids_within[which - kBounds - 1][i];
        }
        exchange.sums[which] = total;
    }
    ptx::cluster_sync();
    ++peers.tag;
    if (blockIdx.x == 0) {
        if (which < kSums) {
            unsigned long long own = 0;
#pragma unroll 1
            for (int block = 0; block < gridDim.x; ++block) own += ptx::cluster_map(exchange.sums, block)[which];
            peers.push(p, which, static_cast<uint32_t>(own), static_cast<uint32_t>(own >> 32));
        }
        if (which < kSums * p.ranks) exchange.pulled[which] = peers.pull(p, which / kSums, which % kSums);
        __syncthreads();
        if (which < kSums) {
            unsigned long long all = 0;
#pragma unroll 1
            for (int rank = 0; rank < p.ranks; ++rank) all += joined(exchange.pulled[rank * kSums + which]);
            exchange.sums[which] = all;
        }
    }
    ptx::cluster_sync();
    const unsigned long long* all = ptx::cluster_map(exchange.sums, 0);
    row_mass = all[kBounds];
    const double target = fmax(static_cast<double>(share) * static_cast<double>(row_mass), 1.0);
    float bound = INFINITY;
    unsigned long long ids = 0;
#pragma unroll
    for (int j = kBounds - 1; j >= 0; --j) {
        if (static_cast<double>(all[j]) < target) continue;
        bound = kDistances[j];
        ids = all[kBounds + 1 + j];
    }
    if (ids > kMerged) bound = INFINITY;
    return bound;
}

// Lists this block's ids within `bound` and sends them. How many there are of all ranks, for every block; more than
// kMerged where some were not sent. One exchange, whose head has come.
template <typename T>
__device__ __forceinline__ int send_list(const SampleRanks& p, Exchange& exchange, Peers& peers, const Part<T>& part,
                                         float bound) {
    if (threadIdx.x == 0) exchange.listed = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < part.count; i += kThreads) {
        const float distance = part.distance(i);
        if (!(distance <= bound)) continue;
        const int place = atomicAdd(&exchange.listed, 1);
        if (place >= kList) continue;
        exchange.list_distance[place] = distance;
        exchange.list_id[place] = part.first + i;
    }
    ptx::cluster_sync();
    ++peers.tag;
    int own = 0, before = 0;
#pragma unroll 1
    for (int block = 0; block < gridDim.x; ++block) {
        const int listed = *ptx::cluster_map(&exchange.listed, block);
        before += block < blockIdx.x ? listed : 0;
        own = listed > kList ? kMerged + 1 : min(own + listed, kMerged + 1);
        if (listed > kList) break;
    }
    if (own <= kMerged && threadIdx.x < exchange.listed) {
        peers.push(p, 1 + before + threadIdx.x, __float_as_uint(exchange.list_distance[threadIdx.x]),
                   exchange.list_id[threadIdx.x]);
    }
    if (blockIdx.x == 0 && threadIdx.x < 32) {
        const int lane = threadIdx.x;
        if (lane == 0) peers.push(p, 0, own, 0);
        if (lane < p.ranks) {
            const int count = static_cast<int>(peers.pull(p, lane, 0).x);
            exchange.pulled[lane].x = min(max(count, 0), kMerged + 1);
        }
        __syncwarp();
        if (lane == 0) {
            int all = 0;
#pragma unroll 1
            for (int rank = 0; rank < p.ranks; ++rank) all += static_cast<int>(exchange.pulled[rank].x);
            exchange.all_listed = all;
        }
    }
    ptx::cluster_sync();
    return *ptx::cluster_map(&exchange.all_listed, 0);
}

__device__ __forceinline__ Noise noise_of(const SampleRanks& p, int row) {
    return {static_cast<uint64_t>(p.seed[row]), static_cast<uint64_t>(p.output[row])};
}

// The largest distance that min-p keeps.
__device__ __forceinline__ float limit_of_min_p(const SampleRanks& p, int row) {
    return -logf(p.min_p[row]);
}

// The id that is drawn from the lists of all ranks, `count` ids in all, by one block: which cuts by top-k (0: not), by
// top-p of the mass of what is left or of the row, and by min-p, and draws. For thread 0.
__device__ __forceinline__ Best draw_from_lists(const SampleRanks& p, Exchange& exchange, Peers& peers, int count,
                                                int row, int top_k, unsigned long long row_mass) {
    auto* distances = reinterpret_cast<float*>(exchange.bins[0]);
    auto* ids = reinterpret_cast<int*>(exchange.bins[1]);
    const int mine = threadIdx.x;
    const bool holds = mine < count;
    const float top_p = p.top_p[row];
    float limit = limit_of_min_p(p, row);
    if (holds) {
        int source = 0, place = mine;
        while (place >= static_cast<int>(exchange.pulled[source].x)) place -= exchange.pulled[source++].x;
        const Best entry = best_of(peers.pull(p, source, 1 + place));
        distances[mine] = entry.value;
        ids[mine] = entry.id;
    }
    if (mine == 0) exchange.bound = INFINITY;
    __syncthreads();
    const float distance = holds ? distances[mine] : INFINITY;
    if (top_k > 0) {
        int smaller = 0, equal = 0, equal_before = 0;
#pragma unroll 1
        for (int i = 0; holds && i < count; ++i) {
            smaller += distances[i] < distance;
            equal += distances[i] == distance;
            equal_before += distances[i] == distance && i < mine;
        }
        if (holds && smaller < top_k && smaller + equal >= top_k && equal_before == 0) exchange.bound = distance;
        __syncthreads();
        limit = fminf(limit, exchange.bound);
    }
    const float last = exchange.bound;
    __syncthreads();
    if (top_p < 1) {
        if (holds) exchange.sums[mine] = distance <= last ? mass_of(distance) : 0;
        if (mine == 0) exchange.bound = INFINITY;
        __syncthreads();
        if (holds) {
            unsigned long long smaller = 0, through = 0, total = 0;
            bool first = true;  // of those at this distance
#pragma unroll 1
            for (int i = 0; i < count; ++i) {
                const unsigned long long mass = exchange.sums[i];
                total += mass;
                if (distances[i] < distance) smaller += mass;
                if (distances[i] <= distance) through += mass;
                first = first && !(distances[i] == distance && i < mine);
            }
            if (top_k == 0) total = row_mass;
            const double target = fmax(static_cast<double>(top_p) * static_cast<double>(total), 1.0);
            if (first && static_cast<double>(through) >= target && static_cast<double>(smaller) < target)
                exchange.bound = distance;
        }
        __syncthreads();
        limit = fminf(limit, exchange.bound);
    }
    Best best = {-INFINITY, INT32_MAX};
    if (holds && distance <= limit) best = {noise_of(p, row).score(ids[mine], distance), ids[mine]};
    return block_best(exchange, best);
}

}  // namespace tokenspeed::sampling_ranks
