// The bulk of result files: rows of a PLY cloud, arrays of a GLB cloud. Headers are Python's.
#pragma once

#include <cstdint>

#include "sink.h"

namespace gen3r {

struct Cloud {
    const void* points;  // [count, 3] float, or double where `wide`
    bool wide;
    const uint8_t* colors;  // [count, 3]
    const float* normals;   // [count, 3], or null
    int64_t count;
};

// Per point: float x y z, [float nx ny nz,] uint8 red green blue; packed, little-endian.
void write_ply_rows(Sink& sink, const Cloud& cloud);

// float x y z of all points, [float normals of all,] then float red green blue of all, each colour
// through `table` [256].
void write_glb_points(Sink& sink, const Cloud& cloud, const float* table);

struct Bounds {
    float least[3], most[3];
};

// The box around points as float. std::invalid_argument when there are none or one is not finite.
Bounds bounds(const void* points, bool wide, int64_t count, int threads);

}  // namespace gen3r
