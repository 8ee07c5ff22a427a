// numpy's .npz: a zip file of .npy arrays, stored or deflated on several threads.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sink.h"

namespace gen3r {

struct Entry {
    std::string name;    // in the zip file, "depth.npy"; UTF-8
    std::string header;  // the .npy header
    const void* data;
    uint64_t size;  // bytes of data
};

// Whether this build can deflate (it was compiled with zlib).
bool can_deflate();

// Writes all entries and the directory; dates are 1980-01-01, so equal arrays give equal files.
// level: 0 stores, 1 to 9 deflate. Beside the arrays it holds two blocks of 1 MiB a thread.
// std::invalid_argument for a level that this build does not have or a name over 65,535 bytes.
void write_npz(Sink& sink, const std::vector<Entry>& entries, int level, int threads);

}  // namespace gen3r
