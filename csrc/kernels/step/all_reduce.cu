// The sum of every rank's x over peer memory in one launch, alone or with the residual add and the RMSNorm behind it.
//
//     s = sum over ranks of x, in fp32, rounded to bf16;  total = s + residual, rounded;  out = norm of total, or s
//
// Decode's sums are small (a row is 4 to 16 KB) and there are two a layer: what counts is the way from one card to the
// other and back, not bandwidth. So every rank pushes its rows straight into memory of every other one, as words of 8
// bytes that carry 4 bytes of data and a tag: whoever finds the tag has the data. One way over the link, no fence, no
// flag, no second way. It sends twice the bytes, (ranks - 1) times over: for many rows or ranks a ring is faster.
//
// The tag of a row is how often it was summed, counted in each rank's own memory: ranks run the same calls in the same
// order, so they agree, and a CUDA graph counts on by itself. A row has two places, by the parity of its tag. Nobody
// writes over what is still read: who pushes tag t has found the others' t - 1, and they pushed that after they had
// read t - 2. So there is no barrier at the end.
//
// Every rank adds in order of rank: all get the same bits. A block takes whole rows, a thread 8 elements of each, and
// holds the words of up to four ranks in flight. It pushes all its rows before it waits for any.
//
// A wait ends without its words where the host says so, or when patience is over: the rank is then marked as having
// lost another, on the device, where later launches look, so that a graph drains at once, and in host memory, where the
// engine looks before it believes any result.
//
// Floor: one way over NVLink, about 0.7 us, and three ways to L2; 64 rows of 5120 on two ranks send 1.3 MB, 3 us.
//
// budget: all_reduce_kernel registers<=64 shared<=0 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <algorithm>

#include "bf16x8.h"
#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kVectorElements = 8;
constexpr int kWarp = 32;
constexpr int kVectorWords = 4;  // of 4 bytes of data, and in peer memory of 8
constexpr int kInFlight = 4;     // ranks whose words are loaded at a time
constexpr int kThreads = kAllReduceMaxWidth / kVectorElements;

// Where a rank's vector of a row lies in any rank's memory: its first two words, and kSecondHalf behind them the
// others. The lanes of a warp lie next to one another in each half.
constexpr int kSecondHalf = 2 * kWarp;
__device__ __forceinline__ int64_t place_of(const AllReduce& p, uint32_t tag, int row, int source, int vector) {
    const int64_t slot = (int64_t{tag & 1} * p.max_rows + row) * p.ranks + source;
    return slot * (p.max_width / kVectorElements) * kVectorWords + vector / kWarp * (kWarp * kVectorWords) +
           vector % kWarp * 2;
}

