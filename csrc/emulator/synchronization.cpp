#include "synchronization.h"

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "report.h"

namespace tokenspeed::emulator {

// ---- block and cluster barriers

static void complete_barrier(NamedBarrier& barrier) {
    for (Thread* thread : barrier.waiting) machine().wake(*thread);
    barrier.waiting.clear();
    barrier.arrived = 0;
    barrier.expected = 0;
}

void block_barrier(uint32_t id, uint32_t threads, bool wait) {
    Block& block = *current_thread->block;
    if (id >= 16) machine().fail("barrier %u: there are barriers 0 to 15", id);
    if (threads != kAllLiveThreads && (threads == 0 || threads % 32 != 0 || threads > block.threads.size())) {
        machine().fail("barrier %u over %u threads: not a positive multiple of 32 within the block", id, threads);
    }
    NamedBarrier& barrier = block.barriers[id];
    if (barrier.expected == 0) barrier.expected = threads;
    if (barrier.expected != threads) {
        machine().fail("barrier %u: this thread names %u threads, an earlier one %u", id, threads, barrier.expected);
    }
    ++barrier.arrived;
    if (barrier.arrived == (threads == kAllLiveThreads ? block.live : threads)) {
        complete_barrier(barrier);
        if (wait) machine().yield();  // the last to arrive has no precedence
        return;
    }
    if (!wait) return;
    barrier.waiting.push_back(current_thread);
    machine().park(threads == kAllLiveThreads ? "__syncthreads" : "named barrier", nullptr, id);
}

void release_block_barrier(Block& block) {
    NamedBarrier& barrier = block.barriers[0];
    if (barrier.expected == kAllLiveThreads && barrier.arrived == block.live && block.live > 0)
        complete_barrier(barrier);
}

void cluster_barrier_arrive() {
    Cluster& cluster = *current_thread->block->cluster;
    if (current_thread->cluster_target != 0) machine().fail("cluster_arrive twice without cluster_wait between");
    current_thread->cluster_target = cluster.generation + 1;
    ++cluster.arrived;
    release_cluster_barrier(cluster);
}

void cluster_barrier_wait() {
    const uint64_t target = current_thread->cluster_target;
    if (target == 0) machine().fail("cluster_wait without cluster_arrive");
    Cluster& cluster = *current_thread->block->cluster;
    machine().wait_until("cluster barrier", &cluster, 0, [&] { return cluster.generation >= target; });
    current_thread->cluster_target = 0;
}

void release_cluster_barrier(Cluster& cluster) {
    if (cluster.arrived == 0 || cluster.arrived < cluster.live) return;
    cluster.arrived = 0;
    ++cluster.generation;
}

// ---- warp-wide operations

static Collective& find_collective(Warp& warp, uint32_t mask, const char* name, uint32_t bit) {
    Collective* unused = nullptr;
    for (const auto& collective : warp.collectives) {
        if (collective->mask == 0) {
            unused = collective.get();
        } else if (collective->mask == mask && collective->arrived != mask && !(collective->arrived & bit) &&
                   collective->name == name) {
            return *collective;
        }
    }
    if (unused == nullptr) {
        warp.collectives.push_back(std::make_unique<Collective>());
        unused = warp.collectives.back().get();
    }
    unused->mask = mask;
    unused->arrived = 0;
    unused->departed = 0;
    unused->name = name;
    return *unused;
}

Collective& join_collective(uint32_t mask, const char* name, const uint64_t* payload, int words,
                            void (*complete)(Collective&)) {
    Thread& thread = *current_thread;
    const uint32_t lane = thread.linear % 32;
    const uint32_t bit = 1u << lane;
    if (!(mask & bit)) machine().fail("%s: lane %u is not in its own mask 0x%08x", name, lane, mask);
    Collective& collective = find_collective(thread.block->warps[thread.linear / 32], mask, name, bit);
    memcpy(collective.payload[lane], payload, sizeof(uint64_t) * static_cast<size_t>(words));
    collective.lanes[lane] = &thread;
    collective.arrived |= bit;
    if (collective.arrived != mask) {
        machine().park(name, &collective, mask);
        return collective;
    }
    if (complete != nullptr) complete(collective);
    for (uint32_t other = 0; other < 32; ++other) {
        if (other != lane && (mask >> other & 1)) machine().wake(*collective.lanes[other]);
    }
    return collective;
}

void leave_collective(Collective& collective) {
    collective.departed |= 1u << (current_thread->linear % 32);
    if (collective.departed == collective.mask) collective.mask = 0;
}

// ---- shared addresses

uint32_t shared_address_of(const void* p) {
    Block& own = *current_thread->block;
    const auto offset = [&](const Block& block) {
        return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - block.shared->data());
    };
    if (own.shared->contains(p)) return offset(own);
    for (const auto& block : own.cluster->blocks) {
        if (block->shared->contains(p)) return (block->rank + 1) << kRankShift | offset(*block);
    }
    machine().fail("address %p is not in shared memory", p);
}

