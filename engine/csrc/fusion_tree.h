// Nearest neighbours of every point of a cloud among the points themselves.
//
// The points are cut in halves at medians until 16 are left: blocks of coordinates that one pass of
// vector instructions compares with a query. Cuts lie at multiples of 8^h blocks, so that 8 blocks
// in a row, 8 such groups in a row, and so on, are close together: a tree with 8 children a node,
// implicit in the order, which needs nothing but boxes (3.4 bytes a point). Medians follow any
// density, and one far point costs no more than any other.
//
// Everything is float64: distances are those that Open3D and scipy find, to the last bits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace gen3r {

constexpr int kLeaf = 16;  // points a block
constexpr int kWide = 8;   // boxes a node

struct Item {  // a point on its way into a block
    double p[3];
    uint64_t id;
};

struct Block {  // 16 points, and in the last block possibly infinity, which is near nothing
    double x[kLeaf], y[kLeaf], z[kLeaf];
    uint64_t id[kLeaf];
};
static_assert(sizeof(Block) == kLeaf * sizeof(Item), "items are turned into blocks in place");

struct Boxes {  // bounds of up to 8 blocks or nodes; empty ones are infinitely far away
    double low[3][kWide], high[3][kWide];
};

// Memory for the items of a cloud, then for its blocks: 32 bytes a point.
class ItemBuffer {
public:
    explicit ItemBuffer(size_t count);  // at least one point
    Item* items() { return reinterpret_cast<Item*>(memory_.get()); }
    Block* blocks() { return reinterpret_cast<Block*>(memory_.get()); }
    const Block* blocks() const { return reinterpret_cast<const Block*>(memory_.get()); }
    size_t size() const { return count_; }
    size_t block_count() const { return (count_ + kLeaf - 1) / kLeaf; }

private:
    struct Free {
        void operator()(std::byte* memory) const;
    };
    size_t count_;
    std::unique_ptr<std::byte, Free> memory_;
};

// Instruction sets that the search is compiled for; all give the same bits. A machine without the
// asked one takes the next.
enum class Isa { avx512, avx2, baseline };

class NeighborTree {
public:
    // Takes finite points. Threads as parallel_for's; the result does not depend on them.
    NeighborTree(ItemBuffer&& buffer, int threads);

    // For every position of the tree (block * 16 + lane) the mean distance to the `count` nearest
    // points, the point itself included. `count` in [1, points].
    std::vector<double> mean_distances(size_t count, Isa isa = Isa::avx512) const;

    // The distance to the nearest number `count`, counted from 1, the point itself; infinity where
    // there are fewer points.
    std::vector<double> kth_distances(size_t count, Isa isa = Isa::avx512) const;

    size_t size() const { return buffer_.size(); }
    uint64_t id(size_t position) const {
        return buffer_.blocks()[position / kLeaf].id[position % kLeaf];
    }

    const Block* blocks() const { return buffer_.blocks(); }
    const std::vector<std::vector<Boxes>>& levels() const { return levels_; }

private:
    template <bool kMean>
    std::vector<double> distances(size_t count, Isa isa) const;

    ItemBuffer buffer_;
    std::vector<std::vector<Boxes>> levels_;  // [0]: 8 blocks an entry; [h]: 8 entries of [h - 1]
    int threads_;
};

}  // namespace gen3r
