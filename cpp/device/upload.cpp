#include "cpp/device/upload.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <limits>
#include <string>
#include <thread>
#include <utility>

#include "cpp/alias.h"
#include "cpp/error.h"

namespace safetensors_torch::layer {
namespace {

// How long to wait for the next slab before copies are polled.
constexpr uint64_t kPollMicroseconds = 50;

// How long if no copy is running: long enough to cost nothing, and a filled slab ends it.
constexpr uint64_t kWaitMicroseconds = 100'000;

uint64_t total_of(const std::vector<Destination>& destinations) {
    uint64_t bytes = 0;
    for (const Destination& destination : destinations) {
        bytes += stored_bytes(destination.tensor.numel(), destination.stored);
    }
    return bytes;
}

c10::Device device_of(const std::vector<Destination>& destinations) {
    return destinations.empty() ? c10::Device(c10::kCPU) : destinations.front().tensor.device();
}

bool converts_any(const std::vector<Destination>& destinations) {
    const auto keeps_dtype = [](const Destination& one) { return one.tensor.scalar_type() == one.stored; };
    return !std::all_of(destinations.begin(), destinations.end(), keeps_dtype);
}

// Allocates device memory for the bytes of one part; undefined if nothing is converted on a device.
at::Tensor conversion_memory(c10::Device device, uint64_t total, bool converts) {
    if (device.is_cpu() || !converts) {
        return {};
    }
    const auto bytes = static_cast<int64_t>(std::min<uint64_t>(kSlabBytes, total));
    try {
        return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device));
    } catch (const c10::OutOfMemoryError& error) {
        throw c10::OutOfMemoryError(
            "memory to convert tensors in, of " + std::to_string(bytes) + " bytes: " + error.what_without_backtrace(),
            nullptr);
    }
}

// Returns the destinations in the order in which their file is read.
std::vector<Destination> in_file_order(std::vector<Destination> destinations) {
    std::sort(destinations.begin(), destinations.end(),
              [](const Destination& a, const Destination& b) { return a.index < b.index; });
    return destinations;
}

// Returns a prefetcher of whole tensors, or of a slice of one. Nothing is read before it has a slab.
SharedPrefetcher prefetch(const core::File& file, const std::vector<Destination>& destinations,
                          core::ReadFrom read_from, const std::vector<core::Range>* slice, uint64_t total) {
    constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();
    auto plan = core::plan_prefetch();
    for (const Destination& destination : destinations) {
        if (slice != nullptr) {
            plan->add_slice(file, destination.index, {slice->data(), slice->size()}, /*extra_bytes=*/0);
        } else {
            plan->add(file, destination.index, /*extra_bytes=*/0);
        }
    }
    return std::make_shared<const rust::Box<core::Prefetcher>>(
        plan->start_slabs(read_from, kNoLimit, kNoLimit, used_slab_bytes(total)));
}

}  // namespace

Upload::Upload(SharedFile file, std::vector<Destination> destinations, core::ReadFrom read_from)
    : Upload(std::move(file), std::move(destinations), read_from, nullptr) {}

Upload::Upload(SharedFile file, Destination destination, std::vector<core::Range> ranges)
    : Upload(std::move(file), {std::move(destination)}, core::ReadFrom::Mapping, &ranges) {}

Upload::Upload(SharedFile file, std::vector<Destination> destinations, core::ReadFrom read_from,
               const std::vector<core::Range>* slice)
    : file_(std::move(file)),
      destinations_(in_file_order(std::move(destinations))),
      total_(total_of(destinations_)),
      unconverted_(conversion_memory(device_of(destinations_), total_, converts_any(destinations_))),
      copy_stream_(device_of(destinations_), total_),
      prefetcher_(prefetch(**file_, destinations_, read_from, slice, total_)) {
    add_slabs();
}

Upload::Upload(SharedPrefetcher prefetcher, std::vector<Destination> destinations, c10::Device device, uint64_t total,
               bool converts)
    : destinations_(std::move(destinations)),
      total_(total),
      unconverted_(conversion_memory(device, total, converts)),
      copy_stream_(device, total),
      prefetcher_(std::move(prefetcher)) {
    add_slabs();
}

// The slabs return to their pool.
Upload::~Upload() { (*prefetcher_)->stop(); }

