// Whether a tensor has the memory that its elements lie in, and whether it has kept it since a load or save looked.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace safetensors_torch::layer {

// What a tensor's storage, which it must have, points to. Unlike Storage::data(), this refuses no tensor, and leaves
// copy-on-write memory shared.
const c10::DataPtr& storage_data(const at::Tensor& tensor);

// The bytes from the first element of a strided tensor to behind the last; 0 if it has none.
uint64_t span_bytes(const at::Tensor& tensor);

// Whether the elements lie at an address: not those of meta and zero tensors, nor of tensors that stand for others.
bool has_memory(const at::Tensor& tensor);

// Whether the tensor stands for others, which have the memory: a wrapper subclass, or a tensor in a transform of
// torch.func.
bool is_wrapper(const at::Tensor& tensor);

// Whether the storage of a strided tensor with memory is as large as its elements need.
bool is_whole(const at::Tensor& tensor);

// Fails, naming the tensor, if it has a storage that is too small for its elements.
void check_whole(const std::string& name, const at::Tensor& tensor);

// The memory that a tensor had when a load or save began, which has pointers into it.
//
// The storage lives as long as this. But it can still be resized: check() before the pointers are used again, if other
// code has run.
class TensorMemory {
  public:
    explicit TensorMemory(const at::Tensor& tensor);

    // Fails if `tensor`, of which this was made, has other memory now.
    void check(const std::string& name, const at::Tensor& tensor) const;

  private:
    // None for a tensor without memory.
    c10::Storage storage_;
    const void* data_ = nullptr;
    size_t nbytes_ = 0;
    int64_t offset_ = 0;
};

}  // namespace safetensors_torch::layer
