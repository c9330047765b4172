// The operators that a backend must have. The host computes all others, between copies.
#include <ATen/EmptyTensor.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>
#include <c10/util/accumulate.h>
#include <torch/library.h>

#include "copies.h"
#include "device_memory.h"

namespace testaccel {
namespace {

constexpr c10::DispatchKeySet kKeys(c10::DispatchKey::PrivateUse1);

void check_options(std::optional<c10::Layout> layout, std::optional<bool> pin_memory) {
    TORCH_CHECK(c10::layout_or_default(layout) == c10::kStrided, "testaccel: only strided tensors are supported");
    TORCH_CHECK(!c10::pinned_memory_or_default(pin_memory), "testaccel: only memory of the host can be pinned");
}

at::Tensor empty(c10::IntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout> layout,
                 std::optional<c10::Device> device, std::optional<bool> pin_memory,
                 std::optional<c10::MemoryFormat> memory_format) {
    check_options(layout, pin_memory);
    const c10::DeviceGuard guard(c10::device_or_default(device));
    return at::detail::empty_generic(size, device_allocator(), kKeys, c10::dtype_or_default(dtype), memory_format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout> layout, std::optional<c10::Device> device,
                         std::optional<bool> pin_memory) {
    check_options(layout, pin_memory);
    const c10::DeviceGuard guard(c10::device_or_default(device));
    return at::detail::empty_strided_generic(size, stride, device_allocator(), kKeys, c10::dtype_or_default(dtype));
}

void grow_storage(const at::Tensor& tensor, size_t nbytes) {
    if (nbytes > tensor.storage().nbytes()) {
        resize_storage(tensor.storage(), nbytes);
    }
}

const at::Tensor& resize(const at::Tensor& self, c10::IntArrayRef size,
                         std::optional<c10::MemoryFormat> memory_format) {
    if (self.sizes() != size) {
        const auto offset = static_cast<size_t>(self.storage_offset());
        if (c10::multiply_integers(size) != 0) {
            grow_storage(self, at::detail::computeStorageNbytesContiguous(size, self.element_size(), offset));
        }
        self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
    }
    if (memory_format.has_value()) {
        self.unsafeGetTensorImpl()->empty_tensor_restride(*memory_format);
    }
    return self;
}

at::Tensor& set_layout(at::Tensor& self, at::Storage source, int64_t storage_offset, c10::IntArrayRef size,
                       c10::IntArrayRef stride) {
    TORCH_CHECK(self.storage().device() == source.device(), "testaccel: a tensor on ", self.storage().device(),
                " cannot have a storage on ", source.device());
    c10::TensorImpl* const impl = self.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(std::move(source));
    impl->set_storage_offset(storage_offset);
    if (stride.data() == nullptr) {
        impl->set_sizes_contiguous(size);
    } else {
        impl->set_sizes_and_strides(size, stride);
    }
    if (self.numel() != 0) {
        grow_storage(self, at::detail::computeStorageNbytes(self.sizes(), self.strides(), self.element_size(),
                                                            static_cast<size_t>(storage_offset)));
    }
    return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source) {
    const auto count = static_cast<int64_t>(source.nbytes() / self.element_size());
    return set_layout(self, std::move(source), 0, {count}, {});
}

at::Tensor& set_tensor(at::Tensor& self, const at::Tensor& source) {
    return set_layout(self, source.storage(), source.storage_offset(), source.sizes(), source.strides());
}

at::Scalar local_scalar(const at::Tensor& self) { return self.to(at::kCPU).item(); }

void record_stream(at::Tensor& self, c10::Stream stream) { use_on_stream(self.storage().data_ptr(), stream); }

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) { at::native::cpu_fallback(op, stack); }

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
    library.impl("empty.memory_format", &empty);
    library.impl("empty_strided", &empty_strided);
    library.impl("resize_", &resize);
    library.impl("set_.source_Storage", &set_storage);
    library.impl("set_.source_Storage_storage_offset", &set_layout);
    library.impl("set_.source_Tensor", &set_tensor);

    library.impl("view", &at::native::view);
    library.impl("as_strided", &at::native::as_strided_tensorimpl);
    library.impl("_reshape_alias", &at::native::_reshape_alias);
    library.impl("unfold", &at::native::unfold);
    library.impl("view_as_real", &at::native::view_as_real);
    library.impl("view_as_complex", &at::native::view_as_complex);

    library.impl("_copy_from", &copy_from);
    library.impl("_copy_from_and_resize", &copy_from_and_resize);
    library.impl("fill_.Scalar", &fill);
    library.impl("zero_", &zero);
    library.impl("_local_scalar_dense", &local_scalar);
    library.impl("record_stream", &record_stream);
}

// Torch would resolve these with a copy, which needs them resolved.
TORCH_LIBRARY_IMPL(aten, Conjugate, library) { library.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(aten, Negative, library) { library.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

}  // namespace testaccel
