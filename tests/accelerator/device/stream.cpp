#include "stream.h"

#include <c10/util/Exception.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <utility>

#include "controls.h"

namespace testaccel {

struct Mark {
    bool passed = false;
};

namespace {

// One of the three: work, a mark to pass, or a mark to wait for.
struct Task {
    std::function<void()> work;
    std::shared_ptr<Mark> passes;
    SharedMark awaits;
};

struct Queue {
    std::deque<Task> tasks;
    uint64_t submitted = 0;
    uint64_t finished = 0;
    bool held = false;
    bool running = false;
    std::mt19937_64 random;
    std::thread thread;
};

// All queues share one mutex and one condition: there are few, and everything may wait for everything.
struct Machine {
    std::mutex mutex;
    std::condition_variable changed;
    std::array<std::array<Queue, kStreams>, kDevices> queues;
    std::array<c10::StreamId, kDevices> taken{};
    int64_t max_delay_us = 200;
    std::chrono::duration<double> patience{30};
    std::string error;
    bool stopping = false;
    pid_t owner = getpid();
};

void stop_threads();

// Never destroyed: threads may be at work until the process ends.
Machine& machine() {
    static Machine* const instance = [] {
        std::atexit(stop_threads);
        return new Machine;
    }();
    return *instance;
}

using Lock = std::unique_lock<std::mutex>;

Queue& queue_of(const c10::Stream& stream) {
    TORCH_CHECK(stream.device_type() == c10::kPrivateUse1 && stream.id() >= 0 && stream.id() < kStreams,
                "testaccel: ", stream, " is not a stream of this backend");
    return machine().queues[checked_index(stream.device_index())][stream.id()];
}

// A failed task is reported by the next wait, as errors of kernels are.
void run_work(const std::function<void()>& work, Lock& lock) {
    std::string error;
    lock.unlock();
    try {
        work();
    } catch (const c10::Error& failure) {
        error = failure.what_without_backtrace();
    } catch (const std::exception& failure) {
        error = failure.what();
    }
    lock.lock();
    if (machine().error.empty()) {
        machine().error = error;
    }
}

std::chrono::microseconds next_delay(Queue& queue) {
    return std::chrono::microseconds(std::uniform_int_distribution<int64_t>(0, machine().max_delay_us)(queue.random));
}

void serve(Queue& queue) {
    // A thread begins with the name of the one that started it.
    pthread_setname_np(pthread_self(), "testaccel");
    Machine& all = machine();
    Lock lock(all.mutex);
    for (;;) {
        all.changed.wait(lock, [&] { return all.stopping || (!queue.held && !queue.tasks.empty()); });
        if (!all.stopping && queue.tasks.front().work && all.max_delay_us > 0) {
            all.changed.wait_for(lock, next_delay(queue), [&] { return all.stopping; });
            all.changed.wait(lock, [&] { return all.stopping || !queue.held; });
        }
        if (all.stopping) {
            return;
        }
        Task task = std::move(queue.tasks.front());
        queue.tasks.pop_front();
        if (task.work) {
            queue.running = true;
            run_work(task.work, lock);
            queue.running = false;
        } else if (task.passes) {
            task.passes->passed = true;
        } else {
            all.changed.wait(lock, [&] { return all.stopping || task.awaits->passed; });
        }
        ++queue.finished;
        all.changed.notify_all();
    }
}

void submit(const c10::Stream& stream, Task task) {
    Queue& queue = queue_of(stream);
    const Lock lock(machine().mutex);
    if (!queue.thread.joinable()) {
        queue.thread = std::thread(serve, std::ref(queue));
    }
    queue.tasks.push_back(std::move(task));
    ++queue.submitted;
    machine().changed.notify_all();
}

template <typename Predicate>
void wait_on_host(Lock& lock, Predicate is_done) {
    Machine& all = machine();
    TORCH_CHECK(all.changed.wait_for(lock, all.patience, is_done), "testaccel: the host waited for ",
                all.patience.count(), " s, and nothing came. Is a stream held?");
    if (!all.error.empty()) {
        const std::string error = std::exchange(all.error, {});
        TORCH_CHECK(false, "testaccel: a task failed: ", error);
    }
}

// Lets no thread use torch while the process takes it down. What is still queued never runs.
void stop_threads() {
    Machine& all = machine();
    // A forked process has no threads to wait for, and the mutex may have been locked by one.
    if (getpid() != all.owner) {
        return;
    }
    {
        const Lock lock(all.mutex);
        all.stopping = true;
        all.changed.notify_all();
    }
    for (auto& device : all.queues) {
        for (Queue& queue : device) {
            if (queue.thread.joinable()) {
                queue.thread.join();
            }
        }
    }
}

thread_local c10::DeviceIndex device_of_thread = 0;
thread_local std::array<c10::StreamId, kDevices> streams_of_thread{};

}  // namespace

c10::DeviceIndex current_device() { return device_of_thread; }

void set_current_device(c10::DeviceIndex index) {
    device_of_thread = checked_index(index);
    count_thread();
}

c10::DeviceIndex checked_index(c10::DeviceIndex index) {
    TORCH_CHECK(index >= -1 && index < kDevices, "testaccel: there is no device ", static_cast<int>(index),
                ", the devices are 0 to ", static_cast<int>(kDevices) - 1);
    return index == -1 ? current_device() : index;
}

c10::Stream stream_of(c10::DeviceIndex index, c10::StreamId id) {
    return c10::Stream(c10::Stream::UNSAFE, c10::Device(c10::kPrivateUse1, checked_index(index)), id);
}

c10::Stream current_stream(c10::DeviceIndex index) { return stream_of(index, streams_of_thread[checked_index(index)]); }

c10::Stream exchange_stream(const c10::Stream& stream) {
    queue_of(stream);
    const c10::Stream before = current_stream(stream.device_index());
    streams_of_thread[before.device_index()] = stream.id();
    return before;
}

c10::Stream pool_stream(c10::DeviceIndex index) {
    const c10::DeviceIndex device = checked_index(index);
    const Lock lock(machine().mutex);
    const c10::StreamId id = 1 + machine().taken[device]++ % (kStreams - 1);
    return stream_of(device, id);
}

void launch(const c10::Stream& stream, std::function<void()> work) { submit(stream, {std::move(work), {}, {}}); }

SharedMark mark(const c10::Stream& stream) {
    auto place = std::make_shared<Mark>();
    submit(stream, {{}, place, {}});
    return place;
}

void wait_on_stream(const c10::Stream& stream, SharedMark until) { submit(stream, {{}, {}, std::move(until)}); }

bool is_passed(const SharedMark& mark) {
    const Lock lock(machine().mutex);
    return mark->passed;
}

bool is_idle(const c10::Stream& stream) {
    const Queue& queue = queue_of(stream);
    const Lock lock(machine().mutex);
    return queue.finished == queue.submitted;
}

void wait_for_mark(const SharedMark& mark) {
    Lock lock(machine().mutex);
    wait_on_host(lock, [&] { return mark->passed; });
}

void wait_for_stream(const c10::Stream& stream) {
    const Queue& queue = queue_of(stream);
    Lock lock(machine().mutex);
    wait_on_host(lock, [&queue, until = queue.submitted] { return queue.finished >= until; });
}

void wait_for_device(c10::DeviceIndex index) {
    for (c10::StreamId id = 0; id < kStreams; ++id) {
        wait_for_stream(stream_of(index, id));
    }
}

void set_held(const c10::Stream& stream, bool held) {
    Queue& queue = queue_of(stream);
    Lock lock(machine().mutex);
    queue.held = held;
    machine().changed.notify_all();
    machine().changed.wait(lock, [&] { return !held || !queue.running; });
}

void release_all() {
    const Lock lock(machine().mutex);
    for (auto& device : machine().queues) {
        for (Queue& queue : device) {
            queue.held = false;
        }
    }
    machine().changed.notify_all();
}

void set_delay(int64_t max_us, int64_t seed) {
    const Lock lock(machine().mutex);
    machine().max_delay_us = std::max<int64_t>(max_us, 0);
    uint64_t number = static_cast<uint64_t>(seed) * kDevices * kStreams;
    for (auto& device : machine().queues) {
        for (Queue& queue : device) {
            queue.random.seed(number++);
        }
    }
}

void set_patience(double seconds) {
    const Lock lock(machine().mutex);
    machine().patience = std::chrono::duration<double>(seconds);
}

}  // namespace testaccel
