#include "report.h"

#include <dlfcn.h>

#include <cstdio>
#include <map>
#include <tuple>

#include "synchronization.h"

namespace tokenspeed::emulator {

namespace {

constexpr size_t kMaximumLines = 40;

std::string triple(uint32_t x, uint32_t y, uint32_t z) {
    return "(" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

std::string kernel_name(const Grid& grid) {
    Dl_info info{};
    if (dladdr(grid.kernel, &info) != 0 && info.dli_sname != nullptr) return info.dli_sname;
    return "kernel";
}

// "0-31, 64" for a sorted list.
std::string ranges(const std::vector<uint32_t>& sorted) {
    std::string result;
    for (size_t i = 0; i < sorted.size();) {
        size_t last = i;
        while (last + 1 < sorted.size() && sorted[last + 1] == sorted[last] + 1) ++last;
        if (!result.empty()) result += ", ";
        result += std::to_string(sorted[i]);
        if (last > i) result += "-" + std::to_string(sorted[last]);
        i = last + 1;
    }
    return result;
}

}  // namespace

std::string text(const dim3& size) {
    return triple(size.x, size.y, size.z);
}

std::string block_name(const Block& block) {
    return kernel_name(*block.grid) + " block " + triple(block.index.x, block.index.y, block.index.z);
}

std::string thread_name(const Thread& thread) {
    return block_name(*thread.block) + " thread " + triple(thread.index.x, thread.index.y, thread.index.z);
}

std::string describe_state(const Grid& grid) {
    std::string result = kernel_name(grid) + ": " + std::to_string(grid.finished) + " of " +
                         std::to_string(grid.clusters) + " clusters finished, " + std::to_string(grid.resident.size()) +
                         " resident\n";
    size_t lines = 0;
    for (const auto& cluster : grid.resident) {
        for (const auto& block : cluster->blocks) {
            std::map<std::tuple<std::string, const void*, uint64_t>, std::vector<uint32_t>> waits;
            for (const Thread& thread : block->threads) {
                if (thread.done || thread.waiting == nullptr) continue;
                waits[{thread.waiting, thread.wait_object, thread.wait_value}].push_back(thread.linear);
            }
            for (const auto& [wait, threads] : waits) {
                if (++lines > kMaximumLines) return result + "  ...\n";
                const auto& [why, object, value] = wait;
                result += "  block " + triple(block->index.x, block->index.y, block->index.z) + " threads " +
                          ranges(threads) + ": " + why + describe_wait(*block, why, object, value) + "\n";
            }
        }
    }
    return result;
}

}  // namespace tokenspeed::emulator
