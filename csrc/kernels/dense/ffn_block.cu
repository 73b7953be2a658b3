// The feed-forward of a dense decode layer, 1 to 8 tokens, as one persistent launch: residual sum and norm, gate and
// up, SwiGLU, down.
//
// Bytes. 0.8B: 14.7 MB of gate_up, 7.3 of down: 22.0 MB, 5.3 us at 4.17 TB/s. As two launches they take 12 us: x waits
// for its norm, the activations for the end of a launch, and each ring fills anew.
//
// A block, one a multiprocessor, has a fixed share of the tiles, 4 gate rows with their 4 up rows, then 8 rows of down,
// and one ring of 16 KB stages that one thread keeps full in that order: 8 rows x 1,024 columns each, all of the depth
// of 0.8B's gate_up. Nobody waits for weights: the ring is full before the wait for the kernel ahead, and runs on into
// down while activations are exchanged. So narrow a tile divides the rows evenly (0.8B: 896 and 128 tiles on 132
// blocks) and leaves no output of down to two blocks: there is one exchange, not two. Blocks that have a tile of
// gate_up less than others are those that get the first of down.
//
// Eight warps multiply: mma.sync with weights on M = 16 and tokens on N = 8. A warp has two chunks of 64 columns of
// each stage, and the 16 rows of an mma are the 8 rows of the one and of the other; each meets its own columns of x, in
// a product of its own, of which the half that belongs together counts. They never wait for each other behind the norm:
// the ninth warp streams weights, the tenth adds the warps' sums, a ring of them, and stores activations and output.
//
// Dependencies. One token's activations are words of two bf16 and the launch's number; each warp spins on those of its
// own columns and brings them into shared memory for itself: no fence, no counter, no barrier. Several tokens' words
// would be too much for 132 blocks to read: they are rows of bf16, and blocks count, with a release, when theirs are
// stored. The number comes from the caller's memory, where launches count themselves, so a graph may replay; since only
// who has read it may change it, blocks count themselves in, and the first waits for that count and clears the next
// launch's.
//
// All blocks must be on the device at once, and are: one a multiprocessor, and the next kernel may start only when all
// have. What the kernel ahead still holds it gives back without waiting for us. More than half of a multiprocessor is
// left to the next one, whose ring fills while ours runs dry.
//
// Rounding is that of the operators that the torch implementation names. Sums have the same order for any number of
// tokens and blocks.
//
// What was predicted and measured: docs/kernels/ffn_block.md.
//
// budget: ffn_block_kernel registers<=112 shared<=0 hot sass=HMMA
#include <bf16x8.h>
#include <launch.h>
#include <ptx.h>
#include <ptx_tma.h>
#include <reduce.h>

#include <algorithm>

#include "add_norm.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

using expert_decode::kConsumers;
using expert_decode::kStageBytes;
using expert_decode::kThreads;
using expert_decode::kWeightWarp;

constexpr int kFinishWarp = kWeightWarp + 1;
constexpr int kChunk = 64;  // columns of a weight row that TMA swizzles together, 128 bytes
constexpr int kTileRows = 8;
constexpr int kTileColumns = kTileRows / 2;      // of the activations
constexpr int kChunkBytes = kTileRows * 128;     // of a tile
constexpr int kWarpDepth = 2 * kChunk;           // of a stage
constexpr int kDepth = kConsumers * kWarpDepth;  // of a stage
static_assert(kTileRows * kDepth * 2 == kStageBytes);
constexpr int kStages = 4;                             // of the ring, see the page
constexpr int kSumSlots = 4;                           // tiles whose sums wait to be added
constexpr int kSumPitch = kConsumers * kTileRows + 4;  // floats of a token's sums: distinct banks for a warp's stores
// No two blocks may share a multiprocessor, as they might while the kernel ahead ends. By their registers they cannot,
// and the rings of their neighbours, 137 KB of in_proj of 0.8B, fit beside one. Were they fewer, this would see to it.
constexpr int kAloneShared = 114 * 1024;
constexpr int kWordsOfStage = kDepth / 2;  // of the activations that a stage of down meets

// The caller's memory: how many launches have used it, and how many blocks of the launches of either parity have read
// that, and where tokens are several, stored their activations. Behind it the activations of one token, words of two
// and their launch's number.
struct Header {
    uint32_t launches;
    uint32_t padding[31];
    uint32_t counted[2][32];
};
constexpr int kHeaderWords = sizeof(Header) / sizeof(uint32_t);
static_assert(kHeaderWords == 96, "so says the operator");

