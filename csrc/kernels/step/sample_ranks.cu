// The ids that `sample` draws, from logits whose vocabulary is split over the ranks of one host, in one launch over
// peer memory. The noise is a function of (seed, output, id), cuts are by distances from the largest logit of all ranks,
// masses are integers: every rank decides alike, and as one rank with the whole row would.
//
// A cluster of two to eight blocks holds a rank's part of a row in shared memory. Cluster c of every rank takes rows c,
// c + clusters, ... and talks to cluster c of the others, so a grid is no larger than what every rank can hold at once.
// Ranks exchange granules, 8 bytes that travel as two tagged words (see all_reduce.cu): whoever finds the tag has them.
//   1. the largest logit with its id, and a bound that top-k surely keeps to: the k-th largest of the warps' largest.
//      The highest bound of any rank holds for all. At temperature 0 that is all there is.
//   2. top-p alone: the masses and counts of the ids within three distances, and the mass of the row. The smallest
//      distance that holds the nucleus is the bound
//   3. with a bound: the few ids within it. Each rank has all of them and decides by itself: exact cuts by comparing
//      each with each, and the draw
//   4. without, or where they are too many: the cut by histograms, summed over ranks level by level, and the largest
//      Gumbel score of each rank
// Without cuts there are two exchanges, 1 and the end of 4; with top-k two, 1 and 3; with top-p alone three.
//
// One block of a cluster, its leader, waits for other ranks and tells its own what came: they must not differ in what
// they saw where a wait ends without its words. The tag counts a cluster's exchanges in each rank's own memory. A
// granule has two places by the parity of its tag. Nobody writes over what is still read: who pushes tag t has found
// the others' t - 1, which they pushed after they had read t - 2, and a barrier of the cluster stands between.
//
// Floor: one way over NVLink an exchange, about 0.7 us and three ways to L2; the row of two ranks is 248 KB in bf16.
//
// budget: sample_ranks_kernel registers<=64 shared<=0 hot
#include <launch.h>
#include <ptx.h>
#include <vector.h>

#include <algorithm>

#include "kernels.h"
#include "noise.h"

namespace tokenspeed {
namespace {

using sampling::Best;
using sampling::mass_of;
using sampling::Noise;

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = kThreads;
constexpr int kPieces = 3;  // of a mass, in a histogram
constexpr int kPieceBits = 14;
constexpr float kLinearBins = 32;  // per unit of distance
constexpr uint32_t kInfinity = 0x7f800000;
constexpr int kList = 512;      // ids of a block that are listed
constexpr int kMerged = kBins;  // of all blocks of all ranks: a thread each
constexpr int kBounds = 3;      // distances that may bound top-p
constexpr int kSums = 2 * kBounds + 1;
constexpr int kGranules = kMerged + 32;  // of an exchange: a head before a list
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr size_t kSharedLimit = 227 * 1024;
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
__device__ Best block_best(Exchange& exchange, Best best) {
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
__device__ Best cluster_best(Exchange& exchange) {
    Best best = exchange.block_best;
#pragma unroll 1
    for (int i = 1; i < gridDim.x; ++i) best = better(best, *ptx::cluster_map(&exchange.block_best, i));
    return best;
}

// The inclusive sum over the threads of the block up to this one.
__device__ unsigned long long block_running_sum(Exchange& exchange, unsigned long long x) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int offset = 1; offset < 32; offset *= 2) {
        const unsigned long long below = __shfl_up_sync(kAllLanes, x, offset);
        if (lane >= offset) x += below;
    }
    if (lane == 31) exchange.warp_totals[warp] = x;
    __syncthreads();
    for (int i = 0; i < warp; ++i) x += exchange.warp_totals[i];
    return x;
}

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
                for (int piece = 0; piece < kPieces; ++piece) {
                    const auto part = static_cast<uint32_t>(mass >> (piece * kPieceBits)) & ((1u << kPieceBits) - 1);
                    if (part != 0) atomicAdd(&exchange.bins[piece][bin], part);
                }
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

// The best of this thread's ids within `limit`. Called by the whole block.
template <typename T>
__device__ Best best_score(const Part<T>& part, const Noise& noise, float limit) {
    Best best = {-INFINITY, INT32_MAX};
    float race_limit = INFINITY;  // of what an id's race may be, to beat the warp's best
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
            const sampling::Words words = noise.words((part.first + i) / 4);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float uniform = sampling::uniform(words.x[j]);
                if (!(distances[j] <= limit) || sampling::race_of(uniform, distances[j]) > race_limit) continue;
                best = better(best, {sampling::score_of(uniform, distances[j]), part.first + i + j});
            }
        }
        race_limit = sampling::race_limit_for(largest_of_warp(best.value));
    }
    return best;
}

// The k-th largest of the largest logits of the cluster's warps: no fewer than k ids of this rank reach it. Called by
// one block.
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

