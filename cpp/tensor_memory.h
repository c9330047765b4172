// Whether a tensor has memory for its elements, and whether it still has the same memory.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

#include <cstddef>
#include <cstdint>
#include <string>

namespace safetensors_torch::layer {

// Returns the data pointer of the storage, which the tensor must have. Unlike Storage::data(), it accepts every tensor,
// and does not copy copy-on-write memory.
const c10::DataPtr& storage_data(const at::Tensor& tensor);

// Returns the bytes from the first element of a strided tensor to the end of the last; 0 if it has none.
uint64_t span_bytes(const at::Tensor& tensor);

// Returns whether the elements have an address: those of meta tensors, zero tensors and wrappers have none.
bool has_memory(const at::Tensor& tensor);

// Returns whether other tensors have the memory: this is a wrapper subclass, or in a transform of torch.func.
bool is_wrapper(const at::Tensor& tensor);

// Returns whether the storage of a strided tensor with memory is large enough for its elements.
bool is_whole(const at::Tensor& tensor);

// Fails, naming the tensor, if its storage is too small for its elements.
void check_whole(const std::string& name, const at::Tensor& tensor);

// Tells autograd that saved values of the tensor are stale.
void note_write(const at::Tensor& tensor);

// The memory of a tensor at the start of a load or save, which has pointers into it.
//
// Keeps the storage alive. Other code can still resize it: after such code has run, call check() before the pointers
// are used.
class TensorMemory {
  public:
    explicit TensorMemory(const at::Tensor& tensor);

    // Fails if `tensor`, from which this was made, has other memory now.
    void check(const std::string& name, const at::Tensor& tensor) const;

  private:
    // None for a tensor without memory.
    c10::Storage storage_;
    const void* data_ = nullptr;
    size_t nbytes_ = 0;
    int64_t offset_ = 0;
};

}  // namespace safetensors_torch::layer
