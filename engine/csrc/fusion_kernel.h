// The search of fusion_search.cpp, included there once for each instruction set that it serves,
// with GEN3R_ISA the name of the namespace and GEN3R_LANES the doubles in a register: 8 is AVX-512,
// 4 is AVX2, 2 is any machine. Hence no include guard.
//
// Every point looks for its nearest ones, a block of 16 at a time.
//
// One point of the block walks down the tree. Whatever lies within r of it lies within r + d of
// another at distance d, so one more walk finds the few blocks that can matter to any of the 16.
// Each of the others then starts with the least bound that the finished ones give it: nearly every
// distance that passes is one of the wanted, and they are only collected. Which of them are the
// nearest is found by counting how many lie below a threshold, a few cycles of vector instructions,
// instead of by sorting.
namespace gen3r {
namespace GEN3R_ISA {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr int kLanes = GEN3R_LANES;  // doubles in a vector: 8 or a divisor of it

typedef double Vector __attribute__((vector_size(8 * GEN3R_LANES)));
typedef int64_t Mask __attribute__((vector_size(8 * GEN3R_LANES)));  // -1 where a comparison holds

GEN3R_INLINE Vector load(const double* from) {
    Vector value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

GEN3R_INLINE Vector positive(Vector value) { return value > 0 ? value : Vector{}; }

#if GEN3R_LANES == 4
// For every set of lanes the order (in halves of a double) that brings them to the front.
alignas(32) constexpr int32_t kFront[16][8] = {
    {0, 1, 2, 3, 4, 5, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7}, {2, 3, 0, 1, 4, 5, 6, 7},
    {0, 1, 2, 3, 4, 5, 6, 7}, {4, 5, 0, 1, 2, 3, 6, 7}, {0, 1, 4, 5, 2, 3, 6, 7},
    {2, 3, 4, 5, 0, 1, 6, 7}, {0, 1, 2, 3, 4, 5, 6, 7}, {6, 7, 0, 1, 2, 3, 4, 5},
    {0, 1, 6, 7, 2, 3, 4, 5}, {2, 3, 6, 7, 0, 1, 4, 5}, {0, 1, 2, 3, 6, 7, 4, 5},
    {4, 5, 6, 7, 0, 1, 2, 3}, {0, 1, 4, 5, 6, 7, 2, 3}, {2, 3, 4, 5, 6, 7, 0, 1},
    {0, 1, 2, 3, 4, 5, 6, 7},
};
#endif

// Distances are squared below, but for radii.

// Those of one query that passed its bound, and in the end the nearest of them.
class Nearest {
public:
    explicit Nearest(size_t wanted)
        : wanted_(wanted),
          limit_(wanted + std::max<size_t>(128, wanted)),
          values_(limit_ + kLeaf + kLanes) {}

    void start(double bound) { bound_ = bound, count_ = 0; }
    double bound() const { return bound_; }

    GEN3R_INLINE void scan(const Block& block, const double* q) {
        for (int i = 0; i < kLeaf; i += kLanes) {
            const Vector x = load(block.x + i) - q[0], y = load(block.y + i) - q[1],
                         z = load(block.z + i) - q[2];
            add(x * x + y * y + z * z);
        }
        if (count_ >= limit_) shrink();
    }

    // Keeps only the nearest; false where there are fewer than wanted.
    GEN3R_INLINE bool finish() {
        if (count_ > wanted_) shrink();
        return count_ == wanted_;
    }

    GEN3R_INLINE double farthest() const {
        double most[kLanes] = {};
        size_t i = 0;
        Vector best{};
        for (; i + kLanes <= count_; i += kLanes) {
            const Vector value = load(values_.data() + i);
            best = value > best ? value : best;
        }
        std::memcpy(most, &best, sizeof best);
        double result = *std::max_element(most, most + kLanes);
        for (; i < count_; ++i) result = std::max(result, values_[i]);
        return std::sqrt(result);
    }

    GEN3R_INLINE double mean() const {
        double sum = 0;
        for (size_t i = 0; i < count_; ++i) sum += std::sqrt(values_[i]);
        return sum / static_cast<double>(count_);
    }

private:
    // Appends those below the bound. Without branches: which ones they are cannot be predicted.
    GEN3R_INLINE void add(Vector distance) {
#if GEN3R_LANES == 8
        const auto all = reinterpret_cast<__m512d>(distance);
        const __mmask8 near = _mm512_cmp_pd_mask(all, _mm512_set1_pd(bound_), _CMP_LT_OQ);
        _mm512_storeu_pd(values_.data() + count_, _mm512_maskz_compress_pd(near, all));
        count_ += static_cast<size_t>(__builtin_popcount(near));
#elif GEN3R_LANES == 4
        const auto all = reinterpret_cast<__m256d>(distance);
        const int near = _mm256_movemask_pd(_mm256_cmp_pd(all, _mm256_set1_pd(bound_), _CMP_LT_OQ));
        const auto* order = reinterpret_cast<const __m256i*>(kFront[near]);
        const __m256i front =
            _mm256_permutevar8x32_epi32(_mm256_castpd_si256(all), _mm256_load_si256(order));
        _mm256_storeu_pd(values_.data() + count_, _mm256_castsi256_pd(front));
        count_ += static_cast<size_t>(__builtin_popcount(near));
#else
        double* const values = values_.data();
        for (int i = 0; i < kLanes; ++i) {
            values[count_] = distance[i];
            count_ += distance[i] < bound_;
        }
#endif
    }

    GEN3R_INLINE size_t below(double threshold) {
        Mask found{};  // minus the number
        for (size_t i = 0; i < count_; i += kLanes) found += load(values_.data() + i) < threshold;
        int64_t sum = 0;
        for (int lane = 0; lane < kLanes; ++lane) sum -= found[lane];
        return static_cast<size_t>(sum);
    }

    // Keeps the nearest `wanted_` of more, and lowers the bound to admit nothing farther.
    GEN3R_INLINE void shrink() {
        std::fill_n(values_.data() + count_, kLanes, kInfinity);
        double low = 0, high = bound_;
        size_t at_low = 0, at_high = count_;
        for (int round = 0; round < 12 && high < kInfinity; ++round) {
            // On a surface the number of points grows as the squared distance. Every third time
            // the middle: where the number is no straight line, a secant alone creeps.
            const double share = round % 3 == 2 ? 0.5
                                                : (static_cast<double>(wanted_ - at_low) + 0.5) /
                                                      static_cast<double>(at_high - at_low + 1);
            const double threshold = low + (high - low) * share;
            const size_t count = below(threshold);
            if (count == wanted_) {
                keep(threshold);
                return;
            }
            if (count < wanted_) {
                low = threshold, at_low = count;
            } else {
                high = threshold, at_high = count;
            }
        }
        // Equal distances, or no bound yet.
        std::nth_element(values_.data(), values_.data() + (wanted_ - 1), values_.data() + count_);
        bound_ = std::min(bound_, values_[wanted_ - 1]);
        count_ = wanted_;
    }

    GEN3R_INLINE void keep(double threshold) {
        const size_t count = count_;  // behind them lies a vector of infinities
        start(threshold);
        for (size_t i = 0; i < count; i += kLanes) add(load(values_.data() + i));
    }

    size_t wanted_, limit_, count_ = 0;
    double bound_ = kInfinity;
    std::vector<double> values_;
};

// Boxes of blocks that can hold a neighbour of any query of a group.
struct Candidates {
    static constexpr size_t kMost = 256;
    double low[3][kMost + kWide], high[3][kMost + kWide];
    uint64_t block[kMost + kWide];
    size_t count;
};

// From a box (or a point) to 8 boxes whose bounds lie `stride` apart.
GEN3R_INLINE void box_distances(const double* low, const double* high, size_t stride,
                                const double* from, const double* to, double* out) {
    for (int i = 0; i < kWide; i += kLanes) {
        Vector sum{};
        for (int a = 0; a < 3; ++a) {
            // At most one of the two gaps is positive.
            const Vector gap = positive(load(low + a * stride + i) - to[a]) +
                               positive(from[a] - load(high + a * stride + i));
            sum += gap * gap;
        }
        std::memcpy(out + i, &sum, sizeof sum);
    }
}

// Bit i is set where box i is nearer than the bound.
GEN3R_INLINE unsigned nearer(const double* distance, double bound) {
#if GEN3R_LANES == 8
    return _mm512_cmp_pd_mask(_mm512_loadu_pd(distance), _mm512_set1_pd(bound), _CMP_LT_OQ);
#elif GEN3R_LANES == 4
    const __m256d limit = _mm256_set1_pd(bound);
    const int low = _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(distance), limit, _CMP_LT_OQ));
    const int high =
        _mm256_movemask_pd(_mm256_cmp_pd(_mm256_loadu_pd(distance + 4), limit, _CMP_LT_OQ));
    return static_cast<unsigned>(low | high << 4);
#else
    unsigned bits = 0;
    for (int i = 0; i < kWide; ++i) bits |= static_cast<unsigned>(distance[i] < bound) << i;
    return bits;
#endif
}

struct Visit {
    double distance;
    uint64_t index;
    uint32_t level;
};

constexpr int kDeepest = kWide * 24;  // 8 children a level; 2^64 points have 21 levels

// One query from the root, nearest boxes first.
GEN3R_INLINE void search(const NeighborTree& tree, const double* q, Nearest& nearest) {
    const auto& levels = tree.levels();
    Visit stack[kDeepest];
    int depth = 0;
    stack[depth++] = {0.0, 0, static_cast<uint32_t>(levels.size())};
    while (depth > 0) {
        const Visit visit = stack[--depth];
        if (!(visit.distance < nearest.bound())) continue;
        if (visit.level == 0) {
            nearest.scan(tree.blocks()[visit.index], q);
            continue;
        }
        const Boxes& boxes = levels[visit.level - 1][visit.index];
        double distance[kWide];
        box_distances(boxes.low[0], boxes.high[0], kWide, q, q, distance);
        const int first = depth;
        for (unsigned bits = nearer(distance, nearest.bound()); bits != 0; bits &= bits - 1) {
            const int i = __builtin_ctz(bits);
            int at = depth++;
            for (; at > first && stack[at - 1].distance < distance[i]; --at) {
                stack[at] = stack[at - 1];
            }
            stack[at] = {distance[i], visit.index * kWide + i, visit.level - 1};
        }
    }
}

// The blocks that come within `reach` (squared) of a box; false where there are too many.
GEN3R_INLINE bool collect(const NeighborTree& tree, const double* low, const double* high,
                          double reach, Candidates& found) {
    const auto& levels = tree.levels();
    Visit stack[kDeepest];
    int depth = 0;
    stack[depth++] = {0.0, 0, static_cast<uint32_t>(levels.size() - 1)};
    found.count = 0;
    while (depth > 0) {
        const Visit visit = stack[--depth];
        const Boxes& boxes = levels[visit.level][visit.index];
        double distance[kWide];
        box_distances(boxes.low[0], boxes.high[0], kWide, low, high, distance);
        for (unsigned bits = nearer(distance, reach); bits != 0; bits &= bits - 1) {
            const int i = __builtin_ctz(bits);
            const uint64_t child = visit.index * kWide + i;
            if (visit.level > 0) {
                stack[depth++] = {distance[i], child, visit.level - 1};
                continue;
            }
            if (found.count == Candidates::kMost) return false;
            for (int a = 0; a < 3; ++a) {
                found.low[a][found.count] = boxes.low[a][i];
                found.high[a][found.count] = boxes.high[a][i];
            }
            found.block[found.count++] = child;
        }
    }
    for (int a = 0; a < 3; ++a) {  // empty boxes up to a whole vector
        std::fill_n(found.low[a] + found.count, kWide, kInfinity);
        std::fill_n(found.high[a] + found.count, kWide, -kInfinity);
    }
    return true;
}

GEN3R_INLINE void search(const NeighborTree& tree, const Candidates& among, const double* q,
                         Nearest& nearest) {
    constexpr size_t kStride = Candidates::kMost + kWide;
    for (size_t start = 0; start < among.count; start += kWide) {
        double distance[kWide];
        box_distances(among.low[0] + start, among.high[0] + start, kStride, q, q, distance);
        for (unsigned bits = nearer(distance, nearest.bound()); bits != 0; bits &= bits - 1) {
            nearest.scan(tree.blocks()[among.block[start + __builtin_ctz(bits)]], q);
        }
    }
}

// Squared reach with room for rounding. Not 0 for coinciding points: they lie at 0 and must pass.
GEN3R_INLINE double squared(double reach) { return reach * reach * (1 + 1e-9) + 1e-290; }

// The queries of one block after another, with what they share.
template <bool kMean>
struct Group {
    const NeighborTree& tree;
    size_t wanted;
    double* out;
    Nearest nearest{wanted};
    Candidates candidates{};
    // Points that are done and how far their farthest neighbour is.
    double x[kLeaf], y[kLeaf], z[kLeaf], radius[kLeaf];

