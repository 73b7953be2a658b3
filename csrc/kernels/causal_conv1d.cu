// Depthwise causal convolution of 4 taps and SiLU over ragged prefills, with the window of each sequence in its state
// slot.
//
//     out[t, c] = silu(sum_i weight[c, i] x[t - 3 + i, c]);  inputs before this call come from the ring
//     window[read_slot]
//
// Floor: 4 bytes an element (read, write). 8192 tokens x 8192 channels: 268 MB = 62 us at 4.3 TB/s. Arithmetic: about
// 12 issue slots and two special-function slots an element, 25 and 36 us: both hide under the bytes.
//
// Tiling: a block owns `tile` consecutive tokens of ONE sequence and 1024 channels, a thread 8 channels (16 bytes). The
// thread walks down the tokens with the last three inputs in registers and loads kGroup tokens ahead of their use, so
// only the three rows above a tile are read twice, by neighbours at the same time. Which sequence and which tile a
// block has follows from cu_seqlens by a warp scan: no list is made on the host, and tokens / tile + sequences blocks
// always suffice.
//
// The block with a sequence's first tile also stores its windows. That orders an update in place without a barrier: the
// same thread first reads the old entries of its channels (history and snapshots), then overwrites them.
//
// Predicted: 8192 x 8192 72 us (86% of copy).
//
// budget: causal_conv1d_kernel registers<=128 shared<=0 hot
#include <launch.h>
#include <ptx.h>

#include "bf16x8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 4;    // per multiprocessor: what 128 registers allow
constexpr int kChannels = 8;  // per thread
constexpr int kGroup = 8;     // tokens whose loads are in flight together
constexpr int kHistory = kConvTaps - 1;

struct Tile {
    int sequence;  // -1: this block has none
    int index;     // within the sequence
};

// Block b owns the b-th tile when every sequence has max(1, ceil(length / tile)) of them. Called by whole warps.
__device__ Tile find_tile(const int32_t* cu_seqlens, int sequences, int tile, int block) {
    const int lane = threadIdx.x % 32;
    int before = 0;  // tiles of the sequences already passed
    for (int first = 0; first < sequences; first += 32) {
        const int sequence = first + lane;
        int tiles = 0;
        if (sequence < sequences) {
            const int length = cu_seqlens[sequence + 1] - cu_seqlens[sequence];
            tiles = length > tile ? (length + tile - 1) / tile : 1;
        }
        int through = tiles;  // tiles of this sequence and of those before it in the warp
#pragma unroll
        for (int distance = 1; distance < 32; distance *= 2) {
            const int other = __shfl_up_sync(0xffffffffu, through, distance);
            if (lane >= distance) through += other;
        }
        const unsigned beyond = __ballot_sync(0xffffffffu, before + through > block);
        if (beyond != 0) {
            const int owner = __ffs(static_cast<int>(beyond)) - 1;
            const int ahead = __shfl_sync(0xffffffffu, through - tiles, owner);
            return {first + owner, block - before - ahead};
        }
        before += __shfl_sync(0xffffffffu, through, 31);
    }
    return {-1, 0};
}

// What one thread needs of the sequence its block works on.
struct Sequence {
    const __nv_bfloat16* x;     // the channels of its first token in this call
    const __nv_bfloat16* read;  // its window before this call
    int context;                // tokens before this call
};

__device__ uint4 load_input(const CausalConv1d& p, const Sequence& s, int token) {
    const uint4 zero{};
    if (token < 0) return zero;
    if (token >= s.context) return ptx::load_16_no_allocate(s.x + int64_t(token - s.context) * p.x_stride);
    return ptx::load_16_no_allocate(s.read + token % p.entries * p.entry_stride);
}

// Stores the ring as it stands after `end` tokens: entry e holds the latest token before `end` that is e mod entries,
// and zeros where there is none.
__device__ void store_window(const CausalConv1d& p, const Sequence& s, int end, int slot, int64_t channel) {
    __nv_bfloat16* window = p.window + slot * p.slot_stride + channel;
    const bool in_place = window == s.read;
    for (int token = end - p.entries; token < end; ++token) {
        if (in_place && token >= 0 && token < s.context) continue;  // stands there already
        const int entry = (token + p.entries) % p.entries;
        store_16(window + entry * p.entry_stride, load_input(p, s, token));
    }
}

