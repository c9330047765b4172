#include "cpp/read/load.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <limits>

#include "cpp/compat.h"
#include "cpp/dtype.h"
#include "cpp/error.h"

namespace safetensors_torch::layer {
namespace {

// In Loader::places_: the storage points into the file's memory.
constexpr size_t kShared = std::numeric_limits<size_t>::max();

void release_mapping(void* context) { core::release_mapping(static_cast<const core::Mapping*>(context)); }

void release_block(void* context) { core::release_block(static_cast<const core::Block*>(context)); }

void release_tensor(void* context) { delete static_cast<at::Tensor*>(context); }

// What a DataPtr passes to its deleter.
template <typename T>
void* as_context(const T* owner) {
    return const_cast<T*>(owner);
}

// Returns the address of the tensor at `index` in the file's memory, or null if its storage cannot point there. Kernels
// want elements at multiples of their size: torch's complex64 at 8, although C's needs only 4.
uint8_t* shareable_data(const core::File& file, const StorageSharing& sharing, size_t index, c10::ScalarType type) {
    uint8_t* data = sharing.is_enabled && file.nbytes(index) != 0 ? file.data(index) : nullptr;
    return reinterpret_cast<uintptr_t>(data) % c10::elementSize(type) == 0 ? data : nullptr;
}

// Returns a pointer into the file's memory that keeps that memory alive.
c10::DataPtr share(const core::File& file, const StorageSharing& sharing, uint8_t* data) {
    if (sharing.owner.defined()) {
        return {data, new at::Tensor(sharing.owner), &release_tensor, c10::kCPU};
    }
    return {data, as_context(file.share_mapping()), &release_mapping, c10::kCPU};
}

// Returns a contiguous CPU tensor over `data` whose storage has exactly its bytes. With an allocator it can be resized.
at::Tensor over(c10::DataPtr data, size_t nbytes, c10::ScalarType type, c10::IntArrayRef shape,
                c10::Allocator* allocator) {
    c10::Storage storage(c10::Storage::use_byte_size_t(), nbytes, std::move(data), allocator,
                         /*resizable=*/allocator != nullptr);
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(
        std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), c10::scalarTypeToTypeMeta(type));
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous(shape);
    return tensor;
}

// Returns whether the tensor has a storage that can be copied to.
bool is_allocated(const at::Tensor& tensor) { return tensor.has_storage() && tensor.storage().data() != nullptr; }

}  // namespace

at::Tensor empty_on(c10::Device device, c10::ScalarType type, c10::IntArrayRef shape) {
    return at::empty(shape, at::TensorOptions().dtype(type).device(device).layout(at::kStrided).requires_grad(false));
}

at::Tensor allocate(c10::Device device, c10::ScalarType type, c10::IntArrayRef shape, const std::string& what) {
    try {
        return empty_on(device, type, shape);
    } catch (const c10::Error& error) {
        const std::string text = what + " of " +
                                 std::to_string(c10::multiply_integers(shape) * c10::elementSize(type)) +
                                 " bytes: " + error.what_without_backtrace();
        if (dynamic_cast<const c10::OutOfMemoryError*>(&error) != nullptr) {
            throw c10::OutOfMemoryError(text, nullptr);
        }
        fail(category_of(error), text);
    }
}

c10::Device with_index(c10::Device device) {
    if (device.has_index() || device.is_cpu() || device.is_meta()) {
        return device;
    }
    return c10::impl::VirtualGuardImpl(device.type()).getDevice();
}

c10::ScalarType converted(c10::ScalarType stored, std::optional<c10::ScalarType> wanted) {
    return wanted && c10::isFloatingType(stored) ? *wanted : stored;
}

void check_wanted(std::optional<c10::ScalarType> dtype) {
    if (dtype && !c10::isFloatingType(*dtype)) {
        fail(ErrorCategory::value, "dtype must be a floating-point one, not " + dtype_name(*dtype));
    }
}

at::Tensor over_block(uint8_t* data, const core::Block* block, size_t nbytes, c10::ScalarType type,
                      c10::IntArrayRef shape) {
    c10::DataPtr pointer(data, as_context(block), &release_block, c10::kCPU);
    return over(std::move(pointer), nbytes, type, shape, c10::GetCPUAllocator());
}

Loader::Loader(SharedFile file, StorageSharing sharing, std::vector<size_t> indices, Target target)
    : file_(std::move(file)), sharing_(std::move(sharing)), indices_(std::move(indices)), target_(target) {
    target_.device = with_index(target_.device);
    check_wanted(target_.dtype);
    const core::File& core_file = **file_;
    std::vector<size_t> to_read;
    for (size_t i = 0; i < indices_.size(); ++i) {
        // Fails for a tensor that torch cannot hold, before anything is read.
        const auto [stored, shape] = describe(core_file, indices_[i]);
        const auto type = converted(stored, target_.dtype);
        if (target_.device.is_meta()) {
            continue;
        }
        if (!target_.device.is_cpu() || type != stored) {
            allocate_destination(i, stored, type, shape);
        } else if (core_file.nbytes(indices_[i]) != 0 &&
                   shareable_data(core_file, sharing_, indices_[i], stored) == nullptr) {
            places_.resize(indices_.size(), kShared);
            places_[i] = to_read.size();
            to_read.push_back(indices_[i]);
        }
    }
    if (!to_read.empty()) {
        loading_ = std::make_shared<rust::Box<core::PendingRead>>(core_file.load({to_read.data(), to_read.size()}));
    }
}

