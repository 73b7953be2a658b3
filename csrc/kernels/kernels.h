// Every launcher of this folder: plain pointers, sizes and a stream. Each starts its kernels
// on the stream without synchronising, allocates nothing, and may be captured in a graph. Strides count elements, not
// bytes. Pointers are aligned to 16 bytes and strides to 8 elements unless a line says otherwise; the bindings check
// it.
#pragma once
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

namespace tokenspeed {

// Whether a pointer is, to 16 bytes.
inline bool is_aligned(const void* pointer) {
    return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

constexpr int kScaleBlock = 128;  // rows and columns of an e4m3 weight under one scale; columns of a row of activations

// Where rows of activations go in e4m3, each 128 columns of a row with a scale of their own: values [rows, columns]
// contiguous and aligned to 8 bytes, scales [ceil(columns / 128), scale_stride] of which a row has one column.
struct Groups {
    uint8_t* values = nullptr;
    float* scales = nullptr;
    int64_t scale_stride = 0;  // at least the rows
};

// ---- rms_norm.cu: x [rows, width], weight [width], out [rows, width] contiguous; width a multiple of 8, at most
// kRmsNormMaxWidth.
constexpr int kRmsNormMaxWidth = 8192;
cudaError_t rms_norm(const __nv_bfloat16* x, int64_t x_stride, const __nv_bfloat16* weight, __nv_bfloat16* out,
                     int64_t rows, int width, float eps, cudaStream_t stream);
// residual [rows, width] contiguous; total is x + residual, rounded, and out its norm.
cudaError_t add_rms_norm(const __nv_bfloat16* x, int64_t x_stride, const __nv_bfloat16* residual,
                         const __nv_bfloat16* weight, __nv_bfloat16* out, __nv_bfloat16* total, int64_t rows, int width,
                         float eps, cudaStream_t stream);
// The same, and out in groups as well.
cudaError_t add_rms_norm_groups(const __nv_bfloat16* x, int64_t x_stride, const __nv_bfloat16* residual,
                                const __nv_bfloat16* weight, __nv_bfloat16* out, __nv_bfloat16* total,
                                const Groups& groups, int64_t rows, int width, float eps, cudaStream_t stream);

// ---- all_reduce.cu: the sum over ranks of x [rows, width], contiguous as are all; width a multiple of 8. Without a
// residual out is the sum, and may be x; with one, total is the sum and the residual, and out its norm. Every rank
// makes the same calls in the same order.
constexpr int kAllReduceMaxWidth = 8192;
constexpr int kAllReduceRanks = 8;  // 2, 4 or 8 of them
constexpr int kAllReduceTags = 32;  // words of `control` before its tags
struct AllReduce {
    const __nv_bfloat16* x;
    const __nv_bfloat16* residual;     // or null
    const __nv_bfloat16* norm_weight;  // [width]
    __nv_bfloat16* out;
    __nv_bfloat16* total;
    uint64_t*
        memory[kAllReduceRanks];  // of each rank all_reduce_memory bytes that every rank can write, zeros at first
    uint32_t* control;            // [kAllReduceTags + max_rows] of this rank, zeros at first
    uint32_t* status;             // host memory, [2]: set [0] and waits end; [1] is set where one has ended so
    uint64_t patience_ns;         // a wait ends after this long, too
    float eps;
    int rank, ranks, rows, width;
    int max_rows, max_width;  // of any call with this memory; max_width a multiple of 256
};
bool all_reduce_supported(const AllReduce& arguments);
int64_t all_reduce_memory(int ranks, int max_rows, int max_width);  // bytes
cudaError_t all_reduce(const AllReduce& arguments, cudaStream_t stream);

// ---- gated_rms_norm.cu: x, gate [tokens, heads, 128] by token and head strides, weight [128], out contiguous.
constexpr int kGatedNormWidth = 128;
cudaError_t gated_rms_norm(const __nv_bfloat16* x, int64_t x_token_stride, int64_t x_head_stride,
                           const __nv_bfloat16* gate, int64_t gate_token_stride, int64_t gate_head_stride,
                           const __nv_bfloat16* weight, __nv_bfloat16* out, int64_t tokens, int heads, float eps,
                           cudaStream_t stream);
// out, rounded to bf16, in groups: a token's heads are the groups of its row.
cudaError_t gated_rms_norm_groups(const __nv_bfloat16* x, int64_t x_token_stride, int64_t x_head_stride,
                                  const __nv_bfloat16* gate, int64_t gate_token_stride, int64_t gate_head_stride,
                                  const __nv_bfloat16* weight, const Groups& out, int64_t tokens, int heads, float eps,
                                  cudaStream_t stream);

// ---- gated_sums.cu: x [rows, 2 width], out [rows, width] contiguous; width a multiple of 8.
cudaError_t silu_mul(const __nv_bfloat16* x, int64_t x_stride, __nv_bfloat16* out, int64_t rows, int width,
                     cudaStream_t stream);
// out, rounded to bf16, in groups; width a multiple of 128.
cudaError_t silu_mul_groups(const __nv_bfloat16* x, int64_t x_stride, const Groups& out, int64_t rows, int width,
                            cudaStream_t stream);
// y [rows, width] += sigmoid(gate [rows]) x [rows, width]; gate of any stride and alignment.
cudaError_t add_sigmoid_gated(__nv_bfloat16* y, int64_t y_stride, const __nv_bfloat16* x, int64_t x_stride,
                              const __nv_bfloat16* gate, int64_t gate_stride, int64_t rows, int width,
                              cudaStream_t stream);

// ---- attention_prologue.cu: see the operator of that name; head_dim 256, rotary 16 * 2^n <= 256.
constexpr int kHeadDim = 256;
struct AttentionPrologue {
    const __nv_bfloat16* qkv;       // [tokens, 2 q_heads D + 2 kv_heads D]
    int64_t qkv_stride;             // between tokens
    const __nv_bfloat16* q_weight;  // [D]
    const __nv_bfloat16* k_weight;  // [D]
    const float* cos_sin;           // [tokens, rotary] contiguous
    void* kv;                       // [pages, 2, kv_heads, page_size, D] bf16, or e4m3
    int64_t page_stride;            // elements
    const int64_t* kv_slots;        // [tokens]
    __nv_bfloat16* q;               // [tokens, q_heads, D]
    int64_t tokens;
    int q_heads, kv_heads, page_size, rotary;
    float eps;
    bool kv_is_e4m3;
};
cudaError_t attention_prologue(const AttentionPrologue& arguments, cudaStream_t stream);

// ---- progress.cu: see the operators of those names. Index arrays contiguous, of any alignment; [I] arrays are tables
// by sequence index.
struct PagedRows {
    const int64_t* index;  // [sequences]
    const int32_t* first;  // [sequences]
    const int32_t* pages;  // [I, table_width] by row stride
    int64_t pages_stride;
    const int32_t* capacity;  // [I]
    const float* inv_freq;    // [frequencies]
    float* cos_sin;           // [sequences width, 2 frequencies]
    int64_t* kv_slots;        // [sequences width]
    int sequences, width, table_width, frequencies, rope_shift, page_size;
    float rope_scale;
};
cudaError_t paged_rows(const PagedRows& arguments, cudaStream_t stream);
struct DecodeRows {
    const int32_t* packed;  // [3, sequences]: index, read slot, write slot
    const int32_t* length;  // [I]
    const int32_t* left;    // [I]
    const int32_t* prompt;  // [I]
    const int64_t* ids;     // [I, at least rows.width] by row stride
    int64_t ids_stride;
    PagedRows rows;         // of the tokens: `index` and `first` stay null, `rope_shift` 0
    int64_t* index;         // [sequences]
    int64_t* tokens;        // [sequences, rows.width]
    int64_t* outputs;       // [sequences, rows.width]
    int32_t* context_lens;  // [sequences]
    int32_t* reads;         // [sequences]
    int32_t* writes;        // [sequences]
    int32_t* page_table;    // [sequences, rows.table_width]
};
cudaError_t decode_rows(const DecodeRows& arguments, cudaStream_t stream);
struct DraftRows {
    const int64_t* index;     // [sequences]
    const int32_t* context;   // [sequences]
    const int32_t* capacity;  // [I]
    const int32_t* prompt;    // [I]
    const int64_t* ids;       // [I, at least 1] by row stride
    int64_t ids_stride;
    int64_t* tokens;   // [sequences]
    int32_t* rows;     // [drafts, sequences]
    int64_t* outputs;  // [drafts, sequences]
    int sequences, drafts;
};
cudaError_t draft_rows(const DraftRows& arguments, cudaStream_t stream);
constexpr int kAcceptMaxTokens = 32;  // a lane each
struct AcceptTokens {
    const int64_t* chosen;  // [sequences, tokens_each] contiguous, as are the next two
    const int64_t* tokens;
    const int64_t* outputs;
    const int32_t* context_lens;  // [sequences]
    const int64_t* index;         // [sequences]
    const int32_t* min_tokens;    // [I]
    const int64_t* stops;         // [I, stop_count] contiguous
    int32_t* length;              // [I]
    int32_t* left;                // [I]
    int64_t* ids;                 // [I, at least 1] by row stride
    int64_t ids_stride;
    int64_t* counts;  // [sequences]
    int sequences, tokens_each, stop_count;
};
cudaError_t accept_tokens(const AcceptTokens& arguments, cudaStream_t stream);

// ---- causal_conv1d.cu: see the operator of that name; taps 4, channels a multiple of 8.
constexpr int kConvTaps = 4;
struct CausalConv1d {
    const __nv_bfloat16* x;  // [tokens, channels]
    int64_t x_stride;
    const __nv_bfloat16* weight;  // [channels, taps]
    __nv_bfloat16* window;        // [slots, entries, channels]
    int64_t slot_stride, entry_stride;
    const int32_t* cu_seqlens;    // [sequences + 1]
    const int32_t* context_lens;  // [sequences]
    const int32_t* read_slot;     // [sequences]
    const int32_t* write_slot;    // [sequences]
    const int32_t* snapshots;     // [snapshot_count, 3]: sequence, token count, slot
    __nv_bfloat16* out;           // [tokens, channels]
    int tokens, channels, entries, sequences, snapshot_count;
};
cudaError_t causal_conv1d(const CausalConv1d& arguments, cudaStream_t stream);

// ---- copies.cu: source and destination [pairs] int32; a pair with a negative entry is skipped.
// slots: slot_bytes each, slot_stride bytes apart, both multiples of 16.
cudaError_t copy_states(uint8_t* slots, int64_t slot_stride, int64_t slot_bytes, const int32_t* source,
                        const int32_t* destination, int pairs, cudaStream_t stream);
// pages: `boxes` boxes of box_rows rows of row_bytes (a multiple of 16) a page, contiguous; the first rows[pair] rows
// of each are copied.
cudaError_t copy_pages(uint8_t* pages, int64_t page_stride, int boxes, int box_rows, int row_bytes,
                       const int32_t* source, const int32_t* destination, const int32_t* rows, int pairs,
                       cudaStream_t stream);

// ---- moe_route.cu: logits [tokens, experts] by row stride; experts 256 or 512; top_k at most kMaxTopK.
// context_lens: of the sequences of `tokens` rows each, negative for padding, or null. weights, chosen [tokens, top_k];
// order [tokens top_k]; offsets [experts + 1]. One launch up to kRouteOneLaunch tokens, else two.
constexpr int kMaxTopK = 16;
constexpr int kRouteOneLaunch = 128;
struct SequenceRows {
    const int32_t* context_lens;
    int tokens;
};
cudaError_t moe_route(const __nv_bfloat16* logits, int64_t logits_stride, SequenceRows sequences,
                      __nv_bfloat16* weights, int32_t* chosen, int32_t* order, int32_t* offsets, int tokens,
                      int experts, int top_k, cudaStream_t stream);

// ---- gated_delta_rule_decode.cu: see the operator of that name; dk = dv = 128, taps 4. Any alignment for ring, a,
// b, a_log, dt_bias, norm_weight, cursor and the index arrays.
struct GatedDeltaRuleDecode {
    const __nv_bfloat16*
        qkv;  // [sequences tokens, channels], strides multiples of 8; channels = (2 key_heads + value_heads) 128
    const __nv_bfloat16* z;  // [sequences tokens, value_heads 128]
    const __nv_bfloat16* a;  // [sequences tokens, value_heads], any stride
    const __nv_bfloat16* b;
    int64_t qkv_stride, z_stride, a_stride, b_stride;
    const __nv_bfloat16* conv_weight;  // [channels, 4]
    const float* a_log;                // [value_heads]
    const float* dt_bias;              // [value_heads]
    const void* norm_weight;           // [128] bf16 or fp32
    bool norm_weight_is_float;
    float eps;
    float* state;           // [slots, value_heads, 128, 128] by slot stride, the rest contiguous; so are the next three
    float* ring;            // [slots, ring_rows, ring_width = key_heads 128 + value_heads 128 + value_heads]
    int32_t* cursor;        // [slots, value_heads]
    __nv_bfloat16* window;  // [slots, window_entries, channels]
    int64_t state_stride, ring_stride, cursor_stride, window_stride;
    const int32_t* context_lens;  // [sequences]
    const int32_t* read_slot;     // [sequences]
    const int32_t* write_slot;    // [sequences]
    __nv_bfloat16* out;           // [sequences tokens, value_heads 128] contiguous
    int sequences, tokens, key_heads, value_heads, channels, ring_rows, ring_width, window_entries;
    bool settled = false;       // state .. window and context_lens .. write_slot may be read before the wait
    int split = 0;              // blocks per key head: 1, 2, 4 or 8; 0 chooses by the batch
    bool ring_vectors = false;  // the launcher sets it: ring rows may be read 16 bytes at a time
};
bool gated_delta_rule_decode_supported(const GatedDeltaRuleDecode& arguments);
cudaError_t gated_delta_rule_decode(GatedDeltaRuleDecode arguments, cudaStream_t stream);

// ---- linear.cu: out = x weight^T; x [rows, inputs] by row stride, weight [outputs, inputs] contiguous, out
// [rows, outputs] by row stride; inputs a multiple of 32. More rows than kLinearMaxRows are a job for cuBLAS. With a
// scale, [ceil(outputs / 128), ceil(inputs / 128)] contiguous of any alignment, weights are e4m3 and each block of
// 128 x 128 is multiplied by its scale.
constexpr int kLinearMaxRows = 16;
struct Linear {
    const __nv_bfloat16* x;
    int64_t x_stride;
    const void* weight;  // bf16, or e4m3 with a scale
    __nv_bfloat16* out;  // any alignment
    int64_t out_stride;
    int rows, outputs, inputs;
    const float* scale = nullptr;
    // Of e4m3 weights: rows of bf16, contiguous, that go on below them; out has outputs + tail_outputs columns.
    const __nv_bfloat16* tail = nullptr;  // [tail_outputs, inputs]
    int tail_outputs = 0;
    int tail_clusters = 0;  // the launcher sets it: of the grid, those that have the tail
    // add_rms_norm_linear: x + residual is the sum, its norm the operand; all [rows, inputs] contiguous.
    const __nv_bfloat16* residual = nullptr;
    const __nv_bfloat16* norm_weight = nullptr;
    __nv_bfloat16* normed = nullptr;
    __nv_bfloat16* sum = nullptr;
    float eps = 0;
    // silu_mul_linear, where not null: out += sigmoid(gate) product, one gate a row.
    const __nv_bfloat16* gate = nullptr;
    int64_t gate_stride = 0;
};
bool linear_supported(const Linear& arguments);
cudaError_t linear(const Linear& arguments, cudaStream_t stream);
// The same with an operand that is made of x on the way; x [rows, 2 inputs] of silu_mul_linear. Up to
// kLinearMaxStagedRows rows, where they fit the shared memory beside the weights.
constexpr int kLinearMaxStagedRows = 8;
bool add_rms_norm_linear_supported(const Linear& arguments);
cudaError_t add_rms_norm_linear(const Linear& arguments, cudaStream_t stream);
bool silu_mul_linear_supported(const Linear& arguments);
cudaError_t silu_mul_linear(const Linear& arguments, cudaStream_t stream);

// ---- quantise_groups.cu: x [rows, columns] bf16 or fp32 by row stride; columns a multiple of 8.
cudaError_t quantise_groups(const void* x, bool x_is_float, int64_t x_stride, const Groups& out, int64_t rows,
                            int columns, cudaStream_t stream);

// ---- linear_fp8.cu: out = x weight^T of e4m3 operands, contiguous but for x_scale; inputs a multiple of 16; scales of
// any alignment.
struct LinearFp8 {
    const uint8_t* x;      // [rows, inputs]
    const float* x_scale;  // [rows, ceil(inputs / 128)] by strides
    int64_t x_scale_row_stride, x_scale_block_stride;
    const uint8_t* weight;  // [outputs, inputs]
    const float* scale;     // [ceil(outputs / 128), ceil(inputs / 128)]
    void* out;              // [rows, outputs] bf16 or fp32
    bool out_is_float;
    int rows, outputs, inputs;
};
bool linear_fp8_supported(const LinearFp8& arguments);
cudaError_t linear_fp8(const LinearFp8& arguments, cudaStream_t stream);

// ---- sample.cu: see the operator of that name; logits [rows, vocabulary] bf16 or fp32 by row stride, of any
// alignment.
constexpr int kSampleMaxVocabulary = 1 << 18;  // sums of 14-bit pieces of masses stay within 32 bits
struct Sample {
    const void* logits;
    bool logits_are_float;
    int64_t logits_stride;
    const float* temperature;  // [rows], as are the others
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const int64_t* seed;
    const int64_t* output;
    const int64_t* index;  // [rows] by stride: where a row's values stand in those ahead of `output`; null: at the row
    int64_t index_stride;
    int64_t* ids;
    void* workspace;  // of sample_workspace bytes, aligned to 16, any content
    int rows, vocabulary;
    // The launcher sets them.
    int groups = 0;        // of a block
    bool vectors = false;  // rows may be read 16 bytes at a time
};
bool sample_supported(const Sample& arguments);
size_t sample_workspace(int rows);
cudaError_t sample(Sample arguments, cudaStream_t stream);

// ---- sample_ranks.cu: ids as of `sample`, from logits whose vocabulary is split over ranks; rank r holds ids r width
// .. (r + 1) width - 1. Every rank makes the same calls in the same order, with the same values but for the logits;
// width a multiple of 4, logits bf16 or fp32 by row stride, of any alignment.
constexpr int kSampleRanksMax = 8;    // 2, 4 or 8 of them
constexpr int kSampleRanksTags = 32;  // words of `control` before its tags
struct SampleRanks {
    const void* logits;        // [rows, width]
    const float* temperature;  // [rows], as are the others; null: 0, and the others are not read
    const int32_t* top_k;
    const float* top_p;
    const float* min_p;
    const int64_t* seed;
    const int64_t* output;
    int64_t* ids;
    uint64_t*
        memory[kSampleRanksMax];  // of each rank sample_ranks_memory bytes that every rank can write, zeros at first
    uint32_t* control;            // [kSampleRanksTags + max_clusters] of this rank, zeros at first
    uint32_t* status;             // host memory, [2]: set [0] and waits end; [1] is set where one has ended so
    uint64_t patience_ns;         // a wait ends after this long, too
    int64_t logits_stride;
    int logits_are_float;
    int rows, width, rank, ranks;
    int clusters[3];   // of 8, 4 and 2 blocks: how many every rank can hold at once
    int max_clusters;  // of them
    // The launcher sets them.
    int chunk;    // ids of one block
    int vectors;  // whether rows may be read 16 bytes at a time
};
bool sample_ranks_supported(const SampleRanks& arguments);
int64_t sample_ranks_memory(int ranks, int max_clusters);  // bytes
int sample_ranks_clusters(int blocks);                     // that this device can hold at once
cudaError_t sample_ranks(SampleRanks arguments, cudaStream_t stream);

// ---- gated_delta_rule_prefill.cu: see the operator of that name; dk = dv = 128. Any alignment for ring, a, b, a_log,
// dt_bias, cursor and the index arrays.
struct GatedDeltaRulePrefill {
    const __nv_bfloat16* qkv;  // [tokens, (2 key_heads + value_heads) 128], stride a multiple of 8
    const void* a;             // [tokens, value_heads] bf16, or fp32 where gates_are_float, any stride
    const void* b;
    bool gates_are_float;
    int64_t qkv_stride, a_stride, b_stride;
    const float* a_log;    // [value_heads]
    const float* dt_bias;  // [value_heads]
    float* state;          // [slots, value_heads, 128, 128] by slot stride, the rest contiguous; so are the next two
    const float* ring;     // [slots, ring_rows, ring_width = key_heads 128 + value_heads 128 + value_heads]
    int32_t* cursor;       // [slots, value_heads]
    int64_t state_stride, ring_stride, cursor_stride;
    const int32_t* cu_seqlens;    // [sequences + 1]
    const int32_t* context_lens;  // [sequences]
    const int32_t* read_slot;     // [sequences]
    const int32_t* write_slot;    // [sequences]
    const int32_t* snapshots;     // [snapshot_count, 3]: sequence, token count, slot
    __nv_bfloat16* out;           // [tokens, value_heads, 128] contiguous
    int tokens, key_heads, value_heads, ring_rows, ring_width, sequences, snapshot_count;
    int64_t longest;  // no sequence has more tokens
    int64_t slots;
    void* workspace;  // aligned to 16 bytes
};
bool gated_delta_rule_prefill_supported(const GatedDeltaRulePrefill& arguments);
int64_t gated_delta_rule_prefill_workspace(const GatedDeltaRulePrefill& arguments);  // bytes, from the sizes alone
cudaError_t gated_delta_rule_prefill(const GatedDeltaRulePrefill& arguments, cudaStream_t stream);

// ---- paged_attention_decode.cu, paged_attention_prefill.cu: see the operators of those names; head_dim 256, pages of
// kPageTokens.
constexpr int kPageTokens = 64;
struct PagedAttention {
    const __nv_bfloat16* q;  // [tokens, q_heads, D] by token stride
    int64_t q_stride;
    const __nv_bfloat16* gate;  // [tokens, q_heads, D], any strides and alignment
    int64_t gate_token_stride, gate_head_stride, gate_stride;
    const void* kv;  // [pages, 2, kv_heads, kPageTokens, D] by page stride, bf16 or e4m3
    bool kv_is_e4m3;
    int64_t page_stride, pages;  // the stride in elements
    const int32_t* page_table;   // [sequences, table_width] by table stride
    int64_t table_stride;
    const int32_t* context_lens;  // [sequences]
    __nv_bfloat16* out;           // [tokens, q_heads, D] contiguous
    int sequences, table_width, q_heads, kv_heads;
    float scale;
    // The launcher sets them.
    int group = 0;  // query heads to a KV head
    uint32_t group_inverse = 0;
    float log2_scale = 0;       // scale, for scores in units of log 2
    bool gate_vectors = false;  // gates may be read four at a time
};
struct PagedAttentionDecode : PagedAttention {
    int tokens;          // of each sequence
    int first_key;       // below kPageTokens and every context; what stands before it is not seen, NaN included
    bool settled;        // context_lens, page_table and whole pages before the context may be read before the wait
    float* parts;        // [slots of the workspace, D]; see paged_attention_decode_shape
    float2* part_sums;   // [slots]: maximum in units of log 2, sum
    int row_groups = 0;  // the launcher sets it
};
struct PagedAttentionDecodeShape {
    int blocks;
    int tiles;      // of 16 rows, a row group
    int64_t slots;  // of the workspace
};
// How the launcher will cut the work: it looks at shapes alone.
PagedAttentionDecodeShape paged_attention_decode_shape(const PagedAttentionDecode& arguments);
cudaError_t paged_attention_decode(PagedAttentionDecode arguments, cudaStream_t stream);
struct PagedAttentionPrefill : PagedAttention {
    const int32_t* cu_seqlens;  // [sequences + 1]; null: every sequence has tokens_each, or is padding
    int64_t tokens;             // of all sequences
    int max_parts;              // of the workspace; see paged_attention_prefill_parts
    float* parts;               // [max_parts, kPrefillPartRows, D]
    float2* part_sums;          // [max_parts, kPrefillPartRows]: maximum in units of log 2, sum
    int tokens_each = 1;        // 1 beside cu_seqlens
    int* next_item = nullptr;   // of the workspace, any content: where max_parts is 0, tiles are claimed from it
};
constexpr int kPrefillPartRows = 128;
// Whether a decode call of that many tokens in all is faster in the prefill kernel: many rows read the same keys.
bool paged_attention_decode_as_prefill(const PagedAttention& arguments, int64_t tokens);
// Whether a lone sequence of that many tokens has so few rows that the decode kernel is faster.
bool paged_attention_prefill_is_short(const PagedAttention& arguments, int64_t tokens);
// How many parts the keys of that many tokens may be cut into, by the shapes alone; 0: they never are.
int paged_attention_prefill_parts(const PagedAttention& arguments, int64_t tokens);
cudaError_t paged_attention_prefill(PagedAttentionPrefill arguments, cudaStream_t stream);

// ---- moe_experts_decode.cu, moe_experts_prefill.cu and moe_experts_prefill_fp8.cu: see the operator moe_experts;
// hidden and width multiples of 64. The decode kernels take up to kMoeDecodeTokens tokens, the prefill kernels any
// number. With scales, of any alignment, weights are e4m3, hidden and width multiples of 128, and each block of 128 x
// 128 is multiplied by its scale.
constexpr int kMoeDecodeTokens = 64;
struct MoeExperts {
    const __nv_bfloat16* x;  // [tokens, hidden] by row stride
    int64_t x_stride;
    const __nv_bfloat16* weights;  // [tokens, top_k]
    const int32_t* chosen;         // [tokens, top_k], the expert of each choice
    const int32_t* order;          // [tokens top_k], any alignment, as offsets, chosen and weights
    const int32_t* offsets;        // [experts + 1]
    const void* gate_up;           // [experts, 2 width, hidden] bf16, or e4m3 with scales
    const void* down;              // [experts, hidden, width]
    __nv_bfloat16* out;            // [tokens, hidden]
    uint8_t* workspace;            // of moe_experts_..._workspace bytes, any content
    int tokens, experts, top_k, hidden, width;
    int first_expert;  // choices of experts outside first_expert .. first_expert + experts add nothing
    const float* gate_up_scale = nullptr;  // [experts, 2 width / 128, hidden / 128]
    const float* down_scale = nullptr;     // [experts, hidden / 128, width / 128]
    Groups groups = {};                    // moe_experts_prefill_fp8: x, where somebody has written its groups
    int model_experts = 0;                 // of a model that has more experts than these: how many
};
bool moe_experts_decode_supported(const MoeExperts& arguments);
size_t moe_experts_decode_workspace(const MoeExperts& arguments);
cudaError_t moe_experts_decode(const MoeExperts& arguments, cudaStream_t stream);
bool moe_experts_prefill_supported(const MoeExperts& arguments);
size_t moe_experts_prefill_workspace(const MoeExperts& arguments);
cudaError_t moe_experts_prefill(const MoeExperts& arguments, cudaStream_t stream);
// The same with scales: activations are quantised too.
bool moe_experts_prefill_fp8_supported(const MoeExperts& arguments);
size_t moe_experts_prefill_fp8_workspace(const MoeExperts& arguments);
cudaError_t moe_experts_prefill_fp8(const MoeExperts& arguments, cudaStream_t stream);

// ---- moe_block.cu: see the operator of that name; up to kMoeBlockTokens tokens, 256 or 512 experts, sizes multiples
// of 64.
constexpr int kMoeBlockTokens = 8;
struct MoeBlock {
    const __nv_bfloat16* x;  // [tokens, hidden] by row stride
    int64_t x_stride;
    const __nv_bfloat16* residual;     // [tokens, hidden]
    const __nv_bfloat16* norm_weight;  // [hidden]
    float eps;
    const void* in_proj;      // [projections, hidden]: the shared expert's gate and up, the router, its own gate
    const void* gate_up;      // [held, 2 width, hidden]
    const void* down;         // [held, hidden, width]
    const void* shared_down;  // [hidden, shared]
    uint32_t* scratch;        // moe_block_scratch() words, aligned to 16 bytes, zeros at first
    __nv_bfloat16* out;       // [tokens, hidden]
    __nv_bfloat16* sum;       // [tokens, hidden]: x + residual
    uint8_t* workspace;       // of moe_block_workspace bytes, any content
    int tokens, experts, held, first_expert, top_k, hidden, width, shared, projections;
    SequenceRows sequences;  // whose padding rows choose nobody
    // With them weights are e4m3, sizes multiples of 128, and in_proj is [2 shared, hidden] alone.
    const __nv_bfloat16* router = nullptr;  // [projections - 2 shared, hidden]: the router, the shared expert's gate
    const float* in_scale = nullptr;        // [2 shared / 128, hidden / 128], any alignment, as the others
    const float* gate_up_scale = nullptr;   // [held, 2 width / 128, hidden / 128]
    const float* down_scale = nullptr;      // [held, hidden / 128, width / 128]
    const float* shared_scale = nullptr;    // [hidden / 128, shared / 128]
};
bool moe_block_supported(const MoeBlock& arguments);
size_t moe_block_workspace(const MoeBlock& arguments);
int64_t moe_block_scratch(const MoeBlock& arguments);  // from the sizes alone
cudaError_t moe_block(const MoeBlock& arguments, cudaStream_t stream);

// ---- ffn_block.cu: see the operator of that name; up to kFfnBlockTokens tokens, sizes multiples of 64.
constexpr int kFfnBlockTokens = 8;
struct FfnBlock {
    const __nv_bfloat16* x;  // [tokens, hidden] by row stride
    int64_t x_stride;
    const __nv_bfloat16* residual;     // [tokens, hidden]
    const __nv_bfloat16* norm_weight;  // [hidden]
    float eps;
    const __nv_bfloat16* gate_up;  // [2 width, hidden]
    const __nv_bfloat16* down;     // [hidden, width]
    uint32_t* scratch;             // ffn_block_scratch() words, aligned to 16 bytes, zeros at first
    __nv_bfloat16* out;            // [tokens, hidden]
    __nv_bfloat16* sum;            // [tokens, hidden]: x + residual
    __nv_bfloat16* workspace;      // [tokens, width], any content
    int tokens, hidden, width;
};
bool ffn_block_supported(const FfnBlock& arguments);
int64_t ffn_block_scratch(const FfnBlock& arguments);  // from the sizes alone
cudaError_t ffn_block(const FfnBlock& arguments, cudaStream_t stream);

}  // namespace tokenspeed
