// One id a row by temperature, top-k, top-p and min-p, without a sort. Contract: tokenspeed/ops/sampling.py.
//
// A cluster of eight blocks (four, where there are many rows) holds a row in shared memory as it is (248,320 logits in
// bf16: 62 KB a block), so device memory sees each logit once: 0.5 MB a row, 0.1 us of bandwidth; what counts is the
// instructions of a multiprocessor and the chain of cluster barriers.
//   1. largest logit (and its lowest id, which is the answer at temperature 0), and the largest of every warp
//   2. distances d = max - x >= 0 of the scaled logits x, made anew where they are needed; their bits order as integers
//   3. a bound that surely holds what top-k and top-p keep: for top-k the k-th largest of the warps' largest logits,
//   for
//      top-p alone the smallest of three distances whose mass reaches the target. The few ids within it are listed, and
//      one block finds the exact cuts by comparing each with each, and draws
//   4. where the list would overflow, or k is large: the smallest distance at which a running sum (of ones, of masses)
//      reaches its target, by histograms that narrow the range of bits: the first level has linear bins of 1/32, where
//      logits spread evenly and no bin is crowded, the others 1024 equal ranges of bits, two more levels to the value
//   5. Philox noise for what is left, four ids a call, and the largest Gumbel score. Of an id that cannot reach the
//      warp's best so far even with the largest noise of its word, no logarithm is taken.
// Masses are integers (2^40 the likeliest), in histograms as three 14-bit pieces by native 32-bit atomics, so no order
// of threads or blocks changes a sum; scores compare with the id as the tie-break.
//
// Tried and lost: two-byte loads by 512 threads and two logarithms for every id: greedy 13 us, temperature 37 us, top-k
// and top-p 56 us for one row. With 16-byte loads and a bound by each thread's own best, the row in fp32: 10.2, 28.5
// and 55 us, 64 greedy rows 42 us.
//
// budget: sample_kernel registers<=64 shared<=0 hot
#include <launch.h>
#include <ptx.h>

#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kMostBlocks = 8, kFewestBlocks = 4;  // per row: one cluster
constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = kThreads;
constexpr int kPieces = 3;
constexpr int kPieceBits = 14;
constexpr float kMass = 1099511627776.0f;  // 2^40
constexpr float kLinearBins = 32;          // per unit of distance
constexpr uint32_t kInfinity = 0x7f800000;
constexpr int kList = 512;      // ids that are compared each with each
constexpr int kListTopK = 128;  // the largest top-k that is bounded by the warps' largest: they are 256 or 128
constexpr int kBounds = 3;      // distances that may bound top-p
constexpr int kNoneAllowed = -1, kNotFinite = -2;  // in place of an id
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr size_t kSharedLimit = 227 * 1024;

struct Best {
    float value;
    int id;
};

struct alignas(16) Exchange {  // of dynamic shared memory, before the row
    uint32_t bins[kPieces][kBins];
    unsigned long long warp_totals[kWarps];
    Best warp_best[kWarps];
    Best block_best[2];  // of the largest logit, of the largest score; the cluster reads them
    unsigned long long found_before;
    int found_bin;
    // Of the list: a block's own ids, then in one block those of all.
    unsigned long long mass_within[kBounds + 1][kWarps];  // of each bound, and of the whole row
    int ids_within[kBounds][kWarps];
    unsigned long long masses[kList];
    float list_distance[kList];
    int list_id[kList];
    int listed;
    float bound;
};

__device__ __forceinline__ float to_fp32(float x) {
    return x;
}
__device__ __forceinline__ float to_fp32(__nv_bfloat16 x) {
    return __bfloat162float(x);
}

// A block's part of a row: its logits in shared memory, and how they become distances.
template <typename T>
struct Part {
    const T* logits;
    int first, count;
    float temperature, largest;  // of the scaled logits of the row

    __device__ __forceinline__ float distance(int i) const { return largest - to_fp32(logits[i]) / temperature; }
};

__device__ __forceinline__ Best better(Best a, Best b) {
    return b.value > a.value || (b.value == a.value && b.id < a.id) ? b : a;
}

// The best of the block, for thread 0.
__device__ Best block_best(Exchange& exchange, Best best) {
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
    }
    return best;
}

