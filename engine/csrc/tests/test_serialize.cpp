// Clouds and arrays on a descriptor: bytes, several buffers, a descriptor that takes no more.
#include "../serialize.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "../crc32.h"
#include "../errors.h"
#include "../npz.h"
#include "check.h"

using namespace gen3r;

namespace {

// A file in memory that is gone at the end.
class Scratch {
public:
    Scratch() : fd(memfd_create("test", MFD_CLOEXEC)) {}
    ~Scratch() { close(fd); }
    std::string content() const {
        std::string all(static_cast<size_t>(lseek(fd, 0, SEEK_END)), '\0');
        CHECK(pread(fd, all.data(), all.size(), 0) == static_cast<ssize_t>(all.size()));
        return all;
    }
    const int fd;
};

struct Made {  // more points than one buffer holds
    explicit Made(int64_t count) : points(3 * static_cast<size_t>(count)), normals(points.size()) {
        colors.resize(points.size());
        for (size_t i = 0; i < points.size(); ++i) {
            points[i] = 0.5 * static_cast<double>(i);
            normals[i] = -static_cast<float>(i);
            colors[i] = static_cast<uint8_t>(i % 251);
        }
        cloud = {points.data(), true, colors.data(), normals.data(), count};
    }
    std::vector<double> points;
    std::vector<float> normals;
    std::vector<uint8_t> colors;
    Cloud cloud{};
};

CASE(ply_rows_are_packed) {
    Made made(70'000);
    const Scratch file;
    Sink sink(file.fd, "x.ply");
    write_ply_rows(sink, made.cloud);
    const std::string bytes = file.content();
    CHECK(bytes.size() == 27 * 70'000 && sink.written() == bytes.size());
    for (size_t row : {size_t{0}, size_t{32'767}, size_t{32'768}, size_t{69'999}}) {
        float found[6];
        std::memcpy(found, bytes.data() + 27 * row, sizeof found);
        CHECK(found[0] == static_cast<float>(made.points[3 * row]));
        CHECK(found[5] == made.normals[3 * row + 2]);
        CHECK(static_cast<uint8_t>(bytes[27 * row + 26]) == made.colors[3 * row + 2]);
    }
    made.cloud.count = 0;
    write_ply_rows(sink, made.cloud);
    CHECK(sink.written() == bytes.size());
}

CASE(glb_arrays_follow_each_other) {
    const Made made(40'000);
    std::vector<float> table(256);
    for (size_t i = 0; i < 256; ++i) table[i] = static_cast<float>(i) / 255.0f;
    const Scratch file;
    Sink sink(file.fd, "x.glb");
    write_glb_points(sink, made.cloud, table.data());
    const std::string bytes = file.content();
    CHECK(bytes.size() == 36 * 40'000);
    float rgb[3];
    std::memcpy(rgb, bytes.data() + 24 * 40'000 + 12 * 39'999, sizeof rgb);
    CHECK(rgb[0] == table[made.colors[3 * 39'999]]);
    CHECK(rgb[2] == table[made.colors[3 * 39'999 + 2]]);
}

CASE(bounds_are_float_and_finite) {
    Made made(200'000);
    const Bounds found = bounds(made.points.data(), true, 200'000, 3);
    CHECK(found.least[1] == 0.5f);
    CHECK(found.most[2] == static_cast<float>(made.points.back()));
    made.points[77] = NAN;
    CHECK_THROWS(bounds(made.points.data(), true, 200'000, 3), std::invalid_argument, "point 25 ");
    made.points[77] = 1e300;
    CHECK_THROWS(bounds(made.points.data(), true, 200'000, 1), std::invalid_argument, "point 25 ");
    CHECK_THROWS(bounds(nullptr, true, 0, 1), std::invalid_argument, "no points");
}

CASE(a_full_disk_is_an_error_with_its_number) {
    const Made made(1000);
    const int fd = open("/dev/full", O_WRONLY);
    if (fd < 0) return;  // some sandboxes have none
    Sink sink(fd, "full.ply");
    try {
        write_ply_rows(sink, made.cloud);
        CHECK(false);
    } catch (const SystemError& error) {
        CHECK(error.code == ENOSPC && error.path == "full.ply");
    }
    close(fd);
    Sink closed(-1, "gone.ply");
    CHECK_THROWS(write_ply_rows(closed, made.cloud), SystemError, "gone.ply");
}

CASE(check_sums_of_pieces_are_those_of_the_whole) {
    CHECK(crc32("123456789", 9) == 0xCBF43926u);
    std::string text(3'000'001, '\0');
    for (size_t i = 0; i < text.size(); ++i) text[i] = static_cast<char>(i * i % 253);
    const uint32_t whole = crc32(text.data(), text.size());
    CHECK(crc32_parallel(text.data(), text.size(), 4) == whole);
    for (size_t cut : {size_t{0}, size_t{1}, size_t{4097}, text.size()}) {
        const uint32_t first = crc32(text.data(), cut);
        const uint32_t rest = crc32(text.data() + cut, text.size() - cut);
        CHECK(crc32_combine(first, rest, text.size() - cut) == whole);
        CHECK(crc32(text.data() + cut, text.size() - cut, first) == whole);
    }
}

CASE(npz_is_a_zip_file_stored_and_deflated) {
    const std::string header = "header";
    std::vector<char> data(2'500'000, 'x');
    const std::vector<Entry> entries{{"a.npy", header, data.data(), data.size()},
                                     {"b.npy", header, nullptr, 0}};
    for (int level : {0, 6}) {
        if (level > 0 && !can_deflate()) continue;
        const Scratch one, many;
        Sink first(one.fd, "x.npz"), second(many.fd, "x.npz");
        write_npz(first, entries, level, 1);
        write_npz(second, entries, level, 4);
        CHECK(one.content() == many.content());
        CHECK(one.content().substr(0, 4) == "PK\x03\x04");
        CHECK((one.content().size() > data.size()) == (level == 0));
    }
    const Scratch file;
    Sink sink(file.fd, "x.npz");
    CHECK_THROWS(write_npz(sink, entries, 10, 1), std::invalid_argument, "level 10");
    const std::vector<Entry> longest{{std::string(70'000, 'n'), header, nullptr, 0}};
    CHECK_THROWS(write_npz(sink, longest, 0, 1), std::invalid_argument, "70000");
}

}  // namespace

int main() { return check::run_all(); }
