#include "tensor.h"

#include <array>
#include <cstring>
#include <string>

#include "copies.h"
#include "machine.h"
#include "synchronization.h"

namespace tokenspeed::emulator {

namespace {

constexpr uint32_t kMagic = 0x70AD3A9;

// What a CUtensorMap holds here; the driver's own format is secret.
struct TensorMap {
    uint32_t magic;
    uint8_t rank;
    TensorElement element;
    Swizzle swizzle;
    uint8_t* base;
    uint64_t strides[5];  // bytes; strides[0] is the element
    uint32_t last[5];     // sizes - 1
    uint16_t box[5];
};
static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap));

using Coordinates5 = std::array<int64_t, 5>;

TensorMap decode(const CUtensorMap* map, int rank) {
    TensorMap decoded;
    memcpy(&decoded, map, sizeof decoded);
    if (decoded.magic != kMagic) machine().fail("TMA: %p holds no tensor map", static_cast<const void*>(map));
    if (decoded.rank != rank) machine().fail("TMA: %d coordinates for a tensor of rank %d", rank, decoded.rank);
    if (reinterpret_cast<uintptr_t>(map) % 64 != 0) machine().fail("TMA: the tensor map is not aligned to 64 bytes");
    return decoded;
}

uint32_t box_bytes(const TensorMap& map) {
    uint32_t bytes = element_bytes(map.element);
    for (int i = 0; i < map.rank; ++i) bytes *= map.box[i];
    return bytes;
}

uint32_t swizzled(uint32_t address, Swizzle swizzle) {
    if (swizzle == Swizzle::kNone) return address;
    const uint32_t mask = (2u << (static_cast<uint32_t>(swizzle) - 1)) - 1;  // 1, 3 or 7
    return address ^ (address >> 7 & mask) << 4;
}

// Visits the box element by element: visit(shared offset within the block, global address or null when outside).
template <typename Visit>
void each_element(const TensorMap& map, uint32_t shared_offset, const Coordinates5& at, Visit visit) {
    const uint32_t size = element_bytes(map.element);
    std::array<uint32_t, 5> index{};
    const uint32_t count = box_bytes(map) / size;
    for (uint32_t i = 0; i < count; ++i) {
        uint8_t* global = map.base;
        for (int d = 0; d < map.rank && global != nullptr; ++d) {
            const int64_t position = at[static_cast<size_t>(d)] + index[static_cast<size_t>(d)];
            if (position < 0 || position > static_cast<int64_t>(map.last[d])) {
                global = nullptr;
            } else {
                global += static_cast<uint64_t>(position) * map.strides[d];
            }
        }
        visit(swizzled(shared_offset + i * size, map.swizzle), global);
        for (int d = 0; d < map.rank; ++d) {
            if (++index[static_cast<size_t>(d)] < map.box[d]) break;
            index[static_cast<size_t>(d)] = 0;
        }
    }
}

Coordinates5 checked(const TensorMap& map, const int32_t* coordinates) {
    Coordinates5 wide{};
    for (int i = 0; i < map.rank; ++i) wide[static_cast<size_t>(i)] = coordinates[i];
    const int64_t start = wide[0] * element_bytes(map.element);
    if (start % 16 != 0) {
        machine().fail("TMA: the box starts %lld bytes into its innermost dimension, not a multiple of 16",
                       static_cast<long long>(start));
    }
    return wide;
}

}  // namespace

