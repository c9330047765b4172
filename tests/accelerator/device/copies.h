// Everything that moves or writes the bytes of tensors.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Storage.h>

namespace testaccel {

// Copies between the host and a device, within a device, or between devices, with any dtypes and strides. Like CUDA,
// the host waits if its memory is not pinned or `non_blocking` is false, and no memory is kept alive.
at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking);
at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst);

at::Tensor& fill(at::Tensor& self, const at::Scalar& value);
at::Tensor& zero(at::Tensor& self);

void resize_storage(const c10::Storage& storage, size_t nbytes);

}  // namespace testaccel
