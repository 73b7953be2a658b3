// The ids that `sample` draws, from logits whose vocabulary is split over the ranks of one host, in one launch over
// peer memory. The noise is a function of (seed, output, id), cuts are by distances from the largest logit of all
// ranks, masses are integers: every rank decides alike, and as one rank with the whole row would.
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

#include "sample_ranks_cuts.h"

namespace tokenspeed {
namespace {

using namespace sampling_ranks;

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
