// Named wrappers for the PTX that the kernels use: the only place, with ptx_tma.h and ptx_wgmma.h, where inline asm
// stands. csrc/emulator/ptx.h has the same names for the host compiler; kernels write `#include <ptx.h>` and the
// include path picks one.
//
// Conventions: pointers are generic pointers; what must lie in shared memory says so. Shared addresses (uint32_t) come
// from shared_address(). Sizes are bytes. Waits on mbarriers take the parity of the phase they wait for (0 first, then
// 1, 0, ...).
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// Dynamic shared memory of the block, aligned to 1024 bytes. The one way to shared memory.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(1024) uint8_t name[]

namespace tokenspeed::ptx {

// Cache policies: encodings of createpolicy.fractional with fraction 1.
enum class CachePolicy : uint64_t {
    kNormal = 0x1000000000000000ull,
    kEvictFirst = 0x12F0000000000000ull,
};

// ---- threads

__device__ __forceinline__ uint32_t shared_address(const void* shared) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}

// The same value, by a way that ptxas does not see through: not as a sum of which a part is in a uniform register. All
// lanes of the warp call it.
__device__ __forceinline__ uint32_t opaque(uint32_t value) {
    return __shfl_sync(0xffffffff, value, threadIdx.x % 32);
}

// Warp index in a one-dimensional block, made uniform across the warp for the compiler.
__device__ __forceinline__ uint32_t warp_id() {
    return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
}

// True in exactly one lane of a converged warp.
__device__ __forceinline__ bool elect_one() {
    uint32_t elected;
    asm volatile(
        "{\n.reg .pred p;\n"
        "elect.sync _|p, 0xffffffff;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(elected));
    return elected != 0;
}

// Barrier `id` (1..15; 0 is __syncthreads) over `threads` threads, a multiple of 32.
__device__ __forceinline__ void named_barrier_sync(uint32_t id, uint32_t threads) {
    asm volatile("barrier.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_barrier_arrive(uint32_t id, uint32_t threads) {
    asm volatile("barrier.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// Moves registers between the warpgroups of a block; every warp of the warpgroup executes it. N: 24..256, a multiple
// of 8.
template <int N>
__device__ __forceinline__ void register_decrease() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0);
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

template <int N>
__device__ __forceinline__ void register_increase() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0);
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

// ---- fences

// Makes generic writes to shared memory visible to the async proxy (TMA, bulk copies, wgmma). The writer fences, then
// synchronises with the thread that starts the copy or product.
__device__ __forceinline__ void fence_async_shared() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// The same for global memory.
__device__ __forceinline__ void fence_async_global() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// After mbarrier_init, by the initialising thread, before the barrier is used by the async proxy or by another block.
__device__ __forceinline__ void fence_mbarrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- mbarrier

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// One arrival that also announces `bytes` of copies to come in this phase.
__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// Announces bytes without arriving.
__device__ __forceinline__ void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}

// True when the phase of the given parity has completed. Does not wait.
__device__ __forceinline__ bool mbarrier_test(uint64_t* barrier, uint32_t parity) {
    uint32_t done;
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}\n"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
    return done != 0;
}

// Waits until the phase of the given parity has completed.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
        "@p bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// As mbarrier_wait, for a barrier on which other blocks of the cluster arrive: acquires at cluster scope.
__device__ __forceinline__ void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%0], %1;\n"
        "@p bra DONE;\n"
        "bra WAIT;\n"
        "DONE:\n}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// ---- cluster

__device__ __forceinline__ uint32_t cluster_rank() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
    uint32_t size;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}

__device__ __forceinline__ void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release;" ::: "memory");
}
// The same without a fence, which waits for all that the thread has stored: enough where it has but read what others
// will overwrite, and behind fence_mbarrier_init.
__device__ __forceinline__ void cluster_arrive_relaxed() {
    asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
}

__device__ __forceinline__ void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