void Loader::join(Loader& first) {
    if (reads() && first.reads()) {
        part_ = (*first.loading_)->append(std::move(*loading_));
        loading_ = first.loading_;
    }
}

// Allocates tensor `i` on the device; the upload fills it.
void Loader::allocate_destination(size_t i, c10::ScalarType stored, c10::ScalarType type, c10::IntArrayRef shape) {
    allocated_.resize(indices_.size());
    check_conversion(stored, type, (*file_)->name(indices_[i]));
    allocated_[i] = allocate(target_.device, type, shape, "tensor " + repr(name(i)));
    if ((*file_)->nbytes(indices_[i]) == 0) {
        return;
    }
    if (is_allocated(allocated_[i])) {
        destinations_.push_back({indices_[i], stored, allocated_[i]});
        upload_bytes_ += (*file_)->nbytes(indices_[i]);
    } else {
        // The device does not say where its bytes are: tensor() copies.
        allocated_[i].reset();
    }
}

bool Loader::advance(Deadline until) {
    return (!loading_ || (*loading_)->advance(until.milliseconds_left())) && upload(until);
}

// Several loaders may be waiting for their turns: slabs and a stream are taken for the first copy and returned after
// the last.
bool Loader::upload(Deadline until) {
    if (is_uploaded_ || upload_bytes_ == 0) {
        return true;
    }
    if (upload_ == nullptr) {
        upload_ = std::make_unique<Upload>(file_, std::move(destinations_), sharing_.read_from);
    }
    is_uploaded_ = upload_->advance(until);
    if (is_uploaded_) {
        upload_.reset();
    }
    return is_uploaded_;
}

uint64_t Loader::total_bytes() const { return (loading_ ? (*loading_)->total_bytes(part_) : 0) + upload_bytes_; }

uint64_t Loader::done_bytes() const {
    const uint64_t uploaded = is_uploaded_ ? upload_bytes_ : upload_ ? upload_->done_bytes() : 0;
    return (loading_ ? (*loading_)->done_bytes(part_) : 0) + uploaded;
}

std::string Loader::name(size_t i) const { return std::string((*file_)->name(indices_[i])); }

at::Tensor Loader::tensor(size_t i) const {
    const core::File& file = **file_;
    const size_t index = indices_[i];
    if (!allocated_.empty() && allocated_[i].defined()) {
        return allocated_[i];
    }
    const auto [stored, shape] = describe(file, index);
    const auto type = converted(stored, target_.dtype);
    const uint64_t nbytes = file.nbytes(index);
    if (target_.device.is_meta() || nbytes == 0) {
        return empty_on(target_.device, type, shape);
    }
    if (!target_.device.is_cpu()) {
        return load_tensor(file_, sharing_, index, at::kCPU).to(target_.device).to(type);
    }
    if (places_.empty() || places_[i] == kShared) {
        return over(share(file, sharing_, shareable_data(file, sharing_, index, stored)), nbytes, type, shape, nullptr);
    }
    const core::PendingRead& loading = **loading_;
    return over_block(loading.data(part_, places_[i]), loading.share_block(part_, places_[i]), nbytes, type, shape);
}

at::Tensor load_tensor(SharedFile file, const StorageSharing& sharing, size_t index, c10::Device device) {
    Loader loader(std::move(file), sharing, {index}, Target{device, {}});
    loader.advance(Deadline::never());
    return loader.tensor(0);
}

SlicePlan plan_slice(const core::File& file, size_t index, std::vector<core::Range> ranges) {
    const uint8_t dtype = file.dtype(index);
    const rust::Str name = file.name(index);
    const auto type = to_torch(dtype, name);
    // The header counts single values, torch's packed dtypes pairs of them.
    const auto torch_shape = to_torch_shape(dtype, file.shape(index), name);
    if (!ranges.empty() && !torch_shape.empty() && file.shape(index).back() != uint64_t(torch_shape.back())) {
        core::Range& last = ranges.back();
        if (last.step != 1) {
            fail(ErrorCategory::safetensor,
                 "slice of tensor " + repr(std::string(name)) +
                     ": values packed in bytes can be taken with step 1 along the last dimension only; "
                     "load the whole tensor and index that");
        }
        last.start *= 2;
        last.stop *= 2;
    }
    const auto header_shape = file.slice_shape(index, {ranges.data(), ranges.size()});
    auto shape = to_torch_shape(dtype, {header_shape.data(), header_shape.size()}, name);
    return {std::move(ranges), type, std::move(shape)};
}

SliceLoader::SliceLoader(SharedFile shared_file, size_t index, std::vector<core::Range> torch_ranges,
                         c10::Device device) {
    const core::File& file = **shared_file;
    auto [ranges, type, shape] = plan_slice(file, index, std::move(torch_ranges));
    const std::string what = "slice of tensor " + repr(std::string(file.name(index)));
    tensor_ = allocate(with_index(device), type, shape, what);
    if (tensor_.is_meta() || tensor_.numel() == 0) {
        return;
    }
    if (!tensor_.is_cpu() && is_allocated(tensor_)) {
        upload_ =
            std::make_unique<Upload>(std::move(shared_file), Destination{index, type, tensor_}, std::move(ranges));
        return;
    }
    at::Tensor host = tensor_.is_cpu() ? tensor_ : allocate(at::kCPU, type, shape, what);
    const rust::Slice<const core::Range> view(ranges.data(), ranges.size());
    file.read_slice(index, view, static_cast<uint8_t*>(host.mutable_data_ptr()), host.nbytes());
    tensor_ = host.to(device);
}

}  // namespace safetensors_torch::layer
