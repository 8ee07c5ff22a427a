// Ranges of files into memory, several at once.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace gen3r {

struct Range {
    uint64_t offset;  // in the file
    void* target;
    uint64_t size;
};

// Exactly `size` bytes from `offset`. SystemError; ShortFile when the file ends before them.
void read_range(int fd, const std::string& file, uint64_t offset, void* target, uint64_t size);

// Every range, in pieces of at most 8 MiB that `threads` threads take in turn. Errors as above; the
// targets' contents are then undefined.
void read_ranges(int fd, const std::string& file, const std::vector<Range>& ranges, int threads);

}  // namespace gen3r