// The same object in the shared memory of block `rank` of the cluster, as a generic pointer for ordinary loads and
// stores.
template <typename T>
__device__ __forceinline__ T* cluster_map(T* shared, uint32_t rank) {
    uint64_t mapped;
    asm volatile("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(shared), "r"(rank));
    return reinterpret_cast<T*>(mapped);
}

__device__ __forceinline__ uint32_t cluster_map_address(const void* shared, uint32_t rank) {
    uint32_t mapped;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(shared_address(shared)), "r"(rank));
    return mapped;
}

// Arrives on the barrier at the same place in block `rank`.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_map_address(barrier, rank))
        : "memory");
}

// The same without a fence, which costs hundreds of cycles: enough where the thread has but read what the other block
// will overwrite.
__device__ __forceinline__ void mbarrier_arrive_cluster_relaxed(uint64_t* barrier, uint32_t rank) {
    asm volatile(
        "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [%0];" ::"r"(cluster_map_address(barrier, rank))
        : "memory");
}

// Stores to the same place in block `rank` and completes the 4 bytes on the barrier at the same place there: no fence,
// no barrier of the cluster. Who waits for the barrier (mbarrier_wait_cluster) sees the value.
template <typename T>
__device__ __forceinline__ void store_async_cluster(T* shared, T value, uint64_t* barrier, uint32_t rank) {
    static_assert(sizeof(T) == 4);
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(
                     cluster_map_address(shared, rank)),
                 "r"(__builtin_bit_cast(uint32_t, value)), "r"(cluster_map_address(barrier, rank))
                 : "memory");
}

// ---- cp.async: 4, 8 or 16 bytes each

// Copies `source_bytes` (<= kBytes) from global to shared memory and fills the rest of kBytes with zeros. Both
// addresses are aligned to kBytes. Generic proxy: a wgmma or bulk store that reads the result needs
// fence_async_shared().
template <int kBytes = 16>
__device__ __forceinline__ void cp_async(void* shared, const void* global, uint32_t source_bytes = kBytes) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
    if constexpr (kBytes == 16) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                     "r"(source_bytes)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared_address(shared)), "l"(global),
                     "n"(kBytes), "r"(source_bytes)
                     : "memory");
    }
}

// 16 bytes that will not be read again soon: they are the first to leave L2. `shared` is opaque() or that and a
// constant: ptxas 13.0 encodes a cache policy beside a shared address with a part in a uniform register as what the
// card answers as illegal.
__device__ __forceinline__ void cp_async_evict_first(uint32_t shared, const void* global, uint32_t source_bytes) {
    asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, %3;" ::"r"(shared), "l"(global),
                 "r"(source_bytes), "l"(static_cast<uint64_t>(CachePolicy::kEvictFirst))
                 : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of the calling thread's committed groups are incomplete.
template <int kPending>
__device__ __forceinline__ void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Arrives on the barrier (an arrival counted at its initialisation) when all earlier cp.async of this thread are
// complete.
__device__ __forceinline__ void cp_async_mbarrier_arrive(uint64_t* barrier) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// ---- bulk copies: 16-byte aligned, a multiple of 16 bytes, async proxy

// Global to shared; completes `bytes` on the barrier.
__device__ __forceinline__ void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
            "r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(static_cast<uint64_t>(CachePolicy::kNormal))
        : "memory");
}

// Global to the same place in every block of `mask`; completes `bytes` on the barrier of each.
__device__ __forceinline__ void bulk_load_multicast(void* shared, const void* global, uint32_t bytes, uint64_t* barrier,
                                                    uint16_t mask) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint"
        " [%0], [%1], %2, [%3], %4, %5;" ::"r"(shared_address(shared)),
        "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(mask),
        "l"(static_cast<uint64_t>(CachePolicy::kNormal))
        : "memory");
}

// Shared memory of this block to `shared` in block `rank`; completes `bytes` on `barrier` there.
__device__ __forceinline__ void bulk_copy_cluster(void* shared, const void* source_shared, uint32_t bytes,
                                                  uint64_t* barrier, uint32_t rank) {
    asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     cluster_map_address(shared, rank)),
                 "r"(shared_address(source_shared)), "r"(bytes), "r"(cluster_map_address(barrier, rank))
                 : "memory");
}

