#include "serialize.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "parallel.h"

namespace gen3r {
namespace {

constexpr int64_t kRows = 1 << 15;  // points at a time: the buffer stays in the cache

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the files are little-endian");

void coordinates(const void* points, bool wide, int64_t at, float* xyz) {
    if (wide) {
        const double* from = static_cast<const double*>(points) + 3 * at;
        for (int c = 0; c < 3; ++c) xyz[c] = static_cast<float>(from[c]);
    } else {
        std::memcpy(xyz, static_cast<const float*>(points) + 3 * at, 3 * sizeof(float));
    }
}

// Calls fill(begin, end, buffer) -> end of what it wrote, range after range, and writes that.
template <typename Fill>
void stream(Sink& sink, int64_t count, size_t row_bytes, Fill&& fill) {
    std::vector<char> buffer(row_bytes * static_cast<size_t>(std::min(count, kRows)));
    for (int64_t begin = 0; begin < count; begin += kRows) {
        const int64_t end = std::min(count, begin + kRows);
        fill(begin, end, buffer.data());
        sink.write(buffer.data(), row_bytes * static_cast<size_t>(end - begin));
    }
}

}  // namespace

void write_ply_rows(Sink& sink, const Cloud& cloud) {
    const size_t triple = 3 * sizeof(float);
    const size_t row = triple + (cloud.normals ? triple : 0) + 3;
    stream(sink, cloud.count, row, [&](int64_t begin, int64_t end, char* out) {
        for (int64_t i = begin; i < end; ++i) {
            float xyz[3];
            coordinates(cloud.points, cloud.wide, i, xyz);
            std::memcpy(out, xyz, triple);
            out += triple;
            if (cloud.normals) {
                std::memcpy(out, cloud.normals + 3 * i, triple);
                out += triple;
            }
            std::memcpy(out, cloud.colors + 3 * i, 3);
            out += 3;
        }
    });
}

void write_glb_points(Sink& sink, const Cloud& cloud, const float* table) {
    const size_t triple = 3 * sizeof(float);
    stream(sink, cloud.count, triple, [&](int64_t begin, int64_t end, char* out) {
        for (int64_t i = begin; i < end; ++i, out += triple) {
            float xyz[3];
            coordinates(cloud.points, cloud.wide, i, xyz);
            std::memcpy(out, xyz, triple);
        }
    });
    if (cloud.normals) sink.write(cloud.normals, triple * static_cast<size_t>(cloud.count));
    stream(sink, cloud.count, triple, [&](int64_t begin, int64_t end, char* out) {
        for (int64_t i = begin; i < end; ++i, out += triple) {
            const uint8_t* color = cloud.colors + 3 * i;
            const float rgb[3] = {table[color[0]], table[color[1]], table[color[2]]};
            std::memcpy(out, rgb, sizeof rgb);
        }
    });
}

Bounds bounds(const void* points, bool wide, int64_t count, int threads) {
    if (count == 0) throw std::invalid_argument("no points have no bounds");
    constexpr float infinity = std::numeric_limits<float>::infinity();
    Bounds all{{infinity, infinity, infinity}, {-infinity, -infinity, -infinity}};
    std::mutex guard;
    parallel_for(count, 1 << 16, threads, [&](int64_t begin, int64_t end) {
        Bounds box{{infinity, infinity, infinity}, {-infinity, -infinity, -infinity}};
        for (int64_t i = begin; i < end; ++i) {
            float xyz[3];
            coordinates(points, wide, i, xyz);
            for (int c = 0; c < 3; ++c) {
                if (!std::isfinite(xyz[c]))
                    throw std::invalid_argument("point " + std::to_string(i) +
                                                " is not finite as float32; drop such points");
                box.least[c] = std::min(box.least[c], xyz[c]);
                box.most[c] = std::max(box.most[c], xyz[c]);
            }
        }
        const std::lock_guard<std::mutex> lock(guard);
        for (int c = 0; c < 3; ++c) {
            all.least[c] = std::min(all.least[c], box.least[c]);
            all.most[c] = std::max(all.most[c], box.most[c]);
        }
    });
    return all;
}

}  // namespace gen3r
