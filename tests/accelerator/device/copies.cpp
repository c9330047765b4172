#include "copies.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorOptions.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <mutex>
#include <utility>

#include "controls.h"
#include "device_memory.h"
#include "pinned_memory.h"
#include "stream.h"

namespace testaccel {
namespace {

// A tensor of a device as its streams see it. Holds no reference, so that tests find memory that is freed too early.
class Sight {
  public:
    explicit Sight(const at::Tensor& tensor)
        : data_(reachable(tensor.const_data_ptr())),
          sizes_(tensor.sizes()),
          strides_(tensor.strides()),
          type_(tensor.scalar_type()) {}

    at::Tensor tensor() const {
        return at::from_blob(data_, sizes_, strides_, at::TensorOptions().dtype(type_).device(at::kCPU));
    }

  private:
    void* data_;
    c10::DimVector sizes_;
    c10::DimVector strides_;
    c10::ScalarType type_;
};

// The thread of a stream has no say in autograd.
template <typename Work>
void launch_math(const c10::Stream& stream, Work work) {
    launch(stream, [work = std::move(work)] {
        const c10::InferenceMode guard;
        work();
    });
}

// Whether one is a copy of the other's bytes.
bool same_layout(const at::Tensor& src, const at::Tensor& dst) {
    return src.scalar_type() == dst.scalar_type() &&
           ((src.is_contiguous() && dst.is_contiguous()) ||
            (src.strides() == dst.strides() && src.is_non_overlapping_and_dense()));
}

void copy_bytes(const c10::Stream& stream, void* to, const void* from, size_t nbytes) {
    // Regions of one storage may overlap.
    launch(stream, [=] { std::memmove(to, from, nbytes); });
}

// The host may free its memory after a wait that fails, so the copy must not run later.
void copy_bytes_and_wait(const c10::Stream& stream, void* to, const void* from, size_t nbytes) {
    struct Claim {
        std::mutex mutex;
        bool given_up = false;
    };
    const auto claim = std::make_shared<Claim>();
    ++counters().blocking_copies;
    launch(stream, [=] {
        const std::lock_guard<std::mutex> lock(claim->mutex);
        if (!claim->given_up) {
            std::memmove(to, from, nbytes);
        }
    });
    try {
        wait_for_stream(stream);
    } catch (...) {
        const std::lock_guard<std::mutex> lock(claim->mutex);
        claim->given_up = true;
        throw;
    }
}

void copy_to_device(const at::Tensor& src, const at::Tensor& dst, bool non_blocking) {
    if (!same_layout(src, dst)) {
        // The host converts, the device lays out.
        const at::Tensor staged = src.to(dst.scalar_type()).contiguous();
        if (dst.is_contiguous()) {
            copy_to_device(staged, dst, non_blocking);
        } else {
            const at::Tensor packed = at::empty(dst.sizes(), dst.options());
            copy_to_device(staged, packed, non_blocking);
            copy_from(packed, dst, non_blocking);
        }
        return;
    }
    check_copy_fault();
    const size_t nbytes = src.nbytes();
    ++counters().to_device_copies;
    counters().to_device_bytes += static_cast<int64_t>(nbytes);
    const c10::Stream stream = current_stream(dst.device().index());
    const bool waits = !non_blocking || !is_pinned(src.const_data_ptr(), nbytes);
    (waits ? copy_bytes_and_wait : copy_bytes)(stream, reachable(dst.const_data_ptr()), src.const_data_ptr(), nbytes);
}

void copy_to_host(const at::Tensor& src, const at::Tensor& dst, bool non_blocking) {
    if (!same_layout(src, dst)) {
        const at::Tensor packed = src.contiguous();
        if (packed.scalar_type() == dst.scalar_type() && dst.is_contiguous()) {
            copy_to_host(packed, dst, non_blocking);
        } else {
            const at::Tensor staged = at::empty(src.sizes(), src.options().device(at::kCPU));
            copy_to_host(packed, staged, false);
            dst.copy_(staged);
        }
        return;
    }
    check_copy_fault();
    const size_t nbytes = src.nbytes();
    ++counters().to_host_copies;
    counters().to_host_bytes += static_cast<int64_t>(nbytes);
    const c10::Stream stream = current_stream(src.device().index());
    void* const to = dst.mutable_data_ptr();
    const bool waits = !non_blocking || !is_pinned(to, nbytes);
    (waits ? copy_bytes_and_wait : copy_bytes)(stream, to, reachable(src.const_data_ptr()), nbytes);
}

// Runs on the stream of the source, which waits for the destination's and is waited for by it.
void copy_on_devices(const at::Tensor& src, const at::Tensor& dst) {
    ++counters().on_device_copies;
    counters().on_device_bytes += static_cast<int64_t>(dst.nbytes());
    const c10::Stream stream = current_stream(src.device().index());
    const c10::Stream other = current_stream(dst.device().index());
    if (other != stream) {
        wait_on_stream(stream, mark(other));
    }
    if (same_layout(src, dst)) {
        copy_bytes(stream, reachable(dst.const_data_ptr()), reachable(src.const_data_ptr()), dst.nbytes());
    } else {
        launch_math(stream, [from = Sight(src), to = Sight(dst)] { to.tensor().copy_(from.tensor()); });
    }
    if (other != stream) {
        wait_on_stream(other, mark(stream));
    }
}

// Conjugation and negation that views have put off.
struct PutOff {
    bool conj;
    bool neg;

