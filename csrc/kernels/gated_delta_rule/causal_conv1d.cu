// Depthwise causal convolution of 4 taps and SiLU over ragged prefills, with each sequence's window in its state slot.
//
//     out[t, c] = silu(sum_i weight[c, i] x[t - 3 + i, c]);  inputs before this call come from the ring
//     window[read_slot]
//
// Floor: 4 bytes an element (read, write). 8192 tokens x 8192 channels: 268 MB = 62 us at 4.3 TB/s. Arithmetic: about
// 12 issue slots and two special-function slots an element, 25 and 36 us: both hide under the bytes.
//
// Tiling: a block owns `tile` consecutive tokens of ONE sequence and 1024 channels, a thread 8 channels (16 bytes). One
// thread starts bulk copies of all rows of the tile, 2 KB each, into shared memory, kGroup rows a barrier, and the
// threads walk down the rows as they arrive with the last three inputs in registers. So a block's whole tile is in
// flight from its first cycle on whatever the registers allow, and only the three rows above a tile are read twice.
// Which sequence and which tile a block has follows from cu_seqlens by a warp scan: no list is made on the host, and
// tokens / tile + sequences blocks always suffice.
//
// The block with a sequence's first tile also stores its windows, last of all. That orders an update in place without a
// barrier: the same thread first reads the old entries of its channels (history and snapshots), then overwrites them.
//
// Measured, and what was tried: docs/kernels/memory_bound.md.
//
// budget: causal_conv1d_kernel registers<=128 shared<=0 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include "bf16x8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kThreads = 128;
constexpr int kBlocks = 4;    // per multiprocessor: what registers and shared memory allow
constexpr int kChannels = 8;  // per thread
constexpr int kRowElements = kThreads * kChannels;
constexpr int kGroup = 4;     // rows to a barrier
constexpr int kMaxTile = 16;  // rows
constexpr int kHistory = kConvTaps - 1;

struct Shared {
    __nv_bfloat16 rows[kMaxTile][kRowElements];
    uint64_t full[kMaxTile / kGroup];
};

// What a block works on.
struct Tile {
    int sequence;  // -1: nothing
    int first;     // token of the call's part of the sequence, and row of x is start + first
    int start, length, context, read_slot, write_slot;
};

// Block b owns the b-th tile when every sequence has max(1, ceil(length / tile)) of them. Called by whole warps; each
// lane loads all about one sequence, so that finding the tile and knowing its sequence is one trip to memory.
__device__ Tile find_tile(const CausalConv1d& p, int tile, int block) {
    const int lane = threadIdx.x % 32;
    int before = 0;  // tiles of the sequences already passed
    for (int base = 0; base < p.sequences; base += 32) {
        const int sequence = base + lane;
        Tile mine{sequence, 0, 0, 0, 0, 0, 0};
        int tiles = 0;
        if (sequence < p.sequences) {
            mine.start = p.cu_seqlens[sequence];
            mine.length = p.cu_seqlens[sequence + 1] - mine.start;
            mine.context = p.context_lens[sequence];
            mine.read_slot = p.read_slot[sequence];
            mine.write_slot = p.write_slot[sequence];
            tiles = mine.length > tile ? (mine.length + tile - 1) / tile : 1;
        }
        int through = warp_running_sum(tiles);  // tiles of this sequence and of those before it in the warp
        const unsigned beyond = __ballot_sync(kAllLanes, before + through > block);
        if (beyond != 0) {
            const int owner = __ffs(static_cast<int>(beyond)) - 1;
            mine.first = (block - before - (through - tiles)) * tile;
            for (int* field : {&mine.sequence, &mine.first, &mine.start, &mine.length, &mine.context, &mine.read_slot,
                               &mine.write_slot}) {
                *field = __shfl_sync(kAllLanes, *field, owner);
            }
            return mine;
        }
        before += __shfl_sync(kAllLanes, through, 31);
    }
    return {-1, 0, 0, 0, 0, 0, 0};
}

// What one thread needs of its block's sequence.
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
    constexpr int kTogether = 4;  // loads in flight
    __nv_bfloat16* window = p.window + slot * p.slot_stride + channel;
    const bool in_place = window == s.read;
    for (int first = end - p.entries; first < end; first += kTogether) {
        uint4 input[kTogether];
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            if (first + i < end) input[i] = load_input(p, s, first + i);
        }
