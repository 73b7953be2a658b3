// The gated delta rule over ragged prefills, from convolved q | k | v and raw gates to outputs and states. Contract:
// tokenspeed/ops/delta_rule.py. This file holds the scan over chunks, gated_delta_rule_prepare.cu what comes before it.
//
// Algorithm. Per value head and chunk of 64 tokens, G_t = g_0 + ... + g_t in the chunk and decays only as exponentials
// of differences (Yang et al. 2024):
//     L = strict_lower(beta_i k_i.k_j e^{G_i - G_j}),  A = (I + L)^-1,  P = lower(q_i.k_j e^{G_i - G_j}) dk^-0.5
//     V' = A beta (V - e^G K S^T),  O = e^G dk^-0.5 Q S^T + P V',  S <- e^{G_end} S + V'^T (e^{G_end - G} K)
// Everything but the three products with S depends on the chunk alone: a first kernel makes it, and this one takes
// chunks as their flags say that they are there (docs/kernels/gdn_prefill.md).
// What is serial is the chain over chunks, so it works on S itself, [value columns x 128] in fp32 registers: rounded to
// fp16 it is the A operand of S K^T, whose result, combined with the values, is the A operand of the product with A^T,
// and that of V'^T K, accumulated onto S. Nothing on the chain waits for shared memory but for what was made before.
//
// Tiling. A block owns 64 value columns of one head and sequence, a cluster of two the head. Warpgroup 0 is the chain:
// 20 wgmma, 640 tensor cycles a chunk. It leaves S and V' in shared memory, in fp16, for warpgroup 1, which makes the
// outputs of the chunk (12 wgmma, 384 cycles) while the chain goes on. Two threads bring the tiles of the next chunks:
// bulk copies for both blocks of the cluster at once, and each block's own values by TMA (a row outside the sequence
// counts as zero). Three stages for the chain, 34 KB each, and three for the outputs, 25 KB each.
//
// Windows. The first kernel fills a workspace of some chunks of every sequence, the scan consumes it, and so on; a
// sequence that goes on leaves its state in the workspace. Within a window the two run beside each other: the scan
// starts once all blocks of the first kernel have, on what multiprocessors they leave. It waits for that kernel's end
// only to let the next grid start. Two workspaces, one filled beside the scan of the other, had gained nothing.
//
// Snapshots. V' is causal, so the state after token p is e^{G_p} S + sum_{t <= p} e^{G_p - G_t} v'_t k_t^T: the chain
// stores S as it enters the chunk and adds that sum afterwards, with mma.sync. Its own values pass by untouched:
// outputs are the same bits. Half a block's state is 32 KB; a snapshot costs the chain a microsecond or two.
//
// Precision. Operands are fp16, sums fp32, and two things are kept exact: q and k are only multiplied by a power of two
// (bf16 fits in fp16 then), their norms are applied in fp32 to what they are multiplied with; and the inverse is made
// of fp16 pairs. With keys of cosine 0.9975 and no decay that halves the error of the state. Values and states up to
// 65504 in magnitude, the range of fp16; below 6e-5 they lose digits one by one.
//
// Bytes: q, k, v, o once, 2 x 128 x (2 / ratio + 2) a token and value head, and each state once: 47 us at 8192 tokens
// of 32 heads, 4.3 TB/s; the workspace, written and read, is 290 MB more there. Flops: 164 k a token and head, 56 us.
// The chain a chunk, in cycles: S to fp16 100, X 320, right-hand side 110, A 190, V' to fp16 110, update 320: 1,150.
//
// Measured on an H200 and what it was before, what was tried and lost: docs/kernels/gdn_prefill.md. 16:32 heads, 1 x
// 8192 tokens 188 us, 1 x 32768 705; 16:64, 1 x 8192 294.
//
// budget: prefill_kernel registers<=168 shared<=0 hot sass=HGMMA
#include <launch.h>
#include <ptx_tma.h>

#include <algorithm>

#include "bf16x8.h"
#include "gated_delta_rule_state.h"

