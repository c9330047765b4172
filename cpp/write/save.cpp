#include "cpp/write/save.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "cpp/compat.h"
#include "cpp/dtype.h"
#include "cpp/error.h"
#include "include/safetensors_torch.h"

namespace safetensors_torch::layer {
namespace {

bool is_dense(const at::Tensor& tensor) { return tensor.layout() == at::kStrided && !tensor.is_nested(); }

bool is_without_data(const at::Tensor& tensor) {
    return tensor.is_meta() || !tensor.has_storage() || tensor.storage().device().is_meta();
}

// Whether nothing but its sharing of memory could be against saving it.
bool is_plain(const at::Tensor& tensor) {
    return is_dense(tensor) && tensor.is_contiguous() && !is_without_data(tensor) &&
           (tensor.numel() == 0 || (has_memory(tensor) && is_whole(tensor)));
}

void refuse_layouts(const NamedTensors& tensors) {
    std::string names;
    for (const auto& [name, tensor] : tensors) {
        if (tensor.is_nested()) {
            fail(Kind::value, "tensor " + repr(name) +
                                  " is nested: its parts have shapes of their own, and the format has one shape for a "
                                  "tensor; save its `.values()` and `.offsets()`, or `.to_padded_tensor(0)`");
        }
        if (!is_dense(tensor)) {
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
                 "]. Save the model with `save_model`, or these with `shared` = \"keep_one\", which keeps one name of "
                 "each group, or `.clone()` them.");
    }
}

// Removes all names but one of each group of tensors that share memory, and notes them in `metadata`.
void drop_shared(NamedTensors& tensors, std::optional<Metadata>& metadata) {
    // Which covers what it shares is not to be asked of a storage that is too small.
    for (const auto& [name, tensor] : tensors) {
        check_whole(name, tensor);
    }
    const auto dropped = tied_names(tensors, {});
    if (dropped.empty()) {
        return;
    }
    const auto is_dropped = [&](const auto& entry) { return dropped.count(entry.first) != 0; };
    tensors.erase(std::remove_if(tensors.begin(), tensors.end(), is_dropped), tensors.end());
    // A copy: a c10::Dict refers to what its copies refer to.
    Metadata entries = metadata ? metadata->copy() : Metadata();
    for (const auto& [name, kept] : dropped) {
        entries.insert(name, kept);
    }
    metadata = std::move(entries);
}

void refuse_not_contiguous(const NamedTensors& tensors) {
    for (const auto& [name, tensor] : tensors) {
        if (!tensor.is_contiguous()) {
            fail(Kind::value,
                 "You are trying to save a non contiguous tensor: `" + shortened(name) +
                     "` which is not allowed. Call `.contiguous()` on it to pack it before saving, or save with "
                     "`force_contiguous`, or, if it is a view of another tensor, save only that one and take the "
                     "view again after loading.");
        }
    }
}

void refuse_without_data(const NamedTensors& tensors) {
    for (const auto& [name, tensor] : tensors) {
        if (!tensor.defined()) {
            fail(Kind::value, "tensor " + repr(name) + " is undefined: leave it out, or give it a value before saving");
        }
        if (is_without_data(tensor) && (tensor.is_meta() || tensor.has_storage())) {
            fail(Kind::runtime, "Cannot copy out of meta tensor; no data! Tensor `" + shortened(name) +
                                    "` is on the meta device (or fake): materialize it before saving.");
        }
        if (is_wrapper(tensor)) {
            fail(Kind::safetensor,
                 "tensor " + repr(name) +
                     " is of a kind that has no memory of its own (a wrapper subclass, or a tensor in a transform of "
                     "torch.func): convert it to a plain tensor before saving, or save outside of the transform");
        }
        check_whole(name, tensor);
    }
}

rust::Box<core::SavePlan> plan(NamedTensors& tensors, std::optional<Metadata>& metadata, const std::string& path,
                               const SaveRules& rules) {
    check_saveable(tensors, metadata, rules);
    const Specs specs(tensors);
    const auto entries = entries_of(metadata);
    return core::plan_save(specs.slice(), {entries.data(), entries.size()}, metadata.has_value(), as_bytes(path));
}

class FileSink final : public Sink {
  public:
    FileSink(rust::Box<core::FileWriter> writer, bool durable) : writer_(std::move(writer)), durable_(durable) {}

    uint64_t write(const std::vector<core::Piece>& pieces, Deadline until) override {
        return (*writer_)->write({pieces.data(), pieces.size()}, until.milliseconds_left());
    }

    void finish() override {
        core::commit_file(std::move(*writer_), durable_);
        writer_.reset();
    }

  private:
    std::optional<rust::Box<core::FileWriter>> writer_;
    bool durable_;
};

class MemorySink final : public Sink {
  public:
    // Into `out`, which it keeps.
    explicit MemorySink(const at::Tensor& out)
        : out_(out), writer_(core::fill_memory(static_cast<uint8_t*>(out.mutable_data_ptr()), out.nbytes())) {}

    uint64_t write(const std::vector<core::Piece>& pieces, Deadline) override {
        writer_->write({pieces.data(), pieces.size()});
        return bytes_of(pieces);
    }

    void finish() override {}

