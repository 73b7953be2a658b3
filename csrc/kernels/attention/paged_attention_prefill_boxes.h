// How keys and values come into the shared memory of the prefill attention: the ring of boxes, the warp that fills it,
// and the warps that turn boxes of e4m3 into boxes of fp16.
#pragma once
#include <launch_config.h>
#include <ptx.h>

#include "paged_attention_prefill_tiles.h"

namespace tokenspeed::attention_prefill {

constexpr int kGroupRows = 64;  // of a consumer warpgroup
constexpr int kConsumerGroups = 2;
static_assert(kRows == kGroupRows * kConsumerGroups);
constexpr int kConsumers = kConsumerGroups * 128;
constexpr int kHelpers = 96;  // threads, behind the producer warp
constexpr int kThreads = kConsumers + 32 + kHelpers;
constexpr int kQueryBytes = kGroupRows * kDim * 2;  // of a consumer warpgroup: laid out as a box

// Tiles that the producer has found: it is ahead of the consumers by five boxes, two a tile at least, and one tile more.
constexpr int kAnnounced = 4;

template <typename Kv>
struct Storage {
    static constexpr int kStages = 5;
    static constexpr int kFillers = 1;  // arrivals that make a box full

    alignas(1024) uint8_t query[kConsumerGroups][kQueryBytes];
    alignas(1024) uint8_t ring[kStages][kQueryBytes];
    uint64_t full[kStages], empty[kStages];
    uint64_t query_full, query_empty;
    uint64_t keys_read;  // the last of a tile, by both groups
    uint64_t announced[kAnnounced];
    List list;
    Tile ahead[kAnnounced];  // by turns, from the producer; no rows: there are no more
    Tile tile[2];            // by turns, whose queries are there; no rows: there are no more
};

// Boxes of e4m3 arrive in a ring of their own, and the producer's neighbours turn them into what products read.
template <>
struct Storage<E4m3> {
    static constexpr int kStages = 4, kRawStages = 2;
    static constexpr int kFillers = kHelpers / 32;

    alignas(1024) uint8_t query[kConsumerGroups][kQueryBytes];
    alignas(1024) uint8_t ring[kStages][kQueryBytes];
    alignas(1024) uint8_t raw[kRawStages][Format<E4m3>::kBoxBytes];
    float scale[kRows];  // of the scores of a row
    uint64_t full[kStages], empty[kStages], raw_full[kRawStages], raw_empty[kRawStages];
    List list;
};
static_assert(Storage<__nv_bfloat16>::kStages <= 6);  // or more than kAnnounced tiles may be under way
static_assert(sizeof(Storage<__nv_bfloat16>) <= kSharedLimit && sizeof(Storage<E4m3>) <= kSharedLimit);
static_assert(kQueryBytes == Format<__nv_bfloat16>::kBoxBytes && kQueryBytes == 2 * Format<E4m3>::kBoxBytes);

template <typename Kv>
class Producer {
    static constexpr bool kConverted = Format<Kv>::kConverted;
    using Shared = Storage<Kv>;

  public:
    __device__ __forceinline__ Producer(Shared& storage, const CUtensorMap* map, const PagedAttentionPrefill& p)
        : storage_(storage), map_(map), p_(p) {}

    // The tiles of this block, announced to those who bring the queries.
    __device__ __forceinline__ void run_all() {
        Items items(p_, storage_.list);
        announce(items);
        for (Cursor turn;; turn.next(kAnnounced)) {
            const Tile& tile = storage_.ahead[turn.slot];
            if (tile.rows == 0) return;
            items.ask();
            // The next tile is found while boxes wait for their places.
            run(tile, [&] {
                items.next();
                announce(items);
            });
        }
    }

    // at_end: ahead of the last box.
    template <typename AtEnd>
    __device__ __forceinline__ void run(const Tile& tile, AtEnd at_end) {
        PageIds ids(p_, tile.sequence, tile.first_page, tile.last_page);
        int id = ids.id(tile.first_page);
        load(kKeys, tile.head, id);
        prefetch(tile);
        for (int page = tile.first_page + 1; page < tile.last_page; ++page) {
            const int next = ids.id(page);
            load(kKeys, tile.head, next);
            load(kValues, tile.head, id);
            id = next;
        }
        at_end();
        load(kValues, tile.head, id);
    }