// Shared to global, in the calling thread's current bulk group.
__device__ __forceinline__ void bulk_store(void* global, const void* shared, uint32_t bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(global),
                 "r"(shared_address(shared)), "r"(bytes), "l"(static_cast<uint64_t>(CachePolicy::kNormal))
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until at most `kPending` of this thread's bulk groups are incomplete: their writes are visible to this thread.
template <int kPending>
__device__ __forceinline__ void bulk_wait() {
    asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

// As bulk_wait, but only until their sources have been read, so that the shared memory may be reused.
template <int kPending>
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

template <CachePolicy kPolicy = CachePolicy::kNormal>
__device__ __forceinline__ void bulk_prefetch_l2(const void* global, uint32_t bytes) {
    if constexpr (kPolicy != CachePolicy::kNormal) {
        asm volatile("cp.async.bulk.prefetch.L2.global.L2::cache_hint [%0], %1, %2;" ::"l"(global), "r"(bytes),
                     "l"(static_cast<uint64_t>(kPolicy))
                     : "memory");
        return;
    }
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(global), "r"(bytes) : "memory");
}

// ---- programmatic dependent launch

// Waits until every grid this one depends on has finished and its writes are visible.
__device__ __forceinline__ void grid_dependency_wait() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}

// Lets the next grid start once every block has called this or has exited. Only after this grid's own wait.
__device__ __forceinline__ void grid_dependency_launch() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// ---- flags between blocks (gpu scope)

// This thread's writes before it reach the device before those after it.
__device__ __forceinline__ void fence_device() {
    asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* global) {
    uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(global) : "memory");
    return value;
}

__device__ __forceinline__ void store_release(uint32_t* global, uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}

__device__ __forceinline__ void add_release(uint32_t* global, uint32_t value) {
    asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}

// An addition that orders nothing: for a count that stands for no writes.
__device__ __forceinline__ void add_relaxed(uint32_t* global, uint32_t value) {
    asm volatile("red.relaxed.gpu.global.add.u32 [%0], %1;" ::"l"(global), "r"(value) : "memory");
}

// Returns the value before the addition.
__device__ __forceinline__ uint32_t fetch_add_acq_rel(uint32_t* global, uint32_t value) {
    uint32_t old;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(global), "r"(value) : "memory");
    return old;
}

// Spins until *flag >= value (unsigned). The grid must be co-resident with whoever sets the flag.
__device__ __forceinline__ void wait_at_least(const uint32_t* flag, uint32_t value) {
    while (load_acquire(flag) < value) {
    }
}

// Polls until *flag >= value, but so many times at most: a wait that spares time, and that nothing depends on.
__device__ __forceinline__ void wait_at_least_for(const uint32_t* flag, uint32_t value, int polls) {
#pragma unroll 1
    for (; polls > 0 && load_acquire(flag) < value; --polls) asm volatile("nanosleep.u32 100;");
}

// Returns the value before the addition; orders nothing.
__device__ __forceinline__ uint32_t fetch_add_relaxed(uint32_t* global, uint32_t value) {
    uint32_t old;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], %2;" : "=r"(old) : "l"(global), "r"(value) : "memory");
    return old;
}

// Words that carry their own flag: a value below, above it a tag that no earlier content of the word had. Whoever finds
// the tag has the value: without a fence, and one way through L2 instead of two.
__device__ __forceinline__ void store_tagged(uint64_t* global, uint32_t value, uint32_t tag) {
    const uint64_t word = static_cast<uint64_t>(tag) << 32 | value;
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(global), "l"(word) : "memory");
}

