// How moe_block.cu comes to its list of entries: the norm and the launch's number, the top-k of each token, the experts
// that any token chose, and the units that a block takes of them.
#pragma once
#include <ptx.h>
#include <reduce.h>

#include "dense/add_norm.h"
#include "moe_block.h"
#include "moe_select.h"

namespace tokenspeed::moe_layer {

// The next unit that the block has taken, or -1. A whole warp of those that follow the list.
__device__ __forceinline__ int next_unit(Control& control, Cursor& at) {
    ptx::mbarrier_wait(&control.units_full[at.slot], at.phase);
    const int unit = control.units[at.slot];
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&control.units_empty[at.slot]);
    at.next(kUnitSlots);
    return unit;
}

// The norm of x + residual in `rows`, and the launch's number, which comes behind x: an acquire would go first.
__device__ inline void begin(const Arguments& a, Control& control, uint8_t* rows) {
    uint32_t launches = 0;
    const auto after_loads = [&] {
        if (threadIdx.x == 0) launches = *a.p.scratch;
    };
    const auto after_sum = [&] {
        if (threadIdx.x != 0) return;
        control.launch = launches + 1;
        ptx::mbarrier_arrive(&control.begun);
        // Whoever sees this count knows that the number has been read.
        ptx::add_relaxed(&counters_of(a.p.scratch, launches + 1).projected, 1);
    };
    if (a.alone) {
        stage_norm<true>(a.p, rows, a.layout.row_pitch, control.squares, after_loads, after_sum);
    } else {
        stage_norm<false>(a.p, rows, a.layout.row_pitch, control.squares, after_loads, after_sum);
    }
}

// Each token's choices by a warp, then the list of entries by the first: experts here that any token chose, in the
// order of the first choice. Weights come after the list: nobody waits for them.
template <int kPerLane>
__device__ void list_entries(const Arguments& a, Control& control, uint32_t* first) {
    const MoeBlock& p = a.p;
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, choices = p.tokens * p.top_k;
    Choice choice{};
    if (warp < p.tokens) {
        uint32_t bits[kPerLane];
        ptx::wait_tagged(bits, a.logits + warp * p.experts + lane * kPerLane, control.launch);
        __syncwarp();
        float logits[kPerLane];
#pragma unroll
        for (int i = 0; i < kPerLane; ++i) logits[i] = __uint_as_float(bits[i]);
        choice = select_experts(logits, p.top_k);
        const int flat = warp * p.top_k + lane, here = choice.expert - p.first_expert;
        const bool held = lane < p.top_k && here >= 0 && here < p.held && !is_padding(p.sequences, warp);
        if (lane < p.top_k) control.chosen[flat] = static_cast<int16_t>(held ? here : -1);
        if (a.alone) {  // no two choices are the same
            const unsigned all = __ballot_sync(kAllLanes, held);
            if (held) {
                const int entry = __popc(all & ((1u << lane) - 1));
                control.experts[entry] = static_cast<uint16_t>(here);
                control.ranks[entry][0] = static_cast<uint8_t>(lane);
            }
            if (lane == 0) control.entries = __popc(all);
        } else if (held) {
            atomicMin(first + here, static_cast<uint32_t>(flat));
        }
    }
    if (!a.alone) {
        ptx::named_barrier_sync(kConsumerBarrier, kConsumerThreads);
        if (warp == 0) {
            int entries = 0;
#pragma unroll 1
            for (int base = 0; base < choices; base += 32) {
                const int flat = base + lane, here = flat < choices ? control.chosen[flat] : -1;
                const bool leads = here >= 0 && first[here] == static_cast<uint32_t>(flat);
                const unsigned leaders = __ballot_sync(kAllLanes, leads);
                if (leads) {
                    const int entry = entries + __popc(leaders & ((1u << lane) - 1));
                    control.experts[entry] = static_cast<uint16_t>(here);
                    control.entry_of[flat] = static_cast<uint8_t>(entry);
                }
                entries += __popc(leaders);
            }
            __syncwarp();
#pragma unroll 1
            for (int flat = lane; flat < choices; flat += 32) {
                const int here = control.chosen[flat];
                if (here < 0) continue;
                const int token = flat / p.top_k;
                control.ranks[control.entry_of[first[here]]][token] = static_cast<uint8_t>(flat - token * p.top_k);
            }
            if (lane == 0) control.entries = entries;
        }
    }
    if (warp == 0) {
        __syncwarp();
        if (lane == 0) ptx::mbarrier_arrive(&control.listed);
    }
    if (warp < p.tokens) {
        const float weight = weight_of(choice, p.top_k);
        if (lane < p.top_k) control.weights[warp * p.top_k + lane] = to_float(__float2bfloat16(weight));
    }
}

}  // namespace tokenspeed::moe_layer
