// The few parts of JSON that a safetensors header is made of, read strictly from left to right.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace gen3r {

// A text of a header for a message: its first 100 bytes in quotation marks.
std::string quoted(const std::string& text);

class JsonCursor {
public:
    JsonCursor(std::string_view text, const std::string& file) : text_(text), file_(file) {}

    // Space, then this character; std::invalid_argument if another stands there.
    void expect(char wanted);
    // Space, then whether this character stands there; it is taken if so.
    bool take(char wanted);
    // Space up to the end, and nothing else.
    void expect_end();
    // A whole number from 0 to 2^64 - 1, without sign, fraction, exponent or leading zeros.
    uint64_t number();
    // A string as UTF-8; escapes are resolved. Half a surrogate pair and broken UTF-8 are errors.
    std::string text();

    // What `fail` names beside the file; "" for nothing.
    void name_key(std::string key) { key_ = std::move(key); }
    // Throws std::invalid_argument "file: key: what (at byte n of the header)".
    [[noreturn]] void fail(const std::string& what) const;

private:
    void skip_space();
    char next();
    uint32_t hex4();
    void escape(std::string& out);
    void utf8(unsigned char lead, std::string& out);

    std::string_view text_;
    const std::string& file_;
    std::string key_;
    size_t at_ = 0;
};

}  // namespace gen3r
