// The operators of e4m3 activations. Contracts: tokenspeed/ops/fp8.py.
#include "binding.h"
#include "kernels.h"

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

// x as e4m3 and its scales; starts the kernel.
std::tuple<Tensor, Tensor> start_groups(const Tensor& x, cudaStream_t stream) {
    const int64_t rows = x.size(0), columns = x.size(1);
    Tensor values = new_tensor(x, {rows, columns}, ScalarType::Float8_e4m3fn);
    Tensor scales = new_tensor(x, {rows, blocks(columns)}, ScalarType::Float);
    const int64_t stride = rows > 1 ? x.stride(0) : 0;
    check_launch(tokenspeed::quantise_groups(x.data_ptr(), is_float(x), stride, data<uint8_t>(values),
                                             data<float>(scales), rows, static_cast<int>(columns), stream),
                 "quantise_groups");
    return {values, scales};
}

std::optional<std::tuple<Tensor, Tensor>> quantise_groups(const Tensor& x) {
    if (!fits_groups(x)) return std::nullopt;
    const Launch launch(x);
    return start_groups(x, launch.stream());
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
            .weight = data<uint8_t>(weight),
            .scale = data<float>(scale),
            .out = nullptr,
            .out_is_float = out_is_float,
            .rows = static_cast<int>(rows),
            .outputs = static_cast<int>(weight.size(0)),
            .inputs = static_cast<int>(weight.size(1))};
}

std::optional<Tensor> linear_fp8(const Tensor& x, const Tensor& x_scale, const Tensor& weight, const Tensor& scale,
                                 ScalarType out_dtype) {
    const bool fits = has_kernels(x) && x.dim() == 2 && is_e4m3(x) && x.is_contiguous() && is_float(x_scale) &&
                      x_scale.is_contiguous() && has_shape(x_scale, {x.size(0), blocks(x.size(1))}) &&
                      fits_product(weight, scale, x.size(0), x.size(1)) &&
                      (out_dtype == ScalarType::BFloat16 || out_dtype == ScalarType::Float);
    if (!fits) return std::nullopt;
    LinearFp8 arguments = product(weight, scale, x.size(0), out_dtype == ScalarType::Float);
    arguments.x = data<uint8_t>(x);
    arguments.x_scale = data<float>(x_scale);
    if (!linear_fp8_supported(arguments)) return std::nullopt;
    Tensor out = new_tensor(x, {x.size(0), weight.size(0)}, out_dtype);
    arguments.out = out.data_ptr();
    const Launch launch(x);
    check_launch(tokenspeed::linear_fp8(arguments, launch.stream()), "linear_fp8");
    return out;
}

}  // namespace

// `linear` of many bf16 rows with an e4m3 weight: `quantise_groups` and `linear_fp8`.
std::optional<Tensor> linear_of_groups(const Tensor& x, const Tensor& weight, const Tensor& scale) {
    if (!fits_groups(x) || !is_bf16(x) || !fits_product(weight, scale, x.size(0), x.size(1))) return std::nullopt;
    LinearFp8 arguments = product(weight, scale, x.size(0), false);
    if (!linear_fp8_supported(arguments)) return std::nullopt;  // new tensors are aligned
    Tensor out = new_tensor(x, {x.size(0), weight.size(0)});
    const Launch launch(x);
    const auto [values, scales] = start_groups(x, launch.stream());
    arguments.x = data<uint8_t>(values);
    arguments.x_scale = data<float>(scales);
    arguments.out = out.data_ptr();
    launch.keep(values);
    launch.keep(scales);
    check_launch(tokenspeed::linear_fp8(arguments, launch.stream()), "linear");
    return out;
}

TOKENSPEED_KERNELS(library) {
    TOKENSPEED_KERNEL(library, quantise_groups);
    TOKENSPEED_KERNEL(library, linear_fp8);
}

}  // namespace tokenspeed::binding
