// Python bindings of packing.h.
#include "arrays.h"
#include "bindings.h"
#include "packing.h"

namespace py = pybind11;

namespace gen3r {
namespace {

Real real_named(const std::string& name) {
    if (name == "float32") return Real::f32;
    if (name == "float16") return Real::f16;
    if (name == "bfloat16") return Real::bf16;
    throw std::invalid_argument("dtype '" + name + "' must be float32, float16 or bfloat16");
}

py::array_t<uint8_t> pack(const py::array& frames, const std::string& dtype, int threads) {
    const Real type = real_named(dtype);
    const py::ssize_t size = type == Real::f32 ? 4 : 2;
    if (frames.ndim() != 4 || frames.shape(3) != 3 || frames.itemsize() != size)
        throw std::invalid_argument("frames must be " + dtype + " [F, H, W, 3], got " +
                                    described(frames));
    for (int axis = 0; axis < 4; ++axis)
        if (frames.strides(axis) % size)
            throw std::invalid_argument("frames must lie on whole values");
    const auto stride = [&](int axis) { return frames.strides(axis) / size; };
    const Frames all{frames.data(),   type,      frames.shape(0), frames.shape(1),
                     frames.shape(2), stride(0), stride(1),       stride(2), stride(3)};
    py::array_t<uint8_t> out({frames.shape(0), frames.shape(1), frames.shape(2), py::ssize_t{3}});
    uint8_t* target = out.mutable_data();
    const py::gil_scoped_release released;
    pack_frames(all, target, threads);
    return out;
}

py::array_t<uint8_t> color(const py::array& depth, const py::array& table, const py::array& unknown,
                           double low, double high, int64_t samples, int threads) {
    const auto* values = data_of<float>(depth, "depth");
    Shading shading{data_of<uint8_t>(table, "table"), {}, low, high, samples};
    if (rows_of(table, "table") != 256 || unknown.size() != 3)
        throw std::invalid_argument("table must be [256, 3] and unknown [3]");
    if (!(0.0 <= low && low <= high && high <= 1.0))
        throw std::invalid_argument("low and high must be fractions, low first");
    std::copy_n(data_of<uint8_t>(unknown, "unknown"), 3, shading.unknown);
    std::vector<py::ssize_t> shape(depth.shape(), depth.shape() + depth.ndim());
    shape.push_back(3);
    py::array_t<uint8_t> out(shape);
    uint8_t* target = out.mutable_data();
    const int64_t count = depth.size();
    const py::gil_scoped_release released;
    color_depth(values, count, shading, target, threads);
    return out;
}

}  // namespace

void bind_packing(py::module_& m) {
    m.def("pack_frames", &pack, py::arg("frames"), py::arg("dtype"), py::arg("threads") = 0,
          "uint8 [F, H, W, 3] of frames in [0, 1], truncated; bfloat16 is given as its bits.");
    m.def("depth_colors", &color, py::arg("depth"), py::arg("table"), py::arg("unknown"),
          py::arg("low"), py::arg("high"), py::arg("samples"), py::arg("threads") = 0,
          "uint8 [..., 3] of float32 depth [...] by inverse depth; see depth_colors.py.");
}

}  // namespace gen3r
