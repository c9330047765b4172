#include "cpp/load.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/TensorImpl.h>

#include <limits>
#include <numeric>

#include "cpp/dtype.h"
#include "cpp/error.h"

namespace safetensors_torch {
namespace {

// In Loader::places_: a tensor over the file's own memory.
constexpr size_t kLent = std::numeric_limits<size_t>::max();

void release_mapping(void* context) { core::release_mapping(static_cast<const core::Mapping*>(context)); }

void release_block(void* context) { core::release_block(static_cast<const core::Block*>(context)); }

void release_tensor(void* context) { delete static_cast<at::Tensor*>(context); }

// What a DataPtr gives back to its deleter.
template <typename T>
void* as_context(const T* owner) {
    return const_cast<T*>(owner);
}

// Where the file's memory can be lent to the tensor at `index`, its address, else null.
uint8_t* lendable(const core::File& file, const Lender& lender, size_t index) {
    return lender.lends && file.nbytes(index) != 0 ? file.shareable(index) : nullptr;
}

// A pointer into the file's memory, which keeps that memory alive.
c10::DataPtr lend(const core::File& file, const Lender& lender, uint8_t* data) {
    if (lender.data.defined()) {
        return {data, new at::Tensor(lender.data), &release_tensor, c10::kCPU};
    }
    return {data, as_context(file.share_mapping()), &release_mapping, c10::kCPU};
}

// A contiguous CPU tensor over `data`, with a storage of exactly its bytes. With an allocator it can be resized.
at::Tensor over(c10::DataPtr data, size_t nbytes, c10::ScalarType type, c10::IntArrayRef shape,
                c10::Allocator* allocator) {
    c10::Storage storage(c10::Storage::use_byte_size_t(), nbytes, std::move(data), allocator,
                         /*resizable=*/allocator != nullptr);
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(type));
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous(shape);
    return tensor;
}

// Layout, device and pinning are given, so torch's default device has no say.
at::Tensor empty_on(c10::Device device, c10::ScalarType type, c10::IntArrayRef shape) {
    return at::empty(shape, at::TensorOptions().dtype(type).device(device).layout(at::kStrided).requires_grad(false));
}

}  // namespace

NamedTensors named(const Tensors& tensors) {
    NamedTensors result;
    result.reserve(tensors.size());
    for (const auto& entry : tensors) {
        result.emplace_back(entry.key(), entry.value());
    }
    return result;
}

SharedFile open_file(const std::string& path, const std::string& backend) {
    return std::make_shared<const rust::Box<core::File>>(core::open_file(as_bytes(path), as_bytes(backend)));
}

SharedFile open_bytes(const at::Tensor& data) {
    if (data.scalar_type() != at::kByte || data.dim() != 1 || !data.is_cpu() || !data.is_contiguous()) {
        fail(Kind::value, "load takes the bytes of a file as a contiguous one-dimensional uint8 tensor on the CPU");
    }
    return std::make_shared<const rust::Box<core::File>>(
        core::open_memory(static_cast<const uint8_t*>(data.const_data_ptr()), data.nbytes()));
}

std::pair<c10::ScalarType, c10::DimVector> describe(const core::File& file, size_t index) {
    const uint8_t dtype = file.dtype(index);
    const rust::Str name = file.name(index);
    return {to_torch(dtype, name), to_torch_shape(dtype, file.shape(index), name)};
}

Loader::Loader(SharedFile file, Lender lender, std::vector<size_t> indices, c10::Device device)
    : file_(std::move(file)), lender_(std::move(lender)), indices_(std::move(indices)), device_(device) {
    std::vector<size_t> to_read;
    for (size_t i = 0; i < indices_.size(); ++i) {
        // Fails for a tensor that torch cannot hold, before anything is read.
        describe(**file_, indices_[i]);
        const bool has_bytes = (*file_)->nbytes(indices_[i]) != 0;
        if (device_.is_cpu() && has_bytes && lendable(**file_, lender_, indices_[i]) == nullptr) {
            places_.resize(indices_.size(), kLent);
            places_[i] = to_read.size();
            to_read.push_back(indices_[i]);
        }
    }
    if (!to_read.empty()) {
        loaded_ = (*file_)->load({to_read.data(), to_read.size()});
    }
}

std::string Loader::name(size_t i) const { return std::string((*file_)->name(indices_[i])); }

