// Activations in e4m3 groups between the bindings: who writes them, and the products that take them.
#pragma once
#include "binding.h"
#include "kernels.h"

namespace tokenspeed::binding {

// values: [rows, columns] e4m3; scales: [ceil(columns / 128), rows] fp32.
struct Grouped {
    Tensor values, scales;
};

Grouped new_groups(const Tensor& like, int64_t rows, int64_t columns);

// From a row on, as launchers write them.
inline Groups groups_from(const Grouped& x, int64_t row = 0) {
    return {.values = data<uint8_t>(x.values) + row * x.values.size(1),
            .scales = data<float>(x.scales) + row,
            .scale_stride = x.scales.size(1)};
}

// Whether `product_of_groups` takes rows of so many columns: a weight of the contract's shapes.
bool fits_groups_product(const Tensor& weight, const Tensor& scale, int64_t rows, int64_t columns);

// The bf16 product of a kernel or, where it is faster, of cuBLAS.
Tensor product_of_groups(const Grouped& x, const Tensor& weight, const Tensor& scale, const Launch& launch);

// `add_rms_norm` with its norm in groups as well, where a kernel and a product with the weight take it.
struct GroupedNorm {
    Tensor normed, sum;
    Grouped groups;
};
std::optional<GroupedNorm> add_rms_norm_groups(const Tensor& x, const Tensor& residual, const Tensor& norm_weight,
                                               double eps, const Tensor& weight, const Tensor& scale);

// The operators of many bf16 rows with an e4m3 weight, which multiply groups: the operator before the product writes
// them, and the bits are those of `quantise_groups` behind it.
std::optional<Tensor> linear_of_groups(const Tensor& x, const Tensor& weight, const Tensor& scale);
std::optional<std::tuple<Tensor, Tensor, Tensor>> add_rms_norm_linear_of_groups(const Tensor& x, const Tensor& residual,
                                                                                const Tensor& norm_weight, double eps,
                                                                                const Tensor& weight,
                                                                                const Tensor& scale);
std::optional<Tensor> silu_mul_linear_of_groups(const Tensor& x, const Tensor& weight, const Tensor& scale);
bool add_gated_silu_mul_linear_of_groups(const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& gate,
                                         const Tensor& scale);

}  // namespace tokenspeed::binding
