// Ahead of the scan of gated_delta_rule_prefill.cu and beside it: what follows from a chunk of 64 tokens alone. See
// there for the algorithm and for what the tiles hold, docs/kernels/gdn_prefill.md for how the two share the device.
//
// A block is two teams. A team takes chunks of key heads in turn: unit keys and queries as fp16 in place of the raw
// rows, and then, for each value head of the key head, L and P from k k^T, k q^T (wgmma) and the head's decays, and A =
// (I + L)^-1 diag(beta). Two heads at a time: each of two warpgroups makes P of one and A of the other. Three warps
// run ahead: they bring the rows by TMA and compute the gates, and let no long sequence's tiles get so far ahead of the
// scan that they leave L2. Another takes finished tiles away by bulk stores, in the layout that the scan's bulk loads
// find again, and publishes them.
//
// Decays between two blocks of 16 tokens are products of two exponentials, from the first token of the later block to
// either side: neither is above 1. The three warps make them, too.
//
// The inverse, with L = diag(beta) M: see gated_delta_rule_inverse.h.
//
// Bytes: raw q and k once, 512 a token and key head, and out as many; per value head 16 KB of tiles and 1.8 KB of
// factors a chunk: 208 MB at 8192 tokens of 16:32 heads, 69 us at 3 TB/s.
//
// Measured, and what was tried: docs/kernels/gdn_prefill.md.
//
// budget: prepare_kernel registers<=128 shared<=0 hot sass=HGMMA
#include <launch.h>
#include <reduce.h>

#include <algorithm>

#include "bf16x8.h"
#include "gated_delta_rule_inverse.h"

namespace tokenspeed {
namespace {

using namespace delta_rule_prefill;

constexpr int kWorkers = 2 * kGroupThreads, kThreads = 3 * kGroupThreads;  // of a team
constexpr int kGateWarps = 3;                                              // of the third warpgroup
constexpr int kTeams = 2;                                                  // of a block, which fills a multiprocessor
constexpr int kWorkRegisters = 104, kAheadRegisters = 32;                  // per thread, of 80 at the start
constexpr uint32_t kWorkersBarrier = 3;                                    // of a team; 1 and 2 are its warpgroups'
constexpr int kCluster = 2;  // as the scan's, so that what a cluster leaves takes one of those
// The scan does as many chunks in the time of a team's turn with one or two value heads.
constexpr int kChunksOfTurn = 4;
// Chunks of a long sequence that the preparation may be ahead of the scan: much further, and tiles leave L2 before the
// scan takes them.
constexpr int kLead = 16;
constexpr int kPolls = 100;  // of waiting for the scan: longer than it takes for what a round of teams prepares
constexpr float kLog2E = 1.44269504f;
constexpr float kLeastSquares = 1e-30f;       // of a row: smaller ones count as this when they are scaled
constexpr float kQueryScale = 0.0883883476f;  // dk^-0.5

// How units, a slot and a key head each, are dealt out in the order in which the scan wants them: one to every team in
// each of so many rounds, the rest to the first teams alone. The other blocks leave their multiprocessors to the scan.
struct Deal {
    int units, rounds, lasting;
    int heads;  // value heads of a key head
    int lead;   // units that the preparation may be ahead of the scan

