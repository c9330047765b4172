// From tensors on any device to the bytes of a file, in file order.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cpp/bytes.h"
#include "cpp/deadline.h"
#include "cpp/device/device_copy_stream.h"
#include "cpp/tensors.h"

namespace safetensors_torch::layer {

// The target of the bytes.
class Sink {
  public:
    virtual ~Sink() = default;
    // Writes the bytes, and returns how many were written: all, unless a pipe has accepted no more before the deadline.
    virtual uint64_t write(const std::vector<core::Piece>& pieces, Deadline until) = 0;
    // Called after the last byte.
    virtual void finish() = 0;
};

// Returns whether the bytes to write are the tensor's bytes in host memory.
bool is_on_host(const at::Tensor& tensor);

// A transfer of tensors to a sink. Host memory is written directly; tensors on a device go through slabs, which the
// device fills while earlier ones are written. So the host never holds more of them than the slabs.
class Download {
  public:
    // Writes the header, then the tensors in the order of `layout`. `tensors` and `layout` must outlive this.
    Download(const NamedTensors& tensors, const core::SavePlan& layout, std::unique_ptr<Sink> sink);

    // Writes until everything is written or the deadline has passed; returns whether everything is.
    bool advance(Deadline until);

    uint64_t done_bytes() const { return done_; }

  private:
    // One device, and its slabs that are free.
    struct Source {
        std::unique_ptr<DeviceCopyStream> copy_stream;
        std::vector<size_t> free;
    };

    // Bytes in host memory, now or once the device has copied them.
    struct Span {
        const uint8_t* data;
        uint64_t length;
        // The device whose slab they are in; null for other memory.
        Source* source;
        size_t slab;
        bool is_header = false;

        bool is_there() const { return source == nullptr || source->copy_stream->is_idle(slab); }
    };

    bool is_all_written() const { return next_span_ == spans_.size(); }
    bool plan_more();
    void plan_host(const at::Tensor& host, const std::string& name, uint64_t nbytes, uint64_t length);
    bool plan_slab(Source& source, c10::Device device);
    void move_on(uint64_t length, uint64_t nbytes);
    bool write_some(Deadline until);
    bool grow(Source& source);
    bool grow_where_waiting();

    const NamedTensors& tensors_;
    const core::SavePlan& layout_;
    std::unique_ptr<Sink> sink_;
    // By the device's name.
    std::map<std::string, Source> sources_;
    // The next tensor to plan, as a position in the file, and how many of its bytes are planned.
    size_t place_ = 0;
    uint64_t offset_ = 0;
    // The planned spans, in file order; those from `next_span_` on are not written. `host_bytes_` counts their bytes
    // outside of slabs, except the header.
    std::vector<Span> spans_;
    size_t next_span_ = 0;
    uint64_t host_bytes_ = 0;
    // A tensor that was copied to the host as a whole, until it is written.
    at::Tensor copy_;
    uint64_t done_ = 0;
    bool finished_ = false;
};

}  // namespace safetensors_torch::layer
