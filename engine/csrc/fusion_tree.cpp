#include "fusion_tree.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "parallel.h"

namespace gen3r {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr std::align_val_t kAlignment{64};

struct Box {
    double low[3], high[3];
};

Box bounds(const Item* items, size_t count) {
    Box box{{kInfinity, kInfinity, kInfinity}, {-kInfinity, -kInfinity, -kInfinity}};
    for (size_t i = 0; i < count; ++i) {
        for (int a = 0; a < 3; ++a) {
            box.low[a] = std::min(box.low[a], items[i].p[a]);
            box.high[a] = std::max(box.high[a], items[i].p[a]);
        }
    }
    return box;
}

// Items with a smaller coordinate than `pivot` (or, with kEqual, not a larger one) to the front;
// returns their number. Without branches: which way an item goes cannot be predicted.
template <int kAxis, bool kEqual>
size_t partition(Item* items, size_t count, double pivot) {
    size_t front = 0;
    for (size_t i = 0; i < count; ++i) {
        const Item item = items[i];
        items[i] = items[front];
        items[front] = item;
        front += kEqual ? item.p[kAxis] <= pivot : item.p[kAxis] < pivot;
    }
    return front;
}

// No item before `rank` has a larger coordinate than any item from `rank` on. After Floyd and
// Rivest (1975): the pivot is a quantile of a sample, chosen a little beyond the rank so that the
// part that is left holds it and is small. 1.5 passes for a median, where nth_element makes 3.
template <int kAxis>
void split_at_rank(Item* items, size_t count, size_t rank) {
    double sample[512];
    for (int round = 0; round < 24 && count > 128; ++round) {
        const size_t taken = std::clamp<size_t>(count / 32, 16, 512), stride = count / taken;
        for (size_t i = 0; i < taken; ++i) sample[i] = items[i * stride].p[kAxis];
        const double wanted = static_cast<double>(rank) / count * taken;
        const double margin = 0.6 * std::sqrt(static_cast<double>(taken));
        const double at = 2 * rank < count ? wanted + margin : wanted - margin;
        const auto index = static_cast<size_t>(std::clamp(at, 0.0, taken - 1.0));
        std::nth_element(sample, sample + index, sample + taken);
        size_t front = partition<kAxis, false>(items, count, sample[index]);
        if (front == 0) {  // nothing is smaller: the equal ones are done with
            front = partition<kAxis, true>(items, count, sample[index]);
            if (rank <= front) return;
        }
        if (rank == front) return;
        if (rank < front) {
            count = front;
        } else {
            items += front, count -= front, rank -= front;
        }
    }
    const auto before = [](const Item& a, const Item& b) { return a.p[kAxis] < b.p[kAxis]; };
    std::nth_element(items, items + rank, items + count, before);
}

// A run of items that are still to be put in order.
struct Part {
    Item* items;
    size_t count;
    size_t child;  // points that a child of this part's node holds: 16 * 8^h
    Box box;       // holds the items, possibly with room to spare
};

// Lowers `child` until the part holds more than one; whether there is anything left to cut.
bool descend(Part& part) {
    if (part.count > part.child) return true;
    if (part.count <= kLeaf) return false;
    while (part.count <= part.child) part.child /= kWide;
    part.box = bounds(part.items, part.count);
    return true;
}

// Cuts a part in two at the multiple of `child` next to its middle; returns the second.
Part cut(Part& part) {
    const size_t children = (part.count + part.child - 1) / part.child;
    const size_t left = (children + 1) / 2 * part.child;
    // A tight box cuts better, and costs little where the items are in the cache.
    if (part.count <= 4096) part.box = bounds(part.items, part.count);
    const Box& box = part.box;
    int axis = 0;
    for (int a = 1; a < 3; ++a) {
        if (box.high[a] - box.low[a] > box.high[axis] - box.low[axis]) axis = a;
    }
    switch (axis) {
        case 0: split_at_rank<0>(part.items, part.count, left); break;
        case 1: split_at_rank<1>(part.items, part.count, left); break;
        default: split_at_rank<2>(part.items, part.count, left); break;
    }
    // Somewhere between the halves; any item of the second half bounds the first from above.
    Part right{part.items + left, part.count - left, part.child, part.box};
    part.count = left;
    part.box.high[axis] = right.box.low[axis] = right.items[0].p[axis];
    return right;
}

void order(Part part) {
    while (descend(part)) order(cut(part));
}

// Cuts large parts one after the other until there are enough for all threads.
void order_all(Item* items, size_t count, int threads) {
    size_t child = kLeaf;
    while (child < count) child *= kWide;
    std::vector<Part> parts{{items, count, child, {}}};
    const size_t enough = threads > 1 ? 4 * static_cast<size_t>(threads) : 1;
    while (parts.size() < enough) {
        const size_t before = parts.size();
        std::vector<Part> second(before);
        std::vector<char> halved(before, 0);
        parallel_for(static_cast<int64_t>(before), 1, threads, [&](int64_t i, int64_t) {
            if (parts[i].count <= 4096 || !descend(parts[i])) return;
            second[i] = cut(parts[i]);
            halved[i] = 1;
        });
        for (size_t i = 0; i < before; ++i) {
            if (halved[i]) parts.push_back(second[i]);
        }
        if (parts.size() == before) break;
    }
    parallel_for(static_cast<int64_t>(parts.size()), 1, threads,
                 [&](int64_t i, int64_t) { order(parts[i]); });
}

void empty(Boxes& boxes) {
    for (int a = 0; a < 3; ++a) {
        std::fill_n(boxes.low[a], kWide, kInfinity);
        std::fill_n(boxes.high[a], kWide, -kInfinity);
    }
}

void set_box(Boxes& boxes, size_t lane, const Box& box) {
    for (int a = 0; a < 3; ++a) {
        boxes.low[a][lane] = box.low[a];
        boxes.high[a][lane] = box.high[a];
    }
}

// The items of one block change places with their block; returns their bounds.
Box to_block(ItemBuffer& buffer, size_t block) {
    Item items[kLeaf];
    const size_t start = block * kLeaf, count = std::min<size_t>(kLeaf, buffer.size() - start);
    std::copy_n(buffer.items() + start, count, items);
    for (size_t i = count; i < kLeaf; ++i) items[i] = {{kInfinity, kInfinity, kInfinity}, 0};
    Block& out = *new (buffer.blocks() + block) Block;
    for (int i = 0; i < kLeaf; ++i) {
        out.x[i] = items[i].p[0], out.y[i] = items[i].p[1], out.z[i] = items[i].p[2];
        out.id[i] = items[i].id;
    }
    return bounds(items, count);
}

}  // namespace

