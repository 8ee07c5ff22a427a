// Python bindings of workers.h: a pool of threads outside the interpreter, and its futures.
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>

#include "bindings.h"
#include "workers.h"

namespace py = pybind11;

namespace gen3r {
namespace {

constexpr Milliseconds kPatience{50};  // between two looks for Ctrl-C

// References that may be dropped by a thread without the interpreter's lock.
struct Held {
    py::object function, arguments, keywords, value, error;
    static std::shared_ptr<Held> make() {
        return {new Held, [](Held* held) {
                    if (!Py_IsInitialized()) return;  // nothing is left to count references for
                    const py::gil_scoped_acquire lock;
                    delete held;
                }};
    }
    // Calls the function; keeps its value or its exception and lets go of the rest.
    void call() {
        const py::gil_scoped_acquire lock;
        try {
            value = function(*arguments, **keywords);
        } catch (py::error_already_set& raised) {
            error = raised.value();
            if (raised.trace()) PyException_SetTraceback(error.ptr(), raised.trace().ptr());
        }
        function = arguments = keywords = py::object();
    }
};

// Destroying a pool waits for its threads, which may need the interpreter's lock.
void destroy(Pool* pool) {
    if (!PyGILState_Check()) {
        delete pool;
        return;
    }
    const py::gil_scoped_release released;
    delete pool;
}

using PoolPointer = std::shared_ptr<Pool>;

void check_here(const PoolPointer& pool) {
    if (!pool->here())
        throw std::runtime_error(
            "this worker pool belongs to the process that forked this one and has no threads "
            "here; make a new one after the fork");
}

void check_signals() {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

class Future {
public:
    Future(PoolPointer pool, TaskPointer task, std::shared_ptr<Held> held)
        : pool_(std::move(pool)), task_(std::move(task)), held_(std::move(held)) {}

    bool done() const { return task_->state() > State::running; }
    bool running() const { return task_->state() == State::running; }
    bool cancelled() const { return task_->state() == State::cancelled; }

    bool cancel() {
        check_here(pool_);
        if (cancelled()) return true;
        const py::gil_scoped_release released;
        return pool_->cancel(task_);
    }

    py::object exception(const std::optional<double>& timeout) {
        wait(timeout);
        return held_->error ? held_->error : py::none();
    }

    py::object result(const std::optional<double>& timeout) {
        const py::object error = exception(timeout);
        if (!error.is_none()) {
            PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(error.ptr())), error.ptr());
            throw py::error_already_set();
        }
        return held_->value;
    }

private:
    void wait(const std::optional<double>& timeout) {
        check_here(pool_);
        const auto start = std::chrono::steady_clock::now();
        for (bool finished = false; !finished;) {
            auto patience = kPatience;
            if (timeout) {
                const std::chrono::duration<double> gone = std::chrono::steady_clock::now() - start;
                const double left = std::max(0.0, *timeout - gone.count()) * 1000.0;
                patience = std::min(patience, Milliseconds(static_cast<int64_t>(
                                                  std::min(left, 1000.0) + 0.999)));
            }
            {
                const py::gil_scoped_release released;
                finished = task_->wait(patience);
            }
            check_signals();
            const std::chrono::duration<double> gone = std::chrono::steady_clock::now() - start;
            if (!finished && timeout && gone.count() >= *timeout) {
                PyErr_SetString(PyExc_TimeoutError, "the job is not finished");
                throw py::error_already_set();
            }
        }
        if (cancelled()) {
            const py::object kind =
                py::module_::import("concurrent.futures").attr("CancelledError");
            PyErr_SetString(kind.ptr(), "the job was cancelled");
            throw py::error_already_set();
        }
        if (const auto error = task_->error()) std::rethrow_exception(error);
    }