    explicit PutOff(const at::Tensor& tensor) : conj(tensor.is_conj()), neg(tensor.is_neg()) {}
    explicit operator bool() const { return conj || neg; }
};

void apply_on_device(PutOff ops, const at::Tensor& tensor) {
    launch_math(current_stream(tensor.device().index()), [ops, to = Sight(tensor)] {
        if (ops.conj) {
            to.tensor().conj_physical_();
        }
        if (ops.neg) {
            to.tensor().neg_();
        }
    });
}

// The tensor with nothing put off.
at::Tensor resolved(const at::Tensor& tensor) {
    const PutOff ops(tensor);
    if (!ops) {
        return tensor;
    }
    if (tensor.is_cpu()) {
        return tensor.resolve_conj().resolve_neg();
    }
    at::Tensor result = at::empty(tensor.sizes(), tensor.options());
    copy_on_devices(tensor, result);
    apply_on_device(ops, result);
    return result;
}

}  // namespace

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& dst, bool non_blocking) {
    const at::Tensor expanded = self.sizes() == dst.sizes() ? self : self.expand(dst.sizes());
    if (dst.numel() == 0) {
        return dst;
    }
    const at::Tensor src = resolved(expanded);
    const PutOff ops(dst);
    if (ops && dst.is_cpu()) {
        dst.copy_(src.to(at::kCPU));
    } else if (ops) {
        // Applying it twice is applying it not at all, so the value is right when it is put off again.
        copy_on_devices(src.to(dst.device()), dst);
        apply_on_device(ops, dst);
    } else if (src.is_cpu()) {
        copy_to_device(src, dst, non_blocking);
    } else if (dst.is_cpu()) {
        copy_to_host(src, dst, non_blocking);
    } else {
        copy_on_devices(src, dst);
    }
    return dst;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& dst) {
    dst.resize_(self.sizes());
    return copy_from(self, dst, false);
}

at::Tensor& fill(at::Tensor& self, const at::Scalar& value) {
    if (self.numel() != 0) {
        launch_math(current_stream(self.device().index()), [to = Sight(self), value] { to.tensor().fill_(value); });
    }
    return self;
}

at::Tensor& zero(at::Tensor& self) {
    if (self.numel() == 0) {
        return self;
    }
    const c10::Stream stream = current_stream(self.device().index());
    if (self.is_non_overlapping_and_dense()) {
        launch(stream, [to = reachable(self.const_data_ptr()), nbytes = self.nbytes()] { std::memset(to, 0, nbytes); });
    } else {
        launch_math(stream, [to = Sight(self)] { to.tensor().zero_(); });
    }
    return self;
}

void resize_storage(const c10::Storage& storage, size_t nbytes) {
    TORCH_CHECK(storage.resizable(), "Trying to resize storage that is not resizable");
    const c10::DeviceGuard guard(storage.device());
    c10::DataPtr data = device_allocator()->allocate(nbytes);
    const size_t kept = std::min(nbytes, storage.nbytes());
    if (kept != 0) {
        copy_bytes(current_stream(storage.device().index()), reachable(data.get()), reachable(storage.data()), kept);
    }
    storage.set_data_ptr_noswap(std::move(data));
    storage.set_nbytes(nbytes);
}

}  // namespace testaccel
