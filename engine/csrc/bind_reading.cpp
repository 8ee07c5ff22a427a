// Python bindings of safetensors.h and reading.h.
#include <pybind11/stl.h>

#include "bindings.h"
#include "reading.h"
#include "safetensors.h"

namespace py = pybind11;

namespace gen3r {
namespace {

using Row = std::tuple<std::string, std::string, py::tuple, uint64_t, uint64_t>;

py::tuple as_tuple(const std::vector<uint64_t>& numbers) {
    py::tuple out(numbers.size());
    for (size_t i = 0; i < numbers.size(); ++i) out[i] = numbers[i];
    return out;
}

std::vector<Row> rows(std::vector<Span>&& spans) {
    std::vector<Row> out;
    for (Span& span : spans)
        out.emplace_back(std::move(span.name), std::move(span.dtype), as_tuple(span.shape),
                         span.begin, span.end);
    return out;
}

std::vector<Row> spans_of_file(int fd, const std::string& name) {
    std::vector<Span> spans;
    {
        const py::gil_scoped_release released;
        spans = read_spans(fd, name);
    }
    return rows(std::move(spans));
}

std::vector<Row> spans_of_header(const py::bytes& header, uint64_t length,
                                 const std::string& name) {
    const std::string_view text = header;
    std::vector<Span> spans;
    {
        const py::gil_scoped_release released;
        spans = parse_header(text, length, name);
    }
    return rows(std::move(spans));
}

void read(int fd, const std::vector<std::pair<uint64_t, py::buffer>>& targets, int threads,
          const std::string& name) {
    std::vector<py::buffer_info> views;  // hold the buffers until all is read
    std::vector<Range> ranges;
    for (const auto& [offset, buffer] : targets) {
        views.push_back(buffer.request(true));
        const py::buffer_info& view = views.back();
        py::ssize_t packed = view.itemsize;
        for (auto axis = view.ndim; axis-- > 0; packed *= view.shape[static_cast<size_t>(axis)])
            if (view.shape[static_cast<size_t>(axis)] != 1 &&
                view.strides[static_cast<size_t>(axis)] != packed)
                throw std::invalid_argument("targets must be C-contiguous");
        ranges.push_back({offset, view.ptr, static_cast<uint64_t>(view.size * view.itemsize)});
    }
    const py::gil_scoped_release released;
    read_ranges(fd, name, ranges, threads);
}

}  // namespace

void bind_reading(py::module_& m) {
    m.def("read_spans", &spans_of_file, py::arg("fd"), py::arg("name"),
          "(name, dtype, shape, begin, end) of every tensor of an open safetensors file.");
    m.def("parse_header", &spans_of_header, py::arg("header"), py::arg("length"), py::arg("name"),
          "As read_spans, of a header and the length of its file.");
    m.def("read_ranges", &read, py::arg("fd"), py::arg("targets"), py::arg("threads") = 0,
          py::arg("name") = "",
          "Fill writable buffers from (offset, buffer) pairs. OSError; EOFError: the file is short.");
}

}  // namespace gen3r
