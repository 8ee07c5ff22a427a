// Errors of the operating system; std::invalid_argument says that an argument or a file is wrong.
#pragma once

#include <stdexcept>
#include <string>
#include <system_error>

namespace gen3r {

// Becomes Python's OSError(code, what it means, path).
struct SystemError : std::runtime_error {
    SystemError(int errno_value, std::string file)
        : std::runtime_error(std::generic_category().message(errno_value) + ": '" + file + "'"),
          code(errno_value),
          path(std::move(file)) {}
    int code;
    std::string path;
};

// A file that ends before its own header says so. Becomes EOFError.
struct ShortFile : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace gen3r
