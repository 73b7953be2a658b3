// Attention of a few new tokens a sequence over paged KV, with the output gate. Contract: tokenspeed/ops/attention.py.
//
// Algorithm. The T tokens x (q_heads / kv_heads) query heads that read one KV head are the rows of one product, so KV
// is read once a group: up to 64 rows a block, more in row groups. Softmax runs online over pages of 64 tokens (Milakov
// and Gimelshein 2018), the context is split over blocks (flash-decoding, Dao et al. 2023) and the parts are merged:
//     O = sum_i 2^{m_i - m} O_i / sum_i 2^{m_i - m} l_i,  m = max_i m_i, scores in units of log 2.
//
// Split. All (row group, sequence, page) stand in one line, which is cut into one range a block. So every block streams
// the same number of pages, give or take one, whatever the lengths, the grid depends on the shapes alone, and the work
// follows from context_lens on the device: a captured graph stays right when they change. A range holds whole sequences
// but for its ends, so a block leaves at most two parts in the workspace: slot 2 c for the sequence that it enters in
// the middle or at its start, 2 c + 1 for the one that it leaves unfinished. Whole sequences are finished at once. A
// second launch finds the parts of a sequence by the same arithmetic and merges them. Its grid is the smaller of the
// pairs of a sequence and a row group, and the borders between ranges: a batch of many short sequences has far more
// pairs than sequences that a border cuts, and blocks that only find that out would take longer than the merge.
//
// Bytes. K and V once: 64 KB a page and KV head; batch 64 x 8192 tokens x 2 heads: 1.07 GB = 250 us at 4.3 TB/s. Parts:
// 1 KB a row and block. Flops: 16 rows x 64 tokens take about 800 cycles of four warps a page, while the page takes
// 3,500 to arrive at a multiprocessor's share of the bandwidth: latency within a page is hidden without overlap.
//
// Tiling. One block a multiprocessor: a producer warp keeps five or six 32 KB boxes in flight (one TMA instruction
// each), four consumer warps compute; 64 rows are shared by two such teams, so that one hides the other's latency. For
// the scores warp w takes tokens 16 w .. 16 w + 15 of the page, for the output columns 64 w .. 64 w + 63 of all tokens,
// so the output needs 32 registers a 16 rows, no warp keeps a maximum of its own and nothing is merged between warps;
// the price is two barriers of four warps a page. (Warps that own tokens to the end, as in FlashMLA, need 128 registers
// a 16 rows and a merge of four outputs a sequence.)
//
// Pages in e4m3: half the bytes, products in fp16, which is exact for them (paged_attention.h). A lane converts what
// ldmatrix gives it, two values an instruction and 128 a page: by estimate 250 cycles of the 1,750 that such a page
// takes to arrive. It holds four neighbouring columns of a key, so the queries' columns change places within 16; of
// values, ldmatrix transposes pairs of columns, so even and odd columns of the output lie in accumulators of their own.
// Predicted: 64 x 8192 keys 140 us (bf16: 276), 1 x 50176 keys 20 us (31). A step of one sequence behind 50176 keys,
// ten layers of 16:2 heads, took 2.27 ms on an H200, and 2.38 with pages in bf16 (docs/quantization.md): 11 us a layer.
//
// Measured on an H100 (read 3,000 to 3,040 GB/s), 16:2 heads, one token unless said: 64 x 8192 keys 378 us = 94% of the
// read ceiling; 8 x 8192 56 us = 80%; 1 x 32768 31 to 34 us by the run = 66 to 72%; 1 x 1024 5.9 us; 256 x 500 108 us =
// 82%, where a merge over all pairs took 137; four tokens, 32:2 heads, 8 x 8188 93 us = 48%, by one team 101. About 6
// us of a call are latency: the chain lengths, page ids, pages at the start, and the merge at the end; the hint ahead
// of the wait takes 0.2 of it. Tried and lost: a merge that reads its parts twice and finds them only after its
// wait, 36.3 us at 1 x 32768, 64 us at 8 x 8192; a merge over pairs of 54 registers that reads its gates last, 79 us
// instead of 75 at four tokens, 8 x 8188, 16:2 heads. What stands here instead is to give the 75 back: not timed.
//
// budget: decode_kernel registers<=255 hot sass=HMMA
// budget: merge_kernel registers<=40 hot
#include <launch.h>
#include <ptx.h>
#include <reduce.h>

#include <algorithm>

#include "paged_attention.h"

