// The gated delta rule over ragged prefills, from convolved q | k | v and raw gates to outputs and states, in one
// launch. Contract: tokenspeed/ops/delta_rule.py.
//
// Algorithm. Per value head and chunk of 64 tokens, G_t = g_0 + ... + g_t in the chunk and decays only as exponentials
// of differences (Yang et al. 2024):
//     L = strict_lower(beta_i k_i.k_j e^{G_i - G_j}),  A = (I + L)^-1,  P = lower(q_i.k_j e^{G_i - G_j}) dk^-0.5
//     V' = A (beta (V - e^G K S^T)),  O = e^G dk^-0.5 Q S^T + P V',  S <- e^{G_end} S + V'^T (e^{G_end - G} K)
// Everything but the three products with S depends on the chunk alone. What is serial is the chain over chunks, so it
// works on S itself, [value columns x 128] in fp32 registers: rounded to fp16 it is the A operand of S K^T and S Q^T,
// whose results, combined with the values, are the A operand of the product with A^T, and that of V'^T K, accumulated
// onto S. Nothing on the chain passes through shared memory but the operands that were made before.
//
// Tiling. A block owns 64 value columns of one head and sequence, a cluster of two the head. Warpgroup 0 is the chain:
// 28 wgmma, 1,024 tensor cycles a chunk. Warpgroups 1 and 2 prepare: unit k and q, k k^T and q k^T, the decays, the
// inverse by 16 x 16 blocks. Both halves need the same, so each block prepares every second chunk and copies it to the
// other's shared memory. Warpgroup 3 moves raw rows in (TMA; a row outside the sequence counts as zero) and outputs
// out. Three stages of 58 KB, and room for the raw keys and queries of the chunk to be prepared next.
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
// of 32 heads, 4.3 TB/s. Flops: 164 k a token and head, 56 us there. The chain a chunk, in cycles: S to fp16 60, X 320,
// right-hand side 180, A 190, V' to fp16 100, update 320: about 1,200, and S Q^T (2 x 128) and P V' (128) fit in its
// gaps. Issue slots a chunk of the busiest scheduler, counted in the machine code: the chain 560, half a preparation
// 1,150: 1,700 cycles a chunk were predicted.
//
// Measured on an H100, heads 16:32: 1 x 2048 tokens 154 us, 1 x 8192 598 us, 1 x 32768 2.32 ms; 16:64: 1 x 8192 630 us,
// 4 x 8192 2.47 ms; 16:16: 1 x 8192 504 us. That is 4.7 us a chunk whatever the heads, 8,500 cycles, five times the
// prediction and five times the goal: what is waited for, not what is issued. Next: time it with stages left out
// (preparation alone, chain alone, without the copies between the two blocks) before anything is changed.
//
// Tried and lost, at compile time: P V' under way over the end of the loop (ptxas serialises every wgmma, C7514);
// warpgroups that prepare whole chunks in turn for their own block alone (2,900 issue slots a chunk); raw rows loaded
// into registers (spills at 128). On the card: a block that prepares for itself alone, raw rows by 16-byte loads, 697
// us at 1 x 8192.
//
// budget: prefill_kernel registers<=128 shared<=0 hot sass=HGMMA
#include <launch.h>
#include <ptx_tma.h>

#include "gated_delta_rule_prefill.h"

