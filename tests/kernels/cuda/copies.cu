// Self-tests of what moves bytes beside the threads or between blocks: cp.async, bulk copies, DSMEM, mbarriers, flags
// and programmatic launches.
#include <launch.h>
#include <ptx.h>

namespace tokenspeed {

// in: 32 rows of 16 bytes; lane i copies its first `i % 5 * 4` bytes, zeros behind them. Rows 32..: 4- and 8-byte
// copies.
__global__ void __launch_bounds__(32) thread_copies(const uint8_t* in, uint8_t* out) {
    DYNAMIC_SHARED(raw);
    const uint32_t lane = threadIdx.x;
    ptx::cp_async<16>(raw + lane * 16, in + lane * 16, lane % 5 * 4);
    ptx::cp_async_commit();
    ptx::cp_async<4>(raw + 512 + lane * 16, in + lane * 16);
    ptx::cp_async<4>(raw + 512 + lane * 16 + 4, in + lane * 16 + 4, lane % 2 * 4);
    ptx::cp_async<8>(raw + 512 + lane * 16 + 8, in + lane * 16 + 8);
    ptx::cp_async_commit();
    ptx::cp_async_wait<1>();
    __syncwarp();
    for (int i = 0; i < 16; ++i) out[lane * 16 + i] = raw[lane * 16 + i];
    ptx::cp_async_wait<0>();
    __syncwarp();
    for (int i = 0; i < 16; ++i) out[512 + lane * 16 + i] = raw[512 + lane * 16 + i];
}

// cp.async completing on an mbarrier: 32 producers, the other warp reads.
__global__ void __launch_bounds__(64) thread_copies_with_barrier(const uint4* in, uint4* out) {
    DYNAMIC_SHARED(raw);
    auto* rows = reinterpret_cast<uint4*>(raw);
    auto* barrier = reinterpret_cast<uint64_t*>(raw + 512);
    if (threadIdx.x == 0) ptx::mbarrier_init(barrier, 32);
    __syncthreads();
    if (threadIdx.x < 32) {
        ptx::cp_async<16>(rows + threadIdx.x, in + threadIdx.x);
        ptx::cp_async_mbarrier_arrive(barrier);
    } else {
        ptx::mbarrier_wait(barrier, 0);
        out[threadIdx.x - 32] = rows[63 - threadIdx.x];
    }
    ptx::cp_async_wait<0>();
}

constexpr int kChunk = 256;  // bytes
constexpr int kStages = 2;

// A producer warp streams chunks through a ring of two stages; 64 consumers add 1 to each byte and a bulk store writes
// them.
__global__ void __launch_bounds__(96) bulk_ring(const uint8_t* in, uint8_t* out, int chunks) {
    DYNAMIC_SHARED(raw);
    uint8_t* results = raw + kStages * kChunk;
    auto* full = reinterpret_cast<uint64_t*>(raw + 2 * kStages * kChunk);
    auto* empty = full + kStages;
    if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
            ptx::mbarrier_init(full + stage, 1);
            ptx::mbarrier_init(empty + stage, 64);
        }
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    if (threadIdx.x >= 64) {
        if (threadIdx.x == 64) {
            for (int i = 0; i < chunks; ++i) {
                const int stage = i % kStages, parity = i / kStages & 1;
                ptx::mbarrier_wait(empty + stage, parity ^ 1);
                ptx::mbarrier_arrive_expect_tx(full + stage, kChunk);
                ptx::bulk_load(raw + stage * kChunk, in + i * kChunk, kChunk, full + stage);
            }
        }
        return;
    }
    for (int i = 0; i < chunks; ++i) {
        const int stage = i % kStages, parity = i / kStages & 1;
        ptx::mbarrier_wait(full + stage, parity);
        const uint32_t four = reinterpret_cast<const uint32_t*>(raw + stage * kChunk)[threadIdx.x];
        ptx::mbarrier_arrive(empty + stage);
        if (threadIdx.x == 0) ptx::bulk_wait_read<kStages - 1>();  // the result buffer of two chunks ago has been read
        ptx::named_barrier_sync(1, 64);
        reinterpret_cast<uint32_t*>(results + stage * kChunk)[threadIdx.x] = four + 0x01010101u;
        ptx::fence_async_shared();
        ptx::named_barrier_sync(1, 64);
        if (threadIdx.x == 0) {
            ptx::bulk_store(out + i * kChunk, results + stage * kChunk, kChunk);
            ptx::bulk_commit();
        }
    }
    if (threadIdx.x == 0) ptx::bulk_wait<0>();
}