namespace tokenspeed {
namespace {

using namespace delta_rule_prefill;

constexpr int kThreads = 384;                              // warpgroups: chain, outputs, and one whose warps move data
constexpr int kChainRegisters = 240, kMoveRegisters = 40;  // per thread, of 168 at the start
constexpr int kStages = 3;
constexpr int kWindowSlots = 260, kLeastWindow = 8;  // chunks of all sequences in a window, and of one at least
constexpr int kAhead = 6;                            // chunks, of asking memory for them
constexpr int kWarps = kGroupThreads / 32;
constexpr uint32_t kOutputBarrier = 1;

// The operands of one chunk, for the chain and for the outputs. All but the values are the same for both halves of a
// head.
struct ChainStage {
    __half key[2 * kPanel], solve[kPanel];
    __nv_bfloat16 value[kPanel];
    alignas(1024) TokenFactors factors;
};
struct OutputStage {
    __half query[2 * kPanel], attention[kPanel];
    alignas(1024) float factors[kChunk];
};
constexpr uint64_t kSolveStep = (offsetof(ChainStage, solve) - offsetof(ChainStage, key)) >> 4;  // of descriptors
constexpr uint32_t kChainBytes = offsetof(ChainStage, factors) + sizeof(TokenFactors);
constexpr uint32_t kOutputBytes = offsetof(OutputStage, factors) + sizeof(OutputStage::factors);

// A stage is full when its bytes are there, and empty when the warps of both blocks that read it are done, since one
// block fills it for both.
struct Ring {
    uint64_t full[kStages], empty[kStages];
};

struct Shared {
    ChainStage chain[kStages];
    OutputStage outputs[kStages];
    // For the outputs: S before the chunk and V'^T, fp16 in registers of the chain's threads. The same thread of the
    // other warpgroup has them as its A operands.
    uint4 state[8][kGroupThreads], update[4][kGroupThreads];
    __nv_bfloat16 output[2][kPanel];  // chunks take turns
    Ring chain_ring, output_ring;
    uint64_t state_given, update_given, taken;
};
static_assert(sizeof(Shared) <= 227 * 1024);

// Turns the state before the chunk, which this thread has stored at `state`, into that after the token at place `last`:
// e^{G_last} S + sum_{t <= last} e^{G_last - G_t} v'_t k_t^T. `updates` are the chunk's V' transposed.
__device__ __forceinline__ void finish_snapshot(const ChainStage& stage, const float (&updates)[32], int last,
                                                float* state) {
    const Lane lane;
    const TokenFactors& factors = stage.factors;
    const float total = factors.total[last];
    uint32_t weighted[4][4];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int token = 8 * j + lane.column;
        const float left =
            token <= last ? ptx::exp2_approximate(total - factors.total[token]) * factors.key_scale[token] : 0.0f;
        const float right = token < last
                                ? ptx::exp2_approximate(total - factors.total[token + 1]) * factors.key_scale[token + 1]
                                : 0.0f;
        weighted[j / 2][j % 2 * 2] = ptx::pack_half_saturating(updates[4 * j] * left, updates[4 * j + 1] * right);
        weighted[j / 2][j % 2 * 2 + 1] =
            ptx::pack_half_saturating(updates[4 * j + 2] * left, updates[4 * j + 3] * right);
    }
    const float decay = ptx::exp2_approximate(total);
#pragma unroll 1
    for (int block = 0; block < kDim / 16; ++block) {
        float sum[2][4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t key[4];
            load_block(threadIdx.x % 32, key, stage.key + block / 4 * kPanel, k, block % 4);
            ptx::mma_m16n8k16<__half>(sum[0], weighted[k], key[0], key[1]);
            ptx::mma_m16n8k16<__half>(sum[1], weighted[k], key[2], key[3]);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float2& pair = pair_of(state, lane, 2 * block + i / 2, i % 2);
            pair = float2{decay * pair.x + sum[i / 2][i % 2 * 2], decay * pair.y + sum[i / 2][i % 2 * 2 + 1]};
        }
    }
}

// Shared address of the 8 x 8 blocks that the thread's lane names for ldmatrix / stmatrix with four of them: tokens 8 j
// .. 8 j + 15, the sixteen value columns of its warp. Transposed, they are accumulators 4 j .. 4 j + 7 of the thread.
__device__ __forceinline__ uint32_t columns_of_warp(const void* tile, int j) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kWarps, token = 8 * (j + lane / 16) + lane % 8;
    return ptx::shared_address(tile) + place(token, warp * 2 + lane / 8 % 2);
}

