#include "cpp/save.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include <cstring>

#include "cpp/dtype.h"
#include "cpp/error.h"
#include "include/safetensors_torch.h"

namespace safetensors_torch {
namespace {

void refuse_sparse(const NamedTensors& tensors) {
    std::string names;
    for (const auto& [name, tensor] : tensors) {
        if (tensor.layout() != at::kStrided || tensor.is_nested()) {
            names += (names.empty() ? "" : ", ") + repr(name);
        }
    }
    if (!names.empty()) {
        fail(Kind::value, "You are trying to save a sparse tensors: `[" + names +
                              "]` which this library does not support. You can make it a dense tensor before saving "
                              "with `.to_dense()` but be aware this might make a much larger file than needed.");
    }
}

void refuse_shared(const NamedTensors& tensors) {
    std::string groups;
    for (const auto& group : overlapping(tensors)) {
        groups += (groups.empty() ? "" : ", ") + repr_set(group);
    }
    if (!groups.empty()) {
        fail(Kind::runtime,
             "Some tensors share memory, so the file would hold it more than once and loading would not share it "
             "again: [" +
                 groups +
                 "]. Save the model with `save_model`, which keeps one name of each group, or `.clone()` them.");
    }
}

void refuse_not_contiguous(const NamedTensors& tensors) {
    for (const auto& [name, tensor] : tensors) {
        if (!tensor.is_contiguous()) {
            fail(Kind::value,
                 "You are trying to save a non contiguous tensor: `" + name +
                     "` which is not allowed. Call `.contiguous()` on it to pack it before saving, or, if it "
                     "is a view of another tensor, save only that one and take the view again after loading.");
        }
    }
}

void refuse_without_data(const NamedTensors& tensors) {
    for (const auto& [name, tensor] : tensors) {
        const bool is_meta = tensor.is_meta() || (tensor.has_storage() && tensor.storage().device().is_meta());
        if (is_meta) {
            fail(Kind::runtime, "Cannot copy out of meta tensor; no data! Tensor `" + name +
                                    "` is on the meta device (or fake): materialize it before saving.");
        }
        if (!tensor.has_storage()) {
            fail(Kind::safetensor,
                 "tensor " + repr(name) +
                     " is of a kind that has no memory of its own (a wrapper subclass): convert it to a "
                     "plain tensor before saving");
        }
    }
}

// A settled layout, and the tensors that it is of.
struct Plan {
    NamedTensors tensors;
    rust::Box<core::SavePlan> layout;
};

rust::Vec<core::Entry> entries_of(const std::optional<Metadata>& metadata) {
    const auto copy = [](const std::string& text) {
        rust::Vec<uint8_t> bytes;
        bytes.reserve(text.size());
        for (const char c : text) {
            bytes.push_back(static_cast<uint8_t>(c));
        }
        return bytes;
    };
    rust::Vec<core::Entry> entries;
    if (metadata) {
        for (const auto& entry : *metadata) {
            entries.push_back({copy(entry.key()), copy(entry.value())});
        }
    }
    return entries;
}

// Checks everything and settles the layout; nothing is written yet. `path` is for the errors, empty if there is none.
Plan make_plan(const Tensors& dict, const std::optional<Metadata>& metadata, const std::string& path) {
    NamedTensors tensors = named(dict);
    check_saveable(tensors);
    // All shapes in one array, which must not move any more once the specs point into it.
    std::vector<uint64_t> dims;
    std::vector<std::pair<size_t, size_t>> spans;
    std::vector<uint8_t> dtypes;
    spans.reserve(tensors.size());
    dtypes.reserve(tensors.size());
    for (const auto& [name, tensor] : tensors) {
        const auto dtype = from_torch(tensor.scalar_type());
        if (!dtype) {
            fail(Kind::safetensor,
                 "tensor " + repr(name) + " has dtype " + c10::getDtypeNames(tensor.scalar_type()).first +
                     ", for which the safetensors format has no code: convert it before saving",
                 SFT_ERROR_UNSUPPORTED_DTYPE);
        }
        const size_t start = dims.size();
        append_header_shape(dims, tensor.scalar_type(), tensor.sizes(), name);
        spans.emplace_back(start, dims.size() - start);
        dtypes.push_back(*dtype);
    }
    std::vector<core::Spec> specs;
    specs.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        specs.push_back({as_bytes(tensors[i].first), dtypes[i], {dims.data() + spans[i].first, spans[i].second}});
    }
    const auto entries = entries_of(metadata);
    auto layout = core::plan_save({specs.data(), specs.size()}, {entries.data(), entries.size()}, metadata.has_value(),
                                  as_bytes(path));
    return {std::move(tensors), std::move(layout)};
}

// The values of a tensor in host memory: itself where it is there as it is. One tensor at a time, so that a model on a
// device never lies on the host as a whole.
at::Tensor on_host(const at::Tensor& tensor) {
    const at::NoGradGuard no_grad;
    return tensor.to(at::kCPU).resolve_conj().resolve_neg().contiguous();
}

// Calls `sink(bytes)` with the header, then with each tensor's bytes, in file order.
template <typename Sink>
void stream(const Plan& plan, Sink&& sink) {
    sink(plan.layout->header());
    for (size_t place = 0; place < plan.tensors.size(); ++place) {
        const auto& [name, tensor] = plan.tensors[plan.layout->tensor(place)];
        const uint64_t nbytes = plan.layout->nbytes(place);
        if (nbytes == 0) {
            continue;
        }
        const at::Tensor host = on_host(tensor);
        const auto* data = static_cast<const uint8_t*>(host.const_data_ptr());
        if (data == nullptr || host.nbytes() != nbytes) {
            fail(Kind::safetensor,
                 "tensor " + repr(name) + " has no data that can be read: materialize it before saving");
        }
        sink(rust::Slice<const uint8_t>(data, nbytes));
    }
}

void write_to(const Plan& plan, const at::Tensor& out) {
    auto* position = static_cast<uint8_t*>(out.mutable_data_ptr());
    stream(plan, [&](rust::Slice<const uint8_t> bytes) {
        std::memcpy(position, bytes.data(), bytes.size());
        position += bytes.size();
    });
}

}  // namespace

