// How sample.cu cuts a row by top-k and top-p: a bound before ids are listed, and the last block's choice among what
// all blocks have left.
#pragma once
#include "sample.h"

namespace tokenspeed::sampling {

// The k-th largest of the groups' largest logits: no fewer than k ids reach it. For every thread.
inline __device__ float bound_of_top_k(Exchange& exchange, const RowState& state, int groups, int k) {
    const bool halves = k <= kHalvesTopK;
    const int count = halves ? groups / 2 : groups;
    const int fours = (count + 3) / 4;
    for (int i = threadIdx.x; i < fours * 4; i += kThreads) {
        float value = -INFINITY;
        if (i < count) value = state.group_largest[halves ? 2 * i : i];
        if (i < count && halves) value = fmaxf(value, state.group_largest[2 * i + 1]);
        exchange.values[i] = value;
    }
    if (threadIdx.x == 0) exchange.bound = 0xffffffffu;
    __syncthreads();
    uint32_t bound = 0xffffffffu;
    for (int mine = threadIdx.x; mine < count; mine += kThreads) {
        const float value = exchange.values[mine];
        int larger = 0;
#pragma unroll 4
        for (int i = 0; i < fours; ++i) {
            const float4 four = reinterpret_cast<const float4*>(exchange.values)[i];
            larger += (four.x > value) + (four.y > value) + (four.z > value) + (four.w > value);
        }
        if (larger < k) bound = min(bound, ordered(value));
    }
    bound = __reduce_min_sync(kAllLanes, bound);
    if (threadIdx.x % 32 == 0) atomicMin(&exchange.bound, bound);
    __syncthreads();
    return from_ordered(exchange.bound);
}

// Ids with their distances: some, listed in shared memory, or a whole row.
template <typename T>
struct Ids {
    const float* distances;  // nullptr: the whole row
    const int* ids;
    const T* row;
    Scale scale;
    int count;

    __device__ __forceinline__ float distance(int i) const {
        return distances ? distances[i] : scale.distance(to_float(row[i]));
    }
    __device__ __forceinline__ int id(int i) const { return distances ? ids[i] : i; }
};

// The bits of the smallest distance up to which the sum over the ids reaches its target. kMasses: the sum is of the
// masses of distances of at most `last`, the target `share` of `total`, or where that is 0 of all masses; else it is
// the count and the target `share`. Histograms narrow the range of bits: the first level has linear bins, the others
// equal ranges of bits.
template <bool kMasses, typename T>
__device__ uint32_t search(Exchange& exchange, const Ids<T>& ids, uint32_t last, double share, Key total) {
    uint32_t low = 0, high = kInfinity;
    Key below = 0;  // sum of what lies under `low`
    double target = share;
    for (int level = 0; low < high; ++level) {
        int shift = 0;
        while (level > 0 && ((high - low) >> shift) >= kBins) ++shift;
        for (int i = 0; i < kPieces; ++i) exchange.pieces[i][threadIdx.x] = 0;
        if (threadIdx.x == 0) exchange.found = -1;
        __syncthreads();
        for (int i = threadIdx.x; i < ids.count; i += kThreads) {
            const float distance = ids.distance(i);
            const uint32_t bits = __float_as_uint(distance);
            if (bits < low || bits > high || bits > last) continue;
            const int bin = level == 0 ? static_cast<int>(fminf(distance * kLinearBins, kBins - 1))
                                       : static_cast<int>((bits - low) >> shift);
            if constexpr (kMasses) {
                const Key mass = mass_of(distance);
                add_mass(exchange.pieces, bin, mass);
            } else {
                atomicAdd(&exchange.pieces[0][bin], 1u);
            }
        }
        __syncthreads();
        Key mine = 0, all;
        for (int piece = 0; piece < kPieces; ++piece) {
            mine += static_cast<Key>(exchange.pieces[piece][threadIdx.x]) << (piece * kPieceBits);
        }
        const Key sum = below + block_running_sum(exchange, mine, all);
        if (kMasses && level == 0) target = fmax(share * static_cast<double>(total > 0 ? total : all), 1.0);
        if (static_cast<double>(sum) >= target && static_cast<double>(sum - mine) < target) {
            exchange.found = threadIdx.x;  // one thread at most
            exchange.before = sum - mine;
        }
        __syncthreads();
        const int bin = exchange.found;
        if (bin < 0) return kInfinity;
        below = exchange.before;
        if (level == 0) {
            low = __float_as_uint(static_cast<float>(bin) / kLinearBins);
            high = bin == kBins - 1 ? kInfinity : __float_as_uint(static_cast<float>(bin + 1) / kLinearBins) - 1;
        } else {
            low += static_cast<uint32_t>(bin) << shift;
            high = min(high, low + ((1u << shift) - 1));
        }
        __syncthreads();  // before `found` is cleared
    }
    return low;
}

// The smallest distance at which top-k and then top-p cut ids that surely hold what they keep, by comparing each with
// each. Masses are those of the list. For every thread.
inline __device__ float limit_by_comparing(Exchange& exchange, int count, const Request& request) {
    const float* distances = exchange.distances;
    if (threadIdx.x == 0) exchange.bound = kInfinity;
    __syncthreads();
    for (int mine = threadIdx.x; mine < count; mine += kThreads) {
        const float distance = distances[mine];
        int smaller = 0, equal = 0;
        for (int i = 0; i < count; ++i) {
            smaller += distances[i] < distance;
            equal += distances[i] == distance;
        }
        if (smaller < request.top_k && smaller + equal >= request.top_k) exchange.bound = __float_as_uint(distance);
    }
    __syncthreads();
    const float last = __uint_as_float(exchange.bound);
    if (!(request.top_p < 1)) return last;
    for (int i = threadIdx.x; i < count; i += kThreads) {
        exchange.masses[i] = distances[i] <= last ? mass_of(distances[i]) : 0;
    }
    __syncthreads();
    for (int mine = threadIdx.x; mine < count; mine += kThreads) {
        const float distance = distances[mine];
        Key smaller = 0, through = 0, total = 0;
        for (int i = 0; i < count; ++i) {
            const Key mass = exchange.masses[i];
            total += mass;
            if (distances[i] < distance) smaller += mass;
            if (distances[i] <= distance) through += mass;
        }
        const double target = fmax(static_cast<double>(request.top_p) * static_cast<double>(total), 1.0);
        if (static_cast<double>(through) >= target && static_cast<double>(smaller) < target) {
            exchange.bound = __float_as_uint(distance);
        }
    }
    __syncthreads();
    return fminf(last, __uint_as_float(exchange.bound));
}

// The best score among ids that are no farther than `limit`. For every thread.
template <typename T>
__device__ Key draw_from(Exchange& exchange, const Ids<T>& ids, float limit, const Noise& noise) {
    Key best = 0;
    for (int i = threadIdx.x; i < ids.count; i += kThreads) {
        const float distance = ids.distance(i);
        if (!(distance <= limit) || distance == INFINITY) continue;
        best = max(best, key_of(noise.score(ids.id(i), distance), ids.id(i)));
    }
    return block_largest(exchange, best);
}

// Lists the row's ids up to a bin in shared memory; returns how many there are, listed or not. The whole block.
template <typename T>
__device__ int gather(Exchange& exchange, const Logits<T>& logits, const Scale& scale, const Bins& bins, int last) {
    if (threadIdx.x == 0) exchange.count = 0;
    __syncthreads();
    const float least_logit = scale.least_logit(bins.end(last));
    const int octets = (logits.vocabulary + kOctet - 1) / kOctet;
#pragma unroll 4
    for (int octet = threadIdx.x; octet < octets; octet += kThreads) {
        const auto x = logits.load(octet);
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
            if (x[j] < least_logit) continue;
            const float distance = scale.distance(x[j]);
            if (!(distance < INFINITY) || bins.of(distance) > last) continue;
            const int place = atomicAdd(&exchange.count, 1);
            if (place >= kGathered) continue;
            exchange.distances[place] = distance;
            exchange.ids[place] = octet * kOctet + j;
        }
    }
    __syncthreads();
    return exchange.count;
}

