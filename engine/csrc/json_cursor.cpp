#include "json_cursor.h"

#include <stdexcept>

namespace gen3r {
namespace {

void append_code_point(uint32_t code, std::string& out) {
    const auto add = [&](uint32_t byte) { out += static_cast<char>(byte); };
    if (code < 0x80) {
        add(code);
    } else if (code < 0x800) {
        add(0xC0 | code >> 6);
        add(0x80 | (code & 63));
    } else if (code < 0x10000) {
        add(0xE0 | code >> 12);
        add(0x80 | (code >> 6 & 63));
        add(0x80 | (code & 63));
    } else {
        add(0xF0 | code >> 18);
        add(0x80 | (code >> 12 & 63));
        add(0x80 | (code >> 6 & 63));
        add(0x80 | (code & 63));
    }
}

}  // namespace

std::string quoted(const std::string& text) {
    constexpr size_t longest = 100;
    size_t size = text.size();
    if (size > longest)  // not inside a character
        for (size = longest; size > 0 && (text[size] & 0xC0) == 0x80;) --size;
    return "'" + text.substr(0, size) + (size < text.size() ? "...'" : "'");
}

void JsonCursor::fail(const std::string& what) const {
    throw std::invalid_argument(file_ + ": " + (key_.empty() ? "" : quoted(key_) + ": ") + what +
                                " (at byte " + std::to_string(at_) + " of the header)");
}

void JsonCursor::skip_space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\t' || text_[at_] == '\n' ||
                                  text_[at_] == '\r'))
        ++at_;
}

bool JsonCursor::take(char wanted) {
    skip_space();
    if (at_ >= text_.size() || text_[at_] != wanted) return false;
    ++at_;
    return true;
}

void JsonCursor::expect(char wanted) {
    if (!take(wanted)) fail(std::string("'") + wanted + "' expected");
}

void JsonCursor::expect_end() {
    skip_space();
    if (at_ != text_.size()) fail("something stands behind the header's end");
}

char JsonCursor::next() {
    if (at_ >= text_.size()) fail("the header ends inside a text");
    return text_[at_++];
}

uint64_t JsonCursor::number() {
    skip_space();
    const size_t start = at_;
    uint64_t value = 0;
    for (; at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9'; ++at_) {
        const auto digit = static_cast<uint64_t>(text_[at_] - '0');
        if (__builtin_mul_overflow(value, uint64_t{10}, &value) ||
            __builtin_add_overflow(value, digit, &value))
            fail("a number over 2^64 - 1");
    }
    if (at_ == start) fail("a whole number from 0 expected");
    if (text_[start] == '0' && at_ - start > 1) fail("a number with leading zeros");
    return value;  // a sign, point or exponent is not what `numbers` expects next
}

uint32_t JsonCursor::hex4() {
    uint32_t value = 0;
    for (int i = 0; i < 4; ++i) {
        const char c = next();
        const int digit = c >= '0' && c <= '9'   ? c - '0'
                          : c >= 'a' && c <= 'f' ? c - 'a' + 10
                          : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                                 : -1;
        if (digit < 0) fail("\\u without four hexadecimal digits");
        value = value << 4 | static_cast<uint32_t>(digit);
    }
    return value;
}

void JsonCursor::escape(std::string& out) {
    const char kind = next();
    switch (kind) {
        case '"': case '\\': case '/': out += kind; return;
        case 'b': out += '\b'; return;
        case 'f': out += '\f'; return;
        case 'n': out += '\n'; return;
        case 'r': out += '\r'; return;
        case 't': out += '\t'; return;
        case 'u': break;
        default: fail("an unknown escape");
    }
    uint32_t code = hex4();
    if (code >= 0xD800 && code < 0xDC00) {
        if (next() != '\\' || next() != 'u') fail("half a surrogate pair");
        const uint32_t low = hex4();
        if (low < 0xDC00 || low > 0xDFFF) fail("half a surrogate pair");
        code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    } else if (code >= 0xDC00 && code < 0xE000) {
        fail("half a surrogate pair");
    }
    append_code_point(code, out);
}

void JsonCursor::utf8(unsigned char lead, std::string& out) {
    const int more = lead >= 0xC2 && lead <= 0xDF   ? 1
                     : lead >= 0xE0 && lead <= 0xEF ? 2
                     : lead >= 0xF0 && lead <= 0xF4 ? 3
                                                    : 0;
    if (more == 0) fail("no valid UTF-8");
    out += static_cast<char>(lead);
    for (int i = 0; i < more; ++i) {
        const auto byte = static_cast<unsigned char>(next());
        // The first byte behind the lead also rules out surrogates, overlong and too large codes.
        const unsigned char least = i > 0 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
        const unsigned char most = i > 0 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
        if (byte < least || byte > most) fail("no valid UTF-8");
        out += static_cast<char>(byte);
    }
}

std::string JsonCursor::text() {
    expect('"');
    std::string out;
    for (;;) {
        const char c = next();
        const auto byte = static_cast<unsigned char>(c);
        if (c == '"') return out;
        if (c == '\\')
            escape(out);
        else if (byte < 0x20)
            fail("a control character in a text");
        else if (byte < 0x80)
            out += c;
        else
            utf8(byte, out);
    }
}

}  // namespace gen3r
