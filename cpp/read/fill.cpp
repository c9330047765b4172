#include "cpp/read/fill.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "cpp/compat.h"
#include "cpp/dtype.h"
#include "cpp/error.h"

namespace safetensors_torch::layer {
namespace {

// Returns the ranges of a slice, in torch's elements.
std::vector<core::Range> ranges_of(const std::string& name, const std::vector<int64_t>& starts,
                                   const at::Tensor& target) {
    if (static_cast<int64_t>(starts.size()) != target.dim()) {
        fail(ErrorCategory::value, "tensor " + repr(name) + ": " + std::to_string(starts.size()) +
                                       " starts for a target with " + std::to_string(target.dim()) + " dimension(s)");
    }
    std::vector<core::Range> ranges;
    ranges.reserve(starts.size());
    for (size_t dim = 0; dim < starts.size(); ++dim) {
        if (starts[dim] < 0) {
            fail(ErrorCategory::value,
                 "tensor " + repr(name) + ": a slice cannot start at " + std::to_string(starts[dim]));
        }
        const auto start = static_cast<uint64_t>(starts[dim]);
        ranges.push_back({start, start + static_cast<uint64_t>(target.size(static_cast<int64_t>(dim))), 1});
    }
    return ranges;
}

void check_target(const std::string& name, const at::Tensor& target) {
    if (target.is_meta()) {
        fail(ErrorCategory::runtime,
             "Cannot load into " + repr(name) + ": it is on the meta device and has no memory; give it memory first");
    }
    check_whole(name, target);
}

// Returns whether the core can read the slice to the target's memory.
bool is_direct(const core::File& file, size_t index, const SlicePlan& slice, const at::Tensor& target) {
    if (!target.is_cpu() || target.layout() != at::kStrided || target.is_conj() || target.is_neg() ||
        target.scalar_type() != slice.type || !has_memory(target)) {
        return false;
    }
    const at::IntArrayRef strides = target.strides();
    return target.is_contiguous() ||
           file.takes_strides(index, {slice.ranges.data(), slice.ranges.size()}, {strides.data(), strides.size()});
}

}  // namespace

FillLoader::FillLoader(SharedCheckpoint checkpoint, const StorageSharing& sharing, std::vector<std::string> names,
                       const std::vector<std::vector<int64_t>>& starts, std::vector<at::Tensor> targets)
    : checkpoint_(std::move(checkpoint)), names_(std::move(names)), targets_(std::move(targets)) {
    if (names_.size() != targets_.size() || names_.size() != starts.size()) {
        fail(ErrorCategory::value, "give one name, one list of starts and one target for each slice");
    }
    const auto& files = checkpoint_->files();
    std::vector<std::vector<core::SliceRequest>> requests(files.size());
    std::vector<std::vector<core::Range>> ranges(files.size());
    std::vector<std::vector<int64_t>> strides(files.size());
    memory_.reserve(targets_.size());
    for (size_t i = 0; i < targets_.size(); ++i) {
        const at::Tensor& target = targets_[i];
        check_target(names_[i], target);
        const core::TensorLocation place = checkpoint_->find(names_[i]);
        const core::File& file = checkpoint_->file(place);
        std::vector<core::Range> torch_ranges = ranges_of(names_[i], starts[i], target);
        const SlicePlan slice = plan_slice(file, place.index, torch_ranges);
        check_conversion(slice.type, target.scalar_type(), file.name(place.index));
        const uint64_t nbytes = c10::multiply_integers(slice.shape) * c10::elementSize(slice.type);
        total_ += nbytes;
        if (nbytes != 0 && is_direct(file, place.index, slice, target)) {
            std::vector<core::Range>& list = ranges[place.shard];
            // Copies copy-on-write memory here, on the caller's thread.
            auto* memory = static_cast<uint8_t*>(target.mutable_data_ptr());
            requests[place.shard].push_back(
                {place.index, list.size(), slice.ranges.size(), memory, span_bytes(target), !target.is_contiguous()});
            list.insert(list.end(), slice.ranges.begin(), slice.ranges.end());
            strides[place.shard].insert(strides[place.shard].end(), target.strides().begin(), target.strides().end());
        } else if (nbytes != 0) {
            rest_.push_back({i, place, std::move(torch_ranges), nbytes});
        }
        memory_.emplace_back(target);
    }
    for (size_t shard = 0; shard < files.size(); ++shard) {
        if (requests[shard].empty()) {
            continue;
        }
        auto reading = (*files[shard])
                           ->read_slices({requests[shard].data(), requests[shard].size()},
                                         {ranges[shard].data(), ranges[shard].size()},
                                         {strides[shard].data(), strides[shard].size()}, sharing.read_from);
        if (reading_) {
            (*reading_)->append(std::move(reading));
        } else {
            reading_ = std::move(reading);
        }
        ++parts_;
    }
}

bool FillLoader::advance(Deadline until) {
    const at::NoGradGuard no_grad;
    if (!std::exchange(started_, true)) {
        std::for_each(targets_.begin(), targets_.end(), note_write);
    }
    for (size_t i = 0; i < targets_.size(); ++i) {
        memory_[i].check(names_[i], targets_[i]);
    }
    if (reading_ && !(*reading_)->advance(until.milliseconds_left())) {
        return false;
    }
    while (next_rest_ < rest_.size()) {
        if (!load_and_copy(rest_[next_rest_], until) || (++next_rest_ < rest_.size() && until.passed())) {
            return false;
        }
    }
    return true;
}

// Loads a slice to the target's device, and copies it there.
bool FillLoader::load_and_copy(const Rest& rest, Deadline until) {
    const at::Tensor& target = targets_[rest.target];
    if (loader_ == nullptr) {
        loader_ = std::make_unique<SliceLoader>(checkpoint_->files()[rest.place.shard], rest.place.index, rest.ranges,
                                                target.device());
    }
    if (!loader_->advance(until)) {
        return false;
    }
    target.copy_(loader_->tensor());
    loader_.reset();
    done_rest_ += rest.nbytes;
    return true;
}

uint64_t FillLoader::done_bytes() const {
    uint64_t bytes = done_rest_;
    for (size_t part = 0; part < parts_; ++part) {
        bytes += (*reading_)->done_bytes(part);
    }
    return bytes;
}

}  // namespace safetensors_torch::layer