namespace tokenspeed {
namespace {

using namespace delta_rule_prefill;

constexpr int kThreads = 512;  // warpgroups: scan, keys, queries, and one whose warps move data
constexpr int kScanRegisters = 208, kMoveRegisters = 40;  // per thread, of 128 at the start: 504 with 2 x 128
constexpr int kNoSnapshot = INT32_MAX;

// Place of a thread in an accumulator: rows `row` and `row` + 8 are value columns, pairs of columns start at `column`.
struct Lane {
    int row, column;
    __device__ Lane() : row(threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4), column(threadIdx.x % 4 * 2) {}
};

// The 64 x 128 part of a slot's state that belongs to the block.
__device__ __forceinline__ float* state_of(const GatedDeltaRulePrefill& p, const Work& at, int slot) {
    return p.state + slot * p.state_stride + (static_cast<int64_t>(at.value_head) * kDim + at.column) * kDim;
}

__device__ __forceinline__ float2& pair_of(float* state, const Lane& lane, int j, int h) {
    return *reinterpret_cast<float2*>(state + (lane.row + 8 * h) * kDim + 8 * j + lane.column);
}

__device__ __forceinline__ void store_state(float* state, const float (&s)[64]) {
    const Lane lane;
#pragma unroll
    for (int i = 0; i < 32; ++i) pair_of(state, lane, i / 2, i % 2) = float2{s[2 * i], s[2 * i + 1]};
}

// The state after `context` tokens: the slot's, then the updates that still wait in its ring, oldest first.
__device__ __forceinline__ void load_state(const GatedDeltaRulePrefill& p, const Work& at, float (&s)[64]) {
    const Lane lane;
#pragma unroll
    for (int i = 0; i < 64; ++i) s[i] = 0;
    if (at.context == 0) return;
    float* state = state_of(p, at, at.read_slot);
#pragma unroll
    for (int i = 0; i < 32; ++i) {
        const float2 pair = pair_of(state, lane, i / 2, i % 2);
        s[2 * i] = pair.x;
        s[2 * i + 1] = pair.y;
    }
    const int cursor = p.cursor[at.read_slot * p.cursor_stride + at.value_head];
#pragma unroll 1
    for (int token = max(max(cursor, at.context - p.ring_rows), 0); token < at.context; ++token) {
        const float* update = p.ring + at.read_slot * p.ring_stride + token % p.ring_rows * int64_t{p.ring_width};
        const float* key = update + at.key_head * kDim + lane.column;
        const float* u = update + (p.key_heads + at.value_head) * kDim + at.column + lane.row;
        const float decay = expf(update[(p.key_heads + p.value_heads) * kDim + at.value_head]);
        const float of_row[2] = {u[0], u[8]};
#pragma unroll
        for (int i = 0; i < 64; ++i) s[i] = decay * s[i] + of_row[i / 2 % 2] * key[i / 4 * 8 + i % 2];
    }
}

// The smallest token count beyond `count` at which the sequence's state is asked for. By whole warps.
__device__ __forceinline__ int next_snapshot(const GatedDeltaRulePrefill& p, const Work& at, int count) {
    int next = kNoSnapshot;
    for (int i = threadIdx.x % 32; i < p.snapshot_count; i += 32) {
        const int32_t* row = p.snapshots + 3 * i;
        if (row[0] == at.sequence && row[2] >= 0 && row[1] > count) next = min(next, row[1]);
    }
    return __reduce_min_sync(0xffffffffu, next);
}

// Calls what(token count, slot) for the sequence's snapshots with first < count <= last.
template <typename Function>
__device__ __forceinline__ void for_snapshots(const GatedDeltaRulePrefill& p, const Work& at, int first, int last,
                                              Function what) {
#pragma unroll 1
    for (int i = 0; i < p.snapshot_count; ++i) {
        const int32_t* row = p.snapshots + 3 * i;
        if (row[0] == at.sequence && row[2] >= 0 && row[1] > first && row[1] <= last) what(row[1], row[2]);
    }
}

// Turns the state before the chunk, which this thread has stored at `state`, into that after the token at place `last`:
// e^{G_last} S + sum_{t <= last} e^{G_last - G_t} v'_t k_t^T. `updates` are the chunk's V' transposed.
__device__ __forceinline__ void finish_snapshot(const Stage& stage, const float (&updates)[32], int last,
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
        weighted[j / 2][j % 2 * 2] = pack<__half>(updates[4 * j] * left, updates[4 * j + 1] * right);
        weighted[j / 2][j % 2 * 2 + 1] = pack<__half>(updates[4 * j + 2] * left, updates[4 * j + 3] * right);
    }
    const float decay = ptx::exp2_approximate(total);
#pragma unroll 1
    for (int block = 0; block < kDim / 16; ++block) {
        float sum[2][4] = {};
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            uint32_t key[4];
            load_block(key, stage.key + block / 4 * kPanel, k, block % 4);
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
    const int lane = threadIdx.x % 32, token = 8 * (j + lane / 16) + lane % 8;
    return ptx::shared_address(tile) + place(token, threadIdx.x / 32 * 2 + lane / 8 % 2);
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

// d (+)= a times the rows of a tile with two panels, over kCount of its eight steps of sixteen elements from kFirst on.
template <int kFirst, int kCount>
__device__ __forceinline__ void multiply_state(float (&d)[32], const uint32_t (&state)[8][4], const __half* tile) {
#pragma unroll
    for (int k = kFirst; k < kFirst + kCount; ++k) {
        const uint64_t rows = panel_descriptor(tile) + ((k / 4 * kPanel * 2 + k % 4 * 32) >> 4);
        ptx::wgmma<__half, 64>(d, state[k], rows, k > 0);
    }
    ptx::wgmma_commit();
}

// The same with a tile of one panel.
__device__ __forceinline__ void multiply_chunk(float (&d)[32], const uint32_t (&a)[4][4], const __half* tile,
                                               bool accumulate) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        ptx::wgmma<__half, 64>(d, a[k], panel_descriptor(tile) + (k * 32 >> 4), accumulate || k > 0);
    }
    ptx::wgmma_commit();
}

// Hands the finished outputs of a chunk, [64 value columns x 64 tokens], to the warp that stores them.
__device__ __forceinline__ void put_outputs(const float (&out)[32], int chunk, Shared& shared) {
    if (chunk > 0) ptx::mbarrier_wait(&shared.output_empty, (chunk - 1) & 1);
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
        uint32_t blocks[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) blocks[i] = pack<__nv_bfloat16>(out[4 * j + 2 * i], out[4 * j + 2 * i + 1]);
        ptx::stmatrix_x4_transposed(columns_of_warp(shared.output, j), blocks);
    }
    ptx::mbarrier_arrive(&shared.output_full);
}