namespace tokenspeed {
namespace {

using namespace attention;

constexpr int kTileRows = 16;
constexpr int kWarps = 4;  // of a team
constexpr int kTeamThreads = kWarps * 32;
constexpr int kWarpColumns = kDim / kWarps;  // of the output
constexpr float kLowest = -3e38f;            // below any score; two of them may be subtracted, unlike two infinities
constexpr uint32_t kFirstTeamBarrier = 1;

template <typename Kv, int kTiles>
struct Storage {
    static constexpr int kRows = kTiles * kTileRows;
    static constexpr int kStages = Format<Kv>::kConverted ? 8 : kTiles < 4 ? 6 : 5;
    static constexpr int kTeams = kTiles < 4 ? 1 : 2;
    static constexpr int kConsumers = kTeams * kTeamThreads, kThreads = kConsumers + 32;

    alignas(1024) uint8_t ring[kStages][Format<Kv>::kBoxBytes];
    alignas(1024) uint8_t query[kRows * kDim * 2];     // rows of 512 bytes, swizzled: see query_address
    alignas(1024) uint8_t weights[kRows * kPage * 2];  // of a page, rows of 128 bytes, swizzled
    float maximum[kWarps][kRows];
    float sum[kWarps][kRows];
    float scale[kRows];  // of scores, pages in e4m3 only
    uint64_t full[kStages], empty[kStages];
};

__device__ __forceinline__ int pages_of(const PagedAttentionDecode& p, int sequence) {
    const int context = p.context_lens[sequence];
    return context < 0 ? 0 : static_cast<int>((static_cast<uint32_t>(context) + p.tokens + kPage - 1) / kPage);
}

// The line of all units, and how it is cut: the first blocks get one unit more where it does not divide.
struct Line {
    int pages;   // of all sequences
    int units;   // pages times row groups
    int blocks;  // that have any

    __device__ __forceinline__ int start_of(int block) const {
        return block * (units / blocks) + min(block, units % blocks);
    }
    __device__ __forceinline__ int owner_of(int unit) const {
        const int share = units / blocks, longer = units % blocks * (share + 1);
        return unit < longer ? unit / (share + 1) : units % blocks + (unit - longer) / share;
    }
};

__device__ __forceinline__ Line line_of(const PagedAttentionDecode& p, int blocks) {
    const int pages = count_all(p.sequences, [&](int sequence) { return pages_of(p, sequence); });
    const int units = pages * p.kv_heads * p.row_groups;
    return {pages, units, min(blocks, units)};
}

// A run of pages of one sequence for one row group.
struct Segment {
    int group, sequence;
    int first_page, last_page;
    bool whole;  // all pages of the sequence
};

// Calls visit(segment) for what this block has to do, in order. By whole warps.
template <typename Visit>
__device__ __forceinline__ void each_segment(const PagedAttentionDecode& p, const Line& line, Visit visit) {
    const int block = blockIdx.x;
    if (block >= line.blocks) return;
    int unit = line.start_of(block), group = unit / line.pages;
    const int end = line.start_of(block + 1);
    auto [sequence, page] =
        locate(p.sequences, unit % line.pages, [&](int candidate) { return pages_of(p, candidate); });
    while (unit < end) {
        const int pages = pages_of(p, sequence);
        const int taken = min(pages - page, end - unit);
        if (taken > 0) visit(Segment{group, sequence, page, page + taken, taken == pages});
        unit += taken;
        page = 0;
        if (++sequence == p.sequences) {
            sequence = 0;
            ++group;
        }
    }
}

template <typename Kv, int kTiles>
__device__ __forceinline__ void produce(Storage<Kv, kTiles>& storage, const CUtensorMap* map,
                                        const PagedAttentionDecode& p, const Line& line) {
    RingPosition<Storage<Kv, kTiles>::kStages> at;
    each_segment(p, line, [&](const Segment& segment) {
        PageIds ids(p, segment.sequence, segment.first_page, segment.last_page);
        const int head = segment.group / p.row_groups;
        for (int page = segment.first_page; page < segment.last_page; ++page) {
            const int id = ids.id(page);
            for (int part = kKeys; part <= kValues; ++part) {
                ptx::mbarrier_wait(&storage.empty[at.stage], at.parity ^ 1);
                if (ptx::elect_one()) {
                    load_box<Kv>(storage.ring[at.stage], map, &storage.full[at.stage], part, head, p.kv_heads, id);
                }
                at.next();
            }
        }
    });
}

// Where the lane's row of the fragment that ldmatrix_x4 loads begins: rows of the 16 x 16 block at `chunk` (of 8
// columns), a row `row_chunks` wide and swizzled by its lowest three bits.
__device__ __forceinline__ uint32_t fragment_address(uint32_t base, int row, int chunk, int row_chunks) {
    return base + static_cast<uint32_t>((row * row_chunks + (chunk ^ (row & 7))) * 16);
}

// A team has its own tiles of the rows; teams share the boxes alone.
template <typename Kv, int kAllTiles>
class Consumer {
    using F = Format<Kv>;
    using Operand = typename F::Operand;
    using Shared = Storage<Kv, kAllTiles>;
    static constexpr int kParts = F::kConverted ? 2 : 1;  // operands of 16 columns that ldmatrix_x4 loads
    static constexpr int kRows = Shared::kRows;           // of all teams
    static constexpr int kTiles = kAllTiles / Shared::kTeams;

