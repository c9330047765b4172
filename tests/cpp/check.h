// A test runner in one header, independent of torch: tests register themselves, and checks report where they failed.
#pragma once

#include <atomic>
#include <cstdio>
#include <exception>
#include <iostream>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace check {

struct Test {
    const char* name;
    void (*body)();
};

inline std::vector<Test>& tests() {
    static std::vector<Test> all;
    return all;
}

struct Registration {
    Registration(const char* name, void (*body)()) { tests().push_back({name, body}); }
};

// Failed checks of the running test. Checks may fail on several threads at once.
inline std::atomic<int>& failures() {
    static std::atomic<int> count{0};
    return count;
}

inline void report(const char* file, int line, const std::string& what) {
    ++failures();
    // The texts may contain control characters: bytes of files, and unusual names.
    std::string shown;
    for (const char c : what) {
        const auto byte = static_cast<unsigned char>(c);
        shown += (byte >= 0x20 && byte != 0x7f) || c == '\n' ? c : '?';
    }
    std::fprintf(stderr, "%s:%d: %s\n", file, line, shown.c_str());
}

template <typename T>
void print(std::ostream& out, const T& value) {
    out << value;
}

template <typename T>
void print(std::ostream& out, const std::vector<T>& values) {
    for (const T& value : values) {
        out << (&value == values.data() ? "{" : ", ") << value;
    }
    out << (values.empty() ? "{}" : "}");
}

template <typename A, typename B>
void equal(const A& a, const B& b, const char* a_text, const char* b_text, const char* file, int line) {
    if (!(a == b)) {
        std::ostringstream out;
        out << a_text << " is ";
        print(out, a);
        out << ", not " << b_text << ", which is ";
        print(out, b);
        report(file, line, out.str());
    }
}

// Runs the tests whose names contain `filter`, prints the tally, and returns the exit status.
inline int run(const std::string& filter) {
    int passed = 0;
    int failed = 0;
    for (const Test& test : tests()) {
        if (std::string(test.name).find(filter) == std::string::npos) {
            continue;
        }
        failures() = 0;
        try {
            test.body();
        } catch (const std::exception& error) {
            report(test.name, 0, std::string("uncaught: ") + error.what());
        }
        ++(failures() == 0 ? passed : failed);
        std::printf("%s %s\n", failures() == 0 ? "ok    " : "FAILED", test.name);
        std::fflush(stdout);
    }
    std::printf("%d passed, %d failed\n", passed, failed);
    return failed == 0 && passed > 0 ? 0 : 1;
}

}  // namespace check

#define TEST(name)                                                     \
    static void test_##name();                                         \
    static const check::Registration entry_##name{#name, test_##name}; \
    static void test_##name()

#define EXPECT(condition)                                                          \
    do {                                                                           \
        if (!(condition)) check::report(__FILE__, __LINE__, "false: " #condition); \
    } while (false)

#define EXPECT_EQ(a, b) check::equal((a), (b), #a, #b, __FILE__, __LINE__)