    PoolPointer pool_;
    TaskPointer task_;
    std::shared_ptr<Held> held_;
};

std::vector<std::weak_ptr<Pool>>& all_pools() {  // touched with the interpreter's lock only
    static std::vector<std::weak_ptr<Pool>> pools;
    return pools;
}

// Waits for the threads to end; at Ctrl-C it raises, and may be called again.
void join(const PoolPointer& pool) {
    for (bool ended = false; !ended;) {
        {
            const py::gil_scoped_release released;
            ended = pool->join(kPatience);
        }
        if (!ended) check_signals();
    }
}

class PyPool {
public:
    PyPool(int threads, int waiting, const std::string& name) {
        if (threads < 1 || waiting < 1)
            throw std::invalid_argument("threads " + std::to_string(threads) + " and waiting " +
                                        std::to_string(waiting) + " must be at least 1");
        pool_ = PoolPointer(new Pool(threads, waiting, name), destroy);
        auto& pools = all_pools();
        pools.erase(std::remove_if(pools.begin(), pools.end(), [](auto& p) { return p.expired(); }),
                    pools.end());
        pools.push_back(pool_);
    }

    Future submit(const py::function& function, const py::args& arguments,
                  const py::kwargs& keywords) {
        check_here(pool_);
        auto held = Held::make();
        held->function = function;
        held->arguments = arguments;
        held->keywords = keywords;
        auto task = std::make_shared<Task>([held] { held->call(); });
        const bool inside = pool_->inside();
        for (;;) {
            Pushed pushed;
            TaskPointer given = task;
            {
                const py::gil_scoped_release released;
                pushed = pool_->submit(given, inside ? Milliseconds(0) : kPatience);
            }
            if (pushed == Pushed::taken) return {pool_, task, held};
            if (pushed == Pushed::closed)
                throw std::runtime_error("the worker pool is closed and takes no more jobs");
            if (inside)
                throw std::runtime_error(
                    "a job gives its own pool a job while the queue is full and would wait for "
                    "itself; let the pool's owner submit it");
            check_signals();
        }
    }

    void close(bool cancel) {
        check_here(pool_);
        if (pool_->inside())
            throw std::runtime_error("a job can not close its own pool; it would wait for itself");
        {
            const py::gil_scoped_release released;
            pool_->close(cancel);
        }
        join(pool_);
    }

private:
    PoolPointer pool_;
};

// When the interpreter ends: everything that was given is done, as concurrent.futures does. Ctrl-C
// drops what has not begun.
void close_all() {
    for (const auto& weak : all_pools()) {
        const PoolPointer pool = weak.lock();
        if (!pool || !pool->here()) continue;
        {
            const py::gil_scoped_release released;
            pool->close(false);
        }
        try {
            join(pool);
        } catch (py::error_already_set& interrupted) {
            {
                const py::gil_scoped_release released;
                pool->close(true);
            }
            join(pool);
        }
    }
}

}  // namespace

void bind_workers(py::module_& m) {
    py::class_<Future>(m, "Future", "What becomes of a job; as concurrent.futures.Future.")
        .def("done", &Future::done, "Finished, failed or cancelled.")
        .def("running", &Future::running)
        .def("cancelled", &Future::cancelled)
        .def("cancel", &Future::cancel, "Take a waiting job away; False when it had begun.")
        .def("exception", &Future::exception, py::arg("timeout") = py::none(),
             "What the job raised, or None. TimeoutError; CancelledError.")
        .def("result", &Future::result, py::arg("timeout") = py::none(),
             "What the job returned; raises what it raised. TimeoutError; CancelledError.");
    py::class_<PyPool>(m, "Pool", "Threads that do jobs from a queue of bounded length.")
        .def(py::init<int, int, const std::string&>(), py::arg("threads"), py::arg("waiting"),
             py::arg("name") = "gen3r")
        .def("submit", &PyPool::submit,
             "Queue function(*arguments, **keywords); waits while the queue is full.")
        .def("close", &PyPool::close, py::arg("cancel") = false,
             "Take no more jobs and wait for the rest; `cancel` drops those that have not begun.");
    py::module_::import("atexit").attr("register")(py::cpp_function(&close_all));
}

}  // namespace gen3r