// A cluster of two: block 0 multicasts 64 bytes to both, block 1 sends 64 bytes from its shared memory to block 0, each
// adds its rank to a cell of the other, and arrives there. Lanes also store a number each into the other block, on an
// mbarrier of its own; without the right number a lane leaves nothing.
__global__ void __launch_bounds__(32) cluster_copies(const uint32_t* in, uint32_t* out) {
    DYNAMIC_SHARED(raw);
    auto* words = reinterpret_cast<uint32_t*>(raw);  // 0..15 multicast, 16..31 received, 32..47 to send, 48 the cell
    auto* barriers = reinterpret_cast<uint64_t*>(raw + 256);
    auto* numbers = reinterpret_cast<float*>(raw + 320);
    const uint32_t rank = ptx::cluster_rank(), lane = threadIdx.x;
    if (lane == 0) {
        for (int i = 0; i < 4; ++i) ptx::mbarrier_init(barriers + i, i == 2 ? 2 : 1);
        ptx::fence_mbarrier_init();
        words[48] = 1000;
        ptx::mbarrier_arrive_expect_tx(barriers, 64);
        ptx::mbarrier_arrive_expect_tx(barriers + 3, 32 * sizeof(float));
    }
    if (lane < 16) words[32 + lane] = in[16 + lane] + rank;
    ptx::fence_async_shared();
    ptx::cluster_sync();
    ptx::store_async_cluster(numbers + lane, in[lane % 16] + lane * 0.5f + rank, barriers + 3, rank ^ 1);
    if (lane == 0) {
        if (rank == 0) {
            ptx::mbarrier_arrive_expect_tx(barriers + 1, 64);
            ptx::bulk_load_multicast(words, in, 64, barriers, 0b11);
        } else {
            ptx::bulk_copy_cluster(words + 16, words + 32, 64, barriers + 1, 0);
        }
        ptx::mbarrier_arrive_cluster_relaxed(barriers + 2, rank ^ 1);  // of no write: the other arrival says that
        *ptx::cluster_map(words + 48, rank ^ 1) += rank + 1;
        ptx::mbarrier_arrive_cluster(barriers + 2, rank ^ 1);
    }
    ptx::mbarrier_wait(barriers, 0);
    ptx::mbarrier_wait_cluster(barriers + 2, 0);
    ptx::mbarrier_wait_cluster(barriers + 3, 0);
    if (rank == 0) ptx::mbarrier_wait_cluster(barriers + 1, 0);
    uint32_t* to = out + rank * 48;
    if (lane < 16 && numbers[lane] == in[lane] + lane * 0.5f + (rank ^ 1)) {
        to[lane] = words[lane];
        to[16 + lane] = rank == 0 ? words[16 + lane] : ptx::cluster_size();
        to[32 + lane] = words[48];
    }
    ptx::cluster_sync();  // nobody leaves while a copy from its memory is under way
}

// A chain over co-resident blocks: block i waits for flag i, adds, hands on to i + 1; the last arriver writes the
// count.
__global__ void __launch_bounds__(32) flag_chain(uint32_t* flags, uint32_t* value, uint32_t* arrivals, uint32_t* last) {
    const uint32_t block = gridDim.x - 1 - blockIdx.x;  // the order in which blocks start is no order to rely on
    if (threadIdx.x != 0) return;
    ptx::wait_at_least_for(flags + block, 2, 3);  // which never comes
    if (block > 0) ptx::wait_at_least(flags + block, 1);
    *value = *value * 3 + block;
    if (block + 1 < gridDim.x) ptx::store_release(flags + block + 1, 1);
    ptx::add_release(arrivals + 1, 2);
    if (ptx::fetch_add_acq_rel(arrivals, 1) + 1 == gridDim.x) {
        ptx::wait_at_least(arrivals + 1, 2 * gridDim.x);
        *last = ptx::load_acquire(arrivals + 1) + *value;
    }
}

// Co-resident blocks tell each other by words that carry their flag: each takes a number from `taken`, stores four
// words of its own, and sums everybody's. `words` [blocks, 4] hold what other tags left.
__global__ void __launch_bounds__(32) tagged_words(uint64_t* words, uint32_t* taken, uint32_t* sums, uint32_t tag) {
    if (threadIdx.x != 0) return;
    const uint32_t mine = ptx::fetch_add_relaxed(taken, 1);
    for (uint32_t i = 0; i < 4; ++i) ptx::store_tagged(words + mine * 4 + i, mine * 10 + i, tag);
    uint32_t sum = 0;
    for (uint32_t other = 0; other < gridDim.x; ++other) {
        uint32_t values[4];
        ptx::wait_tagged(values, words + other * 4, tag);
        sum += values[0] + values[1] + values[2] + values[3];
    }
    sums[mine] = sum;
    ptx::add_relaxed(taken + 1, sum);
}

