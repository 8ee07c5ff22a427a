// Malformed safetensors files for the readers: whatever the bytes are, they are parsed or refused with
// one of three errors, and what is parsed keeps its promises.
//
//     make fuzz CASES=1000000 SEED=1        mutated files, this file's own driver
//     make -C engine/csrc fuzz-clang        the same target under libFuzzer
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../errors.h"
#include "../reading.h"
#include "../safetensors.h"

namespace {

using gen3r::Span;

struct Counts {
    uint64_t cases = 0, accepted = 0, refused = 0, too_short = 0, from_file = 0;
} counts;

void promise(bool kept, const char* what) {
    if (kept) return;
    std::fprintf(stderr, "broken promise: %s\n", what);
    std::abort();
}

// Spans follow each other without gaps and end at the file's end, or beyond it.
void check_spans(const std::vector<Span>& spans, uint64_t start, uint64_t length) {
    uint64_t end = start;
    for (const Span& span : spans) {
        promise(span.begin == end && span.end >= span.begin, "spans tile the file");
        end = span.end;
    }
    promise(end >= length, "nothing stands behind the last span");
}

// The file as the readers get it: from a descriptor, header first, then every range.
void read_as_file(const uint8_t* data, size_t size) {
    static const int fd = memfd_create("fuzz", MFD_CLOEXEC);
    promise(ftruncate(fd, 0) == 0 && pwrite(fd, data, size, 0) == static_cast<ssize_t>(size),
            "the scratch file takes the case");
    ++counts.from_file;
    const std::vector<Span> spans = gen3r::read_spans(fd, "fuzz");
    std::vector<uint8_t> target;
    std::vector<gen3r::Range> ranges;
    // Who reads has memory for what the file holds: a header may promise more.
    for (const Span& span : spans)
        if (span.end <= size) ranges.push_back({span.begin, nullptr, span.end - span.begin});
    target.resize(size);
    for (auto& range : ranges) range.target = target.data() + range.offset;
    gen3r::read_ranges(fd, "fuzz", ranges, 1);
    for (const auto& range : ranges)
        promise(std::equal(data + range.offset, data + range.offset + range.size,
                           target.data() + range.offset),
                "ranges hold the file's bytes");
    if (!spans.empty() && spans.back().end > size) {
        char byte = 0;
        gen3r::read_ranges(fd, "fuzz", {{spans.back().end - 1, &byte, 1}}, 1);
        promise(false, "data behind the file's end are not read");
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    ++counts.cases;
    try {
        if (size >= 8) {
            // A length that does not fit is not the end here: the parser sees every header.
            uint64_t length = 0;
            for (int i = 7; i >= 0; --i) length = length << 8 | data[i];
            length = std::min<uint64_t>(length, size - 8);
            const std::string_view header(reinterpret_cast<const char*>(data) + 8, length);
            check_spans(gen3r::parse_header(header, size, "fuzz"), 8 + length, size);
        }
        ++counts.accepted;
    } catch (const std::invalid_argument&) {
        ++counts.refused;
    }
    try {
        read_as_file(data, size);
    } catch (const std::invalid_argument&) {
    } catch (const gen3r::ShortFile&) {
        ++counts.too_short;
    }
    return 0;
}

#ifndef GEN3R_LIBFUZZER
namespace {

using Random = std::mt19937_64;

size_t below(Random& random, size_t limit) { return static_cast<size_t>(random() % limit); }

std::string file_of(const std::string& header, size_t data) {
    std::string file;
    for (int i = 0; i < 8; ++i) file += static_cast<char>(header.size() >> (8 * i) & 255);
    return file + header + std::string(data, 'd');
}

const std::vector<std::string>& seeds() {
    static const std::vector<std::string> all = {
        file_of("{}", 0),
        file_of(R"({"a":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}})", 24),
        file_of(R"({"__metadata__":{"format":"pt","k":"\u00e9\n"},"w.0":{"dtype":"BF16","shape":[4],)"
                R"("data_offsets":[0,8]},"w.1":{"dtype":"U8","shape":[],"data_offsets":[8,9]},)"
                R"("empty":{"dtype":"I64","shape":[0,7],"data_offsets":[9,9]}}      )",
                9),
        file_of("{\"\\ud83d\\ude00\":{\"shape\":[1],\"dtype\":\"F64\",\"data_offsets\":[0,8]},"
                "\"\xe2\x82\xac\":{\"dtype\":\"F4\",\"shape\":[2],\"data_offsets\":[8,9]}}",
                9),
    };
    return all;
}

const std::vector<std::string>& pieces() {
    static const std::vector<std::string> all = {
        "{", "}", "[", "]", ",", ":", "\"", "\\", "0", "-1", "1e9", "0.5", "01", "null", "true",
        "18446744073709551615", "18446744073709551616", "9223372036854775808", "4294967296",
        "99999999999999999999999999", "\"dtype\":\"F32\"", "\"shape\":[1]", "\"data_offsets\":[0,4]",
        "\"__metadata__\":{}", "\\ud800", "\\udc00", "\\u0000", "\xc0\x80", "\xed\xa0\x80", "\xff",
        std::string(300, '['), std::string(300, '{'), std::string(1, '\0'), "\"a\":",
        "\"x\":{\"dtype\":\"U8\",\"shape\":[4294967296,4294967296,4294967296],\"data_offsets\":[0,0]}",
    };
    return all;
}

// One change somewhere: a bit, a byte, a cut, a copy, a piece of JSON, a number, the length.
void mutate(std::string& file, Random& random) {
    const size_t at = file.empty() ? 0 : below(random, file.size());
    switch (below(random, 9)) {
        case 0:
            if (!file.empty()) file[at] = static_cast<char>(file[at] ^ 1 << below(random, 8));
            break;
        case 1:
            if (!file.empty()) file[at] = static_cast<char>(random());
            break;
        case 2: file.erase(at, 1 + below(random, 16)); break;
        case 3: file.insert(at, file.substr(below(random, file.size() + 1), below(random, 64))); break;
        case 4: file.insert(at, pieces()[below(random, pieces().size())]); break;
        case 5: {
            const std::string& piece = pieces()[below(random, pieces().size())];
            file.replace(at, std::min(piece.size(), file.size() - at), piece);
            break;
        }
        case 6: {  // a number grows
            const size_t digit = file.find_first_of("0123456789", std::max<size_t>(at, 8));
            if (digit != std::string::npos) file.insert(digit, std::to_string(random()));
            break;
        }
        case 7:  // the length is a power of two, or one beside it
            for (size_t i = 0, length = (uint64_t{1} << below(random, 64)) - below(random, 3);
                 i < std::min<size_t>(8, file.size()); ++i)
                file[i] = static_cast<char>(length >> (8 * i) & 255);
            break;
        case 8: file.resize(at); break;
    }
    if (file.size() > 4096) file.resize(4096);
}

// The length says again what the header has: so changes behind it are seen by the file's reader.
void mend_length(std::string& file, size_t data) {
    if (file.size() < 8 + data) return;
    const size_t length = file.size() - 8 - data;
    for (size_t i = 0; i < 8; ++i) file[i] = static_cast<char>(length >> (8 * i) & 255);
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t cases = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 1'000'000;
    Random random(argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1);
    for (const std::string& seed : seeds())
        LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(seed.data()), seed.size());
    promise(counts.too_short == 0, "the seeds are whole files");
    const uint64_t whole = counts.cases;
    for (uint64_t i = 0; i < cases; ++i) {
        std::string file = seeds()[below(random, seeds().size())];
        for (size_t changes = 1 + below(random, 4); changes > 0; --changes) mutate(file, random);
        if (below(random, 2)) mend_length(file, below(random, 2) ? 9 : 24);
        LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(file.data()), file.size());
    }
    std::printf("%llu cases: %llu headers parsed, %llu refused; %llu files too short\n",
                static_cast<unsigned long long>(counts.cases - whole),
                static_cast<unsigned long long>(counts.accepted - whole),
                static_cast<unsigned long long>(counts.refused),
                static_cast<unsigned long long>(counts.too_short));
    return 0;
}
#endif