ItemBuffer::ItemBuffer(size_t count)
    : count_(count),
      memory_(static_cast<std::byte*>(::operator new(block_count() * sizeof(Block), kAlignment))) {}

void ItemBuffer::Free::operator()(std::byte* memory) const {
    ::operator delete(memory, kAlignment);
}

NeighborTree::NeighborTree(ItemBuffer&& buffer, int threads)
    : buffer_(std::move(buffer)), threads_(thread_count(threads)) {
    order_all(buffer_.items(), buffer_.size(), threads_);
    size_t count = buffer_.block_count();
    do {
        const size_t groups = (count + kWide - 1) / kWide;
        const size_t level = levels_.size();
        levels_.emplace_back(groups);
        parallel_for(static_cast<int64_t>(groups), 512, threads_, [&](int64_t begin, int64_t end) {
            for (int64_t g = begin; g < end; ++g) {
                Boxes& boxes = levels_[level][g];
                empty(boxes);
                for (size_t i = g * kWide; i < std::min<size_t>(count, (g + 1) * kWide); ++i) {
                    Box box{};
                    if (level == 0) {
                        box = to_block(buffer_, i);
                    } else {
                        const Boxes& below = levels_[level - 1][i];
                        for (int a = 0; a < 3; ++a) {
                            box.low[a] = *std::min_element(below.low[a], below.low[a] + kWide);
                            box.high[a] = *std::max_element(below.high[a], below.high[a] + kWide);
                        }
                    }
                    set_box(boxes, i % kWide, box);
                }
            }
        });
        count = groups;
    } while (count > 1);
}

}  // namespace gen3r