// The chain: walks the chunks with the transposed state S [64 value columns x 128] in registers. What the chain does
// not wait for runs where the matrix unit would idle: S Q^T in two parts beside the arithmetic on X = S K^T and on V',
// the product with P and the outputs of a chunk beside the next chunk's X. The compiler follows products over the end
// of a loop only if the next wait is for all of them: there, X alone is under way.
__device__ __forceinline__ void scan(const GatedDeltaRulePrefill& p, const Work& at, Shared& shared) {
    const Lane lane;
    float s[64], x[32], out[32];
    uint32_t state[8][4];  // S in fp16
    load_state(p, at, s);
    int snapshot = next_snapshot(p, at, 0);
    const auto first_token = [&](int chunk) { return (at.first_chunk + chunk) * kChunk; };
    const auto start = [&](int chunk) {
        const int first = first_token(chunk), last = first + kChunk;
        if (snapshot <= last) {
            for_snapshots(p, at, first, last, [&](int, int slot) { store_state(state_of(p, at, slot), s); });
        }
#pragma unroll
        for (int i = 0; i < 32; ++i) state[i / 4][i % 4] = pack<__half>(s[2 * i], s[2 * i + 1]);
        ptx::mbarrier_wait(&shared.full[chunk % kStages], chunk / kStages & 1);
        ptx::wgmma_fence(x);
        multiply_state<0, 8>(x, state, shared.stages[chunk % kStages].key);
    };

    if (at.chunks > 0) start(0);
#pragma unroll 1
    for (int chunk = 0; chunk < at.chunks; ++chunk) {
        const Stage& stage = shared.stages[chunk % kStages];
        const TokenFactors& factors = stage.factors;
        uint32_t value[8][2];
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            uint32_t blocks[4];
            ptx::ldmatrix_x4_transposed(blocks, columns_of_warp(stage.value, j));
#pragma unroll
            for (int i = 0; i < 4; ++i) value[j + i / 2][i % 2] = blocks[i];
        }
        if (at.begin(chunk) > 0 || at.end(chunk) < kChunk) mask_values(value, at.begin(chunk), at.end(chunk));
        ptx::wgmma_wait<0>(x);
        ptx::wgmma_fence(out);
        multiply_state<0, 4>(out, state, stage.query);

        // The right-hand side beta (v - e^G S k), transposed, and V' = A times it.
        ptx::wgmma_wait<1>(x);
        uint32_t operand[4][4];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 beta = *reinterpret_cast<const float2*>(factors.beta + 8 * j + lane.column);
            const float2 carried = *reinterpret_cast<const float2*>(factors.carried + 8 * j + lane.column);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float left = beta.x * __uint_as_float(value[j][h] << 16);
                const float right = beta.y * __uint_as_float(value[j][h] & 0xffff0000u);
                operand[j / 2][j % 2 * 2 + h] =
                    pack<__half>(left - carried.x * x[4 * j + 2 * h], right - carried.y * x[4 * j + 2 * h + 1]);
            }
        }
        ptx::wgmma_fence(x);
        multiply_chunk(x, operand, stage.solve, false);
        multiply_state<4, 4>(out, state, stage.query);
        const float decay = factors.decay[0];
