// The fusion: neighbours against brute force, degenerate clouds, any number of threads, voxels.
#include "../fusion.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <stdexcept>
#include <vector>

#include "../fusion_tree.h"
#include "check.h"

using namespace gen3r;

namespace {

const double kNone = std::numeric_limits<double>::quiet_NaN();

FusionOptions plain() { return {kNone, kNone, kNone, 0.0, true, 25, 10, 1.25, 4.0}; }

// Two scales of density, a line, coinciding points and one far away.
std::vector<double> uneven(size_t count) {
    std::mt19937_64 random(7);
    std::normal_distribution<double> normal;
    std::vector<double> points;
    for (size_t i = 0; i < count; ++i) {
        const double scale = i % 3 == 0 ? 1e-3 : 1.0;
        for (int a = 0; a < 3; ++a) {
            points.push_back(i % 7 == 0 ? (a == 0 ? static_cast<double>(i / 14) : 2.0)
                                        : scale * normal(random));
        }
    }
    if (count > 1) points[0] = 1e6;
    return points;
}

NeighborTree tree_of(const std::vector<double>& points, int threads) {
    ItemBuffer buffer(points.size() / 3);
    for (size_t i = 0; i < buffer.size(); ++i) {
        buffer.items()[i] = {{points[3 * i], points[3 * i + 1], points[3 * i + 2]}, i};
    }
    return NeighborTree(std::move(buffer), threads);
}

std::vector<double> sorted_distances(const std::vector<double>& points, size_t query) {
    std::vector<double> all;
    for (size_t i = 0; i < points.size() / 3; ++i) {
        double sum = 0;
        for (int a = 0; a < 3; ++a) {
            const double d = points[3 * i + a] - points[3 * query + a];
            sum += d * d;
        }
        all.push_back(std::sqrt(sum));
    }
    std::sort(all.begin(), all.end());
    return all;
}

CloudView view(const std::vector<double>& points, const std::vector<uint8_t>& colors) {
    CloudView cloud;
    cloud.count = points.size() / 3;
    cloud.points64 = points.data();
    cloud.colors8 = colors.data();
    return cloud;
}

CASE(neighbors_equal_brute_force) {
    for (const size_t count : {1, 2, 15, 16, 17, 129, 1500}) {
        const auto points = uneven(count);
        const NeighborTree tree = tree_of(points, 4);
        const size_t wanted = std::min<size_t>(count, 25);
        const auto mean = tree.mean_distances(wanted), fourth = tree.kth_distances(4);
        std::vector<char> seen(count, 0);
        for (size_t i = 0; i < count; ++i) {
            const auto all = sorted_distances(points, tree.id(i));
            double sum = 0;
            for (size_t n = 0; n < wanted; ++n) sum += all[n];
            CHECK(std::abs(mean[i] - sum / static_cast<double>(wanted)) <= 1e-12 * (1 + sum));
            const double expected = count < 4 ? fourth[i] : all[3];
            CHECK(count >= 4 || std::isinf(fourth[i]));
            CHECK(count < 4 || std::abs(fourth[i] - expected) <= 1e-12 * (1 + expected));
            CHECK(!seen[tree.id(i)]);
            seen[tree.id(i)] = 1;
        }
    }
}

CASE(threads_change_nothing) {
    const auto points = uneven(20000);
    const auto one = tree_of(points, 1).mean_distances(25);
    CHECK(one == tree_of(points, 4).mean_distances(25));
    const std::vector<uint8_t> colors(points.size(), 90);
    auto options = plain();
    options.voxel_size = 0.05;
    options.near_percentile = 60;
    options.threads = 1;
    const auto alone = fuse_points(view(points, colors), options);
    options.threads = 4;
    const auto shared = fuse_points(view(points, colors), options);
    CHECK(alone.count == shared.count);
    CHECK(std::equal(&alone.points[0], &alone.points[0] + 3 * alone.count, &shared.points[0]));
}

CASE(instruction_sets_agree) {
    const auto points = uneven(5000);
    const NeighborTree tree = tree_of(points, 2);
    for (const size_t wanted : {1, 7, 25, 300}) {
        const auto mean = tree.mean_distances(wanted), kth = tree.kth_distances(wanted);
        for (const Isa isa : {Isa::avx2, Isa::baseline}) {
            CHECK(mean == tree.mean_distances(wanted, isa));
            CHECK(kth == tree.kth_distances(wanted, isa));
        }
    }
}

CASE(coinciding_points_are_outliers_and_quick) {
    const std::vector<double> points(3 * 100000, 1.5);
    const std::vector<uint8_t> colors(points.size(), 1);
    const auto out = fuse_points(view(points, colors), plain());
    CHECK(out.count == 0 && out.fates[kOutlier] == 100000);
}

CASE(every_fate_is_counted) {
    auto points = uneven(1000);
    points[31] = kNone;
    points[62] = std::numeric_limits<double>::infinity();
    const std::vector<uint8_t> colors(points.size(), 200);
    std::vector<uint8_t> valid(1000, 1);
    valid[10] = valid[500] = 0;
    std::vector<float> confidence(1000, 2.0f), normals(3000, 0.0f);
    confidence[1] = 1.0f, confidence[2] = NAN;
    auto cloud = view(points, colors);
    cloud.valid = valid.data();
    cloud.confidence = confidence.data();
    cloud.normals = normals.data();
    auto options = plain();
    options.confidence_percentile = 10;
    options.far_percentile = 80;
    options.near_percentile = 50;
    const auto out = fuse_points(cloud, options);
    CHECK(out.fates[kMasked] == 2 && out.fates[kNotFinite] == 1 && out.fates[kUnsure] == 2);
    size_t all = 0;
    for (const size_t fate : out.fates) all += fate;
    CHECK(all == 1000 && out.count == out.fates[kKept] && out.normals != nullptr);
}

CASE(cells_are_averaged_in_order) {
    const std::vector<double> points = {0.9, 0, 0, 0, 0, 0, 2.5, 0, 0, 0.2, 0, 0};
    const std::vector<uint8_t> colors = {10, 0, 0, 20, 0, 0, 7, 8, 9, 31, 1, 0};
    auto options = plain();
    options.filter_outliers = false;
    options.voxel_size = 1.0;
    const auto out = fuse_points(view(points, colors), options);
    CHECK(out.count == 2 && out.points[0] == (0.9 + 0.0 + 0.2) / 3 && out.points[3] == 2.5);
    CHECK(out.colors[0] == 20 && out.colors[1] == 0 && out.colors[5] == 9);
}

CASE(too_many_cells_and_empty_clouds) {
    const std::vector<double> points = {0, 0, 0, 1e12, 1e12, 1e12};
    const std::vector<uint8_t> colors(6, 0);
    auto options = plain();
    options.filter_outliers = false;
    options.voxel_size = 1e-9;
    const auto wide = view(points, colors);
    CHECK_THROWS(fuse_points(wide, options), std::invalid_argument, "larger voxels");
    CHECK(fuse_points(view({}, {}), options).count == 0);
    options.filter_outliers = true;
    CHECK(fuse_points(view({}, {}), options).count == 0);
}

CASE(percentiles_are_numpys) {
    std::vector<double> values = {4, 1, 3, 2};
    CHECK(percentile(values, 0) == 1 && percentile(values, 100) == 4);
    CHECK(percentile(values, 50) == 2.5 && percentile(values, 30) == 1.9);
}

}  // namespace

int main() { return gen3r::check::run_all(); }
