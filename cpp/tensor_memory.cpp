#include "cpp/tensor_memory.h"

#include "cpp/error.h"

namespace safetensors_torch::layer {
namespace {

// Returns whether sizes and strides determine where the elements are in a storage.
bool is_strided(const at::Tensor& tensor) {
    return tensor.defined() && tensor.layout() == at::kStrided && !tensor.is_nested() && !tensor.is_meta() &&
           tensor.has_storage() && !tensor.storage().device().is_meta();
}

uint64_t needed_bytes(const at::Tensor& tensor) {
    const uint64_t span = span_bytes(tensor);
    return span == 0 ? 0 : static_cast<uint64_t>(tensor.storage_offset()) * tensor.itemsize() + span;
}

}  // namespace

const c10::DataPtr& storage_data(const at::Tensor& tensor) {
    return tensor.storage().unsafeGetStorageImpl()->_mutable_data_ptr_no_checks();
}

uint64_t span_bytes(const at::Tensor& tensor) {
    if (tensor.numel() == 0) {
        return 0;
    }
    int64_t last = 0;
    for (int64_t axis = 0; axis < tensor.dim(); ++axis) {
        last += (tensor.size(axis) - 1) * tensor.stride(axis);
    }
    return static_cast<uint64_t>(last + 1) * tensor.itemsize();
}

bool has_memory(const at::Tensor& tensor) { return is_strided(tensor) && storage_data(tensor).get() != nullptr; }

bool is_wrapper(const at::Tensor& tensor) {
    if (!tensor.has_storage()) {
        return true;
    }
    const c10::DispatchKeySet keys = tensor.key_set();
    return storage_data(tensor).get() == nullptr &&
           (keys.has(c10::DispatchKey::Python) || keys.has(c10::DispatchKey::Functionalize));
}

bool is_whole(const at::Tensor& tensor) { return needed_bytes(tensor) <= tensor.storage().nbytes(); }

void check_whole(const std::string& name, const at::Tensor& tensor) {
    if (!is_strided(tensor) || is_wrapper(tensor) || is_whole(tensor)) {
        return;
    }
    fail(ErrorCategory::runtime,
         "tensor " + repr(name) + ": its storage has " + std::to_string(tensor.storage().nbytes()) +
             " bytes, and its elements need " + std::to_string(needed_bytes(tensor)) +
             ", so the memory was freed or shrunk, as FSDP does with sharded parameters; gather them "
             "first, or resize the storage");
}

void note_write(const at::Tensor& tensor) { tensor.unsafeGetTensorImpl()->bump_version(); }

TensorMemory::TensorMemory(const at::Tensor& tensor) {
    if (has_memory(tensor)) {
        storage_ = tensor.storage();
        data_ = storage_data(tensor).get();
        nbytes_ = storage_.nbytes();
        offset_ = tensor.storage_offset();
    }
}

void TensorMemory::check(const std::string& name, const at::Tensor& tensor) const {
    if (data_ == nullptr) {
        return;
    }
    const bool is_same =
        tensor.has_storage() && tensor.storage().unsafeGetStorageImpl() == storage_.unsafeGetStorageImpl() &&
        storage_data(tensor).get() == data_ && storage_.nbytes() == nbytes_ && tensor.storage_offset() == offset_;
    if (!is_same) {
        fail(ErrorCategory::runtime,
             "tensor " + repr(name) +
                 ": its memory was freed, resized or replaced while it was loaded or saved; leave the "
                 "tensors as they are until that is over, also in a progress function");
    }
}

}  // namespace safetensors_torch::layer
