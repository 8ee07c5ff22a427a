// The queue and the pool: order, bounds, closing, cancelling, errors; many threads at both ends.
#include "../workers.h"

#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../parallel.h"
#include "check.h"

using namespace gen3r;

namespace {

constexpr Milliseconds kLong{20'000}, kShort{5};

TaskPointer task(std::function<void()> work) { return std::make_shared<Task>(std::move(work)); }

TaskPointer submitted(Pool& pool, std::function<void()> work) {
    TaskPointer made = task(std::move(work));
    TaskPointer given = made;
    CHECK(pool.submit(given, kLong) == Pushed::taken);
    return made;
}

CASE(queue_keeps_order_and_bound) {
    BoundedQueue<int> queue(2);
    for (int i : {1, 2}) CHECK(queue.push(i, kShort) == Pushed::taken);
    int third = 3, out = 0;
    CHECK(queue.push(third, kShort) == Pushed::full);
    CHECK(queue.pop(out) && out == 1);
    CHECK(queue.push(third, kShort) == Pushed::taken);
    CHECK(queue.remove(2) && !queue.remove(2));
    queue.close();
    CHECK(queue.push(third, kShort) == Pushed::closed);
    CHECK(queue.pop(out) && out == 3);
    CHECK(!queue.pop(out));
}

CASE(every_item_comes_out_once) {
    constexpr int kThreads = 4, kEach = 2000;
    BoundedQueue<int> queue(3);
    std::vector<std::atomic<int>> seen(kThreads * kEach);
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
        threads.emplace_back([&queue, t] {
            for (int i = 0; i < kEach; ++i) {
                int item = t * kEach + i;
                while (queue.push(item, kShort) != Pushed::taken) {}
            }
        });
        threads.emplace_back([&] {
            int item = 0;
            while (queue.pop(item)) ++seen[static_cast<size_t>(item)];
        });
    }
    for (size_t i = 0; i < threads.size(); i += 2) threads[i].join();
    queue.close();
    for (size_t i = 1; i < threads.size(); i += 2) threads[i].join();
    for (const auto& count : seen) CHECK(count == 1);
}

CASE(pool_does_everything_it_was_given) {
    std::atomic<int> sum{0};
    {
        Pool pool(3, 2, "test");
        std::vector<std::thread> givers;
        for (int t = 0; t < 4; ++t)
            givers.emplace_back([&] {
                for (int i = 1; i <= 100; ++i) submitted(pool, [&sum, i] { sum += i; });
            });
        for (auto& giver : givers) giver.join();
    }
    CHECK(sum == 4 * 5050);
}

CASE(errors_come_back_and_the_pool_goes_on) {
    Pool pool(1, 4, "test");
    const auto bad = submitted(pool, [] { throw std::runtime_error("disk full"); });
    const auto good = submitted(pool, [] {});
    CHECK(bad->wait(kLong) && good->wait(kLong));
    CHECK(bad->state() == State::failed && good->state() == State::done);
    CHECK_THROWS(std::rethrow_exception(bad->error()), std::runtime_error, "disk full");
    CHECK(!good->error());
}

CASE(waiting_tasks_can_be_cancelled) {
    std::atomic<bool> go{false};
    Pool pool(1, 2, "test");
    const auto running = submitted(pool, [&] {
        while (!go) std::this_thread::yield();
    });
    while (running->state() == State::waiting) std::this_thread::yield();
    const auto held = std::make_shared<int>(1);
    const auto first = submitted(pool, [held] {});
    const auto second = submitted(pool, [] {});
    TaskPointer third = task([] {});
    CHECK(pool.submit(third, kShort) == Pushed::full);
    CHECK(held.use_count() == 2);
    CHECK(pool.cancel(first) && first->state() == State::cancelled && first->wait(kShort));
    CHECK(held.use_count() == 1);  // what it held is let go at once
    CHECK(!pool.cancel(running));
    CHECK(pool.submit(third, kLong) == Pushed::taken);  // into the cancelled one's place
    go = true;
    CHECK(second->wait(kLong) && running->wait(kLong));
    CHECK(!pool.cancel(second) && second->state() == State::done);
}

CASE(closing_drops_or_finishes_what_waits) {
    for (const bool drop : {false, true}) {
        std::atomic<bool> go{false};
        Pool pool(1, 2, "test");
        const auto running = submitted(pool, [&] {
            while (!go) std::this_thread::yield();
        });
        while (running->state() == State::waiting) std::this_thread::yield();
        const auto waiting = submitted(pool, [] {});
        pool.close(drop);
        TaskPointer late = task([] {});
        CHECK(pool.submit(late, kShort) == Pushed::closed);
        CHECK(!pool.join(kShort));
        go = true;
        CHECK(pool.join(kLong) && pool.join(kShort));
        CHECK(waiting->state() == (drop ? State::cancelled : State::done));
        CHECK(running->state() == State::done);
    }
}

CASE(a_pool_may_be_destroyed_by_its_own_task) {
    auto pool = std::make_shared<Pool>(2, 1, "test");
    std::atomic<bool> go{false}, gone{false};
    TaskPointer last = task([pool, &go, &gone] {
        while (!go) std::this_thread::yield();
        CHECK(pool->inside());
        gone = true;
    });
    TaskPointer given = last;
    CHECK(pool->submit(given, kLong) == Pushed::taken && !pool->inside() && pool->here());
    pool.reset();
    given.reset();
    go = true;
    CHECK(last->wait(kLong) && gone);
}

CASE(loops_cover_their_range_and_throw) {
    for (int threads : {1, 3, 8}) {
        std::vector<std::atomic<int>> seen(1003);
        parallel_for(1003, 10, threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
        });
        for (const auto& count : seen) CHECK(count == 1);
        CHECK_THROWS(parallel_for(100, 1, threads,
                                  [](int64_t begin, int64_t) {
                                      if (begin == 42) throw std::runtime_error("at 42");
                                  }),
                     std::runtime_error, "at 42");
    }
    parallel_for(0, 1, 4, [](int64_t, int64_t) { throw std::runtime_error("never"); });
}

}  // namespace

int main() { return check::run_all(); }