at::Tensor Loader::tensor(size_t i) const {
    const core::File& file = **file_;
    const size_t index = indices_[i];
    const auto [type, shape] = describe(file, index);
    const uint64_t nbytes = file.nbytes(index);
    if (device_.is_meta() || (nbytes == 0 && device_.is_cpu())) {
        return empty_on(device_, type, shape);
    }
    if (!device_.is_cpu()) {
        return load_tensor(file_, lender_, index, at::kCPU).to(device_);
    }
    if (places_.empty() || places_[i] == kLent) {
        return over(lend(file, lender_, lendable(file, lender_, index)), nbytes, type, shape, nullptr);
    }
    const core::Loaded& loaded = **loaded_;
    c10::DataPtr data(loaded.data(places_[i]), as_context(loaded.share(places_[i])), &release_block, c10::kCPU);
    return over(std::move(data), nbytes, type, shape, c10::GetCPUAllocator());
}

Loader load_all(SharedFile file, Lender lender, c10::Device device) {
    std::vector<size_t> indices((*file)->count());
    std::iota(indices.begin(), indices.end(), 0);
    return {std::move(file), std::move(lender), std::move(indices), device};
}

Loader load_file(const std::string& path, c10::Device device, const std::string& backend,
                 std::optional<bool> prefault) {
    auto file = open_file(path, backend);
    if (prefault.value_or(true) && !device.is_meta()) {
        (*file)->prefault(/*wait=*/prefault.has_value());
    }
    return load_all(std::move(file), Lender{backend == "mmap", {}}, device);
}

std::vector<at::Tensor> tensors_of(const Loader& loader) {
    std::vector<at::Tensor> tensors;
    tensors.reserve(loader.size());
    for (size_t i = 0; i < loader.size(); ++i) {
        tensors.push_back(loader.tensor(i));
    }
    return tensors;
}

Tensors dict_of(const Loader& loader) {
    Tensors tensors;
    tensors.reserve(loader.size());
    for (size_t i = 0; i < loader.size(); ++i) {
        tensors.insert(loader.name(i), loader.tensor(i));
    }
    return tensors;
}

Lists lists_of(const Loader& loader) {
    std::vector<std::string> names;
    names.reserve(loader.size());
    for (size_t i = 0; i < loader.size(); ++i) {
        names.push_back(loader.name(i));
    }
    return {std::move(names), tensors_of(loader)};
}

at::Tensor load_tensor(SharedFile file, const Lender& lender, size_t index, c10::Device device) {
    return Loader(std::move(file), lender, {index}, device).tensor(0);
}

at::Tensor load_slice(const core::File& file, size_t index, std::vector<core::Range> ranges, c10::Device device) {
    const uint8_t dtype = file.dtype(index);
    const rust::Str name = file.name(index);
    const auto type = to_torch(dtype, name);
    // The header counts single values, torch's packed dtypes pairs of them.
    const auto torch_shape = to_torch_shape(dtype, file.shape(index), name);
    if (!ranges.empty() && !torch_shape.empty() && file.shape(index).back() != uint64_t(torch_shape.back())) {
        core::Range& last = ranges.back();
        if (last.step != 1) {
            fail(Kind::safetensor,
                 "slice of tensor " + repr(std::string(name)) +
                     ": values packed in bytes can be taken with step 1 along the last dimension only; "
                     "load the whole tensor and index that");
        }
        last.start *= 2;
        last.stop *= 2;
    }
    const rust::Slice<const core::Range> view(ranges.data(), ranges.size());
    const auto header_shape = file.slice_shape(index, view);
    const auto shape = to_torch_shape(dtype, {header_shape.data(), header_shape.size()}, name);
    if (device.is_meta()) {
        return empty_on(device, type, shape);
    }
    at::Tensor result = empty_on(at::kCPU, type, shape);
    file.read_slice(index, view, static_cast<uint8_t*>(result.mutable_data_ptr()), result.nbytes());
    return result.to(device);
}

void read_into(const core::File& file, const std::vector<std::pair<size_t, at::Tensor>>& destinations) {
    std::vector<core::Request> requests;
    requests.reserve(destinations.size());
    for (const auto& [index, destination] : destinations) {
        requests.push_back({index, static_cast<uint8_t*>(destination.mutable_data_ptr()), destination.nbytes()});
        // The write goes past autograd, which must still learn that saved values are stale.
        destination.unsafeGetTensorImpl()->bump_version();
    }
    file.read({requests.data(), requests.size()});
}

}  // namespace safetensors_torch
