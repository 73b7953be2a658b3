// How threads wait for each other: what the barriers of api.h share with the engines and the scheduler.
#pragma once
#include <cstdint>
#include <string>

#include "api.h"
#include "machine.h"

namespace tokenspeed::emulator {

void release_block_barrier(Block& block);  // after an exit
void release_cluster_barrier(Cluster& cluster);

// ---- warp-wide operations
// Joins the operation `name` of the lanes in `mask` with a payload of `words` 64-bit words. The last lane to arrive
// calls complete(collective) once, then all continue. The caller reads other lanes' payloads and then calls
// leave_collective().
Collective& join_collective(uint32_t mask, const char* name, const uint64_t* payload, int words,
                            void (*complete)(Collective&) = nullptr);
void leave_collective(Collective& collective);

// ---- shared addresses
constexpr uint32_t kRankShift = 24;
struct SharedPlace {
    Block* block;
    uint32_t offset;
    uint8_t* data() const { return block->shared->data() + offset; }
    uint8_t* shadow() const { return block->shared->shadow() + offset; }
};
// Checks that `bytes` at the address lie inside the block's shared memory, aligned.
SharedPlace resolve(uint32_t address, size_t bytes, size_t alignment, const char* what);
Block& cluster_block(uint32_t rank, const char* what);

// ---- mbarriers, by an engine or a thread
void mbarrier_arrive_at(const SharedPlace& barrier, int arrivals, int64_t expected_bytes);
void mbarrier_complete_bytes(const SharedPlace& barrier, uint32_t bytes);

void prepare_registers(Block& block);

// What the report says after the name of a wait.
std::string describe_wait(const Block& block, const std::string& why, const void* object, uint64_t value);

}  // namespace tokenspeed::emulator
