// y = x weight^T for 1 to 16 rows of x: the weights stream once, so the floor is their bytes over the bandwidth
// (64 MB: 15.6 us at 4.3 TB/s); 2 flop a weight and row keep even 16 rows far below the matrix units' rate.
//
// Tiling. A tile is 16 weight rows; a slab is 512 columns of it, 16 KB, copied row by row (1 KB each) into a ring of
// shared memory by one warp, which never waits for the kernel before: weights are there already, so the ring is full by
// the time x is. Shared memory stays below half of a multiprocessor's, so that the next kernel's ring fills beside this
// one. Eight warps take 64 columns of each slab: mma.sync with weights on M = 16 and rows of x on N = 8 or 16. Both
// operands are read 16 bytes a lane, eight consecutive columns: a permutation of k that is the same for both, hence
// free; the row pitch of 1024 + 64 bytes keeps those reads off each other's banks. x comes through L1, ahead of the
// wait for its slab.
//
// Few tiles: a cluster of 2, 4 or 8 blocks shares the columns of its tiles and the sums meet in the shared memory of
// one of them at the end, in a fixed order. The launcher picks the cluster that leaves the least idle time.
//
// Predicted (not run yet): 64 MB 16.8 us (93%), 1 row or 16; in a chain 8 MB 2.4 us (81%), 32 MB 8.7 us (90%).
// budget: linear_kernel registers<=96 shared<=0 hot sass=HMMA
#include <launch.h>
#include <ptx.h>

#include <algorithm>

#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kTileRows = 16;
constexpr int kSlab = 512;                    // columns
constexpr int kPitch = kSlab * 2 + 64;        // bytes between rows of a slab
constexpr int kStage = kTileRows * kPitch;    // bytes
constexpr int kConsumers = 8;                 // warps
constexpr int kColumns = kSlab / kConsumers;  // of a slab, per warp
constexpr int kThreads = (kConsumers + 1) * 32;
constexpr int kSumPitch = kTileRows + 4;  // floats; distinct banks for the four lanes that hold one row's sums
constexpr int kMaxClusterTiles = 16;      // tiles a cluster may own: what its exchange buffer holds

template <int kRows>
struct Storage {  // of dynamic shared memory; kRows: rows of x, 8 or 16
    static constexpr int kStages = kRows == 8 ? 5 : 4;
    uint8_t ring[kStages][kStage];
    float partial[2][kConsumers][kRows * kSumPitch];       // of one tile; two tiles in turn need one barrier each
    float exchange[kMaxClusterTiles * kRows * kTileRows];  // [source rank][own tile][row of x][weight row]
    uint64_t full[kStages];
    uint64_t empty[kStages];
};

// The tiles and slabs of a block: tiles `tile`, `tile + stride`, ...; slabs first .. last of each.
struct Share {
    int tiles, stride, first_tile, first_slab, last_slab;
};

template <int kRows>
__device__ __forceinline__ void fill_ring(Storage<kRows>& storage, const Share& share, const __nv_bfloat16* weight,
                                          int outputs, int inputs) {
    const int lane = threadIdx.x % 32;
    int stage = 0, parity = 1;  // a fresh barrier lets the wait for parity 1 pass: every stage starts empty
    for (int tile = share.first_tile; tile < share.tiles; tile += share.stride) {
        const int rows = min(kTileRows, outputs - tile * kTileRows);
        for (int slab = share.first_slab; slab < share.last_slab; ++slab) {
            ptx::mbarrier_wait(&storage.empty[stage], parity);
            const uint32_t bytes = min(kSlab, inputs - slab * kSlab) * 2;
            if (lane == 0) ptx::mbarrier_arrive_expect_tx(&storage.full[stage], rows * bytes);
            __syncwarp();
            if (lane < rows) {
                ptx::bulk_load(storage.ring[stage] + lane * kPitch,
                               weight + static_cast<int64_t>(tile * kTileRows + lane) * inputs + slab * kSlab, bytes,
                               &storage.full[stage], ptx::CachePolicy::kEvictFirst);
            }
            if (++stage == Storage<kRows>::kStages) stage = 0, parity ^= 1;
        }
    }
}

