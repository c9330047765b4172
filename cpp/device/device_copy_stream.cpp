#include "cpp/device/device_copy_stream.h"

#include <ATen/Context.h>
#include <ATen/DeviceAccelerator.h>
#include <ATen/ops/empty.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <exception>
#include <map>
#include <mutex>
#include <string>

#include "cpp/fork.h"

namespace safetensors_torch::layer {
namespace {

// With fewer slabs, reading and copying wait for each other.
constexpr size_t kFewestSlabs = 2;

// How many are pinned first.
constexpr size_t kFirstSlabs = 4;

// More pageable memory is not faster.
constexpr size_t kMostPlainSlabs = 8;

// The alignment of parts in a slab; larger than the gaps between the parts of a small file.
constexpr uint64_t kAlignment = 4096;

// Only torch's current accelerator has streams and pinned memory.
bool is_accelerator(c10::DeviceType type) { return at::getAccelerator() == type; }

// Streams of earlier transfers: a device has a few, which torch hands out round robin.
class Streams {
  public:
    // Fails if the device has no streams.
    c10::Stream take(c10::Device device) {
        const std::lock_guard<std::mutex> lock(mutex_);
        auto& waiting = waiting_[device.str()];
        if (waiting.empty()) {
            return c10::impl::VirtualGuardImpl(device.type()).getStreamFromGlobalPool(device);
        }
        const c10::Stream stream = waiting.back();
        waiting.pop_back();
        return stream;
    }

    void give(c10::Stream stream) {
        const std::lock_guard<std::mutex> lock(mutex_);
        waiting_[stream.device().str()].push_back(stream);
    }

    static Streams& of_process();

    void before_fork() { mutex_.lock(); }
    void after_fork(bool /*is_child*/) noexcept { mutex_.unlock(); }

