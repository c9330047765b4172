// Transfers between host memory and one device: slabs, and the stream of the copies from and to them.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/Stream.h>
#include <c10/core/StreamGuard.h>

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "cpp/device/pinned_pool.h"

namespace safetensors_torch::layer {

// Takes a stream of the device: one of earlier transfers, or one of torch's pool. Fails if the device has none.
c10::Stream take_stream(c10::Device device);

// Returns it, for the next transfer.
void give_stream(c10::Stream stream);

// Returns the bytes of a slab that parts of a transfer of `bytes` use.
size_t used_slab_bytes(uint64_t bytes);

// The slabs and the stream of one transfer.
//
// If the device has streams and events, and the host pinned memory, copies run asynchronously on a stream of their own,
// and each slab has an event that completes with its copies. The copy stream waits for the work that is queued on the
// caller's stream when this is made, and the caller's stream waits for the copies in finish(). The host does not wait.
// The destinations may be freed once the caller's stream waits, so the allocator need not know the copy stream.
//
// Otherwise, and for transfers so small that pinning takes longer than it saves, copies are synchronous, on the
// caller's stream, and the slabs are pageable memory.
class DeviceCopyStream {
  public:
    // For `bytes` to or from `device`, which has an index unless it is the CPU, through at most `most_slabs`.
    DeviceCopyStream(c10::Device device, uint64_t bytes, size_t most_slabs = std::numeric_limits<size_t>::max());
    ~DeviceCopyStream();
    DeviceCopyStream(const DeviceCopyStream&) = delete;
    DeviceCopyStream& operator=(const DeviceCopyStream&) = delete;

    c10::Device device() const { return device_; }

    // Returns whether copies are asynchronous.
    bool is_async() const { return stream_.has_value(); }

    size_t slab_bytes() const { return slab_bytes_; }

    // The slabs; their numbers do not change.
    size_t size() const { return slabs_.size(); }
    uint8_t* data(size_t slab) const { return static_cast<uint8_t*>(slabs_[slab].memory.mutable_data_ptr()); }
    const c10::Storage& storage(size_t slab) const { return slabs_[slab].memory.storage(); }

    // Adds a slab if the transfer is worth another; returns whether it did.
    bool grow();

    // Calls `copies`, which copies from or to a slab, with the copy stream as the current one; after that, the slab
    // is not idle until these copies are done.
    template <typename Copies>
    void run(size_t slab, Copies&& copies) {
        if (!stream_) {
            std::forward<Copies>(copies)();
            return;
        }
        const c10::StreamGuard guard(*stream_);
        try {
            std::forward<Copies>(copies)();
            record(slab);
        } catch (...) {
            // The copies before the one that failed are running.
            record_if_possible(slab);
            throw;
        }
    }

    // Returns whether copies can start. On the caller's stream, the host waits for the work that is queued there.
    bool is_ready() const { return !before_ || before_->query(); }

    // Returns whether the slab may be written to.
    bool is_idle(size_t slab) const { return slabs_[slab].is_idle(); }

    // Makes the caller's stream wait for the running copies.
    void join();

    // The same, after the last copy.
    void finish();

  private:
    bool begin_async();
    void begin_plain();
    bool take_pinned();
    bool add(std::optional<Slab> slab);
    void give_back();
    void record(size_t slab);
    void record_if_possible(size_t slab) noexcept;
    void abandon(std::vector<Slab>& slabs) noexcept;

    c10::Device device_;
    uint64_t bytes_;
    size_t most_slabs_;
    size_t slab_bytes_ = kSlabBytes;
    // For copies on the caller's stream: completes with the work that is queued there; none without events.
    std::optional<c10::Event> before_;
    // The caller's stream, and that of the copies; none if copies are synchronous.
    std::optional<c10::Stream> current_;
    std::optional<c10::Stream> stream_;
    std::vector<Slab> slabs_;
    // Slabs that become usable once the copies of earlier transfers are done.
    std::vector<Slab> busy_;
    // False once pinning was refused, which takes long.
    bool may_pin_ = true;
};

}  // namespace safetensors_torch::layer
