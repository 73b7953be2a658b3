// What a TMA tensor map describes; shared by both versions of ptx_tma.h.
#pragma once
#include <cstdint>

namespace tokenspeed {

enum class TensorElement : uint8_t { kBf16, kF16, kF32, kU8 };

constexpr uint32_t element_bytes(TensorElement element) {
    return element == TensorElement::kF32 ? 4 : element == TensorElement::kU8 ? 1 : 2;
}

// How 16-byte pieces of a box row are permuted in shared memory: piece p of the 32, 64 or 128 bytes around shared
// address a lands at p ^ (a >> 7 & mask). The row of a box is exactly that wide; the destination is aligned to
// 1024 bytes.
enum class Swizzle : uint8_t { kNone, k32, k64, k128 };

// Dimensions run from the innermost, which is contiguous, to the outermost.
template <int kRank>
struct TensorLayout {
    const void* base;         // aligned to 16 bytes
    uint64_t sizes[kRank];    // elements
    uint64_t strides[kRank];  // bytes from one index to the next, multiples of 16; strides[0] is not read
    uint32_t box[kRank];      // elements moved at once, at most 256 each; the innermost a multiple of 16 bytes
};

}  // namespace tokenspeed
