// Copies inside the two arenas: whole state slots, and the first rows of KV pages, every layer in one launch.
//
// Floor: two bytes moved a byte copied. A slot of 64.5 MB: 129 MB = 30 us at 4.3 TB/s; a page of 10 layers, 2 kv heads:
// 1.3 MB, 2.6 MB = 0.6 us, so single pages are bound by the launch.
//
// Both are one kernel: a pair copies `boxes` boxes of `box_bytes`, and of each only the first `length` bytes; a slot is
// cut into boxes of 32 KB, and a page consists of them already. A block copies one box: 256 threads with eight 16-byte
// vectors each in flight, 32 KB a block. Nothing is kept in L1 and both sides are marked first to leave L2: a snapshot
// is not read again soon, should not push weights out, and the copy is faster for it.
//
// Measured, and what was tried: docs/kernels/memory_bound.md.
//
// budget: copy_boxes_kernel registers<=64 shared<=0 hot
#include <launch.h>
#include <ptx.h>

#include "kernels.h"

namespace tokenspeed {
namespace {

constexpr int kThreads = 256;
constexpr int kVectors = 8;  // of 16 bytes in flight per thread
constexpr int64_t kSlotBox = kThreads * kVectors * 16;

struct Boxes {
    uint8_t* arena;
    int64_t stride;       // bytes between slots or pages
    int64_t total_bytes;  // of one slot or page
    int64_t box_bytes;    // between the starts of two boxes
    const int32_t* source;
    const int32_t* destination;
    const int32_t* rows;  // rows to copy of every box; null: all of it
    int row_bytes;
};

// Grid: (boxes, pairs).
__global__ void __launch_bounds__(kThreads) copy_boxes_kernel(const Boxes p) {
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const int64_t source = p.source[blockIdx.y], destination = p.destination[blockIdx.y];
    if (source < 0 || destination < 0) return;
    const int64_t start = blockIdx.x * p.box_bytes;
    int64_t length = p.total_bytes - start < p.box_bytes ? p.total_bytes - start : p.box_bytes;
    if (p.rows != nullptr) {
        const int64_t wanted = int64_t(p.rows[blockIdx.y]) * p.row_bytes;
        length = wanted < length ? wanted : length;
    }
    const uint8_t* from = p.arena + source * p.stride + start;
    uint8_t* to = p.arena + destination * p.stride + start;
    for (int64_t base = threadIdx.x * 16; base < length; base += kSlotBox) {
        uint4 vector[kVectors];
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const int64_t offset = base + i * kThreads * 16;
            if (offset < length) vector[i] = ptx::load_16_streaming(from + offset);
        }
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
            const int64_t offset = base + i * kThreads * 16;
            if (offset < length) ptx::store_16_streaming(to + offset, vector[i]);
        }
    }
}

cudaError_t copy_boxes(const Boxes& boxes, int64_t count, int pairs, cudaStream_t stream) {
    LaunchConfig config;
    config.grid = dim3(static_cast<unsigned>(count), static_cast<unsigned>(pairs));
    config.block = dim3(kThreads);
    config.stream = stream;
    config.programmatic = true;
    return launch(copy_boxes_kernel, config, boxes);
}

}  // namespace

cudaError_t copy_states(uint8_t* slots, int64_t slot_stride, int64_t slot_bytes, const int32_t* source,
                        const int32_t* destination, int pairs, cudaStream_t stream) {
    const Boxes boxes{slots, slot_stride, slot_bytes, kSlotBox, source, destination, nullptr, 0};
    return copy_boxes(boxes, (slot_bytes + kSlotBox - 1) / kSlotBox, pairs, stream);
}

cudaError_t copy_pages(uint8_t* pages, int64_t page_stride, int boxes, int box_rows, int row_bytes,
                       const int32_t* source, const int32_t* destination, const int32_t* rows, int pairs,
                       cudaStream_t stream) {
    const int64_t box_bytes = int64_t(box_rows) * row_bytes;
    const Boxes all{pages, page_stride, boxes * box_bytes, box_bytes, source, destination, rows, row_bytes};
    return copy_boxes(all, boxes, pairs, stream);
}

}  // namespace tokenspeed