#pragma unroll
        for (int i = 0; i < 64; ++i) s[i] *= decay;
        ptx::wgmma_wait<1>(x);

        uint32_t to_end[4][4];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 weight = *reinterpret_cast<const float2*>(factors.to_end + 8 * j + lane.column);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float left = x[4 * j + 2 * h], right = x[4 * j + 2 * h + 1];
                to_end[j / 2][j % 2 * 2 + h] = pack<__half>(left * weight.x, right * weight.y);
            }
        }
        ptx::wgmma_fence(s);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            ptx::wgmma<__half, 128, true>(s, to_end[k], panel_descriptor(stage.key) + (k * 16 * 128 >> 4), true);
        }
        ptx::wgmma_commit();

        ptx::wgmma_wait<1>(out);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const float2 scale = *reinterpret_cast<const float2*>(factors.query + 8 * j + lane.column);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                operand[j / 2][j % 2 * 2 + h] = pack<__half>(x[4 * j + 2 * h], x[4 * j + 2 * h + 1]);
                out[4 * j + 2 * h] *= scale.x;
                out[4 * j + 2 * h + 1] *= scale.y;
            }
        }
        ptx::wgmma_fence(out);
        multiply_chunk(out, operand, stage.attention, true);
        ptx::wgmma_wait<1>(s);

        const int first = first_token(chunk), last = first + kChunk;
        if (snapshot <= last) {
            for_snapshots(p, at, first, last, [&](int count, int slot) {
                finish_snapshot(stage, x, count - 1 - first, state_of(p, at, slot));
                if (threadIdx.x == 0 && at.column == 0) p.cursor[slot * p.cursor_stride + at.value_head] = count;
            });
            snapshot = next_snapshot(p, at, last);
        }
        start(min(chunk + 1, at.chunks - 1));  // after the last chunk, in vain
        ptx::wgmma_wait<1>(out);
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.read[chunk % kStages]);
        put_outputs(out, chunk, shared);
    }
    ptx::wgmma_wait<0>(x);
    if (at.write_slot >= 0) store_state(state_of(p, at, at.write_slot), s);
    leave_cluster();  // in place, the other half has read the cursor too
    if (at.write_slot >= 0 && at.column == 0 && threadIdx.x == 0) {
        p.cursor[at.write_slot * p.cursor_stride + at.value_head] = at.context + at.length;
    }
}