  public:
    __device__ __forceinline__ Consumer(Shared& storage, const PagedAttentionDecode& p)
        : storage_(storage),
          p_(p),
          team_(Shared::kTeams == 1 ? 0 : ptx::warp_id() / kWarps),
          warp_(ptx::warp_id() % kWarps),
          lane_(threadIdx.x % 32) {}

    __device__ __forceinline__ void run(const Segment& segment) {
        context_ = p_.context_lens[segment.sequence];
        first_row_ = segment.group % p_.row_groups * kRows;
        load_query(segment);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                maximum_[tile][half] = -INFINITY;
                sum_[tile][half] = 0;
            }
#pragma unroll
            for (int n = 0; n < 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) output_[tile][n][i] = 0;
            }
        }
        barrier();  // the queries are there
        for (int page = segment.first_page; page < segment.last_page; ++page) consume(page * kPage);
        finish(segment);
    }

  private:
    __device__ __forceinline__ void barrier() const {
        ptx::named_barrier_sync(kFirstTeamBarrier + team_, kTeamThreads);
    }

    __device__ __forceinline__ int tile_row(int tile) const { return (team_ * kTiles + tile) * kTileRows; }

    // The rows of the accumulators that a lane holds.
    __device__ __forceinline__ int row_of(int tile, int half) const { return tile_row(tile) + half * 8 + lane_ / 4; }

    // How many tokens of the sequence a row sees.
    __device__ __forceinline__ int visible(int tile, int half) const {
        return context_ + min(place_of_row(p_, first_row_ + row_of(tile, half)).token, p_.tokens - 1) + 1;
    }

    __device__ __forceinline__ int rows_left() const { return p_.tokens * p_.group - first_row_; }

    __device__ __forceinline__ int64_t first_token(const Segment& segment) const {
        return static_cast<int64_t>(segment.sequence) * p_.tokens;
    }

    // Row r of a sequence is token r / group, query head r % group of the KV head; missing rows become zero. For keys
    // in e4m3 the columns of 16 change places: a lane has four neighbours of a key where an mma wants two and, eight
    // further, two.
    __device__ __forceinline__ void load_query(const Segment& segment) {
        constexpr int kChunks = kDim / 8;
        const int head = segment.group / p_.row_groups * p_.group;
#pragma unroll 2
        for (int i = threadIdx.x % kTeamThreads; i < kTiles * kTileRows * kChunks; i += kTeamThreads) {
            const int row = tile_row(0) + i / kChunks, chunk = i % kChunks;
            uint4 values{};
            if (row < rows_left()) {
                const auto [token, query_head] = place_of_row(p_, first_row_ + row);
                values = *reinterpret_cast<const uint4*>(p_.q + (first_token(segment) + token) * p_.q_stride +
                                                         (head + query_head) * kDim + chunk * 8);
            }
            const auto place = [&](int at) { return storage_.query + (row * kChunks + (at ^ (row & 7))) * 16; };
            if constexpr (F::kConverted) {
                float divisor;
                values = row_to_half(values, divisor);  // a warp has one row
                reinterpret_cast<uint2*>(place(chunk & ~1))[chunk % 2] = make_uint2(values.x, values.z);
                reinterpret_cast<uint2*>(place(chunk | 1))[chunk % 2] = make_uint2(values.y, values.w);
                if (chunk == 0) storage_.scale[row] = p_.log2_scale * divisor;
            } else {
                *reinterpret_cast<uint4*>(place(chunk)) = values;
            }
        }
    }

    // To units of log 2.
    __device__ __forceinline__ float score_scale(int row) const {
        if constexpr (F::kConverted) return storage_.scale[row];
        return p_.log2_scale;
    }

    // One page: its first token is `position`.
    __device__ __forceinline__ void consume(int position) {
        float scores[kTiles][2][4];
        wait_for_box();
        multiply_keys(scores);
        release_box();
        if (position < p_.first_key) hide_first(scores);
        float rescale[kTiles][2];
        softmax(scores, rescale, position);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int n = 0; n < 8; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) output_[tile][n][i] *= rescale[tile][i / 2];
            }
        }
        wait_for_box();
        multiply_values(position);
        release_box();
    }

    __device__ __forceinline__ void wait_for_box() { ptx::mbarrier_wait(&storage_.full[at_.stage], at_.parity); }

    __device__ __forceinline__ void release_box() {
        __syncwarp();
        if (lane_ == 0) ptx::mbarrier_arrive(&storage_.empty[at_.stage]);
        at_.next();
    }

    // scores = Q K^T for the warp's 16 tokens.
    __device__ __forceinline__ void multiply_keys(float (&scores)[kTiles][2][4]) {
        constexpr int kSteps = kDim / (16 * kParts), kUnroll = Shared::kTeams > 1 ? 4 : kSteps;  // or two teams spill
        constexpr int kChains = kTiles == 1 ? 2 : 1;  // independent sums, so that one hides the other's latency
        float sums[kChains][kTiles][2][4] = {};
        const uint32_t keys = ptx::shared_address(storage_.ring[at_.stage]);
        const uint32_t query = ptx::shared_address(storage_.query);
        const int token = warp_ * 16 + lane_ % 8 + lane_ / 16 * 8;
#pragma unroll kUnroll
        for (int k = 0; k < kSteps; ++k) {
            uint32_t key[4];
            ptx::ldmatrix_x4(key, fragment_address(keys + k / 4 * kGroupBytes, token, k % 4 * 2 + lane_ / 8 % 2, 8));
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                uint32_t first[2] = {key[0], key[1]}, second[2] = {key[2], key[3]};  // eight tokens each
                if constexpr (F::kConverted) {
                    ptx::unpack_e4m3(key[part], first[0], first[1]);
                    ptx::unpack_e4m3(key[2 + part], second[0], second[1]);
                }
                const int step = k * kParts + part;
#pragma unroll
                for (int tile = 0; tile < kTiles; ++tile) {
                    float (&sum)[2][4] = sums[step % kChains][tile];
                    uint32_t rows[4];
                    ptx::ldmatrix_x4(rows,
                                     fragment_address(query, tile_row(tile) + lane_ % 16, step * 2 + lane_ / 16, 32));
                    ptx::mma_m16n8k16<Operand>(sum[0], rows, first[0], first[1]);
                    ptx::mma_m16n8k16<Operand>(sum[1], rows, second[0], second[1]);
                }
            }
        }
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                scores[tile][i / 4][i % 4] = sums[0][tile][i / 4][i % 4];
                if (kChains > 1) scores[tile][i / 4][i % 4] += sums[kChains - 1][tile][i / 4][i % 4];
            }
        }
    }

    // On the first page alone: nothing before first_key is seen. What is there, NaN included, is overwritten.
    __device__ __forceinline__ void hide_first(float (&scores)[kTiles][2][4]) const {
        const int hidden = p_.first_key - warp_ * 16 - lane_ % 4 * 2;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int n = 0; n < 2; ++n) {
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    if (n * 8 + i % 2 < hidden) scores[tile][n][i] = -INFINITY;
                }
            }
        }
    }

    // The page's weights into shared memory, and by how much what was summed so far shrinks.
    __device__ __forceinline__ void softmax(float (&scores)[kTiles][2][4], float (&rescale)[kTiles][2], int position) {
        const bool masked = position + kPage > context_ + 1;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                // The first column that the row does not see. What is there, NaN included, is overwritten.
                const int invisible = masked ? visible(tile, half) - position - warp_ * 16 - lane_ % 4 * 2 : kPage;
                const float scale = score_scale(row_of(tile, half));
                float maximum = -INFINITY;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    float& score = scores[tile][i / 2][half * 2 + i % 2];
                    score = i / 2 * 8 + i % 2 < invisible ? score * scale : -INFINITY;
                    maximum = fmaxf(maximum, score);
                }
                maximum = warp_maximum<4>(maximum);
                if (lane_ % 4 == 0) storage_.maximum[warp_][row_of(tile, half)] = maximum;
            }
        }
        barrier();
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = row_of(tile, half);
                float maximum = maximum_[tile][half];
