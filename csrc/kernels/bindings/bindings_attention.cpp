// Attention over paged KV as implementations of torch.ops.tokenspeed.*; contracts: tokenspeed/ops/attention.py.
#include "binding.h"
#include "kernels.h"

namespace tokenspeed::binding {
namespace {

// The arguments that both operators share, or nothing where no kernel serves them.
std::optional<PagedAttention> shared_arguments(const Tensor& q, const Tensor& gate, const Tensor& kv,
                                               const Tensor& page_table, const Tensor& context_lens, double scale) {
    constexpr int64_t kMaxStrideBytes = int64_t{1} << 40;  // of a tensor map
    bool fits = has_kernels(q) && q.dim() == 3 && kv.dim() == 5 && page_table.dim() == 2 && context_lens.dim() == 1;
    if (!fits) return std::nullopt;
    const int64_t tokens = q.size(0), q_heads = q.size(1), pages = kv.size(0), kv_heads = kv.size(2);
    const int64_t sequences = context_lens.size(0);
    fits = is_bf16(q) && is_bf16(gate) && (is_bf16(kv) || is_e4m3(kv)) && is_int32(page_table) &&
           is_int32(context_lens) && q.size(2) == kHeadDim && kv.size(1) == 2 && kv.size(3) == kPageTokens &&
           kv.size(4) == kHeadDim && kv_heads > 0 && q_heads > kv_heads && q_heads % kv_heads == 0 &&
           has_shape(gate, {tokens, q_heads, kHeadDim}) && page_table.size(0) == sequences &&
           page_table.size(1) <= kMaxIndex && context_lens.is_contiguous() && scale > 0 && tokens > 0 &&
           tokens * q_heads * (q_heads / kv_heads) <= kMaxIndex && sequences > 0 && pages > 0 && is_dense_from(q, 1) &&
           has_vector_rows(q) && is_dense_from(kv, 1) && has_vector_rows(kv) &&
           kv.stride(0) * static_cast<int64_t>(kv.element_size()) < kMaxStrideBytes &&
           (page_table.size(1) <= 1 || page_table.stride(1) == 1);
    if (!fits) return std::nullopt;
    return PagedAttention{.q = data(q),
                          .q_stride = q.stride(0),
                          .gate = data(gate),
                          .gate_token_stride = gate.stride(0),
                          .gate_head_stride = gate.stride(1),
                          .gate_stride = gate.stride(2),
                          .kv = kv.data_ptr(),
                          .kv_is_e4m3 = is_e4m3(kv),
                          .page_stride = pages > 1 ? kv.stride(0) : 2 * kv_heads * kPageTokens * kHeadDim,
                          .pages = pages,
                          .page_table = data<int32_t>(page_table),
                          .table_stride = page_table.stride(0),
                          .context_lens = data<int32_t>(context_lens),
                          .out = nullptr,
                          .sequences = static_cast<int>(sequences),
                          .table_width = static_cast<int>(page_table.size(1)),
                          .q_heads = static_cast<int>(q_heads),
                          .kv_heads = static_cast<int>(kv_heads),
                          .scale = static_cast<float>(scale)};
}

// The decode kernel, for sequences of q.size(0) / sequences tokens each.
std::optional<Tensor> decode(const Tensor& q, const PagedAttention& shared, int64_t first_key, bool settled) {
    constexpr int64_t kMaxGrid = 65535;  // of its other dimensions: rows of a sequence and KV head, KV heads
    if (q.size(0) % shared.sequences != 0 || first_key < 0 || first_key >= kPageTokens) return std::nullopt;
    const auto tokens = static_cast<int>(q.size(0) / shared.sequences);
    PagedAttentionDecode arguments{shared, tokens, static_cast<int>(first_key), settled, nullptr, nullptr};
    const int64_t rows = int64_t{arguments.tokens} * arguments.q_heads;
    if (rows > kMaxGrid || rows * arguments.sequences * arguments.table_width > kMaxIndex) return std::nullopt;
    const int64_t slots = paged_attention_decode_shape(arguments).slots;
    Tensor out = new_tensor(q, {q.size(0), q.size(1) * q.size(2)});
    Tensor parts = new_tensor(q, {slots, kHeadDim}, ScalarType::Float);
    Tensor sums = new_tensor(q, {slots, 2}, ScalarType::Float);
    arguments.out = data(out);
    arguments.parts = data<float>(parts);
    arguments.part_sums = data<float2>(sums);
    const Launch launch(q);
    launch.keep(parts);
    launch.keep(sums);
    check_launch(tokenspeed::paged_attention_decode(arguments, launch.stream()), "paged_attention_decode");
    return out;
}

// The prefill kernel; cu_seqlens null: for sequences of tokens_each tokens.
Tensor prefill(const Tensor& q, const PagedAttention& shared, const int32_t* cu_seqlens, int64_t tokens_each) {
    const int parts = paged_attention_prefill_parts(shared, q.size(0));
    PagedAttentionPrefill arguments{shared, cu_seqlens, q.size(0), parts, nullptr, nullptr};
    arguments.tokens_each = static_cast<int>(tokens_each);
    Tensor out = new_tensor(q, {q.size(0), q.size(1) * q.size(2)});
    arguments.out = data(out);
    const Launch launch(q);
    if (parts > 0) {
        Tensor outputs = new_tensor(q, {parts, kPrefillPartRows, kHeadDim}, ScalarType::Float);
        Tensor sums = new_tensor(q, {parts, kPrefillPartRows, 2}, ScalarType::Float);
        arguments.parts = data<float>(outputs);
        arguments.part_sums = data<float2>(sums);
        launch.keep(outputs);
        launch.keep(sums);
    } else {
        Tensor next_item = new_tensor(q, {1}, ScalarType::Int);
        arguments.next_item = data<int>(next_item);
        launch.keep(next_item);
    }
    check_launch(tokenspeed::paged_attention_prefill(arguments, launch.stream()), "paged_attention_prefill");
    return out;
}

std::optional<Tensor> paged_attention_decode(const Tensor& q, const Tensor& gate, const Tensor& kv,
                                             const Tensor& page_table, const Tensor& context_lens, double scale,
                                             int64_t first_key, bool settled) {
    const auto shared = shared_arguments(q, gate, kv, page_table, context_lens, scale);
    if (shared && first_key == 0 && q.size(0) % shared->sequences == 0 &&
        paged_attention_decode_as_prefill(*shared, q.size(0))) {
        return prefill(q, *shared, nullptr, q.size(0) / shared->sequences);
    }
    return shared ? decode(q, *shared, first_key, settled) : std::nullopt;
}

std::optional<Tensor> paged_attention_prefill(const Tensor& q, const Tensor& gate, const Tensor& kv,
                                              const Tensor& page_table, const Tensor& cu_seqlens,
                                              const Tensor& context_lens, int64_t /*max_seqlen*/, double scale) {
    const auto shared = shared_arguments(q, gate, kv, page_table, context_lens, scale);
    const bool fits =
        shared && is_int32(cu_seqlens) && cu_seqlens.is_contiguous() && has_shape(cu_seqlens, {shared->sequences + 1});
    if (!fits) return std::nullopt;
    if (shared->sequences == 1 && paged_attention_prefill_is_short(*shared, q.size(0))) {
        if (auto out = decode(q, *shared, 0, false)) return out;
    }
    return prefill(q, *shared, data<int32_t>(cu_seqlens), 1);
}

}  // namespace

TOKENSPEED_KERNELS(library) {
    TOKENSPEED_KERNEL(library, paged_attention_decode);
    TOKENSPEED_KERNEL(library, paged_attention_prefill);
}

}  // namespace tokenspeed::binding
