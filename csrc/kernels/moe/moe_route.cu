// Routing of a mixture of experts: softmax in fp32, top-k, renormalised weights, and the choices grouped by expert.
//
// Floor: latency. 64 tokens x 256 experts read 32 KB and write 5 KB; a decode layer waits for the whole of it.
//
// Selection: a warp per token, see moe_select.h. Rows of padding, where the caller names them, choose the expert behind
// the last, which nobody has: their choices come last in the order.
//
// Grouping is stable in the token and free of float or racing atomics: bit t of member[t / 32][expert] says that token
// t chose the expert. Counts are population counts, offsets their prefix sum, and a choice's place is its expert's
// offset plus the members before its token. Up to kRouteOneLaunch tokens one cluster does it all, 32 tokens a block;
// each block writes its word of bits into the shared memory of all, and then they need no more talk. More tokens take
// two launches: selection by as many blocks as there are tokens / 8, then grouping by 128 blocks that own two or four
// experts each and walk the list of choices twice: count, then place. Each also counts the choices of lower experts, so
// blocks need not talk. A workspace of per-block counts would read the list once, but operators allocate only outputs.
//
// Measured, and what was tried: docs/kernels/moe_decode.md.
//
// budget: route_kernel registers<=64 shared<=0 hot
// budget: select_kernel registers<=64 shared<=0 hot
// budget: group_kernel registers<=64 shared<=0 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <algorithm>

#include "bf16x8.h"
#include "kernels.h"
#include "moe_select.h"

