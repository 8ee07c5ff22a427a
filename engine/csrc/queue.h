// A queue of bounded length between any number of threads on either side.
#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>

namespace gen3r {

using Milliseconds = std::chrono::milliseconds;

enum class Pushed { taken, full, closed };

template <typename Item>
class BoundedQueue {
public:
    explicit BoundedQueue(size_t capacity) : capacity_(std::max<size_t>(1, capacity)) {}

    // Appends, and waits up to `patience` for a place. `item` is moved from only when taken.
    Pushed push(Item& item, Milliseconds patience) {
        std::unique_lock<std::mutex> lock(guard_);
        const auto room = [&] { return closed_ || items_.size() < capacity_; };
        if (!place_.wait_for(lock, patience, room)) return Pushed::full;
        if (closed_) return Pushed::closed;
        items_.push_back(std::move(item));
        lock.unlock();
        item_.notify_one();
        return Pushed::taken;
    }

    // Takes the oldest and waits for one. False when the queue is closed and empty.
    bool pop(Item& out) {
        std::unique_lock<std::mutex> lock(guard_);
        item_.wait(lock, [&] { return closed_ || !items_.empty(); });
        if (items_.empty()) return false;
        out = std::move(items_.front());
        items_.pop_front();
        lock.unlock();
        place_.notify_one();
        return true;
    }

    // Takes out one that waits, wherever it stands. False when it is no longer there.
    bool remove(const Item& item) {
        std::unique_lock<std::mutex> lock(guard_);
        const auto found = std::find(items_.begin(), items_.end(), item);
        if (found == items_.end()) return false;
        items_.erase(found);
        lock.unlock();
        place_.notify_one();
        return true;
    }

    // No more are taken in. Those inside still come out.
    void close() {
        {
            const std::lock_guard<std::mutex> lock(guard_);
            closed_ = true;
        }
        place_.notify_all();
        item_.notify_all();
    }

    // Everything that waits, oldest first; the queue is empty then.
    std::deque<Item> drain() {
        std::deque<Item> taken;
        {
            const std::lock_guard<std::mutex> lock(guard_);
            taken.swap(items_);
        }
        place_.notify_all();
        return taken;
    }

private:
    const size_t capacity_;
    std::mutex guard_;
    std::condition_variable place_, item_;
    std::deque<Item> items_;
    bool closed_ = false;
};

}  // namespace gen3r