#pragma unroll
                for (int warp = 0; warp < kWarps; ++warp) maximum = fmaxf(maximum, storage_.maximum[warp][row]);
                // A row that has seen no token yet: any finite number gives weights of zero.
                const float base = maximum == -INFINITY ? 0 : maximum;
                rescale[tile][half] = ptx::exp2_approximate(maximum_[tile][half] - base);
                maximum_[tile][half] = maximum;
                const float origin = base - F::kLargestWeightLog2;
                float sum = 0;
#pragma unroll
                for (int n = 0; n < 2; ++n) {
                    const float first = ptx::exp2_approximate(scores[tile][n][half * 2] - origin);
                    const float second = ptx::exp2_approximate(scores[tile][n][half * 2 + 1] - origin);
                    sum += first + second;
                    uint8_t* chunk = storage_.weights + (row * 8 + ((warp_ * 2 + n) ^ (row & 7))) * 16;
                    reinterpret_cast<uint32_t*>(chunk)[lane_ % 4] = pack<Operand>(first, second);
                }
                sum_[tile][half] = sum_[tile][half] * rescale[tile][half] + sum;
            }
        }
        barrier();
    }

    // output += weights V for the warp's 64 columns.
    __device__ __forceinline__ void multiply_values(int position) {
        constexpr int kWarpChunks = kWarpColumns * sizeof(Kv) / 16;
        const int first_chunk = warp_ * kWarpChunks % 8;
        const uint32_t values = ptx::shared_address(storage_.ring[at_.stage]) + warp_ * kWarpChunks / 8 * kGroupBytes;
        const uint32_t weights = ptx::shared_address(storage_.weights);
        // Rows outside the sequence may hold NaN, and a weight of zero would not silence it.
        uint32_t low[kPage / 16], high[kPage / 16];
        const int lane_token = position + lane_ % 4 * 2;
#pragma unroll
        for (int k = 0; k < kPage / 16; ++k) {
            low[k] = existing(lane_token + k * 16);
            high[k] = existing(lane_token + k * 16 + 8);
        }
        if (position < p_.first_key) {
#pragma unroll
            for (int k = 0; k < kPage / 16; ++k) {
                low[k] &= seen(lane_token + k * 16);
                high[k] &= seen(lane_token + k * 16 + 8);
            }
        }
#pragma unroll
        for (int k = 0; k < kPage / 16; ++k) {
            uint32_t rows[kTiles][4];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
                ptx::ldmatrix_x4(rows[tile],
                                 fragment_address(weights, tile_row(tile) + lane_ % 16, k * 2 + lane_ / 16, 8));
            }
#pragma unroll
            for (int pair = 0; pair < kWarpChunks / 2; ++pair) {
                uint32_t value[4];
                ptx::ldmatrix_x4_transposed(
                    value, fragment_address(values, k * 16 + lane_ % 16, first_chunk + pair * 2 + lane_ / 16, 8));
#pragma unroll
                for (int part = 0; part < kParts; ++part) {
                    uint32_t first[2] = {value[0], value[1]}, second[2] = {value[2], value[3]};  // eight columns each
                    if constexpr (F::kConverted) {
                        unpack_columns(value[2 * part], first[0], second[0]);
                        unpack_columns(value[2 * part + 1], first[1], second[1]);
                    }
                    const int columns = (pair * kParts + part) * 2;
#pragma unroll
                    for (int tile = 0; tile < kTiles; ++tile) {
                        ptx::mma_m16n8k16<Operand>(output_[tile][columns], rows[tile], first[0] & low[k],
                                                   first[1] & high[k]);
                        ptx::mma_m16n8k16<Operand>(output_[tile][columns + 1], rows[tile], second[0] & low[k],
                                                   second[1] & high[k]);
                    }
                }
            }
        }
    }

    // What ldmatrix_x4_transposed gives of e4m3, two columns of two tokens: each column as a register of two fp16.
    __device__ __forceinline__ static void unpack_columns(uint32_t columns, uint32_t& even, uint32_t& odd) {
        ptx::unpack_e4m3(__byte_perm(columns, 0, 0x3120), even, odd);
    }

    // The lane's pair of neighbouring output columns `pair`, of eight, and where they stand. Of values in e4m3, even
    // and odd columns of 16 lie in accumulators of their own.
    __device__ __forceinline__ float2 output_pair(int tile, int half, int pair) const {
        const auto& of_tile = output_[tile];
        if constexpr (F::kConverted) {
            const int element = half * 2 + pair % 2;
            return make_float2(of_tile[pair / 2 * 2][element], of_tile[pair / 2 * 2 + 1][element]);
        }
        return make_float2(of_tile[pair][half * 2], of_tile[pair][half * 2 + 1]);
    }
    __device__ __forceinline__ static int pair_column(int pair) {
        return F::kConverted ? pair / 2 * 16 + pair % 2 * 2 : pair * 8;
    }

    // Which halves of a register with the values of `token` and the next belong to tokens of the sequence.
    __device__ __forceinline__ uint32_t existing(int token) const {
        const int end = context_ + p_.tokens;
        return token + 1 < end ? 0xffffffffu : token < end ? 0x0000ffffu : 0u;
    }

    // The same for tokens from first_key on.
    __device__ __forceinline__ uint32_t seen(int token) const {
        return token >= p_.first_key ? 0xffffffffu : token + 1 >= p_.first_key ? 0xffff0000u : 0u;
    }

    // Gates and stores a whole sequence, or leaves its part in the workspace.
    __device__ __forceinline__ void finish(const Segment& segment) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float sum = warp_sum<4>(sum_[tile][half]);
                if (lane_ % 4 == 0) storage_.sum[warp_][row_of(tile, half)] = sum;
            }
        }
        barrier();
        const bool entered_here = segments_++ == 0;
        const int64_t slot = 2 * static_cast<int64_t>(blockIdx.x) + (entered_here ? 0 : 1);
        const int head = segment.group / p_.row_groups * p_.group;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = row_of(tile, half);
                if (row >= rows_left()) continue;
                float sum = 0;