struct Control {
    uint64_t full[kStages], empty[kStages];
    uint64_t sums_full[kSumSlots], sums_empty[kSumSlots];
    uint64_t begun, exchanged;  // the launch's number is known; the activations of all blocks are there
    uint32_t launch;
    float squares[kConsumers];
};

// Dynamic shared memory: the ring, rows of x and of the activations, sums [slot, token, warp, row], control.
struct Layout {
    int tokens, x_pitch, y_pitch;  // pitches in bytes: two rows meet no bank twice

    __host__ __device__ int x_offset() const { return kStages * kStageBytes; }
    __host__ __device__ int y_offset() const { return x_offset() + tokens * x_pitch; }
    __host__ __device__ int sums_offset() const { return y_offset() + tokens * y_pitch; }
    __host__ __device__ int control_offset() const { return sums_offset() + kSumSlots * tokens * kSumPitch * 4; }
    __host__ __device__ int bytes() const { return control_offset() + static_cast<int>(sizeof(Control)); }
};

Layout layout_for(const FfnBlock& p) {
    return {p.tokens, p.hidden * 2 + 64, p.width * 2 + 64};
}

struct Maps {
    CUtensorMap gate_up, down;
};

struct Arguments {
    FfnBlock p;
    Layout layout;
    uint64_t* words;
};

// The tiles of a block, `first`, `first` + blocks, ...
struct Work {
    int blocks, first_of_gate_up, gate_up_tiles, first_of_down, down_tiles;

    __device__ explicit Work(const FfnBlock& p)
        : blocks(static_cast<int>(gridDim.x)),
          first_of_gate_up(static_cast<int>(blockIdx.x)),
          gate_up_tiles(p.width / kTileColumns),
          first_of_down(blocks - 1 - first_of_gate_up),
          down_tiles(p.hidden / kTileRows) {}
};

// Copies the block's tiles through the ring. One thread.
__device__ void stream_weights(const Maps& maps, const FfnBlock& p, Control& control, uint8_t* ring) {
    const Work work(p);
    Cursor at;
    int copies = 0;
    const auto let_others_start = [] {
        ptx::grid_dependency_wait();
        ptx::grid_dependency_launch();
    };
    const auto copy = [&](auto load) {
        if (copies++ == kStages) let_others_start();  // the ring is full
        ptx::mbarrier_wait(&control.empty[at.slot], at.phase ^ 1);
        ptx::mbarrier_arrive_expect_tx(&control.full[at.slot], kStageBytes);
        load(ring + at.slot * kStageBytes, &control.full[at.slot]);
        at.next(kStages);
    };
    for (int tile = work.first_of_gate_up; tile < work.gate_up_tiles; tile += work.blocks) {
        for (int depth = 0; depth < p.hidden; depth += kDepth) {
            copy([&](uint8_t* stage, uint64_t* full) {
                ptx::tma_load<4>(stage, &maps.gate_up, full, {0, tile * kTileColumns, 0, depth / kChunk},
                                 ptx::CachePolicy::kEvictFirst);
            });
        }
    }
    for (int tile = work.first_of_down; tile < work.down_tiles; tile += work.blocks) {
        for (int depth = 0; depth < p.width; depth += kDepth) {
            copy([&](uint8_t* stage, uint64_t* full) {
                ptx::tma_load<3>(stage, &maps.down, full, {0, tile * kTileRows, depth / kChunk},
                                 ptx::CachePolicy::kEvictFirst);
            });
        }
    }
    if (copies <= kStages) let_others_start();
}

// sum[chunk] += the 8 rows of two chunks of a stage times the same columns of this lane's token, `row`; of sum[0] the
// first half counts, of sum[1] the second. k is permuted alike in both operands: a lane reads eight neighbours. `both`:
// the depth does not end between the chunks.
__device__ __forceinline__ void multiply_chunks(float (&sum)[2][2][4], const uint8_t* chunks, const uint8_t* row,
                                                bool both) {
    const int lane = threadIdx.x % 32, piece = lane % 4, place = lane / 8 + lane / 4 % 2 * 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const uint8_t* upper_row = chunks + place * 128 + ((half * 4 + piece) ^ place) * 16;
        const uint4 upper = *reinterpret_cast<const uint4*>(upper_row);
        const uint4 lower = *reinterpret_cast<const uint4*>(upper_row + kChunkBytes);
        const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
        const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) {
            const uint8_t* columns = row + chunk * kChunk * 2 + half * 64 + piece * 16;
            const uint4 b = chunk == 0 || both ? *reinterpret_cast<const uint4*>(columns) : uint4{};
            ptx::mma_m16n8k16<__nv_bfloat16>(sum[chunk][0], first, b.x, b.y);
            ptx::mma_m16n8k16<__nv_bfloat16>(sum[chunk][1], second, b.z, b.w);
        }
    }
}

