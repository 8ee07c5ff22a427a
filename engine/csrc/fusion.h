// From the points of all frames to one clean cloud, on the CPU. gen3r_engine/fusion.py defines the
// steps and their order; gen3r_engine/fusion_reference.py is the same in numpy.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace gen3r {

struct FusionOptions {  // FusionConfig; what is None there is NaN here
    double voxel_size, far_percentile, confidence_percentile;
    double near_percentile;
    bool filter_outliers;
    size_t nb_neighbors, radius_neighbors;
    double std_ratio, radius_scale;
    int threads = 0;  // 0: as parallel_for
};

// Arrays of the caller, [count, 3] or [count], contiguous; of each pair exactly one is set.
struct CloudView {
    size_t count = 0;
    const double* points64 = nullptr;
    const float* points32 = nullptr;
    const uint8_t* colors8 = nullptr;
    const double* colors64 = nullptr;   // 0 to 255
    const float* normals = nullptr;     // or none
    const float* confidence = nullptr;  // or none
    const uint8_t* valid = nullptr;     // or none: all are

    void point(size_t i, double* out) const {
        for (int a = 0; a < 3; ++a) {
            out[a] = points64 ? points64[3 * i + a] : static_cast<double>(points32[3 * i + a]);
        }
    }
    double color(size_t i, int channel) const {
        return colors8 ? colors8[3 * i + channel] : colors64[3 * i + channel];
    }
};

// What became of a point; in FusedCloud::dropped by number.
enum Fate : uint8_t { kKept, kMasked, kNotFinite, kUnsure, kFar, kOutlier, kNearOutlier, kFates };

struct FusedCloud {
    size_t count = 0;
    std::unique_ptr<double[]> points;    // [count, 3]
    std::unique_ptr<uint8_t[]> colors;   // [count, 3]
    std::unique_ptr<float[]> normals;    // [count, 3], or none
    size_t fates[kFates] = {};           // points with each fate; they add up to the points given
};

// Raises std::invalid_argument where the bounding box has more than 2^62 cells. Beyond the input it
// takes at most 56 bytes a point and a few MB (the grid with normals, each point in its own cell).
FusedCloud fuse_points(const CloudView& cloud, const FusionOptions& options);

// The last step alone, for the points whose fate is kKept; fusion_voxels.cpp.
void average_cells(const CloudView& cloud, const std::vector<uint8_t>& fate, double voxel_size,
                   int threads, FusedCloud& out);
void copy_kept(const CloudView& cloud, const std::vector<uint8_t>& fate, FusedCloud& out);

// numpy.percentile of values that may change places: linear between the nearest two. At least one.
double percentile(std::vector<double>& values, double percent);

}  // namespace gen3r
