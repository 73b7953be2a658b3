#include <cstring>

#include "api.h"
#include "elements.h"
#include "machine.h"
#include "synchronization.h"

namespace tokenspeed::emulator {

namespace {

constexpr uint32_t kWholeWarp = 0xffffffffu;

// A lane's payload as 32-bit words: its row address, the number of matrices, up to four registers, which a load
// replaces.
constexpr uint32_t kAddress = 0, kCount = 1, kRegisters = 2;

uint32_t* words_of(Collective& collective, uint32_t lane) {
    return reinterpret_cast<uint32_t*>(collective.payload[lane]);
}

// Runs once per warp, when its last lane arrives: no lane can change the memory in between.
template <bool kLoad, bool kTransposed>
void move_matrices(Collective& collective) {
    const uint32_t count = words_of(collective, 0)[kCount];
    for (uint32_t matrix = 0; matrix < count; ++matrix) {
        for (uint32_t row = 0; row < 8; ++row) {
            uint8_t* at =
                resolve(words_of(collective, matrix * 8 + row)[kAddress], 16, 16, kLoad ? "ldmatrix" : "stmatrix")
                    .data();
            for (uint32_t column = 0; column < 8; ++column) {
                const uint32_t fragment_row = kTransposed ? column : row, fragment_column = kTransposed ? row : column;
                uint32_t& pair = words_of(collective, fragment_row * 4 + fragment_column / 2)[kRegisters + matrix];
                auto* half = reinterpret_cast<uint8_t*>(&pair) + fragment_column % 2 * 2;
                if (kLoad) {
                    memcpy(half, at + column * 2, 2);
                } else {
                    memcpy(at + column * 2, half, 2);
                }
            }
        }
    }
}

}  // namespace

void load_matrices(uint32_t* registers, int count, uint32_t shared, bool transposed) {
    const uint64_t words[4] = {static_cast<uint64_t>(count) << 32 | shared};
    Collective& collective = transposed
                                 ? join_collective(kWholeWarp, "ldmatrix.trans", words, 4, move_matrices<true, true>)
                                 : join_collective(kWholeWarp, "ldmatrix", words, 4, move_matrices<true, false>);
    memcpy(registers, &words_of(collective, current_thread->linear % 32)[kRegisters],
           sizeof(uint32_t) * static_cast<size_t>(count));
    leave_collective(collective);
}

void store_matrices(const uint32_t* registers, int count, uint32_t shared, bool transposed) {
    uint64_t words[4] = {static_cast<uint64_t>(count) << 32 | shared};
    memcpy(&words[1], registers, sizeof(uint32_t) * static_cast<size_t>(count));
    leave_collective(transposed ? join_collective(kWholeWarp, "stmatrix.trans", words, 4, move_matrices<false, true>)
                                : join_collective(kWholeWarp, "stmatrix", words, 4, move_matrices<false, false>));
}

void multiply_fragments(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, bool bf16) {
    const uint32_t mine[8] = {a[0], a[1], a[2], a[3], b0, b1, 0, 0};
    uint64_t words[4];
    memcpy(words, mine, sizeof mine);
    Collective& collective = join_collective(kWholeWarp, bf16 ? "mma bf16" : "mma f16", words, 3);
    const auto element_of = [&](uint32_t lane, uint32_t index, uint32_t half) {
        uint16_t bits;
        memcpy(&bits, reinterpret_cast<const uint8_t*>(collective.payload[lane]) + index * 4 + half * 2, sizeof bits);
        return to_float(bits, bf16);
    };
    const uint32_t lane = current_thread->linear % 32;
    for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t row = lane / 4, upper = i / 2;  // row + 8 * upper
        const uint32_t column = lane % 4 * 2 + i % 2;
        float sum = d[i];
        for (uint32_t k = 0; k < 16; ++k) {
            const uint32_t in_group = k % 8 / 2;
            sum += element_of(row * 4 + in_group, upper + k / 8 * 2, k % 2) *
                   element_of(column * 4 + in_group, 4 + k / 8, k % 2);
        }
        d[i] = sum;
    }
    leave_collective(collective);
}

void check_aligned(const void* global, size_t alignment) {
    if (reinterpret_cast<uintptr_t>(global) % alignment != 0) {
        machine().fail("global address %p is not aligned to %zu bytes", global, alignment);
    }
}

}  // namespace tokenspeed::emulator
