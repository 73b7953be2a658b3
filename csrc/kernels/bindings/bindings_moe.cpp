// The expert product of a mixture of experts. Contract: tokenspeed/ops/moe.py.
#include <algorithm>

#include "binding.h"
#include "groups.h"
#include "kernels.h"

namespace tokenspeed::binding {
namespace {

// The workspace holds what passes between the launches, see the heads of moe_experts_decode.cu and
// moe_experts_prefill.cu. It comes from torch's allocator, which keeps it from others until the stream is past it.
Tensor new_workspace(const Tensor& like, size_t bytes) {
    return new_tensor(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
}

// groups: x in groups, where somebody has written them.
std::optional<Tensor> experts_of(const Tensor& x, const Groups& groups, const Tensor& weights, const Tensor& experts,
                                 const Tensor& order, const Tensor& offsets, const Tensor& gate_up, const Tensor& down,
                                 int64_t first_expert, const std::optional<Tensor>& gate_up_scale,
                                 const std::optional<Tensor>& down_scale, int64_t model_experts) {
    bool fits = gate_up_scale.has_value() == down_scale.has_value() && has_kernels(x) && x.dim() == 2 &&
                weights.dim() == 2 && gate_up.dim() == 3 && down.dim() == 3 && x.size(0) > 0 && x.stride(1) == 1 &&
                is_int32(experts) && is_int32(order) && is_int32(offsets) && first_expert >= 0 &&
                first_expert <= kMaxIndex && model_experts >= 0 && model_experts <= kMaxIndex;
    const bool scaled = gate_up_scale && down_scale;
    for (const Tensor* values : {&x, &weights}) fits = fits && is_bf16(*values);
    for (const Tensor* values : {&gate_up, &down}) fits = fits && (scaled ? is_e4m3(*values) : is_bf16(*values));
    for (const Tensor* packed : {&weights, &experts, &order, &offsets, &gate_up, &down}) {
        fits = fits && packed->is_contiguous();
    }
    if (!fits) return std::nullopt;
    const int64_t tokens = x.size(0), hidden = x.size(1), top_k = weights.size(1);
    const int64_t count = down.size(0), width = down.size(2);
    fits = has_shape(weights, {tokens, top_k}) && has_shape(experts, {tokens, top_k}) &&
           has_shape(order, {tokens * top_k}) && has_shape(offsets, {count + 1}) &&
           has_shape(gate_up, {count, 2 * width, hidden}) && has_shape(down, {count, hidden, width});
    if (scaled) {
        constexpr int64_t kBlock = kScaleBlock;
        fits = fits && width % kBlock == 0 && hidden % kBlock == 0 && is_float(*gate_up_scale) &&
               is_float(*down_scale) && gate_up_scale->is_contiguous() && down_scale->is_contiguous() &&
               has_shape(*gate_up_scale, {count, 2 * width / kBlock, hidden / kBlock}) &&
               has_shape(*down_scale, {count, hidden / kBlock, width / kBlock});
    }
    for (const int64_t size : {tokens * top_k, count, hidden, 2 * width}) fits = fits && size <= kMaxIndex;
    if (!fits) return std::nullopt;

    MoeExperts arguments{.x = data(x),
                         .x_stride = tokens > 1 ? x.stride(0) : 0,
                         .weights = data(weights),
                         .chosen = data<int32_t>(experts),
                         .order = data<int32_t>(order),
                         .offsets = data<int32_t>(offsets),
                         .gate_up = gate_up.data_ptr(),
                         .down = down.data_ptr(),
                         .out = nullptr,
                         .workspace = nullptr,
                         .tokens = static_cast<int>(tokens),
                         .experts = static_cast<int>(count),
                         .top_k = static_cast<int>(top_k),
                         .hidden = static_cast<int>(hidden),
                         .width = static_cast<int>(width),
                         .first_expert = static_cast<int>(first_expert),
                         .gate_up_scale = scaled ? data<float>(*gate_up_scale) : nullptr,
                         .down_scale = scaled ? data<float>(*down_scale) : nullptr,
                         .groups = groups,
                         .model_experts = static_cast<int>(model_experts)};
    const bool few = moe_experts_decode_supported(arguments);
    const bool many = scaled ? moe_experts_prefill_fp8_supported(arguments) : moe_experts_prefill_supported(arguments);
    if (!few && !many) return std::nullopt;
    Tensor out = new_tensor(x, {tokens, hidden});
    const Tensor workspace = new_workspace(x, few      ? moe_experts_decode_workspace(arguments)
                                              : scaled ? moe_experts_prefill_fp8_workspace(arguments)
                                                       : moe_experts_prefill_workspace(arguments));
    arguments.out = data(out);
    arguments.workspace = data<uint8_t>(workspace);
    const Launch launch(x);
    launch.keep(workspace);
    const auto start = few ? moe_experts_decode : scaled ? moe_experts_prefill_fp8 : moe_experts_prefill;
    check_launch(start(arguments, launch.stream()), "moe_experts");
    return out;
}

std::optional<Tensor> moe_experts(const Tensor& x, const Tensor& weights, const Tensor& experts, const Tensor& order,
                                  const Tensor& offsets, const Tensor& gate_up, const Tensor& down,
                                  int64_t first_expert, const std::optional<Tensor>& gate_up_scale,
                                  const std::optional<Tensor>& down_scale, int64_t model_experts) {
    return experts_of(x, {}, weights, experts, order, offsets, gate_up, down, first_expert, gate_up_scale, down_scale,
                      model_experts);
}

// An operator through torch's dispatcher, whoever serves it.
template <typename... Results, typename... Arguments>
std::tuple<Results...> dispatched(const char* name, const Arguments&... arguments) {
    StableIValue stack[std::max(sizeof...(Results), sizeof...(Arguments))] = {
        torch::stable::detail::from(arguments)...};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack, TORCH_ABI_VERSION));
    return torch::stable::detail::unbox_to_tuple<Results...>(stack);
}

void check_scratch(const MoeBlock& p, const Tensor& scratch) {
    const int64_t wanted = moe_block_scratch(p);
    STD_TORCH_CHECK(scratch.numel() >= wanted, "scratch has ", scratch.numel(), " elements; ", p.experts,
                    " experts, top ", p.top_k, " want ", wanted);
}

// Many rows with e4m3 weights: operator by operator as the contract has it, but the norm writes the groups once that
// the shared expert and the experts multiply.
std::optional<std::tuple<Tensor, Tensor>> moe_block_of_groups(
    const Tensor& x, const Tensor& residual, const Tensor& norm_weight, double eps, const Tensor& in_proj,
    int64_t experts, int64_t top_k, const Tensor& gate_up, const Tensor& down, const Tensor& shared_down,
    const Tensor& scratch, int64_t first_expert, const Tensor& router, const Tensor& in_scale,
    const std::optional<Tensor>& gate_up_scale, const std::optional<Tensor>& down_scale, const Tensor& shared_scale,
    const std::optional<Tensor>& context_lens) {
    if (shared_down.dim() != 2 || in_proj.dim() != 2 || in_proj.size(0) != 2 * shared_down.size(1)) return std::nullopt;
    MoeBlock sizes{};
    sizes.experts = static_cast<int>(experts), sizes.top_k = static_cast<int>(top_k);
    sizes.hidden = static_cast<int>(x.size(1));
    check_scratch(sizes, scratch);
    const auto norm = add_rms_norm_groups(x, residual, norm_weight, eps, in_proj, in_scale);
    if (!norm) return std::nullopt;
    const Launch launch(x);
    const Tensor shared = product_of_groups(norm->groups, in_proj, in_scale, launch);
    const std::optional<Tensor> none;
    auto [logits] = dispatched<Tensor>("tokenspeed::linear", norm->normed, router, none, none);
    auto [weights, chosen, order, offsets] = dispatched<Tensor, Tensor, Tensor, Tensor>(
        "tokenspeed::moe_route", torch::stable::narrow(logits, 1, 0, experts), top_k, context_lens);
    offsets = torch::stable::narrow(offsets, 0, first_expert, down.size(0) + 1);
    const auto y = experts_of(norm->normed, groups_from(norm->groups), weights, chosen, order, offsets, gate_up, down,
                              first_expert, gate_up_scale, down_scale, experts);
    const Tensor gate = torch::stable::narrow(logits, 1, experts, 1);
    if (!y || !add_gated_silu_mul_linear_of_groups(*y, shared, shared_down, gate, shared_scale)) return std::nullopt;
    for (const Tensor& passed : {norm->normed, shared, logits, weights, chosen, order, offsets}) launch.keep(passed);
    return std::make_tuple(*y, norm->sum);
}

std::optional<std::tuple<Tensor, Tensor>> moe_block(
    const Tensor& x, const Tensor& residual, const Tensor& norm_weight, double eps, const Tensor& in_proj,
    int64_t experts, int64_t top_k, const Tensor& gate_up, const Tensor& down, const Tensor& shared_down,
    const Tensor& scratch, int64_t first_expert, const std::optional<Tensor>& router,
    const std::optional<Tensor>& in_scale, const std::optional<Tensor>& gate_up_scale,
    const std::optional<Tensor>& down_scale, const std::optional<Tensor>& shared_scale,
    const std::optional<Tensor>& context_lens) {
    const bool scaled = router.has_value();
    if (scaled && in_scale && shared_scale && x.size(0) > kLinearMaxRows) {
        return moe_block_of_groups(x, residual, norm_weight, eps, in_proj, experts, top_k, gate_up, down, shared_down,
                                   scratch, first_expert, *router, *in_scale, gate_up_scale, down_scale, *shared_scale,
                                   context_lens);
    }
    bool fits = has_kernels(x) && x.dim() == 2 && x.size(0) > 0 && x.size(0) <= kMoeBlockTokens && x.stride(1) == 1 &&
                in_proj.dim() == 2 && gate_up.dim() == 3 && down.dim() == 3 && shared_down.dim() == 2 &&
                is_int32(scratch) && first_expert >= 0 && first_expert <= experts && top_k > 0 && top_k <= kMaxTopK &&
                experts <= kMaxIndex;
    for (const auto* scale : {&in_scale, &gate_up_scale, &down_scale, &shared_scale}) {
        fits = fits && scale->has_value() == scaled && (!scaled || (is_float(**scale) && (*scale)->is_contiguous()));
    }
    fits = fits && (!scaled || (is_bf16(*router) && router->is_contiguous()));
    for (const Tensor* values : {&x, &residual, &norm_weight}) fits = fits && is_bf16(*values);
    for (const Tensor* weight : {&in_proj, &gate_up, &down, &shared_down}) {
        fits = fits && (scaled ? is_e4m3(*weight) : is_bf16(*weight));
    }
    for (const Tensor* packed : {&residual, &norm_weight, &in_proj, &gate_up, &down, &shared_down, &scratch}) {
        fits = fits && packed->is_contiguous();
    }
    if (!fits) return std::nullopt;
    const int64_t tokens = x.size(0), hidden = x.size(1), held = down.size(0), width = down.size(2);
    const int64_t shared = shared_down.size(1), projections = in_proj.size(0) + (scaled ? router->size(0) : 0);
    fits = has_shape(residual, {tokens, hidden}) && has_shape(norm_weight, {hidden}) &&
           has_shape(in_proj, {scaled ? 2 * shared : projections, hidden}) &&
           has_shape(gate_up, {held, 2 * width, hidden}) && has_shape(down, {held, hidden, width}) &&
           has_shape(shared_down, {hidden, shared});
    if (scaled) {
        constexpr int64_t kBlock = kScaleBlock;
        for (const int64_t size : {hidden, width, shared}) fits = fits && size % kBlock == 0;
        fits = fits && has_shape(*router, {projections - 2 * shared, hidden}) &&
               has_shape(*in_scale, {2 * shared / kBlock, hidden / kBlock}) &&
               has_shape(*gate_up_scale, {held, 2 * width / kBlock, hidden / kBlock}) &&
               has_shape(*down_scale, {held, hidden / kBlock, width / kBlock}) &&
               has_shape(*shared_scale, {hidden / kBlock, shared / kBlock});
    }
    for (const int64_t size : {projections, held, hidden, 2 * width, 2 * shared}) fits = fits && size <= kMaxIndex;
    SequenceRows sequences{nullptr, 1};
    if (context_lens) {
        const int64_t count = context_lens->size(0);
        fits = fits && is_int32(*context_lens) && context_lens->is_contiguous() && count > 0 && tokens % count == 0;
        if (fits) sequences = {data<int32_t>(*context_lens), static_cast<int>(tokens / count)};
    }
    if (!fits) return std::nullopt;

    MoeBlock arguments{.x = data(x),
                       .x_stride = tokens > 1 ? x.stride(0) : 0,
                       .residual = data(residual),
                       .norm_weight = data(norm_weight),
                       .eps = static_cast<float>(eps),
                       .in_proj = in_proj.data_ptr(),
                       .gate_up = gate_up.data_ptr(),
                       .down = down.data_ptr(),
                       .shared_down = shared_down.data_ptr(),
                       .scratch = data<uint32_t>(scratch),
                       .out = nullptr,
                       .sum = nullptr,
                       .workspace = nullptr,
                       .tokens = static_cast<int>(tokens),
                       .experts = static_cast<int>(experts),
                       .held = static_cast<int>(held),
                       .first_expert = static_cast<int>(first_expert),
                       .top_k = static_cast<int>(top_k),
                       .hidden = static_cast<int>(hidden),
                       .width = static_cast<int>(width),
                       .shared = static_cast<int>(shared),
                       .projections = static_cast<int>(projections),
                       .sequences = sequences,
                       .router = scaled ? data(*router) : nullptr,
                       .in_scale = scaled ? data<float>(*in_scale) : nullptr,
                       .gate_up_scale = scaled ? data<float>(*gate_up_scale) : nullptr,
                       .down_scale = scaled ? data<float>(*down_scale) : nullptr,
                       .shared_scale = scaled ? data<float>(*shared_scale) : nullptr};
    if (!moe_block_supported(arguments)) return std::nullopt;
    check_scratch(arguments, scratch);
    Tensor out = new_tensor(x, {tokens, hidden}), sum = new_tensor(x, {tokens, hidden});
    const Tensor workspace = new_workspace(x, moe_block_workspace(arguments));
    arguments.out = data(out);
    arguments.sum = data(sum);
    arguments.workspace = data<uint8_t>(workspace);
    const Launch launch(x);
    launch.keep(workspace);
    check_launch(tokenspeed::moe_block(arguments, launch.stream()), "moe_block");
    return std::make_tuple(out, sum);
}

}  // namespace

TOKENSPEED_KERNELS(library) {
    TOKENSPEED_KERNEL(library, moe_experts);
    TOKENSPEED_KERNEL(library, moe_block);
}

}  // namespace tokenspeed::binding
