// The chain of gated_delta_rule_prefill.cu: the warpgroup that walks the chunks with the state in registers, the stages
// of shared memory that it reads, and what it leaves there. See there for the algorithm.
#pragma once
#include <launch_config.h>
#include <ptx_tma.h>

#include "bf16x8.h"
#include "gated_delta_rule_state.h"

namespace tokenspeed::delta_rule_prefill {

constexpr int kOutputStages = 2, kMostStages = 4;
// Where clusters take pairs in turn, the last place of the chain's stages is the state's.
template <bool kInTurn>
constexpr int kChainStages = kInTurn ? kMostStages - 1 : kMostStages;
constexpr int kWarps = kGroupThreads / 32;

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
    uint64_t full[kMostStages], empty[kMostStages];
};

struct Shared {
    ChainStage chain[kMostStages];
    OutputStage outputs[kOutputStages];
    // For the outputs: S before the chunk and V'^T, fp16 in registers of the chain's threads. The same thread of the
    // other warpgroup has them as its A operands.
    uint4 state[8][kGroupThreads], update[4][kGroupThreads];
    alignas(1024) __nv_bfloat16 output[2][kPanel];  // chunks take turns
    Ring chain_ring, output_ring;
    uint64_t state_given, update_given, taken;
    uint64_t state_full, state_left;  // in turn: a pair's state is there, and the one before is in its place
    int cursor;                       // of the state that is there
};
static_assert(sizeof(Shared) <= kSharedLimit);

// A state on its way to the chain and from it: four panels of 64 rows of 32 values, swizzled. Of eight rows the panel
// has 0, 4, 1, 5, ...: the four that half a warp reads at once then lie in different banks.
constexpr int kPanelColumns = 32;
constexpr uint32_t kStateBytes = kColumns * kDim * sizeof(float),
                   kPanelBytes = kColumns * kPanelColumns * sizeof(float);
static_assert(kStateBytes <= sizeof(ChainStage));

__device__ __forceinline__ uint8_t* panel_of_state(Shared& shared, int panel) {
    return reinterpret_cast<uint8_t*>(&shared.chain[kMostStages - 1]) + panel * kPanelBytes;
}

// As pair_of.
__device__ __forceinline__ float2& staged_pair(Shared& shared, const Lane& lane, int j, int h) {
    const int column = j % 4 * 8 + lane.column;
    const int row = lane.row / 8 * 8 + lane.row % 4 * 2 + lane.row % 8 / 4;
    uint8_t* piece = panel_of_state(shared, j / 4) + place(row + 8 * h, column / 4);
    return *reinterpret_cast<float2*>(piece + column % 4 * 4);
}

