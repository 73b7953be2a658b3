// The one way to start a kernel: grid, block, dynamic shared memory, cluster and programmatic launch in one call.
// csrc/emulator/launch.h has the same names for the host compiler.
#pragma once
#include <cuda_runtime.h>
#include <launch_config.h>

#include <mutex>
#include <set>
#include <utility>

namespace tokenspeed {

namespace detail {

// Attributes must outlive the launch call, so they live with the config.
struct NativeConfig {
    cudaLaunchConfig_t config{};
    cudaLaunchAttribute attributes[2]{};

    explicit NativeConfig(const LaunchConfig& wanted) {
        config.gridDim = wanted.grid;
        config.blockDim = wanted.block;
        config.dynamicSmemBytes = wanted.shared_bytes;
        config.stream = wanted.stream;
        config.attrs = attributes;
        if (wanted.cluster.x * wanted.cluster.y * wanted.cluster.z > 1) {
            auto& attribute = attributes[config.numAttrs++];
            attribute.id = cudaLaunchAttributeClusterDimension;
            attribute.val.clusterDim.x = wanted.cluster.x;
            attribute.val.clusterDim.y = wanted.cluster.y;
            attribute.val.clusterDim.z = wanted.cluster.z;
        }
        if (wanted.programmatic) {
            auto& attribute = attributes[config.numAttrs++];
            attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
            attribute.val.programmaticStreamSerializationAllowed = 1;
        }
    }
    NativeConfig(const NativeConfig&) = delete;
    NativeConfig& operator=(const NativeConfig&) = delete;
};

// Lets `function` use all the shared memory of a block and clusters of sixteen, once per device: a limit that followed
// each call's size would be another thread's between this one's setting and its launch.
inline cudaError_t raise_limits(const void* function) {
    static std::mutex mutex;
    static std::set<std::pair<int, const void*>> raised;
    int device = 0, most = 0;
    auto status = cudaGetDevice(&device);
    if (status != cudaSuccess) return status;
    const std::lock_guard lock(mutex);
    if (raised.contains({device, function})) return cudaSuccess;
    cudaFuncAttributes attributes{};
    status = cudaFuncGetAttributes(&attributes, function);
    if (status != cudaSuccess) return status;
    status = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (status != cudaSuccess) return status;
    status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  most - static_cast<int>(attributes.sharedSizeBytes));
    if (status != cudaSuccess) return status;
    status = cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (status == cudaSuccess) raised.insert({device, function});
    return status;
}

}  // namespace detail

// Starts `kernel` on the stream; never synchronises. An empty grid is a success that launches nothing.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments));
    if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return cudaSuccess;
    const auto status = detail::raise_limits(reinterpret_cast<const void*>(kernel));
    if (status != cudaSuccess) return status;
    const detail::NativeConfig native(config);
    return cudaLaunchKernelEx(&native.config, kernel, static_cast<Parameters>(arguments)...);
}

// Streaming multiprocessors of the current device.
inline int multiprocessor_count() {
    int device = 0, count = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    if (cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) return 0;
    return count;
}

// Blocks of `kernel` that the whole device holds at once: the largest grid that may wait on its own flags.
template <typename... Parameters>
int max_resident_blocks(void (*kernel)(Parameters...), const LaunchConfig& config) {
    if (detail::raise_limits(reinterpret_cast<const void*>(kernel)) != cudaSuccess) return 0;
    const int cluster = static_cast<int>(config.cluster.x * config.cluster.y * config.cluster.z);
    int count = 0;
    if (cluster > 1) {
        const detail::NativeConfig native(config);
        const auto* function = reinterpret_cast<const void*>(kernel);
        return cudaOccupancyMaxActiveClusters(&count, function, &native.config) == cudaSuccess ? count * cluster : 0;
    }
    const int threads = static_cast<int>(config.block.x * config.block.y * config.block.z);
    if (cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, kernel, threads, config.shared_bytes) != cudaSuccess)
        return 0;
    return count * multiprocessor_count();
}

// What a status returned by launch() means, for an error message.
inline const char* describe(cudaError_t status) {
    return cudaGetErrorString(status);
}

}  // namespace tokenspeed
