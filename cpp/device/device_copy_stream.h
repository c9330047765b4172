// The way between host memory and one device: slabs, and the stream on which copies from and to them run.
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

// One transfer's slabs and stream.
//
// Where the device has streams and events, and the host pinned memory, copies run on a stream of their own while the
// host goes on, and each slab has an event that passes when its copies are done. That stream waits for what the
// caller's stream has to do when the copy stream is made, and the caller's for it when the copy stream ends: what
// either does after that sees what was copied. Nobody else waits, the host least of all. The destinations of copies may
// be freed once the caller's stream has been told to wait, so no allocator has to be told of the other stream.
//
// Elsewhere, and for transfers so small that pinning memory would take longer than it saves, copies are done when the
// call returns, on the caller's stream, and the slabs are plain memory.
class DeviceCopyStream {
  public:
    // For `bytes` to or from `device`, which has an index where it is no CPU, through `most_slabs` at most.
    DeviceCopyStream(c10::Device device, uint64_t bytes, size_t most_slabs = std::numeric_limits<size_t>::max());
    ~DeviceCopyStream();
    DeviceCopyStream(const DeviceCopyStream&) = delete;
    DeviceCopyStream& operator=(const DeviceCopyStream&) = delete;

    c10::Device device() const { return device_; }

    // Whether copies run while the host goes on.
    bool is_async() const { return stream_.has_value(); }

    size_t slab_bytes() const { return slab_bytes_; }

    // The slabs; their numbers stay what they are.
    size_t size() const { return slabs_.size(); }
    uint8_t* data(size_t slab) const { return static_cast<uint8_t*>(slabs_[slab].memory.mutable_data_ptr()); }
    const c10::Storage& storage(size_t slab) const { return slabs_[slab].memory.storage(); }

    // Adds a slab, if this transfer is worth another; whether it did.
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
            // The copies before what failed are under way.
            record_if_possible(slab);
            throw;
        }
    }

    // Whether copies can begin: on the caller's stream, each would have the host wait for all that is queued there.
    bool is_ready() const { return !before_ || before_->query(); }

    // Whether the slab may be written to.
    bool is_idle(size_t slab) const { return slabs_[slab].is_idle(); }

    // From here on, what the caller's stream has to do comes after the copies that are under way.
    void join();

    // The same; there are no more copies.
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
    // Where copies run on the caller's stream: passes once what is queued there is done; none where there are no
    // events.
    std::optional<c10::Event> before_;
    // The caller's stream, and the one of the copies; none where copies are done at once.
    std::optional<c10::Stream> current_;
    std::optional<c10::Stream> stream_;
    std::vector<Slab> slabs_;
    // Slabs to come, once the copies of earlier transfers are done.
    std::vector<Slab> busy_;
    // Whether there may be more to be had.
    bool may_pin_ = true;
};

}  // namespace safetensors_torch::layer
