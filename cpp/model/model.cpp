#include "cpp/model/model.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/copy.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <map>
#include <unordered_set>
#include <utility>

#include "cpp/compat.h"
#include "cpp/dtype.h"
#include "cpp/error.h"
#include "cpp/write/aliasing.h"

namespace safetensors_torch::layer {
namespace {

std::string torch_size(c10::IntArrayRef shape) {
    std::string out;
    for (const int64_t dim : shape) {
        out += (out.empty() ? "" : ", ") + std::to_string(dim);
    }
    return "torch.Size([" + out + "])";
}

// load_state_dict accepts a 1-D tensor of one element for a scalar, for files from torch 0.3.
bool is_old_scalar(c10::IntArrayRef source, c10::IntArrayRef destination) {
    return destination.empty() && source.size() == 1 && source[0] == 1;
}

template <typename Matches>
void check_shapes(const Checkpoint& checkpoint, const Matches& matches, const std::string& class_name) {
    std::string faults;
    for (const auto& match : matches) {
        const auto shape = describe(checkpoint.file(match.place), match.place.index).second;
        const auto expected = match.destination.sizes();
        if (expected != c10::IntArrayRef(shape) && !is_old_scalar(shape, expected)) {
            faults += "\n\tsize mismatch for " + shortened(match.name) + ": copying a param with shape " +
                      torch_size(shape) + " from checkpoint, the shape in current model is " + torch_size(expected) +
                      ".";
        }
    }
    if (!faults.empty()) {
        fail(ErrorCategory::runtime, heading(class_name) + faults);
    }
}

void check_on_device(const NamedTensors& state) {
    for (const auto& [name, tensor] : state) {
        if (tensor.is_meta()) {
            fail(ErrorCategory::runtime,
                 "Cannot load into " + repr(name) +
                     ": it is on the meta device and has no memory. Give the model memory first (in "
                     "Python load it with assign=True)");
        }
    }
}

// Fails for tensors that torch refuses to copy into, and for storages that are too small, which torch does not check.
template <typename Matches>
void check_destinations(const Matches& matches, const std::string& class_name) {
    for (const auto& match : matches) {
        const at::Tensor& tensor = match.destination;
        const auto refuse = [&](const char* why) {
            fail(ErrorCategory::runtime, heading(class_name) + "\n\t" + shortened(match.name) + " " + why);
        };
        if (at::has_internal_overlap(tensor) == at::MemOverlap::Yes) {
            refuse(
                "is expanded: several of its elements are one place in memory, so that nothing can be loaded into it. "
                "Give it memory of its own with `.clone()`.");
        }
        if (tensor._is_zerotensor()) {
            refuse("is a zero tensor, which is immutable. Give it memory of its own with `.clone()`.");
        }
        if (tensor.is_inference() && !c10::InferenceMode::is_enabled()) {
            refuse(
                "is an inference tensor: in-place updates outside InferenceMode are not allowed. Load the model within "
                "InferenceMode, or `.clone()` the tensor outside of it.");
        }
        check_whole(match.name, tensor);
    }
}

template <typename Matches>
void check_conversions(const Checkpoint& checkpoint, const Matches& matches, const std::string& class_name) {
    for (const auto& match : matches) {
        const auto from = describe(checkpoint.file(match.place), match.place.index).first;
        const auto to = match.destination.scalar_type();
        if (const auto reason = why_not_convertible(from, to)) {
            fail(ErrorCategory::runtime, heading(class_name) + "\n\tdtype mismatch for " + shortened(match.name) +
                                             ": a param of " + dtype_name(from) +
                                             " from checkpoint cannot be copied into the " + dtype_name(to) +
                                             " of the current model: " + *reason);
        }
    }
}

}  // namespace

StateLoader::StateLoader(SharedCheckpoint shared_checkpoint, StorageSharing sharing, const Tensors& state,
                         const std::vector<std::string>& optional, const std::string& class_name, bool strict,
                         const std::string& prefix)
    : checkpoint_(std::move(shared_checkpoint)), sharing_(std::move(sharing)) {
    const Checkpoint& checkpoint = *checkpoint_;
    const NamedTensors tensors = to_pairs(state);
    check_on_device(tensors);
    std::unordered_set<std::string> in_file;
    for (const core::TensorLocation& place : checkpoint.in_file_order()) {
        std::string name = checkpoint.name(place);
        if (name.compare(0, prefix.size(), prefix) == 0) {
            in_file.insert(std::move(name));
        }
    }
    const auto dropped = tied_names(tensors, in_file);
    const std::unordered_set<std::string> may_be_absent(optional.begin(), optional.end());

    bool aliased = false;
    for (const auto& [name, tensor] : tensors) {
        const bool is_dropped = dropped.count(name) != 0;
        if (in_file.count(name) == 0) {
            if (!is_dropped && may_be_absent.count(name) == 0) {
                mismatch_.first.push_back(name);
            }
            continue;
        }
        // A file with both of two tied names was not saved from a model in which they are tied.
        if (is_dropped) {
            mismatch_.second.push_back(name);
            aliased = true;
        }
        matches_.push_back({checkpoint.find(name), name, tensor});
        in_file.erase(name);
    }
    mismatch_.second.insert(mismatch_.second.end(), in_file.begin(), in_file.end());
    std::sort(mismatch_.first.begin(), mismatch_.first.end());
    std::sort(mismatch_.second.begin(), mismatch_.second.end());

    check_destinations(matches_, class_name);
    check_shapes(checkpoint, matches_, class_name);
    check_conversions(checkpoint, matches_, class_name);
    if (strict) {
        check_names(mismatch_, class_name, prefix);
    }
    plan(aliased);
}

// Decides how each tensor is filled. With `aliased`, the file has several tensors for one memory: they are copied one
// after the other, so that the last one counts.
void StateLoader::plan(bool aliased) {
    const auto& files = checkpoint_->files();
    std::vector<std::vector<core::Request>> requests(files.size());
    std::map<std::pair<std::string, size_t>, std::vector<Destination>> groups;
    for (Match& match : matches_) {
        const at::Tensor& tensor = match.destination;
        const core::File& file = checkpoint_->file(match.place);
        const size_t index = match.place.index;
        const uint64_t nbytes = file.nbytes(index);
        total_ += nbytes;
        if (has_memory(tensor)) {
            // Copies copy-on-write memory here, on the caller's stream.
            tensor.mutable_data_ptr();
        }
        memory_.emplace_back(tensor);
        if (aliased || !takes_bytes(match)) {
            rest_.push_back(match);
        } else if (!tensor.is_cpu()) {
            groups[{tensor.device().str(), match.place.shard}].push_back({index, describe(file, index).first, tensor});
        } else {
            requests[match.place.shard].push_back({index, static_cast<uint8_t*>(tensor.mutable_data_ptr()), nbytes});
        }
    }
    for (size_t shard = 0; shard < files.size(); ++shard) {
        auto reading = (*files[shard])->read({requests[shard].data(), requests[shard].size()}, sharing_.read_from);
        if (reading_) {
            (*reading_)->append(std::move(reading));
        } else {
            reading_ = std::move(reading);
        }
    }
    for (auto& [key, destinations] : groups) {
        groups_.push_back({key.second, std::move(destinations)});
    }
}

// Returns whether the file's bytes can be copied directly to the tensor's memory.
bool StateLoader::takes_bytes(const Match& match) const {
    const auto [type, shape] = describe(checkpoint_->file(match.place), match.place.index);
    const at::Tensor& tensor = match.destination;
    return tensor.layout() == at::kStrided && tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg() &&
           tensor.sizes() == c10::IntArrayRef(shape) && (tensor.numel() == 0 ? tensor.is_cpu() : has_memory(tensor)) &&
           (!tensor.is_cpu() || tensor.scalar_type() == type);
}

bool StateLoader::advance(Deadline until) {
    const at::NoGradGuard no_grad;
    if (!std::exchange(started_, true)) {
        std::for_each(matches_.begin(), matches_.end(), [](const Match& match) { note_write(match.destination); });
    }
    for (size_t i = 0; i < matches_.size(); ++i) {
        memory_[i].check(matches_[i].name, matches_[i].destination);
    }
    // A checkpoint may have no files.
    if (reading_ && !(*reading_)->advance(until.milliseconds_left())) {
        return false;
    }
    for (; next_group_ < groups_.size(); ++next_group_) {
        if (upload_ == nullptr) {
            const Group& group = groups_[next_group_];
            upload_ =
                std::make_unique<Upload>(checkpoint_->files()[group.shard], group.destinations, sharing_.read_from);
        }
        if (!upload_->advance(until)) {
            return false;
        }
        done_ += upload_->done_bytes();
        upload_.reset();
    }
    while (next_rest_ < rest_.size()) {
        if (!load_and_copy(rest_[next_rest_], until) || (++next_rest_ < rest_.size() && until.passed())) {
            return false;
        }
    }
    return true;
}

// Loads a tensor to the device of the destination and copies it; returns false if the deadline has passed before.
bool StateLoader::load_and_copy(const Match& match, Deadline until) {
    if (loader_ == nullptr) {
        const Target target{match.destination.device(), {}};
        const SharedFile& file = checkpoint_->files()[match.place.shard];
        loader_ = std::make_unique<Loader>(file, sharing_, std::vector<size_t>{match.place.index}, target);
    }
    if (!loader_->advance(until)) {
        return false;
    }
    at::Tensor loaded = loader_->tensor(0);
    loader_.reset();
    if (is_old_scalar(loaded.sizes(), match.destination.sizes())) {
        loaded = loaded.select(0, 0);
    }
    if (loaded.is_cpu()) {
        // A failed read is an error here; touching the page would end the process.
        checkpoint_->file(match.place).prefault_tensor(match.place.index);
    }
    match.destination.copy_(loaded);
    done_ += checkpoint_->file(match.place).nbytes(match.place.index);
    return true;
}

uint64_t StateLoader::done_bytes() const {
    uint64_t read = 0;
    for (size_t shard = 0; shard < checkpoint_->files().size(); ++shard) {
        read += (*reading_)->done_bytes(shard);
    }
    return done_ + read + (upload_ ? upload_->done_bytes() : 0);
}

}  // namespace safetensors_torch::layer
