// numpy arrays as arguments: what the plain C++ takes for granted is checked here.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace gen3r {

inline std::string described(const pybind11::array& array) {
    std::string text = pybind11::str(pybind11::object(array.dtype()));
    text += " [";
    for (pybind11::ssize_t axis = 0; axis < array.ndim(); ++axis)
        text += (axis ? ", " : "") + std::to_string(array.shape(axis));
    return text + "]";
}

// Data of a C-contiguous array of Value; ValueError with its name otherwise.
template <typename Value>
const Value* data_of(const pybind11::array& array, const char* name) {
    const bool same = array.dtype().is(pybind11::dtype::of<Value>()) ||
                      array.dtype().equal(pybind11::dtype::of<Value>());
    if (!same || !(array.flags() & pybind11::array::c_style))
        throw std::invalid_argument(std::string(name) + " must be a C-contiguous array of " +
                                    std::string(pybind11::str(pybind11::dtype::of<Value>())) +
                                    ", got " + described(array));
    return static_cast<const Value*>(array.data());
}

// N of an array [N, 3]; ValueError otherwise.
inline int64_t rows_of(const pybind11::array& array, const char* name) {
    if (array.ndim() != 2 || array.shape(1) != 3)
        throw std::invalid_argument(std::string(name) + " must be [N, 3], got " +
                                    described(array));
    return array.shape(0);
}

}  // namespace gen3r
