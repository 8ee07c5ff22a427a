#include "packing.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "parallel.h"
#include "simd.h"

namespace gen3r {
namespace {

constexpr int64_t kGrain = 1 << 16;  // values: a range takes longer than handing it out

inline float from_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

// A float, 0 or more, whose last `dropped` bits of mantissa are rounded away, ties to even.
template <int dropped>
inline float rounded(float value) {
    const uint32_t bits = to_bits(value);
    const uint32_t half = (1u << (dropped - 1)) - 1 + ((bits >> dropped) & 1);
    return from_bits((bits + half) & ~((1u << dropped) - 1));
}

inline uint8_t cut(float value) {
    value = value > 0.0f ? value : 0.0f;  // false for NaN
    return static_cast<uint8_t>(static_cast<int>(value < 255.0f ? value : 255.0f));
}

struct F32 {
    using Value = float;
    static uint8_t pack(float value) { return cut(value * 255.0f); }
};

struct BF16 {
    using Value = uint16_t;
    static uint8_t pack(uint16_t bits) {
        const uint32_t kept = bits <= 0x7f80 ? bits : 0;  // neither negative nor NaN
        return cut(rounded<16>(from_bits(kept << 16) * 255.0f));
    }
};

struct F16 {
    using Value = uint16_t;
    static uint8_t pack(uint16_t bits) {
        const uint32_t kept = bits <= 0x7c00 ? bits : 0;  // neither negative nor NaN
        // Exponent and mantissa moved into a float's; 2^112 is the difference of the two biases.
        // Half's subnormals come out right, and its infinity as 65536, which is cut. A result below
        // 2^-14, where half has fewer bits, is truncated to 0 anyhow.
        return cut(rounded<13>(from_bits(kept << 13) * from_bits(0x77800000u) * 255.0f));
    }
};

template <typename Type>
GEN3R_CLONES void pack_run(const typename Type::Value* values, int64_t count, uint8_t* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = Type::pack(values[i]);
}

// Three planes of one row to interleaved pixels.
template <typename Type>
GEN3R_CLONES void pack_planes(const typename Type::Value* values, int64_t channel_stride,
                              int64_t width, uint8_t* out) {
    const auto *red = values, *green = values + channel_stride, *blue = green + channel_stride;
    for (int64_t x = 0; x < width; ++x) {
        out[3 * x] = Type::pack(red[x]);
        out[3 * x + 1] = Type::pack(green[x]);
        out[3 * x + 2] = Type::pack(blue[x]);
    }
}

template <typename Type>
void pack_row(const Frames& frames, const typename Type::Value* row, uint8_t* out) {
    if (frames.channel_stride == 1 && frames.column_stride == 3) {
        pack_run<Type>(row, 3 * frames.width, out);
    } else if (frames.column_stride == 1) {
        pack_planes<Type>(row, frames.channel_stride, frames.width, out);
    } else {
        for (int64_t x = 0; x < frames.width; ++x) {
            for (int64_t c = 0; c < 3; ++c) {
                const int64_t at = x * frames.column_stride + c * frames.channel_stride;
                out[3 * x + c] = Type::pack(row[at]);
            }
        }
    }
}

template <typename Type>
void pack_all(const Frames& frames, uint8_t* out, int threads) {
    const auto* values = static_cast<const typename Type::Value*>(frames.values);
    const int64_t rows = frames.frames * frames.height;
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, 3 * frames.width));
    parallel_for(rows, grain, threads, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) {
            const int64_t f = row / frames.height, y = row % frames.height;
            const auto* start = values + f * frames.frame_stride + y * frames.row_stride;
            pack_row<Type>(frames, start, out + row * 3 * frames.width);
        }
    });
}

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr int kUnknown = 256;  // the level behind the table's own

// 1 / depth; 0 where there is no depth (0, negative, NaN, infinite, or an inverse beyond float).
inline float inverse_of(float depth) {
    const float inverse = 1.0f / depth;  // IEEE: infinite for 0, which is then refused
    return (depth > 0.0f) & (depth <= kLargest) & (inverse <= kLargest) ? inverse : 0.0f;
}

GEN3R_CLONES void invert(const float* depth, int64_t count, float* out) {
    for (int64_t i = 0; i < count; ++i) out[i] = inverse_of(depth[i]);
}