namespace tokenspeed {
namespace {

constexpr int kMaxBlocks = 8;    // of a cluster
constexpr int kLeastTokens = 8;  // of a block of route_kernel; kRouteOneLaunch / kMaxBlocks at most, a word of bits
constexpr int kGroupBlocks = 128;
constexpr int kGroupWarps = 32;

// This lane's logits of a token.
template <int kPerLane>
__device__ __forceinline__ void load_logits(float (&logits)[kPerLane], const __nv_bfloat16* row) {
    const __nv_bfloat16* mine = row + threadIdx.x % 32 * kPerLane;
    uint4 packed[kPerLane / 8];
#pragma unroll
    for (int i = 0; i < kPerLane / 8; ++i) packed[i] = ptx::load_16_no_allocate(mine + i * 8);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) logits[i] = unpack(packed[i / 8]).v[i % 8];
}

// A cluster for all tokens, block_tokens (at most 32) a block, a warp a token or more. Threads: at least `experts`.
template <int kPerLane>
__global__ void __launch_bounds__(1024)
    route_kernel(const __nv_bfloat16* logits, int64_t logits_stride, SequenceRows sequences,
                 __nv_bfloat16* __restrict__ weights, int32_t* __restrict__ chosen, int32_t* __restrict__ order,
                 int32_t* __restrict__ offsets, int tokens, int top_k, int block_tokens) {
    constexpr int kExperts = 32 * kPerLane;
    DYNAMIC_SHARED(shared);
    auto* member = reinterpret_cast<uint32_t*>(shared);  // [blocks, experts]: of every block
    const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
    // A word more than experts: the tokens of padding.
    auto* own = member + blocks * (kExperts + 1);                  // [experts + 1]: of this block
    auto* place = reinterpret_cast<int32_t*>(own + kExperts + 1);  // [experts + 1]: of the block's first member
    int32_t* warp_total = place + kExperts + 1;                    // [32]
    int32_t* local_choice = warp_total + 32;                       // [block_tokens, top_k]
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32;
    const int first_token = block * block_tokens, local_tokens = min(tokens - first_token, block_tokens);
    for (int i = threadIdx.x; i <= kExperts; i += blockDim.x) own[i] = 0;
    __syncthreads();
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    for (int token = warp; token < local_tokens; token += warps) {
        const bool padding = is_padding(sequences, first_token + token);
        float mine[kPerLane];
        load_logits(mine, logits + (first_token + token) * logits_stride);
        Choice choice = select_experts(mine, top_k);
        const float weight = padding ? 0.0f : weight_of(choice, top_k);
        if (padding) choice.expert = kExperts;
        if (lane < top_k) {
            const int flat = (first_token + token) * top_k + lane;
            weights[flat] = __float2bfloat16(weight);
            chosen[flat] = choice.expert;
            local_choice[token * top_k + lane] = choice.expert;
            atomicOr(&own[choice.expert], 1u << token);
        }
    }
    __syncthreads();
    const int expert = threadIdx.x;
    if (blocks > 1) {
        ptx::cluster_sync();  // every block has started
        for (int other = 0; expert < kExperts && other < blocks; ++other) {
            auto* theirs = ptx::cluster_map(member, other) + block * (kExperts + 1);
            theirs[expert] = own[expert];
            if (expert == 0) theirs[kExperts] = own[kExperts];
        }
        ptx::cluster_sync();
    } else if (expert < kExperts) {
        member[expert] = own[expert];
    }

    int count = 0, before = 0;  // members of expert threadIdx.x in all blocks, and in those before this one
    if (expert < kExperts) {
        for (int other = 0; other < blocks; ++other) {
            const int members = __popc(member[other * (kExperts + 1) + expert]);
            if (other < block) before += members;
            count += members;
        }
    }
    int through = warp_running_sum(count);
    if (lane == 31) warp_total[warp] = through;
    __syncthreads();
    if (expert < kExperts) {
        int offset = through - count;
        for (int w = 0; w < warp; ++w) offset += warp_total[w];
        place[expert] = offset + before;
        if (block == 0) offsets[expert] = offset;
        if (block == 0 && expert == kExperts - 1) offsets[kExperts] = offset + count;
        if (expert == kExperts - 1) {  // each token of padding has all its choices behind the others'
            int padding_before = 0;
            for (int other = 0; other < block; ++other) {
                padding_before += __popc(member[other * (kExperts + 1) + kExperts]);
            }
            place[kExperts] = offset + count + padding_before * top_k;
        }
    }
    __syncthreads();

    for (int i = threadIdx.x; i < local_tokens * top_k; i += blockDim.x) {
        const int token = i / top_k, chosen_expert = local_choice[i];
        const int earlier = __popc(own[chosen_expert] & ((1u << token) - 1));
        const int behind = chosen_expert < kExperts ? earlier : earlier * top_k + i % top_k;
        order[place[chosen_expert] + behind] = first_token * top_k + i;
    }
}

constexpr int kSelectWarps = 8;

template <int kPerLane>
__global__ void __launch_bounds__(kSelectWarps * 32)
    select_kernel(const __nv_bfloat16* logits, int64_t logits_stride, SequenceRows sequences,
                  __nv_bfloat16* __restrict__ weights, int32_t* __restrict__ chosen, int tokens, int top_k) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const int token = blockIdx.x * kSelectWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
    if (token >= tokens) return;
    const bool padding = is_padding(sequences, token);
    float mine[kPerLane];
    load_logits(mine, logits + token * logits_stride);
    Choice choice = select_experts(mine, top_k);
    const float weight = padding ? 0.0f : weight_of(choice, top_k);
    if (padding) choice.expert = 32 * kPerLane;
    if (lane < top_k) {
        weights[int64_t(token) * top_k + lane] = __float2bfloat16(weight);
        chosen[int64_t(token) * top_k + lane] = choice.expert;
    }
}

// The part of the choices that a warp walks: whole rows of 32, kRows of them loaded together.
constexpr int kRows = 8;

// Experts of rows base, base + 32, ...; experts + 1, which nobody owns, past the end.
__device__ void load_choices(int (&expert)[kRows], const int32_t* chosen, int base, int end, int experts) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
        const int flat = base + i * 32 + lane;
        expert[i] = flat < end ? chosen[flat] : experts + 1;
    }
}

// Block b owns experts b kOwned .. + kOwned - 1, the last block also the one behind them, of padding. Each warp walks
// one contiguous part of the choices.
template <int kOwned>
__global__ void __launch_bounds__(kGroupWarps * 32)
    group_kernel(const int32_t* chosen, int32_t* __restrict__ order, int32_t* __restrict__ offsets, int choices) {
    constexpr int kExperts = kGroupBlocks * kOwned;
    DYNAMIC_SHARED(shared);
    auto* lower = reinterpret_cast<int32_t*>(shared);  // [warps]: choices of experts below the block's
    int32_t* counts = lower + kGroupWarps;             // [kOwned + 1, warps]
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int owned = blockIdx.x * kOwned;
    const int part = (choices + kGroupWarps * 32 - 1) / (kGroupWarps * 32) * 32;
    const int begin = min(warp * part, choices), end = min(begin + part, choices);

    int expert[kRows];
    int below = 0, count[kOwned + 1]{};
    const bool has_padding = owned + kOwned == kExperts;
    for (int base = begin; base < end; base += kRows * 32) {
        load_choices(expert, chosen, base, end, kExperts);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            below += expert[row] < owned;
#pragma unroll
            for (int i = 0; i <= kOwned; ++i) count[i] += expert[row] == owned + i;
        }
    }
    below = warp_sum(below);
    if (lane == 0) lower[warp] = below;
