// From tensors, wherever they are, to the bytes of a file, in its order.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "cpp/deadline.h"
#include "cpp/device/device_copy_stream.h"
#include "cpp/read/load.h"

namespace safetensors_torch::layer {

// Where the bytes go.
class Sink {
  public:
    virtual ~Sink() = default;
    // Returns how many of the bytes were written, from their start on: all, unless a pipe has taken no more until then.
    virtual uint64_t write(const std::vector<core::Piece>& pieces, Deadline until) = 0;
    // After the last byte.
    virtual void finish() = 0;
};

// For a sink that takes all of them.
uint64_t bytes_of(const std::vector<core::Piece>& pieces);

// The bytes of tensors on their way to a sink: those in host memory straight from there, those on a device through
// slabs, which the device fills while earlier ones are being written. So the host never holds more of a device's
// tensors than the slabs do.
class Download {
  public:
    // The header first, then the tensors in the order of `layout`. All of these must live as long as this.
    Download(const NamedTensors& tensors, const core::SavePlan& layout, std::unique_ptr<Sink> sink);

    // Goes on until all is written, or the time is up; whether it is.
    bool advance(Deadline until);

    uint64_t done_bytes() const { return done_; }

  private:
    // One device, and its slabs that are not in use.
    struct Source {
        std::unique_ptr<DeviceCopyStream> copy_stream;
        std::vector<size_t> free;
    };

    // Bytes that are, or will be, in host memory.
    struct Span {
        const uint8_t* data;
        uint64_t length;
        // Whose slab they are in; null for other memory.
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
    // The next tensor to be planned, as a place in the file, and how much of it is planned already.
    size_t place_ = 0;
    uint64_t offset_ = 0;
    // What is planned, in the order of the file; what of it is not written begins at `next_span_`. And how much of that
    // no slab bounds, the header aside.
    std::vector<Span> spans_;
    size_t next_span_ = 0;
    uint64_t host_bytes_ = 0;
    // A tensor that had to come to the host as a whole, while it is planned.
    at::Tensor copy_;
    uint64_t done_ = 0;
    bool finished_ = false;
};

}  // namespace safetensors_torch::layer