// The largest logit of all ranks with its id, and the highest bound of top-k, `top_k` 0: none. One exchange, behind a
// barrier of the cluster; ends with one.
__device__ __forceinline__ Best first_look(const SampleRanks& p, Exchange& exchange, Peers& peers,
                                           const float* warp_largest, int top_k, float& bound) {
    ++peers.tag;
    if (blockIdx.x == 0) {
        const bool bounded = top_k > 0 && top_k <= static_cast<int>(gridDim.x) * kWarps;
        const float own_bound = bounded ? bound_of_top_k(exchange, warp_largest, top_k) : -INFINITY;
        const int lane = threadIdx.x;
        if (lane == 0) {
            const Best own = cluster_best(exchange);
            peers.push(p, 0, __float_as_uint(own.value), own.id);
            peers.push(p, 1, __float_as_uint(own_bound), 0);
        }
        if (lane < 32) {
            if (lane < 2 * p.ranks) exchange.pulled[lane] = peers.pull(p, lane / 2, lane % 2);
            __syncwarp();
            if (lane == 0) {
                Best best = best_of(exchange.pulled[0]);
                float highest = __uint_as_float(exchange.pulled[1].x);
#pragma unroll 1
                for (int rank = 1; rank < p.ranks; ++rank) {
                    best = better(best, best_of(exchange.pulled[2 * rank]));
                    highest = fmaxf(highest, __uint_as_float(exchange.pulled[2 * rank + 1].x));
                }
                exchange.all_best = best;
                exchange.all_bound = highest;
            }
        }
    }
    ptx::cluster_sync();
    bound = *ptx::cluster_map(&exchange.all_bound, 0);
    return *ptx::cluster_map(&exchange.all_best, 0);
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

// The id of a row, for thread 0 of the leader. The whole cluster calls it, and meets at a barrier before it calls it
// again.
template <typename T>
__device__ __forceinline__ int draw_row(const SampleRanks& p, Exchange& exchange, Peers& peers, T* kept, int row) {
    float* warp_largest = reinterpret_cast<float*>(exchange.bins[2]);
    const int local = blockIdx.x * p.chunk, count = max(0, min(p.chunk, p.width - local));
    const int first = p.rank * p.width + local;
    const float temperature = p.temperature == nullptr ? 0.0f : p.temperature[row];
    const bool greedy = !(temperature > 0);
    const int wanted = greedy ? 0 : p.top_k[row];
    const int top_k = wanted < p.width * p.ranks ? max(wanted, 0) : 0;

    const auto* logits = static_cast<const T*>(p.logits) + row * p.logits_stride + local;
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
            const float logit = to_float(reinterpret_cast<const T*>(&bits)[j]);
            finite = finite && logit < INFINITY;
            best = better(best, {logit, first + i * kVector + j});
        }
    }
    for (int i = vectors * kVector + threadIdx.x; i < count; i += kThreads) {
        kept[i] = logits[i];
        const float logit = to_float(kept[i]);
        finite = finite && logit < INFINITY;
        best = better(best, {logit, first + i});
    }
    if (!finite) best.value = INFINITY;  // NaN is not seen by maxima
    const float most = largest_of_warp(best.value);
    if (threadIdx.x % 32 == 0) warp_largest[threadIdx.x / 32] = most;
    best = block_best(exchange, best);
    if (threadIdx.x == 0) exchange.block_best = best;
    ptx::cluster_sync();
    float bound;
    best = first_look(p, exchange, peers, warp_largest, top_k, bound);
    const float largest = greedy ? best.value : best.value / temperature;
    if (!(fabsf(largest) < INFINITY)) return largest > 0 ? sampling::kNotFinite : sampling::kNoneAllowed;
    if (greedy) return best.id;

    const Part<T> part = {kept, first, count, temperature, largest};
    const float top_p = p.top_p[row];
    unsigned long long row_mass = 0;
    bound = largest - bound / temperature;  // as a distance
    if (top_k == 0) bound = top_p < 1 ? bound_of_top_p(p, exchange, peers, part, top_p, row_mass) : INFINITY;
    if (bound < INFINITY) {
        const int listed = send_list(p, exchange, peers, part, bound);
        if (listed <= kMerged) {
            if (blockIdx.x != 0) return 0;
            return draw_from_lists(p, exchange, peers, listed, row, top_k, row_mass).id;
        }
    }
    uint32_t last = kInfinity;
    if (top_k > 0) last = search<false>(p, exchange, peers, part, last, static_cast<float>(top_k));
    if (top_p < 1) last = search<true>(p, exchange, peers, part, last, top_p);
    best =
        block_best(exchange, best_score(part, noise_of(p, row), fminf(__uint_as_float(last), limit_of_min_p(p, row))));
    if (threadIdx.x == 0) exchange.block_best = best;
    ptx::cluster_sync();
    ++peers.tag;
    const int lane = threadIdx.x;
    if (blockIdx.x == 0 && lane < 32) {
        if (lane == 0) {
            best = cluster_best(exchange);
            peers.push(p, 0, __float_as_uint(best.value), best.id);
        }
        if (lane < p.ranks) exchange.pulled[lane] = peers.pull(p, lane, 0);
        __syncwarp();
#pragma unroll 1
        for (int rank = 0; rank < p.ranks; ++rank) best = better(best, best_of(exchange.pulled[rank]));
    }
    return best.id;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) sample_ranks_kernel(const __grid_constant__ SampleRanks p) {
    DYNAMIC_SHARED(storage);
    auto& exchange = *reinterpret_cast<Exchange*>(storage);
    auto* kept = reinterpret_cast<T*>(storage + sizeof(Exchange));
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    uint32_t* tags = p.control + kSampleRanksTags;
    Peers peers = {tags[blockIdx.y], &exchange.patient};
    if (threadIdx.x == 0) exchange.patient = p.control[0] == 0;
    for (int row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const int id = draw_row(p, exchange, peers, kept, row);
        // What is drawn without another rank is not to be trusted, nor looked up.
        if (blockIdx.x == 0 && threadIdx.x == 0) p.ids[row] = exchange.patient != 0 ? id : sampling::kNotFinite;
        ptx::cluster_sync();  // what peers read of this block is read
    }
    if (blockIdx.x == 0 && threadIdx.x == 0) tags[blockIdx.y] = peers.tag;
}

