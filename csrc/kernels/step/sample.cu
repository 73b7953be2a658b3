// One id a row by temperature, top-k, top-p and min-p, without a sort. Contract: tokenspeed/ops/sampling.py.
//
// Two launches, with a row split over up to 128 blocks in each; what lies between is no barrier that a grid has to
// wait for with all its blocks on the device, and needs no counter whose content is known.
//   1. largest_kernel: a block's largest logit, and the largest of each of its groups of threads. It clears the counters
//      of the second.
//   2. draw_kernel, before its wait for the first: its logits again (512 KB a row, from L2) and their noise, which is a
//      function of seed, position and id alone. Behind it: the largest logit, distances d = max - x >= 0 of the scaled
//      logits x, whose bits order as integers, and by what the row asks for
//        nothing to cut  the block's largest Gumbel score
//        top-k to 128    the k-th largest of 128 to 511 groups' largest bounds what top-k keeps: no fewer than k ids
//                        reach it, and seldom twice as many. They are listed
//        top-p           masses and best scores of 256 bins of distance. The cut lies in the bin where the running sum
//                        of masses reaches its target; the ids of the bins before are kept
//        top-k above     counts of the bins in place of masses
//      The last block to end has it all and gives the id. With top-p the best score of the bins before the cut's beats
//      those of its own bin nearly always. Where it does not, and with a large top-k, the last block lists the ids up
//      to that bin and finds the cuts among them exactly; among the whole row where a list does not hold them.
// With many rows a block has more of a row: some 396 blocks in all.
//
// Masses are integers (2^40 the likeliest), in a block's bins as three 14-bit pieces by native 32-bit atomics, so no
// order of threads or blocks changes a sum. Scores compare by the id where they are equal.
//
// Of an id that cannot reach the warp's best so far even with the largest noise of its word, no logarithm is taken.
//
// Measured, and what was tried: docs/kernels/sampling.md.
//
// budget: largest_kernel registers<=64 shared<=0 hot
// budget: draw_kernel registers<=80 shared<=0 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <algorithm>

#include "kernels.h"
#include "sample.h"
#include "sample_cuts.h"

namespace tokenspeed {
namespace {

using namespace sampling;

template <typename T>
__device__ __forceinline__ Logits<T> logits_of(const Sample& p) {
    return {static_cast<const T*>(p.logits) + blockIdx.y * p.logits_stride, p.vocabulary, p.vectors};
}

__device__ __forceinline__ RowState& state_of(const Sample& p) {
    return static_cast<RowState*>(p.workspace)[blockIdx.y];
}

template <typename T>
__global__ void __launch_bounds__(kThreads) largest_kernel(const __grid_constant__ Sample p) {
    DYNAMIC_SHARED(storage);
    auto& exchange = *reinterpret_cast<Exchange*>(storage);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = static_cast<int>(gridDim.x);
    const int block = static_cast<int>(blockIdx.x), groups = p.groups;
    const auto logits = logits_of<T>(p);
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    Best best = {-INFINITY, INT32_MAX};
    bool finite = true;  // or -inf
    const auto look_at = [&](const Octet<T>& x, int octet) {
#pragma unroll
        for (int j = 0; j < kOctet; ++j) {
            const float logit = x[j];
            finite = finite && logit < INFINITY;  // NaN is not seen by maxima
            if (logit > best.value) best = {logit, octet * kOctet + j};
        }
    };
    constexpr int kBatch = 4;
    const int segments = (p.vocabulary + kSegment - 1) / kSegment;
    const int first = (warp * blocks + block) * 32 + lane, octets = segments * 32;
    const int stride = kWarps * blocks * 32;
    for (int octet = first; octet < octets; octet += kBatch * stride) {
        Octet<T> x[kBatch];  // on their way together
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (logits.is_whole(octet + i * stride)) x[i] = logits.load_whole(octet + i * stride);
        }
#pragma unroll
        for (int i = 0; i < kBatch; ++i) {
            if (logits.is_whole(octet + i * stride)) look_at(x[i], octet + i * stride);
        }
    }
    for (int octet = first; octet < octets; octet += stride) {
        if (!logits.is_whole(octet)) look_at(logits.load_ragged(octet), octet);
    }
    if (!finite) best.value = INFINITY;

    RowState& state = state_of(p);
    for (int i = block * kThreads + static_cast<int>(threadIdx.x); i < kBins; i += blocks * kThreads) {
        state.sums[i] = state.bests[i] = 0;
    }
    if (block == 0 && threadIdx.x == 0) state.done = state.listed = 0;

    const Key key = warp_largest(key_of(best.value, best.id));
    if (lane == 0) exchange.warp_values[warp] = key;
    float largest = best.value;  // of the threads t of the warp with the same t % groups
    for (int offset = 16; offset >= groups; offset /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(kAllLanes, largest, offset));
    }
    exchange.values[threadIdx.x] = largest;
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < groups) {
        for (int i = warp; i < kWarps; i += max(1, groups / 32)) {
            largest = fmaxf(largest, exchange.values[i * 32 + lane]);
        }
        state.group_largest[block * groups + static_cast<int>(threadIdx.x)] = largest;
    }
    if (warp == 0) {
        const Key of_block = warp_largest(lane < kWarps ? exchange.warp_values[lane] : 0);
        if (lane == 0) state.largest[block] = {value_of(of_block), id_of(of_block)};
    }
}

