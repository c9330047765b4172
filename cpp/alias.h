// Tensors over parts of a storage, made in a tenth of the time of a view.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>
#include <c10/core/TensorImpl.h>
#include <c10/core/TensorOptions.h>

#include <cstdint>

namespace safetensors_torch::layer {

// Returns `count` contiguous elements of `type`, from element `first` of the storage on. The storage must contain them
// and be aligned to their size.
inline at::Tensor alias(const c10::Storage& storage, c10::ScalarType type, int64_t first, int64_t count) {
    auto tensor = at::detail::make_tensor<c10::TensorImpl>(
        c10::Storage(storage), c10::DispatchKeySet(c10::computeDispatchKey(type, c10::kStrided, storage.device())),
        c10::scalarTypeToTypeMeta(type));
    tensor.unsafeGetTensorImpl()->set_storage_offset(first);
    tensor.unsafeGetTensorImpl()->set_sizes_contiguous({count});
    return tensor;
}

}  // namespace safetensors_torch::layer
