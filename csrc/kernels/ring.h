// A place in a ring of slots that mbarriers guard.
#pragma once
#include <cstdint>

namespace tokenspeed {

struct Cursor {
    int slot = 0;
    uint32_t phase = 0;  // parity of the slot's phase

    __device__ __forceinline__ void next(int size) {
        if (++slot == size) slot = 0, phase ^= 1;
    }
};

}  // namespace tokenspeed
