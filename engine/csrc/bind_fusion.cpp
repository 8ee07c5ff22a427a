// Python bindings of fusion.h; gen3r_engine/fusion_native.py is their only caller.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <limits>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings.h"
#include "fusion.h"

namespace py = pybind11;

namespace gen3r {
namespace {

// The data of a C-contiguous array of the given type and shape; null for None.
template <typename T>
const T* data(const py::object& object, const char* name, size_t rows, py::ssize_t columns) {
    if (object.is_none()) return nullptr;
    if (!py::isinstance<py::array_t<T, py::array::c_style>>(object)) {
        throw std::invalid_argument(std::string(name) + " has the wrong type or is not contiguous");
    }
    const auto array = py::reinterpret_borrow<py::array>(object);
    const bool shaped = columns == 0 ? array.ndim() == 1
                                     : array.ndim() == 2 && array.shape(1) == columns;
    if (!shaped || static_cast<size_t>(array.shape(0)) != rows) {
        throw std::invalid_argument(std::string(name) + " must have " + std::to_string(rows) +
                                    " rows of " + std::to_string(columns == 0 ? 1 : columns));
    }
    return static_cast<const T*>(array.data());
}

template <typename T>
py::array_t<T> give(std::unique_ptr<T[]> values, size_t rows) {
    T* const raw = values.release();
    const py::capsule owner(raw, [](void* memory) { delete[] static_cast<T*>(memory); });
    return py::array_t<T>({static_cast<py::ssize_t>(rows), py::ssize_t{3}}, raw, owner);
}

py::tuple fuse(const py::array& points, const py::array& colors, const py::object& normals,
               const py::object& confidence, const py::object& valid,
               std::optional<double> voxel_size, bool filter_outliers, size_t nb_neighbors,
               double std_ratio, std::optional<double> far_percentile, double near_percentile,
               size_t radius_neighbors, double radius_scale,
               std::optional<double> confidence_percentile, int threads) {
    constexpr double kNone = std::numeric_limits<double>::quiet_NaN();
    CloudView cloud;
    if (points.ndim() != 2) throw std::invalid_argument("points must be [N, 3]");
    cloud.count = static_cast<size_t>(points.shape(0));
    if (py::isinstance<py::array_t<float>>(points)) {
        cloud.points32 = data<float>(points, "points", cloud.count, 3);
    } else {
        cloud.points64 = data<double>(points, "points", cloud.count, 3);
    }
    if (py::isinstance<py::array_t<uint8_t>>(colors)) {
        cloud.colors8 = data<uint8_t>(colors, "colors", cloud.count, 3);
    } else {
        cloud.colors64 = data<double>(colors, "colors", cloud.count, 3);
    }
    cloud.normals = data<float>(normals, "normals", cloud.count, 3);
    cloud.confidence = data<float>(confidence, "confidence", cloud.count, 0);
    cloud.valid = data<uint8_t>(valid, "valid", cloud.count, 0);
    if (confidence_percentile && !cloud.confidence) {
        throw std::invalid_argument("confidence_percentile needs a confidence");
    }
    FusionOptions options{};
    options.voxel_size = voxel_size.value_or(kNone);
    options.far_percentile = far_percentile.value_or(kNone);
    options.confidence_percentile = confidence_percentile.value_or(kNone);
    options.near_percentile = near_percentile;
    options.filter_outliers = filter_outliers;
    options.nb_neighbors = nb_neighbors;
    options.radius_neighbors = radius_neighbors;
    options.std_ratio = std_ratio;
    options.radius_scale = radius_scale;
    options.threads = threads;
    FusedCloud out;
    {
        const py::gil_scoped_release release;
        out = fuse_points(cloud, options);
    }
    py::dict fates;
    const char* const names[kFates] = {"kept", "masked",   "not_finite",   "unsure",
                                       "far",  "outliers", "near_outliers"};
    for (int i = 0; i < kFates; ++i) fates[names[i]] = out.fates[i];
    const size_t count = out.count;
    py::object directions = py::none();
    if (out.normals) directions = give(std::move(out.normals), count);
    return py::make_tuple(give(std::move(out.points), count), give(std::move(out.colors), count),
                          directions, fates);
}

}  // namespace

void bind_fusion(py::module_& m) {
    m.def("fuse_points", &fuse, py::arg("points"), py::arg("colors"), py::arg("normals"),
          py::arg("confidence"), py::arg("valid"), py::kw_only(), py::arg("voxel_size"),
          py::arg("filter_outliers"), py::arg("nb_neighbors"), py::arg("std_ratio"),
          py::arg("far_percentile"), py::arg("near_percentile"), py::arg("radius_neighbors"),
          py::arg("radius_scale"), py::arg("confidence_percentile"), py::arg("threads") = 0,
          "points [N, 3] float32 or float64, colors [N, 3] uint8 or float64 (0 to 255), normals "
          "[N, 3] float32, confidence [N] float32, valid [N] uint8 (the last three or None), all "
          "contiguous -> points float64, colors uint8, normals float32 or None, points a fate.\n"
          "ValueError: wrong types or shapes, more than 2^62 cells. Holds no lock while it works.");
}

}  // namespace gen3r
