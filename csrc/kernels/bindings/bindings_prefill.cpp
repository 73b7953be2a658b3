// The operator of a prefill step that is no neighbour of another: the gated delta rule. Contract: tokenspeed/ops.
#include "binding.h"
#include "kernels.h"

namespace tokenspeed::binding {
namespace {

std::optional<Tensor> gated_delta_rule_prefill(const Tensor& qkv, const Tensor& a, const Tensor& b, const Tensor& a_log,
                                               const Tensor& dt_bias, const Tensor& state, const Tensor& ring,
                                               const Tensor& cursor, const Tensor& cu_seqlens,
                                               const Tensor& context_lens, const Tensor& read_slot,
                                               const Tensor& write_slot, const Tensor& snapshots, int64_t longest) {
    const auto row_stride = [](const Tensor& t) { return t.size(0) > 1 ? t.stride(0) : t.size(1); };
    const int64_t tokens = qkv.size(0), channels = qkv.size(1), sequences = context_lens.size(0);
    const int64_t slots = state.size(0), value_heads = state.size(1);
    const int64_t key_heads = (channels / 128 - value_heads) / 2;
    bool fits = has_kernels(qkv) && tokens <= kMaxIndex && is_float(state) && is_float(ring) && is_int32(cursor) &&
                is_float(a_log) && is_float(dt_bias) && key_heads > 0 && value_heads % key_heads == 0 &&
                channels == (2 * key_heads + value_heads) * 128 && has_shape(state, {slots, value_heads, 128, 128}) &&
                has_shape(ring, {slots, ring.size(1), channels - key_heads * 128 + value_heads}) &&
                has_shape(cursor, {slots, value_heads}) && has_shape(a, {tokens, value_heads}) &&
                has_shape(b, {tokens, value_heads}) && has_shape(cu_seqlens, {sequences + 1}) &&
                has_shape(read_slot, {sequences}) && has_shape(write_slot, {sequences}) &&
                has_shape(snapshots, {snapshots.size(0), 3});
    const bool gates_are_float = is_float(a) && is_float(b);
    fits = fits && is_bf16(qkv) && (gates_are_float || (is_bf16(a) && is_bf16(b)));
    for (const Tensor* projection : {&qkv, &a, &b}) fits = fits && (tokens == 0 || projection->stride(1) == 1);
    for (const Tensor* record : {&state, &ring, &cursor}) fits = fits && is_dense_from(*record, 1);
    for (const Tensor* weight : {&a_log, &dt_bias}) fits = fits && weight->is_contiguous();
    for (const Tensor* integers : {&cu_seqlens, &context_lens, &read_slot, &write_slot, &snapshots}) {
        fits = fits && is_int32(*integers) && integers->is_contiguous();
    }
    if (!fits) return std::nullopt;

    GatedDeltaRulePrefill arguments{.qkv = data(qkv),
                                    .a = a.data_ptr(),
                                    .b = b.data_ptr(),
                                    .gates_are_float = gates_are_float,
                                    .qkv_stride = row_stride(qkv),
                                    .a_stride = row_stride(a),
                                    .b_stride = row_stride(b),
                                    .a_log = data<float>(a_log),
                                    .dt_bias = data<float>(dt_bias),
                                    .state = data<float>(state),
                                    .ring = data<float>(ring),
                                    .cursor = data<int32_t>(cursor),
                                    .state_stride = state.stride(0),
                                    .ring_stride = ring.stride(0),
                                    .cursor_stride = cursor.stride(0),
                                    .cu_seqlens = data<int32_t>(cu_seqlens),
                                    .context_lens = data<int32_t>(context_lens),
                                    .read_slot = data<int32_t>(read_slot),
                                    .write_slot = data<int32_t>(write_slot),
                                    .snapshots = data<int32_t>(snapshots),
                                    .out = nullptr,
                                    .tokens = static_cast<int>(tokens),
                                    .key_heads = static_cast<int>(key_heads),
                                    .value_heads = static_cast<int>(value_heads),
                                    .ring_rows = static_cast<int>(ring.size(1)),
                                    .ring_width = static_cast<int>(ring.size(2)),
                                    .sequences = static_cast<int>(sequences),
                                    .snapshot_count = static_cast<int>(snapshots.size(0)),
                                    .longest = std::min(longest, tokens),
                                    .slots = slots,
                                    .workspace = nullptr};
    if (!gated_delta_rule_prefill_supported(arguments)) return std::nullopt;
    Tensor out = new_tensor(qkv, {tokens, value_heads, 128});
    arguments.out = data(out);
    Tensor workspace = new_tensor(qkv, {gated_delta_rule_prefill_workspace(arguments)}, ScalarType::Byte);
    arguments.workspace = data<uint8_t>(workspace);
    const Launch launch(qkv);
    launch.keep(workspace);
    check_launch(tokenspeed::gated_delta_rule_prefill(arguments, launch.stream()), "gated_delta_rule_prefill");
    return out;
}

}  // namespace

TOKENSPEED_KERNELS(library) {
    TOKENSPEED_KERNEL(library, gated_delta_rule_prefill);
}

}  // namespace tokenspeed::binding