// Zeroes the values outside the sequence: rows there may be another's, and beta = 0 would not hide an infinite one.
__device__ __forceinline__ void mask_values(uint32_t (&value)[8][2], int begin, int end) {
    const Lane lane;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        const int token = 8 * j + lane.column;
        const uint32_t left = token >= begin && token < end ? 0x0000ffffu : 0;
        const uint32_t right = token + 1 >= begin && token + 1 < end ? 0xffff0000u : 0;
        value[j][0] &= left | right;
        value[j][1] &= left | right;
    }
}

// No block exits while the other may still write to its shared memory.
__device__ __forceinline__ void leave_cluster() {
    ptx::cluster_arrive();
    ptx::cluster_wait();
}

__device__ __forceinline__ void arrive_with_warp(uint64_t* barrier) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

// The factors of the eight pairs of tokens that are a thread's columns.
__device__ __forceinline__ void load_factors(float2 (&pairs)[8], const float* factors) {
    const Lane lane;
#pragma unroll
    for (int j = 0; j < 8; ++j) pairs[j] = *reinterpret_cast<const float2*>(factors + 8 * j + lane.column);
}

// By a warp that has read a stage: two of its lanes tell the two blocks.
__device__ __forceinline__ void release_stage(Ring& ring, int i) {
    __syncwarp();
    if (threadIdx.x % 32 < 2) ptx::mbarrier_arrive_cluster_relaxed(&ring.empty[i % kStages], threadIdx.x % 32);
}

// The values of a chunk, of a thread's two rows and eight pairs of tokens: as an accumulator has them.
__device__ __forceinline__ void load_values(const Work& at, int chunk, const ChainStage& stage, float (&values)[32]) {
    uint32_t pairs[8][2];
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        uint32_t blocks[4];
        ptx::ldmatrix_x4_transposed(blocks, columns_of_warp(stage.value, j));
#pragma unroll
        for (int b = 0; b < 4; ++b) pairs[j + b / 2][b % 2] = blocks[b];
    }
    if (at.begin(chunk) > 0 || at.end(chunk) < kChunk) mask_values(pairs, at.begin(chunk), at.end(chunk));
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        values[2 * i] = __uint_as_float(pairs[i / 2][i % 2] << 16);
        values[2 * i + 1] = __uint_as_float(pairs[i / 2][i % 2] & 0xffff0000u);
    }
}

// The chain: walks the chunks with the transposed state S [64 value columns x 128] in registers. Whatever it does not
// wait for stands where it waits for a product; the next chunk's values come while S takes up this one's. One warp a
// scheduler runs here: an instruction more is a cycle more, and one whose result is used at once many.
__device__ __forceinline__ void scan(const GatedDeltaRulePrefill& p, const Work& at, const Window& window,
                                     Shared& shared) {
    const Lane lane;
    float s[64], x[32], updates[32], values[32];
    load_state(p, at, window, s);
    int snapshot = next_snapshot(p, at, at.first_token(at.first));
    uint64_t keys = panel_descriptor(shared.chain[0].key);  // of the chunk
    if (at.chunks > 0) {
        ptx::mbarrier_wait(&shared.chain_ring.full[0], 0);
        load_values(at, at.first, shared.chain[0], values);
    }
#pragma unroll 1
    for (int i = 0; i < at.chunks; ++i) {
        const ChainStage& stage = shared.chain[i % kStages];
        const TokenFactors& factors = stage.factors;
        const int chunk = at.first + i, first = at.first_token(chunk), last = first + kChunk;
        uint32_t state[8][4];
        ptx::wgmma_fence(x);
#pragma unroll
        for (int k = 0; k < 8; ++k) {  // operands are made while the matrix unit has those before them
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                state[k][i] = ptx::pack_half_saturating(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
            }
            ptx::wgmma_fence();
            ptx::wgmma<__half, 64>(x, state[k], keys + step_of_panels(k), k > 0);
        }
        ptx::wgmma_commit();
        float2 weights[8];
        load_factors(weights, factors.carried);
        if (i > 0) release_stage(shared.chain_ring, i - 1);
        if (i > 0) ptx::mbarrier_wait(&shared.taken, (i - 1) & 1);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            shared.state[k][threadIdx.x] = uint4{state[k][0], state[k][1], state[k][2], state[k][3]};
        }
        arrive_with_warp(&shared.state_given);
        if (snapshot <= last) {
            for_snapshots(p, at, first, last, [&](int, int slot) { store_state(state_of(p, at, slot), s); });
        }
        const float decay = factors.decay[0];
        ptx::wgmma_wait<0>(x);

        // The right-hand side v - e^G S k, transposed, and V' = A diag(beta) times it.
        uint32_t operand[4][4];
        ptx::wgmma_fence(updates);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 weight = weights[2 * k + i / 2];
                const int at = 8 * k + 2 * i;
                operand[k][i] =
                    ptx::pack_half_saturating(values[at] - weight.x * x[at], values[at + 1] - weight.y * x[at + 1]);
            }
            ptx::wgmma_fence();
            ptx::wgmma<__half, 64>(updates, operand[k], keys + kSolveStep + step_of_panels(k), k > 0);
