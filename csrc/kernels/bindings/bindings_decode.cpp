// The operators of a decode step: the Gated DeltaNet mixer, the small-batch product, sampling. Contracts:
// tokenspeed/ops.
#include "binding.h"
#include "groups.h"
#include "kernels.h"

namespace tokenspeed::binding {

namespace {

// The stride between rows, where there is more than one.
int64_t row_stride(const Tensor& t) {
    return t.size(0) > 1 ? t.stride(0) : 0;
}

bool is_slot_record(const Tensor& t, int64_t slots) {
    return t.size(0) == slots && is_dense_from(t, 1);
}

std::optional<Tensor> gated_delta_rule_decode(const Tensor& qkv, const Tensor& z, const Tensor& a, const Tensor& b,
                                              const Tensor& conv_weight, const Tensor& a_log, const Tensor& dt_bias,
                                              const Tensor& norm_weight, double eps, const Tensor& state,
                                              const Tensor& ring, const Tensor& cursor, const Tensor& window,
                                              const Tensor& context_lens, const Tensor& read_slot,
                                              const Tensor& write_slot, bool settled) {
    const int64_t slots = state.size(0), value_heads = state.size(1), sequences = context_lens.size(0);
    const int64_t channels = qkv.size(1), key_heads = (channels / 128 - value_heads) / 2;
    bool fits = has_kernels(qkv) && sequences > 0 && qkv.size(0) > 0 && qkv.size(0) <= kMaxIndex && is_bf16(window) &&
                is_float(state) && is_float(ring) && is_int32(cursor) && conv_weight.size(1) == 4 &&
                state.size(2) == 128 && state.size(3) == 128 && key_heads > 0 && is_float(a_log) && is_float(dt_bias) &&
                (is_float(norm_weight) || is_bf16(norm_weight));
    for (const Tensor* projection : {&qkv, &z, &a, &b}) {
        fits = fits && is_bf16(*projection) && projection->stride(1) == 1;
    }
    for (const Tensor* record : {&state, &ring, &cursor, &window}) fits = fits && is_slot_record(*record, slots);
    for (const Tensor* weight : {&conv_weight, &a_log, &dt_bias, &norm_weight}) fits = fits && weight->is_contiguous();
    for (const Tensor* integers : {&context_lens, &read_slot, &write_slot}) {
        fits = fits && is_int32(*integers) && integers->is_contiguous();
    }
    if (!fits || !is_bf16(conv_weight)) return std::nullopt;

    GatedDeltaRuleDecode arguments{.qkv = data(qkv),
                                   .z = data(z),
                                   .a = data(a),
                                   .b = data(b),
                                   .qkv_stride = row_stride(qkv),
                                   .z_stride = row_stride(z),
                                   .a_stride = row_stride(a),
                                   .b_stride = row_stride(b),
                                   .conv_weight = data(conv_weight),
                                   .a_log = data<float>(a_log),
                                   .dt_bias = data<float>(dt_bias),
                                   .norm_weight = norm_weight.data_ptr(),
                                   .norm_weight_is_float = is_float(norm_weight),
                                   .eps = static_cast<float>(eps),
                                   .state = data<float>(state),
                                   .ring = data<float>(ring),
                                   .cursor = data<int32_t>(cursor),
                                   .window = data(window),
                                   .state_stride = state.stride(0),
                                   .ring_stride = ring.stride(0),
                                   .cursor_stride = cursor.stride(0),
                                   .window_stride = window.stride(0),
                                   .context_lens = data<int32_t>(context_lens),
                                   .read_slot = data<int32_t>(read_slot),
                                   .write_slot = data<int32_t>(write_slot),
                                   .out = nullptr,
                                   .sequences = static_cast<int>(sequences),
                                   .tokens = static_cast<int>(qkv.size(0) / sequences),
                                   .key_heads = static_cast<int>(key_heads),
                                   .value_heads = static_cast<int>(value_heads),
                                   .channels = static_cast<int>(channels),
                                   .ring_rows = static_cast<int>(ring.size(1)),
                                   .ring_width = static_cast<int>(ring.size(2)),
                                   .window_entries = static_cast<int>(window.size(1)),
                                   .settled = settled};
    if (!gated_delta_rule_decode_supported(arguments)) return std::nullopt;
    Tensor out = new_tensor(z, {z.size(0), z.size(1)});
    arguments.out = data(out);
    const Launch launch(qkv);
    check_launch(tokenspeed::gated_delta_rule_decode(arguments, launch.stream()), "gated_delta_rule_decode");
    return out;
}

using Scale = std::optional<Tensor>;  // of an e4m3 weight
using Tail = std::optional<Tensor>;   // rows of bf16 below it

bool fits_linear(const Tensor& x, const Tensor& weight, const Scale& scale, int64_t inputs,
                 const Tail& tail = std::nullopt) {
    const int64_t rows = weight.size(0), columns = weight.size(1);
    const bool format =
        scale
            ? is_e4m3(weight) && is_float(*scale) && scale->is_contiguous() &&
                  has_shape(*scale, {(rows + kScaleBlock - 1) / kScaleBlock, (columns + kScaleBlock - 1) / kScaleBlock})
            : is_bf16(weight);
    return format && has_kernels(x) && x.dim() == 2 && is_bf16(x) && x.stride(1) == 1 && weight.is_contiguous() &&
           x.size(0) > 0 && x.size(0) <= kLinearMaxRows && rows <= kMaxIndex && columns <= kMaxIndex &&
           inputs == columns &&
           (!tail || (scale && is_bf16(*tail) && tail->dim() == 2 && tail->is_contiguous() && tail->size(0) > 0 &&
                      tail->size(0) <= kMaxIndex && tail->size(1) == columns));
}

int64_t outputs_of(const Tensor& weight, const Tail& tail) {
    return weight.size(0) + (tail ? tail->size(0) : 0);
}

Linear product(const Tensor& x, const Tensor& weight, const Scale& scale, const Tail& tail = std::nullopt) {
    return {.x = data(x),
            .x_stride = row_stride(x),
            .weight = weight.data_ptr(),
            .out = nullptr,
            .out_stride = outputs_of(weight, tail),
            .rows = static_cast<int>(x.size(0)),
            .outputs = static_cast<int>(weight.size(0)),
            .inputs = static_cast<int>(weight.size(1)),
            .scale = scale ? data<float>(*scale) : nullptr,
            .tail = tail ? data(*tail) : nullptr,
            .tail_outputs = tail ? static_cast<int>(tail->size(0)) : 0};
}

bool multiplies_groups(const Tensor& x, const Scale& scale) {
    return scale && x.size(0) > kLinearMaxRows;
}

std::optional<Tensor> linear(const Tensor& x, const Tensor& weight, const Scale& scale, const Tail& tail) {
    if (!tail && multiplies_groups(x, scale)) return linear_of_groups(x, weight, *scale);
    if (!fits_linear(x, weight, scale, x.size(1), tail)) return std::nullopt;
    Linear arguments = product(x, weight, scale, tail);
    if (!linear_supported(arguments)) return std::nullopt;
    // Nine rows and more of long inputs overflow L1, and cuBLAS wins: on an H200, 16 rows, 6144 -> 5120 took 25.2 us
    // against its 18.5, 5120 -> 34816 100 against 91; with up to 4096 inputs the kernel is level or ahead.
    if (!scale && arguments.rows > 8 && arguments.inputs > 4096) return std::nullopt;
    Tensor out = new_tensor(x, {x.size(0), outputs_of(weight, tail)});
    arguments.out = data(out);
    const Launch launch(x);
    check_launch(tokenspeed::linear(arguments, launch.stream()), "linear");
    return out;
}

std::optional<std::tuple<Tensor, Tensor, Tensor>> add_rms_norm_linear(const Tensor& x, const Tensor& residual,
                                                                      const Tensor& norm_weight, double eps,
                                                                      const Tensor& weight, const Scale& scale,
                                                                      const Tail& tail) {
    if (!tail && multiplies_groups(x, scale)) {
        return add_rms_norm_linear_of_groups(x, residual, norm_weight, eps, weight, *scale);
    }
    const bool fits = fits_linear(x, weight, scale, x.size(1), tail) && is_bf16(residual) &&
                      has_shape(residual, {x.size(0), x.size(1)}) && residual.is_contiguous() && is_bf16(norm_weight) &&
                      has_shape(norm_weight, {x.size(1)}) && norm_weight.is_contiguous();
    if (!fits) return std::nullopt;
    Linear arguments = product(x, weight, scale, tail);
    arguments.residual = data(residual);
    arguments.norm_weight = data(norm_weight);
    arguments.eps = static_cast<float>(eps);
    if (!add_rms_norm_linear_supported(arguments)) return std::nullopt;
    Tensor out = new_tensor(x, {x.size(0), outputs_of(weight, tail)});
    Tensor normed = new_tensor(x, {x.size(0), x.size(1)}), sum = new_tensor(x, {x.size(0), x.size(1)});
    arguments.out = data(out);
    arguments.normed = data(normed);
    arguments.sum = data(sum);
    const Launch launch(x);
    check_launch(tokenspeed::add_rms_norm_linear(arguments, launch.stream()), "add_rms_norm_linear");
    return std::make_tuple(out, normed, sum);
}

std::optional<Tensor> silu_mul_linear(const Tensor& x, const Tensor& weight, const Scale& scale) {
    if (multiplies_groups(x, scale)) return silu_mul_linear_of_groups(x, weight, *scale);
    if (x.size(1) % 2 != 0 || !fits_linear(x, weight, scale, x.size(1) / 2)) return std::nullopt;
    Linear arguments = product(x, weight, scale);
    if (!silu_mul_linear_supported(arguments)) return std::nullopt;
    Tensor out = new_tensor(x, {x.size(0), weight.size(0)});
    arguments.out = data(out);
    const Launch launch(x);
    check_launch(tokenspeed::silu_mul_linear(arguments, launch.stream()), "silu_mul_linear");
    return out;
}

std::optional<std::tuple<Tensor, Tensor>> ffn_block(const Tensor& x, const Tensor& residual, const Tensor& norm_weight,
                                                    double eps, const Tensor& gate_up, const Tensor& down,
                                                    const Tensor& scratch) {
    bool fits = has_kernels(x) && x.dim() == 2 && x.size(0) > 0 && x.size(0) <= kFfnBlockTokens && x.stride(1) == 1 &&
                gate_up.dim() == 2 && down.dim() == 2 && is_int32(scratch);
    for (const Tensor* values : {&x, &residual, &norm_weight, &gate_up, &down}) fits = fits && is_bf16(*values);
    for (const Tensor* packed : {&residual, &norm_weight, &gate_up, &down, &scratch}) {
        fits = fits && packed->is_contiguous();
    }
    if (!fits) return std::nullopt;
    const int64_t tokens = x.size(0), hidden = x.size(1), width = down.size(1);
    fits = has_shape(residual, {tokens, hidden}) && has_shape(norm_weight, {hidden}) &&
           has_shape(gate_up, {2 * width, hidden}) && has_shape(down, {hidden, width}) && hidden <= kMaxIndex &&
           width <= kMaxIndex;
    if (!fits) return std::nullopt;

    FfnBlock arguments{.x = data(x),
                       .x_stride = row_stride(x),
                       .residual = data(residual),
                       .norm_weight = data(norm_weight),
                       .eps = static_cast<float>(eps),
                       .gate_up = data(gate_up),
                       .down = data(down),
                       .scratch = data<uint32_t>(scratch),
                       .out = nullptr,
                       .sum = nullptr,
                       .workspace = nullptr,
                       .tokens = static_cast<int>(tokens),
                       .hidden = static_cast<int>(hidden),
                       .width = static_cast<int>(width)};
    if (!ffn_block_supported(arguments)) return std::nullopt;
    const int64_t wanted = ffn_block_scratch(arguments);
    STD_TORCH_CHECK(scratch.numel() >= wanted, "scratch has ", scratch.numel(), " elements; ", width, " columns want ",
                    wanted);
    Tensor out = new_tensor(x, {tokens, hidden}), sum = new_tensor(x, {tokens, hidden});
    arguments.out = data(out);
    arguments.sum = data(sum);
    const Tensor workspace = new_tensor(x, {tokens, width});
    arguments.workspace = data(workspace);
    const Launch launch(x);
    launch.keep(workspace);
    check_launch(tokenspeed::ffn_block(arguments, launch.stream()), "ffn_block");
    return std::make_tuple(out, sum);
}

bool add_gated_silu_mul_linear(const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& gate,
                               const Scale& scale) {
    if (multiplies_groups(x, scale)) return add_gated_silu_mul_linear_of_groups(y, x, weight, gate, *scale);
    const bool fits = x.size(1) % 2 == 0 && fits_linear(x, weight, scale, x.size(1) / 2) && is_bf16(y) &&
                      is_bf16(gate) && has_shape(y, {x.size(0), weight.size(0)}) && y.stride(1) == 1 &&
                      has_shape(gate, {x.size(0), 1});
    if (!fits) return false;
    Linear arguments = product(x, weight, scale);
    arguments.out = data(y);
    arguments.out_stride = row_stride(y);
    arguments.gate = data(gate);
    arguments.gate_stride = row_stride(gate);
    if (!silu_mul_linear_supported(arguments)) return false;
    const Launch launch(x);
    check_launch(tokenspeed::silu_mul_linear(arguments, launch.stream()), "add_gated_silu_mul_linear");
    return true;
}

std::optional<Tensor> sample(const Tensor& logits, const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                             const Tensor& min_p, const Tensor& seed, const Tensor& output,
                             const std::optional<Tensor>& index) {
    bool fits = has_kernels(logits) && logits.dim() == 2 && (is_bf16(logits) || is_float(logits)) &&
                logits.stride(1) == 1 && logits.size(0) <= kMaxIndex && logits.size(1) <= kMaxIndex &&
                is_float(temperature) && is_int32(top_k) && is_float(top_p) && is_float(min_p) && is_int64(seed) &&
                is_int64(output);
    for (const Tensor* values : {&temperature, &top_k, &top_p, &min_p, &seed, &output}) {
        fits = fits && values->is_contiguous();
    }
    // Of any stride: tokens of one sequence have the same index, which torch repeats with stride 0.
    if (index) fits = fits && is_int64(*index) && index->dim() == 1 && index->size(0) == logits.size(0);
    if (!fits) return std::nullopt;
    Sample arguments{.logits = logits.data_ptr(),
                     .logits_are_float = is_float(logits),
                     .logits_stride = row_stride(logits),
                     .temperature = data<float>(temperature),
                     .top_k = data<int32_t>(top_k),
                     .top_p = data<float>(top_p),
                     .min_p = data<float>(min_p),
                     .seed = data<int64_t>(seed),
                     .output = data<int64_t>(output),
                     .index = index ? data<int64_t>(*index) : nullptr,
                     .index_stride = index ? index->stride(0) : 0,
                     .ids = nullptr,
                     .workspace = nullptr,
                     .rows = static_cast<int>(logits.size(0)),
                     .vocabulary = static_cast<int>(logits.size(1))};
    if (!sample_supported(arguments)) return std::nullopt;
    Tensor ids = new_tensor(logits, {logits.size(0)}, ScalarType::Long);
    arguments.ids = data<int64_t>(ids);
    const auto bytes = static_cast<int64_t>(sample_workspace(arguments.rows));
    const Tensor workspace = new_tensor(logits, {bytes}, ScalarType::Byte);
    arguments.workspace = workspace.data_ptr();
    const Launch launch(logits);
    launch.keep(workspace);
    check_launch(tokenspeed::sample(arguments, launch.stream()), "sample");
    return ids;
}

}  // namespace

TOKENSPEED_KERNELS(library) {
    TOKENSPEED_KERNEL(library, gated_delta_rule_decode);
    TOKENSPEED_KERNEL(library, linear);
    TOKENSPEED_KERNEL(library, add_rms_norm_linear);
    TOKENSPEED_KERNEL(library, silu_mul_linear);
    TOKENSPEED_KERNEL(library, add_gated_silu_mul_linear);
    TOKENSPEED_KERNEL(library, ffn_block);
    TOKENSPEED_KERNEL(library, sample);
}

}  // namespace tokenspeed::binding
