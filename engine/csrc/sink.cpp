#include "sink.h"

#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "errors.h"

namespace gen3r {
namespace {

constexpr size_t kAtOnce = size_t{1} << 26;  // a call ends within a moment, also on a slow disk

}  // namespace

void write_all(int fd, const void* data, size_t size, const std::string& name) {
    const char* bytes = static_cast<const char*>(data);
    while (size > 0) {
        const ssize_t taken = ::write(fd, bytes, std::min(size, kAtOnce));
        if (taken < 0) {
            if (errno == EINTR) continue;
            throw SystemError(errno, name);
        }
        bytes += taken;
        size -= static_cast<size_t>(taken);
    }
}

}  // namespace gen3r
