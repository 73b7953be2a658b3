// Copies inside the two arenas: whole state slots, and the first rows of KV pages, every layer in one launch.
//
// Floor: two bytes moved a byte copied. A slot of 63 MiB: 132 MB = 31 us at 4.3 TB/s; a page of 10 layers, 2 kv heads:
// 1.3 MB, 2.6 MB = 0.6 us, so single pages are bound by the launch.
//
// Both are one kernel: a pair copies `boxes` boxes, and of each only the first `length` bytes; a slot is one box, and a
// page consists of them already. Boxes are cut into parts of 16 KB. A grid of two blocks a multiprocessor walks the
// parts of all pairs; in each block one thread keeps a ring of kStages parts moving with bulk copies, global to shared
// to global, so memory sees long bursts, and 160 KB a multiprocessor in flight cost no registers. Both sides are marked
// first to leave L2, since a snapshot is not read again soon and should not push weights out.
//
// Tried and lost (H200): a block of 256 threads for every 32 KB, eight 16-byte loads and stores a thread: 90.6% of copy
// at 16 slots, 38 us for one. Predicted now: 96% and 34 us.
//
// budget: copy_parts_kernel registers<=64 shared<=0 hot
#include <launch.h>
#include <ptx.h>

#include <algorithm>

#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kStages = 6;
constexpr int kBlocks = 2;  // per multiprocessor
constexpr int kPartBytes = 16384;

struct Shared {
    uint8_t parts[kStages][kPartBytes];
    uint64_t full[kStages];
};

struct Copies {
    uint8_t* arena;
    int64_t stride;       // bytes between slots or pages
    int64_t total_bytes;  // of one slot or page
    int64_t box_bytes;    // between the starts of two boxes
    const int32_t* source;
    const int32_t* destination;
    const int32_t* rows;  // rows to copy of every box; null: all of it
    int row_bytes;
    int pairs, boxes, box_parts;
};

// One part to copy: byte offsets into the arena. `unit` numbers the parts of all boxes of all pairs.
struct Part {
    int64_t unit, from, to;
    uint32_t bytes;
};

__device__ int64_t unit_count(const Copies& p) {
    return int64_t(p.pairs) * p.boxes * p.box_parts;
}

// The first part at or after `unit`, in steps of the grid, that has something to copy.
__device__ Part find_part(const Copies& p, int64_t unit) {
    for (const int64_t units = unit_count(p); unit < units; unit += gridDim.x) {
        const int64_t whole = unit / p.box_parts, offset = unit % p.box_parts * kPartBytes;
        const int64_t pair = whole / p.boxes, start = whole % p.boxes * p.box_bytes;
        const int64_t source = p.source[pair], destination = p.destination[pair];
        if (source < 0 || destination < 0) continue;
        int64_t length = min(p.total_bytes - start, p.box_bytes);
        if (p.rows != nullptr) length = min(length, int64_t(p.rows[pair]) * p.row_bytes);
        if (length <= offset) continue;
        const auto bytes = static_cast<uint32_t>(min(length - offset, int64_t(kPartBytes)));
        return {unit, source * p.stride + start + offset, destination * p.stride + start + offset, bytes};
    }
    return {unit, 0, 0, 0};
}

// One thread a block does everything: it only starts copies and waits for them.
__global__ void __launch_bounds__(32) copy_parts_kernel(const Copies p) {
    DYNAMIC_SHARED(memory);
    auto& shared = *reinterpret_cast<Shared*>(memory);
    if (threadIdx.x != 0) return;
    for (int stage = 0; stage < kStages; ++stage) ptx::mbarrier_init(&shared.full[stage], 1);
    ptx::fence_mbarrier_init();
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();

    Part to_load = find_part(p, blockIdx.x), to_store = to_load;
    int loaded = 0;
    const auto load_next = [&] {
        const int stage = loaded++ % kStages;
        ptx::mbarrier_arrive_expect_tx(&shared.full[stage], to_load.bytes);
        ptx::bulk_load(shared.parts[stage], p.arena + to_load.from, to_load.bytes, &shared.full[stage],
                       ptx::CachePolicy::kEvictFirst);
        to_load = find_part(p, to_load.unit + gridDim.x);
    };
    while (loaded < kStages - 1 && to_load.bytes != 0) load_next();
    for (int stored = 0; to_store.bytes != 0; ++stored) {
        const int stage = stored % kStages;
        ptx::mbarrier_wait(&shared.full[stage], stored / kStages & 1);
        ptx::bulk_store(p.arena + to_store.to, shared.parts[stage], to_store.bytes, ptx::CachePolicy::kEvictFirst);
        ptx::bulk_commit();
        to_store = find_part(p, to_store.unit + gridDim.x);
        if (to_load.bytes != 0) {
            ptx::bulk_wait_read<1>();  // the store before this one has left the stage that is loaded next
            load_next();
        }
    }
    ptx::bulk_wait<0>();
}

cudaError_t start(const Copies& copies, cudaStream_t stream) {
    const int64_t units = int64_t(copies.pairs) * copies.boxes * copies.box_parts;
    LaunchConfig config;
    config.grid = dim3(static_cast<unsigned>(std::min<int64_t>(units, kBlocks * multiprocessor_count())));
    config.block = dim3(32);
    config.shared_bytes = sizeof(Shared);
    config.stream = stream;
    config.programmatic = true;
    return launch(copy_parts_kernel, config, copies);
}

int parts_of(int64_t box_bytes) {
    return static_cast<int>((box_bytes + kPartBytes - 1) / kPartBytes);
}

}  // namespace

cudaError_t copy_states(uint8_t* slots, int64_t slot_stride, int64_t slot_bytes, const int32_t* source,
                        const int32_t* destination, int pairs, cudaStream_t stream) {
    return start(
        {slots, slot_stride, slot_bytes, slot_bytes, source, destination, nullptr, 0, pairs, 1, parts_of(slot_bytes)},
        stream);
}

cudaError_t copy_pages(uint8_t* pages, int64_t page_stride, int boxes, int box_rows, int row_bytes,
                       const int32_t* source, const int32_t* destination, const int32_t* rows, int pairs,
                       cudaStream_t stream) {
    const int64_t box_bytes = int64_t(box_rows) * row_bytes;
    return start({pages, page_stride, boxes * box_bytes, box_bytes, source, destination, rows, row_bytes, pairs, boxes,
                  parts_of(box_bytes)},
                 stream);
}

}  // namespace tokenspeed