// The state that is there, or zeros, to registers, and what they hold to its place.
__device__ __forceinline__ void exchange_states(Shared& shared, bool enters, bool leaves, float (&s)[64]) {
    const Lane lane;
    float2 entering[32];
#pragma unroll
    for (int i = 0; i < 32; ++i) entering[i] = enters ? staged_pair(shared, lane, i / 2, i % 2) : float2{};
    if (leaves) {
#pragma unroll
        for (int i = 0; i < 32; ++i) staged_pair(shared, lane, i / 2, i % 2) = float2{s[2 * i], s[2 * i + 1]};
    }
#pragma unroll
    for (int i = 0; i < 32; ++i) s[2 * i] = entering[i].x, s[2 * i + 1] = entering[i].y;
}

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
__device__ __forceinline__ void release_stage(Ring& ring, int stage) {
    __syncwarp();
    if (threadIdx.x % 32 < 2) ptx::mbarrier_arrive_cluster_relaxed(&ring.empty[stage], threadIdx.x % 32);
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

__device__ __forceinline__ void store_cursor(const GatedDeltaRulePrefill& p, const Work& at) {
    if (at.goes_on || at.write_slot < 0 || at.column > 0) return;
    p.cursor[at.write_slot * p.cursor_stride + at.value_head] = at.context + at.length;
}

// The chain: walks the chunks with the transposed state S [64 value columns x 128] in registers. Whatever it does not
// wait for stands where it waits for a product; the next chunk's values come while S takes up this one's. One warp a
// scheduler runs here: an instruction more is a cycle more, and one whose result is used at once many. `done` chunks of
// `turn` earlier pairs lie behind, whose last state is in `s`. Leaves the pair's in `s`.
template <bool kInTurn>
__device__ __forceinline__ void scan(const GatedDeltaRulePrefill& p, const Work& at, const Window& window, int done,
                                     int turn, float (&s)[64], Shared& shared) {
    constexpr int kStages = kChainStages<kInTurn>;
    float x[32], updates[32], values[32];
    const auto leave_state = [&] {
        ptx::fence_async_shared();
        arrive_with_warp(&shared.state_left);
    };
    int cursor;
    if (kInTurn) {
        ptx::mbarrier_wait(&shared.state_full, turn & 1);
        cursor = shared.cursor;
        exchange_states(shared, at.context > 0, turn > 0, s);
    } else {
        cursor = entering_cursor(p, at);
        load_state(p, at, window, s);
    }
    fold_ring(p, at, cursor, s);
    int snapshot = next_snapshot(p, at, at.first_token(at.first));
    uint64_t keys = panel_descriptor(shared.chain[done % kStages].key);  // of the chunk
    if (at.chunks > 0) {
        ptx::mbarrier_wait(&shared.chain_ring.full[done % kStages], done / kStages & 1);
        load_values(at, at.first, shared.chain[done % kStages], values);
    } else if (kInTurn) {
        leave_state();
    }
#pragma unroll 1
    for (int i = 0; i < at.chunks; ++i) {
        const int number = done + i;
        const ChainStage& stage = shared.chain[number % kStages];
        const TokenFactors& factors = stage.factors;
        const int chunk = at.first + i, first = at.first_token(chunk), last = first + kChunk;
        uint32_t state[8][4];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                state[k][i] = ptx::pack_half_saturating(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
            }
        }
        ptx::hold_registers(state);
        ptx::wgmma_fence(x);
#pragma unroll
        for (int k = 0; k < 8; ++k) ptx::wgmma<__half, 64>(x, state[k], keys + step_of_panels(k), k > 0);
        ptx::wgmma_commit();
        float2 weights[8];
        load_factors(weights, factors.carried);
        if (i > 0) release_stage(shared.chain_ring, (number - 1) % kStages);
        if (kInTurn && i == 0) leave_state();
        if (number > 0) ptx::mbarrier_wait(&shared.taken, (number - 1) & 1);
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
#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 weight = weights[2 * k + i / 2];
                const int at = 8 * k + 2 * i;
                operand[k][i] =
                    ptx::pack_half_saturating(values[at] - weight.x * x[at], values[at + 1] - weight.y * x[at + 1]);
            }
        }
        ptx::hold_registers(operand);
        ptx::wgmma_fence(updates);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            ptx::wgmma<__half, 64>(updates, operand[k], keys + kSolveStep + step_of_panels(k), k > 0);
        }
        ptx::wgmma_commit();
#pragma unroll
        for (float& of_state : s) of_state *= decay;
        load_factors(weights, factors.to_end);
        const int step = i + 1 < at.chunks ? 1 : 0, next = number + step;
        const bool full = ptx::mbarrier_test(&shared.chain_ring.full[next % kStages], next / kStages & 1);
        ptx::wgmma_wait<0>(updates);

#pragma unroll
        for (int k = 0; k < 4; ++k) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float2 weight = weights[2 * k + i / 2];
                const int at = 8 * k + 2 * i;
                operand[k][i] = ptx::pack_half_saturating(updates[at] * weight.x, updates[at + 1] * weight.y);
            }
        }
        ptx::hold_registers(operand);
        ptx::wgmma_fence(s);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
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
        load_values(at, chunk + step, shared.chain[next % kStages], values);  // after the last chunk, in vain
        ptx::wgmma_wait<0>(s);

        if (snapshot <= last) {
            for_snapshots(p, at, first, last, [&](int count, int slot) {
                finish_snapshot(stage, updates, count - 1 - first, state_of(p, at, slot));
                if (threadIdx.x == 0 && at.column == 0) p.cursor[slot * p.cursor_stride + at.value_head] = count;
            });
            snapshot = next_snapshot(p, at, last);
        }
    }
    if (at.chunks > 0) release_stage(shared.chain_ring, (done + at.chunks - 1) % kStages);
}

}  // namespace tokenspeed::delta_rule_prefill
