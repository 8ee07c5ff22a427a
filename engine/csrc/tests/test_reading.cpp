// Headers of safetensors files, good and bad, and ranges read by several threads.
#include "../reading.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>
#include <vector>

#include "../errors.h"
#include "../safetensors.h"
#include "check.h"

using namespace gen3r;

namespace {

std::vector<Span> parsed(const std::string& header, uint64_t data) {
    return parse_header(header, 8 + header.size() + data, "x.safetensors");
}

void refused(const std::string& header, const char* part, uint64_t data = 8) {
    CHECK_THROWS(parsed(header, data), std::invalid_argument, part);
}

std::string tensor(const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return R"({"a":{"dtype":")" + dtype + R"(","shape":)" + shape + R"(,"data_offsets":)" + offsets +
           "}}";
}

CASE(good_headers) {
    const auto spans = parsed(
        R"({"b":{"shape":[2],"dtype":"F32","data_offsets":[4,12]}, "__metadata__":{"k":"v"},)"
        R"("\u00e9\ud83d\ude00":{"dtype":"BF16","shape":[1,2],"data_offsets":[0,4]}}   )",
        12);
    CHECK(spans.size() == 2 && spans[0].name == "\xc3\xa9\xf0\x9f\x98\x80");
    CHECK(spans[0].shape == (std::vector<uint64_t>{1, 2}) && spans[1].dtype == "F32");
    CHECK(spans[1].end - spans[0].begin == 12);
    CHECK(parsed("{}", 0).empty());
    CHECK(parsed(tensor("I64", "[]", "[0,8]"), 8).size() == 1);
    CHECK(parsed(tensor("F4", "[2,8]", "[0,8]"), 8).size() == 1);
    CHECK(parsed(tensor("U8", "[0,18446744073709551615]", "[0,0]"), 0).size() == 1);
    CHECK(parsed(tensor("U8", "[8]", "[0,8]"), 3).size() == 1);  // short data: the reader's to find
}

CASE(bad_headers_name_the_key) {
    refused("", "begin with '{'");
    refused(" {}", "begin with '{'");
    refused("{", "expected");
    refused("{}x", "behind the header's end");
    refused(R"({"a":1})", "'a': '{' expected");
    refused(tensor("F33", "[2]", "[0,8]"), "'a': dtype 'F33' is unknown");
    refused(tensor("F32", "[3]", "[0,8]"), "do not span the 12 bytes");
    refused(tensor("F32", "[2]", "[8,0]"), "do not span");
    refused(tensor("F32", "[2]", "[0,8,9]"), "must be two numbers");
    refused(tensor("F32", "[2]", "[1,9]"), "begin at 1, those before it end at 0", 9);
    refused(tensor("F32", "[-2]", "[0,8]"), "whole number");
    refused(tensor("F32", "[2.0]", "[0,8]"), "']' expected");
    refused(tensor("F32", "[02]", "[0,8]"), "leading zeros");
    refused(tensor("F32", "[18446744073709551616]", "[0,8]"), "over 2^64 - 1");
    refused(tensor("F32", "[4294967296,4294967296]", "[0,8]"), "over 2^64 bits");
    refused(tensor("F4", "[3]", "[0,1]"), "whole bytes");
    refused(tensor("U8", "[8]", "[0,8]"), "2 bytes behind", 10);
    refused(R"({"a":{"dtype":"U8","shape":[8]}})", "needs dtype");
    refused(R"({"a":{"dtype":"U8","dtype":"U8","shape":[8],"data_offsets":[0,8]}})", "twice");
    refused(R"({"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8],"x":1}})", "'x' is unknown");
    const std::string one = R"("a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]})";
    refused("{" + one + "," + one + "}", "'a': the key stands there twice");
    refused("{" + one + R"(,"b":{"dtype":"U8","shape":[6],"data_offsets":[2,8]}})", "'b': its data");
    refused(R"({"__metadata__":{"k":1}})", "'__metadata__'");
    refused(R"({"__metadata__":{"k":"1","k":"2"}})", "twice");
    refused(std::string(1'000'000, '{'), "expected");
    refused(tensor("U8", std::string(1'000'000, '['), "[0,8]"), "whole number");
}

CASE(texts_are_utf8) {
    for (const char* bad : {R"({"\ud800":1})", R"({"\udc00":1})", R"({"\ud800\u0041":1})"})
        refused(bad, "surrogate");
    for (const char* bad : {"{\"\xc0\x80\":1}", "{\"\xed\xa0\x80\":1}", "{\"\xf5\x80\x80\x80\":1}",
                            "{\"\xe0\x80\x80\":1}", "{\"\x80\":1}", "{\"\xf0\x8f\xbf\xbf\":1}"})
        refused(bad, "UTF-8");
    refused("{\"\n\":1}", "control character");
    refused(R"({"\x":1})", "unknown escape");
    refused(R"({"\u00g0":1})", "hexadecimal");
    refused("{\"\xe2\x82", "ends inside");
}

// A file in memory with the given content.
int file_with(const std::string& content) {
    const int fd = memfd_create("test", MFD_CLOEXEC);
    CHECK(write(fd, content.data(), content.size()) == static_cast<ssize_t>(content.size()));
    return fd;
}

std::string prefixed(uint64_t length, const std::string& rest) {
    std::string content;
    for (int i = 0; i < 8; ++i) content += static_cast<char>(length >> (8 * i) & 255);
    return content + rest;
}

CASE(files_with_huge_or_short_lengths) {
    const std::string header = tensor("U8", "[3]", "[0,3]");
    const auto spans = [](const std::string& content) {
        const int fd = file_with(content);
        const auto found = [&] {
            struct Closed {
                int fd;
                ~Closed() { close(fd); }
            } closed{fd};
            return read_spans(fd, "x");
        }();
        return found;
    };
    CHECK(spans(prefixed(header.size(), header + "abc")).size() == 1);
    CHECK_THROWS(spans(""), ShortFile, "ends after 0");
    CHECK_THROWS(spans("1234567"), ShortFile, "ends after 7");
    CHECK_THROWS(spans(prefixed(header.size() + 1, header)), ShortFile, "inside its header");
    CHECK_THROWS(spans(prefixed(UINT64_MAX, header)), std::invalid_argument, "at most");
    CHECK_THROWS(spans(prefixed(kLongestHeader + 1, header)), std::invalid_argument, "at most");
    CHECK_THROWS(spans(prefixed(0, header)), std::invalid_argument, "begin with");
    CHECK_THROWS(read_spans(-1, "gone"), SystemError, "gone");
}

CASE(ranges_are_filled_by_any_number_of_threads) {
    std::string content(20'000'003, '\0');
    for (size_t i = 0; i < content.size(); ++i) content[i] = static_cast<char>(i * 31 % 251);
    const int fd = file_with(content);
    for (int threads : {1, 4}) {
        std::string found(content.size(), 'x');
        read_ranges(fd, "x",
                    {{0, found.data(), 5}, {5, found.data() + 5, content.size() - 6}, {9, nullptr, 0},
                     {content.size() - 1, &found.back(), 1}},
                    threads);
        CHECK(found == content);
    }
    char byte = 0;
    CHECK_THROWS(read_ranges(fd, "x", {{content.size(), &byte, 1}}, 2), ShortFile, "20000003");
    CHECK_THROWS(read_ranges(fd, "x", {{UINT64_MAX, &byte, 1}}, 1), ShortFile, "ends after");
    close(fd);
    CHECK_THROWS(read_ranges(-1, "gone", {{0, &byte, 1}}, 1), SystemError, "gone");
}

}  // namespace

int main() { return check::run_all(); }
