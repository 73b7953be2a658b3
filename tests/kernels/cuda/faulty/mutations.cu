// A small warp-specialised pipeline, whole and with one thing left out or wrong at a time: each fault must show.
#include <launch.h>
#include <ptx_wgmma.h>

namespace tokenspeed {

enum class Fault {
    kNone,
    kNoFullWait,       // the product starts before its chunk has arrived
    kFullParity,       // waits for the wrong phase
    kNoEmptyWait,      // the producer overwrites a stage in use
    kNoEmptyArrive,    // the consumer never releases a stage
    kEarlyRelease,     // the stage is released before the product has read it
    kNoExpect,         // the bytes of a chunk are never announced
    kNoInitFence,      // the async proxy may not know the barriers
    kNoProductFence,   // registers may still be written when the product starts
    kNoProductWait,    // accumulators read while the product runs
    kNoProductCommit,  // the product belongs to no group, so nothing waits for it
    kNoStoreFence,     // the store reads what the async proxy has not seen
    kNoStoreBarrier,   // the store starts before all threads have written
    kNoReadWait,       // the result buffer is overwritten while a store reads it
    kNoStoreCommit,    // the store belongs to no group, so nothing waits for it
    kNoFinalWait,      // the block leaves while a store reads its memory
    kCount,
};

constexpr int kStages = 2, kColumns = 8, kChunkBytes = 16 * kColumns * 2, kABytes = 64 * 16 * 2;
constexpr int kResultBytes = 64 * kColumns * 4;

struct PipelineMemory {
    uint8_t a[kABytes];
    uint8_t b[kStages][kChunkBytes];
    float results[kStages][64 * kColumns];
    uint64_t full[kStages], empty[kStages], a_full;
};

// out[chunk][64 x 8] = a[64 x 16] b[chunk][16 x 8], fp16 operands in the layout of core matrices.
template <Fault kFault>
__global__ void __launch_bounds__(256, 1) pipeline(const uint8_t* a, const uint8_t* b, float* out, int chunks) {
    DYNAMIC_SHARED(raw);
    auto& memory = *reinterpret_cast<PipelineMemory*>(raw);
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            ptx::mbarrier_init(&memory.full[stage], 1);
            ptx::mbarrier_init(&memory.empty[stage], 128);
        }
        ptx::mbarrier_init(&memory.a_full, 1);
        if (kFault != Fault::kNoInitFence) ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        if (threadIdx.x != 0) return;
        ptx::mbarrier_arrive_expect_tx(&memory.a_full, kABytes);
        ptx::bulk_load(memory.a, a, kABytes, &memory.a_full);
        for (int i = 0; i < chunks; ++i) {
            const int stage = i % kStages, parity = i / kStages & 1;
            if (kFault != Fault::kNoEmptyWait) ptx::mbarrier_wait(&memory.empty[stage], parity ^ 1);
            if (kFault == Fault::kNoExpect) {
                ptx::mbarrier_arrive(&memory.full[stage]);
            } else {
                ptx::mbarrier_arrive_expect_tx(&memory.full[stage], kChunkBytes);
            }
            ptx::bulk_load(memory.b[stage], b + i * kChunkBytes, kChunkBytes, &memory.full[stage]);
        }
        return;
    }
    const int thread = static_cast<int>(threadIdx.x) - 128;
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    const uint64_t of_a = ptx::matrix_descriptor(ptx::shared_address(memory.a), Swizzle::kNone, 1024, 128);
    ptx::mbarrier_wait(&memory.a_full, 0);
    for (int i = 0; i < chunks; ++i) {
        const int stage = i % kStages, parity = i / kStages & 1;
        if (kFault != Fault::kNoFullWait)
            ptx::mbarrier_wait(&memory.full[stage], parity ^ (kFault == Fault::kFullParity));
        const uint64_t of_b = ptx::matrix_descriptor(ptx::shared_address(memory.b[stage]), Swizzle::kNone, 128, 128);
        float d[kColumns / 2] = {};
        if (kFault != Fault::kNoProductFence) ptx::wgmma_fence(d);
        ptx::wgmma<__half, kColumns>(d, of_a, of_b, false);
        if (kFault != Fault::kNoProductCommit) ptx::wgmma_commit();
        if (kFault == Fault::kEarlyRelease) ptx::mbarrier_arrive(&memory.empty[stage]);
        if (kFault != Fault::kNoProductWait) ptx::wgmma_wait<0>(d);
        if (kFault != Fault::kEarlyRelease && kFault != Fault::kNoEmptyArrive)
            ptx::mbarrier_arrive(&memory.empty[stage]);
        if (thread == 0 && kFault != Fault::kNoReadWait) ptx::bulk_wait_read<kStages - 1>();
        ptx::named_barrier_sync(1, 128);
        for (int r = 0; r < 4; ++r) memory.results[stage][(row + r / 2 * 8) * kColumns + column + r % 2] = d[r];
        if (kFault != Fault::kNoStoreFence) ptx::fence_async_shared();
        if (kFault != Fault::kNoStoreBarrier) ptx::named_barrier_sync(1, 128);
        if (thread == 0) {
            ptx::bulk_store(out + i * 64 * kColumns, memory.results[stage], kResultBytes);
            if (kFault != Fault::kNoStoreCommit) ptx::bulk_commit();
        }
    }
    if (thread == 0 && kFault != Fault::kNoFinalWait) ptx::bulk_wait<0>();
}

