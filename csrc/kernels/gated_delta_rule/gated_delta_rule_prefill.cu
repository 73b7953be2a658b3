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
// counts as zero). Four stages for the chain, 34 KB each, and two for the outputs, 25 KB each.
//
// Many short sequences: a grid of as many clusters as fit takes pairs of a sequence and a value head in turn
// (PairsInTurn), with the next pair's state and operands on their way while one is scanned. One of the chain's stages is
// the states' then: a third thread brings the next one there, and takes away what the chain puts in its place.
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
// Measured, and what was tried: docs/kernels/gdn_prefill.md.
//
// budget: prefill_kernel registers<=168 shared<=0 hot sass=HGMMA
#include <launch.h>
#include <ptx_tma.h>

#include <algorithm>

#include "gated_delta_rule_chain.h"

namespace tokenspeed {
namespace {

using namespace delta_rule_prefill;

constexpr int kThreads = 3 * kGroupThreads;                // chain, outputs, and one whose warps move data
constexpr int kChainRegisters = 240, kMoveRegisters = 96;  // per thread, of 168 at the start
constexpr int kWindowSlots = 520, kLeastWindow = 8;        // chunks of all sequences in a window, and of one at least
constexpr int kAhead = 6;                                  // chunks, of asking memory for them
constexpr int kMostChunksInTurn = 16;                      // of a pair: longer ones do not mind their ends
constexpr uint32_t kOutputBarrier = 1;

// The outputs: O^T = (S Q^T) e^G dk^-0.5 + V'^T P^T, [64 value columns x 64 tokens], and their rows to memory.
__device__ __forceinline__ void make_outputs(const GatedDeltaRulePrefill& p, const Work& at, const CUtensorMap& outputs,
                                             int done, Shared& shared) {
    const int thread = threadIdx.x % kGroupThreads, piece = thread % 8;
    const int64_t stride = static_cast<int64_t>(p.value_heads) * kDim;
    auto* columns = p.out + at.value_head * kDim + at.column + piece * 8;
#pragma unroll 1
    for (int i = 0; i < at.chunks; ++i) {
        const int number = done + i;
        const OutputStage& stage = shared.outputs[number % kOutputStages];
        float of_state[32], out[32];
        uint32_t state[8][4], update[4][4];
        float2 scales[8];
        const auto take = [&](uint32_t (&operand)[4], const uint4& from) {
            operand[0] = from.x, operand[1] = from.y, operand[2] = from.z, operand[3] = from.w;
        };
        ptx::mbarrier_wait(&shared.state_given, number & 1);
#pragma unroll
        for (int k = 0; k < 8; ++k) take(state[k], shared.state[k][thread]);
        // Only now that the chain needs the matrix unit least.
        ptx::mbarrier_wait(&shared.update_given, number & 1);
#pragma unroll
        for (int k = 0; k < 4; ++k) take(update[k], shared.update[k][thread]);
        arrive_with_warp(&shared.taken);
        ptx::mbarrier_wait(&shared.output_ring.full[number % kOutputStages], number / kOutputStages & 1);
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
        load_factors(scales, stage.factors);
        ptx::wgmma_wait<0>(of_state, out);
        release_stage(shared.output_ring, number % kOutputStages);
#pragma unroll
        for (int k = 0; k < 32; ++k) out[k] += of_state[k] * (k % 2 == 0 ? scales[k / 4].x : scales[k / 4].y);

        __nv_bfloat16* tile = shared.output[number % 2];
#pragma unroll
        for (int j = 0; j < 8; j += 2) {
            uint32_t blocks[4];
#pragma unroll
            for (int b = 0; b < 4; ++b) blocks[b] = pack<__nv_bfloat16>(out[4 * j + 2 * b], out[4 * j + 2 * b + 1]);
            ptx::stmatrix_x4_transposed(columns_of_warp(tile, j), blocks);
        }
        ptx::fence_async_shared();
        if (thread == 0) ptx::bulk_wait_read<0>();  // the next chunk's tile is free
        ptx::named_barrier_sync(kOutputBarrier, kGroupThreads);
        const int chunk = at.first + i, begin = at.begin(chunk), end = at.end(chunk);
        if (begin == 0 && end == kChunk) {
            if (thread == 0) {
                ptx::tma_store(&outputs, tile, {at.value_head * kDim + at.column, at.row(chunk)});
                ptx::bulk_commit();
            }
            continue;
        }
        auto* rows = columns + at.row(chunk) * stride;  // those around are others'
#pragma unroll 1
        for (int token = thread / 8; token < end; token += kGroupThreads / 8) {
            const auto* from = reinterpret_cast<const uint8_t*>(tile) + place(token, piece);
            if (token >= begin) ptx::store_16_streaming(rows + token * stride, *reinterpret_cast<const uint4*>(from));
        }
    }
}

constexpr uint16_t kBothBlocks = 3;

template <int kStages>
__device__ __forceinline__ void wait_until_empty(Ring& ring, int i) {
    if (i >= kStages) ptx::mbarrier_wait_cluster(&ring.empty[i % kStages], (i / kStages - 1) & 1);
}

// The flags of the block's chunks, p.key_heads apart.
__device__ __forceinline__ uint32_t* ready_of(const GatedDeltaRulePrefill& p, const Work& at, const Window& window) {
    return window.ready + int64_t{at.slot} * p.key_heads + at.key_head(p);
}

// By one thread, where clusters take pairs in turn: brings the state that the pair begins with, and takes away the one
// that the pair before ended with, which goes to `slot`, once the chain has put it there.
__device__ __forceinline__ void move_states(const GatedDeltaRulePrefill& p, const PairsInTurn& at, const Window& window,
                                            const CUtensorMap& states, int turn, int slot, int row_of_slot,
                                            Shared& shared) {
    const int row = at.value_head * kDim + at.column;
    if (at.context > 0) {
        ptx::mbarrier_expect_tx(&shared.state_full, kStateBytes);
        ptx::fence_async_global();  // ordinary stores wrote the slot
#pragma unroll 1
        for (int panel = 0; panel < kDim / kPanelColumns; ++panel) {
            ptx::tma_load(panel_of_state(shared, panel), &states, &shared.state_full,
                          {panel * kPanelColumns, 0, 0, row / 8, at.read_slot});
        }
    }
    shared.cursor = entering_cursor(p, at);
    ptx::mbarrier_arrive(&shared.state_full);
    PairsInTurn later = at;
    if (later.next(p, window) && later.context > 0) {
        ptx::bulk_prefetch_l2(state_of(p, later, later.read_slot), kStateBytes);
    }
    ptx::mbarrier_wait(&shared.state_left, turn & 1);
    if (slot < 0) return;
#pragma unroll 1
    for (int panel = 0; panel < kDim / kPanelColumns; ++panel) {
        ptx::tma_store(&states, panel_of_state(shared, panel), {panel * kPanelColumns, 0, 0, row_of_slot / 8, slot});
    }
    ptx::bulk_commit();
    ptx::bulk_wait_read<0>();
}

// By one thread: the chain's operands. The first block brings what both need, each its own values; chunks further on
// are asked for from memory.
template <typename Pairs>
__device__ __forceinline__ void load_chain(const GatedDeltaRulePrefill& p, const Pairs& at, const Window& window,
                                           const CUtensorMap& map, int done, Shared& shared) {
    constexpr int kStages = kChainStages<Pairs::kInTurn>;
    // Long sequences of many heads would fill L2 with what is asked for, and their tiles would leave before their use.
    constexpr bool kAsks = Pairs::kInTurn;
    const int value = (2 * p.key_heads + at.value_head) * kDim + at.column;
    const KeyTiles* keys = window.keys + int64_t{at.slot} * p.key_heads + at.key_head(p);
    const HeadTiles* heads = window.heads + int64_t{at.slot} * p.value_heads + at.value_head;
    uint32_t* ready = ready_of(p, at, window);
    uint32_t known = 0;  // bit j: the tiles of chunk i + j are there
    const auto ask_for = [&](int i) { ptx::tma_prefetch_l2(&map, {value, at.row(at.first + i)}); };
    // A loop: of `if (i < at.chunks) ask_for(i)` six times ptxas 13.0 makes predicates, and sets a coordinate under a
    // stale one (tools/compile_kernels.py looks for it).
#pragma unroll 1
    for (int i = 0; kAsks && i < min(kAhead, at.chunks); ++i) ask_for(i);
#pragma unroll 1
    for (int i = 0; i < at.chunks; ++i) {
        const int later = i + kAhead;
        if (kAsks && later < at.chunks) ask_for(later);
        if (at.rank == 0) {
            if (kAsks && later < at.chunks && ptx::load_acquire(ready + int64_t{later} * p.key_heads) >= kReady) {
                known |= 1u << kAhead;
                ptx::bulk_prefetch_l2(keys + int64_t{later} * p.key_heads, sizeof(KeyTiles));
                ptx::bulk_prefetch_l2(heads + int64_t{later} * p.value_heads, kHeadBytes);
            }
            if (known % 2 == 0) ptx::wait_at_least(ready + int64_t{i} * p.key_heads, kReady);
            known >>= 1;
            ptx::fence_async_global();
        }
        const int number = done + i;
        ChainStage& stage = shared.chain[number % kStages];
        uint64_t* full = &shared.chain_ring.full[number % kStages];
        wait_until_empty<kStages>(shared.chain_ring, number);
        ptx::mbarrier_arrive_expect_tx(full, kChainBytes);
        ptx::tma_load(stage.value, &map, full, {value, at.row(at.first + i)}, ptx::CachePolicy::kEvictFirst);
        if (at.rank != 0) continue;
        ptx::add_relaxed(ready + int64_t{i} * p.key_heads, kTaken - kReady);
        const auto& key = keys[int64_t{i} * p.key_heads].key;
        const HeadTiles& head = heads[int64_t{i} * p.value_heads];
        ptx::bulk_load_multicast(stage.key, key, sizeof(key), full, kBothBlocks);
        ptx::bulk_load_multicast(stage.solve, head.solve, sizeof(head.solve), full, kBothBlocks);
        ptx::bulk_load_multicast(&stage.factors, &head.factors, sizeof(head.factors), full, kBothBlocks);
    }
}

// By one thread: those of the outputs, by the second block for both.
__device__ __forceinline__ void load_outputs(const GatedDeltaRulePrefill& p, const Work& at, const Window& window,
                                             int done, Shared& shared) {
    const uint32_t* ready = ready_of(p, at, window);
    const int key_head = at.key_head(p);
#pragma unroll 1
    for (int i = 0; i < at.chunks; ++i) {
        const int number = done + i;
        OutputStage& stage = shared.outputs[number % kOutputStages];
        uint64_t* full = &shared.output_ring.full[number % kOutputStages];
        if (at.rank != 0) {
            ptx::wait_at_least(ready + int64_t{i} * p.key_heads, kReady);
            ptx::fence_async_global();
        }
        wait_until_empty<kOutputStages>(shared.output_ring, number);
        ptx::mbarrier_arrive_expect_tx(full, kOutputBytes);
        if (at.rank == 0) continue;
        const auto& query = window.keys[int64_t{at.slot + i} * p.key_heads + key_head].query;
        const HeadTiles& head = window.heads[int64_t{at.slot + i} * p.value_heads + at.value_head];
        ptx::bulk_load_multicast(stage.query, query, sizeof(query), full, kBothBlocks);
        ptx::bulk_load_multicast(stage.attention, head.attention, sizeof(head.attention), full, kBothBlocks);
        ptx::bulk_load_multicast(stage.factors, head.query_factors, sizeof(stage.factors), full, kBothBlocks);
    }
}

// A role's part of each pair that the cluster takes, behind so many chunks of so many pairs.
template <typename Pairs, typename Role>
__device__ __forceinline__ void for_pairs(const GatedDeltaRulePrefill& p, const Window& window, Pairs at, Role role) {
    if (at.idle()) return;
    int done = 0, turn = 0;
    do {
        role(at, done, turn++);
        done += at.chunks;
    } while (at.next(p, window));
}

// Pairs: OnePair, or PairsInTurn.
template <typename Pairs>
__global__ void __launch_bounds__(kThreads, 1)
    prefill_kernel(const __grid_constant__ GatedDeltaRulePrefill p, const __grid_constant__ CUtensorMap rows,
                   const __grid_constant__ CUtensorMap outputs, const __grid_constant__ CUtensorMap states,
                   const __grid_constant__ Window window) {
    DYNAMIC_SHARED(storage);
    auto& shared = *reinterpret_cast<Shared*>(storage);
    if (threadIdx.x == 0) {
        if (p.tokens > 0) ptx::prefetch_tensor_map(&outputs);  // or nobody has encoded it
        if (Pairs::kInTurn) ptx::prefetch_tensor_map(&states);
        for (Ring* ring : {&shared.chain_ring, &shared.output_ring}) {
            for (int i = 0; i < kMostStages; ++i) {
                ptx::mbarrier_init(&ring->full[i], 1);
                ptx::mbarrier_init(&ring->empty[i], 2 * kWarps);
            }
        }
        for (uint64_t* barrier : {&shared.state_given, &shared.update_given, &shared.taken, &shared.state_left}) {
            ptx::mbarrier_init(barrier, kWarps);
        }
        ptx::mbarrier_init(&shared.state_full, 1);
        ptx::fence_mbarrier_init();
        ptx::load_acquire(window.ready);  // what the first kernel waited for is there; L1 forgets what it was before
    }
    ptx::cluster_sync();
    const typename Pairs::Range range(p, window);
    const uint32_t group = ptx::warp_id() / kWarps, warp = ptx::warp_id() % kWarps, lane = threadIdx.x % 32;
    if (group == 0) {
        ptx::register_increase<kChainRegisters>();
        const Pairs first(p, window, range);
        float s[64];
        float* leaving = nullptr;
        for_pairs(p, window, first, [&](const Work& at, int done, int turn) {
            scan<Pairs::kInTurn>(p, at, window, done, turn, s, shared);
            leaving = leaving_state(p, at, window);
        });
        if (leaving != nullptr) store_state(leaving, s);
        leave_cluster();  // in place, the other half has read the cursors too
        if (threadIdx.x > 0) return;
        for_pairs(p, window, first, [&](const Work& at, int, int) { store_cursor(p, at); });
    } else if (group == 1) {
        const Pairs first(p, window, range);
        for_pairs(p, window, first, [&](const Work& at, int done, int) { make_outputs(p, at, outputs, done, shared); });
        ptx::bulk_wait<0>();
        leave_cluster();
    } else {
        ptx::register_decrease<kMoveRegisters>();
        const Pairs first(p, window, range);
        if (warp == 0 && lane == 0) {
            for_pairs(p, window, first,
                      [&](const Pairs& at, int done, int) { load_chain<Pairs>(p, at, window, rows, done, shared); });
        }
        if (warp == 1 && lane == 0) {
            for_pairs(p, window, first,
                      [&](const Work& at, int done, int) { load_outputs(p, at, window, done, shared); });
        }
        if constexpr (Pairs::kInTurn) {
            if (warp == 3 && lane == 0) {
                int slot = -1, row = 0;
                for_pairs(p, window, first, [&](const Pairs& at, int, int turn) {
                    move_states(p, at, window, states, turn, slot, row, shared);
                    slot = at.write_slot, row = at.value_head * kDim + at.column;
                });
            }
        }
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

// Whether the scan's clusters take several pairs of a sequence and a value head: where they are more than clusters and
// none has more than so many chunks. Costs of pairs, multiplied by clusters, fit in 32 bits.
bool takes_turns(const GatedDeltaRulePrefill& p, int clusters, int most_chunks) {
    const int64_t pairs = int64_t{p.value_heads} * p.sequences;
    const int64_t cost = p.value_heads * (max_slots(p, 0) + int64_t{p.sequences} * kChunksOfPair);
    return pairs > clusters && max_chunks(p.longest) <= most_chunks && cost <= INT32_MAX / (clusters + 1);
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
    return p.key_heads > 0 && p.value_heads % p.key_heads == 0 &&
           p.value_heads / p.key_heads <= kMaxValueHeadsPerKeyHead && p.value_heads <= 65535 && p.sequences <= 65535 &&
           max_slots(p, 0) <= 65535 && p.qkv_stride % 8 == 0 && p.state_stride % 4 == 0 && is_aligned(p.qkv) &&
           is_aligned(p.state) && is_aligned(p.out);
}

int64_t gated_delta_rule_prefill_workspace(const GatedDeltaRulePrefill& p) {
    return Workspace(p).bytes;
}

cudaError_t gated_delta_rule_prefill(const GatedDeltaRulePrefill& p, cudaStream_t stream) {
    if (!gated_delta_rule_prefill_supported(p)) return cudaErrorInvalidValue;
    CUtensorMap rows{}, outputs{}, states{};
    if (p.tokens > 0) {
        const auto channels = static_cast<uint64_t>(2 * p.key_heads + p.value_heads) * kDim;
        const TensorLayout<2> boxes{.base = p.qkv,
                                    .sizes = {channels, static_cast<uint64_t>(p.tokens)},
                                    .strides = {2, static_cast<uint64_t>(p.qkv_stride) * 2},
                                    .box = {kColumns, kChunk}};
        auto status = encode_tensor_map(&rows, TensorElement::kBf16, boxes, Swizzle::k128);
        if (status != cudaSuccess) return status;
        const auto columns = static_cast<uint64_t>(p.value_heads) * kDim;
        const TensorLayout<2> out{.base = p.out,
                                  .sizes = {columns, static_cast<uint64_t>(p.tokens)},
                                  .strides = {2, columns * 2},
                                  .box = {kColumns, kChunk}};
        status = encode_tensor_map(&outputs, TensorElement::kBf16, out, Swizzle::k128);
        if (status != cudaSuccess) return status;
    }
    const Workspace layout(p);
    const int chunks = window_chunks(p), longest = max_chunks(p.longest);
    const int clusters = std::max(multiprocessor_count() * kColumns / kDim, 1);
    const bool in_turn = takes_turns(p, clusters, std::min(chunks, kMostChunksInTurn));
    if (in_turn) {
        const auto eights = static_cast<uint64_t>(p.value_heads) * kDim / 8;
        // Rows 0 and 4, 1 and 5, ... of eight: see staged_pair.
        const TensorLayout<5> boxes{
            .base = p.state,
            .sizes = {kDim, 2, 4, eights, static_cast<uint64_t>(std::max<int64_t>(p.slots, 1))},
            .strides = {4, 4 * kDim * 4, kDim * 4, 8 * kDim * 4, static_cast<uint64_t>(p.state_stride) * 4},
            .box = {kPanelColumns, 2, 4, kColumns / 8, 1}};
        const auto status = encode_tensor_map(&states, TensorElement::kF32, boxes, Swizzle::k128);
        if (status != cudaSuccess) return status;
    }
    const LaunchConfig config{
        .grid = in_turn ? dim3(kDim / kColumns, clusters) : dim3(kDim / kColumns, p.value_heads, p.sequences),
        .block = kThreads,
        .shared_bytes = sizeof(Shared),
        .stream = stream,
        .cluster = dim3(kDim / kColumns),
        .programmatic = true,
        .takes_flags = true};
    const auto scan = in_turn ? prefill_kernel<PairsInTurn> : prefill_kernel<OnePair>;
    auto* workspace = static_cast<uint8_t*>(p.workspace);
    for (int first = 0; first == 0 || first < longest; first += chunks) {
        const Window window{.first = first,
                            .chunks = chunks,
                            .slots = static_cast<int>(max_slots(p, first)),
                            .keys = reinterpret_cast<KeyTiles*>(workspace),
                            .heads = reinterpret_cast<HeadTiles*>(workspace + layout.keys),
                            .ready = reinterpret_cast<uint32_t*>(workspace + layout.heads),
                            .carry = reinterpret_cast<float*>(workspace + layout.carry)};
        auto status = gated_delta_rule_prepare(p, rows, window, std::min(chunks, longest - first), stream);
        if (status == cudaSuccess) status = launch(scan, config, p, rows, outputs, states, window);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

}  // namespace tokenspeed
