// When the norms and the gated sums have a kernel, alone or in front of a product.
#pragma once
#include "binding.h"
#include "kernels.h"

namespace tokenspeed::binding {

inline bool fits_norm(const Tensor& x, const Tensor& weight) {
    const int64_t width = weight.numel();
    return has_kernels(x) && is_bf16(x) && is_bf16(weight) && weight.dim() == 1 && weight.is_contiguous() &&
           is_aligned(weight) && width % 8 == 0 && width > 0 && width <= kRmsNormMaxWidth &&
           x.size(x.dim() - 1) == width;
}

inline bool fits_add_norm(const Tensor& x, const Tensor& residual, const Tensor& weight) {
    return x.dim() == 2 && fits_norm(x, weight) && has_vector_rows(x) && is_bf16(residual) &&
           has_shape(residual, {x.size(0), x.size(1)}) && residual.is_contiguous() && has_vector_rows(residual) &&
           x.size(0) <= kMaxIndex;
}

inline bool fits_gated_norm(const Tensor& x, const Tensor& gate, const Tensor& weight) {
    return has_kernels(x) && x.dim() == 3 && is_bf16(x) && is_bf16(gate) && is_bf16(weight) &&
           weight.numel() == kGatedNormWidth && weight.is_contiguous() && is_aligned(weight) &&
           x.size(2) == kGatedNormWidth && has_shape(gate, {x.size(0), x.size(1), x.size(2)}) && has_vector_rows(x) &&
           has_vector_rows(gate) && x.size(0) * x.size(1) <= kMaxIndex;
}

inline bool fits_silu_mul(const Tensor& x) {
    return has_kernels(x) && x.dim() == 2 && is_bf16(x) && has_vector_rows(x) && x.size(1) % 16 == 0 &&
           x.size(0) * (x.size(1) / 2) / 8 <= kMaxIndex;
}

// The sum that is written, and its gate.
inline bool fits_gated_sum(const Tensor& y, const Tensor& gate) {
    return has_kernels(y) && y.dim() == 2 && is_bf16(y) && is_bf16(gate) && has_shape(gate, {y.size(0), 1}) &&
           has_vector_rows(y) && y.size(1) % 8 == 0 && y.numel() / 8 <= kMaxIndex;
}

}  // namespace tokenspeed::binding
