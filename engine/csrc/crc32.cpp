#include "crc32.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <vector>

#include "parallel.h"

namespace gen3r {
namespace {

constexpr uint32_t kPolynomial = 0xEDB88320u;
constexpr size_t kPiece = size_t{1} << 20;

constexpr size_t kStep = 16;

using Tables = std::array<std::array<uint32_t, 256>, kStep>;

// tables[k][b]: the sum of byte b followed by k zero bytes; so kStep bytes take one step.
constexpr Tables make_tables() {
    Tables tables{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t sum = byte;
        for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ (sum & 1 ? kPolynomial : 0);
        tables[0][byte] = sum;
    }
    for (size_t k = 1; k < kStep; ++k)
        for (size_t byte = 0; byte < 256; ++byte) {
            const uint32_t sum = tables[k - 1][byte];
            tables[k][byte] = (sum >> 8) ^ tables[0][sum & 255];
        }
    return tables;
}

constexpr Tables kTables = make_tables();

// The product of two polynomials modulo the sum's, in its reflected order of bits.
uint32_t multiply(uint32_t a, uint32_t b) {
    uint32_t product = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1) {
        if (a & bit) product ^= b;
        b = (b >> 1) ^ (b & 1 ? kPolynomial : 0);
    }
    return product;
}

}  // namespace

uint32_t crc32(const void* data, size_t size, uint32_t before) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    uint32_t sum = ~before;
    for (; size >= kStep; size -= kStep, bytes += kStep) {
        uint32_t words[kStep / 4];
        std::memcpy(words, bytes, kStep);
        words[0] ^= sum;
        sum = 0;
        for (size_t w = 0; w < kStep / 4; ++w)
            for (size_t b = 0; b < 4; ++b)
                sum ^= kTables[kStep - 1 - 4 * w - b][words[w] >> (8 * b) & 255];
    }
    for (; size > 0; --size, ++bytes) sum = (sum >> 8) ^ kTables[0][(sum ^ *bytes) & 255];
    return ~sum;
}

uint32_t crc32_combine(uint32_t first, uint32_t second, uint64_t size) {
    // first * x^(8 size): powers of x^8 by squaring.
    uint32_t power = 1u << 23;  // x^8
    for (; size; size >>= 1) {
        if (size & 1) first = multiply(first, power);
        power = multiply(power, power);
    }
    return first ^ second;
}

uint32_t crc32_parallel(const void* data, size_t size, int threads) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    const size_t pieces = (size + kPiece - 1) / kPiece;
    std::vector<uint32_t> sums(pieces);
    parallel_for(static_cast<int64_t>(pieces), 1, threads, [&](int64_t begin, int64_t end) {
        for (auto p = static_cast<size_t>(begin); p < static_cast<size_t>(end); ++p)
            sums[p] = crc32(bytes + p * kPiece, std::min(kPiece, size - p * kPiece));
    });
    uint32_t sum = 0;
    for (size_t p = 0; p < pieces; ++p)
        sum = crc32_combine(sum, sums[p], std::min(kPiece, size - p * kPiece));
    return sum;
}

}  // namespace gen3r
