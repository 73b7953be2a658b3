// Routing of a mixture of experts: softmax in fp32, top-k, renormalised weights, and the choices grouped by expert.
//
// Floor: latency. 64 tokens x 256 experts read 32 KB and write 5 KB; a decode layer waits for the whole of it.
//
// Selection: a warp per token, each lane with experts / 32 neighbouring probabilities in registers. A round takes the
// lane's best (its lowest index on ties), the warp's greatest probability and the lowest expert that has it (two warp
// reductions), and strikes it out. Probabilities are compared as their bit patterns: they are not negative, and a NaN
// counts as the greatest, so that a padding row of garbage still gives distinct, valid experts.
//
// Grouping is stable in the token and free of float or racing atomics: bit t of member[t / 32][expert] says that token
// t chose the expert. Counts are population counts, offsets their prefix sum, and a choice's place is its expert's
// offset plus the members before its token. Up to kRouteOneLaunch tokens one block does it all, bits in shared memory.
// More tokens take two launches: selection by as many blocks as there are tokens / 8, then grouping by blocks that own
// kOwned experts each and walk the list of choices twice: count, then place. Each also counts the choices of lower
// experts, so blocks need not talk. A workspace of per-block counts would read the list once, but operators allocate
// only outputs.
//
// Predicted: 1 token 2.6 us, 64 tokens x 256 experts 4.5 us, 8192 tokens 20 us.
//
// budget: route_kernel registers<=64 shared<=32768 hot
// budget: select_kernel registers<=64 shared<=0 hot
// budget: group_kernel registers<=64 shared<=2048
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <algorithm>

#include "bf16x8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kOwned = 4;  // experts per block of group_kernel
constexpr int kGroupWarps = 32;

// The rank-th choice of a token, held by lane `rank` of its warp.
struct Choice {
    int expert;
    float weight;
};

// kPerLane: probabilities per lane, a multiple of 8. Called by a whole warp.
template <int kPerLane>
__device__ Choice select_experts(const __nv_bfloat16* logits, int top_k) {
    const int lane = threadIdx.x % 32;
    float p[kPerLane];
    float greatest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPerLane; i += 8) {
        const Float8 x = unpack(ptx::load_16_no_allocate(logits + lane * kPerLane + i));
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            p[i + j] = x.v[j];
            greatest = fmaxf(greatest, x.v[j]);
        }
    }
    greatest = warp_maximum(greatest);
    // The common factor 1 / sum of the softmax cancels when the chosen weights are renormalised.
    uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
        p[i] = expf(p[i] - greatest);
        best = max(best, __float_as_uint(p[i]));
    }
    Choice mine{0, 0};
    float total = 0;
    uint32_t struck = 0;  // bit i: p[i] has been chosen
    for (int rank = 0; rank < top_k; ++rank) {
        const uint32_t winner = __reduce_max_sync(kAllLanes, best);
        int candidate = 32 * kPerLane;
#pragma unroll
        for (int i = kPerLane - 1; i >= 0; --i) {
            if (!(struck >> i & 1) && __float_as_uint(p[i]) == winner) candidate = lane * kPerLane + i;
        }
        const int expert = static_cast<int>(__reduce_min_sync(kAllLanes, static_cast<unsigned>(candidate)));
        if (expert / kPerLane == lane) {
            struck |= 1u << (expert % kPerLane);
            best = 0;
#pragma unroll
            for (int i = 0; i < kPerLane; ++i) {
                if (!(struck >> i & 1)) best = max(best, __float_as_uint(p[i]));
            }
        }
        total += __uint_as_float(winner);
        if (lane == rank) mine = {expert, __uint_as_float(winner)};
    }
    mine.weight /= total;
    return mine;
}

// One block for all tokens. Threads: at least `experts`, a multiple of 32.
template <int kPerLane>
__global__ void __launch_bounds__(1024)
    route_kernel(const __nv_bfloat16* __restrict__ logits, __nv_bfloat16* __restrict__ weights,
                 int32_t* __restrict__ chosen, int32_t* __restrict__ order, int32_t* __restrict__ offsets, int tokens,
                 int top_k) {
    constexpr int kExperts = 32 * kPerLane;
    DYNAMIC_SHARED(shared);
    const int words = (tokens + 31) / 32;
    auto* member = reinterpret_cast<uint32_t*>(shared);                   // [words, experts]
    auto* first = reinterpret_cast<int32_t*>(member + words * kExperts);  // [experts], the offsets
    int32_t* warp_total = first + kExperts;                               // [32]
    int32_t* local_choice = warp_total + 32;                              // [tokens, top_k]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    for (int i = threadIdx.x; i < words * kExperts; i += blockDim.x) member[i] = 0;
    __syncthreads();
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    for (int token = warp; token < tokens; token += warps) {
        const Choice choice = select_experts<kPerLane>(logits + int64_t(token) * kExperts, top_k);
        if (lane < top_k) {
            const int flat = token * top_k + lane;
            weights[flat] = __float2bfloat16(choice.weight);
            chosen[flat] = choice.expert;
            local_choice[flat] = choice.expert;
            atomicOr(&member[token / 32 * kExperts + choice.expert], 1u << token % 32);
        }
    }
    __syncthreads();

    int count = 0;  // of expert threadIdx.x
    if (threadIdx.x < kExperts) {
        for (int word = 0; word < words; ++word) count += __popc(member[word * kExperts + threadIdx.x]);
    }
    int through = count;
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
        const int other = __shfl_up_sync(kAllLanes, through, distance);
        if (lane >= distance) through += other;
    }
    if (lane == 31) warp_total[warp] = through;
    __syncthreads();
    if (threadIdx.x < kExperts) {
        int before = through - count;
        for (int w = 0; w < warp; ++w) before += warp_total[w];
        first[threadIdx.x] = before;
        offsets[threadIdx.x] = before;
        if (threadIdx.x == kExperts - 1) offsets[kExperts] = before + count;
    }
    __syncthreads();

    for (int flat = threadIdx.x; flat < tokens * top_k; flat += blockDim.x) {
        const int token = flat / top_k, expert = local_choice[flat];
        int place = first[expert];
        for (int word = 0; word < token / 32; ++word) place += __popc(member[word * kExperts + expert]);
        place += __popc(member[token / 32 * kExperts + expert] & ((1u << token % 32) - 1));
        order[place] = flat;
    }
}