// Programmatic chain: each link reads what the one before wrote, after a part that does not depend on it.
__global__ void __launch_bounds__(64) chain_link(const uint32_t* weights, const uint32_t* in, uint32_t* out, int wait) {
    const uint32_t i = blockIdx.x * 64 + threadIdx.x;
    const uint32_t weight = weights[i];
    if (wait) ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    out[i] = in[i] * 5 + weight;
}

static cudaError_t launch_chain(const uint32_t* weights, uint32_t* buffers, int blocks, int links, bool wait) {
    const int n = blocks * 64;
    for (int link = 0; link < links; ++link) {
        const auto status = launch(chain_link, {.grid = dim3(blocks), .block = 64, .programmatic = link > 0}, weights,
                                   buffers + link * n, buffers + (link + 1) * n, wait);
        if (status != cudaSuccess) return status;
    }
    return cudaSuccess;
}

// Registers move from a producer warpgroup to two consumers (168 each at first); out[i] is what the thread has in the
// end.
__global__ void __launch_bounds__(384, 1) move_registers(int* out) {
    if (threadIdx.x < 128) {
        ptx::register_decrease<40>();
        out[threadIdx.x] = 40;
    } else {
        ptx::register_increase<232>();
        out[threadIdx.x] = 232;
    }
}

// Of 512 threads with 128 registers each, the last warpgroup gives up 88 and the first, which takes 80, may have to
// wait for each warp's share.
__global__ void __launch_bounds__(512, 1) share_registers(int* out) {
    if (threadIdx.x < 128) {
        ptx::register_increase<208>();
        out[threadIdx.x] = 208;
    } else if (threadIdx.x < 384) {
        out[threadIdx.x] = 128;
    } else {
        for (uint32_t i = 0; i < threadIdx.x / 32 % 4 * 4; ++i) __syncwarp();  // one share after the other
        ptx::register_decrease<40>();
        out[threadIdx.x] = 40;
    }
}

}  // namespace tokenspeed

using namespace tokenspeed;

extern "C" {
int self_test_thread_copies(const uint8_t* in, uint8_t* out) {
    return launch(thread_copies, {.grid = 1, .block = 32, .shared_bytes = 1024}, in, out);
}
int self_test_thread_copies_with_barrier(const uint4* in, uint4* out) {
    return launch(thread_copies_with_barrier, {.grid = 1, .block = 64, .shared_bytes = 520}, in, out);
}
int self_test_bulk_ring(const uint8_t* in, uint8_t* out, int chunks) {
    return launch(bulk_ring, {.grid = 1, .block = 96, .shared_bytes = 2 * kStages * kChunk + 32}, in, out, chunks);
}
int self_test_cluster_copies(const uint32_t* in, uint32_t* out) {
    return launch(cluster_copies, {.grid = 2, .block = 32, .shared_bytes = 448, .cluster = 2}, in, out);
}
int self_test_flag_chain(uint32_t* flags, uint32_t* value, uint32_t* arrivals, uint32_t* last, int blocks) {
    const LaunchConfig config{.grid = dim3(blocks), .block = 32};
    if (max_resident_blocks(flag_chain, config) < blocks) return cudaErrorCooperativeLaunchTooLarge;
    return launch(flag_chain, config, flags, value, arrivals, last);
}
int self_test_tagged_words(uint64_t* words, uint32_t* taken, uint32_t* sums, int blocks, int tag) {
    const LaunchConfig config{.grid = dim3(blocks), .block = 32};
    if (max_resident_blocks(tagged_words, config) < blocks) return cudaErrorCooperativeLaunchTooLarge;
    return launch(tagged_words, config, words, taken, sums, static_cast<uint32_t>(tag));
}
int self_test_chain(const uint32_t* weights, uint32_t* buffers, int blocks, int links, int wait) {
    return launch_chain(weights, buffers, blocks, links, wait != 0);
}
int self_test_share_registers(int* out) {
    return launch(share_registers, {.grid = 1, .block = 512}, out);
}
int self_test_move_registers(int* out) {
    return launch(move_registers, {.grid = 1, .block = 384}, out);
}
}
