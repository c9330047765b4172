// What torch asks of a backend about devices, streams and events.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>

#include "controls.h"
#include "device_memory.h"
#include "stream.h"

namespace testaccel {
namespace {

constexpr c10::DeviceType kType = c10::DeviceType::PrivateUse1;

// Recording an event again replaces its mark; earlier waits are for the earlier mark.
struct Event {
    SharedMark mark;
};

const SharedMark& mark_of(void* event) { return static_cast<const Event*>(event)->mark; }

struct Guard final : c10::impl::DeviceGuardImplInterface {
    c10::DeviceType type() const override { return kType; }

    c10::Device exchangeDevice(c10::Device device) const override {
        const c10::Device before = getDevice();
        setDevice(device);
        return before;
    }

    c10::Device getDevice() const override { return {kType, current_device()}; }

    void setDevice(c10::Device device) const override {
        TORCH_CHECK(device.type() == kType, "testaccel: ", device, " is not a device of this backend");
        set_current_device(device.index());
    }

    void uncheckedSetDevice(c10::Device device) const noexcept override { set_current_device(device.index()); }

    c10::Stream getStream(c10::Device device) const override { return current_stream(device.index()); }

    c10::Stream getDefaultStream(c10::Device device) const override { return stream_of(device.index(), 0); }

    c10::Stream getStreamFromGlobalPool(c10::Device device, bool /*isHighPriority*/) const override {
        TORCH_CHECK(!faults().streams, "Backend doesn't support acquiring a stream from pool.");
        return pool_stream(device.index());
    }

    c10::Stream getNewStream(c10::Device device, int /*priority*/) const override {
        TORCH_CHECK(!faults().streams, "Backend doesn't support create a new Stream.");
        return pool_stream(device.index());
    }

    c10::Stream exchangeStream(c10::Stream stream) const override { return exchange_stream(stream); }

    void destroyEvent(void* event, const c10::DeviceIndex /*device_index*/) const noexcept override {
        if (event != nullptr) {
            delete static_cast<Event*>(event);
            --counters().live_events;
        }
    }

    void record(void** event, const c10::Stream& stream, const c10::DeviceIndex device_index,
                const c10::EventFlag /*flag*/) const override {
        TORCH_CHECK(!faults().streams, "Backend doesn't support events.");
        TORCH_CHECK(device_index == -1 || device_index == stream.device_index(), "Event device index ",
                    static_cast<int>(device_index), " does not match recording stream's device index ",
                    static_cast<int>(stream.device_index()), ".");
        SharedMark place = mark(stream);
        if (*event == nullptr) {
            *event = new Event;
            ++counters().live_events;
        }
        static_cast<Event*>(*event)->mark = std::move(place);
    }

    void block(void* event, const c10::Stream& stream) const override {
        if (event != nullptr) {
            wait_on_stream(stream, mark_of(event));
        }
    }

    bool queryEvent(void* event) const override { return event == nullptr || is_passed(mark_of(event)); }

    void synchronizeEvent(void* event) const override {
        if (event != nullptr) {
            ++counters().event_waits;
            wait_for_mark(mark_of(event));
        }
    }

    c10::DeviceIndex deviceCount() const noexcept override { return kDevices; }

    bool queryStream(const c10::Stream& stream) const override { return is_idle(stream); }

    void synchronizeStream(const c10::Stream& stream) const override {
        ++counters().stream_waits;
        wait_for_stream(stream);
    }

    void synchronizeDevice(const c10::DeviceIndex device_index) const override {
        ++counters().device_waits;
        wait_for_device(device_index);
    }

    void recordDataPtrOnStream(const c10::DataPtr& data, const c10::Stream& stream) const override {
        use_on_stream(data, stream);
    }
};

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

}  // namespace
}  // namespace testaccel
