// Frames as bytes: values in [0, 1] to 8 bits, depth to colours.
#pragma once

#include <cstdint>

namespace gen3r {

enum class Real { f32, f16, bf16 };

// frames x height x width x 3 values; strides count values, not bytes, and may be anything.
struct Frames {
    const void* values;
    Real type;
    int64_t frames, height, width;
    int64_t frame_stride, row_stride, column_stride, channel_stride;
};

// out[f, y, x, c] = value * 255, rounded to the values' own type, cut to [0, 255] (NaN gives 0) and
// truncated: torch's (frames * 255).to(uint8) wherever that is defined.
void pack_frames(const Frames& frames, uint8_t* out, int threads);

struct Shading {
    const uint8_t* table;  // [256, 3], from far to near
    uint8_t unknown[3];    // where there is no depth
    double low, high;      // fractions of the sorted inverse depths where the scale begins and ends
    int64_t samples;       // about how many inverse depths are sorted to find them
};

// Colours [count, 3] of depths [count] on one scale of inverse depth; see depth_colors.py.
void color_depth(const float* depth, int64_t count, const Shading& shading, uint8_t* out,
                 int threads);

}  // namespace gen3r