// Spins until kCount words, aligned to 16 bytes, have the tag. Who stores them must be running or done.
template <int kCount>
__device__ __forceinline__ void wait_tagged(uint32_t (&values)[kCount], const uint64_t* global, uint32_t tag) {
    static_assert(kCount % 2 == 0);
    for (bool complete = false; !complete;) {
        complete = true;
        uint64_t words[kCount];
#pragma unroll
        for (int i = 0; i < kCount; i += 2) {
            asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                         : "=l"(words[i]), "=l"(words[i + 1])
                         : "l"(global + i)
                         : "memory");
        }
#pragma unroll
        for (int i = 0; i < kCount; ++i) {
            values[i] = static_cast<uint32_t>(words[i]);
            complete = complete && static_cast<uint32_t>(words[i] >> 32) == tag;
        }
    }
}

// The same of pairs of words that lie apart: pair i, for i < count, at global + i step; the rest of `values` is left
// alone. What has come is not asked for again: much of it is old when the last of it is still on its way.
template <int kPairs>
__device__ __forceinline__ void wait_tagged_pairs(uint2 (&values)[kPairs], const uint64_t* global, int step, int count,
                                                  uint32_t tag) {
    uint64_t words[kPairs][2];
#pragma unroll
    for (int i = 0; i < kPairs; ++i) words[i][0] = words[i][1] = static_cast<uint64_t>(~tag) << 32;
    const auto is_there = [&](int i) {
        return static_cast<uint32_t>(words[i][0] >> 32) == tag && static_cast<uint32_t>(words[i][1] >> 32) == tag;
    };
    for (bool complete = false; !complete;) {
#pragma unroll
        for (int i = 0; i < kPairs; ++i) {
            if (i >= count || is_there(i)) continue;
            asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];"
                         : "=l"(words[i][0]), "=l"(words[i][1])
                         : "l"(global + i * step)
                         : "memory");
        }
        complete = true;
#pragma unroll
        for (int i = 0; i < kPairs; ++i) complete = complete && (i >= count || is_there(i));
    }
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
        if (i < count) values[i] = {static_cast<uint32_t>(words[i][0]), static_cast<uint32_t>(words[i][1])};
    }
}

// ---- tagged words between cards (system scope)

// What ends a wait for another card without its words: a word in host memory that is not zero any more, or a time.
struct Patience {
    const uint32_t* stop;
    uint64_t nanoseconds;
};

// Two words, aligned to 16 bytes, in any card's memory: each arrives whole, in any order.
__device__ __forceinline__ void store_tagged_system(uint64_t* global, uint32_t first, uint32_t second, uint32_t tag) {
    const uint64_t high = static_cast<uint64_t>(tag) << 32;
    asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(global), "l"(high | first), "l"(high | second)
                 : "memory");
}

// Whether both words have the tag; then the values are theirs.
__device__ __forceinline__ bool load_tagged_system(uint32_t (&values)[2], const uint64_t* global, uint32_t tag) {
    uint64_t first, second;
    asm volatile("ld.relaxed.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(global) : "memory");
    values[0] = static_cast<uint32_t>(first);
    values[1] = static_cast<uint32_t>(second);
    return static_cast<uint32_t>(first >> 32) == tag && static_cast<uint32_t>(second >> 32) == tag;
}

// Spins until both words have the tag; false where patience was over before. Who has polled a few times in vain sleeps
// between polls, so that tens of thousands of threads do not keep busy the memory into which the words are to come.
__device__ __forceinline__ bool wait_tagged_system(uint32_t (&values)[2], const uint64_t* global, uint32_t tag,
                                                   const Patience& patience) {
    constexpr uint32_t kEagerPolls = 6;
    constexpr uint32_t kPolls = 1024;  // between two looks at the rest, which takes a way to the host
    uint64_t start = 0;
    for (uint32_t polls = 1; !load_tagged_system(values, global, tag); ++polls) {
        if (polls > kEagerPolls) asm volatile("nanosleep.u32 100;");
        if (polls % kPolls != 0) continue;
        uint32_t stop;
        uint64_t now;
        asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(stop) : "l"(patience.stop) : "memory");
        asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
        start = start == 0 ? now : start;
        if (stop != 0 || now - start > patience.nanoseconds) return false;
    }
    return true;
}

// ---- 16-byte global memory access