// A warp that multiplies: where it is in the ring, and in that of the sums.
struct Multiplier {
    Control& control;
    const Layout& layout;
    const uint8_t* ring;
    float* sums;
    Cursor at, at_sums;

    // Multiplies one tile with rows of `operand` and hands on the warp's sums.
    __device__ __forceinline__ void tile(const uint8_t* operand, int pitch, int depth) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, quad = lane / 4;
        const uint8_t* row = operand + min(quad, layout.tokens - 1) * pitch;  // columns without a token are not stored
        float sum[2][2][4] = {};
        for (int from = warp * kWarpDepth; from - warp * kWarpDepth < depth; from += kDepth) {
            ptx::mbarrier_wait(&control.full[at.slot], at.phase);
            const uint8_t* chunks = ring + at.slot * kStageBytes + warp * 2 * kChunkBytes;
            if (from < depth) multiply_chunks(sum, chunks, row + from * 2, from + kChunk < depth);
            __syncwarp();
            if (lane == 0) ptx::mbarrier_arrive(&control.empty[at.slot]);
            at.next(kStages);
        }
        ptx::mbarrier_wait(&control.sums_empty[at_sums.slot], at_sums.phase ^ 1);
        float* mine = sums + at_sums.slot * layout.tokens * kSumPitch + warp * kTileRows + quad / 2 + quad % 2 * 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int token = lane % 4 * 2 + i;
            if (token >= layout.tokens) continue;
            mine[token * kSumPitch] = sum[0][0][i] + sum[0][1][i] + (sum[1][0][2 + i] + sum[1][1][2 + i]);
        }
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&control.sums_full[at_sums.slot]);
        at_sums.next(kSumSlots);
    }
};

// Brings the activations of the one token that this warp multiplies into `row`.
__device__ __forceinline__ void bring_words(const Arguments& a, uint32_t launch, uint8_t* row) {
    constexpr int kPairs = 4;                                                 // of words, on their way at once
    const int column = threadIdx.x / 32 * kWarpDepth + threadIdx.x % 32 * 4;  // of each stage
    const int count = (max(a.p.width - column, 0) + kDepth - 1) / kDepth;
    for (int base = 0; base < count; base += kPairs) {
        uint2 values[kPairs];
        const uint64_t* words = a.words + base * kWordsOfStage + column / 2;
        ptx::wait_tagged_pairs(values, words, kWordsOfStage, count - base, launch);
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            if (base + i < count) *reinterpret_cast<uint2*>(row + ((base + i) * kDepth + column) * 2) = values[i];
        }
    }
    __syncwarp();
}

// The same of several tokens, whose activations are all there. Half a warp has a token's columns of a stage.
__device__ __forceinline__ void bring_rows(const Arguments& a, uint8_t* rows) {
    constexpr int kAtOnce = 8;
    const FfnBlock& p = a.p;
    const int first = threadIdx.x / 32 * kWarpDepth + threadIdx.x % 16 * 8;
    const int all = (p.width + kDepth - 1) / kDepth * p.tokens;
    for (int base = threadIdx.x % 32 / 16; base < all; base += 2 * kAtOnce) {
        uint4 values[kAtOnce];
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = base + 2 * i, column = at / p.tokens * kDepth + first;
            if (at >= all || column >= p.width) continue;
            values[i] = ptx::load_16_no_allocate(p.workspace + at % p.tokens * p.width + column);
        }
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
            const int at = base + 2 * i, column = at / p.tokens * kDepth + first;
            if (at >= all || column >= p.width) continue;
            store_16(rows + at % p.tokens * a.layout.y_pitch + column * 2, values[i]);
        }
    }
    __syncwarp();
}

