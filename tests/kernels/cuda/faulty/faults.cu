// Kernels that do what no kernel may do: the emulated device must say so, with the place. Not for a card.
#include <launch.h>
#include <ptx.h>

namespace tokenspeed {

__global__ void __launch_bounds__(64) misbehave(int kind, uint32_t* global) {
    DYNAMIC_SHARED(raw);
    auto* barrier = reinterpret_cast<uint64_t*>(raw + 1024);
    const uint32_t i = threadIdx.x;
    if (i == 0 && kind != 0) {
        ptx::mbarrier_init(barrier, 1);
        ptx::fence_mbarrier_init();
    }
    __syncthreads();
    switch (kind) {
        case 0:  // a barrier nobody initialised
            if (i == 0) ptx::mbarrier_arrive(barrier);
            break;
        case 1:  // a wait that nothing will end
            if (i >= 32) ptx::mbarrier_wait(barrier, 0);
            break;
        case 2:  // a barrier that one warp skips
            if (i < 32) ptx::named_barrier_sync(3, 64);
            break;
        case 3:  // more arrivals than the phase has
            if (i == 0) {
                ptx::mbarrier_arrive_expect_tx(barrier, 16);
                ptx::mbarrier_arrive(barrier);
            }
            break;
        case 4:  // a shuffle that half of its lanes never reach
            if (i < 16) global[i] = __shfl_xor_sync(0xffffffffu, i, 1);
            break;
        case 5:  // a copy that is not aligned to 16 bytes
            if (i == 0) ptx::bulk_load(raw + 8, global, 16, barrier);
            break;
        case 6:  // a copy past the end of shared memory
            if (i == 0) ptx::bulk_load(raw + 1024, global, 1024, barrier);
            break;
        case 7:  // a write just past the end of shared memory
            if (i == 5) raw[1032] = 1;
            break;
        case 8:  // a write far past the end
            if (i == 5) raw[64 * 1024] = 1;
            break;
        case 9:  // an illegal global address
            if (i == 7) *reinterpret_cast<uint32_t*>(uintptr_t{16}) = 1;
            break;
        case 10:  // a block that leaves with a copy under way
            if (i == 0) {
                ptx::mbarrier_arrive_expect_tx(barrier, 16);
                ptx::bulk_load(raw, global, 16, barrier);
            }
            break;
        case 11:  // a flag that nobody sets
            if (i == 0) ptx::wait_at_least(global, 5);
            break;
        case 12:  // a barrier initialised twice
            if (i == 0) ptx::mbarrier_init(barrier, 1);
            break;
        case 13:  // a loop that tests for what never comes
            if (i == 0) {
                for (;;) {
                    if (ptx::mbarrier_test(barrier, 0)) break;
                }
            }
            break;
        default:
            break;
    }
}

}  // namespace tokenspeed

using namespace tokenspeed;

extern "C" {
int self_test_misbehave(int kind, uint32_t* global) {
    return launch(misbehave, {.grid = 1, .block = 64, .shared_bytes = 1032}, kind, global);
}
// Shared memory as a kernel finds it: the launch itself is legal.
int self_test_too_much_shared_memory(uint32_t* global) {
    return launch(misbehave, {.grid = 1, .block = 64, .shared_bytes = 228 * 1024}, -1, global);
}
}