    // What a team takes in its turn; at least `units`: nothing any more.
    __device__ __forceinline__ int unit(int turn) const {
        const int team = blockIdx.x * kTeams + threadIdx.y, teams = gridDim.x * kTeams;
        if (turn < rounds) return team + turn * teams;
        return team < lasting ? rounds * teams + (turn - rounds) * lasting + team : units;
    }
};

struct Ahead {          // of a turn: what the warps that run ahead leave, and then the norms of the rows
    int turn;           // kept here, for the workers lack registers
    int unit;           // slot * key heads + key head
    int key_head, row;  // row of the chunk's first place
    int begin, end;     // the places of the chunk that the sequence fills; 0, 0: no chunk, and none after it
    Gates gates[kMaxValueHeadsPerKeyHead];
    float key_scale[kChunk], query_scale[kChunk];
};

struct Shared {          // of a team
    KeyTiles keys;       // raw rows in bf16 first
    HeadTiles heads[2];  // a pair of value heads
    Inverse inverses[2];
    Ahead ahead[2];                   // chunks take turns
    uint64_t full, empty;             // the rows and what comes with them
    uint64_t ahead_free[2];           // nobody reads that turn's `ahead` any more
    uint64_t keys_done;               // the rows are normalised
    uint64_t heads_done, heads_free;  // a pair of value heads
};

// The power of two at or below a positive x, and its inverse.
__device__ __forceinline__ float power_below(float x) {
    return __uint_as_float(__float_as_uint(x) & 0x7f800000u);
}
__device__ __forceinline__ float inverse_of_power(float x) {
    return __uint_as_float(0x7f000000u - __float_as_uint(x));
}

// In place, raw rows of 128 bf16 elements in two panels -> fp16 rows of norm 1/2 to 1, and what makes them unit
// vectors, times `factor`. The elements are only multiplied by a power of two, so they stay exact; the rest of the norm
// waits in fp32. Rows outside the sequence become zeros. A warp takes 16 rows as the operands of their product with
// themselves, whose diagonal has the squares.
__device__ __forceinline__ void normalise_rows(__half* tile, int begin, int end, float* scale, float factor) {
    const int lane = threadIdx.x % 32, first_row = threadIdx.x % kGroupThreads / 32 * 16;
    const uint32_t first = ptx::shared_address(tile) + place(first_row + lane % 16, lane / 16);
    const auto step = [&](int k) { return (first ^ k % 4 * 32) + k / 4 * kPanel * 2; };
    uint32_t x[8][4];
#pragma unroll
    for (int k = 0; k < 8; ++k) ptx::ldmatrix_x4(x[k], step(k));
    if (begin > 0 || end < kChunk) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const int row = first_row + lane / 4 + 8 * h;
            if (row >= begin && row < end) continue;
#pragma unroll
            for (int k = 0; k < 8; ++k) x[k][h] = x[k][h + 2] = 0;
        }
    }
    float products[2][2][4] = {};  // with rows 0..7 and 8..15, each in two sums
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int h = 0; h < 2; ++h) ptx::mma_m16n8k16<__nv_bfloat16>(products[h][k % 2], x[k], x[k][h], x[k][h + 2]);
    }
    __nv_bfloat162 power[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        // Lane 4 i + i / 2 has row i of the diagonal.
        const auto& [even, odd] = products[h];
        const float mine = lane / 4 % 2 == 0 ? even[2 * h] + odd[2 * h] : even[2 * h + 1] + odd[2 * h + 1];
        const float squares = __shfl_sync(kAllLanes, mine, lane / 4 * 4 + lane / 8);
        const float below = power_below(rsqrtf(max(squares, kLeastSquares)));
        power[h] = __float2bfloat162_rn(below);
        if (lane % 4 == 0) {
            scale[first_row + lane / 4 + 8 * h] = factor * rsqrtf(squares + 1e-6f) * inverse_of_power(below);
        }
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            // Exact in bf16 too.
            const __nv_bfloat162 scaled = __hmul2(reinterpret_cast<const __nv_bfloat162&>(x[k][i]), power[i % 2]);
            const auto word = reinterpret_cast<const uint32_t&>(scaled);
            x[k][i] = pack<__half>(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
        }
        ptx::stmatrix_x4(step(k), x[k]);
    }
}

// What the scan needs of one token.
__device__ __forceinline__ void store_factors(const Gates& gates, const Ahead& ahead, HeadTiles& head, int token) {
    const float total = gates.total[token], last = gates.total[kChunk - 1];
    const float from_start = ptx::exp2_approximate(total), key_scale = ahead.key_scale[token];
    TokenFactors& factors = head.factors;
    factors.total[token] = total;
    factors.key_scale[token] = key_scale;
    factors.carried[token] = from_start * key_scale;
    head.query_factors[token] = from_start * ahead.query_scale[token];
    factors.to_end[token] = ptx::exp2_approximate(last - total) * key_scale;
    if (token == kChunk - 1) factors.decay[0] = from_start;
}

// By the whole team: the parts above the diagonal blocks, which stay zero from here on.
__device__ __forceinline__ void clear_upper(HeadTiles& head) {
#pragma unroll 1
    for (int i = threadIdx.x; i < kChunk * kChunk / 8; i += kThreads) {
        const int row = i / 8, piece = i % 8;
        if (piece / 2 <= row / 16) continue;
        for (__half* tile : {head.solve, head.attention}) {
            *reinterpret_cast<uint4*>(reinterpret_cast<uint8_t*>(tile) + place(row, piece)) = uint4{};
        }
    }
}