#pragma unroll
                for (int warp = 0; warp < kWarps; ++warp) sum += storage_.sum[warp][row];
                const int column = warp_ * kWarpColumns + lane_ % 4 * 2 * kParts;
                if (segment.whole) {
                    const auto [token, query_head] = place_of_row(p_, first_row_ + row);
                    const float inverse = 1 / sum;
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        const float2 pair = output_pair(tile, half, n);
                        store_pair(p_, first_token(segment) + token, head + query_head, column + pair_column(n),
                                   pair.x * inverse, pair.y * inverse);
                    }
                } else {
                    float* part = p_.parts + (slot * kRows + row) * kDim + column;
#pragma unroll
                    for (int n = 0; n < 8; ++n) {
                        *reinterpret_cast<float2*>(part + pair_column(n)) = output_pair(tile, half, n);
                    }
                    if (warp_ == 0 && lane_ % 4 == 0) {
                        p_.part_sums[slot * kRows + row] = make_float2(maximum_[tile][half], sum);
                    }
                }
            }
        }
    }

    Shared& storage_;
    const PagedAttentionDecode& p_;
    const int team_, warp_, lane_;
    int context_ = 0;
    int first_row_ = 0;
    int segments_ = 0;
    RingPosition<Shared::kStages> at_;
    float maximum_[kTiles][2], sum_[kTiles][2];  // sum_: over the lane's own tokens
    float output_[kTiles][8][4];
};

