#include "copies.h"

#include <cstring>

#include "api.h"
#include "machine.h"

namespace tokenspeed::emulator {

namespace {

void check_global(const void* global, size_t alignment, const char* what) {
    if (reinterpret_cast<uintptr_t>(global) % alignment != 0) {
        machine().fail("%s: global address %p is not aligned to %zu bytes", what, global, alignment);
    }
}

void check_bulk_size(uint32_t bytes, const char* what) {
    if (bytes == 0 || bytes % 16 != 0) machine().fail("%s: %u bytes is not a positive multiple of 16", what, bytes);
}

// An engine's write to shared memory: both the threads and the async proxy see it.
void write_shared(const SharedPlace& place, const void* source, size_t bytes) {
    memcpy(place.data(), source, bytes);
    memcpy(place.shadow(), source, bytes);
}

}  // namespace

// ---- cp.async

void cp_async(uint32_t shared, const void* global, uint32_t bytes, uint32_t source_bytes) {
    const SharedPlace place = resolve(shared, bytes, bytes, "cp.async");
    check_global(global, bytes, "cp.async");
    if (source_bytes > bytes) machine().fail("cp.async: %u source bytes of %u", source_bytes, bytes);
    auto copy = std::make_unique<AsyncCopy>();
    copy->name = "cp.async";
    copy->into = {place.block};
    copy->queue = &current_thread->cp_async;
    copy->write = [=] {
        // Generic proxy: the async proxy's view is not updated.
        if (source_bytes > 0) memcpy(place.data(), global, source_bytes);
        memset(place.data() + source_bytes, 0, bytes - source_bytes);
    };
    machine().start_copy(std::move(copy));
}

void cp_async_commit() {
    current_thread->cp_async.commit();
}

void cp_async_wait(int pending) {
    GroupQueue& queue = current_thread->cp_async;
    machine().wait_until("cp.async group", nullptr, 0,
                         [&, pending] { return queue.settled(static_cast<uint64_t>(pending), false); });
}

void cp_async_mbarrier_arrive(uint32_t barrier) {
    const SharedPlace place = resolve(barrier, 8, 8, "mbarrier");
    GroupQueue* queue = &current_thread->cp_async;
    auto arrival = std::make_unique<AsyncCopy>();
    arrival->name = "cp.async arrival";
    arrival->write = [=] {
        machine().deliver_all(*queue);  // what the thread copied before completes first
        mbarrier_arrive_at(place, 1, 0);
    };
    machine().start_copy(std::move(arrival));
}

// ---- bulk

std::vector<CopyTarget> copy_targets(uint32_t shared, uint32_t barrier, uint16_t mask, size_t bytes, size_t alignment,
                                     const char* what) {
    std::vector<CopyTarget> targets;
    const auto add = [&](uint32_t rank_bits) {
        targets.push_back(
            {resolve(rank_bits | shared, bytes, alignment, what), resolve(rank_bits | barrier, 8, 8, what)});
    };
    if (mask == 0) {
        add(0);
        return targets;
    }
    for (uint32_t rank = 0; rank < 16; ++rank) {
        if (mask >> rank & 1) add((rank + 1) << kRankShift);
    }
    return targets;
}

void bulk_load(uint32_t shared, const void* global, uint32_t bytes, uint32_t barrier, uint16_t mask) {
    check_bulk_size(bytes, "bulk load");
    check_global(global, 16, "bulk load");
    const auto targets = copy_targets(shared, barrier, mask, bytes, 16, "bulk load");
    auto copy = std::make_unique<AsyncCopy>();
    copy->name = "bulk load";
    for (const CopyTarget& target : targets) copy->into.push_back(target.place.block);
    copy->write = [=] {
        for (const CopyTarget& target : targets) {
            write_shared(target.place, global, bytes);
            mbarrier_complete_bytes(target.barrier, bytes);
        }
    };
    machine().start_copy(std::move(copy));
}

void bulk_copy_cluster(uint32_t shared, uint32_t source, uint32_t bytes, uint32_t barrier) {
    check_bulk_size(bytes, "bulk copy");
    const SharedPlace from = resolve(source, bytes, 16, "bulk copy's source");
    const SharedPlace to = resolve(shared, bytes, 16, "bulk copy's destination");
    const SharedPlace completes = resolve(barrier, 8, 8, "bulk copy's mbarrier");
    auto staging = std::make_shared<std::vector<uint8_t>>(bytes);
    auto copy = std::make_unique<AsyncCopy>();
    copy->name = "bulk copy";
    copy->from = from.block;
    copy->into = {to.block};
    copy->read = [=] { memcpy(staging->data(), from.shadow(), bytes); };
    copy->write = [=] {
        write_shared(to, staging->data(), bytes);
        mbarrier_complete_bytes(completes, bytes);
    };
    machine().start_copy(std::move(copy));
}

void store_async_cluster(uint32_t shared, uint32_t value, uint32_t barrier) {
    const SharedPlace to = resolve(shared, 4, 4, "asynchronous store");
    const SharedPlace completes = resolve(barrier, 8, 8, "asynchronous store's mbarrier");
    auto copy = std::make_unique<AsyncCopy>();
    copy->name = "asynchronous store";
    copy->into = {to.block};
    copy->write = [=] {
        write_shared(to, &value, 4);
        mbarrier_complete_bytes(completes, 4);
    };
    machine().start_copy(std::move(copy));
}

void bulk_store(void* global, uint32_t shared, uint32_t bytes) {
    check_bulk_size(bytes, "bulk store");
    check_global(global, 16, "bulk store");
    const SharedPlace from = resolve(shared, bytes, 16, "bulk store");
    auto staging = std::make_shared<std::vector<uint8_t>>(bytes);
    auto copy = std::make_unique<AsyncCopy>();
    copy->name = "bulk store";
    copy->from = from.block;
    copy->queue = &current_thread->bulk;
    copy->read = [=] { memcpy(staging->data(), from.shadow(), bytes); };
    copy->write = [=] { memcpy(global, staging->data(), bytes); };
    machine().start_copy(std::move(copy));
}

void bulk_prefetch(const void* global, uint32_t bytes) {
    check_bulk_size(bytes, "bulk prefetch");
    check_global(global, 16, "bulk prefetch");
}

void bulk_commit() {
    current_thread->bulk.commit();
}

void bulk_wait(int pending, bool reads_only) {
    GroupQueue& queue = current_thread->bulk;
    machine().wait_until(reads_only ? "bulk group's sources" : "bulk group", nullptr, 0,
                         [&, pending] { return queue.settled(static_cast<uint64_t>(pending), reads_only); });
}

void fence_async_shared() {
    current_thread->block->shared->refresh_shadow();
}

}  // namespace tokenspeed::emulator