__global__ void __launch_bounds__(kThreads, kBlocks) causal_conv1d_kernel(const CausalConv1d p, int tile) {
    const int64_t channel = (int64_t(blockIdx.y) * kThreads + threadIdx.x) * kChannels;
    const bool active = channel < p.channels;
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    const Tile mine = find_tile(p.cu_seqlens, p.sequences, tile, blockIdx.x);
    if (mine.sequence < 0 || !active) return;
    float weight[kChannels][kConvTaps];
#pragma unroll
    for (int i = 0; i < kChannels * kConvTaps / 8; ++i) {
        const __nv_bfloat16* source = p.weight + channel * kConvTaps + i * 8;
        const Float8 w = unpack(ptx::load_16_read_only(source));
#pragma unroll
        for (int j = 0; j < 8; ++j) weight[(i * 8 + j) / kConvTaps][(i * 8 + j) % kConvTaps] = w.v[j];
    }
    const int start = p.cu_seqlens[mine.sequence], length = p.cu_seqlens[mine.sequence + 1] - start;
    const Sequence s{p.x + start * p.x_stride + channel,
                     p.window + int64_t(max(p.read_slot[mine.sequence], 0)) * p.slot_stride + channel,
                     p.context_lens[mine.sequence]};

    const int first = mine.index * tile, last = min(first + tile, length);
    Float8 history[kHistory];
#pragma unroll
    for (int i = 0; i < kHistory; ++i) history[i] = unpack(load_input(p, s, s.context + first - kHistory + i));

    if (mine.index == 0) {
        for (int i = 0; i < p.snapshot_count; ++i) {
            const int32_t* snapshot = p.snapshots + i * 3;
            if (snapshot[0] == mine.sequence && snapshot[2] >= 0) {
                store_window(p, s, snapshot[1], snapshot[2], channel);
            }
        }
        const int slot = p.write_slot[mine.sequence];
        if (slot >= 0) store_window(p, s, s.context + length, slot, channel);
    }

    const __nv_bfloat16* input = s.x + first * p.x_stride;
    __nv_bfloat16* output = p.out + int64_t(start + first) * p.channels + channel;
    for (int group = first; group < last; group += kGroup) {
        uint4 packed[kGroup];
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            if (group + i < last) packed[i] = ptx::load_16_no_allocate(input + i * p.x_stride);
        }
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            if (group + i >= last) break;
            const Float8 now = unpack(packed[i]);
            Float8 y;
#pragma unroll
            for (int c = 0; c < kChannels; ++c) {
                const float sum = history[0].v[c] * weight[c][0] + history[1].v[c] * weight[c][1] +
                                  history[2].v[c] * weight[c][2] + now.v[c] * weight[c][3];
                y.v[c] = silu(sum);
            }
            history[0] = history[1];
            history[1] = history[2];
            history[2] = now;
            store_16(output + i * int64_t(p.channels), pack(y));
        }
        input += kGroup * p.x_stride;
        output += kGroup * int64_t(p.channels);
    }
}

}  // namespace

cudaError_t causal_conv1d(const CausalConv1d& p, cudaStream_t stream) {
    const int columns = (p.channels / kChannels + kThreads - 1) / kThreads;
    // Long tiles read the rows above them less often; short ones fill the card, and three rounds of blocks keep the
    // last, partly empty round short.
    constexpr int kRounds = 3;
    int tile = 64;
    while (tile > kGroup && int64_t(p.tokens) / tile * columns < kRounds * kBlocks * multiprocessor_count()) tile /= 2;
    LaunchConfig config;
    config.grid = dim3(static_cast<unsigned>(p.tokens / tile + p.sequences), static_cast<unsigned>(columns));
    config.block = dim3(kThreads);
    config.stream = stream;
    config.programmatic = true;
    return launch(causal_conv1d_kernel, config, p, tile);
}

}  // namespace tokenspeed