// Zeros where a negative context marks padding.
__device__ __forceinline__ void clear_padding(const PagedAttentionDecode& p, int threads) {
    const int vectors = p.tokens * p.q_heads * (kDim / 8);
    for (int sequence = blockIdx.x; sequence < p.sequences; sequence += gridDim.x) {
        if (p.context_lens[sequence] >= 0) continue;
        auto* out = reinterpret_cast<uint4*>(out_of(p, static_cast<int64_t>(sequence) * p.tokens, 0, 0));
        for (int i = threadIdx.x; i < vectors; i += threads) out[i] = uint4{};
    }
}

// Lengths and page ids towards L2 while the kernel before still runs: a hint, so that it may write them.
__device__ __forceinline__ void prefetch_indices(const PagedAttentionDecode& p) {
    constexpr int kLine = 128 / sizeof(int32_t);
    const int lines = (p.table_width + kLine - 1) / kLine, lane = threadIdx.x % 32;
    for (int i = blockIdx.x * 32 + lane; i < p.sequences * lines; i += gridDim.x * 32) {
        ptx::prefetch_l2(p.page_table + i / lines * p.table_stride + i % lines * kLine);
    }
    for (int i = lane * kLine; i < p.sequences; i += 32 * kLine) ptx::prefetch_l2(p.context_lens + i);
}

template <typename Kv, int kTiles>
__global__ void __launch_bounds__(Storage<Kv, kTiles>::kThreads, 1)
    decode_kernel(const __grid_constant__ CUtensorMap map, const __grid_constant__ PagedAttentionDecode p) {
    DYNAMIC_SHARED(raw);
    using Shared = Storage<Kv, kTiles>;
    auto& storage = *reinterpret_cast<Shared*>(raw);
    constexpr int kProducer = Shared::kConsumers / 32;
    const int warp = ptx::warp_id();
    if (threadIdx.x == Shared::kConsumers) {
        ptx::prefetch_tensor_map(&map);
        for (int stage = 0; stage < Shared::kStages; ++stage) {
            ptx::mbarrier_init(&storage.full[stage], 1);
            ptx::mbarrier_init(&storage.empty[stage], kProducer);
        }
        ptx::fence_mbarrier_init();
    }
    if (warp == 0) prefetch_indices(p);
    __syncthreads();
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    const Line line = line_of(p, gridDim.x);
    if (warp == kProducer) {
        produce(storage, &map, p, line);
    } else {
        Consumer<Kv, kTiles> consumer(storage, p);
        each_segment(p, line, [&](const Segment& segment) { consumer.run(segment); });
        clear_padding(p, Shared::kConsumers);
    }
}

