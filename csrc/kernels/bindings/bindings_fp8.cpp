// The operators of e4m3 activations. Contracts: tokenspeed/ops/fp8.py.
#include <array>

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
    Tensor scales = new_tensor(x, {blocks(columns), rows}, ScalarType::Float);
    const int64_t stride = rows > 1 ? x.stride(0) : 0;
    check_launch(tokenspeed::quantise_groups(x.data_ptr(), is_float(x), stride, data<uint8_t>(values),
                                             data<float>(scales), rows, static_cast<int>(columns), stream),
                 "quantise_groups");
    return {values, torch::stable::transpose(scales, 0, 1)};
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

}  // namespace

// `linear` of many bf16 rows with an e4m3 weight: `quantise_groups` and `linear_fp8`.
std::optional<Tensor> linear_of_groups(const Tensor& x, const Tensor& weight, const Tensor& scale) {
    if (!fits_groups(x) || !is_bf16(x) || !fits_product(weight, scale, x.size(0), x.size(1)) || x.size(1) % 16 != 0) {
        return std::nullopt;
    }
    const Launch launch(x);
    const auto [values, scales] = start_groups(x, launch.stream());
    launch.keep(values);
    launch.keep(scales);
    if (const auto out = linear_fp8(values, scales, weight, scale, x.scalar_type())) return out;
    std::array<StableIValue, 5> stack = {torch::stable::detail::from(values), torch::stable::detail::from(scales),
                                         torch::stable::detail::from(weight), torch::stable::detail::from(scale),
                                         torch::stable::detail::from(x.scalar_type())};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("tokenspeed_torch::linear_fp8", "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

TOKENSPEED_KERNELS(library) {
    TOKENSPEED_KERNEL(library, quantise_groups);
    TOKENSPEED_KERNEL(library, linear_fp8);
}

}  // namespace tokenspeed::binding
