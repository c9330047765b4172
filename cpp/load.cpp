#include "cpp/load.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/TensorImpl.h>

#include "cpp/dtype.h"
#include "cpp/error.h"

namespace safetensors_torch {
namespace {

void release_owner(void* context) {
    // The Box was given up when the memory was lent; taking it back drops it.
    rust::Box<core::Owner>::from_raw(static_cast<core::Owner*>(context));
}

void release_tensor(void* context) { delete static_cast<at::Tensor*>(context); }

c10::DataPtr owned(uint8_t* data, rust::Box<core::Owner> owner) {
    return {data, owner.into_raw(), &release_owner, c10::kCPU};
}

// A pointer into the file's memory, which keeps that memory alive.
c10::DataPtr lend(const core::File& file, const Lender& lender, uint8_t* data) {
    if (lender.data.defined()) {
        return {data, new at::Tensor(lender.data), &release_tensor, c10::kCPU};
    }
    return owned(data, file.share_mapping());
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

// The tensors in host memory: lent where that is possible, else read, all in one go.
std::vector<at::Tensor> load_on_host(const core::File& file, const Lender& lender, const std::vector<size_t>& indices) {
    std::vector<at::Tensor> tensors(indices.size());
    // Those to be read: where they go among `tensors`, and their places in the file.
    std::vector<size_t> targets;
    std::vector<size_t> sources;
    for (size_t i = 0; i < indices.size(); ++i) {
        const size_t index = indices[i];
        const auto [type, shape] = describe(file, index);
        const uint64_t nbytes = file.nbytes(index);
        uint8_t* data = lender.lends && nbytes != 0 ? file.shareable(index) : nullptr;
        if (data != nullptr) {
            tensors[i] = over(lend(file, lender, data), nbytes, type, shape, nullptr);
        } else if (nbytes == 0) {
            tensors[i] = empty_on(at::kCPU, type, shape);
        } else {
            targets.push_back(i);
            sources.push_back(index);
        }
    }
    if (!sources.empty()) {
        const auto loaded = file.load({sources.data(), sources.size()});
        for (size_t place = 0; place < sources.size(); ++place) {
            const auto [type, shape] = describe(file, sources[place]);
            tensors[targets[place]] = over(owned(loaded->data(place), loaded->share(place)), file.nbytes(sources[place]),
                                           type, shape, c10::GetCPUAllocator());
        }
    }
    return tensors;
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

Tensors to_dict(const Lists& lists) {
    const auto& [names, tensors] = lists;
    Tensors result;
    result.reserve(names.size());
    for (size_t i = 0; i < names.size(); ++i) {
        result.insert(names[i], tensors[i]);
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

std::vector<at::Tensor> load_tensors(const core::File& file, const Lender& lender, const std::vector<size_t>& indices,
                                     c10::Device device) {
    if (device.is_cpu()) {
        return load_on_host(file, lender, indices);
    }
    std::vector<at::Tensor> tensors;
    tensors.reserve(indices.size());
    for (const size_t index : indices) {
        if (device.is_meta()) {
            const auto [type, shape] = describe(file, index);
            tensors.push_back(empty_on(device, type, shape));
            continue;
        }
        // One at a time, so that the host never holds more than one tensor's copy.
        tensors.push_back(load_on_host(file, lender, {index}).front().to(device));
    }
    return tensors;
}

Lists load_all(const core::File& file, const Lender& lender, c10::Device device) {
    std::vector<size_t> indices(file.count());
    std::vector<std::string> names;
    names.reserve(indices.size());
    for (size_t index = 0; index < indices.size(); ++index) {
        indices[index] = index;
        names.emplace_back(file.name(index));
    }
    return {std::move(names), load_tensors(file, lender, indices, device)};
}

Lists load_file(const std::string& path, c10::Device device, const std::string& backend, std::optional<bool> prefault) {
    const auto file = open_file(path, backend);
    if (prefault.value_or(true) && !device.is_meta()) {
        (*file)->prefault(/*wait=*/prefault.has_value());
    }
    return load_all(**file, Lender{backend == "mmap", {}}, device);
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