// The scores of a thread's octet where nothing is cut but by min-p. A whole warp.
// race_limit: see race_limit_for; of the warp's best score so far.
template <typename T>
__device__ __forceinline__ void score_octet(const Octet<T>& x, const Words (&words)[2], int first, const Scale& scale,
                                            float farthest, float& race_limit, Key& best) {
    float races[kOctet];
    float least = INFINITY, least_uniform = 1, least_distance = INFINITY;
    int least_id = first;
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
        const float distance = scale.distance(x[j]), u = uniform(words[j / 4].x[j % 4]);
        races[j] = distance <= farthest ? race_of(u, distance) : INFINITY;
        if (races[j] < least) least = races[j], least_uniform = u, least_distance = distance, least_id = first + j;
    }
    // The likeliest winner first; then seldom another can reach it.
    if (least <= race_limit && least < INFINITY)
        best = max(best, key_of(score_of(least_uniform, least_distance), least_id));
    const uint32_t reached = __reduce_max_sync(kAllLanes, static_cast<uint32_t>(best >> 32));
    if (reached > 0) race_limit = race_limit_for(from_ordered(reached));  // 0: the warp has met nobody that min-p keeps
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
        if (!(races[j] <= race_limit) || races[j] == INFINITY || first + j == least_id) continue;
        best = max(best, key_of(score_of(uniform(words[j / 4].x[j % 4]), scale.distance(x[j])), first + j));
    }
}

// Adds a thread's octet to the bins: its masses and best scores, or its count.
template <typename T>
__device__ __forceinline__ void bin_octet(Exchange& exchange, const Octet<T>& x, const Words (&words)[2], int first,
                                          const Scale& scale, const Request& request) {
    const Bins bins(request);
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
        const float distance = scale.distance(x[j]);
        if (!(distance < INFINITY)) continue;
        const int bin = bins.of(distance);
        if (request.counts) {
            atomicAdd(&exchange.pieces[0][bin], 1u);
            continue;
        }
        const Key mass = mass_of(distance);
        if (mass == 0) continue;  // beyond every cut
        add_mass(exchange.pieces, bin, mass);
        const Key best = exchange.bests[bin];
        const float u = uniform(words[j / 4].x[j % 4]);
        if (!(distance <= request.farthest) || (best > 0 && race_of(u, distance) > race_limit_for(value_of(best))))
            continue;
        const Key key = key_of(score_of(u, distance), first + j);
        if (key > best) atomicMax(&exchange.bests[bin], key);
    }
}

