// launch() of csrc/kernels/launch.h on a runtime of pretence that keeps to the real one's rule: a launch with more
// dynamic shared memory than the function's limit at that moment is refused. Threads launch the same functions with
// different sizes; prints the failures and how often a limit was set.
#include <launch.h>

#include <atomic>
#include <cstdio>
#include <map>
#include <thread>
#include <vector>

namespace {

constexpr int kBlockLimit = 227 * 1024, kStatic = 512;
std::mutex mutex;
std::map<const void*, int> limits;
std::atomic<int> attributes_set{0}, launches{0};

}  // namespace

extern "C" {

cudaError_t cudaGetDevice(int* device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMaxSharedMemoryPerBlockOptin ? kBlockLimit : 132;
    return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
    attributes->sharedSizeBytes = kStatic;
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
    ++attributes_set;
    if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
    if (value + kStatic > kBlockLimit) return cudaErrorInvalidValue;
    const std::lock_guard lock(mutex);
    limits[function] = value;
    return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void**) {
    ++launches;
    std::this_thread::yield();
    const std::lock_guard lock(mutex);
    const int limit = limits.contains(function) ? limits[function] : 48 * 1024;
    return static_cast<int>(config->dynamicSmemBytes) <= limit ? cudaSuccess : cudaErrorInvalidValue;
}
cudaError_t cudaOccupancyMaxActiveClusters(int*, const void*, const cudaLaunchConfig_t*) {
    return cudaErrorNotSupported;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int*, const void*, int, size_t) {
    return cudaErrorNotSupported;
}
const char* cudaGetErrorString(cudaError_t) {
    return "";
}

}  // extern "C"

namespace {

void first(int) {}
void second(int) {}

}  // namespace

int main() {
    std::atomic<int> failures{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
        threads.emplace_back([&, t] {
            for (int i = 0; i < 500; ++i) {
                const size_t bytes = (i + t) % 3 == 0 ? 1024 : (i + t) % 3 == 1 ? 101 * 1024 : 226 * 1024;
                const auto kernel = (i / 7 + t) % 2 ? first : second;
                const auto status = tokenspeed::launch(kernel, {.grid = 1, .block = 32, .shared_bytes = bytes}, i);
                failures += status != cudaSuccess;
            }
        });
    }
    for (auto& thread : threads) thread.join();
    std::printf("%d launches, %d failures, %d attributes set\n", launches.load(), failures.load(),
                attributes_set.load());
    return 0;
}
