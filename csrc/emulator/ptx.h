// csrc/kernels/ptx.h for the host compiler: the same names, carried out by the emulated device. See there for what each
// does.
#pragma once
#include "api.h"
#include "intrinsics.h"

#define DYNAMIC_SHARED(name) uint8_t* name = ::tokenspeed::emulator::dynamic_shared()

namespace tokenspeed::ptx {

enum class CachePolicy : uint64_t { kNormal, kEvictFirst };

// ---- threads

inline uint32_t shared_address(const void* shared) {
    return emulator::shared_address_of(shared);
}
inline uint32_t opaque(uint32_t value) {
    return value;
}
inline uint32_t warp_id() {
    return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0);
}
inline bool elect_one() {
    __syncwarp();
    return emulator::coordinates.lane == 0;
}
inline void named_barrier_sync(uint32_t id, uint32_t threads) {
    emulator::block_barrier(id, threads, true);
}
inline void named_barrier_arrive(uint32_t id, uint32_t threads) {
    emulator::block_barrier(id, threads, false);
}

template <int N>
void register_decrease() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0);
    emulator::set_registers(N, false);
}
template <int N>
void register_increase() {
    static_assert(N >= 24 && N <= 256 && N % 8 == 0);
    emulator::set_registers(N, true);
}

// ---- fences

inline void fence_async_shared() {
    emulator::fence_async_shared();
}
inline void fence_async_global() {}  // global memory has one view here
inline void fence_mbarrier_init() {
    emulator::mbarrier_fence();
}

// ---- mbarrier

inline void mbarrier_init(uint64_t* barrier, uint32_t arrivals) {
    emulator::mbarrier_initialise(shared_address(barrier), arrivals);
}
inline void mbarrier_arrive(uint64_t* barrier) {
    emulator::mbarrier_update(shared_address(barrier), 1, 0);
}
inline void mbarrier_arrive_expect_tx(uint64_t* barrier, uint32_t bytes) {
    emulator::mbarrier_update(shared_address(barrier), 1, bytes);
}
inline void mbarrier_expect_tx(uint64_t* barrier, uint32_t bytes) {
    emulator::mbarrier_update(shared_address(barrier), 0, bytes);
}
inline bool mbarrier_test(uint64_t* barrier, uint32_t parity) {
    return emulator::mbarrier_test(shared_address(barrier), parity);
}
inline void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    emulator::mbarrier_wait(shared_address(barrier), parity);
}
inline void mbarrier_wait_cluster(uint64_t* barrier, uint32_t parity) {
    mbarrier_wait(barrier, parity);
}

// ---- cluster

inline uint32_t cluster_rank() {
    return emulator::cluster_rank();
}
inline uint32_t cluster_size() {
    return emulator::cluster_size();
}
inline void cluster_arrive() {
    emulator::cluster_barrier_arrive();
}
inline void cluster_arrive_relaxed() {
    emulator::cluster_barrier_arrive();
}
inline void cluster_wait() {
    emulator::cluster_barrier_wait();
}
inline void cluster_sync() {
    cluster_arrive();
    cluster_wait();
}

inline uint32_t cluster_map_address(const void* shared, uint32_t rank) {
    return emulator::map_shared_address(shared, rank);
}
template <typename T>
T* cluster_map(T* shared, uint32_t rank) {
    return static_cast<T*>(emulator::map_shared(shared, rank));
}
inline void mbarrier_arrive_cluster(uint64_t* barrier, uint32_t rank) {
    emulator::mbarrier_update(cluster_map_address(barrier, rank), 1, 0);
}
inline void mbarrier_arrive_cluster_relaxed(uint64_t* barrier, uint32_t rank) {
    emulator::mbarrier_update(cluster_map_address(barrier, rank), 1, 0);
}
template <typename T>
void store_async_cluster(T* shared, T value, uint64_t* barrier, uint32_t rank) {
    emulator::store_async_cluster(cluster_map_address(shared, rank), __builtin_bit_cast(uint32_t, value),
                                  cluster_map_address(barrier, rank));
}

// ---- cp.async