#pragma unroll
            for (int i = 0; k < 2 && i < 32; ++i) s[32 * k + i] *= decay;
        }
        ptx::wgmma_commit();
        load_factors(weights, factors.to_end);
        const int next = i + 1 < at.chunks ? i + 1 : i;
        const bool full = ptx::mbarrier_test(&shared.chain_ring.full[next % kStages], next / kStages & 1);
        ptx::wgmma_wait<0>(updates);

        ptx::wgmma_fence(s);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 weight = weights[2 * k + i / 2];
                const int at = 8 * k + 2 * i;
                operand[k][i] = ptx::pack_half_saturating(updates[at] * weight.x, updates[at + 1] * weight.y);
            }
            ptx::wgmma_fence();
            ptx::wgmma<__half, 128, true>(s, operand[k], keys + (k * 16 * 128 >> 4), true);
        }
        ptx::wgmma_commit();
        keys = panel_descriptor(shared.chain[next % kStages].key);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            shared.update[k][threadIdx.x] = uint4{ptx::pack_half_saturating(updates[8 * k], updates[8 * k + 1]),
                                                  ptx::pack_half_saturating(updates[8 * k + 2], updates[8 * k + 3]),
                                                  ptx::pack_half_saturating(updates[8 * k + 4], updates[8 * k + 5]),
                                                  ptx::pack_half_saturating(updates[8 * k + 6], updates[8 * k + 7])};
        }
        arrive_with_warp(&shared.update_given);
        if (!full) ptx::mbarrier_wait(&shared.chain_ring.full[next % kStages], next / kStages & 1);
        load_values(at, at.first + next, shared.chain[next % kStages], values);  // after the last chunk, in vain
        ptx::wgmma_wait<0>(s);

        if (snapshot <= last) {
            for_snapshots(p, at, first, last, [&](int count, int slot) {
                finish_snapshot(stage, updates, count - 1 - first, state_of(p, at, slot));
                if (threadIdx.x == 0 && at.column == 0) p.cursor[slot * p.cursor_stride + at.value_head] = count;
            });
            snapshot = next_snapshot(p, at, last);
        }
    }
    if (at.chunks > 0) release_stage(shared.chain_ring, at.chunks - 1);
    if (at.goes_on) {
        store_state(carried_state(p, at, window), s);
    } else if (at.write_slot >= 0) {
        store_state(state_of(p, at, at.write_slot), s);
    }
    leave_cluster();  // in place, the other half has read the cursor too
    if (!at.goes_on && at.write_slot >= 0 && at.column == 0 && threadIdx.x == 0) {
        p.cursor[at.write_slot * p.cursor_stride + at.value_head] = at.context + at.length;
    }
}