SharedPlace resolve(uint32_t address, size_t bytes, size_t alignment, const char* what) {
    Block* block = current_thread->block;
    const uint32_t rank = address >> kRankShift;
    const uint32_t offset = address & ((1u << kRankShift) - 1);
    if (rank > 0) block = &cluster_block(rank - 1, what);
    if (offset + bytes > block->shared->bytes()) {
        machine().fail("%s: shared offset 0x%x + %zu bytes runs past the %zu bytes of the block", what, offset, bytes,
                       block->shared->bytes());
    }
    if (offset % alignment != 0) {
        machine().fail("%s: shared offset 0x%x is not aligned to %zu bytes", what, offset, alignment);
    }
    return {block, offset};
}

uint32_t map_shared_address(const void* shared, uint32_t rank) {
    cluster_block(rank, "cluster_map");
    return (rank + 1) << kRankShift | shared_address_of(shared);
}

void* map_shared(const void* shared, uint32_t rank) {
    return cluster_block(rank, "cluster_map").shared->data() + shared_address_of(shared);
}

Block& cluster_block(uint32_t rank, const char* what) {
    const auto& blocks = current_thread->block->cluster->blocks;
    if (rank >= blocks.size()) machine().fail("%s: no block of rank %u in a cluster of %zu", what, rank, blocks.size());
    if (blocks[rank]->live == 0) machine().fail("%s: the block of rank %u has exited", what, rank);
    return *blocks[rank];
}

// ---- mbarrier

namespace {

// The 64 bits of an mbarrier, as this emulator lays them out; opaque to kernels.
struct Mbarrier {
    uint64_t valid : 1;
    uint64_t phase : 1;  // parity of the phase under way
    uint64_t pending : 20;
    uint64_t expected : 20;
    int64_t bytes : 22;
};
static_assert(sizeof(Mbarrier) == sizeof(uint64_t));
constexpr int64_t kMaximumArrivals = (1 << 20) - 1;

Mbarrier& load(const SharedPlace& place) {
    return *reinterpret_cast<Mbarrier*>(place.data());
}

bool listed(const std::vector<uint32_t>& list, uint32_t offset) {
    return std::find(list.begin(), list.end(), offset) != list.end();
}

SharedPlace barrier_at(uint32_t address) {
    return resolve(address, sizeof(uint64_t), sizeof(uint64_t), "mbarrier");
}

SharedPlace local_barrier(uint32_t address) {
    const SharedPlace place = barrier_at(address);
    if (place.block != current_thread->block)
        machine().fail("mbarrier: this operation is for the own block's barriers");
    return place;
}

void check_initialised(const SharedPlace& place) {
    if (!listed(place.block->mbarriers, place.offset)) {
        machine().fail("mbarrier at shared offset 0x%x of %s is not initialised", place.offset,
                       block_name(*place.block).c_str());
    }
    if (!load(place).valid) {
        machine().fail("mbarrier at shared offset 0x%x of %s was overwritten", place.offset,
                       block_name(*place.block).c_str());
    }
}

void check_fenced(const SharedPlace& place) {
    if (listed(place.block->unfenced_barriers, place.offset)) {
        machine().fail(
            "mbarrier at shared offset 0x%x of %s is used by a copy or by another block without "
            "fence_mbarrier_init after its initialisation",
            place.offset, block_name(*place.block).c_str());
    }
}

void complete_phase(Mbarrier& barrier) {
    if (barrier.pending != 0 || barrier.bytes != 0) return;
    barrier.phase ^= 1;
    barrier.pending = barrier.expected;
}

}  // namespace

void mbarrier_initialise(uint32_t barrier, uint32_t arrivals) {
    const SharedPlace place = local_barrier(barrier);
    if (arrivals == 0 || arrivals > kMaximumArrivals) machine().fail("mbarrier_init: %u arrivals", arrivals);
    if (listed(place.block->mbarriers, place.offset)) {
        machine().fail("mbarrier at shared offset 0x%x is initialised twice", place.offset);
    }
    load(place) = {1, 0, arrivals, arrivals, 0};
    place.block->mbarriers.push_back(place.offset);
    place.block->unfenced_barriers.push_back(place.offset);
}

void mbarrier_fence() {
    current_thread->block->unfenced_barriers.clear();
}

void mbarrier_update(uint32_t barrier, int arrivals, uint32_t expected_bytes) {
    const SharedPlace place = barrier_at(barrier);
    check_initialised(place);
    if (place.block != current_thread->block) check_fenced(place);
    mbarrier_arrive_at(place, arrivals, expected_bytes);
}

