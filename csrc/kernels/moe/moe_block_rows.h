// The activations of moe_block.cu on their way into the row slots of shared memory, the shared expert's and those of
// each unit of down: by one warp.
#pragma once
#include <bf16x8.h>
#include <ptx.h>
#include <reduce.h>

#include "moe_block.h"
#include "moe_block_entries.h"

namespace tokenspeed::moe_layer {

// Writes eight columns of a row of activations, piece `piece`, into a row slot, if they are there; for e4m3 weights as
// fp16 and, behind the row, what each group of 128 was divided by. A whole warp; lanes of a group have neighbours.
template <typename Weight>
__device__ __forceinline__ void store_piece(uint8_t* row, int piece, int depth, uint4 packed, bool inside) {
    if constexpr (kScaled<Weight>) {
        float divisor;
        packed = row_to_half<kGroupLanes>(inside ? packed : uint4{}, divisor);
        if (inside && piece % kGroupLanes == 0) {
            *reinterpret_cast<float*>(row + depth * 2 + piece / kGroupLanes * 4) = divisor;
        }
    }
    if (inside) store_16(row + piece * 16, packed);
}

// Brings a choice's activations from tagged words into a row slot. One warp.
template <typename Weight>
__device__ inline void bring_words(const uint64_t* words, uint8_t* row, int width, uint32_t launch) {
    const int lane = threadIdx.x % 32, pieces = width / 8;
#pragma unroll 1
    for (int base = 0; base < pieces; base += kWordPieces) {
        const int piece = base + lane;
        uint32_t values[8] = {};
        uint32_t (&first)[4] = *reinterpret_cast<uint32_t (*)[4]>(values);
        if (piece + 32 < pieces) {
            ptx::wait_tagged(values, words + words_of(piece), launch);
        } else if (piece < pieces) {
            ptx::wait_tagged(first, words + words_of(piece), launch);
        }
        __syncwarp();
        store_piece<Weight>(row, piece, width, make_uint4(values[0], values[1], values[2], values[3]), piece < pieces);
        if (base + 32 >= pieces) break;
        store_piece<Weight>(row, piece + 32, width, make_uint4(values[4], values[5], values[6], values[7]),
                            piece + 32 < pieces);
    }
}

// Writes the shared expert's activations, silu(gate) * up, into the first row slot, where the gates come; up comes into
// the other, which nobody has used yet. So all is on its way at once, and the code is short. One warp.
template <typename Weight>
__device__ inline void activate_shared(const Arguments& a, uint8_t* slots) {
    const MoeBlock& p = a.p;
    const int lane = threadIdx.x % 32, pieces = p.shared / 8, slot_bytes = a.layout.tokens * a.layout.slot_pitch;
    static_assert(kRowSlots == 2);
#pragma unroll 1
    for (int token = 0; token < p.tokens; ++token) {
        const __nv_bfloat16* gate = a.projected + token * a.projected_pitch;
        uint8_t* row = slots + token * a.layout.slot_pitch;
#pragma unroll 1
        for (int piece = lane; piece < pieces; piece += 32) {
            ptx::cp_async(row + piece * 16, gate + piece * 8);
            ptx::cp_async(row + slot_bytes + piece * 16, gate + p.shared + piece * 8);
        }
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
#pragma unroll 1
    for (int token = 0; token < p.tokens; ++token) {
        uint8_t* row = slots + token * a.layout.slot_pitch;
#pragma unroll 1
        for (int base = 0; base < pieces; base += 32) {
            const int piece = base + lane;
            uint4 packed{};
            if (piece < pieces) {
                const Float8 g = unpack(*reinterpret_cast<const uint4*>(row + piece * 16));
                const Float8 u = unpack(*reinterpret_cast<const uint4*>(row + slot_bytes + piece * 16));
                const Float8 y = gated(g, u);
                packed = pack(y);
            }
            store_piece<Weight>(row, piece, p.shared, packed, piece < pieces);
        }
    }
}

// Brings activations into the row slots: those of the shared expert, then those of each unit of down. One warp.
template <typename Weight>
__device__ void bring_rows(const Arguments& a, Control& control, uint8_t* slots) {
    const MoeBlock& p = a.p;
    const Work<Weight> work(p);
    const int lane = threadIdx.x % 32, slot_bytes = a.layout.tokens * a.layout.slot_pitch;
    ptx::mbarrier_wait(&control.begun, 0);
    CounterSet& counters = counters_of(p.scratch, control.launch);
    Cursor at, at_units;
    if (static_cast<int>(blockIdx.x) < work.column_tiles) {
        if (lane == 0) ptx::wait_at_least(&counters.projected, work.projections(p.tokens));
        __syncwarp();
        activate_shared<Weight>(a, slots);
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&control.rows_full[0]);
        at.next(kRowSlots);
    }
    ptx::mbarrier_wait(&control.listed, 0);
    const int gate_up_units = control.entries * work.gate_up_tiles, pieces = p.width / 8;
    for (int unit; (unit = next_unit(control, at_units)) >= 0;) {
        if (unit < gate_up_units) continue;
        const int entry = (unit - gate_up_units) / work.down_tiles;
        const bool chose = lane < p.tokens && control.ranks[entry][lane] != kNobody;
        unsigned left = __ballot_sync(kAllLanes, chose);
        if (!a.alone) {
            if (lane == 0) ptx::wait_at_least(&counters.activated[entry], __popc(left) * work.gate_up_tiles);
            __syncwarp();
        }
        ptx::mbarrier_wait(&control.rows_empty[at.slot], at.phase ^ 1);
        uint8_t* slot = slots + at.slot * slot_bytes;
        if (a.alone && left != 0) {
            bring_words<Weight>(a.words + int64_t{control.ranks[entry][0]} * words_pitch(p.width), slot, p.width,
                                control.launch);
            left = 0;
        }
#pragma unroll 1
        for (; left != 0; left &= left - 1) {
            const int token = __ffs(static_cast<int>(left)) - 1;
            const auto* row = a.activations + int64_t{token * p.top_k + control.ranks[entry][token]} * p.width;
#pragma unroll 1
            for (int base = 0; base < pieces; base += kBatch * 32) {
                uint4 values[kBatch];
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    const int piece = base + i * 32 + lane;
                    if (piece < pieces) values[i] = ptx::load_16_no_allocate(row + piece * 8);
                }
#pragma unroll
                for (int i = 0; i < kBatch; ++i) {
                    const int piece = base + i * 32 + lane;
                    if (base + i * 32 >= pieces) break;
                    store_piece<Weight>(slot + token * a.layout.slot_pitch, piece, p.width, values[i], piece < pieces);
                }
            }
        }
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&control.rows_full[at.slot]);
        at.next(kRowSlots);
    }
}

}  // namespace tokenspeed::moe_layer
