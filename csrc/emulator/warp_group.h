// wgmma: products that four warps start together and that run on their own until waited for.
#pragma once
#include <cstdint>
#include <deque>
#include <vector>

#include "api.h"
#include "machine.h"

namespace tokenspeed::emulator {

struct WarpGroup {
    struct Issued {
        Product product;
        uint64_t group = 0;  // commit group it belongs to
        int arrived = 0;     // threads that issued it
        std::vector<float*> accumulators = std::vector<float*>(128);
        std::vector<uint32_t> a = {};  // 128 x 4 registers when A is in registers
    };

    Block* block = nullptr;
    std::deque<Issued> products;  // not executed yet
    uint64_t executed_products = 0;
    uint64_t executed_groups = 0;
    std::deque<int> commits;  // threads that committed group executed_groups + i
    uint64_t waited_for = 0;  // some thread waits until this many groups are executed

    void execute_next_group();
    bool execute_waited_for();  // false: nobody waits for a group that is complete
};

}  // namespace tokenspeed::emulator