    // Every point that could be among the wanted ones of `q` is nearer than this: as the nearest of
    // the points that are done sees it.
    GEN3R_INLINE double reach(const double* q) const {
        double least = kInfinity, around = kInfinity;
        for (int i = 0; i < kLeaf; ++i) {
            const double dx = x[i] - q[0], dy = y[i] - q[1], dz = z[i] - q[2];
            const double distance = dx * dx + dy * dy + dz * dz;
            around = distance < least ? radius[i] : around;
            least = distance < least ? distance : least;
        }
        return around + std::sqrt(least);
    }

    GEN3R_INLINE void forget() {  // points infinitely far away tell nothing
        std::fill_n(x, kLeaf, kInfinity), std::fill_n(y, kLeaf, kInfinity);
        std::fill_n(z, kLeaf, kInfinity), std::fill_n(radius, kLeaf, kInfinity);
    }

    GEN3R_INLINE void done(size_t position, size_t lane, const double* q) {
        const bool enough = nearest.finish();
        x[lane] = q[0], y[lane] = q[1], z[lane] = q[2];
        radius[lane] = enough ? nearest.farthest() : kInfinity;
        out[position + lane] = enough && kMean ? nearest.mean() : radius[lane];
    }

    GEN3R_INLINE void run(size_t number) {
        const Block& block = tree.blocks()[number];
        const size_t position = number * kLeaf;
        const size_t count = std::min<size_t>(kLeaf, tree.size() - position);
        double low[3], high[3];
        const Boxes& boxes = tree.levels()[0][number / kWide];
        for (int a = 0; a < 3; ++a) {
            low[a] = boxes.low[a][number % kWide], high[a] = boxes.high[a][number % kWide];
        }
        // The first to go is the one nearest to the middle: the others are not far from it.
        size_t first = 0;
        double least = kInfinity;
        for (size_t i = 0; i < count; ++i) {
            const double dx = block.x[i] - (low[0] / 2 + high[0] / 2);
            const double dy = block.y[i] - (low[1] / 2 + high[1] / 2);
            const double dz = block.z[i] - (low[2] / 2 + high[2] / 2);
            const double distance = dx * dx + dy * dy + dz * dz;
            if (distance < least) least = distance, first = i;
        }
        double q[3] = {block.x[first], block.y[first], block.z[first]};
        nearest.start(squared(reach(q)));
        search(tree, q, nearest);
        forget();
        done(position, first, q);

        double widest = 0;
        for (size_t i = 0; i < count; ++i) {
            const double dx = block.x[i] - q[0], dy = block.y[i] - q[1], dz = block.z[i] - q[2];
            widest = std::max(widest, dx * dx + dy * dy + dz * dz);
        }
        const double farthest = radius[first] + std::sqrt(widest);
        const bool together = collect(tree, low, high, squared(farthest), candidates);
        for (size_t i = 0; i < count; ++i) {
            if (i == first) continue;
            q[0] = block.x[i], q[1] = block.y[i], q[2] = block.z[i];
            nearest.start(squared(reach(q)));
            if (together) {
                search(tree, candidates, q, nearest);
            } else {
                search(tree, q, nearest);
            }
            done(position, i, q);
        }
    }
};

template <bool kMean>
void run(const NeighborTree& tree, size_t wanted, size_t begin, size_t end,
                      double* out) {
    Group<kMean> group{tree, wanted, out, Nearest(wanted), {}, {}, {}, {}, {}};
    group.forget();
    for (size_t block = begin; block < end; ++block) group.run(block);
}

}  // namespace
}  // namespace GEN3R_ISA
}  // namespace gen3r