template <int kRows, bool kSplit>
__global__ void __launch_bounds__(kThreads, 2)
    linear_kernel(const __nv_bfloat16* x, int64_t x_stride, const __nv_bfloat16* __restrict__ weight,
                  __nv_bfloat16* __restrict__ out, int rows, int outputs, int inputs) {
    constexpr int kGroups = kRows / 8;  // of eight rows of x: the N of one mma
    DYNAMIC_SHARED(shared);
    auto& storage = *reinterpret_cast<Storage<kRows>*>(shared);
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int slabs = (inputs + kSlab - 1) / kSlab;
    const int rank = kSplit ? blockIdx.x : 0, ranks = kSplit ? gridDim.x : 1;
    const Share share = {(outputs + kTileRows - 1) / kTileRows, static_cast<int>(gridDim.y),
                         static_cast<int>(blockIdx.y), slabs * rank / ranks, slabs * (rank + 1) / ranks};
    if (threadIdx.x == 0) {
        for (int i = 0; i < Storage<kRows>::kStages; ++i) {
            ptx::mbarrier_init(&storage.full[i], 1);
            ptx::mbarrier_init(&storage.empty[i], kConsumers);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (kSplit) ptx::cluster_arrive();  // the peers may write into this block's exchange buffer from now on

    if (warp == kConsumers) {
        fill_ring(storage, share, weight, outputs, inputs);
        if (kSplit) ptx::cluster_wait();
    } else {
        ptx::grid_dependency_wait();
        ptx::grid_dependency_launch();
        if (kSplit) ptx::cluster_wait();

        const int group = lane / 4, quarter = lane % 4;
        int stage = 0, parity = 0, turn = 0;
        for (int tile = share.first_tile; tile < share.tiles; tile += share.stride, ++turn) {
            float sum[kGroups][2][4] = {};  // two chains of mma, so that one hides the other's latency
            for (int slab = share.first_slab; slab < share.last_slab; ++slab) {
                const int column = slab * kSlab + warp * kColumns + quarter * 8;
                uint4 values[kColumns / 32][kGroups];
#pragma unroll
                for (int i = 0; i < kColumns / 32; ++i) {
#pragma unroll
                    for (int n = 0; n < kGroups; ++n) {
                        values[i][n] = uint4{};
                        if (n * 8 + group < rows && column + i * 32 < inputs) {
                            // Not the read-only path: the kernel before may write x while this one already runs.
                            values[i][n] =
                                *reinterpret_cast<const uint4*>(x + (n * 8 + group) * x_stride + column + i * 32);
                        }
                    }
                }
                ptx::mbarrier_wait(&storage.full[stage], parity);
                const uint8_t* rows_here = storage.ring[stage] + group * kPitch + (warp * kColumns + quarter * 8) * 2;
#pragma unroll
                for (int i = 0; i < kColumns / 32; ++i) {
                    if (column + i * 32 >= inputs) break;  // nothing was copied there
                    const uint4 upper = *reinterpret_cast<const uint4*>(rows_here + i * 64);
                    const uint4 lower = *reinterpret_cast<const uint4*>(rows_here + 8 * kPitch + i * 64);
                    const uint32_t first[4] = {upper.x, lower.x, upper.y, lower.y};
                    const uint32_t second[4] = {upper.z, lower.z, upper.w, lower.w};
#pragma unroll
                    for (int n = 0; n < kGroups; ++n) {
                        ptx::mma_m16n8k16<__nv_bfloat16>(sum[n][0], first, values[i][n].x, values[i][n].y);
                        ptx::mma_m16n8k16<__nv_bfloat16>(sum[n][1], second, values[i][n].z, values[i][n].w);
                    }
                }
                __syncwarp();
                if (lane == 0) ptx::mbarrier_arrive(&storage.empty[stage]);
                if (++stage == Storage<kRows>::kStages) stage = 0, parity ^= 1;
            }

            float* mine = storage.partial[turn % 2][warp];
#pragma unroll
            for (int n = 0; n < kGroups; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    mine[(n * 8 + quarter * 2 + i % 2) * kSumPitch + group + i / 2 * 8] = sum[n][0][i] + sum[n][1][i];
                }
            }
            ptx::named_barrier_sync(1, kConsumers * 32);
            const int row = threadIdx.x / kTileRows, output = threadIdx.x % kTileRows;
            if (row < rows) {
                float total = 0;
#pragma unroll
                for (int i = 0; i < kConsumers; ++i) total += storage.partial[turn % 2][i][row * kSumPitch + output];
                if constexpr (kSplit) {
                    const int slot = rank * (kMaxClusterTiles / ranks) + turn / ranks;
                    ptx::cluster_map(storage.exchange, turn % ranks)[(slot * kRows + row) * kTileRows + output] = total;
                } else if (tile * kTileRows + output < outputs) {
                    out[static_cast<int64_t>(row) * outputs + tile * kTileRows + output] = __float2bfloat16(total);
                }
            }
        }
    }
    if constexpr (kSplit) {  // this block finishes tiles rank, rank + ranks, ... of its cluster's
        ptx::cluster_sync();
        const int row = threadIdx.x / kTileRows, output = threadIdx.x % kTileRows;
        if (row >= rows) return;
        for (int turn = rank, slot = 0;; turn += ranks, ++slot) {
            const int tile = share.first_tile + turn * share.stride;
            if (tile >= share.tiles) break;
            float total = 0;
            for (int i = 0; i < ranks; ++i) {
                const int from = i * (kMaxClusterTiles / ranks) + slot;
                total += storage.exchange[(from * kRows + row) * kTileRows + output];
            }
            if (tile * kTileRows + output < outputs) {
                out[static_cast<int64_t>(row) * outputs + tile * kTileRows + output] = __float2bfloat16(total);
            }
        }
    }
}

struct Partition {
    int ranks, clusters;
};

// Blocks per tile and clusters: the fewest slabs for the busiest block; a cluster costs about half a slab.
Partition partition(int tiles, int slabs) {
    const int multiprocessors = multiprocessor_count();
    Partition best = {1, std::min(tiles, multiprocessors)};
    int64_t best_cost = INT64_MAX;
    for (int ranks = 1; ranks <= std::min(8, slabs); ranks *= 2) {
        // Clusters of more than two may leave a few multiprocessors of a large processing cluster over.
        const int usable = ranks > 2 ? std::max(multiprocessors / 16 * 16, ranks) : multiprocessors;
        const int clusters = std::min(tiles, std::max(1, usable / ranks));
        const int turns = (tiles + clusters - 1) / clusters;
        if (ranks > 1 && turns > kMaxClusterTiles) continue;
        const int64_t cost = 2 * int64_t{turns} * ((slabs + ranks - 1) / ranks) + (ranks > 1);
        if (cost < best_cost) {
            best_cost = cost;
            best = {ranks, clusters};
        }
    }
    return best;
}

template <int kRows>
cudaError_t launch_rows(const Linear& p, cudaStream_t stream) {
    const auto [ranks, clusters] = partition((p.outputs + kTileRows - 1) / kTileRows, (p.inputs + kSlab - 1) / kSlab);
    const LaunchConfig config = {.grid = dim3(ranks, clusters),
                                 .block = dim3(kThreads),
                                 .shared_bytes = sizeof(Storage<kRows>),
                                 .stream = stream,
                                 .cluster = dim3(ranks),
                                 .programmatic = true};
    const auto kernel = ranks > 1 ? linear_kernel<kRows, true> : linear_kernel<kRows, false>;
    return launch(kernel, config, p.x, p.x_stride, p.weight, p.out, p.rows, p.outputs, p.inputs);
}

}  // namespace

bool linear_supported(const Linear& p) {
    const auto aligned = [](const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; };
    return p.rows >= 1 && p.rows <= kLinearMaxRows && p.outputs >= 1 && p.inputs >= 32 && p.inputs % 32 == 0 &&
           p.x_stride % 8 == 0 && aligned(p.x) && aligned(p.weight);
}

cudaError_t linear(const Linear& p, cudaStream_t stream) {
    if (!linear_supported(p)) return cudaErrorInvalidValue;
    return p.rows <= 8 ? launch_rows<8>(p, stream) : launch_rows<16>(p, stream);
}

}  // namespace tokenspeed
