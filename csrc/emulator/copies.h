// Copies that run beside the threads, each delivered at a time of the scheduler's choosing between its start and its
// wait. Addresses are checked when a copy starts. copies.cpp has cp.async and bulk copies, tensor.cpp those of TMA.
#pragma once
#include <cstdint>
#include <vector>

#include "synchronization.h"

namespace tokenspeed::emulator {

struct CopyTarget {
    SharedPlace place, barrier;
};
// The blocks that receive a copy at the same offset, and the mbarrier of each; checks every one.
std::vector<CopyTarget> copy_targets(uint32_t shared, uint32_t barrier, uint16_t mask, size_t bytes, size_t alignment,
                                     const char* what);

}  // namespace tokenspeed::emulator