template <int kBytes = 16>
void cp_async(void* shared, const void* global, uint32_t source_bytes = kBytes) {
    static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
    emulator::cp_async(shared_address(shared), global, kBytes, source_bytes);
}
inline void cp_async_evict_first(uint32_t shared, const void* global, uint32_t source_bytes) {
    emulator::cp_async(shared, global, 16, source_bytes);
}
inline void cp_async_commit() {
    emulator::cp_async_commit();
}
template <int kPending>
void cp_async_wait() {
    emulator::cp_async_wait(kPending);
}
inline void cp_async_mbarrier_arrive(uint64_t* barrier) {
    emulator::cp_async_mbarrier_arrive(shared_address(barrier));
}

// ---- bulk copies

inline void bulk_load(void* shared, const void* global, uint32_t bytes, uint64_t* barrier) {
    emulator::bulk_load(shared_address(shared), global, bytes, shared_address(barrier), 0);
}
inline void bulk_load_multicast(void* shared, const void* global, uint32_t bytes, uint64_t* barrier, uint16_t mask) {
    emulator::bulk_load(shared_address(shared), global, bytes, shared_address(barrier), mask);
}
inline void bulk_copy_cluster(void* shared, const void* source_shared, uint32_t bytes, uint64_t* barrier,
                              uint32_t rank) {
    emulator::bulk_copy_cluster(cluster_map_address(shared, rank), shared_address(source_shared), bytes,
                                cluster_map_address(barrier, rank));
}
inline void bulk_store(void* global, const void* shared, uint32_t bytes) {
    emulator::bulk_store(global, shared_address(shared), bytes);
}
inline void bulk_commit() {
    emulator::bulk_commit();
}
template <int kPending>
void bulk_wait() {
    emulator::bulk_wait(kPending, false);
}
template <int kPending>
void bulk_wait_read() {
    emulator::bulk_wait(kPending, true);
}
template <CachePolicy kPolicy = CachePolicy::kNormal>
void bulk_prefetch_l2(const void* global, uint32_t bytes) {
    emulator::bulk_prefetch(global, bytes);
}

// ---- programmatic dependent launch

inline void grid_dependency_wait() {
    emulator::wait_for_grid();
}
inline void grid_dependency_launch() {
    emulator::trigger_grid();
}

// ---- flags between blocks

inline void fence_device() {}
inline uint32_t load_acquire(const uint32_t* global) {
    emulator::pause();
    return *global;
}
inline void store_release(uint32_t* global, uint32_t value) {
    *global = value;
    emulator::pause();
}
inline void add_release(uint32_t* global, uint32_t value) {
    *global += value;
    emulator::pause();
}
inline void add_relaxed(uint32_t* global, uint32_t value) {
    add_release(global, value);
}
inline uint32_t fetch_add_acq_rel(uint32_t* global, uint32_t value) {
    emulator::pause();
    const uint32_t old = *global;
    *global += value;
    return old;
}
inline void wait_at_least(const uint32_t* flag, uint32_t value) {
    emulator::wait_for_flag(flag, value, false);
}
inline void wait_at_least_for(const uint32_t* flag, uint32_t value, int polls) {
    for (; polls > 0 && load_acquire(flag) < value; --polls) {
    }
}
inline uint32_t fetch_add_relaxed(uint32_t* global, uint32_t value) {
    return fetch_add_acq_rel(global, value);
}
inline void store_tagged(uint64_t* global, uint32_t value, uint32_t tag) {
    emulator::check_aligned(global, 8);
    *global = static_cast<uint64_t>(tag) << 32 | value;
    emulator::pause();
}
template <int kCount>
void wait_tagged(uint32_t (&values)[kCount], const uint64_t* global, uint32_t tag) {
    static_assert(kCount % 2 == 0);
    emulator::check_aligned(global, 16);
    for (int i = 0; i < kCount; ++i) {
        emulator::wait_for_flag(reinterpret_cast<const uint32_t*>(global + i) + 1, tag, true);
        values[i] = static_cast<uint32_t>(global[i]);
    }
}