// Adds the missing slabs to the prefetcher.
void Upload::add_slabs() {
    for (; slabs_ < copy_stream_.size(); ++slabs_) {
        (*prefetcher_)->add_slab({copy_stream_.data(slabs_)});
    }
}

bool Upload::advance(Deadline until) {
    const bool is_done = copy_until(until);
    if (!is_done) {
        // The caller may free a destination before the next step; later work of its stream must wait for the copies.
        copy_stream_.join();
    }
    return is_done;
}

bool Upload::copy_until(Deadline until) {
    const at::NoGradGuard no_grad;
    while (!finished_) {
        if (!copy_stream_.is_ready()) {
            if (until.passed()) {
                return false;
            }
            std::this_thread::sleep_for(std::chrono::microseconds(kPollMicroseconds));
            continue;
        }
        take_back();
        if ((*prefetcher_)->is_starved() && copy_stream_.grow()) {
            add_slabs();
        }
        const bool may_grow = (*prefetcher_)->is_starved();
        const uint64_t wait = copying_.empty() && !may_grow ? kWaitMicroseconds : kPollMicroseconds;
        const core::NextSlab next = (*prefetcher_)->next_slab(std::min(wait, until.microseconds_left()));
        switch (next.state) {
            case core::SlabState::Filled:
                copy(next);
                break;
            case core::SlabState::NotReady:
                break;
            case core::SlabState::End:
                copy_stream_.finish();
                finished_ = true;
                break;
        }
        if (!finished_ && until.passed()) {
            return false;
        }
    }
    return true;
}

// Returns slabs whose copies are done to the prefetcher.
void Upload::take_back() {
    while (!copying_.empty() && copy_stream_.is_idle(copying_.front())) {
        (*prefetcher_)->release_slab(copying_.front());
        copying_.pop_front();
    }
}

void Upload::copy(const core::NextSlab& next) {
    copy_stream_.run(next.slab, [&] {
        for (const core::SlabPart& part : next.parts) {
            if (!destinations_[part.request].tensor.defined()) {
                allocate(part.request);
            }
            try {
                copy_part(part, next.slab);
            } catch (const std::exception& error) {
                explain(error, part.request);
            }
            done_ += part.length;
        }
        copied(next.parts);
    });
    copying_.push_back(next.slab);
}

void Upload::copy_part(const core::SlabPart& part, size_t slab) {
    const Destination& destination = destinations_[part.request];
    const auto to_type = destination.tensor.scalar_type();
    const c10::Storage& to = destination.tensor.storage();
    const auto start = static_cast<int64_t>(part.slab_offset);
    const auto length = static_cast<int64_t>(part.length);
    const bool non_blocking = copy_stream_.is_async();
    if (to_type == destination.stored) {
        const auto itemsize = static_cast<int64_t>(destination.tensor.element_size());
        const int64_t first = destination.tensor.storage_offset() * itemsize + static_cast<int64_t>(part.offset);
        alias(to, at::kByte, first, length)
            .copy_(alias(copy_stream_.storage(slab), at::kByte, start, length), non_blocking);
        return;
    }
    const auto itemsize = static_cast<int64_t>(c10::elementSize(destination.stored));
    const int64_t count = length / itemsize;
    const int64_t first = destination.tensor.storage_offset() + static_cast<int64_t>(part.offset) / itemsize;
    const at::Tensor converted = alias(to, to_type, first, count);
    if (copy_stream_.device().is_cpu()) {
        converted.copy_(alias(copy_stream_.storage(slab), destination.stored, start / itemsize, count));
        return;
    }
    const c10::Storage& bytes = unconverted_.storage();
    alias(bytes, at::kByte, 0, length).copy_(alias(copy_stream_.storage(slab), at::kByte, start, length), non_blocking);
    converted.copy_(alias(bytes, destination.stored, 0, count), non_blocking);
}

std::string Upload::name(size_t request) const { return std::string((*file_)->name(destinations_[request].index)); }

void Upload::explain(const std::exception& error, size_t request) const {
    const auto* of_torch = dynamic_cast<const c10::Error*>(&error);
    const std::string text = "tensor " + repr(name(request)) + " cannot be copied to " + copy_stream_.device().str() +
                             ": " + (of_torch != nullptr ? of_torch->what_without_backtrace() : error.what());
    if (dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr) {
        throw c10::OutOfMemoryError(text, nullptr);
    }
    fail(ErrorCategory::runtime, text);
}

}  // namespace safetensors_torch::layer