#pragma unroll
    for (int i = 0; i <= kOwned; ++i) {
        count[i] = warp_sum(count[i]);
        if (lane == 0) counts[i * kGroupWarps + warp] = count[i];
    }
    __syncthreads();

    int place[kOwned + 1];  // of the warp's next choice of each owned expert
    int next = warp_sum(lower[lane]);
#pragma unroll
    for (int i = 0; i <= kOwned; ++i) {
        if (threadIdx.x == 0 && (i < kOwned || has_padding)) offsets[owned + i] = next;
        const int members = counts[i * kGroupWarps + lane];
        place[i] = next + warp_sum(lane < warp ? members : 0);
        next += warp_sum(members);
    }

    for (int base = begin; base < end; base += kRows * 32) {
        load_choices(expert, chosen, base, end, kExperts);
#pragma unroll
        for (int row = 0; row < kRows; ++row) {
            const int which = expert[row] - owned;
            if (__ballot_sync(kAllLanes, which >= 0 && which < kOwned + has_padding) == 0) continue;
#pragma unroll
            for (int i = 0; i <= kOwned; ++i) {
                if (i == kOwned && !has_padding) break;
                const unsigned members = __ballot_sync(kAllLanes, which == i);
                if (which == i) order[place[i] + __popc(members & ((1u << lane) - 1))] = base + row * 32 + lane;
                place[i] += __popc(members);
            }
        }
    }
}

template <int kPerLane>
cudaError_t route(const __nv_bfloat16* logits, int64_t logits_stride, SequenceRows sequences, __nv_bfloat16* weights,
                  int32_t* chosen, int32_t* order, int32_t* offsets, int tokens, int top_k, cudaStream_t stream) {
    constexpr int kExperts = 32 * kPerLane;
    LaunchConfig config;
    config.stream = stream;
    config.programmatic = true;
    if (tokens <= kRouteOneLaunch) {
        int blocks = 1, block_tokens = kLeastTokens;
        while (blocks < kMaxBlocks && blocks * block_tokens < tokens) blocks *= 2;
        while (blocks * block_tokens < tokens) block_tokens *= 2;
        config.grid = dim3(static_cast<unsigned>(blocks));
        config.cluster = config.grid;
        config.block = dim3(static_cast<unsigned>(std::max(kExperts, block_tokens * 32)));
        config.shared_bytes = sizeof(int32_t) * ((blocks + 2) * (kExperts + 1) + 32 + block_tokens * top_k);
        return launch(route_kernel<kPerLane>, config, logits, logits_stride, sequences, weights, chosen, order, offsets,
                      tokens, top_k, block_tokens);
    }
    config.grid = dim3(static_cast<unsigned>((tokens + kSelectWarps - 1) / kSelectWarps));
    config.block = dim3(kSelectWarps * 32);
    const auto status =
        launch(select_kernel<kPerLane>, config, logits, logits_stride, sequences, weights, chosen, tokens, top_k);
    if (status != cudaSuccess) return status;
    constexpr int kOwned = kExperts / kGroupBlocks;
    config.grid = dim3(kGroupBlocks);
    config.block = dim3(kGroupWarps * 32);
    config.shared_bytes = sizeof(int32_t) * kGroupWarps * (2 + kOwned);
    return launch(group_kernel<kOwned>, config, chosen, order, offsets, tokens * top_k);
}

}  // namespace

cudaError_t moe_route(const __nv_bfloat16* logits, int64_t logits_stride, SequenceRows sequences,
                      __nv_bfloat16* weights, int32_t* chosen, int32_t* order, int32_t* offsets, int tokens,
                      int experts, int top_k, cudaStream_t stream) {
    const auto run = experts == 256 ? route<8> : route<16>;
    return run(logits, logits_stride, sequences, weights, chosen, order, offsets, tokens, top_k, stream);
}

}  // namespace tokenspeed
