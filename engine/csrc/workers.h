// Threads that do jobs from a bounded queue.
#pragma once

#include <sys/types.h>

#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "queue.h"

namespace gen3r {

enum class State { waiting, running, done, failed, cancelled };

// One job and what became of it. It is finished when it is done, failed or cancelled.
class Task {
public:
    explicit Task(std::function<void()> work) : work_(std::move(work)) {}

    State state() const;
    // Waits up to `patience`; whether it is finished.
    bool wait(Milliseconds patience) const;
    // What it threw; null unless it failed.
    std::exception_ptr error() const;

private:
    friend class Pool;
    bool begin();  // false when it was cancelled
    void run();
    bool cancel();  // false when it had begun
    void finish(State state, std::exception_ptr error);

    mutable std::mutex guard_;
    mutable std::condition_variable finished_;
    State state_ = State::waiting;
    std::exception_ptr error_;
    std::function<void()> work_;  // dropped when the task is finished, with all that it holds
};

using TaskPointer = std::shared_ptr<Task>;

// `threads` threads, and room for `waiting` tasks that have not begun.
//
// A process that forks keeps the threads and the child has none: `here` tells the two apart, and in
// the child no other function may be called (its destructor knows).
class Pool {
public:
    Pool(int threads, int waiting, const std::string& name);
    ~Pool();  // takes no more, lets everything finish
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    Pushed submit(TaskPointer& task, Milliseconds patience);
    // Takes a waiting task away. False when it had begun.
    bool cancel(const TaskPointer& task);
    // Takes no more tasks; with `drop`, those that wait are cancelled.
    void close(bool drop);
    // Waits up to `patience` for all threads to end after `close`; whether they have.
    bool join(Milliseconds patience);
    // Whether the calling thread is one of the pool's.
    bool inside() const;
    // Whether this is the process that made the pool.
    bool here() const;

private:
    struct Shared;  // outlives the pool while a thread is in a last task
    static void work(const std::shared_ptr<Shared>& shared);

    std::shared_ptr<Shared> shared_;
    std::mutex joining_;
    std::vector<std::thread> threads_;
    std::vector<std::thread::id> ids_;
    pid_t process_;
};

}  // namespace gen3r
