// The check sum of zip files.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gen3r {

// CRC-32 (polynomial 0xEDB88320) of data that follows data whose sum is `before` (0 for none).
uint32_t crc32(const void* data, size_t size, uint32_t before = 0);

// The sum of two pieces one after the other from their own sums; `size` is the second one's.
uint32_t crc32_combine(uint32_t first, uint32_t second, uint64_t size);

// The sum of one piece on several threads.
uint32_t crc32_parallel(const void* data, size_t size, int threads);

}  // namespace gen3r
