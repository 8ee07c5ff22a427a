// Python bindings, one function an area. What they bind is plain C++17 in the area's own .h/.cpp.
#pragma once

#include <pybind11/pybind11.h>

namespace gen3r {

void bind_packing(pybind11::module_& m);
void bind_serialize(pybind11::module_& m);
void bind_workers(pybind11::module_& m);
void bind_reading(pybind11::module_& m);
void bind_fusion(pybind11::module_& m);

}  // namespace gen3r
