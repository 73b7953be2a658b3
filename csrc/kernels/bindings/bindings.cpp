// Norms, gated sums, convolution, attention prologue, copies and routing as implementations of torch.ops.tokenspeed.*;
// contracts: tokenspeed/ops.
#include "binding.h"
#include "kernels.h"
#include "norms.h"

namespace tokenspeed::binding {
namespace {

std::optional<Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    if (x.dim() == 0 || !fits_norm(x, weight) || !has_vector_rows(x)) return std::nullopt;
    const bool strided = x.dim() == 2;  // more dimensions collapse only where they are contiguous
    if (!strided && !x.is_contiguous()) return std::nullopt;
    const int64_t width = weight.numel(), rows = x.numel() / width;
    if (rows > kMaxIndex) return std::nullopt;
    Tensor out = torch::stable::new_empty(x, x.sizes());
    const Launch launch(x);
    check_launch(tokenspeed::rms_norm(data(x), strided ? x.stride(0) : width, data(weight), data(out), rows,
                                      static_cast<int>(width), static_cast<float>(eps), launch.stream()),
                 "rms_norm");
    return out;
}

std::optional<std::tuple<Tensor, Tensor>> add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight,
                                                       double eps) {
    if (!fits_add_norm(x, residual, weight)) return std::nullopt;
    Tensor out = torch::stable::new_empty(x, x.sizes()), total = torch::stable::new_empty(x, x.sizes());
    const Launch launch(x);
    check_launch(
        tokenspeed::add_rms_norm(data(x), x.stride(0), data(residual), data(weight), data(out), data(total), x.size(0),
                                 static_cast<int>(weight.numel()), static_cast<float>(eps), launch.stream()),
        "add_rms_norm");
    return std::make_tuple(out, total);
}

std::optional<Tensor> gated_rms_norm(const Tensor& x, const Tensor& gate, const Tensor& weight, double eps) {
    if (!fits_gated_norm(x, gate, weight)) return std::nullopt;
    Tensor out = torch::stable::new_empty(x, x.sizes());
    const Launch launch(x);
    check_launch(tokenspeed::gated_rms_norm(data(x), x.stride(0), x.stride(1), data(gate), gate.stride(0),
                                            gate.stride(1), data(weight), data(out), x.size(0),
                                            static_cast<int>(x.size(1)), static_cast<float>(eps), launch.stream()),
                 "gated_rms_norm");
    return out;
}

std::optional<Tensor> silu_mul(const Tensor& x) {
    if (!fits_silu_mul(x)) return std::nullopt;
    const int64_t rows = x.size(0), width = x.size(1) / 2;
    Tensor out = new_tensor(x, {rows, width});
    const Launch launch(x);
    check_launch(tokenspeed::silu_mul(data(x), x.stride(0), data(out), rows, static_cast<int>(width), launch.stream()),
                 "silu_mul");
    return out;
}

bool add_sigmoid_gated(const Tensor& y, const Tensor& x, const Tensor& gate) {
    const bool fits =
        fits_gated_sum(y, gate) && is_bf16(x) && has_shape(x, {y.size(0), y.size(1)}) && has_vector_rows(x);
    if (!fits) return false;
    const Launch launch(y);
    check_launch(tokenspeed::add_sigmoid_gated(data(y), y.stride(0), data(x), x.stride(0), data(gate), gate.stride(0),
                                               y.size(0), static_cast<int>(y.size(1)), launch.stream()),
                 "add_sigmoid_gated");
    return true;
}