  private:
    // The item's tile, or that of the next one that sees any page.
    __device__ __forceinline__ void announce(Items& items) {
        Tile found{};
        for (; items.left(); items.next()) {
            found = items.tile();
            if (found.first_page < found.last_page) break;
            found = {};
            items.ask();
        }
        if (threadIdx.x % 32 == 0) {
            storage_.ahead[announced_.slot] = found;
            ptx::mbarrier_arrive(&storage_.announced[announced_.slot]);
        }
        __syncwarp();
        announced_.next(kAnnounced);
    }

    // Queries and gates into L2: the consumers are behind by the boxes of the ring.
    __device__ __forceinline__ void prefetch(const Tile& tile) const {
        constexpr int kLines = kDim * 2 / 128;
        const bool gates = p_.gate_vectors && tile.part < 0;
#pragma unroll 1
        for (int i = threadIdx.x % 32; i < kRows * kLines; i += 32) {
            const int row = tile.first_row + i / kLines, column = i % kLines * (128 / 2);
            if (row >= tile.rows) break;
            const auto [token, query_head] = place_of_row(p_, row);
            const int head = tile.head * p_.group + query_head;
            ptx::prefetch_l2(p_.q + (tile.first_token + token) * p_.q_stride + head * kDim + column);
            if (gates) ptx::prefetch_l2(gate_of(p_, tile.first_token + token, head, column));
        }
        __syncwarp();
    }

    __device__ __forceinline__ void load(int part, int head, int id) {
        if constexpr (kConverted) {
            load(storage_.raw, storage_.raw_full, storage_.raw_empty, part, head, id);
        } else {
            load(storage_.ring, storage_.full, storage_.empty, part, head, id);
        }
    }

    template <int kStages, int kBytes>
    __device__ __forceinline__ void load(uint8_t (&ring)[kStages][kBytes], uint64_t* full, uint64_t* empty, int part,
                                         int head, int id) {
        ptx::mbarrier_wait(&empty[at_.slot], at_.phase ^ 1);
        if (ptx::elect_one()) load_box<Kv>(ring[at_.slot], map_, &full[at_.slot], part, head, p_.kv_heads, id);
        at_.next(kStages);
    }

    Shared& storage_;
    const CUtensorMap* map_;
    const PagedAttentionPrefill& p_;
    Cursor at_, announced_;
};

// Tiles and their queries, a tile ahead of the consumers: the queries of the next come as soon as the last keys have been
// multiplied, beside the last softmax, values and store. By the warps behind the producer, where pages are in bf16.
class QueryLoader {
    using Shared = Storage<__nv_bfloat16>;

  public:
    __device__ __forceinline__ QueryLoader(Shared& storage, const PagedAttentionPrefill& p)
        : storage_(storage), p_(p) {}

    __device__ __forceinline__ void run_all() {
        for (Cursor turn;; turn.next(kAnnounced)) {
            ptx::mbarrier_wait(&storage_.announced[turn.slot], turn.phase);
            const Tile& tile = storage_.ahead[turn.slot];
            if (tile.rows == 0) return finish();
            run(tile);
        }
    }

  private:
    __device__ __forceinline__ void run(const Tile& tile) {
        ptx::mbarrier_wait(&storage_.query_empty, phase_ ^ 1);
        constexpr int kChunks = kDim / 8;
#pragma unroll 2
        for (int at = threadIdx.x - kConsumers - 32; at < kRows * kChunks; at += kHelpers) {
            const int row = at / kChunks, chunk = at % kChunks;  // a warp has one row
            const auto [token, head] = place_of_row(p_, min(tile.first_row + row, tile.rows - 1));
            ptx::cp_async<16>(
                storage_.query[0] + (row / kGroupRows * (kDim / 64) + chunk / 8) * kGroupBytes +
                    (row % kGroupRows * 8 + (chunk % 8 ^ (row & 7))) * 16,
                p_.q + (tile.first_token + token) * p_.q_stride + (tile.head * p_.group + head) * kDim + chunk * 8,
                tile.first_row + row < tile.rows ? 16 : 0);
        }
        ptx::cp_async_commit();
        ptx::cp_async_wait<0>();
        publish(tile);
    }

