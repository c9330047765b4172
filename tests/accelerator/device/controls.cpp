#include "controls.h"

#include <ATen/Context.h>
#include <torch/library.h>

#include <string>

#include "device_memory.h"
#include "pinned_memory.h"
#include "stream.h"

namespace testaccel {

Faults& faults() {
    static auto* const instance = new Faults;
    return *instance;
}

Counters& counters() {
    static auto* const instance = new Counters;
    return *instance;
}

void count_thread() {
    thread_local int64_t counted = 0;
    const int64_t epoch = counters().epoch;
    if (counted != epoch) {
        counted = epoch;
        ++counters().threads;
    }
}

void check_copy_fault() {
    auto& left = faults().copies_until_failure;
    if (left > 0 && --left == 0) {
        TORCH_CHECK(false, "testaccel: injected copy failure");
    }
}

namespace {

using Numbers = c10::Dict<std::string, int64_t>;

// Torch takes no pointer for pinned before the device is set up, which creating a tensor does not do.
void start() { at::globalContext().lazyInitDevice(c10::kPrivateUse1); }

Numbers read_counters() {
    const Counters& all = counters();
    const PinnedStatistics pinned = pinned_statistics();
    Numbers result;
    result.insert("to_device_copies", all.to_device_copies);
    result.insert("to_device_bytes", all.to_device_bytes);
    result.insert("to_host_copies", all.to_host_copies);
    result.insert("to_host_bytes", all.to_host_bytes);
    result.insert("on_device_copies", all.on_device_copies);
    result.insert("on_device_bytes", all.on_device_bytes);
    result.insert("stream_waits", all.stream_waits);
    result.insert("device_waits", all.device_waits);
    result.insert("event_waits", all.event_waits);
    result.insert("blocking_copies", all.blocking_copies);
    result.insert("live_events", all.live_events);
    result.insert("threads", all.threads);
    result.insert("pinned_in_use", pinned.in_use);
    result.insert("pinned_peak", pinned.peak);
    result.insert("pinned_total", pinned.total);
    result.insert("pinned_allocations", pinned.allocations);
    return result;
}

Numbers read_memory(int64_t device) {
    const MemoryStatistics memory = memory_statistics(static_cast<c10::DeviceIndex>(device));
    Numbers result;
    result.insert("allocated", memory.allocated);
    result.insert("peak", memory.peak);
    result.insert("reserved", memory.reserved);
    result.insert("allocations", memory.allocations);
    return result;
}

// What is in use stays counted: events and memory.
void reset_statistics() {
    Counters& all = counters();
    for (auto* counter : {&all.to_device_copies, &all.to_device_bytes, &all.to_host_copies, &all.to_host_bytes,
                          &all.on_device_copies, &all.on_device_bytes, &all.stream_waits, &all.device_waits,
                          &all.event_waits, &all.blocking_copies, &all.threads}) {
        *counter = 0;
    }
    ++all.epoch;
    reset_pinned_statistics();
    for (c10::DeviceIndex index = 0; index < kDevices; ++index) {
        reset_memory_statistics(index);
    }
}

// First waits for all queued work, so that nothing uses the memory that is freed.
void empty_cache() {
    for (c10::DeviceIndex index = 0; index < kDevices; ++index) {
        wait_for_device(index);
        empty_device_cache(index);
    }
    empty_pinned_cache();
}

void hold_stream(int64_t device, int64_t stream, bool held) {
    set_held(stream_of(static_cast<c10::DeviceIndex>(device), stream), held);
}

}  // namespace

TORCH_LIBRARY(testaccel, library) {
    library.def("start() -> ()", &start);
    library.def("counters() -> Dict(str, int)", &read_counters);
    library.def("memory(int device) -> Dict(str, int)", &read_memory);
    library.def("reset_statistics() -> ()", &reset_statistics);
    library.def("set_delay(int max_us, int seed) -> ()", &set_delay);
    library.def("set_patience(float seconds) -> ()", &set_patience);
    library.def("hold_stream(int device, int stream, bool held) -> ()", &hold_stream);
    library.def("release_all() -> ()", &release_all);
    library.def("empty_cache() -> ()", &empty_cache);
    library.def("set_memory_limit(int device, int limit) -> ()",
                [](int64_t device, int64_t limit) { set_memory_limit(static_cast<c10::DeviceIndex>(device), limit); });
    library.def("fail_copy_after(int count) -> ()", [](int64_t count) { faults().copies_until_failure = count; });
    library.def("fail_pinning(bool fails) -> ()", [](bool fails) { faults().pinning = fails; });
    library.def("no_streams(bool lacks) -> ()", [](bool lacks) { faults().streams = lacks; });
    library.def("pinning_cost(int us_per_mib) -> ()", [](int64_t cost) { faults().pinning_us_per_mib = cost; });
}

}  // namespace testaccel
