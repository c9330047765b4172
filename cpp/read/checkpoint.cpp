#include "cpp/read/checkpoint.h"

#include <utility>

#include "cpp/bytes.h"

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

core::TensorLocation Checkpoint::find(const std::string& name) const {
    return checkpoint_ ? (*checkpoint_)->find(as_bytes(name))
                       : core::TensorLocation{0, (*files_.front())->find(as_bytes(name))};
}

std::vector<core::TensorLocation> Checkpoint::sorted_by_name() const {
    std::vector<core::TensorLocation> places;
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

std::vector<core::TensorLocation> Checkpoint::in_file_order() const {
    // Files may hold tensors that the index does not list.
    std::vector<std::vector<bool>> is_listed;
    for (const SharedFile& file : files_) {
        is_listed.emplace_back((*file)->count());
    }
    for (const core::TensorLocation& place : sorted_by_name()) {
        is_listed[place.shard][place.index] = true;
    }
    std::vector<core::TensorLocation> places;
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

void Checkpoint::prefault(bool wait) const {
    checkpoint_ ? (*checkpoint_)->prefault(wait) : (*files_.front())->prefault(wait);
}

}  // namespace safetensors_torch::layer