// The warps that multiply, from the norm on.
__device__ void multiply(const Arguments& a, Control& control, uint8_t* shared_memory) {
    const FfnBlock& p = a.p;
    const Layout& layout = a.layout;
    const Work work(p);
    uint8_t *x = shared_memory + layout.x_offset(), *y = shared_memory + layout.y_offset();
    stage_norm<false>(p, x, layout.x_pitch, control.squares, [] {}, [] {});
    Multiplier multiplier{
        control, layout, shared_memory, reinterpret_cast<float*>(shared_memory + layout.sums_offset()), {}, {}};
    for (int tile = work.first_of_gate_up; tile < work.gate_up_tiles; tile += work.blocks) {
        multiplier.tile(x, layout.x_pitch, p.hidden);
    }
    if (work.first_of_down >= work.down_tiles) return;
    if (p.tokens == 1) {
        ptx::mbarrier_wait(&control.begun, 0);
        bring_words(a, control.launch, y);
    } else {
        ptx::mbarrier_wait(&control.exchanged, 0);
        bring_rows(a, y);
    }
    for (int tile = work.first_of_down; tile < work.down_tiles; tile += work.blocks) {
        multiplier.tile(y, layout.y_pitch, p.width);
    }
}

// Adds the sums of every tile and stores what becomes of them. One warp, a lane a row of a token, four tokens at a
// time.
__device__ void finish(const Arguments& a, Control& control, const float* sums) {
    const FfnBlock& p = a.p;
    const Work work(p);
    const int lane = threadIdx.x % 32, row = lane % kTileRows;
    ptx::grid_dependency_wait();
    auto& header = *reinterpret_cast<Header*>(p.scratch);
    uint32_t launch = 0;
    if (lane == 0) {
        launch = header.launches + 1;
        control.launch = launch;
        ptx::mbarrier_arrive(&control.begun);
        // Whoever sees this count knows that the number has been read.
        if (p.tokens == 1) ptx::add_relaxed(header.counted[launch % 2], 1);
    }
    launch = __shfl_sync(kAllLanes, launch, 0);
    Cursor at;
    const auto each_token = [&](auto store) {
        ptx::mbarrier_wait(&control.sums_full[at.slot], at.phase);
        for (int token = lane / kTileRows; token - lane / kTileRows < p.tokens; token += 32 / kTileRows) {
            const float* mine = sums + (at.slot * p.tokens + min(token, p.tokens - 1)) * kSumPitch + row;
            float total = 0;
#pragma unroll
            for (int i = 0; i < kConsumers; ++i) total += mine[i * kTileRows];
            store(token, __float2bfloat16(total));
        }
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&control.sums_empty[at.slot]);
        at.next(kSumSlots);
    };
    for (int tile = work.first_of_gate_up; tile < work.gate_up_tiles; tile += work.blocks) {
        const int column = tile * kTileColumns + row;
        each_token([&](int token, __nv_bfloat16 value) {  // rows 0 to 3 are gates, 4 to 7 their ups
            const float up = __shfl_down_sync(kAllLanes, to_float(value), kTileColumns);
            const float y = silu(to_float(value)) * up, next = __shfl_down_sync(kAllLanes, y, 1);
            if (token >= p.tokens || row >= kTileColumns || row % 2 != 0) return;
            const uint32_t pair = pack<__nv_bfloat16>(y, next);
            if (p.tokens == 1) {
                ptx::store_tagged(a.words + column / 2, pair, launch);
            } else {
                *reinterpret_cast<uint32_t*>(p.workspace + token * p.width + column) = pair;
            }
        });
    }
    if (lane == 0 && p.tokens > 1) {
        ptx::add_release(header.counted[launch % 2], 1);
        ptx::wait_at_least(header.counted[launch % 2], gridDim.x);
        ptx::mbarrier_arrive(&control.exchanged);
    }
    if (blockIdx.x == 0 && lane == 0) {
        ptx::wait_at_least(header.counted[launch % 2], gridDim.x);
        header.counted[(launch + 1) % 2][0] = 0;
        header.launches = launch;
    }
    for (int tile = work.first_of_down; tile < work.down_tiles; tile += work.blocks) {
        each_token([&](int token, __nv_bfloat16 value) {
            if (token < p.tokens) p.out[int64_t{token} * p.hidden + tile * kTileRows + row] = value;
        });
    }
}