    __device__ __forceinline__ void finish() {
        ptx::mbarrier_wait(&storage_.query_empty, phase_ ^ 1);
        publish({});
    }

    __device__ __forceinline__ void publish(const Tile& tile) {
        if (threadIdx.x == kConsumers + 32) storage_.tile[phase_] = tile;
        ptx::fence_async_shared();
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::mbarrier_arrive(&storage_.query_full);
        phase_ ^= 1;
    }

    Shared& storage_;
    const PagedAttentionPrefill& p_;
    uint32_t phase_ = 0;
};

// Boxes of e4m3 become boxes of fp16, in the order in which they arrive.
class Converter {
    using Shared = Storage<E4m3>;

  public:
    __device__ __forceinline__ explicit Converter(Shared& storage) : storage_(storage) {}

    __device__ __forceinline__ void run(const Tile& tile) {
#pragma unroll 1
        for (int left = 2 * (tile.last_page - tile.first_page); left > 0; --left) {
            ptx::mbarrier_wait(&storage_.raw_full[from_.slot], from_.phase);
            ptx::mbarrier_wait(&storage_.empty[to_.slot], to_.phase ^ 1);
            convert(storage_.raw[from_.slot], storage_.ring[to_.slot]);
            ptx::fence_async_shared();
            __syncwarp();
            if (threadIdx.x % 32 == 0) {
                ptx::mbarrier_arrive(&storage_.raw_empty[from_.slot]);
                ptx::mbarrier_arrive(&storage_.full[to_.slot]);
            }
            from_.next(Shared::kRawStages);
            to_.next(Shared::kStages);
        }
    }

  private:
    // Eight rows of 128 columns at a time. A lane reads two pieces of 16 columns and writes each as two of 8; eight lanes
    // have those of two rows that differ by 5 in their swizzle, so that neither the reads nor the writes collide in a
    // bank. Few instructions: a warp has its scheduler to itself for this, and each waits for the one before.
    __device__ __forceinline__ static void convert(const uint8_t* raw, uint8_t* box) {
        constexpr int kTurns = Format<E4m3>::kBoxBytes / 1024, kWarps = kHelpers / 32;
        const int lane = threadIdx.x % 32, row = lane / 8 ^ lane / 4 % 2 * 5, piece = lane % 4;
        const uint8_t* from = raw + (row * 8 + (piece ^ row)) * 16;
        const uint8_t* from_beside = raw + (row * 8 + (piece + 4 ^ row)) * 16;
        uint8_t* to = box + (row * 8 + (piece * 2 ^ row)) * 16;
        uint8_t* to_beside = box + (row * 8 + (piece * 2 + 1 ^ row)) * 16;
#pragma unroll 1
        for (int turn = threadIdx.x / 32 - kConsumers / 32 - 1; turn < kTurns; turn += kWarps) {
            const int place = turn * 1024 + turn / 8 * kGroupBytes;  // of two groups of columns of the box
            const uint4 values = load(from, turn), beside = load(from_beside, turn);
            store(to + place, to_beside + place, values);
            store(to + place + kGroupBytes, to_beside + place + kGroupBytes, beside);
        }
    }

    __device__ __forceinline__ static uint4 load(const uint8_t* from, int turn) {
        return *reinterpret_cast<const uint4*>(from + turn * 1024);
    }

    __device__ __forceinline__ static void store(uint8_t* first, uint8_t* second, const uint4& values) {
        uint4 halves;
        ptx::unpack_e4m3(values.x, halves.x, halves.y);
        ptx::unpack_e4m3(values.y, halves.z, halves.w);
        *reinterpret_cast<uint4*>(first) = halves;
        ptx::unpack_e4m3(values.z, halves.x, halves.y);
        ptx::unpack_e4m3(values.w, halves.z, halves.w);
        *reinterpret_cast<uint4*>(second) = halves;
    }

    Shared& storage_;
    Cursor from_;
    Cursor to_;
};

}  // namespace tokenspeed::attention_prefill
