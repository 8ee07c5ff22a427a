// Frames and depth as bytes: known values, every layout, every thread count, odd sizes.
#include "../packing.h"

#include <cmath>
#include <limits>
#include <vector>

#include "check.h"

using namespace gen3r;

namespace {

std::vector<uint8_t> packed(const Frames& frames, int threads) {
    std::vector<uint8_t> out(static_cast<size_t>(frames.frames * frames.height * frames.width * 3));
    pack_frames(frames, out.data(), threads);
    return out;
}

CASE(values_are_truncated_and_cut) {
    const float nan = std::numeric_limits<float>::quiet_NaN();
    const float values[9] = {0.0f, 1.0f, 0.999f, -0.5f, 7.0f, nan, 0.5f, 1e-30f, INFINITY};
    const Frames frames{values, Real::f32, 1, 1, 3, 9, 9, 3, 1};
    CHECK((packed(frames, 1) == std::vector<uint8_t>{0, 255, 254, 0, 255, 0, 127, 0, 255}));
}

CASE(half_types_round_their_product_first) {
    // 0.99609375 * 255 = 254.004, which bfloat16 rounds to 254; 0.5 -> 127.5 -> 128 (ties to even).
    const uint16_t bf16[3] = {0x3f7f, 0x3f00, 0x7fc0};
    CHECK((packed({bf16, Real::bf16, 1, 1, 1, 3, 3, 3, 1}, 1) == std::vector<uint8_t>{254, 127, 0}));
    const uint16_t f16[3] = {0x3c00, 0x3800, 0xbc00};
    CHECK((packed({f16, Real::f16, 1, 1, 1, 3, 3, 3, 1}, 1) == std::vector<uint8_t>{255, 127, 0}));
}

CASE(layouts_and_threads_agree) {
    const int64_t frames = 3, height = 37, width = 53, plane = height * width;
    std::vector<float> last(static_cast<size_t>(frames * plane * 3));
    for (size_t i = 0; i < last.size(); ++i) last[i] = static_cast<float>(i % 1009) / 1008.0f;
    std::vector<float> first(last.size()), spaced(2 * last.size());
    for (int64_t f = 0; f < frames; ++f)
        for (int64_t p = 0; p < plane; ++p)
            for (int64_t c = 0; c < 3; ++c) {
                const float value = last[static_cast<size_t>((f * plane + p) * 3 + c)];
                first[static_cast<size_t>((f * 3 + c) * plane + p)] = value;
                spaced[static_cast<size_t>(2 * ((f * plane + p) * 3 + c))] = value;
            }
    const Frames rows{last.data(), Real::f32, frames, height, width, 3 * plane, 3 * width, 3, 1};
    const Frames planes{first.data(), Real::f32, frames, height, width, 3 * plane, width, 1, plane};
    const Frames gaps{spaced.data(), Real::f32, frames, height, width, 6 * plane, 6 * width, 6, 2};
    const auto expected = packed(rows, 1);
    for (int threads : {1, 2, 5}) {
        CHECK(packed(rows, threads) == expected);
        CHECK(packed(planes, threads) == expected);
        CHECK(packed(gaps, threads) == expected);
    }
}

CASE(depth_has_one_scale_and_unknown_places) {
    std::vector<uint8_t> table(768);
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<uint8_t>(i / 3);
    const Shading shading{table.data(), {9, 8, 7}, 0.0, 1.0, 1000};
    const float depth[6] = {1.0f, 2.0f, 0.0f, NAN, 1e-45f, INFINITY};
    std::vector<uint8_t> out(18);
    color_depth(depth, 6, shading, out.data(), 2);
    CHECK(out[0] == 255 && out[3] == 0);
    for (size_t i = 6; i < 18; i += 3) CHECK(out[i] == 9 && out[i + 1] == 8 && out[i + 2] == 7);
    const float constant[2] = {3.0f, 3.0f};
    color_depth(constant, 2, shading, out.data(), 1);
    CHECK(out[0] == 128 && out[3] == 128);
    color_depth(depth, 0, shading, out.data(), 1);
}

CASE(depth_is_the_same_on_any_number_of_threads) {
    std::vector<uint8_t> table(768, 0);
    for (size_t i = 0; i < table.size(); ++i) table[i] = static_cast<uint8_t>(i / 3);
    const Shading shading{table.data(), {0, 0, 0}, 0.02, 0.98, 10'000};
    std::vector<float> depth(300'001);
    for (size_t i = 0; i < depth.size(); ++i)
        depth[i] = i % 7 ? 0.5f + static_cast<float>(i * 7919 % 10'007) : -1.0f;
    std::vector<uint8_t> one(3 * depth.size()), many(3 * depth.size());
    const auto count = static_cast<int64_t>(depth.size());
    color_depth(depth.data(), count, shading, one.data(), 1);
    color_depth(depth.data(), count, shading, many.data(), 4);
    CHECK(one == many);
}

}  // namespace

int main() { return check::run_all(); }
