// What tests set, and what they read: faults that the accelerator shows on demand, and what it counts.
#pragma once

#include <atomic>
#include <cstdint>

namespace testaccel {

struct Faults {
    // The copy between host and device that fails, counted from now on. Not above zero: none.
    std::atomic<int64_t> copies_until_failure{0};
    std::atomic<bool> pinning{false};
    // As of a backend that has neither a stream pool nor events.
    std::atomic<bool> streams{false};
    std::atomic<int64_t> pinning_us_per_mib{0};
};

struct Counters {
    std::atomic<int64_t> to_device_copies{0};
    std::atomic<int64_t> to_device_bytes{0};
    std::atomic<int64_t> to_host_copies{0};
    std::atomic<int64_t> to_host_bytes{0};
    std::atomic<int64_t> on_device_copies{0};
    std::atomic<int64_t> on_device_bytes{0};
    // Waits of the host, by what it asked for. A blocking copy is none of the others.
    std::atomic<int64_t> stream_waits{0};
    std::atomic<int64_t> device_waits{0};
    std::atomic<int64_t> event_waits{0};
    std::atomic<int64_t> blocking_copies{0};
    // Events that were recorded and not destroyed.
    std::atomic<int64_t> live_events{0};
    // Threads that made a device current.
    std::atomic<int64_t> threads{0};
    // Starts at one, so that a thread that has counted itself nowhere differs from it. Grows with each reset.
    std::atomic<int64_t> epoch{1};
};

Faults& faults();
Counters& counters();

// Counts the calling thread once.
void count_thread();

// Throws if a test has set this copy to fail.
void check_copy_fault();

}  // namespace testaccel