void mbarrier_arrive_at(const SharedPlace& place, int arrivals, int64_t expected_bytes) {
    check_initialised(place);
    Mbarrier& barrier = load(place);
    if (barrier.bytes + expected_bytes > kMaximumArrivals) {
        machine().fail("mbarrier at shared offset 0x%x: more than 2^20 - 1 bytes expected", place.offset);
    }
    if (barrier.pending < static_cast<uint64_t>(arrivals)) {
        machine().fail("mbarrier at shared offset 0x%x: more arrivals in a phase than its count of %u", place.offset,
                       static_cast<uint32_t>(barrier.expected));
    }
    barrier.bytes += expected_bytes;
    barrier.pending -= static_cast<uint64_t>(arrivals);
    complete_phase(barrier);
}

void mbarrier_complete_bytes(const SharedPlace& place, uint32_t bytes) {
    check_initialised(place);
    check_fenced(place);
    Mbarrier& barrier = load(place);
    if (barrier.bytes - static_cast<int64_t>(bytes) < -kMaximumArrivals) {
        machine().fail("mbarrier at shared offset 0x%x: completed bytes were never expected", place.offset);
    }
    barrier.bytes -= bytes;
    complete_phase(barrier);
}

static const Mbarrier& waitable(uint32_t address, uint32_t parity) {
    if (parity > 1) machine().fail("mbarrier: parity %u is neither 0 nor 1", parity);
    const SharedPlace place = local_barrier(address);
    check_initialised(place);
    return load(place);
}

bool mbarrier_test(uint32_t address, uint32_t parity) {
    machine().yield();
    return waitable(address, parity).phase != parity;
}

void mbarrier_wait(uint32_t address, uint32_t parity) {
    const Mbarrier& barrier = waitable(address, parity);
    machine().wait_until("mbarrier", &barrier, parity, [&] { return barrier.phase != parity; });
}

// ---- registers

constexpr int kRegisterFile = 64 * 1024;

void prepare_registers(Block& block) {
    // A kernel that moves registers is compiled for the most that its block size allows, and gets no more at the start.
    const int warps = static_cast<int>(block.warps.size());
    const int each = std::min(kRegisterFile / (warps * 32) / 8 * 8, 255);
    for (Warp& warp : block.warps) warp.registers = each;
    block.free_registers = 0;
}

void set_registers(int count, bool increase) {
    Thread& thread = *current_thread;
    Block& block = *thread.block;
    const uint64_t nothing = 0;
    leave_collective(join_collective(0xffffffffu, "setmaxnreg", &nothing, 1));
    Warp& warp = block.warps[thread.linear / 32];
    if (thread.linear % 32 == 0) {
        if (increase ? count < warp.registers : count > warp.registers) {
            machine().fail("register_%s to %d from %d", increase ? "increase" : "decrease", count, warp.registers);
        }
        const int wanted = (count - warp.registers) * 32;
        while (block.free_registers < wanted) {  // another warp may be first to take what has become free
            machine().wait_until("registers", nullptr, static_cast<uint64_t>(count),
                                 [&] { return block.free_registers >= wanted; });
        }
        block.free_registers -= wanted;
        warp.registers = count;
    }
    leave_collective(join_collective(0xffffffffu, "setmaxnreg", &nothing, 1));
}

// ---- report

std::string describe_wait(const Block& block, const std::string& why, const void* object, uint64_t value) {
    char line[256] = "";
    if (why == "mbarrier") {
        const auto& barrier = *static_cast<const Mbarrier*>(object);
        snprintf(line, sizeof line,
                 " at shared offset 0x%zx, parity %u; it is in phase %u with %u of %u arrivals and %lld bytes missing",
                 static_cast<size_t>(static_cast<const uint8_t*>(object) - block.shared->data()),
                 static_cast<unsigned>(value), static_cast<unsigned>(barrier.phase),
                 static_cast<unsigned>(barrier.pending), static_cast<unsigned>(barrier.expected),
                 static_cast<long long>(barrier.bytes));
    } else if (why == "__syncthreads" || why == "named barrier") {
        const NamedBarrier& barrier = block.barriers[value];
        snprintf(line, sizeof line, " %u; %u threads arrived of %u", static_cast<unsigned>(value), barrier.arrived,
                 barrier.expected == kAllLiveThreads ? block.live : barrier.expected);
    } else if (why == "cluster barrier") {
        snprintf(line, sizeof line, "; %u threads arrived of %u", block.cluster->arrived, block.cluster->live);
    } else if (why == "flag") {
        snprintf(line, sizeof line, " at %p, which holds %u, for %u", object, *static_cast<const uint32_t*>(object),
                 static_cast<unsigned>(value));
    } else if (why == "registers") {
        snprintf(line, sizeof line, " (%u each); %d are free in the block", static_cast<unsigned>(value),
                 block.free_registers);
    } else if (object != nullptr && value != 0) {
        const auto& collective = *static_cast<const Collective*>(object);
        snprintf(line, sizeof line, " of the warp; lanes 0x%08x of 0x%08x arrived", collective.arrived,
                 collective.mask);
    }
    return line;
}

}  // namespace tokenspeed::emulator