void check_saveable(const NamedTensors& tensors) {
    refuse_sparse(tensors);
    refuse_shared(tensors);
    refuse_not_contiguous(tensors);
    refuse_without_data(tensors);
}

void save_file(const Tensors& tensors, const std::string& path, const std::optional<Metadata>& metadata) {
    const Plan plan = make_plan(tensors, metadata, path);
    auto writer = core::create_file(as_bytes(path), plan.layout->total_bytes());
    stream(plan, [&](rust::Slice<const uint8_t> bytes) { writer->write(bytes); });
    core::commit_file(std::move(writer));
}

at::Tensor save(const Tensors& tensors, const std::optional<Metadata>& metadata) {
    const Plan plan = make_plan(tensors, metadata, "");
    at::Tensor out = at::empty({static_cast<int64_t>(plan.layout->total_bytes())},
                               at::TensorOptions().dtype(at::kByte).device(at::kCPU).requires_grad(false));
    write_to(plan, out);
    return out;
}

int64_t save_size(const Tensors& tensors, const std::optional<Metadata>& metadata) {
    return static_cast<int64_t>(make_plan(tensors, metadata, "").layout->total_bytes());
}

void save_into(const Tensors& tensors, const at::Tensor& out, const std::optional<Metadata>& metadata) {
    const Plan plan = make_plan(tensors, metadata, "");
    if (out.scalar_type() != at::kByte || !out.is_cpu() || !out.is_contiguous() ||
        out.nbytes() != plan.layout->total_bytes()) {
        fail(Kind::value, "save needs a contiguous uint8 tensor on the CPU of " +
                              std::to_string(plan.layout->total_bytes()) + " elements to write into");
    }
    write_to(plan, out);
}

}  // namespace safetensors_torch
