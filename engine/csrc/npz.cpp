#include "npz.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "crc32.h"
#include "parallel.h"

#ifdef GEN3R_ZLIB
#include <zlib.h>
#endif

namespace gen3r {
namespace {

constexpr uint16_t kStored = 0, kDeflated = 8;
constexpr uint16_t kVersion = 45;  // the first with 64-bit sizes, which are always written
constexpr uint16_t kUtf8 = 1 << 11, kSizesFollow = 1 << 3;
constexpr uint32_t kIn64 = 0xFFFFFFFFu;  // "see the 64-bit field"
constexpr uint32_t kDate = (1u << 5 | 1u) << 16;  // 1980-01-01 00:00, as DOS writes it

// Little-endian fields one after the other.
class Record {
public:
    Record& u16(uint64_t value) { return add(value, 2); }
    Record& u32(uint64_t value) { return add(value, 4); }
    Record& u64(uint64_t value) { return add(value, 8); }
    Record& text(const std::string& value) {
        bytes_ += value;
        return *this;
    }
    const std::string& bytes() const { return bytes_; }

private:
    Record& add(uint64_t value, int count) {
        for (int i = 0; i < count; ++i) bytes_ += static_cast<char>(value >> (8 * i) & 255);
        return *this;
    }
    std::string bytes_;
};

struct Placed {  // an entry as the directory lists it
    const Entry* entry;
    uint32_t sum;
    uint64_t packed, offset;
};

void put(Sink& sink, const Record& record) {
    sink.write(record.bytes().data(), record.bytes().size());
}

#ifdef GEN3R_ZLIB
constexpr size_t kBlock = size_t{1} << 20;

// One block of a raw deflate stream, ended at a byte so that the next can follow.
std::vector<uint8_t> deflated(const uint8_t* data, size_t size, int level) {
    z_stream stream{};
    if (deflateInit2(&stream, level, Z_DEFLATED, -15, 8, Z_DEFAULT_STRATEGY) != Z_OK)
        throw std::bad_alloc();
    // Beyond deflateBound: the empty block that Z_SYNC_FLUSH adds.
    std::vector<uint8_t> out(deflateBound(&stream, static_cast<uLong>(size)) + 16);
    stream.next_in = const_cast<Bytef*>(data);
    stream.avail_in = static_cast<uInt>(size);
    stream.next_out = out.data();
    stream.avail_out = static_cast<uInt>(out.size());
    const int status = deflate(&stream, Z_SYNC_FLUSH);
    const bool whole = status == Z_OK && stream.avail_in == 0 && stream.avail_out > 0;
    out.resize(out.size() - stream.avail_out);
    deflateEnd(&stream);
    if (!whole) throw std::runtime_error("zlib did not take a block");
    return out;
}

// Blocks are compressed apart and written in order, as many at a time as there are threads.
void write_deflated(Sink& sink, const void* data, uint64_t size, int level, int threads) {
    const auto* bytes = static_cast<const uint8_t*>(data);
    const uint64_t blocks = (size + kBlock - 1) / kBlock;
    const auto team = static_cast<uint64_t>(thread_count(threads));
    for (uint64_t first = 0; first < blocks; first += team) {
        std::vector<std::vector<uint8_t>> out(std::min(team, blocks - first));
        parallel_for(static_cast<int64_t>(out.size()), 1, threads, [&](int64_t begin, int64_t end) {
            for (auto i = static_cast<uint64_t>(begin); i < static_cast<uint64_t>(end); ++i) {
                const uint64_t at = (first + i) * kBlock;
                out[i] = deflated(bytes + at, std::min<uint64_t>(kBlock, size - at), level);
            }
        });
        for (const auto& block : out) sink.write(block.data(), block.size());
    }
}
#endif

// Sizes are known beforehand when stored; a deflated entry has them in a descriptor behind it.
Placed write_entry(Sink& sink, const Entry& entry, int level, int threads) {
    const uint64_t size = entry.header.size() + entry.size;
    const uint32_t data_sum = crc32_parallel(entry.data, entry.size, threads);
    const uint32_t sum = crc32_combine(crc32(entry.header.data(), entry.header.size()), data_sum,
                                       entry.size);
    Placed placed{&entry, sum, size, sink.written()};
    const bool packed = level > 0;
    Record local;
    local.u32(0x04034b50).u16(kVersion).u16(kUtf8 | (packed ? kSizesFollow : 0));
    local.u16(packed ? kDeflated : kStored).u32(kDate).u32(packed ? 0 : sum);
    local.u32(kIn64).u32(kIn64).u16(entry.name.size()).u16(20).text(entry.name);
    local.u16(1).u16(16).u64(packed ? 0 : size).u64(packed ? 0 : size);
    put(sink, local);
    if (!packed) {
        sink.write(entry.header.data(), entry.header.size());
        sink.write(entry.data, entry.size);
        return placed;
    }
#ifdef GEN3R_ZLIB
    const uint64_t start = sink.written();
    write_deflated(sink, entry.header.data(), entry.header.size(), level, 1);
    write_deflated(sink, entry.data, entry.size, level, threads);
    sink.write("\x03\x00", 2);  // an empty block that says it is the last
    placed.packed = sink.written() - start;
    put(sink, Record().u32(0x08074b50).u32(sum).u64(placed.packed).u64(size));
#endif
    return placed;
}

void write_directory(Sink& sink, const std::vector<Placed>& all, int level) {
    const uint64_t start = sink.written();
    for (const Placed& placed : all) {
        const uint64_t size = placed.entry->header.size() + placed.entry->size;
        Record row;
        row.u32(0x02014b50).u16(kVersion).u16(kVersion).u16(kUtf8 | (level ? kSizesFollow : 0));
        row.u16(level ? kDeflated : kStored).u32(kDate).u32(placed.sum).u32(kIn64).u32(kIn64);
        row.u16(placed.entry->name.size()).u16(28).u16(0).u16(0).u16(0).u32(0).u32(kIn64);
        row.text(placed.entry->name);
        row.u16(1).u16(24).u64(size).u64(placed.packed).u64(placed.offset);
        put(sink, row);
    }
    const uint64_t end = sink.written();
    Record tail;
    if (!all.empty()) {  // numpy knows a file without arrays by the last record coming first
        tail.u32(0x06064b50).u64(44).u16(kVersion).u16(kVersion).u32(0).u32(0);
        tail.u64(all.size()).u64(all.size()).u64(end - start).u64(start);
        tail.u32(0x07064b50).u32(0).u64(end).u32(1);
    }
    const uint64_t count = std::min<uint64_t>(all.size(), 0xFFFF);
    tail.u32(0x06054b50).u16(0).u16(0).u16(count).u16(count);
    tail.u32(std::min<uint64_t>(end - start, kIn64)).u32(std::min<uint64_t>(start, kIn64)).u16(0);
    put(sink, tail);
}

}  // namespace

bool can_deflate() {
#ifdef GEN3R_ZLIB
    return true;
#else
    return false;
#endif
}

void write_npz(Sink& sink, const std::vector<Entry>& entries, int level, int threads) {
    if (level < 0 || level > 9)
        throw std::invalid_argument("level " + std::to_string(level) + " must be from 0 to 9");
    if (level > 0 && !can_deflate())
        throw std::invalid_argument("built without zlib: level must be 0");
    for (const Entry& entry : entries)
        if (entry.name.size() > 0xFFFF)
            throw std::invalid_argument("a name of " + std::to_string(entry.name.size()) +
                                        " bytes is too long for a zip file (65535)");
    std::vector<Placed> all;
    for (const Entry& entry : entries) all.push_back(write_entry(sink, entry, level, threads));
    write_directory(sink, all, level);
}

}  // namespace gen3r