// Through the read-only path: for data that nobody writes while the kernel runs, which is weights. What the kernel
// ahead writes is not: a programmatic kernel is there already when it does.
__device__ __forceinline__ uint4 load_16_read_only(const void* global) {
    uint4 v;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global));
    return v;
}

// Read once: not kept in L1, first to leave L2.
__device__ __forceinline__ uint4 load_16_streaming(const void* global) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::cache_hint.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global), "l"(static_cast<uint64_t>(CachePolicy::kEvictFirst))
                 : "memory");
    return v;
}

// Not kept in L1, kept in L2; sees writes of this kernel's own earlier stores and of other blocks after an acquire.
__device__ __forceinline__ uint4 load_16_no_allocate(const void* global) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(global)
                 : "memory");
    return v;
}

// The same where `wanted`, else zeros. No branch, so that several are in flight at once.
__device__ __forceinline__ uint4 load_16_no_allocate_if(bool wanted, const void* global) {
    uint4 v;
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;"
        " @p ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];}"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(global), "r"(static_cast<uint32_t>(wanted))
        : "memory");
    return v;
}

// In one piece: the compiler may store a uint4 whose words it holds apart as four.
__device__ __forceinline__ void store_16(void* global, uint4 v) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(global), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_8(void* global, uint2 v) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(global), "r"(v.x), "r"(v.y) : "memory");
}

// Written once and not read again soon.
__device__ __forceinline__ void store_16_streaming(void* global, uint4 v) {
    asm volatile("st.global.L1::no_allocate.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(global), "r"(v.x),
                 "r"(v.y), "r"(v.z), "r"(v.w), "l"(static_cast<uint64_t>(CachePolicy::kEvictFirst))
                 : "memory");
}

__device__ __forceinline__ void prefetch_l2(const void* global) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(global) : "memory");
}

// ---- fragments: ldmatrix, stmatrix, mma

// Matrix j is 8 rows of 16 bytes; lane 8j + i holds the shared address of row i of matrix j. Lane l receives, from
// matrix j, elements (row l/4, columns 2(l%4), 2(l%4)+1), or of the transposed matrix.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared)
                 : "memory");
}

// The inverse of ldmatrix.
__device__ __forceinline__ void stmatrix_x4(uint32_t shared, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(r[0]), "r"(r[1]),
                 "r"(r[2]), "r"(r[3])
                 : "memory");
}

__device__ __forceinline__ void stmatrix_x4_transposed(uint32_t shared, const uint32_t (&r)[4]) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared), "r"(r[0]),
                 "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

// d[16 x 8] += a[16 x 16] b[16 x 8], fp32 accumulation; T is __nv_bfloat16 or __half. With g = lane/4, t = lane%4, a
// register holding two elements: a0 (g, 2t), a1 (g+8, 2t), a2 (g, 2t+8), a3 (g+8, 2t+8) as (row, first k); b0 (k = 2t,
// n = g), b1 (k = 2t+8, n = g); d0, d1 (g, 2t), (g, 2t+1); d2, d3 (g+8, 2t), (g+8, 2t+1) as (row, column).
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(sizeof(T) == 2);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// ---- arithmetic

// Four e4m3, the first in the lowest byte, as two registers of two fp16 of the same values.
__device__ __forceinline__ void unpack_e4m3(uint32_t four, uint32_t& first, uint32_t& second) {
    asm("{\n.reg .b16 low, high;\n"
        "mov.b32 {low, high}, %2;\n"
        "cvt.rn.f16x2.e4m3x2 %0, low;\n"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n}\n"
        : "=r"(first), "=r"(second)
        : "r"(four));
}

// Two floats as fp16, `low` in the lower half; what is too large becomes the largest fp16 number, not infinity.
__device__ __forceinline__ uint32_t pack_half_saturating(float low, float high) {
    uint32_t both;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

// Approximate units: 2 ulp or better on normal inputs; see the PTX manual for the edges.
__device__ __forceinline__ float exp2_approximate(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float reciprocal_approximate(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

}  // namespace tokenspeed::ptx
