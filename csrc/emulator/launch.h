// csrc/kernels/launch.h for the host compiler: the same names; a launch runs on the emulated device.
#pragma once
#include <cuda_runtime.h>
#include <launch_config.h>

#include <functional>
#include <tuple>

namespace tokenspeed {

namespace emulator {
cudaError_t submit(const LaunchConfig& config, const void* kernel, std::function<void()> body);
int resident_blocks(const LaunchConfig& config);
int multiprocessors();
const char* describe(cudaError_t status);
}  // namespace emulator

template <typename... Parameters, typename... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchConfig& config, Arguments&&... arguments) {
    static_assert(sizeof...(Parameters) == sizeof...(Arguments));
    if (config.grid.x == 0 || config.grid.y == 0 || config.grid.z == 0) return cudaSuccess;
    // Every thread gets its own copy of the parameters, as on the device.
    return emulator::submit(config, reinterpret_cast<const void*>(kernel),
                            [kernel, parameters = std::tuple<Parameters...>(static_cast<Parameters>(arguments)...)] {
                                std::apply(kernel, parameters);
                            });
}

inline int multiprocessor_count() {
    return emulator::multiprocessors();
}

template <typename... Parameters>
int max_resident_blocks(void (*)(Parameters...), const LaunchConfig& config) {
    return emulator::resident_blocks(config);
}

inline const char* describe(cudaError_t status) {
    return emulator::describe(status);
}

}  // namespace tokenspeed
