#include "reading.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <limits>

#include "errors.h"
#include "parallel.h"

namespace gen3r {
namespace {

constexpr uint64_t kPiece = uint64_t{8} << 20;
constexpr uint64_t kAtOnce = uint64_t{1} << 30;  // Linux reads at most 2 GiB a call
constexpr auto kFurthest = static_cast<uint64_t>(std::numeric_limits<off_t>::max());

[[noreturn]] void too_short(int fd, const std::string& file) {
    struct stat facts {};
    if (fstat(fd, &facts) != 0) throw SystemError(errno, file);
    throw ShortFile(file + " ends after " + std::to_string(facts.st_size) +
                    " bytes, before what its header promises");
}

}  // namespace

void read_range(int fd, const std::string& file, uint64_t offset, void* target, uint64_t size) {
    char* bytes = static_cast<char*>(target);
    while (size > 0) {
        ssize_t taken = 0;  // nothing can lie beyond what the system can address
        if (offset < kFurthest)
            taken = ::pread(fd, bytes, std::min({size, kAtOnce, kFurthest - offset}),
                            static_cast<off_t>(offset));
        if (taken < 0) {
            if (errno == EINTR) continue;
            throw SystemError(errno, file);
        }
        if (taken == 0) too_short(fd, file);
        bytes += taken;
        offset += static_cast<uint64_t>(taken);
        size -= static_cast<uint64_t>(taken);
    }
}

void read_ranges(int fd, const std::string& file, const std::vector<Range>& ranges, int threads) {
    std::vector<Range> pieces;
    for (const Range& range : ranges)
        for (uint64_t done = 0; done < range.size; done += kPiece)
            pieces.push_back({range.offset + done, static_cast<char*>(range.target) + done,
                              std::min(kPiece, range.size - done)});
    parallel_for(static_cast<int64_t>(pieces.size()), 1, threads, [&](int64_t begin, int64_t end) {
        for (auto i = static_cast<size_t>(begin); i < static_cast<size_t>(end); ++i)
            read_range(fd, file, pieces[i].offset, pieces[i].target, pieces[i].size);
    });
}

}  // namespace gen3r
