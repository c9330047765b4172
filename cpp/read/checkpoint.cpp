#include "cpp/read/checkpoint.h"

#include <algorithm>
#include <tuple>
#include <utility>

#include "cpp/error.h"

namespace safetensors_torch::layer {

Checkpoint::Checkpoint(rust::Box<core::Checkpoint> checkpoint) : checkpoint_(std::move(checkpoint)) {
    for (size_t shard = 0; shard < (*checkpoint_)->shard_count(); ++shard) {
        files_.push_back(std::make_shared<const rust::Box<core::File>>((*checkpoint_)->shard_file(shard)));
    }
}

std::vector<std::string> Checkpoint::file_names() const {
    std::vector<std::string> names;
    for (size_t shard = 0; checkpoint_ && shard < files_.size(); ++shard) {
        names.emplace_back((*checkpoint_)->shard_name(shard));
    }
    return names;
}

size_t Checkpoint::count() const { return checkpoint_ ? (*checkpoint_)->count() : (*files_.front())->count(); }

bool Checkpoint::contains(const std::string& name) const {
    return checkpoint_ ? (*checkpoint_)->contains(as_bytes(name)) : (*files_.front())->contains(as_bytes(name));
}

core::Place Checkpoint::find(const std::string& name) const {
    return checkpoint_ ? (*checkpoint_)->find(as_bytes(name)) : core::Place{0, (*files_.front())->find(as_bytes(name))};
}

std::vector<core::Place> Checkpoint::sorted_by_name() const {
    std::vector<core::Place> places;
    places.reserve(count());
    if (checkpoint_) {
        const auto sorted = (*checkpoint_)->sorted_by_name();
        places.assign(sorted.begin(), sorted.end());
        return places;
    }
    for (const uint32_t index : (*files_.front())->sorted_by_name()) {
        places.push_back({0, index});
    }
    return places;
}

std::vector<core::Place> Checkpoint::in_file_order() const {
    // Files may hold tensors that are not the checkpoint's.
    std::vector<std::vector<bool>> is_listed;
    for (const SharedFile& file : files_) {
        is_listed.emplace_back((*file)->count());
    }
    for (const core::Place& place : sorted_by_name()) {
        is_listed[place.shard][place.index] = true;
    }
    std::vector<core::Place> places;
    places.reserve(count());
    for (size_t shard = 0; shard < files_.size(); ++shard) {
        for (size_t index = 0; index < is_listed[shard].size(); ++index) {
            if (is_listed[shard][index]) {
                places.push_back({shard, index});
            }
        }
    }
    return places;
}

CheckpointLoader::CheckpointLoader(const Checkpoint& checkpoint, const StorageSharing& lender,
                                   const std::vector<core::Place>& places, Target target) {
    std::vector<std::vector<size_t>> indices(checkpoint.files().size());
    order_.reserve(places.size());
    if (indices.size() == 1) {
        indices.front().reserve(places.size());
    }
    for (const core::Place& place : places) {
        order_.push_back({place.shard, indices[place.shard].size()});
        indices[place.shard].push_back(place.index);
    }
    loaders_.reserve(indices.size());
    for (size_t shard = 0; shard < indices.size(); ++shard) {
        loaders_.emplace_back(checkpoint.files()[shard], lender, std::move(indices[shard]), target);
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

CheckpointLoader load_all(const Checkpoint& checkpoint, const StorageSharing& lender, Target target,
                          const std::optional<std::vector<std::string>>& names) {
    if (!names) {
        return {checkpoint, lender, checkpoint.in_file_order(), target};
    }
    const auto rank = [](const core::Place& place) { return std::tuple(place.shard, place.index); };
    std::vector<core::Place> places;
    places.reserve(names->size());
    for (const std::string& name : *names) {
        places.push_back(checkpoint.find(name));
    }
    std::sort(places.begin(), places.end(), [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
    const auto end =
        std::unique(places.begin(), places.end(), [&](const auto& a, const auto& b) { return rank(a) == rank(b); });
    places.erase(end, places.end());
    return {checkpoint, lender, places, target};
}

void Checkpoint::prefault(bool wait) const {
    checkpoint_ ? (*checkpoint_)->prefault(wait) : (*files_.front())->prefault(wait);
}

CheckpointLoader load_file(const std::string& path, Target target, const std::string& backend,
                           std::optional<bool> prefault, const std::optional<std::vector<std::string>>& names) {
    const Checkpoint checkpoint(open_file(path, backend));
    // What goes to a device is read, and a few tensors of many are better left to the touch.
    if (prefault.value_or(!names.has_value()) && target.device.is_cpu()) {
        checkpoint.prefault(/*wait=*/prefault.has_value());
    }
    return load_all(checkpoint, StorageSharing{backend == "mmap", {}}, target, names);
}

std::vector<at::Tensor> tensors_of(CheckpointLoader& loads) {
    loads.advance(Deadline::never());
    std::vector<at::Tensor> tensors;
    tensors.reserve(loads.size());
    for (size_t i = 0; i < loads.size(); ++i) {
        tensors.push_back(loads.tensor(i));
    }
    return tensors;
}

Tensors dict_of(CheckpointLoader& loads) {
    loads.advance(Deadline::never());
    Tensors tensors;
    tensors.reserve(loads.size());
    for (size_t i = 0; i < loads.size(); ++i) {
        tensors.insert(loads.name(i), loads.tensor(i));
    }
    return tensors;
}

Lists lists_of(CheckpointLoader& loads) {
    std::vector<std::string> names;
    names.reserve(loads.size());
    for (size_t i = 0; i < loads.size(); ++i) {
        names.push_back(loads.name(i));
    }
    return {std::move(names), tensors_of(loads)};
}

}  // namespace safetensors_torch::layer
