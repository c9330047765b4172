#include "cpp/write/aliasing.h"

#include <c10/core/impl/COW.h>

#include <algorithm>
#include <tuple>
#include <unordered_map>

#include "cpp/error.h"
#include "cpp/tensor_memory.h"

namespace safetensors_torch::layer {
namespace {

// Distinguishes storages of one address: each device has its own addresses.
using StorageKey = std::tuple<c10::DeviceType, c10::DeviceIndex, size_t>;

// The address range of a tensor's elements; `index` is that of the tensor.
struct Extent {
    uintptr_t begin;
    uintptr_t end;
    size_t index;
};

// Returns what tensors that share memory have in common: the address, or for copy-on-write memory, whose address lazy
// copies have too, the storage.
const void* identity(const at::Tensor& tensor) {
    const c10::DataPtr& data = storage_data(tensor);
    const bool has_no_address = tensor.is_meta() || c10::impl::cow::is_cow_data_ptr(data);
    return has_no_address ? tensor.storage().unsafeGetStorageImpl() : data.get();
}

Extent extent_of(const at::Tensor& tensor, size_t index) {
    const auto begin =
        reinterpret_cast<uintptr_t>(storage_data(tensor).get()) + tensor.storage_offset() * tensor.itemsize();
    return {begin, begin + span_bytes(tensor), index};
}

// Returns whether every byte of the storage belongs to exactly one element.
bool covers_storage(const at::Tensor& tensor) {
    return tensor.is_non_overlapping_and_dense() && tensor.numel() * tensor.itemsize() == tensor.storage().nbytes();
}

// Splits the extents of one storage into runs that overlap, and adds the runs of more than one tensor.
void add_runs(std::vector<Extent>& extents, const NamedTensors& tensors,
              std::vector<std::vector<std::string>>& groups) {
    std::sort(extents.begin(), extents.end(),
              [](const Extent& a, const Extent& b) { return std::tie(a.begin, a.end) < std::tie(b.begin, b.end); });
    std::vector<std::string> run;
    uintptr_t furthest = 0;
    const auto finish = [&] {
        if (run.size() > 1) {
            std::sort(run.begin(), run.end());
            groups.push_back(run);
        }
        run.clear();
    };
    for (const Extent& extent : extents) {
        if (extent.begin == extent.end) {
            continue;
        }
        if (extent.begin >= furthest) {
            finish();
        }
        furthest = std::max(furthest, extent.end);
        run.push_back(tensors[extent.index].first);
    }
    finish();
}

// Adds the groups among `members`, indices of tensors whose storages have one address.
void add_groups(const std::vector<size_t>& members, const NamedTensors& tensors,
                std::vector<std::vector<std::string>>& groups) {
    std::map<StorageKey, std::vector<Extent>> by_storage;
    for (const size_t index : members) {
        const at::Tensor& tensor = tensors[index].second;
        const c10::Device device = tensor.device();
        by_storage[{device.type(), device.index(), tensor.storage().nbytes()}].push_back(extent_of(tensor, index));
    }
    for (auto& [key, extents] : by_storage) {
        if (extents.size() > 1) {
            add_runs(extents, tensors, groups);
        }
    }
}

}  // namespace

std::vector<std::vector<std::string>> overlapping(const NamedTensors& tensors, bool with_meta) {
    std::vector<std::pair<uintptr_t, size_t>> addresses;
    addresses.reserve(tensors.size());
    for (size_t index = 0; index < tensors.size(); ++index) {
        const at::Tensor& tensor = tensors[index].second;
        const bool has_storage = has_memory(tensor) || (with_meta && tensor.is_meta() && tensor.has_storage());
        if (has_storage && tensor.storage().nbytes() != 0) {
            addresses.emplace_back(reinterpret_cast<uintptr_t>(identity(tensors[index].second)), index);
        }
    }
    std::sort(addresses.begin(), addresses.end());
    std::vector<std::vector<std::string>> groups;
    std::vector<size_t> members;
    for (size_t first = 0; first < addresses.size(); first += members.size()) {
        members.clear();
        for (size_t i = first; i < addresses.size() && addresses[i].first == addresses[first].first; ++i) {
            members.push_back(addresses[i].second);
        }
        if (members.size() > 1) {
            add_groups(members, tensors, groups);
        }
    }
    std::sort(groups.begin(), groups.end());
    return groups;
}

std::map<std::string, std::string> tied_names(const NamedTensors& tensors,
                                              const std::unordered_set<std::string>& preferred) {
    std::unordered_map<std::string, const at::Tensor*> by_name;
    for (const auto& [name, tensor] : tensors) {
        by_name.emplace(name, &tensor);
    }
    std::map<std::string, std::string> dropped;
    for (const auto& group : overlapping(tensors, /*with_meta=*/true)) {
        const std::string* kept = nullptr;
        bool kept_is_preferred = false;
        for (const std::string& name : group) {
            const bool is_preferred = preferred.count(name) != 0;
            if (covers_storage(*by_name.at(name)) && (kept == nullptr || (is_preferred && !kept_is_preferred))) {
                kept = &name;
                kept_is_preferred = is_preferred;
            }
        }
        if (kept == nullptr) {
            fail(ErrorCategory::runtime,
                 "No tensor among " + repr_set(group) +
                     " covers the entire storage that they share, so none can stand for the others in a "
                     "file. Give each its own memory with `.clone()`, or keep the "
                     "whole tensor and take the views of it after loading");
        }
        for (const std::string& name : group) {
            if (&name != kept) {
                dropped.emplace(name, *kept);
            }
        }
    }
    return dropped;
}

std::string repr_set(const std::vector<std::string>& names) {
    std::string out = "{";
    for (const std::string& name : names) {
        out += (out.size() > 1 ? ", " : "") + repr(name);
    }
    return out + "}";
}

}  // namespace safetensors_torch::layer