__global__ void __launch_bounds__(kThreads, 1)
    ffn_block_kernel(const __grid_constant__ Maps maps, const __grid_constant__ Arguments a) {
    DYNAMIC_SHARED(shared_memory);
    const Layout& layout = a.layout;
    auto& control = *reinterpret_cast<Control*>(shared_memory + layout.control_offset());
    const int warp = threadIdx.x / 32;
    if (threadIdx.x == kWeightWarp * 32) {
        for (int i = 0; i < kStages; ++i) {
            ptx::mbarrier_init(&control.full[i], 1);
            ptx::mbarrier_init(&control.empty[i], kConsumers);
        }
        for (int i = 0; i < kSumSlots; ++i) {
            ptx::mbarrier_init(&control.sums_full[i], kConsumers);
            ptx::mbarrier_init(&control.sums_empty[i], 1);
        }
        ptx::mbarrier_init(&control.begun, 1);
        ptx::mbarrier_init(&control.exchanged, 1);
        ptx::fence_mbarrier_init();
        ptx::prefetch_tensor_map(&maps.gate_up);
        ptx::prefetch_tensor_map(&maps.down);
    }
    __syncthreads();
    if (warp == kWeightWarp) {
        if (threadIdx.x % 32 == 0) stream_weights(maps, a.p, control, shared_memory);
    } else if (warp == kFinishWarp) {
        finish(a, control, reinterpret_cast<const float*>(shared_memory + layout.sums_offset()));
    } else {
        multiply(a, control, shared_memory);
    }
}

// Boxes of a stage: of gate_up 4 rows and the 4 `width` rows further, of down 8 rows.
cudaError_t encode(Maps* maps, const FfnBlock& p) {
    const auto hidden = static_cast<uint64_t>(p.hidden), width = static_cast<uint64_t>(p.width);
    constexpr int kChunks = kDepth / kChunk;
    const cudaError_t status = encode_tensor_map<4>(&maps->gate_up, TensorElement::kBf16,
                                                    {.base = p.gate_up,
                                                     .sizes = {kChunk, width, 2, hidden / kChunk},
                                                     .strides = {2, hidden * 2, width * hidden * 2, kChunk * 2},
                                                     .box = {kChunk, kTileColumns, 2, kChunks}},
                                                    Swizzle::k128);
    if (status != cudaSuccess) return status;
    return encode_tensor_map<3>(&maps->down, TensorElement::kBf16,
                                {.base = p.down,
                                 .sizes = {kChunk, hidden, width / kChunk},
                                 .strides = {2, width * 2, kChunk * 2},
                                 .box = {kChunk, kTileRows, kChunks}},
                                Swizzle::k128);
}

}  // namespace

int64_t ffn_block_scratch(const FfnBlock& p) {
    return kHeaderWords + p.width;
}

bool ffn_block_supported(const FfnBlock& p) {
    const auto whole = [](int size) { return size >= kChunk && size % kChunk == 0 && size < kSharedLimit; };
    return p.tokens >= 1 && p.tokens <= kFfnBlockTokens && whole(p.hidden) && whole(p.width) && p.x_stride % 8 == 0 &&
           is_aligned(p.x) && is_aligned(p.residual) && is_aligned(p.norm_weight) && is_aligned(p.gate_up) &&
           is_aligned(p.down) && is_aligned(p.scratch) && layout_for(p).bytes() <= kSharedLimit;
}

cudaError_t ffn_block(const FfnBlock& p, cudaStream_t stream) {
    if (!ffn_block_supported(p)) return cudaErrorInvalidValue;
    const Arguments arguments{p, layout_for(p), reinterpret_cast<uint64_t*>(p.scratch + kHeaderWords)};
    Maps maps;
    const cudaError_t status = encode(&maps, p);
    if (status != cudaSuccess) return status;
    LaunchConfig config = {.grid = dim3(multiprocessor_count()),
                           .block = dim3(kThreads),
                           .shared_bytes = static_cast<size_t>(arguments.layout.bytes()),
                           .stream = stream,
                           .programmatic = true};
    const int resident = max_resident_blocks(ffn_block_kernel, config), blocks = static_cast<int>(config.grid.x);
    if (resident < blocks) return cudaErrorCooperativeLaunchTooLarge;  // blocks wait for each other
    if (resident > blocks) config.shared_bytes = std::max<size_t>(config.shared_bytes, kAloneShared);
    return launch(ffn_block_kernel, config, maps, arguments);
}

}  // namespace tokenspeed