// k q^T -> P, lower with its diagonal: its transpose, so that the first warps have the most to do here and the last
// ones with the inverse.
__device__ __forceinline__ void store_attention(const Thread& thread, const float (&kq)[32], const Gates& gates,
                                                HeadTiles& head, const Ahead& ahead) {
    const int warp = thread.warp, lane = thread.lane, row = 16 * warp + lane / 4, column = lane % 4 * 2;
    const uint32_t tile = ptx::shared_address(head.attention);
    const uint32_t at = place(lane % 8 + lane / 16 * 8, 2 * warp + lane / 8 % 2);
    const float scale[2] = {ahead.key_scale[row], ahead.key_scale[row + 8]};
    float diagonal[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        if (j == warp) {
#pragma unroll
            for (int i = 0; i < 8; ++i) diagonal[i] = kq[8 * j + i];
        }
        if (j == 0 || j <= warp) continue;
        float left[2];
        uint32_t blocks[4];
#pragma unroll
        for (int h = 0; h < 2; ++h) left[h] = scale[h] * gates.across[block_of_across(j) + row + 8 * h];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float2 right =
                product(gates.within + 16 * j + i / 2 * 8 + column, ahead.query_scale + 16 * j + i / 2 * 8 + column);
            const float* products = kq + 8 * j + 2 * i;
            blocks[i] = pack<__half>(products[0] * left[i % 2] * right.x, products[1] * left[i % 2] * right.y);
        }
        ptx::stmatrix_x4_transposed(tile + at + 2048 * j, blocks);
    }
    const float total[2] = {gates.total[row], gates.total[row + 8]};
    uint32_t blocks[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const int h = i % 2, first = 16 * warp + i / 2 * 8 + column;
        const float2 totals = *reinterpret_cast<const float2*>(gates.total + first);
        const float2 scales = *reinterpret_cast<const float2*>(ahead.query_scale + first);
        const float left = diagonal[2 * i] * (scale[h] * scales.x) * ptx::exp2_approximate(totals.x - total[h]);
        const float right = diagonal[2 * i + 1] * (scale[h] * scales.y) * ptx::exp2_approximate(totals.y - total[h]);
        blocks[i] = pack<__half>(first >= row + 8 * h ? left : 0.0f, first + 1 >= row + 8 * h ? right : 0.0f);
    }
    ptx::stmatrix_x4_transposed(tile + at + 2048 * warp, blocks);
}

// d[64 x 64] = a b^T over the 128 elements of rows.
__device__ __forceinline__ void multiply_rows(float (&d)[32], uint64_t a, uint64_t b) {
    ptx::wgmma_fence(d);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        ptx::wgmma<__half, 64>(d, a + step_of_panels(k), b + step_of_panels(k), k > 0);
    }
    ptx::wgmma_commit();
}

__device__ __forceinline__ float gate_input(const void* values, bool are_float, int64_t at) {
    return are_float ? static_cast<const float*>(values)[at]
                     : __bfloat162float(static_cast<const __nv_bfloat16*>(values)[at]);
}

// Log decays, their running sum and beta of the chunk, by one warp: two tokens a lane.
__device__ __forceinline__ void compute_gates(const GatedDeltaRulePrefill& p, int value_head, int64_t first_row,
                                              int begin, int end, Gates& gates) {
    const int lane = threadIdx.x % 32;
    const float rate = -expf(p.a_log[value_head]) * kLog2E, bias = p.dt_bias[value_head];
    float a[2], b[2];
    bool inside[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int token = 2 * lane + i;
        inside[i] = token >= begin && token < end;
        const int64_t row = first_row + (inside[i] ? token : begin);
        a[i] = gate_input(p.a, p.gates_are_float, row * p.a_stride + value_head);
        b[i] = gate_input(p.b, p.gates_are_float, row * p.b_stride + value_head);
    }
    float g[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const float x = a[i] + bias;
        g[i] = inside[i] ? rate * (x > 20.0f ? x : log1pf(expf(x))) : 0.0f;
        gates.beta[2 * lane + i] = inside[i] ? sigmoid(b[i]) : 0.0f;
    }
    const float through = warp_running_sum(g[0] + g[1]);
    const float before = __shfl_up_sync(kAllLanes, through, 1);
    gates.total[2 * lane] = (lane > 0 ? before : 0.0f) + g[0];
    gates.total[2 * lane + 1] = through;
    __syncwarp();
#pragma unroll 1
    for (int token = lane; token < kChunk; token += 32) {
        const float total = gates.total[token];
        gates.within[token] = ptx::exp2_approximate(total - gates.total[token / 16 * 16]);
#pragma unroll 1
        for (int block = token / 16 + 1; block < 4; ++block) {
            gates.across[block_of_across(block) + token] = ptx::exp2_approximate(gates.total[16 * block] - total);
        }
    }
}