// Finds by the bins of all blocks where the cut lies. The id, if that is enough to know it, else 0; then `last` is the
// bin up to which ids may be kept, and `total` the mass of the row where it is one of masses. For every thread.
template <typename T>
__device__ Key choose_by_bins(Exchange& exchange, const RowState& state, const T* row, const Scale& scale,
                              const Request& request, int& last, Key& total) {
    const int mine = threadIdx.x;
    const Key own = state.sums[mine], best = request.counts ? 0 : state.bests[mine];
    if (mine == 0) exchange.found = kBins - 1;  // fewer than top-k
    const Key sum = block_running_sum(exchange, own, total);
    const double target =
        request.counts ? request.top_k : fmax(static_cast<double>(request.top_p) * static_cast<double>(total), 1.0);
    if (static_cast<double>(sum) >= target && static_cast<double>(sum - own) < target) {
        exchange.found = mine;  // one thread at most
        exchange.before = sum - own;
        exchange.own = own;
        exchange.best = best;
    }
    __syncthreads();
    last = exchange.found;
    if (request.counts) {
        total = 0;
        return 0;
    }
    const Key surely = block_largest(exchange, mine < last ? best : 0), perhaps = exchange.best;
    if (last == 0 || perhaps <= surely) return max(surely, perhaps);
    // It is kept where all of its bin but itself does not reach the target.
    const Key mass = mass_of(scale.distance(to_float(row[id_of(perhaps)])));
    return static_cast<double>(exchange.before + exchange.own - mass) < target ? perhaps : 0;
}

// The id, by what all blocks have left in the row's state. For every thread of the last block.
template <typename T>
__device__ Key choose(Exchange& exchange, const RowState& state, const Logits<T>& logits, const Scale& scale,
                      const Request& request, const Noise& noise) {
    if (request.scores() && !request.bins) return state.bests[0];
    int count;
    Key total = 0;
    if (request.bins) {
        int last;
        const Key chosen = choose_by_bins(exchange, state, logits.row, scale, request, last, total);
        if (chosen > 0) return chosen;
        count = gather(exchange, logits, scale, Bins(request), last);
    } else {
        count = static_cast<int>(min(state.listed, kGathered + 1u));
        if (count > kList) count = kGathered + 1;
        for (int i = threadIdx.x; i < min(count, kList); i += kThreads) {
            exchange.distances[i] = state.list_distance[i];
            exchange.ids[i] = state.list_id[i];
        }
        __syncthreads();
    }
    const bool whole = count > kGathered;
    const Ids<T> ids = {whole ? nullptr : exchange.distances, exchange.ids, logits.row, scale,
                        whole ? logits.vocabulary : count};
    float limit = INFINITY;
    if (request.lists && !whole) {
        limit = limit_by_comparing(exchange, count, request);
    } else {
        uint32_t last = kInfinity;
        if (request.top_k > 0) last = search<false>(exchange, ids, last, request.top_k, 0);
        if (request.top_p < 1) last = search<true>(exchange, ids, last, request.top_p, total);
        limit = __uint_as_float(last);
    }
    return draw_from(exchange, ids, fminf(limit, request.farthest), noise);
}

}  // namespace tokenspeed::sampling
