// The one way to start a kernel: grid, block, dynamic shared memory, cluster and programmatic launch in one call.
// csrc/emulator/launch.h has the same names for the host compiler.
#pragma once
#include <cuda_runtime.h>
#include <launch_config.h>

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

template <typename... Parameters>
cudaError_t set_limits(void (*kernel)(Parameters...), const LaunchConfig& config) {
    const auto* function = reinterpret_cast<const void*>(kernel);
    if (config.shared_bytes > 48 * 1024) {
        const auto status = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                 static_cast<int>(config.shared_bytes));
        if (status != cudaSuccess) return status;
    }
    if (config.cluster.x * config.cluster.y * config.cluster.z > 8) {
        return cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    }
    return cudaSuccess;
}

}  // namespace detail

// Starts `kernel` on the stream; never synchronises. An empty grid is a success that launches nothing.
template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments));
    if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return cudaSuccess;
    const auto status = detail::set_limits(kernel, config);
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
    if (detail::set_limits(kernel, config) != cudaSuccess) return 0;
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
