#include "workers.h"

#include <pthread.h>
#include <unistd.h>

#include <algorithm>

namespace gen3r {
namespace {

constexpr size_t kNameLength = 15;  // what Linux keeps of a thread's name

}  // namespace

State Task::state() const {
    const std::lock_guard<std::mutex> lock(guard_);
    return state_;
}

bool Task::wait(Milliseconds patience) const {
    std::unique_lock<std::mutex> lock(guard_);
    return finished_.wait_for(lock, patience, [&] { return state_ > State::running; });
}

std::exception_ptr Task::error() const {
    const std::lock_guard<std::mutex> lock(guard_);
    return error_;
}

bool Task::begin() {
    const std::lock_guard<std::mutex> lock(guard_);
    if (state_ != State::waiting) return false;
    state_ = State::running;
    return true;
}

void Task::run() {
    if (!begin()) return;
    State state = State::done;
    std::exception_ptr error;
    try {
        work_();
    } catch (...) {
        state = State::failed;
        error = std::current_exception();
    }
    finish(state, std::move(error));
}

bool Task::cancel() {
    {
        const std::lock_guard<std::mutex> lock(guard_);
        if (state_ != State::waiting) return false;
        state_ = State::running;  // ours: nobody else begins or cancels it
    }
    finish(State::cancelled, nullptr);
    return true;
}

void Task::finish(State state, std::exception_ptr error) {
    // Before anybody is told, so that who waits for a task finds its arguments released; and outside
    // the lock: releasing them may run code of any kind.
    work_ = nullptr;
    {
        const std::lock_guard<std::mutex> lock(guard_);
        state_ = state;
        error_ = std::move(error);
    }
    finished_.notify_all();
}

struct Pool::Shared {
    explicit Shared(int waiting) : queue(static_cast<size_t>(waiting)) {}
    BoundedQueue<TaskPointer> queue;
    std::mutex guard;
    std::condition_variable ended;
    int running = 0;  // threads
};

Pool::Pool(int threads, int waiting, const std::string& name)
    : shared_(std::make_shared<Shared>(waiting)), process_(getpid()) {
    shared_->running = threads;
    try {
        for (int i = 0; i < threads; ++i) {
            threads_.emplace_back(&Pool::work, shared_);
            ids_.push_back(threads_.back().get_id());
            pthread_setname_np(threads_.back().native_handle(),
                               name.substr(0, kNameLength).c_str());
        }
    } catch (...) {  // the system gives no more threads
        shared_->queue.close();
        for (auto& thread : threads_) thread.join();
        throw;
    }
}

Pool::~Pool() {
    if (!here()) {  // a forked child: the threads are not there, and their locks may be held
        new std::vector<std::thread>(std::move(threads_));  // neither is ever destroyed
        new std::shared_ptr<Shared>(std::move(shared_));
        return;
    }
    shared_->queue.close();
    for (auto& thread : threads_) {
        if (!thread.joinable()) continue;
        // The last reference to a pool may go with a task's arguments, on a thread of its own.
        if (thread.get_id() == std::this_thread::get_id())
            thread.detach();
        else
            thread.join();
    }
}

Pushed Pool::submit(TaskPointer& task, Milliseconds patience) {
    return shared_->queue.push(task, patience);
}

bool Pool::cancel(const TaskPointer& task) {
    // Out of the queue first: its place is free at once.
    shared_->queue.remove(task);
    return task->cancel();
}

void Pool::close(bool drop) {
    shared_->queue.close();
    if (!drop) return;
    for (const TaskPointer& task : shared_->queue.drain()) task->cancel();
}

bool Pool::join(Milliseconds patience) {
    {
        std::unique_lock<std::mutex> lock(shared_->guard);
        if (!shared_->ended.wait_for(lock, patience, [&] { return shared_->running == 0; }))
            return false;
    }
    const std::lock_guard<std::mutex> lock(joining_);
    for (auto& thread : threads_)
        if (thread.joinable()) thread.join();
    return true;
}

bool Pool::inside() const {
    return std::find(ids_.begin(), ids_.end(), std::this_thread::get_id()) != ids_.end();
}

bool Pool::here() const { return process_ == getpid(); }

void Pool::work(const std::shared_ptr<Shared>& shared) {
    TaskPointer task;
    while (shared->queue.pop(task)) {
        task->run();
        task.reset();
    }
    const std::lock_guard<std::mutex> lock(shared->guard);
    --shared->running;
    shared->ended.notify_all();
}

}  // namespace gen3r
