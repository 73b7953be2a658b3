// What the parts of linear.cu share: the sizes of tiles, slabs and pieces, what the type of weights decides, and the
// layout of shared memory.
#pragma once
#include <ptx.h>

#include <type_traits>

#include "fp8.h"
#include "kernels.h"

namespace tokenspeed::linear_product {

constexpr int kTileRows = 16;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * 32;
constexpr int kRowBytes = 128;  // of weights, in a piece: what a warp copies of a slab
constexpr int kPieceBytes = kTileRows * kRowBytes;
constexpr int kSlabBytes = kWarps * kPieceBytes;
constexpr int kChunk = 8;                  // elements of x in 16 bytes
constexpr int kChunks = kRowBytes / 16;    // of 16 bytes, in a row of a piece
constexpr int kRowsAtOnce = 32 / kChunks;  // that a warp's copy instruction covers
constexpr int kSumPitch = kTileRows + 4;   // floats; distinct banks for the four lanes that hold one row's sums
constexpr int kAtOnce = 4;                 // 16-byte loads of x or residual that a thread has under way
constexpr int kMaxClusterTiles = 12;       // tiles a cluster may own: what its exchange buffer holds

// What the type of weights decides: bf16, or E4m3 with a scale for every block of 128 x 128.
template <typename Weight>
struct Format {
    static constexpr bool kScaled = std::is_same_v<Weight, E4m3>;
    static constexpr int kColumns = kRowBytes / static_cast<int>(sizeof(Weight));  // of a slab, per warp
    static constexpr int kSlab = kWarps * kColumns;                                // columns: 512 or 1024
    static constexpr int kXChunks = 2 / static_cast<int>(sizeof(Weight));  // of 16 bytes, that meet 16 of a weight row
    // Elements after a row of the operand: the eight lanes of a read, of two rows, meet each bank once.
    static constexpr int kOperandPad = kScaled ? 8 : 32;

    // Elements in a row of the operand: the columns of this block, in whole slabs, and the padding.
    __host__ __device__ static constexpr int operand_pitch(int slabs) { return slabs * kSlab + kOperandPad; }
    // Floats behind a row of the operand's rows: what a group of its columns was divided by.
    __host__ __device__ static constexpr int groups(int slabs) { return kScaled ? slabs * kWarps : 0; }
    // Bytes of all that, up to a multiple of 128.
    __host__ __device__ static constexpr int operand_bytes(int rows, bool norm, int slabs) {
        return ((rows + norm) * operand_pitch(slabs) * 2 + rows * groups(slabs) * 4 + 127) / 128 * 128;
    }
};
static_assert(Format<E4m3>::kColumns == kScaleBlock && kScaleBlock % kTileRows == 0, "one scale a piece");
constexpr int kMaxScales = 32;  // slabs of e4m3 a block: a warp's scales of a tile are one a lane

// How x becomes the operand, which is made in shared memory before the first tile: copied, by silu_mul, or by the
// residual sum and its norm.
enum class Operand { kCopied, kSiluMul, kAddNorm };

// Whether rows of bf16 may go on below the weight.
template <typename Weight, Operand kOperand>
constexpr bool kTakesTail = Format<Weight>::kScaled && kOperand != Operand::kSiluMul;

// Whether two blocks may share a multiprocessor and a long product.
template <int kRows, Operand kOperand>
constexpr bool kTakesPairs = kRows == 1 && kOperand == Operand::kAddNorm;

template <int kRows, bool kDeep>
struct alignas(128) Storage {  // of dynamic shared memory; kRows: rows of x, 1, 8 or 16
    static constexpr int kStages = kDeep ? (kRows == 1 ? 11 : 8) : (kRows == 1 ? 6 : 4);
    static constexpr int kHeldTiles = kRows == 1 ? 4 : 1;     // whose sums wait for one barrier
    float partial[2][kHeldTiles][kWarps][kRows * kSumPitch];  // two sets in turn need one barrier each
    float exchange[kMaxClusterTiles * kRows * kTileRows];     // [source rank][own tile][row of x][weight row]
    float squares[kWarps];
    uint64_t exchanged;  // mbarrier: the sums of this block's tiles are there
    // Then the operand, [rows][operand_pitch], behind it a row of norm weights, [rows][groups] floats, and, from a
    // multiple of 128 bytes on (or each row of a piece would lie in two lines), the ring,
    // [stages][kWarps][kPieceBytes].
};
constexpr int kHalfSharedLimit = 113 * 1024;  // where two share a multiprocessor
constexpr int kShortShare = 10;               // pieces
constexpr int kFirstCopies = 3;               // before the wait, of a share that asks for x early

// The longest share, in pieces, of one row that asks for x early: the ring; behind a norm more of e4m3, which takes
// twice the arithmetic a piece, all of it once x is there.
template <typename Weight, Operand kOperand, int kStages>
constexpr int kMaxEarly = Format<Weight>::kScaled && kOperand == Operand::kAddNorm ? kStages * 3 / 2 : kStages;

}  // namespace tokenspeed::linear_product