  private:
    std::mutex mutex_;
    std::map<std::string, std::vector<c10::Stream>> waiting_;
};

// Never destroyed, as the pool is not.
Streams& streams = *new Streams;
[[maybe_unused]] const bool streams_are_for_all_forks = for_all_forks<Streams>();

Streams& Streams::of_process() { return streams; }

}  // namespace

c10::Stream take_stream(c10::Device device) { return Streams::of_process().take(device); }

void give_stream(c10::Stream stream) { Streams::of_process().give(stream); }

size_t used_slab_bytes(uint64_t bytes) { return std::min<uint64_t>(kSlabBytes, (bytes / kAlignment + 2) * kAlignment); }

DeviceCopyStream::DeviceCopyStream(c10::Device device, uint64_t bytes, size_t most_slabs)
    : device_(device), bytes_(bytes), most_slabs_(most_slabs) {
    try {
        if (begin_async()) {
            if (take_pinned()) {
                return;
            }
            give_back();
            give_stream(*stream_);
            stream_.reset();
        }
        begin_plain();
    } catch (...) {
        abandon(slabs_);
        abandon(busy_);
        throw;
    }
}

DeviceCopyStream::~DeviceCopyStream() {
    try {
        finish();
        give_back();
        if (!device_.is_cpu()) {
            PinnedPool::of_process().note_moved(bytes_);
        }
        if (stream_) {
            give_stream(*stream_);
        }
    } catch (const std::exception& error) {
        // The device has failed, which its user has seen.
        TORCH_WARN("safetensors_torch: a transfer could not be ended in order: ", error.what());
        abandon(slabs_);
        abandon(busy_);
    }
}

// Sets up the stream of the copies; returns false if the device has none.
bool DeviceCopyStream::begin_async() {
    if (bytes_ == 0 || device_.is_cpu() || !is_accelerator(device_.type()) ||
        transfer_options().pinned_pool_bytes == 0) {
        return false;
    }
    try {
        current_ = c10::impl::VirtualGuardImpl(device_.type()).getStream(device_);
        c10::Event ready(device_.type());
        ready.record(*current_);
        // Fails while the stream is captured into a graph, before the copy stream joins the capture.
        ready.query();
        const c10::Stream stream = take_stream(device_);
        // Queued work of the caller may still use freed memory that the destinations now have, or write the sources.
        ready.block(stream);
        stream_ = stream;
        return true;
    } catch (const c10::Error&) {
        return false;
    }
}

void DeviceCopyStream::begin_plain() {
    slab_bytes_ = used_slab_bytes(bytes_);
    grow();
    if (device_.is_cpu()) {
        return;
    }
    try {
        c10::Event before(device_.type());
        before.record(c10::impl::VirtualGuardImpl(device_.type()).getStream(device_));
        before_ = std::move(before);
    } catch (const c10::Error&) {
        // Without events, the first copy waits.
    }
}

// Takes pinned slabs; returns whether there are, or will be, enough.
bool DeviceCopyStream::take_pinned() {
    const size_t wanted = std::min<uint64_t>((bytes_ + kSlabBytes - 1) / kSlabBytes, most_slabs_);
    PinnedPool& pool = PinnedPool::of_process();
    slabs_ = pool.take(wanted);
    if (size() < std::min(wanted, kFewestSlabs)) {
        busy_ = pool.take_busy(wanted - size());
    }
    const size_t found = size() + busy_.size();
    if (found >= std::min(wanted, kFewestSlabs)) {
        return true;
    }
    const size_t missing = std::min(wanted, kFirstSlabs) - found;
    if (!pool.is_worth(missing, bytes_)) {
        return false;
    }
    for (size_t i = 0; i < missing; ++i) {
        if (!grow()) {
            return size() + busy_.size() >= kFewestSlabs;
        }
    }
    return true;
}

bool DeviceCopyStream::add(std::optional<Slab> slab) {
    if (slab) {
        slabs_.push_back(std::move(*slab));
    }
    return slab.has_value();
}

bool DeviceCopyStream::grow() {
    if (size() >= most_slabs_ || (size() > 0 && size() * slab_bytes_ >= bytes_)) {
        return false;
    }
    if (!stream_) {
        if (size() == kMostPlainSlabs) {
            return false;
        }
        const auto options = at::TensorOptions().dtype(at::kByte).device(at::kCPU).pinned_memory(false);
        return add(Slab{at::empty({static_cast<int64_t>(slab_bytes_)}, options), std::nullopt});
    }
    const auto idle = std::find_if(busy_.begin(), busy_.end(), [](const Slab& slab) { return slab.is_idle(); });
    if (idle != busy_.end()) {
        slabs_.push_back(std::move(*idle));
        busy_.erase(idle);
        return true;
    }
    PinnedPool& pool = PinnedPool::of_process();
    if (auto waiting = pool.take(1); !waiting.empty()) {
        return add(std::move(waiting.front()));
    }
    if (!may_pin_ || !pool.is_worth(1, bytes_)) {
        return false;
    }
    const c10::DeviceGuard on_device(device_);
    may_pin_ = add(pool.pin());
    return may_pin_;
}

void DeviceCopyStream::record(size_t slab) {
    auto& copied = slabs_[slab].copied;
    // An event belongs to the device on which it was recorded first.
    if (!copied || copied->device() != device_) {
        copied.emplace(device_.type());
    }
    copied->record(*stream_);
}

void DeviceCopyStream::record_if_possible(size_t slab) noexcept {
    try {
        record(slab);
    } catch (const std::exception&) {
        // The first error is being thrown.
        std::vector<Slab> lost;
        lost.push_back(std::move(slabs_[slab]));
        slabs_[slab] = Slab{};
        abandon(lost);
    }
}

// Leaks slabs that a failed device may still use.
void DeviceCopyStream::abandon(std::vector<Slab>& slabs) noexcept {
    if (stream_) {
        const auto lost =
            std::count_if(slabs.begin(), slabs.end(), [](const Slab& slab) { return slab.memory.defined(); });
        PinnedPool::of_process().forget(static_cast<size_t>(lost));
        static_cast<void>(new std::vector<Slab>(std::move(slabs)));
    }
    slabs.clear();
}

void DeviceCopyStream::join() {
    if (current_ && stream_) {
        c10::Event done(device_.type());
        done.record(*stream_);
        done.block(*current_);
    }
}

void DeviceCopyStream::finish() {
    join();
    current_.reset();
}

void DeviceCopyStream::give_back() {
    for (auto* slabs : {&slabs_, &busy_}) {
        while (stream_ && !slabs->empty()) {
            Slab slab = std::move(slabs->back());
            slabs->pop_back();
            if (slab.memory.defined()) {
                PinnedPool::of_process().give(std::move(slab));
            }
        }
    }
}

}  // namespace safetensors_torch::layer