// Tells the scan that the tiles of a unit are there: by the thread whose copies have written them.
__device__ __forceinline__ void publish(const Window& window, int unit) {
    ptx::fence_async_global();
    ptx::store_release(window.ready + unit, kReady);
}

// Waits until the scan has taken the tiles of a unit, by its flag, if it has begun, which the flag of the key head's
// first tiles says. Nothing but time depends on it: where the scan cannot run beside, patience ends.
__device__ __forceinline__ void wait_for_scan(const uint32_t* first, const uint32_t* behind) {
    if (ptx::load_acquire(first) >= kTaken) ptx::wait_at_least_for(behind, kTaken, kPolls);
}

// Calls what(panel, column of qkv) for the panels of a chunk's keys and queries, in their order in KeyTiles.
template <typename Function>
__device__ __forceinline__ void for_panels(const GatedDeltaRulePrefill& p, const Ahead& ahead, Function what) {
#pragma unroll 1
    for (int panel = 0; panel < 4; ++panel) {
        what(panel, (ahead.key_head + (panel < 2 ? p.key_heads : 0)) * kDim + panel % 2 * kDim / 2);
    }
}

__device__ __forceinline__ void bring_rows(const GatedDeltaRulePrefill& p, const CUtensorMap& rows, const Ahead& ahead,
                                           Shared& shared) {
    ptx::mbarrier_expect_tx(&shared.full, sizeof(KeyTiles));
    for_panels(p, ahead, [&](int panel, int column) {
        ptx::tma_load(shared.keys.key + panel * kPanel, &rows, &shared.full, {column, ahead.row});
    });
}

// Three warps: rows and gates of the team's chunks, a head a warp. Gates are made while the workers still have the rows
// of the turn before; what rows need later lies in shared memory meanwhile, for registers are short.
__device__ __forceinline__ void run_ahead(const GatedDeltaRulePrefill& p, const Window& window, const Deal& deal,
                                          const CUtensorMap& rows, Shared& shared) {
    const int heads = deal.heads;
#pragma unroll 1
    for (int turn = 0;; ++turn) {
        const int unit = deal.unit(turn), slot = unit / p.key_heads, key_head = unit - slot * p.key_heads;
        Ahead& ahead = shared.ahead[turn % 2];
        const Place place(p, window, unit < deal.units ? slot : INT32_MAX);
        if (turn > 1) ptx::mbarrier_wait(&shared.ahead_free[turn % 2], (turn / 2 - 1) & 1);
        const bool first_lane = threadIdx.x % 32 == 0, first_thread = threadIdx.x == kWorkers;
        if (first_thread) ahead.turn = turn;
        if (place.sequence < 0) {
            if (turn > 0) ptx::mbarrier_wait(&shared.empty, (turn - 1) & 1);
            if (first_thread) ahead.begin = ahead.end = 0;
            if (first_lane) ptx::mbarrier_arrive(&shared.full);
            return;
        }
        const Chunks at(p, place.sequence);
        const int chunk = window.first + slot - place.first_slot;
        const int row = at.row(chunk), begin = at.begin(chunk), end = at.end(chunk);
        if (first_thread) {
            ahead.unit = unit;
            ahead.key_head = key_head;
            ahead.row = row;
            ahead.begin = begin;
            ahead.end = end;
            if (turn == 0) {
                bring_rows(p, rows, ahead, shared);
            } else {
                for_panels(p, ahead, [&](int, int column) { ptx::tma_prefetch_l2(&rows, {column, row}); });
            }
        }
#pragma unroll 1
        for (int head = ptx::warp_id() % 4; head < heads; head += kGateWarps) {
            compute_gates(p, key_head * heads + head, row, begin, end, ahead.gates[head]);
        }
        __syncwarp();
        if (turn > 0) {
            ptx::mbarrier_wait(&shared.empty, (turn - 1) & 1);
            if (first_thread) {
                const int behind = ahead.unit - deal.lead;
                if (behind >= 0) wait_for_scan(window.ready + ahead.key_head, window.ready + behind);
                bring_rows(p, rows, ahead, shared);
            }
        }
        if (first_lane) ptx::mbarrier_arrive(&shared.full);
    }
}