template <bool kBorders>
constexpr int kMergeLanes = kBorders ? 2 : 8;  // threads that share the parts of a quad of columns

template <bool kBorders>
constexpr int kMergeThreads = kDim / 4 * kMergeLanes<kBorders>;

// One output row: merges the parts that the blocks left; nothing where a block had it all. Lengths and gates are older
// than the decode kernel, so they are read, and the parts are found, while it still runs.
// kBorders: blockIdx.x + 1 is a block that may enter its range within a sequence, which is merged here if that is the
// first of its borders. Otherwise blockIdx.x is a pair of row group and sequence. blockIdx.y: row of the group.
// Over pairs, three blocks of 512 threads are to share a multiprocessor: many wait there while the decode kernel ends.
template <bool kBorders>
__global__ void __launch_bounds__(kMergeThreads<kBorders>, kBorders ? 1 : 3)
    merge_kernel(const __grid_constant__ PagedAttentionDecode p, int blocks, int rows_of_part) {
    constexpr int kLanes = kMergeLanes<kBorders>;
    DYNAMIC_SHARED(raw);
    auto* sums = reinterpret_cast<float4*>(raw);                               // [kLanes][kDim / 4]
    auto* states = reinterpret_cast<float2*>(sums + kMergeThreads<kBorders>);  // [kLanes]: maximum, sum
    const int quad = threadIdx.x % (kDim / 4), share = threadIdx.x / (kDim / 4), column = quad * 4;
    const auto pages = [&](int candidate) { return pages_of(p, candidate); };
    const auto row_of = [&](int group) { return group % p.row_groups * rows_of_part + static_cast<int>(blockIdx.y); };
    Vector<__nv_bfloat16, 4> gates{};
    const auto read_gates = [&](int group, int sequence) {
        if (share > 0 || row_of(group) >= p.tokens * p.group || p.context_lens[sequence] < 0) return;
        const auto [token, head] = place_of_row(p, row_of(group));
        gates = load_gates(p, static_cast<int64_t>(sequence) * p.tokens + token, group / p.row_groups * p.group + head,
                           column);
    };
    int group = blockIdx.x / p.sequences, sequence = blockIdx.x % p.sequences, first = 0, last = 0, first_unit = 0;
    if (!kBorders) read_gates(group, sequence);
    const Line line = line_of(p, blocks);
    const int border = blockIdx.x + 1;
    bool cut = true;
    if (kBorders) {
        cut = border < line.blocks;
        if (cut) {
            const int unit = line.start_of(border);
            const Located located = locate(p.sequences, unit % line.pages, pages);
            group = unit / line.pages;
            sequence = located.sequence;
            first_unit = unit - located.offset;
            read_gates(group, sequence);
        }
    } else {
        first_unit = group * line.pages + count_all(sequence, pages);
        cut = pages(sequence) > 0;
    }
    if (cut) {
        first = line.owner_of(first_unit);
        last = line.owner_of(first_unit + pages(sequence) - 1);
        if (kBorders && first + 1 != border) last = first;
    }
    const bool entered_earlier = first < last && line.start_of(first) != first_unit;
    ptx::grid_dependency_wait();
    ptx::grid_dependency_launch();
    if (first == last || row_of(group) >= p.tokens * p.group) return;
    float maximum = kLowest, weight_sum = 0;
    float4 sum{};
#pragma unroll 8
    for (int block = first + share; block <= last; block += kLanes) {
        // The first block may have entered its range in another sequence; all others entered it in this one.
        const int slot = 2 * block + (block == first && entered_earlier ? 1 : 0);
        const int64_t part = static_cast<int64_t>(slot) * rows_of_part + blockIdx.y;
        const float2 state = p.part_sums[part];
        const float4 values = *reinterpret_cast<const float4*>(p.parts + part * kDim + column);
        const float larger = fmaxf(maximum, state.x);
        const float kept = ptx::exp2_approximate(maximum - larger), weight = ptx::exp2_approximate(state.x - larger);
        maximum = larger;
        weight_sum = kept * weight_sum + weight * state.y;
        add_scaled(sum, kept, values, weight);
    }
    sums[threadIdx.x] = sum;
    if (quad == 0) states[share] = make_float2(maximum, weight_sum);
    __syncthreads();
    if (share > 0) return;
#pragma unroll
    for (int other = 1; other < kLanes; ++other) maximum = fmaxf(maximum, states[other].x);
    sum = float4{};
    weight_sum = 0;
#pragma unroll
    for (int other = 0; other < kLanes; ++other) {
        const float weight = ptx::exp2_approximate(states[other].x - maximum);
        weight_sum += weight * states[other].y;
        add_scaled(sum, 1, sums[other * (kDim / 4) + quad], weight);
    }
    const float inverse = 1 / weight_sum;
    const auto [token, head] = place_of_row(p, row_of(group));
    store_quad(p, static_cast<int64_t>(sequence) * p.tokens + token, group / p.row_groups * p.group + head, column,
               make_float4(sum.x * inverse, sum.y * inverse, sum.z * inverse, sum.w * inverse), gates);
}