// Appends those of a thread's octet that are no farther than `bound` to the row's list.
template <typename T>
__device__ __forceinline__ void list_octet(RowState& state, const Octet<T>& x, int first, const Scale& scale,
                                           float bound, float least_logit) {
#pragma unroll
    for (int j = 0; j < kOctet; ++j) {
        if (x[j] < least_logit) continue;
        const float distance = scale.distance(x[j]);
        if (!(distance <= bound) || distance == INFINITY) continue;
        const uint32_t place = atomicAdd(&state.listed, 1u);
        if (place >= kList) return;
        state.list_distance[place] = distance;
        state.list_id[place] = first + j;
    }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocksPerMultiprocessor) draw_kernel(const __grid_constant__ Sample p) {
    DYNAMIC_SHARED(storage);
    auto& exchange = *reinterpret_cast<Exchange*>(storage);
    const int row = blockIdx.y, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    const int step = kWarps * blocks, segments = (p.vocabulary + kSegment - 1) / kSegment;
    int segment = warp * blocks + block;
    const auto logits = logits_of<T>(p);
    RowState& state = state_of(p);

    // Before the wait: the row and what it asks for are older than the kernel ahead.
    const int64_t at = p.index != nullptr ? p.index[row * p.index_stride] : row;
    const Request request(p, at);
    const Noise noise = {static_cast<uint64_t>(p.seed[at]), static_cast<uint64_t>(p.output[row])};
    Octet<T> x = {};
    Words words[2];
    const auto fetch = [&] {
        const int octet = segment * 32 + lane;
        x = logits.load(octet);
        if (request.scores()) words[0] = noise.words(octet * 2), words[1] = noise.words(octet * 2 + 1);
    };
    if (!request.greedy && segment < segments) fetch();
    if (request.bins) {
        for (int i = 0; i < kPieces; ++i) exchange.pieces[i][threadIdx.x] = 0;
        exchange.bests[threadIdx.x] = 0;
    }
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    Best parts[kMaxBlocks / 32];  // on their way together, and the groups' behind them
#pragma unroll
    for (int i = 0; i < kMaxBlocks / 32; ++i) {
        parts[i] = lane + i * 32 < blocks ? state.largest[lane + i * 32] : Best{-INFINITY, INT32_MAX};
    }
    const float bound_logit =
        request.lists ? bound_of_top_k(exchange, state, blocks * p.groups, request.top_k) : -INFINITY;
    Key largest = 0;
#pragma unroll
    for (const Best& part : parts) largest = max(largest, key_of(part.value, part.id));
    largest = warp_largest(largest);
    const float logit = value_of(largest), scaled = request.greedy ? logit : logit / request.temperature;
    const bool has_id = fabsf(scaled) < INFINITY;  // alike for the whole row
    if (request.greedy || !has_id) {
        if (block == 0 && threadIdx.x == 0) {
            p.ids[row] = has_id ? id_of(largest) : scaled > 0 ? kNotFinite : kNoneAllowed;
        }
        return;
    }

    const Scale scale = {logit, scaled, request.temperature};
    float bound = INFINITY, least_logit = -INFINITY, race_limit = INFINITY;
    if (request.lists) {
        bound = scale.distance(bound_logit);
        least_logit = scale.least_logit(bound);
    }
    __syncthreads();  // the bins are clear
    Key best = 0;
    while (segment < segments) {
        const int first = (segment * 32 + lane) * kOctet;
        if (request.lists) {
            list_octet(state, x, first, scale, bound, least_logit);
        } else if (request.bins) {
            bin_octet(exchange, x, words, first, scale, request);
        } else {
            score_octet(x, words, first, scale, request.farthest, race_limit, best);
        }
        segment += step;
        if (segment < segments) fetch();
    }

    if (request.bins) {
        __syncthreads();
        const int bin = threadIdx.x;
        Key sum = 0;
        for (int piece = 0; piece < kPieces; ++piece) {
            sum += static_cast<Key>(exchange.pieces[piece][bin]) << (piece * kPieceBits);
        }
        if (sum > 0) atomicAdd(&state.sums[bin], sum);
        if (exchange.bests[bin] > 0) atomicMax(&state.bests[bin], exchange.bests[bin]);
    } else if (!request.lists) {
        best = block_largest(exchange, best);
        if (threadIdx.x == 0) atomicMax(&state.bests[0], best);
    }
    __syncthreads();
    if (threadIdx.x == 0) exchange.last = ptx::fetch_add_acq_rel(&state.done, 1) + 1 == gridDim.x;
    __syncthreads();
    if (exchange.last == 0) return;
    best = choose(exchange, state, logits, scale, request, noise);
    if (threadIdx.x == 0) p.ids[row] = id_of(best);
}

}  // namespace

bool sample_supported(const Sample& p) {
    return p.rows >= 1 && p.rows <= 65535 && p.vocabulary >= 1 && p.vocabulary <= kSampleMaxVocabulary;
}

size_t sample_workspace(int rows) {
    return sizeof(RowState) * static_cast<size_t>(rows < kRowsAtOnce ? rows : kRowsAtOnce);
}

cudaError_t sample(Sample p, cudaStream_t stream) {
    if (!sample_supported(p)) return cudaErrorInvalidValue;
    const int size = p.logits_are_float ? 4 : 2, all = p.rows;
    const int segments = (p.vocabulary + kSegment - 1) / kSegment;
    p.vectors = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && p.logits_stride % (16 / size) == 0;
    for (int first = 0; first < all; first += kRowsAtOnce) {
        p.rows = std::min(all - first, kRowsAtOnce);
        const int share = multiprocessor_count() * kBlocksPerMultiprocessor / p.rows;
        const int blocks = std::max(1, std::min({share, segments, kMaxBlocks}));
        for (p.groups = 1; blocks * p.groups < kFewestGroups;) p.groups *= 2;
        const LaunchConfig config = {.grid = dim3(blocks, p.rows),
                                     .block = dim3(kThreads),
                                     // The same for both: blocks of the second fit beside the first.
                                     .shared_bytes = sizeof(Exchange),
                                     .stream = stream,
                                     .programmatic = true};
        const auto run = [&](auto largest, auto draw) {
            const auto status = launch(largest, config, p);
            return status == cudaSuccess ? launch(draw, config, p) : status;
        };
        const auto status = p.logits_are_float ? run(largest_kernel<float>, draw_kernel<float>)
                                               : run(largest_kernel<__nv_bfloat16>, draw_kernel<__nv_bfloat16>);
        if (status != cudaSuccess) return status;
        p.logits = static_cast<const uint8_t*>(p.logits) + kRowsAtOnce * p.logits_stride * size;
        if (p.index != nullptr) {
            p.index += kRowsAtOnce * p.index_stride;
        } else {
            p.temperature += kRowsAtOnce;
            p.top_k += kRowsAtOnce;
            p.top_p += kRowsAtOnce;
            p.min_p += kRowsAtOnce;
            p.seed += kRowsAtOnce;
        }
        p.output += kRowsAtOnce;
        p.ids += kRowsAtOnce;
    }
    return cudaSuccess;
}

}  // namespace tokenspeed