std::optional<Tensor> attention_prologue(const Tensor& qkv, const Tensor& q_weight, const Tensor& k_weight,
                                         const Tensor& cos_sin, const Tensor& kv, const Tensor& kv_slots, double eps) {
    const int64_t tokens = qkv.size(0), kv_heads = kv.size(2), rotary = cos_sin.size(1);
    const int64_t q_heads = qkv.size(1) / (2 * kHeadDim) - kv_heads;
    const bool shapes = qkv.size(1) == 2 * (q_heads + kv_heads) * kHeadDim && q_heads >= 0 && kv.size(1) == 2 &&
                        has_shape(q_weight, {kHeadDim}) && has_shape(k_weight, {kHeadDim}) &&
                        cos_sin.size(0) == tokens && has_shape(kv_slots, {tokens});
    const bool pairs_on_lanes = rotary >= 16 && rotary <= kHeadDim && (rotary & (rotary - 1)) == 0;
    const bool fits = shapes && has_kernels(qkv) && is_bf16(qkv) && is_bf16(q_weight) && is_bf16(k_weight) &&
                      is_float(cos_sin) && (is_bf16(kv) || is_e4m3(kv)) && is_int64(kv_slots) &&
                      kv.size(4) == kHeadDim && is_dense_from(kv, 1) && has_vector_rows(kv) && has_vector_rows(qkv) &&
                      q_weight.is_contiguous() && is_aligned(q_weight) && k_weight.is_contiguous() &&
                      is_aligned(k_weight) && cos_sin.is_contiguous() && is_aligned(cos_sin) &&
                      kv_slots.is_contiguous() && pairs_on_lanes && tokens * (q_heads + 2 * kv_heads) <= kMaxIndex;
    if (!fits) return std::nullopt;
    Tensor q = new_tensor(qkv, {tokens, q_heads, kHeadDim});
    const Launch launch(qkv);
    const AttentionPrologue arguments{data(qkv),
                                      qkv.stride(0),
                                      data(q_weight),
                                      data(k_weight),
                                      data<float>(cos_sin),
                                      kv.data_ptr(),
                                      kv.stride(0),
                                      data<int64_t>(kv_slots),
                                      data(q),
                                      tokens,
                                      static_cast<int>(q_heads),
                                      static_cast<int>(kv_heads),
                                      static_cast<int>(kv.size(3)),
                                      static_cast<int>(rotary),
                                      static_cast<float>(eps),
                                      is_e4m3(kv)};
    check_launch(tokenspeed::attention_prologue(arguments, launch.stream()), "attention_prologue");
    return q;
}

std::optional<Tensor> causal_conv1d(const Tensor& x, const Tensor& weight, const Tensor& window,
                                    const Tensor& cu_seqlens, const Tensor& context_lens, const Tensor& read_slot,
                                    const Tensor& write_slot, const Tensor& snapshots) {
    const int64_t channels = x.size(1), sequences = context_lens.size(0);
    bool fits = has_kernels(x) && is_bf16(x) && is_bf16(weight) && is_bf16(window) &&
                has_shape(weight, {channels, kConvTaps}) && window.size(2) == channels && window.size(1) >= kConvTaps &&
                has_shape(cu_seqlens, {sequences + 1}) && has_shape(read_slot, {sequences}) &&
                has_shape(write_slot, {sequences}) && has_shape(snapshots, {snapshots.size(0), 3}) &&
                weight.is_contiguous() && channels % 8 == 0 && has_vector_rows(x) && is_aligned(weight) &&
                has_vector_rows(window) && x.size(0) <= kMaxIndex;
    for (const Tensor* integers : {&cu_seqlens, &context_lens, &read_slot, &write_slot, &snapshots}) {
        fits = fits && is_int32(*integers) && integers->is_contiguous();
    }
    if (!fits) return std::nullopt;
    Tensor out = torch::stable::new_empty(x, x.sizes());
    const Launch launch(x);
    const CausalConv1d arguments{data(x),
                                 x.stride(0),
                                 data(weight),
                                 data(window),
                                 window.stride(0),
                                 window.stride(1),
                                 data<int32_t>(cu_seqlens),
                                 data<int32_t>(context_lens),
                                 data<int32_t>(read_slot),
                                 data<int32_t>(write_slot),
                                 data<int32_t>(snapshots),
                                 data(out),
                                 static_cast<int>(x.size(0)),
                                 static_cast<int>(channels),
                                 static_cast<int>(window.size(1)),
                                 static_cast<int>(sequences),
                                 static_cast<int>(snapshots.size(0))};
    check_launch(tokenspeed::causal_conv1d(arguments, launch.stream()), "causal_conv1d");
    return out;
}

