// How a kernel is started; shared by both versions of launch.h.
#pragma once
#include <cuda_runtime.h>

#include <cstddef>

namespace tokenspeed {

constexpr int kSharedLimit = 227 * 1024;  // bytes of shared memory that a block may have

struct LaunchConfig {
    dim3 grid;
    dim3 block;
    size_t shared_bytes = 0;  // dynamic shared memory per block, at most kSharedLimit
    cudaStream_t stream = nullptr;
    dim3 cluster = {1, 1, 1};  // blocks per cluster; each divides the grid
    bool programmatic =
        false;  // may start before the grid ahead of it on the stream ends: see ptx::grid_dependency_wait
    // It waits for flags that the grid ahead sets, before its own wait: the emulator starts it only once each block
    // there has let it, as a device does.
    bool takes_flags = false;
};

}  // namespace tokenspeed
