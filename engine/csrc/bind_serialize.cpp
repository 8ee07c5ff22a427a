// Python bindings of serialize.h and npz.h.
#include <pybind11/stl.h>

#include "arrays.h"
#include "bindings.h"
#include "npz.h"
#include "serialize.h"

namespace py = pybind11;

namespace gen3r {
namespace {

// Points alone: [N, 3] float or double.
void take_points(const py::array& points, Cloud& cloud) {
    cloud.count = rows_of(points, "points");
    cloud.wide = points.dtype().equal(py::dtype::of<double>());
    cloud.points = cloud.wide ? static_cast<const void*>(data_of<double>(points, "points"))
                              : data_of<float>(points, "points");
}

Cloud cloud_of(const py::array& points, const py::array& colors,
               const std::optional<py::array>& normals) {
    Cloud cloud{};
    take_points(points, cloud);
    cloud.colors = data_of<uint8_t>(colors, "colors");
    if (rows_of(colors, "colors") != cloud.count)
        throw std::invalid_argument("points " + described(points) + " and colors " +
                                    described(colors) + " must be as many");
    if (normals) {
        cloud.normals = data_of<float>(*normals, "normals");
        if (rows_of(*normals, "normals") != cloud.count)
            throw std::invalid_argument("points " + described(points) + " and normals " +
                                        described(*normals) + " must be as many");
    }
    return cloud;
}

uint64_t ply_rows(int fd, const py::array& points, const py::array& colors,
                  const std::optional<py::array>& normals, const std::string& name) {
    const Cloud cloud = cloud_of(points, colors, normals);
    Sink sink(fd, name);
    const py::gil_scoped_release released;
    write_ply_rows(sink, cloud);
    return sink.written();
}

uint64_t glb_points(int fd, const py::array& points, const py::array& colors,
                    const std::optional<py::array>& normals, const py::array& table,
                    const std::string& name) {
    const Cloud cloud = cloud_of(points, colors, normals);
    const auto* linear = data_of<float>(table, "table");
    if (table.size() != 256) throw std::invalid_argument("table must be [256]");
    Sink sink(fd, name);
    const py::gil_scoped_release released;
    write_glb_points(sink, cloud, linear);
    return sink.written();
}

py::tuple box(const py::array& points, int threads) {
    Cloud cloud{};
    take_points(points, cloud);
    Bounds found{};
    {
        const py::gil_scoped_release released;
        found = bounds(cloud.points, cloud.wide, cloud.count, threads);
    }
    return py::make_tuple(py::array_t<float>(3, found.least), py::array_t<float>(3, found.most));
}

uint64_t npz(int fd, const std::vector<std::tuple<std::string, py::bytes, py::array>>& arrays,
             int level, int threads, const std::string& name) {
    std::vector<Entry> entries;
    for (const auto& [entry, header, array] : arrays) {
        if (!(array.flags() & py::array::c_style))
            throw std::invalid_argument(entry + " must be a C-contiguous array");
        entries.push_back({entry, header, array.data(), static_cast<uint64_t>(array.nbytes())});
    }
    Sink sink(fd, name);
    const py::gil_scoped_release released;
    write_npz(sink, entries, level, threads);
    return sink.written();
}

}  // namespace

void bind_serialize(py::module_& m) {
    m.attr("DEFLATE") = can_deflate();
    m.def("ply_rows", &ply_rows, py::arg("fd"), py::arg("points"), py::arg("colors"),
          py::arg("normals") = py::none(), py::arg("name") = "",
          "Rows of a binary PLY cloud to a descriptor; the bytes written. OSError as from write.");
    m.def("glb_points", &glb_points, py::arg("fd"), py::arg("points"), py::arg("colors"),
          py::arg("normals"), py::arg("table"), py::arg("name") = "",
          "Positions, normals if given and linear float colours of a GLB cloud; the bytes written.");
    m.def("bounds", &box, py::arg("points"), py::arg("threads") = 0,
          "Least and greatest corner as float32. ValueError: no points, or one is not finite.");
    m.def("npz", &npz, py::arg("fd"), py::arg("arrays"), py::arg("level"), py::arg("threads") = 0,
          py::arg("name") = "", "A .npz file of (name, .npy header, array); the bytes written.");
}

}  // namespace gen3r