// The outputs: O^T = (S Q^T) e^G dk^-0.5 + V'^T P^T, [64 value columns x 64 tokens], and their rows to memory.
__device__ __forceinline__ void make_outputs(const GatedDeltaRulePrefill& p, const Work& at, Shared& shared) {
    const int thread = threadIdx.x % kGroupThreads, piece = thread % 8;
    const int64_t stride = static_cast<int64_t>(p.value_heads) * kDim;
    auto* columns = p.out + at.value_head * kDim + at.column + piece * 8;
#pragma unroll 1
    for (int i = 0; i < at.chunks; ++i) {
        const OutputStage& stage = shared.outputs[i % kStages];
        float of_state[32], out[32];
        uint32_t state[8][4], update[4][4];
        float2 scales[8];
        const auto take = [&](uint32_t (&operand)[4], const uint4& from) {
            operand[0] = from.x, operand[1] = from.y, operand[2] = from.z, operand[3] = from.w;
        };
        ptx::mbarrier_wait(&shared.output_ring.full[i % kStages], i / kStages & 1);
        load_factors(scales, stage.factors);
        ptx::mbarrier_wait(&shared.state_given, i & 1);
#pragma unroll
        for (int k = 0; k < 8; ++k) take(state[k], shared.state[k][thread]);
        // Only now that the chain needs the matrix unit least.
        ptx::mbarrier_wait(&shared.update_given, i & 1);
#pragma unroll
        for (int k = 0; k < 4; ++k) take(update[k], shared.update[k][thread]);
        arrive_with_warp(&shared.taken);
        ptx::wgmma_fence(of_state, out);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            ptx::wgmma<__half, 64>(of_state, state[k], panel_descriptor(stage.query) + step_of_panels(k), k > 0);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            ptx::wgmma<__half, 64>(out, update[k], panel_descriptor(stage.attention) + step_of_panels(k), k > 0);
        }
        ptx::wgmma_commit();
        ptx::wgmma_wait<0>(of_state, out);
        release_stage(shared.output_ring, i);
#pragma unroll
        for (int k = 0; k < 32; ++k) out[k] += of_state[k] * (k % 2 == 0 ? scales[k / 4].x : scales[k / 4].y);

        __nv_bfloat16* tile = shared.output[i % 2];
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            uint32_t blocks[4];
#pragma unroll
            for (int b = 0; b < 4; ++b) blocks[b] = pack<__nv_bfloat16>(out[4 * j + 2 * b], out[4 * j + 2 * b + 1]);
            ptx::stmatrix_x4_transposed(columns_of_warp(tile, j), blocks);
        }
        ptx::named_barrier_sync(kOutputBarrier, kGroupThreads);
        const int chunk = at.first + i, begin = at.begin(chunk), end = at.end(chunk);
        auto* rows = columns + at.row(chunk) * stride;
#pragma unroll
        for (int token = thread / 8; token < kChunk; token += kGroupThreads / 8) {
            const auto* from = reinterpret_cast<const uint8_t*>(tile) + place(token, piece);
            if (token >= begin && token < end) {
                ptx::store_16_streaming(rows + token * stride, *reinterpret_cast<const uint4*>(from));
            }
        }
    }
}

constexpr uint16_t kBothBlocks = 3;

__device__ __forceinline__ void wait_until_empty(Ring& ring, int i) {
    if (i >= kStages) ptx::mbarrier_wait_cluster(&ring.empty[i % kStages], (i / kStages - 1) & 1);
}

// The flags of the block's chunks, p.key_heads apart.
__device__ __forceinline__ const uint32_t* ready_of(const GatedDeltaRulePrefill& p, const Work& at,
                                                    const Window& window) {
    return window.ready + int64_t{at.slot} * p.key_heads + at.key_head;
}

// By one thread: the chain's operands. The first block brings what both need, each its own values; chunks further on
// are asked for from memory.
__device__ __forceinline__ void load_chain(const GatedDeltaRulePrefill& p, const Work& at, const Window& window,
                                           const CUtensorMap& map, Shared& shared) {
    const int value = (2 * p.key_heads + at.value_head) * kDim + at.column;
    const KeyTiles* keys = window.keys + int64_t{at.slot} * p.key_heads + at.key_head;
    const HeadTiles* heads = window.heads + int64_t{at.slot} * p.value_heads + at.value_head;
    const uint32_t* ready = ready_of(p, at, window);
    uint32_t known = 0;  // bit j: the tiles of chunk i + j are there
    const auto ask_for = [&](int i) {
        if (i < at.chunks) ptx::tma_prefetch_l2(&map, {value, at.row(at.first + i)});
    };
    for (int i = 0; i < kAhead; ++i) ask_for(i);
#pragma unroll 1
    for (int i = 0; i < at.chunks; ++i) {
        const int later = i + kAhead;
        ask_for(later);
        if (at.rank == 0) {
            if (later < at.chunks && ptx::load_acquire(ready + int64_t{later} * p.key_heads) == 1) {
                known |= 1u << kAhead;
                ptx::bulk_prefetch_l2(keys + int64_t{later} * p.key_heads, sizeof(KeyTiles));
                ptx::bulk_prefetch_l2(heads + int64_t{later} * p.value_heads, kHeadBytes);
            }
            if (known % 2 == 0) ptx::wait_equal(ready + int64_t{i} * p.key_heads, 1);
            known >>= 1;
            ptx::fence_async_global();
        }
        ChainStage& stage = shared.chain[i % kStages];
        uint64_t* full = &shared.chain_ring.full[i % kStages];
        wait_until_empty(shared.chain_ring, i);
        ptx::mbarrier_arrive_expect_tx(full, kChainBytes);
        ptx::tma_load(stage.value, &map, full, {value, at.row(at.first + i)}, ptx::CachePolicy::kEvictFirst);
        if (at.rank != 0) continue;
        const auto& key = keys[int64_t{i} * p.key_heads].key;
        const HeadTiles& head = heads[int64_t{i} * p.value_heads];
        ptx::bulk_load_multicast(stage.key, key, sizeof(key), full, kBothBlocks);
        ptx::bulk_load_multicast(stage.solve, head.solve, sizeof(head.solve), full, kBothBlocks);
        ptx::bulk_load_multicast(&stage.factors, &head.factors, sizeof(head.factors), full, kBothBlocks);
    }
}