template <int kPairs>
void wait_tagged_pairs(uint2 (&values)[kPairs], const uint64_t* global, int step, int count, uint32_t tag) {
    for (int i = 0; i < kPairs && i < count; ++i) {
        uint32_t pair[2];
        wait_tagged(pair, global + i * step, tag);
        values[i] = {pair[0], pair[1]};
    }
}

// ---- tagged words between cards

struct Patience {
    const uint32_t* stop;
    uint64_t nanoseconds;
};

inline void store_tagged_system(uint64_t* global, uint32_t first, uint32_t second, uint32_t tag) {
    emulator::check_aligned(global, 16);
    const uint64_t high = static_cast<uint64_t>(tag) << 32;
    emulator::store_to_peer(global, high | first);
    emulator::store_to_peer(global + 1, high | second);
}
inline bool load_tagged_system(uint32_t (&values)[2], const uint64_t* global, uint32_t tag) {
    emulator::check_aligned(global, 16);
    emulator::pause();
    for (int i = 0; i < 2; ++i) values[i] = static_cast<uint32_t>(global[i]);
    return global[0] >> 32 == tag && global[1] >> 32 == tag;
}
inline bool wait_tagged_system(uint32_t (&values)[2], const uint64_t* global, uint32_t tag, const Patience& patience) {
    if (!emulator::wait_for_peer(global, tag, patience.stop)) return false;
    for (int i = 0; i < 2; ++i) values[i] = static_cast<uint32_t>(global[i]);
    return true;
}

// ---- 16-byte global memory access

inline uint4 load_16_read_only(const void* global) {
    emulator::check_aligned(global, 16);
    return *static_cast<const uint4*>(global);
}
inline uint4 load_16_streaming(const void* global) {
    return load_16_read_only(global);
}
inline uint4 load_16_no_allocate(const void* global) {
    return load_16_read_only(global);
}
inline uint4 load_16_no_allocate_if(bool wanted, const void* global) {
    return wanted ? load_16_no_allocate(global) : uint4{};
}
inline void store_16(void* global, uint4 value) {
    emulator::check_aligned(global, 16);
    *static_cast<uint4*>(global) = value;
}
inline void store_8(void* global, uint2 value) {
    emulator::check_aligned(global, 8);
    *static_cast<uint2*>(global) = value;
}
inline void store_16_streaming(void* global, uint4 value) {
    emulator::check_aligned(global, 16);
    *static_cast<uint4*>(global) = value;
}
inline void prefetch_l2(const void*) {}

// ---- fragments

inline void ldmatrix_x4(uint32_t (&r)[4], uint32_t shared) {
    emulator::load_matrices(r, 4, shared, false);
}
inline void ldmatrix_x4_transposed(uint32_t (&r)[4], uint32_t shared) {
    emulator::load_matrices(r, 4, shared, true);
}
inline void stmatrix_x4(uint32_t shared, const uint32_t (&r)[4]) {
    emulator::store_matrices(r, 4, shared, false);
}
inline void stmatrix_x4_transposed(uint32_t shared, const uint32_t (&r)[4]) {
    emulator::store_matrices(r, 4, shared, true);
}
template <typename T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    static_assert(sizeof(T) == 2);
    emulator::multiply_fragments(d, a, b0, b1, std::is_same_v<T, __nv_bfloat16>);
}

// ---- arithmetic

inline void unpack_e4m3(uint32_t four, uint32_t& first, uint32_t& second) {
    const auto widen = [](uint32_t pair) {
        const auto both = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(pair), __NV_E4M3);
        return static_cast<uint32_t>(both.y) << 16 | both.x;
    };
    first = widen(four & 0xffff);
    second = widen(four >> 16);
}

inline uint32_t pack_half_saturating(float low, float high) {
    const auto saturated = [](float x) { return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x; };
    const __half2 both = __floats2half2_rn(saturated(low), saturated(high));
    return *reinterpret_cast<const uint32_t*>(&both);
}

inline float exp2_approximate(float x) {
    return std::exp2(x);
}
inline float reciprocal_approximate(float x) {
    return 1.0f / x;
}
}  // namespace tokenspeed::ptx
