// A sequence's progress as implementations of torch.ops.tokenspeed.*; contracts: tokenspeed/ops/progress.py.
#include "binding.h"
#include "kernels.h"

namespace tokenspeed::binding {
namespace {

// One number a sequence, or one a sequence index.
bool is_column(const Tensor& t, ScalarType type) {
    return t.dim() == 1 && t.scalar_type() == type && t.is_contiguous();
}

bool are_columns(std::initializer_list<const Tensor*> columns, ScalarType type, int64_t length) {
    bool fits = true;
    for (const Tensor* t : columns) fits = fits && is_column(*t, type) && t->size(0) == length;
    return fits;
}

// A table of rows by sequence index that are contiguous, at any distance.
bool is_table(const Tensor& t, ScalarType type, int64_t rows, int64_t least_width) {
    return t.dim() == 2 && t.scalar_type() == type && t.size(0) == rows && t.size(1) >= least_width &&
           (t.size(1) == 1 || t.stride(1) == 1);
}

// Where the rows of some sequences stand: `width` of each, of tables that `is_table` has looked at. What says which
// sequences, and from where on, is left to the caller.
PagedRows rows_of(const Tensor& pages, const Tensor& capacity, const Tensor& inv_freq, Tensor& cos_sin,
                  Tensor& kv_slots, int64_t sequences, int64_t width, double rope_scale, int64_t rope_shift,
                  int64_t page_size) {
    return {.index = nullptr,
            .first = nullptr,
            .pages = data<int32_t>(pages),
            .pages_stride = pages.stride(0),
            .capacity = data<int32_t>(capacity),
            .inv_freq = data<float>(inv_freq),
            .cos_sin = data<float>(cos_sin),
            .kv_slots = data<int64_t>(kv_slots),
            .sequences = static_cast<int>(sequences),
            .width = static_cast<int>(width),
            .table_width = static_cast<int>(pages.size(1)),
            .frequencies = static_cast<int>(inv_freq.size(0)),
            .rope_shift = static_cast<int>(rope_shift),
            .page_size = static_cast<int>(page_size),
            .rope_scale = static_cast<float>(rope_scale)};
}

std::optional<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>> decode_rows(
    const Tensor& packed, const Tensor& length, const Tensor& left, const Tensor& prompt, const Tensor& ids,
    const Tensor& pages, const Tensor& capacity, const Tensor& inv_freq, int64_t width, double rope_scale,
    int64_t page_size) {
    constexpr int64_t kMaxSequences = 65535;  // rows of a grid
    const bool fits = has_kernels(packed) && is_int32(packed) && packed.is_contiguous() && packed.dim() == 2 &&
                      packed.size(0) == 3 && packed.size(1) <= kMaxSequences && width > 0 && page_size > 0 &&
                      page_size <= kMaxIndex && is_column(length, ScalarType::Int) &&
                      are_columns({&left, &prompt, &capacity}, ScalarType::Int, length.size(0)) &&
                      is_table(ids, ScalarType::Long, length.size(0), width) &&
                      is_table(pages, ScalarType::Int, length.size(0), 1) && pages.size(1) <= kMaxIndex &&
                      is_column(inv_freq, ScalarType::Float) && inv_freq.size(0) > 0 &&
                      packed.size(1) * width * inv_freq.size(0) <= kMaxIndex;
    if (!fits) return std::nullopt;
    const int64_t sequences = packed.size(1);
    Tensor index = new_tensor(ids, {sequences});
    Tensor tokens = new_tensor(ids, {sequences, width}), outputs = new_tensor(ids, {sequences, width});
    Tensor context_lens = new_tensor(packed, {sequences});
    Tensor reads = new_tensor(packed, {sequences}), writes = new_tensor(packed, {sequences});
    Tensor page_table = new_tensor(pages, {sequences, pages.size(1)});
    Tensor cos_sin = new_tensor(inv_freq, {sequences * width, 2 * inv_freq.size(0)});
    Tensor kv_slots = new_tensor(ids, {sequences * width});
    const DecodeRows arguments{
        .packed = data<int32_t>(packed),
        .length = data<int32_t>(length),
        .left = data<int32_t>(left),
        .prompt = data<int32_t>(prompt),
        .ids = data<int64_t>(ids),
        .ids_stride = ids.stride(0),
        .rows = rows_of(pages, capacity, inv_freq, cos_sin, kv_slots, sequences, width, rope_scale, 0, page_size),
        .index = data<int64_t>(index),
        .tokens = data<int64_t>(tokens),
        .outputs = data<int64_t>(outputs),
        .context_lens = data<int32_t>(context_lens),
        .reads = data<int32_t>(reads),
        .writes = data<int32_t>(writes),
        .page_table = data<int32_t>(page_table)};
    const Launch launch(packed);
    check_launch(tokenspeed::decode_rows(arguments, launch.stream()), "decode_rows");
    return std::make_tuple(index, tokens, outputs, context_lens, reads, writes, page_table, cos_sin, kv_slots);
}

std::optional<std::tuple<Tensor, Tensor>> paged_rows(const Tensor& index, const Tensor& first, const Tensor& pages,
                                                     const Tensor& capacity, const Tensor& inv_freq, int64_t width,
                                                     double rope_scale, int64_t rope_shift, int64_t page_size) {
    const bool fits = has_kernels(index) && is_column(index, ScalarType::Long) && width > 0 && page_size > 0 &&
                      page_size <= kMaxIndex && rope_shift >= -kMaxIndex && rope_shift <= kMaxIndex &&
                      are_columns({&first}, ScalarType::Int, index.size(0)) && is_column(capacity, ScalarType::Int) &&
                      is_table(pages, ScalarType::Int, capacity.size(0), 1) && pages.size(1) <= kMaxIndex &&
                      is_column(inv_freq, ScalarType::Float) && inv_freq.size(0) > 0 &&
                      index.size(0) * width * inv_freq.size(0) <= kMaxIndex;
    if (!fits) return std::nullopt;
    const int64_t rows = index.size(0) * width;
    Tensor cos_sin = new_tensor(inv_freq, {rows, 2 * inv_freq.size(0)});
    Tensor kv_slots = new_tensor(index, {rows});
    PagedRows arguments =
        rows_of(pages, capacity, inv_freq, cos_sin, kv_slots, index.size(0), width, rope_scale, rope_shift, page_size);
    arguments.index = data<int64_t>(index);
    arguments.first = data<int32_t>(first);
    const Launch launch(index);
    check_launch(tokenspeed::paged_rows(arguments, launch.stream()), "paged_rows");
    return std::make_tuple(cos_sin, kv_slots);
}

std::optional<std::tuple<Tensor, Tensor, Tensor>> draft_rows(const Tensor& index, const Tensor& context,
                                                             const Tensor& capacity, const Tensor& prompt,
                                                             const Tensor& ids, int64_t drafts) {
    const bool fits = has_kernels(index) && is_column(index, ScalarType::Long) && drafts > 0 &&
                      are_columns({&context}, ScalarType::Int, index.size(0)) && is_column(capacity, ScalarType::Int) &&
                      are_columns({&prompt}, ScalarType::Int, capacity.size(0)) &&
                      is_table(ids, ScalarType::Long, capacity.size(0), 1) && index.size(0) * drafts <= kMaxIndex;
    if (!fits) return std::nullopt;
    const int64_t sequences = index.size(0);
    Tensor tokens = new_tensor(ids, {sequences}), outputs = new_tensor(ids, {drafts, sequences});
    Tensor rows = new_tensor(context, {drafts, sequences});
    const DraftRows arguments{.index = data<int64_t>(index),
                              .context = data<int32_t>(context),
                              .capacity = data<int32_t>(capacity),
                              .prompt = data<int32_t>(prompt),
                              .ids = data<int64_t>(ids),
                              .ids_stride = ids.stride(0),
                              .tokens = data<int64_t>(tokens),
                              .rows = data<int32_t>(rows),
                              .outputs = data<int64_t>(outputs),
                              .sequences = static_cast<int>(sequences),
                              .drafts = static_cast<int>(drafts)};
    const Launch launch(index);
    check_launch(tokenspeed::draft_rows(arguments, launch.stream()), "draft_rows");
    return std::make_tuple(tokens, rows, outputs);
}

std::optional<Tensor> accept_tokens(const Tensor& chosen, const Tensor& tokens, const Tensor& outputs,
                                    const Tensor& context_lens, const Tensor& index, const Tensor& min_tokens,
                                    const Tensor& stops, const Tensor& length, const Tensor& left, const Tensor& ids) {
    bool fits = has_kernels(chosen) && chosen.dim() == 2 && chosen.size(1) > 0 && chosen.size(1) <= kAcceptMaxTokens &&
                chosen.size(0) <= kMaxIndex && is_column(index, ScalarType::Long) && index.size(0) == chosen.size(0) &&
                are_columns({&context_lens}, ScalarType::Int, chosen.size(0)) && is_column(length, ScalarType::Int) &&
                are_columns({&left, &min_tokens}, ScalarType::Int, length.size(0)) &&
                is_table(stops, ScalarType::Long, length.size(0), 0) && stops.is_contiguous() &&
                stops.size(1) <= kMaxIndex && is_table(ids, ScalarType::Long, length.size(0), 1);
    for (const Tensor* t : {&chosen, &tokens, &outputs}) {
        fits = fits && is_int64(*t) && t->is_contiguous() && has_shape(*t, {chosen.size(0), chosen.size(1)});
    }
    if (!fits) return std::nullopt;
    Tensor counts = new_tensor(chosen, {chosen.size(0)});
    const AcceptTokens arguments{.chosen = data<int64_t>(chosen),
                                 .tokens = data<int64_t>(tokens),
                                 .outputs = data<int64_t>(outputs),
                                 .context_lens = data<int32_t>(context_lens),
                                 .index = data<int64_t>(index),
                                 .min_tokens = data<int32_t>(min_tokens),
                                 .stops = data<int64_t>(stops),
                                 .length = data<int32_t>(length),
                                 .left = data<int32_t>(left),
                                 .ids = data<int64_t>(ids),
                                 .ids_stride = ids.stride(0),
                                 .counts = data<int64_t>(counts),
                                 .sequences = static_cast<int>(chosen.size(0)),
                                 .tokens_each = static_cast<int>(chosen.size(1)),
                                 .stop_count = static_cast<int>(stops.size(1))};
    const Launch launch(chosen);
    check_launch(tokenspeed::accept_tokens(arguments, launch.stream()), "accept_tokens");
    return counts;
}

}  // namespace

TOKENSPEED_KERNELS(library) {
    TOKENSPEED_KERNEL(library, decode_rows);
    TOKENSPEED_KERNEL(library, paged_rows);
    TOKENSPEED_KERNEL(library, draft_rows);
    TOKENSPEED_KERNEL(library, accept_tokens);
}

}  // namespace tokenspeed::binding
