// Bytes to a file descriptor, whole or with the reason why not.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace gen3r {

// All of `size` bytes, however the system splits them. SystemError when it takes no more.
void write_all(int fd, const void* data, size_t size, const std::string& name);

// Appends at a descriptor's current offset and counts. Holds no more than the caller gives it.
class Sink {
public:
    Sink(int fd, std::string name) : fd_(fd), name_(std::move(name)) {}
    void write(const void* data, size_t size) {
        write_all(fd_, data, size, name_);
        written_ += size;
    }
    uint64_t written() const { return written_; }

private:
    int fd_;
    std::string name_;
    uint64_t written_ = 0;
};

}  // namespace gen3r
