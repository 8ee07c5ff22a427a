// The end of the fusion: one averaged point a cell, or the points as they are.
//
// Points are sorted by cell, stably, so that every sum is taken in the order of the input, as by
// numpy's bincount: the means are equal to the last bit on any number of threads.
#include <algorithm>
#include <cmath>
#include <sstream>
#include <stdexcept>

#include "fusion.h"
#include "parallel.h"

namespace gen3r {
namespace {

constexpr int64_t kGrain = 1 << 16;
constexpr int kDigit = 11;  // bits that one pass of the sort goes by

struct Entry {
    uint64_t cell, id;
};

struct Bounds {
    double low[3], high[3];
};

void allocate(const CloudView& cloud, size_t count, FusedCloud& out) {
    out.count = count;
    out.points.reset(new double[3 * count]);
    out.colors.reset(new uint8_t[3 * count]);
    if (cloud.normals) out.normals.reset(new float[3 * count]);
}

uint8_t rounded(double color) {  // half to even, as numpy.rint
    return static_cast<uint8_t>(std::nearbyint(color));
}

// Least significant digit first; the digits of a chunk keep their order, chunks follow each other.
void sort_by_cell(std::vector<Entry>& entries, uint64_t last, int threads) {
    std::vector<Entry> other(entries.size());
    const auto count = static_cast<int64_t>(entries.size());
    const int64_t chunk = std::max<int64_t>(kGrain, count / thread_count(threads) + 1);
    const int64_t chunks = (count + chunk - 1) / chunk;
    std::vector<std::vector<size_t>> starts(chunks, std::vector<size_t>(1 << kDigit));
    for (int shift = 0; shift < 64 && (last >> shift) > 0; shift += kDigit) {
        const auto digit = [shift](const Entry& entry) {
            return (entry.cell >> shift) & ((1 << kDigit) - 1);
        };
        parallel_for(count, chunk, threads, [&](int64_t begin, int64_t end) {
            auto& histogram = starts[begin / chunk];
            std::fill(histogram.begin(), histogram.end(), 0);
            for (int64_t i = begin; i < end; ++i) ++histogram[digit(entries[i])];
        });
        size_t total = 0;
        for (size_t d = 0; d < (1 << kDigit); ++d) {
            for (auto& histogram : starts) {
                const size_t here = histogram[d];
                histogram[d] = total;
                total += here;
            }
        }
        parallel_for(count, chunk, threads, [&](int64_t begin, int64_t end) {
            auto& next = starts[begin / chunk];
            for (int64_t i = begin; i < end; ++i) other[next[digit(entries[i])]++] = entries[i];
        });
        entries.swap(other);
    }
}

// The points of one cell, entries [begin, end).
void average(const CloudView& cloud, const Entry* begin, const Entry* end, size_t row,
             FusedCloud& out) {
    double point[3] = {}, color[3] = {}, normal[3] = {};
    for (const Entry* entry = begin; entry != end; ++entry) {
        double p[3];
        cloud.point(entry->id, p);
        for (int a = 0; a < 3; ++a) {
            point[a] += p[a];
            color[a] += cloud.color(entry->id, a);
        }
        if (!cloud.normals) continue;
        const float* n = cloud.normals + 3 * entry->id;
        if (std::isnan(n[0]) || std::isnan(n[1]) || std::isnan(n[2])) continue;
        for (int a = 0; a < 3; ++a) normal[a] += n[a];
    }
    const auto count = static_cast<double>(end - begin);
    for (int a = 0; a < 3; ++a) {
        out.points[3 * row + a] = point[a] / count;
        out.colors[3 * row + a] = rounded(color[a] / count);
    }
    if (!cloud.normals) return;
    const double length =
        std::sqrt(normal[0] * normal[0] + normal[1] * normal[1] + normal[2] * normal[2]);
    for (int a = 0; a < 3; ++a) {
        out.normals[3 * row + a] = length > 0 ? static_cast<float>(normal[a] / length) : 0.0f;
    }
}

Bounds bounds(const CloudView& cloud, const std::vector<uint8_t>& fate) {
    Bounds box{{INFINITY, INFINITY, INFINITY}, {-INFINITY, -INFINITY, -INFINITY}};
    for (size_t i = 0; i < cloud.count; ++i) {
        if (fate[i] != kKept) continue;
        double p[3];
        cloud.point(i, p);
        for (int a = 0; a < 3; ++a) {
            box.low[a] = std::min(box.low[a], p[a]);
            box.high[a] = std::max(box.high[a], p[a]);
        }
    }
    return box;
}

}  // namespace

void copy_kept(const CloudView& cloud, const std::vector<uint8_t>& fate, FusedCloud& out) {
    allocate(cloud, out.fates[kKept], out);
    size_t row = 0;
    for (size_t i = 0; i < cloud.count; ++i) {
        if (fate[i] != kKept) continue;
        cloud.point(i, out.points.get() + 3 * row);
        for (int a = 0; a < 3; ++a) {
            out.colors[3 * row + a] = rounded(cloud.color(i, a));
        }
        if (cloud.normals) {
            const float* n = cloud.normals + 3 * i;
            const bool known = !(std::isnan(n[0]) || std::isnan(n[1]) || std::isnan(n[2]));
            for (int a = 0; a < 3; ++a) out.normals[3 * row + a] = known ? n[a] : 0.0f;
        }
        ++row;
    }
}

void average_cells(const CloudView& cloud, const std::vector<uint8_t>& fate, double voxel_size,
                   int threads, FusedCloud& out) {
    const size_t kept = out.fates[kKept];
    if (kept == 0) {
        allocate(cloud, 0, out);
        return;
    }
    const Bounds box = bounds(cloud, fate);
    double sides[3];
    for (int a = 0; a < 3; ++a) {
        sides[a] = std::floor((box.high[a] - box.low[a]) / voxel_size) + 1.0;
    }
    if (!(sides[0] * sides[1] * sides[2] < 0x1p62)) {
        std::ostringstream text;
        text << "voxel_size " << voxel_size << " cuts a cloud of extent ["
             << sides[0] * voxel_size << " " << sides[1] * voxel_size << " "
             << sides[2] * voxel_size
             << "] into more than 2^62 cells; remove far points or use larger voxels";
        throw std::invalid_argument(text.str());
    }
    std::vector<Entry> entries;
    entries.reserve(kept);
    uint64_t last = 0;
    for (size_t i = 0; i < cloud.count; ++i) {
        if (fate[i] != kKept) continue;
        double p[3];
        cloud.point(i, p);
        uint64_t cell = 0;
        for (int a = 0; a < 3; ++a) {
            cell = cell * static_cast<uint64_t>(sides[a]) +
                   static_cast<uint64_t>(std::floor((p[a] - box.low[a]) / voxel_size));
        }
        last = std::max(last, cell);
        entries.push_back({cell, i});
    }
    sort_by_cell(entries, last, threads);

    // Each range takes the cells that begin in it; first their number, then the averages.
    const auto count = static_cast<int64_t>(kept);
    const auto first = [&](int64_t i) { return i == 0 || entries[i].cell != entries[i - 1].cell; };
    std::vector<size_t> rows((kept + kGrain - 1) / kGrain + 1, 0);
    parallel_for(count, kGrain, threads, [&](int64_t begin, int64_t end) {
        size_t found = 0;
        for (int64_t i = begin; i < end; ++i) found += first(i);
        rows[begin / kGrain + 1] = found;
    });
    for (size_t i = 1; i < rows.size(); ++i) rows[i] += rows[i - 1];
    allocate(cloud, rows.back(), out);
    parallel_for(count, kGrain, threads, [&](int64_t begin, int64_t end) {
        size_t row = rows[begin / kGrain];
        for (int64_t i = begin; i < end;) {
            if (!first(i)) {
                ++i;
                continue;
            }
            int64_t stop = i + 1;
            while (stop < count && !first(stop)) ++stop;
            average(cloud, entries.data() + i, entries.data() + stop, row++, out);
            i = stop;
        }
    });
}

}  // namespace gen3r
