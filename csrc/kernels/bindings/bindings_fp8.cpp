// The operators of e4m3 activations. Contracts: tokenspeed/ops/fp8.py.
#include <array>

#include "groups.h"
#include "norms.h"

namespace tokenspeed::binding {
namespace {

int64_t blocks(int64_t size) {
    return (size + kScaleBlock - 1) / kScaleBlock;
}

bool fits_groups(const Tensor& x) {
    return has_kernels(x) && x.dim() == 2 && (is_bf16(x) || is_float(x)) && has_vector_rows(x) && x.size(0) > 0 &&
           x.size(1) > 0 && x.size(1) % 8 == 0 && x.size(1) <= kMaxIndex &&
           x.size(0) * blocks(x.size(1)) * 16 / 256 < kMaxIndex;
}

// Starts the kernel.
void start_groups(const Tensor& x, const Groups& out, cudaStream_t stream) {
    const int64_t rows = x.size(0);
    check_launch(tokenspeed::quantise_groups(x.data_ptr(), is_float(x), rows > 1 ? x.stride(0) : 0, out, rows,
                                             static_cast<int>(x.size(1)), stream),
                 "quantise_groups");
}

std::optional<std::tuple<Tensor, Tensor>> quantise_groups(const Tensor& x) {
    if (!fits_groups(x)) return std::nullopt;
    const Grouped out = new_groups(x, x.size(0), x.size(1));
    const Launch launch(x);
    start_groups(x, groups_from(out), launch.stream());
    return std::make_tuple(out.values, torch::stable::transpose(out.scales, 0, 1));
}

// Whether the arguments are of the contract's shapes and of sizes that the kernel counts.
bool fits_product(const Tensor& weight, const Tensor& scale, int64_t rows, int64_t columns) {
    return is_e4m3(weight) && weight.dim() == 2 && weight.is_contiguous() && weight.size(1) == columns &&
           is_float(scale) && scale.is_contiguous() &&
           has_shape(scale, {blocks(weight.size(0)), blocks(weight.size(1))}) && rows > 0 && rows <= kMaxIndex &&
           weight.size(0) <= kMaxIndex && columns <= kMaxIndex;
}

LinearFp8 product(const Tensor& weight, const Tensor& scale, int64_t rows, bool out_is_float) {
    return {.x = nullptr,
            .x_scale = nullptr,
            .x_scale_row_stride = 0,
            .x_scale_block_stride = 0,
            .weight = data<uint8_t>(weight),
            .scale = data<float>(scale),
            .out = nullptr,
            .out_is_float = out_is_float,
            .rows = static_cast<int>(rows),
            .outputs = static_cast<int>(weight.size(0)),
            .inputs = static_cast<int>(weight.size(1))};
}

#ifdef TOKENSPEED_EMULATED
bool cublas_is_faster(const Tensor&, const Tensor&, const Tensor&, ScalarType) {
    return false;
}
#else
// Where cuBLAS takes the call, through the torch implementation, it was faster on an H200 at every size: by 10 to 15%
// at 8192 rows, twice as fast at 64 rows of long inputs.
bool cublas_is_faster(const Tensor& x, const Tensor& x_scale, const Tensor& weight, ScalarType out_dtype) {
    return out_dtype == ScalarType::BFloat16 && x.size(0) % 4 == 0 && x_scale.stride(0) == 1 &&
           x_scale.stride(1) == x.size(0) && weight.size(0) % 16 == 0 && weight.size(1) % (4 * kScaleBlock) == 0;
}
#endif

std::optional<Tensor> linear_fp8(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& scale,
                                 ScalarType out_dtype) {
    const bool fits = has_kernels(x) && x.dim() == 2 && is_e4m3(x) && x.is_contiguous() && is_float(x_scale) &&
                      has_shape(x_scale, {x.size(0), blocks(x.size(1))}) &&
                      fits_product(weight, scale, x.size(0), x.size(1)) &&
                      (out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Float);
    if (!fits || cublas_is_faster(x, x_scale, weight, out_dtype)) return std::nullopt;
    LinearFp8 arguments = product(weight, scale, x.size(0), out_dtype == ScalarType::Float);
    arguments.x = data<uint8_t>(x);
    arguments.x_scale = data<float>(x_scale);
    arguments.x_scale_row_stride = x_scale.stride(0);
    arguments.x_scale_block_stride = x_scale.stride(1);
    if (!linear_fp8_supported(arguments)) return std::nullopt;
    Tensor out = new_tensor(x, {x.size(0), weight.size(0)}, out_dtype);
    arguments.out = out.data_ptr();
    const Launch launch(x);
    check_launch(tokenspeed::linear_fp8(arguments, launch.stream()), "linear_fp8");
    return out;
}

std::optional<Tensor> gated_rms_norm_linear(const Tensor& x, const Tensor& gate, const Tensor& norm_weight, double eps,
                                            const Tensor& weight, const std::optional<Tensor>& scale,
                                            const std::optional<Tensor>& above) {
    if (x.dim() != 3 || !scale) return std::nullopt;
    const int64_t tokens = x.size(0), heads = x.size(1), columns = heads * kGatedNormWidth;
    const int64_t first = above ? above->size(0) : 0, rows = first + tokens;
    const bool fits = rows > kLinearMaxRows && tokens > 0 && fits_gated_norm(x, gate, norm_weight) &&
                      fits_groups_product(weight, *scale, rows, columns) &&
                      (first == 0 || (fits_groups(*above) && is_bf16(*above) && above->size(1) == columns));
    if (!fits) return std::nullopt;
    const Grouped normed = new_groups(x, rows, columns);
    const Launch launch(x);
    if (first > 0) start_groups(*above, groups_from(normed), launch.stream());
    check_launch(
        tokenspeed::gated_rms_norm_groups(data(x), x.stride(0), x.stride(1), data(gate), gate.stride(0), gate.stride(1),
                                          data(norm_weight), groups_from(normed, first), tokens,
                                          static_cast<int>(heads), static_cast<float>(eps), launch.stream()),
        "gated_rms_norm_groups");
    return product_of_groups(normed, weight, *scale, launch);
}

}  // namespace

Grouped new_groups(const Tensor& like, int64_t rows, int64_t columns) {
    return {.values = new_tensor(like, {rows, columns}, ScalarType::Float8_e4m3fn),
            .scales = new_tensor(like, {blocks(columns), rows}, ScalarType::Float)};
}

bool fits_groups_product(const Tensor& weight, const Tensor& scale, int64_t rows, int64_t columns) {
    return fits_product(weight, scale, rows, columns) && columns % 16 == 0;
}

Tensor product_of_groups(const Grouped& x, const Tensor& weight, const Tensor& scale, const Launch& launch) {
    launch.keep(x.values);
    launch.keep(x.scales);
    const Tensor scales = torch::stable::transpose(x.scales, 0, 1);
    if (const auto out = linear_fp8(x.values, scales, weight, scale, ScalarType::BFloat16)) return *out;
    std::array<StableIValue, 5> stack = {torch::stable::detail::from(x.values), torch::stable::detail::from(scales),
                                         torch::stable::detail::from(weight), torch::stable::detail::from(scale),
                                         torch::stable::detail::from(ScalarType::BFloat16)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("tokenspeed_torch::linear_fp8", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

std::optional<Tensor> linear_of_groups(const Tensor& x, const Tensor& weight, const Tensor& scale) {
    if (!fits_groups(x) || !is_bf16(x) || !fits_groups_product(weight, scale, x.size(0), x.size(1))) {
        return std::nullopt;
    }
    const Grouped groups = new_groups(x, x.size(0), x.size(1));
    const Launch launch(x);
    start_groups(x, groups_from(groups), launch.stream());
    return product_of_groups(groups, weight, scale, launch);
}

std::optional<GroupedNorm> add_rms_norm_groups(const Tensor& x, const Tensor& residual, const Tensor& norm_weight,
                                               double eps, const Tensor& weight, const Tensor& scale) {
    if (!fits_add_norm(x, residual, norm_weight)) return std::nullopt;
    const int64_t rows = x.size(0), width = x.size(1);
    if (!fits_groups_product(weight, scale, rows, width)) return std::nullopt;
    GroupedNorm out{new_tensor(x, {rows, width}), new_tensor(x, {rows, width}), new_groups(x, rows, width)};
    const Launch launch(x);
    check_launch(tokenspeed::add_rms_norm_groups(data(x), x.stride(0), data(residual), data(norm_weight),
                                                 data(out.normed), data(out.sum), groups_from(out.groups), rows,
                                                 static_cast<int>(width), static_cast<float>(eps), launch.stream()),
                 "add_rms_norm_groups");
    return out;
}

std::optional<std::tuple<Tensor, Tensor, Tensor>> add_rms_norm_linear_of_groups(const Tensor& x, const Tensor& residual,
                                                                                const Tensor& norm_weight, double eps,
                                                                                const Tensor& weight,
                                                                                const Tensor& scale) {
    const auto norm = add_rms_norm_groups(x, residual, norm_weight, eps, weight, scale);
    if (!norm) return std::nullopt;
    return std::make_tuple(product_of_groups(norm->groups, weight, scale, Launch(x)), norm->normed, norm->sum);
}

std::optional<Tensor> silu_mul_linear_of_groups(const Tensor& x, const Tensor& weight, const Tensor& scale) {
    if (!fits_silu_mul(x)) return std::nullopt;
    const int64_t rows = x.size(0), width = x.size(1) / 2;
    if (width % kScaleBlock != 0 || !fits_groups_product(weight, scale, rows, width)) return std::nullopt;
    const Grouped gated = new_groups(x, rows, width);
    const Launch launch(x);
    check_launch(tokenspeed::silu_mul_groups(data(x), x.stride(0), groups_from(gated), rows, static_cast<int>(width),
                                             launch.stream()),
                 "silu_mul_groups");
    return product_of_groups(gated, weight, scale, launch);
}

bool add_gated_silu_mul_linear_of_groups(const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& gate,
                                         const Tensor& scale) {
    if (!fits_gated_sum(y, gate) || y.size(0) != x.size(0) || y.size(1) != weight.size(0)) return false;
    const auto product = silu_mul_linear_of_groups(x, weight, scale);
    if (!product) return false;
    const Launch launch(y);
    launch.keep(*product);
    check_launch(tokenspeed::add_sigmoid_gated(data(y), y.stride(0), data(*product), product->stride(0), data(gate),
                                               gate.stride(0), y.size(0), static_cast<int>(y.size(1)), launch.stream()),
                 "add_sigmoid_gated");
    return true;
}

TOKENSPEED_KERNELS(library) {
    TOKENSPEED_KERNEL(library, quantise_groups);
    TOKENSPEED_KERNEL(library, linear_fp8);
    TOKENSPEED_KERNEL(library, gated_rms_norm_linear);
}

}  // namespace tokenspeed::binding