__device__ __forceinline__ void wait_until_empty(Shared& shared, int chunk) {
    if (chunk >= kStages) ptx::mbarrier_wait_cluster(&shared.empty[chunk % kStages], (chunk / kStages - 1) & 1);
}

// Two warpgroups, keys and queries, prepare every second chunk for both blocks.
__device__ __forceinline__ void prepare_chunks(const GatedDeltaRulePrefill& p, const Work& at, Shared& shared) {
    const bool keys = threadIdx.x / kGroupThreads == 1;
#pragma unroll 1
    for (int chunk = at.rank; chunk < at.chunks; chunk += 2) {
        Stage& stage = shared.stages[chunk % kStages];
        wait_until_empty(shared, chunk);
        // The gates come first: their loads are under way while the keys arrive.
        if (!keys && threadIdx.x % kGroupThreads < 32) gates(p, at, chunk, stage.factors);
        ptx::mbarrier_wait(&shared.raw_full, chunk / 2 & 1);
        if (keys) {
            prepare_keys(at, chunk, shared, stage);
        } else {
            prepare_queries(at, chunk, shared, stage);
        }
    }
}

// By one thread: the raw keys and queries of the chunks that this block prepares. Rows outside the sequence are other
// sequences' or zero.
__device__ __forceinline__ void load_keys(const GatedDeltaRulePrefill& p, const Work& at, const CUtensorMap& map,
                                          Shared& shared) {
    const int query = at.key_head * kDim, key = query + p.key_heads * kDim;
#pragma unroll 1
    for (int chunk = at.rank; chunk < at.chunks; chunk += 2) {
        const int row = at.row(chunk);
        if (chunk >= 2) ptx::mbarrier_wait(&shared.raw_empty, (chunk / 2 - 1) & 1);
        ptx::mbarrier_arrive_expect_tx(&shared.raw_full, kKeyQueryBytes);
        for (int panel = 0; panel < 2; ++panel) {
            ptx::tma_load(shared.raw_key + panel * kPanel, &map, &shared.raw_full, {key + panel * kColumns, row});
            ptx::tma_load(shared.raw_query + panel * kPanel, &map, &shared.raw_full, {query + panel * kColumns, row});
        }
    }
}

// By one thread: the values of every chunk, and the announcement of what the other block sends.
__device__ __forceinline__ void load_values(const GatedDeltaRulePrefill& p, const Work& at, const CUtensorMap& map,
                                            Shared& shared) {
    const int value = (2 * p.key_heads + at.value_head) * kDim + at.column;
#pragma unroll 1
    for (int chunk = 0; chunk < at.chunks; ++chunk) {
        uint64_t* full = &shared.full[chunk % kStages];
        wait_until_empty(shared, chunk);
        if (chunk % 2 != at.rank) ptx::mbarrier_arrive_expect_tx(full, kKeyQueryBytes + kRestBytes);
        ptx::mbarrier_arrive_expect_tx(full, sizeof(Stage::value));
        ptx::tma_load(shared.stages[chunk % kStages].value, &map, full, {value, at.row(chunk)});
    }
}

// By two lanes, one for each block: passes on that this block's scan has read a stage. The scan itself does not wait
// for the fence that an arrival in another block takes.
__device__ __forceinline__ void release_stages(const Work& at, Shared& shared) {
#pragma unroll 1
    for (int chunk = 0; chunk < at.chunks; ++chunk) {
        ptx::mbarrier_wait(&shared.read[chunk % kStages], chunk / kStages & 1);
        ptx::mbarrier_arrive_cluster(&shared.empty[chunk % kStages], threadIdx.x % 32);
    }
}

