#include "cpp/read/checkpoint_loader.h"

#include <algorithm>
#include <tuple>
#include <utility>

namespace safetensors_torch::layer {

CheckpointLoader::CheckpointLoader(const Checkpoint& checkpoint, const StorageSharing& sharing,
                                   const std::vector<core::TensorLocation>& places, Target target) {
    std::vector<std::vector<size_t>> indices(checkpoint.files().size());
    order_.reserve(places.size());
    if (indices.size() == 1) {
        indices.front().reserve(places.size());
    }
    for (const core::TensorLocation& place : places) {
        order_.push_back({place.shard, indices[place.shard].size()});
        indices[place.shard].push_back(place.index);
    }
    loaders_.reserve(indices.size());
    for (size_t shard = 0; shard < indices.size(); ++shard) {
        loaders_.emplace_back(checkpoint.files()[shard], sharing, std::move(indices[shard]), target);
    }
    // One read of all files keeps the threads busy from one to the next.
    Loader* first = nullptr;
    for (Loader& loader : loaders_) {
        if (first == nullptr && loader.reads()) {
            first = &loader;
        } else if (first != nullptr) {
            loader.join(*first);
        }
    }
}

bool CheckpointLoader::advance(Deadline until) {
    for (; next_ < loaders_.size(); ++next_) {
        if (!loaders_[next_].advance(until)) {
            return false;
        }
    }
    return true;
}

uint64_t CheckpointLoader::total_bytes() const {
    uint64_t bytes = 0;
    for (const Loader& loader : loaders_) {
        bytes += loader.total_bytes();
    }
    return bytes;
}

uint64_t CheckpointLoader::done_bytes() const {
    uint64_t bytes = 0;
    for (const Loader& loader : loaders_) {
        bytes += loader.done_bytes();
    }
    return bytes;
}

namespace {

// Returns the places of `names` in the order of the files, each once.
std::vector<core::TensorLocation> places_of(const Checkpoint& checkpoint, const std::vector<std::string>& names) {
    const auto rank = [](const core::TensorLocation& place) { return std::tuple(place.shard, place.index); };
    std::vector<core::TensorLocation> places;
    places.reserve(names.size());
    for (const std::string& name : names) {
        places.push_back(checkpoint.find(name));
    }
    std::sort(places.begin(), places.end(), [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
    const auto end =
        std::unique(places.begin(), places.end(), [&](const auto& a, const auto& b) { return rank(a) == rank(b); });
    places.erase(end, places.end());
    return places;
}

}  // namespace

CheckpointLoader load_all(const Checkpoint& checkpoint, const StorageSharing& sharing, Target target,
                          const Selection& selection) {
    const auto& [names, prefault] = selection;
    const auto places = names ? places_of(checkpoint, *names) : checkpoint.in_file_order();
    // Tensors of a device are read, not mapped; a few of many are better left to demand paging.
    if (sharing.is_enabled && !sharing.owner.defined() && target.device.is_cpu() &&
        prefault.value_or(!names.has_value())) {
        checkpoint.prefault(/*wait=*/prefault.has_value());
    }
    return {checkpoint, sharing, places, target};
}

std::vector<at::Tensor> tensors_of(CheckpointLoader& loader) {
    loader.advance(Deadline::never());
    std::vector<at::Tensor> tensors;
    tensors.reserve(loader.size());
    for (size_t i = 0; i < loader.size(); ++i) {
        tensors.push_back(loader.tensor(i));
    }
    return tensors;
}

Tensors dict_of(CheckpointLoader& loader) {
    loader.advance(Deadline::never());
    Tensors tensors;
    tensors.reserve(loader.size());
    for (size_t i = 0; i < loader.size(); ++i) {
        tensors.insert(loader.name(i), loader.tensor(i));
    }
    return tensors;
}

Lists lists_of(CheckpointLoader& loader) {
    std::vector<std::string> names;
    names.reserve(loader.size());
    for (size_t i = 0; i < loader.size(); ++i) {
        names.push_back(loader.name(i));
    }
    return {std::move(names), tensors_of(loader)};
}

}  // namespace safetensors_torch::layer