// By one thread: those of the outputs, by the second block for both.
__device__ __forceinline__ void load_outputs(const GatedDeltaRulePrefill& p, const Work& at, const Window& window,
                                             Shared& shared) {
    const uint32_t* ready = ready_of(p, at, window);
#pragma unroll 1
    for (int i = 0; i < at.chunks; ++i) {
        OutputStage& stage = shared.outputs[i % kStages];
        uint64_t* full = &shared.output_ring.full[i % kStages];
        if (at.rank != 0) {
            ptx::wait_equal(ready + int64_t{i} * p.key_heads, 1);
            ptx::fence_async_global();
        }
        wait_until_empty(shared.output_ring, i);
        ptx::mbarrier_arrive_expect_tx(full, kOutputBytes);
        if (at.rank == 0) continue;
        const auto& query = window.keys[int64_t{at.slot + i} * p.key_heads + at.key_head].query;
        const HeadTiles& head = window.heads[int64_t{at.slot + i} * p.value_heads + at.value_head];
        ptx::bulk_load_multicast(stage.query, query, sizeof(query), full, kBothBlocks);
        ptx::bulk_load_multicast(stage.attention, head.attention, sizeof(head.attention), full, kBothBlocks);
        ptx::bulk_load_multicast(stage.factors, head.query_factors, sizeof(stage.factors), full, kBothBlocks);
    }
}

__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ GatedDeltaRulePrefill p, const __grid_constant__ CUtensorMap rows,
                   const __grid_constant__ Window window) {
    DYNAMIC_SHARED(storage);
    auto& shared = *reinterpret_cast<Shared*>(storage);
    if (threadIdx.x == 0) {
        for (Ring* ring : {&shared.chain_ring, &shared.output_ring}) {
            for (int i = 0; i < kStages; ++i) {
                ptx::mbarrier_init(&ring->full[i], 1);
                ptx::mbarrier_init(&ring->empty[i], 2 * kWarps);
            }
        }
        for (uint64_t* barrier : {&shared.state_given, &shared.update_given, &shared.taken}) {
            ptx::mbarrier_init(barrier, kWarps);
        }
        ptx::fence_mbarrier_init();
        ptx::load_acquire(window.ready);  // what the first kernel waited for is there; L1 forgets what it was before
    }
    ptx::cluster_sync();
    const Work at(p, window);
    if (at.idle()) {
        ptx::grid_dependency_wait();
        return;
    }
    const uint32_t group = ptx::warp_id() / kWarps;
    if (group == 0) {
        ptx::register_increase<kChainRegisters>();
        scan(p, at, window, shared);
    } else if (group == 1) {
        make_outputs(p, at, shared);
        leave_cluster();
    } else {
        ptx::register_decrease<kMoveRegisters>();
        const uint32_t warp = ptx::warp_id() % kWarps, lane = threadIdx.x % 32;
        if (warp == 0 && lane == 0) load_chain(p, at, window, rows, shared);
        if (warp == 1 && lane == 0) load_outputs(p, at, window, shared);
        if (warp == 2) {  // who waits for this grid waits for the first kernel too
            ptx::grid_dependency_wait();
            ptx::grid_dependency_launch();
        }
        leave_cluster();
    }
}

// Chunks of a sequence of so many tokens, wherever in a chunk it begins.
int max_chunks(int64_t tokens) {
    return tokens > 0 ? static_cast<int>((tokens + kChunk - 2) / kChunk) + 1 : 0;
}

