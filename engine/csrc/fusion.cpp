#include "fusion.h"

#include <algorithm>
#include <cmath>

#include "fusion_tree.h"
#include "parallel.h"

namespace gen3r {
namespace {

constexpr int64_t kGrain = 1 << 16;

// The numbers of the points that are left, in order.
template <typename Keep>
size_t count_kept(const std::vector<uint8_t>& fate, Keep&& keep) {
    size_t count = 0;
    for (size_t i = 0; i < fate.size(); ++i) count += fate[i] == kKept && keep(i);
    return count;
}

void drop_invalid(const CloudView& cloud, int threads, std::vector<uint8_t>& fate) {
    const auto count = static_cast<int64_t>(cloud.count);
    parallel_for(count, kGrain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            double p[3];
            cloud.point(i, p);
            const bool finite = std::isfinite(p[0]) && std::isfinite(p[1]) && std::isfinite(p[2]);
            const bool masked = cloud.valid != nullptr && cloud.valid[i] == 0;
            fate[i] = static_cast<uint8_t>(masked ? kMasked : finite ? kKept : kNotFinite);
        }
    });
}

// Drops the points whose value is not finite or on the wrong side of a percentile of the others.
template <typename Value, typename Beyond>
void cut(std::vector<uint8_t>& fate, Fate as, double percent, Value&& value, Beyond&& beyond) {
    std::vector<double> values;
    values.reserve(count_kept(fate, [&](size_t i) { return std::isfinite(value(i)); }));
    for (size_t i = 0; i < fate.size(); ++i) {
        if (fate[i] == kKept && std::isfinite(value(i))) values.push_back(value(i));
    }
    const double limit = values.empty() ? 0.0 : percentile(values, percent);
    for (size_t i = 0; i < fate.size(); ++i) {
        if (fate[i] != kKept) continue;
        const double v = value(i);
        if (!std::isfinite(v) || beyond(v, limit)) fate[i] = as;
    }
}

double depth(const CloudView& cloud, size_t i) {
    return cloud.points64 ? cloud.points64[3 * i + 2] : cloud.points32[3 * i + 2];
}

template <typename Keep>
NeighborTree tree_of(const CloudView& cloud, const std::vector<uint8_t>& fate, size_t count,
                     int threads, Keep&& keep) {
    ItemBuffer buffer(count);
    Item* item = buffer.items();
    for (size_t i = 0; i < cloud.count; ++i) {
        if (fate[i] != kKept || !keep(i)) continue;
        cloud.point(i, item->p);
        item->id = i;
        ++item;
    }
    return NeighborTree(std::move(buffer), threads);
}

// Sum of f(value), in runs, so that it is as exact as it is long.
template <typename F>
double sum(const std::vector<double>& values, F&& f) {
    double total = 0;
    for (size_t start = 0; start < values.size(); start += 1024) {
        double run = 0;
        const size_t end = std::min(values.size(), start + 1024);
        for (size_t i = start; i < end; ++i) run += f(values[i]);
        total += run;
    }
    return total;
}

void drop_outliers(const CloudView& cloud, const FusionOptions& options,
                   std::vector<uint8_t>& fate) {
    const auto any = [](size_t) { return true; };
    const size_t count = count_kept(fate, any);
    if (count < 2) {
        for (uint8_t& f : fate) {
            if (f == kKept) f = kOutlier;
        }
        return;
    }
    const NeighborTree tree = tree_of(cloud, fate, count, options.threads, any);
    const auto mean = tree.mean_distances(std::min(count, options.nb_neighbors));
    const double center = sum(mean, [](double m) { return m; }) / static_cast<double>(count);
    const double squares =
        sum(mean, [&](double m) { return m > 0 ? (m - center) * (m - center) : 0.0; });
    const double deviation = std::sqrt(squares / static_cast<double>(count - 1));
    const double limit = center + options.std_ratio * deviation;
    for (size_t i = 0; i < count; ++i) {
        if (!(mean[i] > 0 && mean[i] < limit)) fate[tree.id(i)] = kOutlier;
    }
}

void drop_near_outliers(const CloudView& cloud, const FusionOptions& options,
                        std::vector<uint8_t>& fate) {
    std::vector<double> depths;
    depths.reserve(count_kept(fate, [](size_t) { return true; }));
    for (size_t i = 0; i < cloud.count; ++i) {
        if (fate[i] == kKept) depths.push_back(depth(cloud, i));
    }
    if (depths.empty()) return;
    const double limit = percentile(depths, options.near_percentile);
    depths = {};
    const auto near = [&](size_t i) { return depth(cloud, i) <= limit; };
    const size_t count = count_kept(fate, near);
    if (count < 2) {
        for (size_t i = 0; i < cloud.count; ++i) {
            if (fate[i] == kKept && near(i)) fate[i] = kNearOutlier;
        }
        return;
    }
    const NeighborTree tree = tree_of(cloud, fate, count, options.threads, near);
    double radius = 0;
    {
        auto nearest = tree.kth_distances(2);
        radius = options.radius_scale * percentile(nearest, 50.0);
    }
    // The neighbour number radius_neighbors + 1; the point itself is number 1.
    const auto distance = tree.kth_distances(options.radius_neighbors + 1);
    for (size_t i = 0; i < count; ++i) {
        if (!(distance[i] <= radius)) fate[tree.id(i)] = kNearOutlier;
    }
}

}  // namespace

double percentile(std::vector<double>& values, double percent) {
    const double at = percent / 100.0 * static_cast<double>(values.size() - 1);
    const auto index = std::min(static_cast<size_t>(at), values.size() - 1);
    const double share = at - static_cast<double>(index);
    std::nth_element(values.begin(), values.begin() + index, values.end());
    const double low = values[index];
    if (index + 1 == values.size() || share == 0) return low;
    const double high = *std::min_element(values.begin() + index + 1, values.end());
    const double difference = high - low;  // from the nearer side, as numpy
    return share >= 0.5 ? high - difference * (1 - share) : low + difference * share;
}

FusedCloud fuse_points(const CloudView& cloud, const FusionOptions& options) {
    std::vector<uint8_t> fate(cloud.count);
    drop_invalid(cloud, options.threads, fate);
    if (!std::isnan(options.confidence_percentile)) {
        cut(fate, kUnsure, options.confidence_percentile,
            [&](size_t i) { return static_cast<double>(cloud.confidence[i]); },
            [](double v, double limit) { return v < limit; });
    }
    if (!std::isnan(options.far_percentile)) {
        cut(fate, kFar, options.far_percentile, [&](size_t i) { return depth(cloud, i); },
            [](double v, double limit) { return v > limit; });
    }
    if (options.filter_outliers) {
        drop_outliers(cloud, options, fate);
        if (options.near_percentile > 0) drop_near_outliers(cloud, options, fate);
    }
    FusedCloud out;
    for (const uint8_t f : fate) ++out.fates[f];
    if (std::isnan(options.voxel_size)) {
        copy_kept(cloud, fate, out);
    } else {
        average_cells(cloud, fate, options.voxel_size, options.threads, out);
    }
    return out;
}

}  // namespace gen3r