size_t shared_bytes_of(const SampleRanks& p, int chunk) {
    return sizeof(Exchange) + static_cast<size_t>(chunk) * (p.logits_are_float ? 4 : 2);
}

constexpr int kChoices = 3;  // of blocks to a cluster

int blocks_of(int choice) {
    return 8 >> choice;
}

int chunk_of(const SampleRanks& p, int blocks) {  // whole vectors; a Philox call serves four ids
    return ((p.width + blocks - 1) / blocks + 7) / 8 * 8;
}

}  // namespace

bool sample_ranks_supported(const SampleRanks& p) {
    const bool ranks = p.ranks == 2 || p.ranks == 4 || p.ranks == 8;
    bool clusters = true;
    for (const int count : p.clusters) clusters = clusters && count >= 1 && count <= p.max_clusters;
    return ranks && p.rank >= 0 && p.rank < p.ranks && p.rows >= 1 && p.width >= 4 && p.width % 4 == 0 &&
           p.width <= kSampleMaxVocabulary / p.ranks && clusters && shared_bytes_of(p, chunk_of(p, 8)) <= kSharedLimit;
}

int64_t sample_ranks_memory(int ranks, int max_clusters) {
    return int64_t{2} * max_clusters * ranks * kGranules * 2 * sizeof(uint64_t);
}

int sample_ranks_clusters(int blocks) {
    const LaunchConfig config = {
        .grid = dim3(blocks), .block = dim3(kThreads), .shared_bytes = kSharedLimit, .cluster = dim3(blocks)};
    return std::min(max_resident_blocks(sample_ranks_kernel<__nv_bfloat16>, config),
                    max_resident_blocks(sample_ranks_kernel<float>, config)) /
           blocks;
}

cudaError_t sample_ranks(SampleRanks p, cudaStream_t stream) {
    if (!sample_ranks_supported(p)) return cudaErrorInvalidValue;
    const int vector = p.logits_are_float ? 4 : 8;
    // As many blocks to a row as leave each thread four ids, which share a Philox call, and let every row have a
    // cluster at once.
    int choice = 0;
    while (choice < kChoices - 1 && chunk_of(p, blocks_of(choice)) < 4 * kThreads) ++choice;
    for (int fewer = choice + 1; fewer < kChoices && p.clusters[choice] < p.rows; ++fewer) {
        const bool fits = shared_bytes_of(p, chunk_of(p, blocks_of(fewer))) <= kSharedLimit;
        if (fits && p.clusters[fewer] > p.clusters[choice]) choice = fewer;
    }
    const int blocks = blocks_of(choice), clusters = p.clusters[choice];
    p.chunk = chunk_of(p, blocks);
    p.vectors = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && p.logits_stride % vector == 0;
    const LaunchConfig config = {.grid = dim3(blocks, std::min(p.rows, clusters)),
                                 .block = dim3(kThreads),
                                 .shared_bytes = shared_bytes_of(p, p.chunk),
                                 .stream = stream,
                                 .cluster = dim3(blocks),
                                 .programmatic = true};
    return launch(p.logits_are_float ? sample_ranks_kernel<float> : sample_ranks_kernel<__nv_bfloat16>, config, p);
}

}  // namespace tokenspeed
