#include "safetensors.h"

#include <sys/stat.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <optional>
#include <set>
#include <stdexcept>
#include <utility>

#include "errors.h"
#include "json_cursor.h"
#include "reading.h"

namespace gen3r {
namespace {

constexpr std::pair<const char*, int> kBits[] = {
    {"BOOL", 8},    {"U8", 8},      {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8},
    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"I16", 16}, {"U16", 16},    {"F16", 16},
    {"BF16", 16},   {"I32", 32},    {"U32", 32}, {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},    {"U64", 64},
};

uint64_t bits_of(const std::string& dtype, const JsonCursor& at) {
    for (const auto& [name, bits] : kBits)
        if (dtype == name) return static_cast<uint64_t>(bits);
    at.fail("dtype " + quoted(dtype) + " is unknown");
}

// Bytes of a tensor, shape times dtype.
uint64_t size_of(const Span& span, const JsonCursor& at) {
    uint64_t bits = 1;
    bool fits = true;
    for (const uint64_t side : span.shape) fits &= !__builtin_mul_overflow(bits, side, &bits);
    fits &= !__builtin_mul_overflow(bits, bits_of(span.dtype, at), &bits);
    if (!fits) at.fail("its shape times its dtype is over 2^64 bits");
    if (bits % 8) at.fail("its entries do not fill whole bytes");
    return bits / 8;
}

std::vector<uint64_t> numbers(JsonCursor& at) {
    std::vector<uint64_t> found;
    at.expect('[');
    if (at.take(']')) return found;
    do found.push_back(at.number());
    while (at.take(','));
    at.expect(']');
    return found;
}

void skip_metadata(JsonCursor& at) {
    std::set<std::string> seen;
    at.expect('{');
    if (at.take('}')) return;
    do {
        if (!seen.insert(at.text()).second) at.fail("a key stands there twice");
        at.expect(':');
        at.text();
    } while (at.take(','));
    at.expect('}');
}

Span tensor(JsonCursor& at, std::string name) {
    std::optional<std::string> dtype;
    std::optional<std::vector<uint64_t>> shape, offsets;
    at.expect('{');
    if (!at.take('}')) {
        do {
            const std::string key = at.text();
            at.expect(':');
            bool again = false;
            if (key == "dtype") {
                again = dtype.has_value();
                dtype = at.text();
            } else if (key == "shape") {
                again = shape.has_value();
                shape = numbers(at);
            } else if (key == "data_offsets") {
                again = offsets.has_value();
                offsets = numbers(at);
            } else {
                at.fail("its key " + quoted(key) + " is unknown");
            }
            if (again) at.fail("its key " + quoted(key) + " stands there twice");
        } while (at.take(','));
        at.expect('}');
    }
    if (!dtype || !shape || !offsets) at.fail("it needs dtype, shape and data_offsets");
    if (offsets->size() != 2) at.fail("data_offsets must be two numbers");
    Span span{std::move(name), *dtype, *shape, (*offsets)[0], (*offsets)[1]};
    const uint64_t size = size_of(span, at);
    if (span.begin > span.end || span.end - span.begin != size)
        at.fail("data_offsets do not span the " + std::to_string(size) +
                " bytes of its shape and dtype");
    return span;
}

}  // namespace

std::vector<Span> parse_header(std::string_view header, uint64_t length, const std::string& file) {
    JsonCursor at(header, file);
    std::vector<Span> spans;
    std::set<std::string> seen;
    if (header.empty() || header[0] != '{') at.fail("the header does not begin with '{'");
    at.expect('{');
    if (!at.take('}')) {
        do {
            at.name_key("");
            std::string name = at.text();
            at.name_key(name);
            if (!seen.insert(name).second) at.fail("the key stands there twice");
            at.expect(':');
            if (name == "__metadata__")
                skip_metadata(at);
            else
                spans.push_back(tensor(at, std::move(name)));
        } while (at.take(','));
        at.name_key("");
        at.expect('}');
    }
    at.expect_end();
    std::stable_sort(spans.begin(), spans.end(), [](const Span& a, const Span& b) {
        return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
    });
    const uint64_t start = 8 + header.size();
    uint64_t end = 0;
    for (Span& span : spans) {
        at.name_key(span.name);
        if (span.begin != end)
            at.fail("its data begin at " + std::to_string(span.begin) +
                    ", those before it end at " + std::to_string(end));
        end = span.end;
        if (end > UINT64_MAX - start) at.fail("data_offsets are over 2^64");
        span.begin += start;
        span.end += start;
    }
    at.name_key("");
    if (start + end < length)
        at.fail(std::to_string(length - start - end) + " bytes behind the last tensor");
    return spans;
}

std::vector<Span> read_spans(int fd, const std::string& file) {
    struct stat facts {};
    if (fstat(fd, &facts) != 0) throw SystemError(errno, file);
    const auto length = static_cast<uint64_t>(facts.st_size);
    unsigned char prefix[8];
    read_range(fd, file, 0, prefix, sizeof prefix);
    uint64_t size = 0;
    for (int i = 7; i >= 0; --i) size = size << 8 | prefix[i];
    if (size > kLongestHeader)
        throw std::invalid_argument(file + ": a header of " + std::to_string(size) +
                                    " bytes; at most " + std::to_string(kLongestHeader));
    if (size > length - sizeof prefix)
        throw ShortFile(file + " ends after " + std::to_string(length) +
                        " bytes, inside its header");
    std::string header(size, '\0');
    read_range(fd, file, sizeof prefix, header.data(), header.size());
    return parse_header(header, length, file);
}

}  // namespace gen3r