cudaError_t encode(CUtensorMap* map, TensorElement element, int rank, const void* base, const uint64_t* sizes,
                   const uint64_t* strides, const uint32_t* box, Swizzle swizzle) {
    TensorMap encoded{};
    encoded.magic = kMagic;
    encoded.rank = static_cast<uint8_t>(rank);
    encoded.element = element;
    encoded.swizzle = swizzle;
    encoded.base = static_cast<uint8_t*>(const_cast<void*>(base));
    const auto refuse = [](const std::string& why) {
        machine().set_report("illegal tensor map: " + why);
        return cudaErrorInvalidValue;
    };
    if (base == nullptr || reinterpret_cast<uintptr_t>(base) % 16 != 0)
        return refuse("base is not aligned to 16 bytes");
    for (int i = 0; i < rank; ++i) {
        const auto name = " of dimension " + std::to_string(i);
        if (sizes[i] == 0 || sizes[i] > 1ull << 32) return refuse("size " + std::to_string(sizes[i]) + name);
        if (box[i] == 0 || box[i] > 256) return refuse("box " + std::to_string(box[i]) + name + ", at most 256");
        if (i > 0 && (strides[i] % 16 != 0 || strides[i] >= 1ull << 40)) {
            return refuse("stride " + std::to_string(strides[i]) + name + ", a multiple of 16 below 2^40");
        }
        encoded.strides[i] = i == 0 ? element_bytes(element) : strides[i];
        encoded.last[i] = static_cast<uint32_t>(sizes[i] - 1);
        encoded.box[i] = static_cast<uint16_t>(box[i]);
    }
    const uint32_t row = box[0] * element_bytes(element);
    if (row % 16 != 0) return refuse("a box row of " + std::to_string(row) + " bytes is no multiple of 16");
    // The driver takes narrower rows too, but a card then spaces them out: nobody should count on that.
    constexpr uint32_t kWidths[] = {0, 32, 64, 128};
    const uint32_t width = kWidths[static_cast<int>(swizzle)];
    if (width != 0 && row != width) {
        return refuse("a box row of " + std::to_string(row) + " bytes is not the swizzle's " + std::to_string(width));
    }
    memcpy(static_cast<void*>(map), &encoded, sizeof encoded);
    return cudaSuccess;
}

void tensor_load(uint32_t shared, const CUtensorMap* map, uint32_t barrier, int rank, const int32_t* coordinates,
                 uint16_t mask) {
    const TensorMap decoded = decode(map, rank);
    const uint32_t bytes = box_bytes(decoded);
    const auto targets = copy_targets(shared, barrier, mask, bytes, 128, "TMA load");
    const Coordinates5 at = checked(decoded, coordinates);
    auto copy = std::make_unique<AsyncCopy>();
    copy->name = "TMA load";
    for (const CopyTarget& target : targets) copy->into.push_back(target.place.block);
    copy->write = [=] {
        const uint32_t size = element_bytes(decoded.element);
        for (const CopyTarget& target : targets) {
            SharedMemory& to = *target.place.block->shared;
            each_element(decoded, target.place.offset, at, [&](uint32_t offset, const uint8_t* global) {
                if (global != nullptr) {
                    memcpy(to.data() + offset, global, size);
                } else {
                    memset(to.data() + offset, 0, size);
                }
                memcpy(to.shadow() + offset, to.data() + offset, size);
            });
            mbarrier_complete_bytes(target.barrier, bytes);
        }
    };
    machine().start_copy(std::move(copy));
}

void tensor_store(const CUtensorMap* map, uint32_t shared, int rank, const int32_t* coordinates) {
    const TensorMap decoded = decode(map, rank);
    const uint32_t bytes = box_bytes(decoded);
    const SharedPlace from = resolve(shared, bytes, 128, "TMA store");
    const Coordinates5 at = checked(decoded, coordinates);
    auto staging = std::make_shared<std::vector<uint8_t>>();
    auto copy = std::make_unique<AsyncCopy>();
    copy->name = "TMA store";
    copy->from = from.block;
    copy->queue = &current_thread->bulk;
    const uint32_t size = element_bytes(decoded.element);
    copy->read = [=] {
        each_element(decoded, from.offset, at, [&](uint32_t offset, const uint8_t*) {
            const uint8_t* source = from.block->shared->shadow() + offset;
            staging->insert(staging->end(), source, source + size);
        });
    };
    copy->write = [=] {
        const uint8_t* source = staging->data();
        each_element(decoded, from.offset, at, [&](uint32_t, uint8_t* global) {
            if (global != nullptr) memcpy(global, source, size);
            source += size;
        });
    };
    machine().start_copy(std::move(copy));
}

}  // namespace tokenspeed::emulator
