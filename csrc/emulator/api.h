// What the wrappers of ptx.h ask of the emulated device, in plain types: kernels do not see how it works. Shared
// addresses are offsets into the block's shared memory, with the rank + 1 of another block of the cluster above bit 24.
#pragma once
#include <cstddef>
#include <cstdint>

namespace tokenspeed::emulator {

// ---- the calling thread's place
uint8_t* dynamic_shared();
uint32_t shared_address_of(const void* p);
uint32_t cluster_rank();
uint32_t cluster_size();
uint32_t map_shared_address(const void* shared, uint32_t rank);
void* map_shared(const void* shared, uint32_t rank);

// ---- waiting
constexpr uint32_t kAllLiveThreads = UINT32_MAX;  // __syncthreads: whoever has not exited
void block_barrier(uint32_t id, uint32_t threads, bool wait);
void cluster_barrier_arrive();
void cluster_barrier_wait();
void pause();  // lets other threads run
void wait_for_flag(const uint32_t* flag, uint32_t value, bool exactly);
void store_to_peer(uint64_t* global, uint64_t word);  // arrives when it likes, at the grid's end at the latest
// Until both words have the tag in their upper half. False once *stop is set, or where otherwise nothing could go on:
// that is when time passes here.
bool wait_for_peer(const uint64_t* words, uint32_t tag, const uint32_t* stop);
void wait_for_grid();
void trigger_grid();
void set_registers(int count, bool increase);

// ---- mbarrier, by shared address
void mbarrier_initialise(uint32_t barrier, uint32_t arrivals);
void mbarrier_fence();  // the block's initialised barriers are now visible to the async proxy and to the cluster
void mbarrier_update(uint32_t barrier, int arrivals, uint32_t expected_bytes);
bool mbarrier_test(uint32_t barrier, uint32_t parity);
void mbarrier_wait(uint32_t barrier, uint32_t parity);

// ---- cp.async (generic proxy)
void cp_async(uint32_t shared, const void* global, uint32_t bytes, uint32_t source_bytes);
void cp_async_commit();
void cp_async_wait(int pending);
void cp_async_mbarrier_arrive(uint32_t barrier);

// ---- bulk copies (async proxy)
// To shared memory; `mask` names the blocks of the cluster that receive it, 0 the own block only.
void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, uint16_t mask);
void bulk_copy_cluster(uint32_t shared, uint32_t source, uint32_t bytes, uint32_t barrier);
void store_async_cluster(uint32_t shared, uint32_t value, uint32_t barrier);
void bulk_store(void* global, uint32_t shared, uint32_t bytes);
void bulk_prefetch(const void* global, uint32_t bytes);
void bulk_commit();
void bulk_wait(int pending, bool reads_only);
void fence_async_shared();  // the async proxy now sees what the threads wrote

// ---- fragments
void load_matrices(uint32_t* registers, int count, uint32_t shared, bool transposed);
void store_matrices(const uint32_t* registers, int count, uint32_t shared, bool transposed);
void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16);
void check_aligned(const void* global, size_t alignment);

// ---- wgmma: m64nNk16 with fp32 accumulators
enum class Element : uint8_t { kF16, kBf16, kE4m3 };

struct Product {
    int columns = 0;  // N
    Element element = Element::kF16;
    bool a_in_registers = false;
    bool transpose_a = false, transpose_b = false;  // MN-major in shared memory
    bool accumulate = true;
    uint64_t a = 0, b = 0;  // matrix descriptors
    bool operator==(const Product&) const = default;
};
void product_issue(const Product& product, float* accumulator, const uint32_t* a);
void product_fence();
void product_commit();
void product_wait(int pending);

}  // namespace tokenspeed::emulator