  private:
    at::Tensor out_;
    rust::Box<core::MemoryWriter> writer_;
};

}  // namespace

SaveRules save_rules(bool force_contiguous, const std::string& shared) {
    if (shared != "error" && shared != "keep_one") {
        fail(Kind::value, "shared is " + repr(shared) + ": choose \"error\" or \"keep_one\"");
    }
    return {force_contiguous, shared == "keep_one"};
}

void check_saveable(NamedTensors& tensors, std::optional<Metadata>& metadata, const SaveRules& rules) {
    // One look at each tensor, as with many of them each look waits for memory. Only where one is not as most are is
    // every question asked of all, in the order in which the answers count.
    const bool all_plain =
        std::all_of(tensors.begin(), tensors.end(), [](const auto& entry) { return is_plain(entry.second); });
    if (!all_plain) {
        refuse_layouts(tensors);
    }
    if (rules.keep_one) {
        drop_shared(tensors, metadata);
    } else {
        refuse_shared(tensors);
    }
    if (!all_plain) {
        if (!rules.force_contiguous) {
            refuse_not_contiguous(tensors);
        }
        refuse_without_data(tensors);
    }
}

Specs::Specs(const NamedTensors& tensors) {
    std::vector<std::pair<size_t, size_t>> spans;
    std::vector<uint8_t> dtypes;
    spans.reserve(tensors.size());
    dtypes.reserve(tensors.size());
    for (const auto& [name, tensor] : tensors) {
        const auto dtype = from_torch(tensor.scalar_type());
        if (!dtype) {
            fail(Kind::safetensor,
                 "tensor " + repr(name) + " has dtype " + dtype_name(tensor.scalar_type()) +
                     ", for which the safetensors format has no code: convert it before saving",
                 SFT_ERROR_UNSUPPORTED_DTYPE);
        }
        const size_t start = dims_.size();
        append_header_shape(dims_, tensor.scalar_type(), tensor.sizes(), name);
        spans.emplace_back(start, dims_.size() - start);
        dtypes.push_back(*dtype);
    }
    specs_.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        specs_.push_back({as_bytes(tensors[i].first), dtypes[i], {dims_.data() + spans[i].first, spans[i].second}});
    }
}

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

PendingSave::PendingSave(NamedTensors tensors, std::optional<Metadata> metadata, const std::string& path,
                         const SaveRules& rules)
    : tensors_(std::move(tensors)), layout_(plan(tensors_, metadata, path, rules)) {
    memory_.reserve(tensors_.size());
    for (const auto& entry : tensors_) {
        memory_.emplace_back(entry.second);
    }
}

int64_t PendingSave::size() const { return static_cast<int64_t>(layout_->total_bytes()); }

void PendingSave::start(std::unique_ptr<Sink> sink) {
    download_ = std::make_unique<Download>(tensors_, *layout_, std::move(sink));
}

void PendingSave::start_file(const std::string& path, bool durable) {
    start(std::make_unique<FileSink>(core::create_file(as_bytes(path), layout_->total_bytes()), durable));
}

void PendingSave::start_into(const at::Tensor& out) {
    if (out.scalar_type() != at::kByte || !out.is_cpu() || !out.is_contiguous() ||
        out.nbytes() != layout_->total_bytes()) {
        fail(Kind::value, "save needs a contiguous uint8 tensor on the CPU of " +
                              std::to_string(layout_->total_bytes()) + " elements to write into");
    }
    check_whole("out", out);
    start(std::make_unique<MemorySink>(out));
}

// Of the tensors that are not written to the end: the caller's code has run since the last step.
void PendingSave::check_memory() const {
    uint64_t end = layout_->header().size();
    for (size_t place = 0; place < tensors_.size(); ++place) {
        end += layout_->nbytes(place);
        if (end > download_->done_bytes()) {
            const size_t i = layout_->tensor(place);
            memory_[i].check(tensors_[i].first, tensors_[i].second);
        }
    }
}

bool PendingSave::advance(Deadline until) {
    if (download_ == nullptr) {
        fail(Kind::value, "nothing was begun that could be gone on with");
    }
    try {
        check_memory();
        return download_->advance(until);
    } catch (...) {
        cancel();
        throw;
    }
}

int64_t PendingSave::done() const { return download_ == nullptr ? 0 : static_cast<int64_t>(download_->done_bytes()); }

void PendingSave::cancel() { download_.reset(); }

void PendingSave::write_file(const std::string& path, bool durable) {
    start_file(path, durable);
    advance(Deadline::never());
    cancel();
}

void PendingSave::write_into(const at::Tensor& out) {
    start_into(out);
    advance(Deadline::never());
    cancel();
}

at::Tensor PendingSave::write() {
    at::Tensor out = at::empty({size()}, at::TensorOptions().dtype(at::kByte).device(at::kCPU).requires_grad(false));
    write_into(out);
    return out;
}

void register_pending_save(torch::Library& library) {
    using Self = c10::intrusive_ptr<PendingSave>;
    library.class_<PendingSave>("PendingSave")
        .def(torch::init([](std::vector<std::string> names, std::vector<at::Tensor> tensors,
                            const std::optional<Metadata>& metadata, const std::string& path, bool force_contiguous,
                            const std::string& shared) {
            return guarded([&] {
                return c10::make_intrusive<PendingSave>(named(std::move(names), std::move(tensors)), metadata, path,
                                                        save_rules(force_contiguous, shared));
            });
        }))
        .def("size", [](const Self& self) { return self->size(); })
        .def("start_file",
             [](const Self& self, const std::string& path, bool durable, double seconds) {
                 return guarded([&] {
                     self->start_file(path, durable);
                     return self->advance(Deadline::in(seconds));
                 });
             })
        .def("start_into",
             [](const Self& self, const at::Tensor& out, double seconds) {
                 return guarded([&] {
                     self->start_into(out);
                     return self->advance(Deadline::in(seconds));
                 });
             })
        .def("advance", [](const Self& self,
                           double seconds) { return guarded([&] { return self->advance(Deadline::in(seconds)); }); })
        .def("done", [](const Self& self) { return self->done(); })
        .def("cancel", [](const Self& self) { self->cancel(); });
}

}  // namespace safetensors_torch::layer