constexpr int kSelectWarps = 8;

template <int kPerLane>
__global__ void __launch_bounds__(kSelectWarps * 32)
    select_kernel(const __nv_bfloat16* __restrict__ logits, __nv_bfloat16* __restrict__ weights,
                  int32_t* __restrict__ chosen, int tokens, int top_k) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const int token = blockIdx.x * kSelectWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= tokens) return;
    const Choice choice = select_experts<kPerLane>(logits + int64_t(token) * 32 * kPerLane, top_k);
    if (lane < top_k) {
        weights[int64_t(token) * top_k + lane] = __float2bfloat16(choice.weight);
        chosen[int64_t(token) * top_k + lane] = choice.expert;
    }
}

// Block b owns experts b kOwned .. + kOwned - 1. Each warp walks one contiguous part of the choices, 32 at a time.
__global__ void __launch_bounds__(kGroupWarps * 32)
    group_kernel(const int32_t* chosen, int32_t* __restrict__ order, int32_t* __restrict__ offsets, int choices,
                 int experts) {
    DYNAMIC_SHARED(shared);
    auto* lower = reinterpret_cast<int32_t*>(shared);  // [warps]: choices of experts below the block's
    int32_t* counts = lower + kGroupWarps;             // [kOwned, warps]
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int owned = blockIdx.x * kOwned;
    const int part = (choices + kGroupWarps * 32 - 1) / (kGroupWarps * 32) * 32;
    const int begin = min(warp * part, choices), end = min(begin + part, choices);

    int below = 0, count[kOwned]{};
    for (int base = begin; base < end; base += 32) {
        const int expert = base + lane < end ? chosen[base + lane] : experts;
        below += expert < owned;
#pragma unroll
        for (int i = 0; i < kOwned; ++i) count[i] += expert == owned + i;
    }
    below = static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(below)));
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        count[i] = static_cast<int>(__reduce_add_sync(kAllLanes, static_cast<unsigned>(count[i])));
        if (lane == 0) counts[i * kGroupWarps + warp] = count[i];
    }
    if (lane == 0) lower[warp] = below;
    __syncthreads();

    int place[kOwned];  // of the warp's next choice of each owned expert
    int next = 0;
    for (int w = 0; w < kGroupWarps; ++w) next += lower[w];
#pragma unroll
    for (int i = 0; i < kOwned; ++i) {
        if (threadIdx.x == 0) offsets[owned + i] = next;
        place[i] = next;
        for (int w = 0; w < kGroupWarps; ++w) {
            const int members = counts[i * kGroupWarps + w];
            if (w < warp) place[i] += members;
            next += members;
        }
    }
    if (threadIdx.x == 0 && owned + kOwned == experts) offsets[experts] = next;

    for (int base = begin; base < end; base += 32) {
        const int expert = base + lane < end ? chosen[base + lane] : experts;
#pragma unroll
        for (int i = 0; i < kOwned; ++i) {
            const unsigned members = __ballot_sync(kAllLanes, expert == owned + i);
            if (expert == owned + i) order[place[i] + __popc(members & ((1u << lane) - 1))] = base + lane;
            place[i] += __popc(members);
        }
    }
}

template <int kPerLane>
cudaError_t route(const __nv_bfloat16* logits, __nv_bfloat16* weights, int32_t* chosen, int32_t* order,
                  int32_t* offsets, int tokens, int top_k, cudaStream_t stream) {
    constexpr int kExperts = 32 * kPerLane;
    LaunchConfig config;
    config.stream = stream;
    config.programmatic = true;
    if (tokens <= kRouteOneLaunch) {
        const int words = (tokens + 31) / 32;
        config.grid = dim3(1);
        config.block = dim3(static_cast<unsigned>(std::max(kExperts, std::min(tokens, 32) * 32)));
        config.shared_bytes = sizeof(int32_t) * (words * kExperts + kExperts + 32 + tokens * top_k);
        return launch(route_kernel<kPerLane>, config, logits, weights, chosen, order, offsets, tokens, top_k);
    }
    config.grid = dim3(static_cast<unsigned>((tokens + kSelectWarps - 1) / kSelectWarps));
    config.block = dim3(kSelectWarps * 32);
    const auto status = launch(select_kernel<kPerLane>, config, logits, weights, chosen, tokens, top_k);
    if (status != cudaSuccess) return status;
    config.grid = dim3(kExperts / kOwned);
    config.block = dim3(kGroupWarps * 32);
    config.shared_bytes = sizeof(int32_t) * kGroupWarps * (1 + kOwned);
    return launch(group_kernel, config, chosen, order, offsets, tokens * top_k, kExperts);
}

}  // namespace

cudaError_t moe_route(const __nv_bfloat16* logits, __nv_bfloat16* weights, int32_t* chosen, int32_t* order,
                      int32_t* offsets, int tokens, int experts, int top_k, cudaStream_t stream) {
    return experts == 256 ? route<8>(logits, weights, chosen, order, offsets, tokens, top_k, stream)
                          : route<16>(logits, weights, chosen, order, offsets, tokens, top_k, stream);
}

}  // namespace tokenspeed
