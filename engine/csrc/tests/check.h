// The few lines that a test of plain C++ needs: checks that say where, and named cases.
//
//     CASE(queue_keeps_order) { ... CHECK(a == b); ... CHECK_THROWS(f(), std::invalid_argument, "part"); }
//     int main() { return gen3r::check::run_all(); }
#pragma once

#include <cstdio>
#include <exception>
#include <functional>
#include <string>
#include <vector>

namespace gen3r::check {

struct Case {
    const char* name;
    std::function<void()> body;
};

inline std::vector<Case>& cases() {
    static std::vector<Case> all;
    return all;
}

struct Registered {
    Registered(const char* name, std::function<void()> body) {
        cases().push_back({name, std::move(body)});
    }
};

struct Failure {
    std::string what;
};

inline void that(bool holds, const char* text, const char* file, int line) {
    if (!holds) throw Failure{std::string(file) + ":" + std::to_string(line) + ": " + text};
}

inline int run_all() {
    int failed = 0;
    for (const Case& each : cases()) {
        std::string problem;
        try {
            each.body();
        } catch (const Failure& failure) {
            problem = failure.what;
        } catch (const std::exception& error) {
            problem = std::string("threw ") + error.what();
        }
        failed += !problem.empty();
        if (!problem.empty()) std::printf("FAILED %s: %s\n", each.name, problem.c_str());
    }
    std::printf("%zu cases, %d failed\n", cases().size(), failed);
    return failed != 0;
}

}  // namespace gen3r::check

#define CHECK(condition) ::gen3r::check::that((condition), #condition, __FILE__, __LINE__)

#define CHECK_THROWS(expression, kind, part)                                                    \
    do {                                                                                        \
        std::string found_ = "nothing";                                                         \
        try {                                                                                   \
            (void)(expression);                                                                 \
        } catch (const kind& error_) {                                                          \
            found_ = error_.what();                                                             \
        }                                                                                       \
        const std::string text_ = std::string(#expression " threw ") + found_;                  \
        ::gen3r::check::that(found_.find(part) != std::string::npos, text_.c_str(), __FILE__,    \
                             __LINE__);                                                         \
    } while (false)

#define CASE(name)                                                             \
    static void case_##name();                                                 \
    static const ::gen3r::check::Registered registered_##name(#name, case_##name); \
    static void case_##name()
