// What the two kernels of the gated delta rule's prefill share: the numbering of chunks and the operands that
// gated_delta_rule_prepare.cu leaves in the workspace for gated_delta_rule_prefill.cu. See there for the algorithm.
#pragma once
#include <cuda_fp16.h>
#include <ptx_tma.h>
#include <ptx_wgmma.h>
#include <reduce.h>

#include "kernels.h"

namespace tokenspeed::delta_rule_prefill {

constexpr int kChunk = 64;          // tokens
constexpr int kDim = 128;           // dk = dv
constexpr int kColumns = 64;        // value columns of a block of the scan: half a value head
constexpr int kGroupThreads = 128;  // a warpgroup
constexpr int kMaxValueHeadsPerKeyHead = 8;
constexpr int kPanel = kChunk * 64;  // elements of 64 rows of 128 bytes, the widest that one swizzle spans

// Per token of a chunk; t is the token's place in it. Places outside the sequence have g = beta = 0 and k = q = 0.
struct TokenFactors {
    float total[kChunk];      // G_t log2(e), G_t = g_0 + ... + g_t
    float key_scale[kChunk];  // r: k = r k', k' what the key tile holds
    float carried[kChunk];    // e^{G_t} r of k
    float to_end[kChunk];     // e^{G_end - G_t} r of k
    float decay[4];           // e^{G_end}, and filling
};

// Tiles are [token][...] in rows of 128 bytes whose 16-byte pieces are swizzled: see `place`. Keys and queries have two
// panels of 64 elements. They lie in the workspace as in shared memory.
struct alignas(1024) KeyTiles {  // of a chunk and key head
    __half key[2 * kPanel];
    __half query[2 * kPanel];
};
struct alignas(1024) HeadTiles {  // of a chunk and value head
    __half solve[kPanel];         // (I + L)^-1 with its columns times beta
    __half attention[kPanel];     // P = lower(q k^T e^{G_i - G_j})
    TokenFactors factors;
    float query_factors[kChunk];  // e^{G_t} r dk^-0.5 of q
};
constexpr uint32_t kHeadBytes = offsetof(HeadTiles, query_factors) + sizeof(HeadTiles::query_factors);  // no filling
static_assert(kHeadBytes % 16 == 0 && offsetof(HeadTiles, query_factors) % 16 == 0);

// A sequence of the batch, cut into chunks that begin at multiples of 64 tokens of the whole context.
struct Chunks {
    int start, length, context;
    int first_chunk, count;  // absolute number of the first chunk, and how many

    __device__ Chunks(const GatedDeltaRulePrefill& p, int sequence) {
        start = p.cu_seqlens[sequence];
        length = p.cu_seqlens[sequence + 1] - start;
        context = p.context_lens[sequence];
        first_chunk = context / kChunk;
        count = length > 0 ? (context + length - 1) / kChunk - first_chunk + 1 : 0;
    }

    // Tokens of the context before the chunk. The row of qkv where the chunk's place 0 is or would be, and the places
    // that the sequence fills.
    __device__ int first_token(int chunk) const { return (first_chunk + chunk) * kChunk; }
    __device__ int row(int chunk) const { return start + first_token(chunk) - context; }
    __device__ int begin(int chunk) const { return max(0, context - first_token(chunk)); }
    __device__ int end(int chunk) const { return min(kChunk, context + length - first_token(chunk)); }
};

constexpr uint32_t kReady = 1, kTaken = 2;  // flags of tiles; more when several value heads have taken them

// The chunks that the workspace holds at once: numbers first .. first + chunks - 1 of every sequence that has them, in
// slots without gaps, by sequence. A sequence that reaches beyond a window leaves its state in `carry`.
struct Window {
    int first, chunks;
    int slots;         // at most
    KeyTiles* keys;    // [slots, key_heads]
    HeadTiles* heads;  // [slots, value_heads]
    uint32_t* ready;   // [slots, key_heads]: at least kReady, these tiles are there; at least kTaken, the scan has some
    float* carry;      // [sequences that may reach beyond a window, value_heads, 128, 128]

    // Chunks of a sequence in the window.
    __device__ int count(int of_sequence) const { return min(max(of_sequence - first, 0), chunks); }
    // Sequences of more than a window's chunks start further apart than this many tokens.
    __host__ __device__ static int64_t carry_distance(int chunks) { return (chunks - 1) * int64_t{kChunk}; }
};

// The sequence that has `slot` of the window, and the slots before that sequence's: its first slot. -1: none has. By
// whole warps.
struct Place {
    int sequence = -1, first_slot = 0;

    __device__ Place(const GatedDeltaRulePrefill& p, const Window& window, int slot) {
        const int lane = threadIdx.x % 32;
#pragma unroll 1
        for (int first = 0, before = 0; first < p.sequences && sequence < 0; first += 32) {
            const int count = first + lane < p.sequences ? window.count(Chunks(p, first + lane).count) : 0;
            int through = warp_running_sum(count);
            through += before;
            const uint32_t beyond = __ballot_sync(kAllLanes, slot < through);
            const int found = beyond != 0 ? __ffs(beyond) - 1 : 31;
            if (beyond != 0) {
                sequence = first + found;
                first_slot = __shfl_sync(kAllLanes, through - count, found);
            }
            before = __shfl_sync(kAllLanes, through, 31);
        }
    }
};

// The first slot of a sequence. By whole warps.
__device__ __forceinline__ int first_slot(const GatedDeltaRulePrefill& p, const Window& window, int sequence) {
    int before = 0;
    for (int other = threadIdx.x % 32; other < sequence; other += 32) before += window.count(Chunks(p, other).count);
    return __reduce_add_sync(kAllLanes, before);
}

// Byte offset of a 16-byte piece of a row of 128 bytes, as TMA writes it and wgmma reads it with a 128-byte swizzle.
__device__ __forceinline__ uint32_t place(int row, int piece) {
    return row * 128 + ((piece ^ (row & 7)) << 4);
}

// K contiguous: 16 elements further along K are 32 bytes further. With `transposed` operands (M or N contiguous) the
// next 64 of N are one panel further, 16 of K are 16 rows.
__device__ __forceinline__ uint64_t panel_descriptor(const void* panel) {
    return ptx::matrix_descriptor(ptx::shared_address(panel), Swizzle::k128, kPanel * 2, 1024);
}

// Step k of the eight along 128 elements in two panels, in a descriptor's units of 16 bytes.
__device__ __forceinline__ uint64_t step_of_panels(int k) {
    return (k / 4 * kPanel * 2 + k % 4 * 32) >> 4;
}

// The 16 x 16 block of a tile as B operand: b[0], b[1] for its columns 0..7, b[2], b[3] for 8..15.
__device__ __forceinline__ void load_block(int lane, uint32_t (&b)[4], const __half* tile, int row_block,
                                           int column_block) {
    const int row = 16 * row_block + lane % 16, piece = 2 * column_block + lane / 16;
    ptx::ldmatrix_x4_transposed(b, ptx::shared_address(tile) + place(row, piece));
}

// gated_delta_rule_prepare.cu: `rows` are boxes of 64 rows of 64 elements of qkv. The scan that follows has `chunks` of
// one sequence at most.
cudaError_t gated_delta_rule_prepare(const GatedDeltaRulePrefill& p, const CUtensorMap& rows, const Window& window,
                                     int chunks, cudaStream_t stream);

}  // namespace tokenspeed::delta_rule_prefill
