#include "cpp/route.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/ops/empty.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <exception>

namespace safetensors_torch {
namespace {

// Pinning memory takes the system about a millisecond for each MiB, thirty times as long as copying as much over the
// bus. So a transfer pins at most this part of what it moves.
constexpr uint64_t kPinnedPart = 16;

// With fewer slabs, either reading or copying would always wait for the other.
constexpr size_t kFewestSlabs = 2;

// Plain memory is no faster for being more.
constexpr size_t kMostPlainSlabs = 8;

// What parts of a slab are aligned to, and more than the gaps between the parts of a small file take.
constexpr uint64_t kAlignment = 4096;

// Streams and pinned memory belong to torch's accelerator; what else there may be goes without.
bool is_accelerator(c10::DeviceType type) { return at::getAccelerator() == type; }

// Gives up a slab that a device which has failed may use at any time: it is nobody's any more, and never freed.
void abandon(Slab& slab) { static_cast<void>(new Slab(std::move(slab))); }

}  // namespace

Route::Route(c10::Device device, uint64_t bytes) : device_(device), bytes_(bytes) {
    if (begin_async()) {
        if (take_pinned()) {
            return;
        }
        give_back();
        stream_.reset();
    }
    begin_plain();
}

Route::~Route() {
    try {
        finish();
        give_back();
    } catch (const c10::Error& error) {
        // The device has failed, and told whoever used it.
        TORCH_WARN("safetensors_torch: a transfer could not be ended in order: ", error.what_without_backtrace());
        std::for_each(slabs_.begin(), slabs_.end(), abandon);
    }
}

// Sets up the stream of the copies; false where the device has no such thing.
bool Route::begin_async() {
    if (bytes_ == 0 || !is_accelerator(device_.type()) || transfer_options().ring_bytes == 0) {
        return false;
    }
    try {
        const c10::impl::VirtualGuardImpl guard(device_.type());
        current_ = guard.getStream(device_);
        const c10::Stream stream = guard.getStreamFromGlobalPool(device_);
        // What the caller has queued may still use the memory of tensors that were freed, and that the destinations
        // got, or write the tensors that are the sources.
        c10::Event ready(device_.type());
        ready.record(*current_);
        ready.block(stream);
        stream_ = stream;
        return true;
    } catch (const c10::Error&) {
        return false;
    }
}

void Route::begin_plain() {
    slab_bytes_ = std::min<uint64_t>(kSlabBytes, (bytes_ / kAlignment + 2) * kAlignment);
    grow();
    if (device_.is_cpu()) {
        return;
    }
    try {
        c10::Event before(device_.type());
        before.record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
        before_ = std::move(before);
    } catch (const c10::Error&) {
        // A device without events: the first copy waits.
    }
}

// Whether there are enough pinned slabs for a beginning.
bool Route::take_pinned() {
    const size_t wanted = (bytes_ + kSlabBytes - 1) / kSlabBytes;
    for (Slab& slab : Ring::of_process().take(wanted)) {
        add(std::move(slab));
    }
    while (size() < std::min(wanted, kFewestSlabs)) {
        if (!grow()) {
            return false;
        }
    }
    return true;
}

bool Route::add(std::optional<Slab> slab) {
    if (slab) {
        slabs_.push_back(std::move(*slab));
    }
    return slab.has_value();
}

bool Route::grow() {
    if (size() > 0 && size() * slab_bytes_ >= bytes_) {
        return false;
    }
    if (!stream_) {
        if (size() == kMostPlainSlabs) {
            return false;
        }
        const auto options = at::TensorOptions().dtype(at::kByte).device(at::kCPU).pinned_memory(false);
        return add(Slab{at::empty({static_cast<int64_t>(slab_bytes_)}, options), std::nullopt});
    }
    if (auto waiting = Ring::of_process().take(1); !waiting.empty()) {
        return add(std::move(waiting.front()));
    }
    if (!may_pin_ || (pinned_ + 1) * kSlabBytes * kPinnedPart > bytes_) {
        return false;
    }
    const c10::DeviceGuard on_device(device_);
    // Not asked for again once it was refused, which takes long.
    may_pin_ = add(Ring::of_process().pin());
    pinned_ += may_pin_ ? 1 : 0;
    return may_pin_;
}

void Route::record(size_t slab) {
    auto& copied = slabs_[slab].copied;
    // An event belongs to the device on which it was recorded first.
    if (!copied || copied->device() != device_) {
        copied.emplace(device_.type());
    }
    copied->record(*stream_);
}

void Route::record_if_possible(size_t slab) noexcept {
    try {
        record(slab);
    } catch (const std::exception&) {
        // What went wrong before is what counts, and is on its way.
        abandon(slabs_[slab]);
    }
}

void Route::finish() {
    if (current_ && stream_) {
        c10::Event done(device_.type());
        done.record(*stream_);
        done.block(*current_);
        current_.reset();
    }
}

void Route::give_back() {
    while (stream_ && !slabs_.empty()) {
        Slab slab = std::move(slabs_.back());
        slabs_.pop_back();
        if (slab.memory.defined()) {
            Ring::of_process().give(std::move(slab));
        }
    }
}

}  // namespace safetensors_torch