bool fits_copy(const Tensor& arena, const Tensor& source, const Tensor& destination) {
    return has_kernels(arena) && has_vector_rows(arena) && is_int32(source) && is_int32(destination) &&
           source.is_contiguous() && destination.is_contiguous() && has_shape(destination, {source.size(0)}) &&
           source.size(0) <= kMaxIndex;
}

bool copy_states(const Tensor& slots, const Tensor& source, const Tensor& destination) {
    if (!fits_copy(slots, source, destination) || slots.size(1) % 16 != 0) return false;
    const Launch launch(slots);
    check_launch(tokenspeed::copy_states(data<uint8_t>(slots), slots.stride(0), slots.size(1), data<int32_t>(source),
                                         data<int32_t>(destination), static_cast<int>(source.size(0)), launch.stream()),
                 "copy_states");
    return true;
}

bool copy_pages(const Tensor& pages, const Tensor& source, const Tensor& destination, const Tensor& rows) {
    const auto element = static_cast<int64_t>(pages.element_size());
    const int64_t row_bytes = pages.size(5) * element;
    const bool fits = fits_copy(pages, source, destination) && is_int32(rows) && rows.is_contiguous() &&
                      has_shape(rows, {source.size(0)}) && is_dense_from(pages, 1) && row_bytes % 16 == 0;
    if (!fits) return false;
    const Launch launch(pages);
    const int64_t boxes = pages.size(1) * pages.size(2) * pages.size(3);
    check_launch(tokenspeed::copy_pages(data<uint8_t>(pages), pages.stride(0) * element, static_cast<int>(boxes),
                                        static_cast<int>(pages.size(4)), static_cast<int>(row_bytes),
                                        data<int32_t>(source), data<int32_t>(destination), data<int32_t>(rows),
                                        static_cast<int>(source.size(0)), launch.stream()),
                 "copy_pages");
    return true;
}

std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor>> moe_route(const Tensor& logits, int64_t top_k,
                                                                    const std::optional<Tensor>& context_lens) {
    const int64_t tokens = logits.size(0), experts = logits.size(1);
    bool fits = has_kernels(logits) && is_bf16(logits) && has_vector_rows(logits) &&
                (experts == 256 || experts == 512) && top_k >= 1 && top_k <= kMaxTopK && tokens * top_k <= kMaxIndex;
    SequenceRows sequences{nullptr, 1};
    if (context_lens) {
        const int64_t count = context_lens->size(0);
        fits = fits && is_int32(*context_lens) && context_lens->is_contiguous() && count > 0 && tokens % count == 0;
        if (fits) sequences = {data<int32_t>(*context_lens), static_cast<int>(tokens / count)};
    }
    if (!fits) return std::nullopt;
    Tensor weights = new_tensor(logits, {tokens, top_k});
    Tensor chosen = new_tensor(logits, {tokens, top_k}, ScalarType::Int);
    Tensor order = new_tensor(logits, {tokens * top_k}, ScalarType::Int);
    Tensor offsets = new_tensor(logits, {experts + 1}, ScalarType::Int);
    const Launch launch(logits);
    check_launch(tokenspeed::moe_route(data(logits), logits.stride(0), sequences, data(weights), data<int32_t>(chosen),
                                       data<int32_t>(order), data<int32_t>(offsets), static_cast<int>(tokens),
                                       static_cast<int>(experts), static_cast<int>(top_k), launch.stream()),
                 "moe_route");
    return std::make_tuple(weights, chosen, order, offsets);
}

}  // namespace

TOKENSPEED_KERNELS(library) {
    TOKENSPEED_KERNEL(library, rms_norm);
    TOKENSPEED_KERNEL(library, add_rms_norm);
    TOKENSPEED_KERNEL(library, gated_rms_norm);
    TOKENSPEED_KERNEL(library, silu_mul);
    TOKENSPEED_KERNEL(library, add_sigmoid_gated);
    TOKENSPEED_KERNEL(library, attention_prologue);
    TOKENSPEED_KERNEL(library, causal_conv1d);
    TOKENSPEED_KERNEL(library, copy_states);
    TOKENSPEED_KERNEL(library, copy_pages);
    TOKENSPEED_KERNEL(library, moe_route);
}

}  // namespace tokenspeed::binding