__device__ __forceinline__ void store_outputs(const GatedDeltaRulePrefill& p, const Work& at, Shared& shared) {
    const int lane = threadIdx.x % 32, piece = lane % 8;
    const int64_t stride = static_cast<int64_t>(p.value_heads) * kDim;
    auto* columns = p.out + at.value_head * kDim + at.column + piece * 8;
#pragma unroll 1
    for (int chunk = 0; chunk < at.chunks; ++chunk) {
        const int begin = at.begin(chunk), end = at.end(chunk);
        auto* rows = columns + at.row(chunk) * stride;
        const auto* tile = reinterpret_cast<const uint8_t*>(shared.output);
        ptx::mbarrier_wait(&shared.output_full, chunk & 1);
#pragma unroll 4
        for (int token = lane / 8; token < kChunk; token += 4) {
            const uint4 packed = *reinterpret_cast<const uint4*>(tile + place(token, piece));
            if (token >= begin && token < end) store_16(rows + token * stride, packed);
        }
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&shared.output_empty);
    }
}

__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ GatedDeltaRulePrefill p, const __grid_constant__ CUtensorMap rows) {
    DYNAMIC_SHARED(storage);
    auto& shared = *reinterpret_cast<Shared*>(storage);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(&shared.full[i], 2);
            ptx::mbarrier_init(&shared.read[i], kGroupThreads / 32);
            ptx::mbarrier_init(&shared.empty[i], 2);
        }
        ptx::mbarrier_init(&shared.raw_full, 1);
        ptx::mbarrier_init(&shared.raw_empty, 1);
        ptx::mbarrier_init(&shared.output_full, kGroupThreads);
        ptx::mbarrier_init(&shared.output_empty, 1);
        ptx::fence_mbarrier_init();
    }
    for (Stage& stage : shared.stages) clear_upper(stage);
    ptx::fence_async_shared();
    ptx::cluster_sync();
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const Work at(p);
    const uint32_t group = ptx::warp_id() / 4;
    if (group == 0) {
        ptx::register_increase<kScanRegisters>();
        scan(p, at, shared);
    } else if (group < 3) {
        prepare_chunks(p, at, shared);
        leave_cluster();
    } else {
        ptx::register_decrease<kMoveRegisters>();
        const uint32_t warp = ptx::warp_id() % 4;
        if (warp == 0) store_outputs(p, at, shared);
        if (warp == 1 && threadIdx.x % 32 == 0) load_keys(p, at, rows, shared);
        if (warp == 2 && threadIdx.x % 32 == 0) load_values(p, at, rows, shared);
        if (warp == 3 && threadIdx.x % 32 < 2) release_stages(at, shared);
        leave_cluster();
    }
}

}  // namespace

bool gated_delta_rule_prefill_supported(const GatedDeltaRulePrefill& p) {
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    return p.key_heads > 0 && p.value_heads % p.key_heads == 0 && p.value_heads <= 65535 && p.sequences <= 65535 &&
           p.qkv_stride % 8 == 0 && p.state_stride % 4 == 0 && aligned(p.qkv) && aligned(p.state) && aligned(p.out);
}

cudaError_t gated_delta_rule_prefill(const GatedDeltaRulePrefill& p, cudaStream_t stream) {
    if (!gated_delta_rule_prefill_supported(p)) return cudaErrorInvalidValue;
    CUtensorMap rows{};
    if (p.tokens > 0) {
        const auto channels = static_cast<uint64_t>(2 * p.key_heads + p.value_heads) * kDim;
        const TensorLayout<2> layout{.base = p.qkv,
                                     .sizes = {channels, static_cast<uint64_t>(p.tokens)},
                                     .strides = {2, static_cast<uint64_t>(p.qkv_stride) * 2},
                                     .box = {kColumns, kChunk}};
        const auto status = encode_tensor_map(&rows, TensorElement::kBf16, layout, Swizzle::k128);
        if (status != cudaSuccess) return status;
    }
    const LaunchConfig config{.grid = dim3(kDim / kColumns, p.value_heads, p.sequences),
                              .block = kThreads,
                              .shared_bytes = sizeof(Shared),
                              .stream = stream,
                              .cluster = dim3(kDim / kColumns),
                              .programmatic = true};
    return launch(prefill_kernel, config, p, rows);
}

}  // namespace tokenspeed