// One thread: finished tiles of the team to the workspace. It alone waits for its copies.
__device__ __forceinline__ void take_away(const Window& window, int heads, Shared& shared) {
#pragma unroll 1
    for (int turn = 0, pair = 0;; ++turn) {
        const Ahead& ahead = shared.ahead[turn % 2];
        ptx::mbarrier_wait(&shared.full, turn & 1);
        if (ahead.end == 0) return;
        const int unit = ahead.unit;
        ptx::mbarrier_arrive(&shared.ahead_free[turn % 2]);
        ptx::mbarrier_wait(&shared.keys_done, turn & 1);
        ptx::bulk_store(window.keys + unit, &shared.keys, sizeof(KeyTiles));
        ptx::bulk_commit();
        ptx::bulk_wait_read<0>();
        ptx::mbarrier_arrive(&shared.empty);
#pragma unroll 1
        for (int first = 0; first < heads; first += 2, ++pair) {
            HeadTiles* out = window.heads + int64_t{unit} * heads + first;
            ptx::mbarrier_wait(&shared.heads_done, pair & 1);
            ptx::bulk_store(out, &shared.heads[0], kHeadBytes);
            if (first + 1 < heads) ptx::bulk_store(out + 1, &shared.heads[1], kHeadBytes);
            ptx::bulk_commit();
            ptx::bulk_wait_read<0>();
            ptx::mbarrier_arrive(&shared.heads_free);
        }
        ptx::bulk_wait<0>();
        publish(window, unit);
    }
}

// What the warp has written goes to copies.
__device__ __forceinline__ void hand_over(uint64_t* barrier) {
    ptx::fence_async_shared();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(barrier);
}

// The two warpgroups.
__device__ __forceinline__ void work(int heads, Shared& shared) {
    const int group = ptx::warp_id() / 4, pairs = (heads + 1) / 2;
#pragma unroll 1
    for (int turn = 0;;) {
        Ahead& ahead = shared.ahead[turn % 2];
        ptx::mbarrier_wait(&shared.full, turn & 1);
        if (ahead.end == 0) return;
        normalise_rows(group == 0 ? shared.keys.key : shared.keys.query, ahead.begin, ahead.end,
                       group == 0 ? ahead.key_scale : ahead.query_scale, group == 0 ? 1.0f : kQueryScale);
        hand_over(&shared.keys_done);
        ptx::named_barrier_sync(kWorkersBarrier + kTeamBarriers * threadIdx.y, kWorkers);
#pragma unroll 1
        for (int first = 0; first < heads; first += 2) {
            float products[32], squares[32];
            // The second is under way while P is made of the first.
            multiply_rows(products, panel_descriptor(shared.keys.key), panel_descriptor(shared.keys.query));
            multiply_rows(squares, panel_descriptor(shared.keys.key), panel_descriptor(shared.keys.key));
            const bool mine = first + group < heads, others = first + (group ^ 1) < heads;
            HeadTiles& tiles = shared.heads[group ^ 1];
            const Gates& gates = ahead.gates[first + (group ^ 1)];
            const int token = threadIdx.x % kGroupThreads, before = ahead.turn * pairs + first / 2;  // pairs
            if (before > 0) ptx::mbarrier_wait(&shared.heads_free, (before - 1) & 1);
            if (others && token < kChunk) store_factors(gates, ahead, tiles, token);
            ptx::wgmma_wait<1>(products);
            if (others) store_attention(Thread(), products, gates, tiles, ahead);
            ptx::wgmma_wait<0>(squares);
            if (first + 2 >= heads && threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.empty);  // all are made
            if (mine) {
                invert(Thread(), squares, ahead.gates[first + group], ahead.key_scale, shared.heads[group],
                       shared.inverses[group]);
            }
            hand_over(&shared.heads_done);
        }
        turn = ahead.turn + 1;
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&shared.ahead_free[(turn - 1) % 2]);
    }
}