template <int kFault>
static cudaError_t launch_pipeline(int fault, const uint8_t* a, const uint8_t* b, float* out, int chunks) {
    if constexpr (kFault < static_cast<int>(Fault::kCount)) {
        if (fault != kFault) return launch_pipeline<kFault + 1>(fault, a, b, out, chunks);
        const LaunchConfig config{.grid = 1, .block = 256, .shared_bytes = sizeof(PipelineMemory)};
        return launch(pipeline<static_cast<Fault>(kFault)>, config, a, b, out, chunks);
    }
    return cudaErrorInvalidValue;
}

enum class ExchangeFault {
    kNone,
    kNoStartSync,   // a neighbour's barrier is used before it is initialised
    kNoRemoteWait,  // the neighbour's value is read before it has arrived
    kNoEndSync,     // a block leaves while another reads its memory
    kNoBlockSync,   // shared memory is read before the other warps have written it
    kNoCopyWait,    // cp.async read before it is complete
    kNoFlagWait,    // another cluster's result is read before its flag
    kNoWarpSync,    // lanes exchange through shared memory without a __syncwarp
    kCount,
};

// Clusters of two blocks of 64 threads pass a value around: copy in, reverse within the block, swap within the cluster,
// and add what the cluster before left in `carry` once its flag is set.
template <ExchangeFault kFault>
__global__ void __launch_bounds__(64) exchange(const uint32_t* in, uint32_t* out, uint32_t* carry, uint32_t* flags) {
    DYNAMIC_SHARED(raw);
    auto* own = reinterpret_cast<uint32_t*>(raw);             // 64
    auto* received = reinterpret_cast<uint32_t*>(raw) + 64;   // 64
    auto* reversed = reinterpret_cast<uint32_t*>(raw) + 128;  // 64
    auto* barrier = reinterpret_cast<uint64_t*>(raw + 768);
    const uint32_t peer = ptx::cluster_rank() ^ 1, i = threadIdx.x;
    if (i == 0) {
        ptx::mbarrier_init(barrier, 64);
        ptx::fence_mbarrier_init();
    }
    ptx::cp_async<4>(own + i, in + blockIdx.x * 64 + i);
    ptx::cp_async_commit();
    if (kFault != ExchangeFault::kNoCopyWait) ptx::cp_async_wait<0>();
    if (kFault != ExchangeFault::kNoBlockSync) __syncthreads();
    uint32_t value = own[63 - i];
    reversed[i] = value;
    if (kFault != ExchangeFault::kNoWarpSync) __syncwarp();
    value += reversed[i ^ 1];
    if (kFault != ExchangeFault::kNoStartSync) ptx::cluster_sync();
    *ptx::cluster_map(received + i, peer) = value;
    ptx::mbarrier_arrive_cluster(barrier, peer);
    if (kFault != ExchangeFault::kNoRemoteWait) ptx::mbarrier_wait_cluster(barrier, 0);
    uint32_t sum = received[i] + *ptx::cluster_map(own + i, peer);
    const uint32_t cluster = blockIdx.x / 2;
    if (cluster > 0) {
        if (i == 0 && kFault != ExchangeFault::kNoFlagWait) ptx::wait_at_least(flags + cluster - 1, 2);
        __syncthreads();
        sum += carry[(blockIdx.x - 2) * 64 + i];
    }
    carry[blockIdx.x * 64 + i] = sum;
    __syncthreads();
    if (i == 0) ptx::add_release(flags + cluster, 1);
    out[blockIdx.x * 64 + i] = sum;
    if (kFault != ExchangeFault::kNoEndSync) ptx::cluster_sync();
}

template <int kFault>
static cudaError_t launch_exchange(int fault, const uint32_t* in, uint32_t* out, uint32_t* carry, uint32_t* flags,
                                   int blocks) {
    if constexpr (kFault < static_cast<int>(ExchangeFault::kCount)) {
        if (fault != kFault) return launch_exchange<kFault + 1>(fault, in, out, carry, flags, blocks);
        const LaunchConfig config{.grid = dim3(blocks), .block = 64, .shared_bytes = 776, .cluster = 2};
        return launch(exchange<static_cast<ExchangeFault>(kFault)>, config, in, out, carry, flags);
    }
    return cudaErrorInvalidValue;
}

}  // namespace tokenspeed

using namespace tokenspeed;

extern "C" {
int self_test_pipeline(int fault, const uint8_t* a, const uint8_t* b, float* out, int chunks) {
    return launch_pipeline<0>(fault, a, b, out, chunks);
}
int self_test_exchange(int fault, const uint32_t* in, uint32_t* out, uint32_t* carry, uint32_t* flags, int blocks) {
    return launch_exchange<0>(fault, in, out, carry, flags, blocks);
}
}
