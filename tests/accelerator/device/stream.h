// Streams: each is a thread that takes one task after the other from a queue, each piece of work after a random delay.
// Nothing happens when work is launched, so a program that does not wait for it reads what was there before.
#pragma once

#include <c10/core/Stream.h>

#include <functional>
#include <memory>

namespace testaccel {

constexpr c10::DeviceIndex kDevices = 2;
// Of each device: the default stream, which is number 0, and the pool.
constexpr c10::StreamId kStreams = 5;

// A place in a stream's queue, which an event marks.
struct Mark;
using SharedMark = std::shared_ptr<const Mark>;

// The current device and streams belong to the thread. A device or index of -1 is the current one.
c10::DeviceIndex current_device();
void set_current_device(c10::DeviceIndex index);
c10::DeviceIndex checked_index(c10::DeviceIndex index);
c10::Stream current_stream(c10::DeviceIndex index);
c10::Stream exchange_stream(const c10::Stream& stream);

c10::Stream stream_of(c10::DeviceIndex index, c10::StreamId id);
// Goes round the pool.
c10::Stream pool_stream(c10::DeviceIndex index);

// These put something into the stream's queue and return at once.
void launch(const c10::Stream& stream, std::function<void()> work);
SharedMark mark(const c10::Stream& stream);
void wait_on_stream(const c10::Stream& stream, SharedMark until);

bool is_passed(const SharedMark& mark);
bool is_idle(const c10::Stream& stream);

// These wait on the host, and throw what went wrong in the queues since the last wait.
void wait_for_mark(const SharedMark& mark);
void wait_for_stream(const c10::Stream& stream);
void wait_for_device(c10::DeviceIndex index);

// A held stream starts nothing. Returns when what ran has ended.
void set_held(const c10::Stream& stream, bool held);
void release_all();
// Starts the sequence of delays anew. At most `max_us` each, none with 0.
void set_delay(int64_t max_us, int64_t seed);
// How long the host waits before it takes a held stream for a deadlock of the test.
void set_patience(double seconds);

}  // namespace testaccel
