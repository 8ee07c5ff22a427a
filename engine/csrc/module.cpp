// gen3r_engine._C: the host work that must not hold the interpreter's lock while the GPU computes.
#include "bindings.h"
#include "errors.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Host work of gen3r_engine in C++: every function releases the GIL while it works.";
    m.attr("API") = 1;  // as native.py expects; raised when a function changes its arguments
    py::register_local_exception_translator([](std::exception_ptr thrown) {
        try {
            if (thrown) std::rethrow_exception(thrown);
        } catch (const gen3r::SystemError& error) {
            errno = error.code;
            PyErr_SetFromErrnoWithFilename(PyExc_OSError, error.path.c_str());
        } catch (const gen3r::ShortFile& error) {
            PyErr_SetString(PyExc_EOFError, error.what());
        }
    });
    gen3r::bind_packing(m);
    gen3r::bind_serialize(m);
    gen3r::bind_workers(m);
    gen3r::bind_reading(m);
    gen3r::bind_fusion(m);
}
