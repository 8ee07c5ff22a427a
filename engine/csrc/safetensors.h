// Which tensors a safetensors file holds and where, from a header that nobody vouches for.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gen3r {

struct Span {
    std::string name, dtype;
    std::vector<uint64_t> shape;
    uint64_t begin, end;  // bytes from the file's start
};

constexpr uint64_t kLongestHeader = 100'000'000;  // as the safetensors library

// The tensors of a header in the order of their bytes. `length` is the file's.
//
// Strict: one JSON object of tensors {"dtype", "shape", "data_offsets"} and "__metadata__" (texts),
// every key once, no other keys, whole numbers below 2^64, dtypes that are known, sizes that are
// shape times dtype, and data without gaps or overlaps. Nesting has one fixed depth, so nothing
// recurses. Data beyond the file's end is the reader's to find, as ShortFile.
//
// std::invalid_argument names the file and the key.
std::vector<Span> parse_header(std::string_view header, uint64_t length, const std::string& file);

// Reads and parses the header of a file. SystemError, ShortFile, std::invalid_argument.
std::vector<Span> read_spans(int fd, const std::string& file);

}  // namespace gen3r
