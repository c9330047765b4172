#include "cpp/device/download.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <thread>
#include <utility>

#include "cpp/alias.h"
#include "cpp/error.h"
#include "cpp/tensor_memory.h"

namespace safetensors_torch::layer {
namespace {

// The most bytes of host memory that are written by one call: some hundredths of a second.
constexpr uint64_t kWriteBytes = uint64_t(64) << 20;

// Writing is slower than any bus: with more slabs, each leaves the processor's caches before it is written.
constexpr size_t kMostSlabs = 8;

// How long to sleep before the device is polled again.
constexpr auto kPoll = std::chrono::microseconds(20);

// Returns whether the bytes to write are contiguous in some memory.
bool is_verbatim(const at::Tensor& tensor) {
    return !tensor.is_conj() && !tensor.is_neg() && !tensor._is_zerotensor() && tensor.is_contiguous();
}

// Returns whether they are its bytes in a device's memory.
bool is_on_device(const at::Tensor& tensor) { return !tensor.is_cpu() && is_verbatim(tensor) && has_memory(tensor); }

// Copies the values of a tensor to host memory. Zero tensors need a clone, which has memory. Python subclasses of
// Tensor do not see the calls.
at::Tensor to_host(const at::Tensor& tensor) {
    const c10::impl::ExcludeDispatchKeyGuard no_python(c10::python_ks);
    const at::Tensor source = tensor._is_zerotensor() ? tensor.clone() : tensor;
    return source.to(at::kCPU).resolve_conj().resolve_neg().contiguous();
}

[[noreturn]] void explain(const c10::Error& error, const std::string& name, c10::Device device) {
    const std::string text =
        "tensor " + repr(name) + " cannot be copied from " + device.str() + ": " + error.what_without_backtrace();
    if (dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr) {
        throw c10::OutOfMemoryError(text, nullptr);
    }
    fail(category_of(error), text);
}

}  // namespace

bool is_on_host(const at::Tensor& tensor) { return tensor.is_cpu() && is_verbatim(tensor); }

Download::Download(const NamedTensors& tensors, const core::SavePlan& layout, std::unique_ptr<Sink> sink)
    : tensors_(tensors), layout_(layout), sink_(std::move(sink)) {
    std::map<std::string, std::pair<c10::Device, uint64_t>> devices;
    for (const auto& [name, tensor] : tensors_) {
        if (is_on_device(tensor)) {
            const auto entry = devices.try_emplace(tensor.device().str(), tensor.device(), 0).first;
            entry->second.second += tensor.nbytes();
        }
    }
    for (const auto& [name, use] : devices) {
        Source& source = sources_[name];
        source.copy_stream = std::make_unique<DeviceCopyStream>(use.first, use.second, kMostSlabs);
        for (size_t slab = 0; slab < source.copy_stream->size(); ++slab) {
            source.free.push_back(slab);
        }
    }
    const auto header = layout_.header();
    spans_.reserve(tensors_.size() + 1);
    spans_.push_back({header.data(), header.size(), nullptr, 0, /*is_header=*/true});
}

bool Download::advance(Deadline until) {
    const at::NoGradGuard no_grad;
    while (!finished_) {
        while (plan_more()) {
        }
        if (is_all_written() && place_ == tensors_.size()) {
            sink_->finish();
            finished_ = true;
            // The other files of a checkpoint need the slabs and the streams.
            sources_.clear();
            return true;
        }
        if (is_all_written() || (!write_some(until) && !grow_where_waiting())) {
            std::this_thread::sleep_for(kPoll);
        }
        if (until.passed()) {
            return false;
        }
    }
    return true;
}

// Plans the next tensor, part of it, or several; returns false if there is none, or no room.
bool Download::plan_more() {
    if (place_ == tensors_.size()) {
        return false;
    }
    const auto& [name, tensor] = tensors_[layout_.tensor(place_)];
    const uint64_t nbytes = layout_.nbytes(place_);
    if (nbytes == 0) {
        ++place_;
        return true;
    }
    if (is_on_device(tensor)) {
        return plan_slab(sources_.at(tensor.device().str()), tensor.device());
    }
    if (host_bytes_ >= kWriteBytes) {
        return false;
    }
    if (is_on_host(tensor)) {
        plan_host(tensor, name, nbytes, std::min(nbytes - offset_, kWriteBytes - host_bytes_));
        return true;
    }
    // A copy of the whole tensor, one at a time.
    if (copy_.defined()) {
        return false;
    }
    try {
        copy_ = to_host(tensor);
        plan_host(copy_, name, nbytes, nbytes);
    } catch (const c10::Error& error) {
        explain(error, name, tensor.device());
    }
    return true;
}

// Plans the next `length` bytes of a tensor of `nbytes` in host memory.
void Download::plan_host(const at::Tensor& host, const std::string& name, uint64_t nbytes, uint64_t length) {
    const auto* data = static_cast<const uint8_t*>(host.const_data_ptr());
    if (data == nullptr || host.nbytes() != nbytes) {
        fail(ErrorCategory::safetensor,
             "tensor " + repr(name) + " has no data that can be read: materialize it before saving");
    }
    spans_.push_back({data + offset_, length, nullptr, 0});
    host_bytes_ += length;
    move_on(length, nbytes);
}

// Queues copies of the next tensors, or of part of one, into a slab.
bool Download::plan_slab(Source& source, c10::Device device) {
    // If everything is written and no slab is free, all slabs are busy with earlier transfers: another is needed.
    const bool has_slab = !source.free.empty() || (is_all_written() && grow(source));
    if (!has_slab || !source.copy_stream->is_ready()) {
        return false;
    }
    DeviceCopyStream& copy_stream = *source.copy_stream;
    const size_t slab = source.free.back();
    source.free.pop_back();
    uint64_t filled = 0;
    copy_stream.run(slab, [&] {
        while (place_ < tensors_.size() && filled < copy_stream.slab_bytes()) {
            const auto& [name, tensor] = tensors_[layout_.tensor(place_)];
            const uint64_t nbytes = layout_.nbytes(place_);
            if (nbytes != 0 && (tensor.device() != device || !is_on_device(tensor))) {
                break;
            }
            const uint64_t length = std::min(nbytes - offset_, copy_stream.slab_bytes() - filled);
            if (length != 0) {
                const auto first = static_cast<uint64_t>(tensor.storage_offset()) * tensor.element_size() + offset_;
                const auto from = alias(tensor.storage(), at::kByte, first, length);
                try {
                    alias(copy_stream.storage(slab), at::kByte, filled, length).copy_(from, copy_stream.is_async());
                } catch (const c10::Error& error) {
                    explain(error, name, device);
                }
            }
            filled += length;
            move_on(length, nbytes);
        }
    });
    spans_.push_back({copy_stream.data(slab), filled, &source, slab});
    return true;
}

void Download::move_on(uint64_t length, uint64_t nbytes) {
    offset_ += length;
    if (offset_ == nbytes) {
        ++place_;
        offset_ = 0;
    }
}

// Writes the complete spans at the front of the plan; returns whether there were any.
bool Download::write_some(Deadline until) {
    std::vector<core::Piece> pieces;
    pieces.reserve(spans_.size() - next_span_);
    uint64_t bytes = 0;
    size_t end = next_span_;
    for (; end < spans_.size() && spans_[end].is_there() && bytes < kWriteBytes; ++end) {
        pieces.push_back({spans_[end].data, spans_[end].length});
        bytes += spans_[end].length;
    }
    if (pieces.empty()) {
        return false;
    }
    uint64_t written = sink_->write(pieces, until);
    if (written == 0) {
        return false;
    }
    done_ += written;
    for (; next_span_ < end; ++next_span_) {
        Span& span = spans_[next_span_];
        const uint64_t part = std::min(written, span.length);
        written -= part;
        if (span.source == nullptr && !span.is_header) {
            host_bytes_ -= part;
        }
        span.data += part;
        span.length -= part;
        if (span.length > 0) {
            break;
        }
        if (span.source != nullptr) {
            span.source->free.push_back(span.slab);
        }
    }
    if (is_all_written()) {
        spans_.clear();
        next_span_ = 0;
        copy_.reset();
    }
    return true;
}

// Adds a slab; returns whether it did.
bool Download::grow(Source& source) {
    if (!source.copy_stream->grow()) {
        return false;
    }
    source.free.push_back(source.copy_stream->size() - 1);
    return true;
}

// The same, if the next span waits for a device that has no free slab.
bool Download::grow_where_waiting() {
    Source* source = spans_[next_span_].source;
    return source != nullptr && source->free.empty() && grow(*source);
}

}  // namespace safetensors_torch::layer
