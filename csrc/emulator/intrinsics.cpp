#include "intrinsics.h"

#include "machine.h"
#include "synchronization.h"

namespace tokenspeed::emulator {

Coordinates coordinates{};

void exchange(uint32_t mask, const char* name, uint64_t value, uint64_t (&lanes)[32]) {
    Collective& collective = join_collective(mask, name, &value, 1);
    for (uint32_t lane = 0; lane < 32; ++lane) lanes[lane] = mask >> lane & 1 ? collective.payload[lane][0] : ~0ull;
    leave_collective(collective);
}

uint64_t exchange_one(uint32_t mask, const char* name, uint64_t value, uint32_t source) {
    Collective& collective = join_collective(mask, name, &value, 1);
    const uint64_t received = mask >> source & 1 ? collective.payload[source][0] : ~0ull;
    leave_collective(collective);
    return received;
}

void trap(const char* what) {
    machine().fail("trap: %s", what);
}

void pause() {
    machine().yield();
}

uint8_t* dynamic_shared() {
    return current_thread->block->shared->data();
}

uint32_t cluster_rank() {
    return current_thread->block->rank;
}

uint32_t cluster_size() {
    return static_cast<uint32_t>(current_thread->block->cluster->blocks.size());
}

void wait_for_flag(const uint32_t* flag, uint32_t value, bool exactly) {
    machine().wait_until("flag", flag, value, [=] { return exactly ? *flag == value : *flag >= value; });
}

void store_to_peer(uint64_t* global, uint64_t word) {
    auto copy = std::make_unique<AsyncCopy>();
    copy->name = "store to a peer";
    copy->write = [=] { *global = word; };
    machine().start_copy(std::move(copy));
}

bool wait_for_peer(const uint64_t* words, uint32_t tag, const uint32_t* stop) {
    const auto there = [=] { return words[0] >> 32 == tag && words[1] >> 32 == tag; };
    Thread& self = *current_thread;
    self.impatient = true;
    machine().wait_until("peer", words, tag, [&] { return there() || *stop != 0 || !self.impatient; });
    self.impatient = false;
    return there();
}

void wait_for_grid() {
    const Grid& grid = *current_thread->block->grid;
    machine().wait_until("grid dependency", nullptr, 0, [&] { return grid.predecessors_done; });
}

void trigger_grid() {
    current_thread->block->triggered = true;
}

}  // namespace tokenspeed::emulator
