// The launch rule of linear.cu: how many blocks share a tile's columns, how many clusters there are, how deep the ring
// is.
#pragma once
#include <launch.h>

#include <algorithm>

#include "linear.h"

namespace tokenspeed::linear_product {

// The grid and the shared memory of a call. clusters: of the grid, `tail_clusters` of them for the tail. pieces: of the
// busiest block.
struct Grid {
    int ranks, clusters, tail_clusters;
    int64_t pieces;
    bool deep;
    size_t shared_bytes;
};

// Of a block with so many pieces. A ring holds no more stages than that.
template <typename Weight, int kRows, bool kDeep, Operand kOperand>
size_t shared_bytes_of(int rows, int slabs, int64_t pieces) {
    const auto stages = std::min<int64_t>(Storage<kRows, kDeep>::kStages, pieces);
    return sizeof(Storage<kRows, kDeep>) + Format<Weight>::operand_bytes(rows, kOperand == Operand::kAddNorm, slabs) +
           stages * kSlabBytes;
}

// What the busiest block of `clusters` has of a weight.
struct Share {
    int turns, slabs;

    int64_t pieces() const { return int64_t{turns} * slabs; }
};

inline int tiles_of(int outputs) {
    return (outputs + kTileRows - 1) / kTileRows;
}

template <typename Weight>
Share share_of(int outputs, int inputs, int clusters, int ranks) {
    const int slabs = (inputs + Format<Weight>::kSlab - 1) / Format<Weight>::kSlab;
    return {(tiles_of(outputs) + clusters - 1) / clusters, (slabs + ranks - 1) / ranks};
}

// How many of so many clusters have the tail: the most that leave the busiest block the fewest pieces.
template <typename Weight>
int tail_clusters_of(const Linear& p, int clusters, int ranks) {
    if (p.tail == nullptr) return 0;
    int best = 1;
    int64_t fewest = INT64_MAX;
    for (int tail = 1; tail <= std::min(tiles_of(p.tail_outputs), clusters - 1); ++tail) {
        const int64_t pieces = std::max(share_of<Weight>(p.outputs, p.inputs, clusters - tail, ranks).pieces(),
                                        share_of<__nv_bfloat16>(p.tail_outputs, p.inputs, tail, ranks).pieces());
        if (pieces > fewest) continue;
        fewest = pieces;
        best = tail;
    }
    return best;
}

// The cheapest way to share tiles x slabs, in halves of a piece: the pieces of the busiest block, its part of x, and
// what the exchange in a cluster takes (0.7 us on an H200); by the class of rows, so that a row's sums have the same
// order in every batch of the class, unless x fits in one of them and not in another. paired: for two blocks a
// multiprocessor.
template <typename Weight, int kRows, Operand kOperand>
Grid cheapest_grid(const Linear& p, bool paired) {
    using F = Format<Weight>;
    const int tiles = tiles_of(p.outputs), slabs = (p.inputs + F::kSlab - 1) / F::kSlab;
    const int tail_tiles = p.tail == nullptr ? 0 : tiles_of(p.tail_outputs),
              fewest_clusters = p.tail == nullptr ? 1 : 2;
    const int places = multiprocessor_count() * (paired ? 2 : 1);
    Grid best{};
    int64_t best_cost = INT64_MAX;
    for (int ranks = 1; ranks <= std::min(8, slabs); ranks *= 2) {
        // How many clusters of more than two fit at once depends on how the multiprocessors of a card are grouped.
        const int usable = ranks > 2 ? std::max(places * 3 / 4, ranks) : places;
        const int clusters = std::min(tiles + tail_tiles, std::max(fewest_clusters, usable / ranks));
        const int tail_clusters = tail_clusters_of<Weight>(p, clusters, ranks);
        const Share share = share_of<Weight>(p.outputs, p.inputs, clusters - tail_clusters, ranks);
        Share tail{};
        if (tail_clusters > 0) tail = share_of<__nv_bfloat16>(p.tail_outputs, p.inputs, tail_clusters, ranks);
        if (ranks > 1 && std::max(share.turns, tail.turns) > kMaxClusterTiles / ranks * ranks) continue;
        if (F::kScaled && share.slabs > kMaxScales) continue;
        const int64_t pieces = std::max(share.pieces(), tail.pieces());
        const auto bytes_of = [&]<bool kDeep>(int rows) {
            const size_t bytes = shared_bytes_of<Weight, kRows, kDeep, kOperand>(rows, share.slabs, share.pieces());
            if (tail_clusters == 0) return bytes;
            return std::max(bytes,
                            shared_bytes_of<__nv_bfloat16, kRows, kDeep, kOperand>(rows, tail.slabs, tail.pieces()));
        };
        const auto bytes = [&](bool deep, int rows) {
            return deep ? bytes_of.template operator()<true>(rows) : bytes_of.template operator()<false>(rows);
        };
        bool deep = !paired && (kRows == 1 || pieces > kShortShare || bytes(false, kRows) > kHalfSharedLimit);
        // x of e4m3 weights takes twice the room beside as many bytes of them.
        if (F::kScaled && kRows > 1 && bytes(deep, p.rows) > kSharedLimit) deep = false;
        const size_t shared_bytes = bytes(deep, p.rows);
        if (shared_bytes > (paired ? kHalfSharedLimit : kSharedLimit)) continue;
        const int64_t cost = 2 * pieces + kRows * share.slabs * F::kXChunks / kTileRows * 2 + (ranks > 1 ? 3 : 0);
        if (cost < best_cost) {
            best_cost = cost;
            best = {ranks, clusters, tail_clusters, pieces, deep, shared_bytes};
        }
    }
    return best;  // no clusters: x does not fit
}

// Two blocks share a multiprocessor where one of them would have more than its ring holds, if x leaves room for both.
template <typename Weight, int kRows, Operand kOperand>
Grid pick_grid(const Linear& p) {
    const Grid grid = cheapest_grid<Weight, kRows, kOperand>(p, false);
    if constexpr (kTakesPairs<kRows, kOperand>) {
        if (grid.pieces > Storage<kRows, true>::kStages) {
            const Grid pairs = cheapest_grid<Weight, kRows, kOperand>(p, true);
            if (pairs.clusters > 0) return pairs;
        }
    }
    return grid;
}

}  // namespace tokenspeed::linear_product
