// Loops over independent ranges on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace gen3r {

// Threads that a loop takes: `asked`, or with 0 what OMP_NUM_THREADS or the machine allows.
inline int thread_count(int asked) {
    if (asked > 0) return asked;
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return std::max(1u, std::thread::hardware_concurrency());
#endif
}

// Calls body(begin, end) for ranges of at most `grain` indices that cover [0, count), in any order
// and several at a time. The first exception of a body ends the loop and is thrown to the caller.
//
// OpenMP runs it where the compiler has it. Under ThreadSanitizer, which takes libgomp's own
// synchronisation for data races, the same loop runs on std::thread (build without -fopenmp).
template <typename Body>
void parallel_for(int64_t count, int64_t grain, int threads, Body&& body) {
    if (count <= 0) return;
    grain = std::max<int64_t>(1, grain);
    const int64_t blocks = (count + grain - 1) / grain;
    const int team = static_cast<int>(std::min<int64_t>(thread_count(threads), blocks));
    std::atomic<bool> failed{false};
    std::exception_ptr error;
    std::mutex guard;
    auto run = [&](int64_t block) {
        if (failed.load(std::memory_order_relaxed)) return;
        try {
            body(block * grain, std::min(count, (block + 1) * grain));
        } catch (...) {
            const std::lock_guard<std::mutex> lock(guard);
            if (!error) error = std::current_exception();
            failed.store(true, std::memory_order_relaxed);
        }
    };
    if (team <= 1) {
        for (int64_t block = 0; block < blocks; ++block) run(block);
    } else {
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic, 1) num_threads(team)
        for (int64_t block = 0; block < blocks; ++block) run(block);
#else
        std::atomic<int64_t> next{0};
        auto work = [&] {
            for (int64_t block = next++; block < blocks; block = next++) run(block);
        };
        std::vector<std::thread> others;
        try {
            for (int i = 1; i < team; ++i) others.emplace_back(work);
        } catch (const std::system_error&) {
            // The system gives no more threads: those that are there do all of it.
        }
        work();
        for (auto& thread : others) thread.join();
#endif
    }
    if (error) std::rethrow_exception(error);
}

}  // namespace gen3r