// Levels 0 to 255 of inverse depths between low and low + span, rounded, ties to even.
GEN3R_CLONES void find_levels(const float* inverse, int64_t count, double low, double span,
                              int32_t* levels) {
    constexpr double two52 = 4503599627370496.0;  // adding it rounds to whole numbers
    // A clip of one depth has no scale; the middle of the table says "all alike".
    const bool alike = !(span > 0.0);
    for (int64_t i = 0; i < count; ++i) {
        double scaled = alike ? 0.5 : (inverse[i] - low) / span;
        scaled = scaled > 0.0 ? scaled : 0.0;
        scaled = scaled < 1.0 ? scaled : 1.0;
        const auto level = static_cast<int32_t>((scaled * 255.0 + two52) - two52);
        levels[i] = inverse[i] > 0.0f ? level : kUnknown;
    }
}

// The value at a fraction of the sorted ones, between two of them by a straight line.
double percentile(std::vector<float>& values, double fraction) {
    const double place = fraction * static_cast<double>(values.size() - 1);
    const auto below = static_cast<int64_t>(place);
    const auto middle = values.begin() + below;
    std::nth_element(values.begin(), middle, values.end());
    const double first = *middle;
    if (middle + 1 == values.end()) return first;
    const double second = *std::min_element(middle + 1, values.end());
    return first + (second - first) * (place - static_cast<double>(below));
}

// Every n-th known inverse depth, in order, n such that about `samples` remain.
std::vector<float> sampled(const float* depth, int64_t count, int64_t samples, int threads) {
    const int64_t blocks = (count + kGrain - 1) / kGrain;
    // Calls body(block, inverse depths of it, how many), several blocks at a time.
    const auto each_block = [&](auto&& body) {
        parallel_for(blocks, 1, threads, [&](int64_t begin, int64_t end) {
            std::vector<float> inverse(kGrain);
            for (int64_t block = begin; block < end; ++block) {
                const int64_t size = std::min(kGrain, count - block * kGrain);
                invert(depth + block * kGrain, size, inverse.data());
                body(static_cast<size_t>(block), inverse.data(), size);
            }
        });
    };
    std::vector<int64_t> known(static_cast<size_t>(blocks) + 1, 0);  // before each block
    each_block([&](size_t block, const float* inverse, int64_t size) {
        known[block + 1] = size - std::count(inverse, inverse + size, 0.0f);
    });
    for (size_t block = 1; block < known.size(); ++block) known[block] += known[block - 1];
    const int64_t total = known.back();
    const int64_t step = std::max<int64_t>(1, total / std::max<int64_t>(1, samples));
    std::vector<float> values(static_cast<size_t>((total + step - 1) / step));
    each_block([&](size_t block, const float* inverse, int64_t size) {
        int64_t left = (step - known[block] % step) % step;  // known ones to pass over
        auto next = static_cast<size_t>((known[block] + step - 1) / step);
        for (int64_t i = 0; i < size; ++i) {
            if (inverse[i] == 0.0f) continue;
            if (left == 0) values[next++] = inverse[i];
            left = left == 0 ? step - 1 : left - 1;
        }
    });
    return values;
}

}  // namespace

void pack_frames(const Frames& frames, uint8_t* out, int threads) {
    switch (frames.type) {
        case Real::f32: return pack_all<F32>(frames, out, threads);
        case Real::f16: return pack_all<F16>(frames, out, threads);
        case Real::bf16: return pack_all<BF16>(frames, out, threads);
    }
}

void color_depth(const float* depth, int64_t count, const Shading& shading, uint8_t* out,
                 int threads) {
    std::vector<float> values = sampled(depth, count, shading.samples, threads);
    const double low = values.empty() ? 0.0 : percentile(values, shading.low);
    const double span = values.empty() ? 0.0 : percentile(values, shading.high) - low;
    uint8_t colors[257][4] = {};  // four bytes: one copy a pixel
    for (int level = 0; level < 256; ++level) std::copy_n(shading.table + 3 * level, 3, colors[level]);
    std::copy_n(shading.unknown, 3, colors[kUnknown]);
    parallel_for(count, kGrain, threads, [&](int64_t begin, int64_t end) {
        const int64_t size = end - begin;
        std::vector<float> inverse(static_cast<size_t>(size));
        std::vector<int32_t> levels(static_cast<size_t>(size));
        invert(depth + begin, size, inverse.data());
        find_levels(inverse.data(), size, low, span, levels.data());
        uint8_t* target = out + 3 * begin;
        // The fourth byte is the next pixel's, written over by it; the last pixel takes three.
        for (int64_t i = 0; i + 1 < size; ++i) std::memcpy(target + 3 * i, colors[levels[i]], 4);
        std::memcpy(target + 3 * (size - 1), colors[levels[size - 1]], 3);
    });
}

}  // namespace gen3r