// The best of the cluster, for every thread. `slot`: each slot serves once a launch.
__device__ Best cluster_best(Exchange& exchange, Best best, int slot) {
    best = block_best(exchange, best);
    if (threadIdx.x == 0) exchange.block_best[slot] = best;
    ptx::cluster_sync();
    best = *ptx::cluster_map(&exchange.block_best[slot], 0);
    for (int i = 1; i < gridDim.x; ++i) best = better(best, *ptx::cluster_map(&exchange.block_best[slot], i));
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
template <bool kMasses, typename T>
__device__ uint32_t search(Exchange& exchange, const Part<T>& part_of_row, uint32_t last, double share) {
    uint32_t low = 0, high = kInfinity;
    unsigned long long below = 0;  // sum of what lies under `low`
    double target = share;
    for (int level = 0; low < high; ++level) {
        int shift = 0;
        while (level > 0 && ((high - low) >> shift) >= kBins) ++shift;
        for (int i = 0; i < kPieces; ++i) exchange.bins[i][threadIdx.x] = 0;
        if (threadIdx.x == 0) exchange.found_bin = -1;
        __syncthreads();
        for (int i = threadIdx.x; i < part_of_row.count; i += kThreads) {
            const float distance = part_of_row.distance(i);
            const uint32_t bits = __float_as_uint(distance);
            if (bits < low || bits > high || bits > last) continue;
            const int bin = level == 0 ? static_cast<int>(fminf(distance * kLinearBins, kBins - 1))
                                       : static_cast<int>((bits - low) >> shift);
            if constexpr (kMasses) {
                const unsigned long long mass = mass_of(distance);
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
        for (int block = 0; block < gridDim.x; ++block) {
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

// The score of an id by its word of noise.
__device__ __forceinline__ float score_of(uint32_t word, float distance) {
    return gumbel(uniform(word)) - distance;
}

struct Noise {
    uint64_t seed, index;

    __device__ __forceinline__ Words words(int quad) const {  // of ids 4 quad .. 4 quad + 3
        return philox(quad, static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0,
                      static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    }
};

// The best of this thread's ids within `limit`. Called by the whole block.
template <typename T>
__device__ Best draw(const Part<T>& part, const Noise& noise, float limit) {
    Best best = {-INFINITY, INT32_MAX};
    float warp_best = -INFINITY;
    for (int base = 0; base < part.count; base += kThreads * 4) {
        const int i = base + threadIdx.x * 4;
        float distances[4];
        bool kept = false;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            distances[j] = i + j < part.count ? part.distance(i + j) : NAN;
            kept = kept || distances[j] <= limit;
        }
        if (kept) {
            const Words words = noise.words((part.first + i) / 4);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                if (!(distances[j] <= limit) || cannot_reach(uniform(words.x[j]), warp_best + distances[j])) continue;
                best = better(best, {score_of(words.x[j], distances[j]), part.first + i + j});
            }
        }
        // The order of floats as that of integers: the sign decides whether the other bits turn.
        const uint32_t bits = __float_as_uint(best.value);
        const uint32_t most = __reduce_max_sync(kAllLanes, bits & 0x80000000u ? ~bits : bits | 0x80000000u);
        warp_best = __uint_as_float(most & 0x80000000u ? most & 0x7fffffffu : ~most);
    }
    return best;
}

// The k-th largest of the warps' largest logits: no fewer than k ids reach it. `warp_largest`: of this block.
__device__ float bound_of_top_k(Exchange& exchange, const float* warp_largest, int k) {
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
// none holds it, or more ids than a list takes.
template <typename T>
__device__ float bound_of_top_p(Exchange& exchange, const Part<T>& part, float share, unsigned long long& row_mass) {
    constexpr float kDistances[kBounds] = {2.0f, 5.0f, 12.0f};
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    unsigned long long sums[kBounds + 1] = {};
    uint32_t counts = 0;  // of each bound, 8 bits: a thread has 98 ids at most
    static_assert(kBounds <= 4 && kSampleMaxVocabulary / (kFewestBlocks * kThreads) < 255);
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
    if (threadIdx.x <= kBounds) {
        unsigned long long total = 0;
        for (int i = 0; i < kWarps; ++i) total += exchange.mass_within[threadIdx.x][i];
        exchange.mass_within[threadIdx.x][0] = total;
        if (threadIdx.x < kBounds) {
            int ids = 0;
            for (int i = 0; i < kWarps; ++i) ids += exchange.ids_within[threadIdx.x][i];
            exchange.ids_within[threadIdx.x][0] = ids;
        }
    }
    ptx::cluster_sync();
#pragma unroll
    for (int j = 0; j <= kBounds; ++j) {
        sums[j] = 0;
        for (int i = 0; i < gridDim.x; ++i) sums[j] += *ptx::cluster_map(&exchange.mass_within[j][0], i);
    }
    row_mass = sums[kBounds];
    const double target = fmax(static_cast<double>(share) * static_cast<double>(row_mass), 1.0);
    float bound = INFINITY;
    int which = 0;
#pragma unroll
    for (int j = 0; j < kBounds; ++j) {
        if (bound < INFINITY || static_cast<double>(sums[j]) < target) continue;
        which = j;
        bound = kDistances[j];
    }
    int ids = 0;
    for (int i = 0; i < gridDim.x; ++i) ids += *ptx::cluster_map(&exchange.ids_within[which][0], i);
    return ids <= kList ? bound : INFINITY;
}

// Lists this block's ids within `bound`. Whether the lists of all blocks fit in one; ends with a barrier of the
// cluster.
template <typename T>
__device__ bool list_ids(Exchange& exchange, const Part<T>& part, float bound) {
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
    int all = 0;
    for (int i = 0; i < gridDim.x; ++i) all += min(*ptx::cluster_map(&exchange.listed, i), kList + 1);
    return all <= kList;
}

// The id that is drawn from the lists of all blocks, by one block: which cuts by top-k (0: not), by top-p of the mass
// of what is left or of the row, and by `limit`, and draws. For thread 0.
__device__ Best draw_from_lists(Exchange& exchange, const Noise& noise, int top_k, float top_p,
                                unsigned long long row_mass, float limit) {
    auto* distances = reinterpret_cast<float*>(exchange.bins[0]);
    auto* ids = reinterpret_cast<int*>(exchange.bins[1]);
    const int mine = threadIdx.x;
    int count = 0;
    for (int block = 0; block < gridDim.x; ++block) {
        const int listed = *ptx::cluster_map(&exchange.listed, block), place = mine - count;
        if (place >= 0 && place < listed) {
            distances[mine] = ptx::cluster_map(exchange.list_distance, block)[place];
            ids[mine] = ptx::cluster_map(exchange.list_id, block)[place];
        }
        count += listed;
    }
    if (mine == 0) exchange.bound = INFINITY;
    __syncthreads();
    const bool holds = mine < count;
    const float distance = holds ? distances[mine] : INFINITY;
    if (top_k > 0) {
        int smaller = 0, equal = 0, equal_before = 0;
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
        if (holds) exchange.masses[mine] = distance <= last ? mass_of(distance) : 0;
        if (mine == 0) exchange.bound = INFINITY;
        __syncthreads();
        if (holds) {
            unsigned long long smaller = 0, through = 0, total = 0;
            bool first = true;  // of those at this distance
            for (int i = 0; i < count; ++i) {
                const unsigned long long mass = exchange.masses[i];
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
    if (holds && distance <= limit) {
        const Words words = noise.words(ids[mine] / 4);
        const int which = ids[mine] % 4;
        const uint32_t word = which < 2 ? (which == 0 ? words.x[0] : words.x[1]) : which == 2 ? words.x[2] : words.x[3];
        best = {score_of(word, distance), ids[mine]};
    }
    return block_best(exchange, best);
}

template <typename T>
__global__ void __launch_bounds__(kThreads) sample_kernel(const __grid_constant__ Sample p) {
    DYNAMIC_SHARED(storage);
    auto& exchange = *reinterpret_cast<Exchange*>(storage);
    auto* kept = reinterpret_cast<T*>(storage + sizeof(Exchange));
    float* warp_largest = reinterpret_cast<float*>(exchange.bins[2]);
    const int row = blockIdx.y, chunk = p.chunk, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int first = blockIdx.x * chunk, count = max(0, min(chunk, p.vocabulary - first));
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    const float temperature = p.temperature[row];
    const bool greedy = !(temperature > 0);
    const auto* logits = static_cast<const T*>(p.logits) + row * p.logits_stride + first;
    Best best = {-INFINITY, INT32_MAX};
    bool finite = true;  // or -inf
    constexpr int kVector = 16 / sizeof(T);
    const int vectors = p.vectors ? count / kVector : 0;
#pragma unroll 4
    for (int i = threadIdx.x; i < vectors; i += kThreads) {
        const uint4 bits = ptx::load_16_no_allocate(logits + i * kVector);
        *reinterpret_cast<uint4*>(kept + i * kVector) = bits;
#pragma unroll
        for (int j = 0; j < kVector; ++j) {
            const float logit = to_fp32(reinterpret_cast<const T*>(&bits)[j]);
            finite = finite && logit < INFINITY;
            best = better(best, {logit, first + i * kVector + j});
        }
    }
    for (int i = vectors * kVector + threadIdx.x; i < count; i += kThreads) {
        kept[i] = logits[i];
        const float logit = to_fp32(kept[i]);
        finite = finite && logit < INFINITY;
        best = better(best, {logit, first + i});
    }
    if (!finite) best.value = INFINITY;  // NaN is not seen by maxima
    const float mine = best.value;
    float largest_of_warp = mine;
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        largest_of_warp = fmaxf(largest_of_warp, __shfl_xor_sync(kAllLanes, largest_of_warp, offset));
    }
    if (lane == 0) warp_largest[warp] = largest_of_warp;
    best = cluster_best(exchange, best, 0);
    const float largest = greedy ? best.value : best.value / temperature;
    const bool has_id = fabsf(largest) < INFINITY;  // alike for all of the cluster
    if (!greedy && has_id) {
        const Part<T> part = {kept, first, count, temperature, largest};
        const Noise noise = {static_cast<uint64_t>(p.seed[row]), static_cast<uint64_t>(p.index[row])};
        const int top_k = p.top_k[row] < p.vocabulary ? max(p.top_k[row], 0) : 0;
        const float top_p = p.top_p[row], least = -logf(p.min_p[row]);
        float bound = INFINITY;
        unsigned long long row_mass = 0;
        if (top_k > 0 && top_k <= kListTopK) {
            bound = part.largest - bound_of_top_k(exchange, warp_largest, top_k) / temperature;
        } else if (top_k == 0 && top_p < 1) {
            bound = bound_of_top_p(exchange, part, top_p, row_mass);
        }
        if (bound < INFINITY && list_ids(exchange, part, bound)) {
            if (blockIdx.x == 0) best = draw_from_lists(exchange, noise, top_k, top_p, row_mass, least);
        } else {
            uint32_t last = kInfinity;
            ptx::cluster_sync();  // what peers read of the bins and the lists is read
            if (top_k > 0) last = search<false>(exchange, part, last, top_k);
            if (top_p < 1) last = search<true>(exchange, part, last, top_p);
            best = cluster_best(exchange, draw(part, noise, fminf(__uint_as_float(last), least)), 1);
        }
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) {
        p.ids[row] = has_id ? best.id : largest > 0 ? kNotFinite : kNoneAllowed;
    }
    ptx::cluster_sync();  // nobody leaves while a peer may read its shared memory
}

}  // namespace

bool sample_supported(const Sample& p) {
    return p.rows >= 1 && p.rows <= 65535 && p.vocabulary >= 1 && p.vocabulary <= kSampleMaxVocabulary;
}

cudaError_t sample(Sample p, cudaStream_t stream) {
    if (!sample_supported(p)) return cudaErrorInvalidValue;
    const int size = p.logits_are_float ? 4 : 2, vector = 16 / size;
    const auto chunk_of = [&](int blocks) {  // whole vectors; a Philox call serves four ids
        return ((p.vocabulary + blocks - 1) / blocks + 7) / 8 * 8;
    };
    const auto shared_bytes_of = [&](int blocks) {
        return sizeof(Exchange) + static_cast<size_t>(chunk_of(blocks)) * size;
    };
    // Many rows take several rounds of clusters: fewer with clusters of half the size.
    const bool many = p.rows * kMostBlocks > multiprocessor_count() && shared_bytes_of(kFewestBlocks) <= kSharedLimit;
    const int blocks = many ? kFewestBlocks : kMostBlocks;
    p.chunk = chunk_of(blocks);
    p.vectors = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && p.logits_stride % vector == 0;
    const LaunchConfig config = {.grid = dim3(blocks, p.rows),
                                 .block = dim3(kThreads),
                                 .shared_bytes = shared_bytes_of(blocks),
                                 .stream = stream,
                                 .cluster = dim3(blocks),
                                 .programmatic = true};
    return launch(p.logits_are_float ? sample_kernel<float> : sample_kernel<__nv_bfloat16>, config, p);
}

}  // namespace tokenspeed