// Chunks that a window has of each sequence.
int window_chunks(const GatedDeltaRulePrefill& p) {
    return std::max(kWindowSlots / std::max(p.sequences, 1), kLeastWindow);
}

// Chunks of a batch that a window may hold, from chunk `first` of its sequences on.
int64_t max_slots(const GatedDeltaRulePrefill& p, int first) {
    const int64_t everywhere = std::min<int64_t>(p.tokens / kChunk + 2 * int64_t{p.sequences}, p.tokens);
    // Who reaches the window has more than the chunks before it, all of them full but the first.
    const int64_t sequences = first == 0 ? p.sequences : p.tokens / ((first - 1) * kChunk);
    return std::min(everywhere, std::min<int64_t>(sequences, p.sequences) * window_chunks(p));
}

// How the workspace is laid out: the tiles of a window, then what sequences carry from one to the next.
struct Workspace {
    int64_t keys, heads, carry, bytes;  // bytes of the key tiles, of all tiles, of these and the flags, of all

    explicit Workspace(const GatedDeltaRulePrefill& p) {
        const int64_t slots = max_slots(p, 0), distance = Window::carry_distance(window_chunks(p));
        const bool one = max_chunks(p.longest) <= window_chunks(p);
        keys = slots * p.key_heads * sizeof(KeyTiles);
        heads = keys + slots * p.value_heads * sizeof(HeadTiles);
        carry = heads + (slots * p.key_heads * sizeof(uint32_t) / 16 + 1) * 16;
        bytes = carry + (one ? 0 : p.tokens / distance + 1) * p.value_heads * kDim * kDim * sizeof(float);
    }
};

}  // namespace

bool gated_delta_rule_prefill_supported(const GatedDeltaRulePrefill& p) {
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    return p.key_heads > 0 && p.value_heads % p.key_heads == 0 &&
           p.value_heads / p.key_heads <= kMaxValueHeadsPerKeyHead && p.value_heads <= 65535 && p.sequences <= 65535 &&
           max_slots(p, 0) <= 65535 && p.qkv_stride % 8 == 0 && p.state_stride % 4 == 0 && aligned(p.qkv) &&
           aligned(p.state) && aligned(p.out);
}

int64_t gated_delta_rule_prefill_workspace(const GatedDeltaRulePrefill& p) {
    return Workspace(p).bytes;
}

cudaError_t gated_delta_rule_prefill(const GatedDeltaRulePrefill& p, cudaStream_t stream) {
    if (!gated_delta_rule_prefill_supported(p)) return cudaErrorInvalidValue;
    CUtensorMap rows{};
    if (p.tokens > 0) {
        const auto channels = static_cast<uint64_t>(2 * p.key_heads + p.value_heads) * kDim;
        const TensorLayout<2> boxes{.base = p.qkv,
                                    .sizes = {channels, static_cast<uint64_t>(p.tokens)},
                                    .strides = {2, static_cast<uint64_t>(p.qkv_stride) * 2},
                                    .box = {kColumns, kChunk}};
        const auto status = encode_tensor_map(&rows, TensorElement::kBf16, boxes, Swizzle::k128);
        if (status != cudaSuccess) return status;
    }
    const LaunchConfig config{.grid = dim3(kDim / kColumns, p.value_heads, p.sequences),
                              .block = kThreads,
                              .shared_bytes = sizeof(Shared),
                              .stream = stream,
                              .cluster = dim3(kDim / kColumns),
                              .programmatic = true,
                              .takes_flags = true};
    const Workspace layout(p);
    auto* workspace = static_cast<uint8_t*>(p.workspace);
    const int chunks = window_chunks(p), longest = max_chunks(p.longest);
    for (int first = 0; first == 0 || first < longest; first += chunks) {
        const Window window{.first = first,
                            .chunks = chunks,
                            .slots = static_cast<int>(max_slots(p, first)),
                            .keys = reinterpret_cast<KeyTiles*>(workspace),
                            .heads = reinterpret_cast<HeadTiles*>(workspace + layout.keys),
                            .ready = reinterpret_cast<uint32_t*>(workspace + layout.heads),
                            .carry = reinterpret_cast<float*>(workspace + layout.carry)};
        auto status = gated_delta_rule_prepare(p, rows, window, std::min(chunks, longest - first), stream);
        if (status == cudaSuccess) status = launch(prefill_kernel, config, p, rows, window);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

}  // namespace tokenspeed