#pragma unroll
        for (int i = 0; i < kTogether; ++i) {
            const int token = first + i;
            if (token >= end || (in_place && token >= 0 && token < s.context))
                continue;  // the latter stand there already
            ptx::store_16(window + (token + p.entries) % p.entries * p.entry_stride, input[i]);
        }
    }
}

__global__ void __launch_bounds__(kThreads, kBlocks) causal_conv1d_kernel(const CausalConv1d p, int tile) {
    DYNAMIC_SHARED(memory);
    auto& shared = *reinterpret_cast<Shared*>(memory);
    const int64_t first_channel = int64_t(blockIdx.y) * kRowElements, channel = first_channel + threadIdx.x * kChannels;
    if (threadIdx.x == 0) {
        for (int group = 0; group < kMaxTile / kGroup; ++group) ptx::mbarrier_init(&shared.full[group], 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    const bool active = channel < p.channels;
    uint4 weights[kChannels * kConvTaps / 8]{};  // on their way while the tile is found
#pragma unroll
    for (int i = 0; i < kChannels * kConvTaps / 8; ++i) {
        if (active) weights[i] = ptx::load_16_read_only(p.weight + channel * kConvTaps + i * 8);
    }
    const Tile mine = find_tile(p, tile, blockIdx.x);
    if (mine.sequence < 0) return;
    const int rows = min(tile, mine.length - mine.first);
    if (threadIdx.x == 0) {
        const auto bytes = static_cast<uint32_t>(min(p.channels - first_channel, int64_t(kRowElements)) * 2);
        const __nv_bfloat16* source = p.x + int64_t(mine.start + mine.first) * p.x_stride + first_channel;
        for (int row = 0; row < rows; ++row) {
            uint64_t* full = &shared.full[row / kGroup];
            if (row % kGroup == 0) ptx::mbarrier_arrive_expect_tx(full, min(kGroup, rows - row) * bytes);
            ptx::bulk_load(shared.rows[row], source + row * p.x_stride, bytes, full);
        }
    }
    if (!active) return;

    const Sequence s{p.x + mine.start * p.x_stride + channel,
                     p.window + int64_t(max(mine.read_slot, 0)) * p.slot_stride + channel, mine.context};
    Float8 history[kHistory];
    float weight[kChannels][kConvTaps];
    {
        uint4 inputs[kHistory];
#pragma unroll
        for (int i = 0; i < kHistory; ++i) inputs[i] = load_input(p, s, s.context + mine.first - kHistory + i);
#pragma unroll
        for (int i = 0; i < kHistory; ++i) history[i] = unpack(inputs[i]);
#pragma unroll
        for (int i = 0; i < kChannels * kConvTaps / 8; ++i) {
            const Float8 w = unpack(weights[i]);
#pragma unroll
            for (int j = 0; j < 8; ++j) weight[(i * 8 + j) / kConvTaps][(i * 8 + j) % kConvTaps] = w.v[j];
        }
    }

    __nv_bfloat16* output = p.out + int64_t(mine.start + mine.first) * p.channels + channel;
    for (int group = 0; group < rows; group += kGroup) {
        ptx::mbarrier_wait(&shared.full[group / kGroup], 0);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
            if (group + i >= rows) break;
            const Float8 now =
                unpack(*reinterpret_cast<const uint4*>(&shared.rows[group + i][threadIdx.x * kChannels]));
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
            store_16(output, pack(y));
            output += p.channels;
        }
    }

    if (mine.first > 0) return;
    for (int i = 0; i < p.snapshot_count; ++i) {
        const int32_t* snapshot = p.snapshots + i * 3;
        if (snapshot[0] == mine.sequence && snapshot[2] >= 0) store_window(p, s, snapshot[1], snapshot[2], channel);
    }
    if (mine.write_slot >= 0) store_window(p, s, s.context + mine.length, mine.write_slot, channel);
}

}  // namespace

cudaError_t causal_conv1d(const CausalConv1d& p, cudaStream_t stream) {
    const int columns = (p.channels + kRowElements - 1) / kRowElements;
    // Long tiles read the rows above them less often, short ones fill the card.
    int tile = kMaxTile;
    while (tile > kGroup && p.tokens / tile * columns < kBlocks * multiprocessor_count()) tile -= kGroup;
    LaunchConfig config;
    config.grid = dim3(static_cast<unsigned>(p.tokens / tile + p.sequences), static_cast<unsigned>(columns));
    config.block = dim3(kThreads);
    config.shared_bytes = sizeof(Shared);
    config.stream = stream;
    config.programmatic = true;
    return launch(causal_conv1d_kernel, config, p, tile);
}

}  // namespace tokenspeed
