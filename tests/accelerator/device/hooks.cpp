// What torch asks of an accelerator beside streams: its allocators, and how many devices there are.
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/util/Exception.h>

#include "copies.h"
#include "device_memory.h"
#include "pinned_memory.h"
#include "stream.h"

namespace testaccel {
namespace {

struct Hooks final : at::PrivateUse1HooksInterface {
    // Not marked as overrides: torch 2.6 does not ask for them.
    bool isBuilt() const { return true; }
    bool isAvailable() const { return true; }

    bool hasPrimaryContext(c10::DeviceIndex /*device_index*/) const override { return true; }

    c10::DeviceIndex deviceCount() const override { return kDevices; }

    void setCurrentDevice(c10::DeviceIndex device) const override { set_current_device(device); }

    c10::DeviceIndex getCurrentDevice() const override { return current_device(); }

    c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
        const c10::DeviceIndex before = current_device();
        set_current_device(device);
        return before;
    }

    c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
        return device < 0 ? current_device() : exchangeDevice(device);
    }

    bool isPinnedPtr(const void* data) const override { return is_pinned(data, 1); }

    c10::Allocator* getPinnedMemoryAllocator() const override { return pinned_allocator(); }

    c10::Device getDeviceFromPtr(void* data) const override {
        const c10::DeviceIndex index = device_of(data);
        TORCH_CHECK(index >= 0, "testaccel: ", data, " is no memory of a device");
        return c10::Device(c10::kPrivateUse1, index);
    }

    void resizePrivateUse1Bytes(const c10::Storage& storage, size_t newsize) const override {
        resize_storage(storage, newsize);
    }
};

const bool registered = [] {
    c10::SetAllocator(c10::kPrivateUse1, device_allocator());
    at::RegisterPrivateUse1HooksInterface(new Hooks);
    return true;
}();

}  // namespace
}  // namespace testaccel