template <bool kBorders>
cudaError_t launch_merge(const PagedAttentionDecode& p, int items, int blocks, int rows_of_part, cudaStream_t stream) {
    const int rows = std::min(p.tokens * p.group, rows_of_part);
    return launch(merge_kernel<kBorders>,
                  {.grid = dim3(static_cast<unsigned>(items), static_cast<unsigned>(rows)),
                   .block = kMergeThreads<kBorders>,
                   .shared_bytes = kMergeThreads<kBorders> * sizeof(float4) + kMergeLanes<kBorders> * sizeof(float2),
                   .stream = stream,
                   .programmatic = true},
                  p, blocks, rows_of_part);
}

template <typename Kv, int kTiles>
cudaError_t launch_tiles(const PagedAttentionDecode& p, int blocks, cudaStream_t stream) {
    CUtensorMap map;
    if (const auto status = encode_boxes<Kv>(&map, p); status != cudaSuccess) return status;
    const auto status = launch(decode_kernel<Kv, kTiles>,
                               {.grid = static_cast<unsigned>(blocks),
                                .block = Storage<Kv, kTiles>::kThreads,
                                .shared_bytes = sizeof(Storage<Kv, kTiles>),
                                .stream = stream,
                                .programmatic = true},
                               map, p);
    if (status != cudaSuccess) return status;
    const int64_t pairs = static_cast<int64_t>(p.kv_heads) * p.row_groups * p.sequences;
    if (pairs < blocks) {
        return launch_merge<false>(p, static_cast<int>(pairs), blocks, Storage<Kv, kTiles>::kRows, stream);
    }
    return launch_merge<true>(p, blocks - 1, blocks, Storage<Kv, kTiles>::kRows, stream);
}

template <typename Kv>
cudaError_t launch_decode(const PagedAttentionDecode& p, const PagedAttentionDecodeShape& shape, cudaStream_t stream) {
    if (shape.tiles == 1) return launch_tiles<Kv, 1>(p, shape.blocks, stream);
    return shape.tiles == 2 ? launch_tiles<Kv, 2>(p, shape.blocks, stream)
                            : launch_tiles<Kv, 4>(p, shape.blocks, stream);
}

}  // namespace

PagedAttentionDecodeShape paged_attention_decode_shape(const PagedAttentionDecode& p) {
    const int rows = p.tokens * (p.q_heads / p.kv_heads);
    const int tiles = rows <= kTileRows ? 1 : rows <= 2 * kTileRows ? 2 : 4;
    const int groups = p.kv_heads * ((rows + tiles * kTileRows - 1) / (tiles * kTileRows));
    const int64_t max_units = static_cast<int64_t>(groups) * p.sequences * p.table_width;
    const auto blocks = static_cast<int>(std::min<int64_t>(multiprocessor_count(), max_units));
    return {blocks, tiles, static_cast<int64_t>(2) * blocks * tiles * kTileRows};
}

cudaError_t paged_attention_decode(PagedAttentionDecode p, cudaStream_t stream) {
    const PagedAttentionDecodeShape shape = paged_attention_decode_shape(p);
    const int rows = p.tokens * (p.q_heads / p.kv_heads), rows_of_group = shape.tiles * kTileRows;
    complete(p);
    p.row_groups = (rows + rows_of_group - 1) / rows_of_group;
    return p.kv_is_e4m3 ? launch_decode<E4m3>(p, shape, stream) : launch_decode<__nv_bfloat16>(p, shape, stream);
}

}  // namespace tokenspeed
