// What launchers and tests call: launch, and the C functions that set the seed, defer launches and read the report.
#include <memory>

#include "launch.h"
#include "machine.h"
#include "warp_group.h"

namespace tokenspeed::emulator {

static std::unique_ptr<Grid> make_grid(const LaunchConfig& config) {
    auto grid = std::make_unique<Grid>();
    grid->grid = config.grid;
    grid->block = config.block;
    grid->cluster = config.cluster;
    grid->shared_bytes = config.shared_bytes;
    grid->programmatic = config.programmatic;
    grid->takes_flags = config.takes_flags;
    grid->stream = config.stream;
    return grid;
}

cudaError_t submit(const LaunchConfig& config, const void* kernel, std::function<void()> body) {
    auto grid = make_grid(config);
    grid->kernel = kernel;
    grid->body = std::move(body);
    return machine().submit(std::move(grid));
}

int resident_blocks(const LaunchConfig& config) {
    return static_cast<int>(machine().resident_blocks(*make_grid(config)));
}

int multiprocessors() {
    return machine().multiprocessors();
}

const char* describe(cudaError_t status) {
    return status == cudaSuccess ? "no error" : machine().report().c_str();
}

}  // namespace tokenspeed::emulator

using tokenspeed::emulator::machine;

extern "C" {

// Seed of the thread order and of the engines' timing. 0: first in, first out, and every copy as late as possible.
__attribute__((visibility("default"))) void emulator_seed(unsigned long long seed) {
    machine().set_seed(seed);
}

// While on, launches queue up until emulator_synchronize(), so that programmatic successors may start early.
__attribute__((visibility("default"))) void emulator_defer(int on) {
    machine().defer(on != 0);
}

// Runs what is queued; a cudaError_t.
__attribute__((visibility("default"))) int emulator_synchronize() {
    return machine().synchronize();
}

// Multiprocessors of the emulated device (4 unless set).
__attribute__((visibility("default"))) void emulator_multiprocessors(int count) {
    machine().set_multiprocessors(count);
}

// Clusters of the latest launch.
__attribute__((visibility("default"))) int emulator_clusters() {
    return machine().last_clusters();
}

// Launches of several blocks a cluster so far.
__attribute__((visibility("default"))) int emulator_cluster_launches() {
    return machine().cluster_launches();
}

// Whether AddressSanitizer watches; then a bad address ends the process.
__attribute__((visibility("default"))) int emulator_sanitized() {
#if defined(__SANITIZE_ADDRESS__)
    return 1;
#else
    return 0;
#endif
}

// Why the last launch failed; empty when it did not.
__attribute__((visibility("default"))) const char* emulator_report() {
    return machine().report().c_str();
}
}