template <int kRanks, bool kNorm>
__global__ void __launch_bounds__(kThreads) all_reduce_kernel(const __grid_constant__ AllReduce p) {
    DYNAMIC_SHARED(shared);
    auto* partial = reinterpret_cast<float*>(shared);  // [2, warps]
    const int v = threadIdx.x, warps = blockDim.x / kWarp;
    const bool active = v < p.width / kVectorElements;
    uint32_t* tags = p.control + kAllReduceTags;

    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    bool patient = p.control[0] == 0;
    for (int row = blockIdx.x; row < p.rows; row += gridDim.x) {
        if (!active) break;
        const uint32_t tag = tags[row] + 1;
        const uint4 own = ptx::load_16_no_allocate(p.x + int64_t{row} * p.width + v * kVectorElements);
        const int64_t place = place_of(p, tag, row, p.rank, v);
#pragma unroll
        for (int hop = 1; hop < kRanks; ++hop) {
            uint64_t* peer = p.memory[(p.rank + hop) % kRanks] + place;
            ptx::store_tagged_system(peer, own.x, own.y, tag);
            ptx::store_tagged_system(peer + kSecondHalf, own.z, own.w, tag);
        }
    }

    const ptx::Patience patience = {p.status, p.patience_ns};
    for (int row = blockIdx.x; row < p.rows; row += gridDim.x) {
        const int64_t at = int64_t{row} * p.width + v * kVectorElements;
        const uint32_t tag = tags[row] + 1;
        uint4 result{};
        float squares = 0;
        if (active) {
            const uint4 own = ptx::load_16_no_allocate(p.x + at);
            const uint32_t own_words[kVectorWords] = {own.x, own.y, own.z, own.w};
            Float8 sum{};
#pragma unroll
            for (int first = 0; first < kRanks; first += kInFlight) {
                constexpr int kNow = kRanks < kInFlight ? kRanks : kInFlight;
                uint32_t words[kNow][2][2];
                bool there[kNow];
#pragma unroll
                for (int i = 0; i < kNow; ++i) {
                    const uint64_t* from = p.memory[p.rank] + place_of(p, tag, row, first + i, v);
                    const bool one = ptx::load_tagged_system(words[i][0], from, tag);
                    const bool other = ptx::load_tagged_system(words[i][1], from + kSecondHalf, tag);
                    there[i] = one && other;
                }
#pragma unroll
                for (int i = 0; i < kNow; ++i) {
                    const bool mine = first + i == p.rank;
                    if (!mine && !there[i] && patient) {
                        const uint64_t* from = p.memory[p.rank] + place_of(p, tag, row, first + i, v);
                        patient = ptx::wait_tagged_system(words[i][0], from, tag, patience) &&
                                  ptx::wait_tagged_system(words[i][1], from + kSecondHalf, tag, patience);
                        if (!patient) {
                            p.control[0] = 1;
                            p.status[1] = 1;
                        }
                    }
                    sum = sum + unpack(make_uint4(
                                    mine ? own_words[0] : words[i][0][0], mine ? own_words[1] : words[i][0][1],
                                    mine ? own_words[2] : words[i][1][0], mine ? own_words[3] : words[i][1][1]));
                }
            }
            result = pack(sum);
            if constexpr (kNorm) {
                result = pack(unpack(result) + unpack(ptx::load_16_no_allocate(p.residual + at)));
                store_16(p.total + at, result);
                squares = sum_of_squares(unpack(result));
            } else {
                store_16(p.out + at, result);
            }
        }
        if constexpr (kNorm) {
            float* row_partial = partial + (row / gridDim.x & 1) * warps;  // the row before may still be summed
            squares = warp_sum(squares);
            if (v % kWarp == 0) row_partial[v / kWarp] = squares;
            __syncthreads();
            squares = 0;
            for (int w = 0; w < warps; ++w) squares += row_partial[w];
            if (!active) continue;
            const float inverse = rsqrtf(squares / p.width + p.eps);
            const Float8 x = unpack(result);
            const Float8 scale = unpack(ptx::load_16_read_only(p.norm_weight + v * kVectorElements));
            const Float8 y = normalised(x, inverse, scale);
            store_16(p.out + at, pack(y));
        }
    }
    __syncthreads();  // everybody has read the tags
    for (int row = blockIdx.x + gridDim.x * v; row < p.rows; row += gridDim.x * blockDim.x) ++tags[row];
}

template <bool kNorm>
auto kernel_of(int ranks) {
    return ranks == 2   ? all_reduce_kernel<2, kNorm>
           : ranks == 4 ? all_reduce_kernel<4, kNorm>
                        : all_reduce_kernel<8, kNorm>;
}

}  // namespace

bool all_reduce_supported(const AllReduce& p) {
    const bool ranks = p.ranks == 2 || p.ranks == 4 || p.ranks == 8;
    return ranks && p.rank >= 0 && p.rank < p.ranks && p.rows >= 1 && p.rows <= p.max_rows && p.width >= 1 &&
           p.width <= p.max_width && p.width % kVectorElements == 0 && p.max_width <= kAllReduceMaxWidth &&
           p.max_width % (kVectorElements * kWarp) == 0;
}

int64_t all_reduce_memory(int ranks, int max_rows, int max_width) {
    return int64_t{2} * max_rows * ranks * (max_width / kVectorElements) * kVectorWords * sizeof(uint64_t);
}

cudaError_t all_reduce(const AllReduce& p, cudaStream_t stream) {
    if (!all_reduce_supported(p)) return cudaErrorInvalidValue;
    const bool norm = p.residual != nullptr;
    const auto kernel = norm ? kernel_of<true>(p.ranks) : kernel_of<false>(p.ranks);
    const int warps = (p.width / kVectorElements + kWarp - 1) / kWarp;
    LaunchConfig config;
    config.block = dim3(static_cast<unsigned>(warps * kWarp));
    config.shared_bytes = norm ? 2 * warps * sizeof(float) : 0;
    config.stream = stream;
    config.programmatic = true;
    config.grid = dim3(static_cast<unsigned>(std::min(p.rows, std::max(max_resident_blocks(kernel, config), 1))));
    return launch(kernel, config, p);
}

}  // namespace tokenspeed