__global__ void __launch_bounds__(kTeams* kThreads, 1)
    prepare_kernel(const __grid_constant__ GatedDeltaRulePrefill p, const __grid_constant__ CUtensorMap rows,
                   const __grid_constant__ Window window, const __grid_constant__ Deal deal) {
    DYNAMIC_SHARED(storage);
    // The compiler takes it for uniform so, and keeps descriptors in uniform registers.
    auto& shared = reinterpret_cast<Shared*>(storage)[__shfl_sync(kAllLanes, threadIdx.y, 0)];
    if (threadIdx.x == 0) {
        ptx::prefetch_tensor_map(&rows);
        ptx::mbarrier_init(&shared.full, kGateWarps);
        ptx::mbarrier_init(&shared.empty, kWorkers / 32 + 1);
        for (uint64_t& barrier : shared.ahead_free) ptx::mbarrier_init(&barrier, kWorkers / 32 + 1);
        ptx::mbarrier_init(&shared.keys_done, kWorkers / 32);
        ptx::mbarrier_init(&shared.heads_done, kWorkers / 32);
        ptx::mbarrier_init(&shared.heads_free, 1);
        ptx::fence_mbarrier_init();
    }
#pragma unroll 1
    for (HeadTiles& head : shared.heads) clear_upper(head);
    ptx::fence_async_shared();
    ptx::grid_dependency_wait();
    // The scan starts once all blocks have let it, so it finds no flag of an earlier use of the workspace.
    for (int turn = threadIdx.x; deal.unit(turn) < deal.units; turn += kThreads) window.ready[deal.unit(turn)] = 0;
    ptx::fence_device();
    __syncthreads();
    ptx::grid_dependency_launch();
    if (ptx::warp_id() < kWorkers / 32) {
        ptx::register_increase<kWorkRegisters>();
        work(deal.heads, shared);
    } else {
        ptx::register_decrease<kAheadRegisters>();
        if (ptx::warp_id() < kWorkers / 32 + kGateWarps) {
            run_ahead(p, window, deal, rows, shared);
        } else if (threadIdx.x % 32 == 0) {
            take_away(window, deal.heads, shared);
        }
    }
}

}  // namespace

cudaError_t delta_rule_prefill::gated_delta_rule_prepare(const GatedDeltaRulePrefill& p, const CUtensorMap& rows,
                                                         const Window& window, int chunks, cudaStream_t stream) {
    const int all = std::max(multiprocessor_count() / kCluster, 1) * kCluster;
    const int64_t scanning = int64_t{kDim / kColumns} * p.value_heads * p.sequences;
    const int beside = static_cast<int>(std::max<int64_t>(all - scanning, 0) / kCluster * kCluster);  // the scan
    Deal deal{.units = window.slots * p.key_heads,
              .rounds = 0,
              .lasting = kTeams * beside,
              .heads = p.value_heads / p.key_heads,
              .lead = INT32_MAX};
    const int pairs = (deal.heads + 1) / 2;
    const int64_t first = std::max(deal.units, 1) - int64_t{deal.lasting} * chunks / (kChunksOfTurn * pairs);
    if (first > 0) deal.rounds = static_cast<int>((first - 1) / (kTeams * all) + 1);
    // Only where all of the scan runs from the start, and takes slots in their order.
    if (deal.rounds == 0 && p.sequences == 1) deal.lead = kLead * p.key_heads;
    const int needed = (std::max(deal.units, 1) + kTeams * kCluster - 1) / (kTeams * kCluster) * kCluster;
    const int blocks = std::min(deal.rounds > 0 ? all : beside, needed);
    deal.lasting = std::min(deal.lasting, kTeams * blocks);
    const LaunchConfig config{.grid = static_cast<uint32_t>(blocks),
                              .block = dim3(kThreads, kTeams),
                              .shared_bytes = kTeams * sizeof(Shared),
                              .stream = stream,
                              .cluster = kCluster,
                              .programmatic = true};
    return launch(prepare_kernel, config, p, rows, window, deal);
}

}  // namespace tokenspeed
