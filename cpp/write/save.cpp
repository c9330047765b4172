#include "cpp/write/save.h"

#include <utility>

#include "cpp/bytes.h"
#include "cpp/compat.h"
#include "cpp/dtype.h"
#include "cpp/error.h"
#include "cpp/pending.h"
#include "include/safetensors_torch.h"

namespace safetensors_torch::layer {
namespace {

rust::Box<core::SavePlan> make_plan(NamedTensors& tensors, std::optional<Metadata>& metadata, const std::string& path,
                                    const SaveRules& rules) {
    check_saveable(tensors, metadata, rules);
    const Specs specs(tensors);
    const auto entries = entries_of(metadata);
    return core::plan_save(specs.slice(), {entries.data(), entries.size()}, metadata.has_value(), as_bytes(path));
}

class FileSink final : public Sink {
  public:
    FileSink(const std::string& path, bool durable, uint64_t length)
        : writer_(core::create_file(as_bytes(path), length)), durable_(durable) {}

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

Specs::Specs(const NamedTensors& tensors) {
    std::vector<std::pair<size_t, size_t>> spans;
    std::vector<uint8_t> dtypes;
    spans.reserve(tensors.size());
    dtypes.reserve(tensors.size());
    for (const auto& [name, tensor] : tensors) {
        const auto dtype = from_torch(tensor.scalar_type());
        if (!dtype) {
            fail(ErrorCategory::safetensor,
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

PendingSave::PendingSave(NamedTensors tensors, std::optional<Metadata> metadata, const std::string& path,
                         const SaveRules& rules)
    : tensors_(std::move(tensors)), plan_(make_plan(tensors_, metadata, path, rules)) {
    memory_.reserve(tensors_.size());
    for (const auto& entry : tensors_) {
        memory_.emplace_back(entry.second);
    }
}

void PendingSave::set_sink(SinkMaker make_sink) {
    make_sink_ = std::move(make_sink);
    download_.reset();
}

void PendingSave::set_file(const std::string& path, bool durable) {
    set_sink([=, length = plan_->total_bytes()] { return std::make_unique<FileSink>(path, durable, length); });
}

void PendingSave::set_memory(const at::Tensor& out) {
    if (out.scalar_type() != at::kByte || !out.is_cpu() || !out.is_contiguous() ||
        out.nbytes() != plan_->total_bytes()) {
        fail(ErrorCategory::value, "save needs a contiguous uint8 tensor on the CPU of " +
                                       std::to_string(plan_->total_bytes()) + " elements to write into");
    }
    check_whole("out", out);
    set_sink([out] { return std::make_unique<MemorySink>(out); });
}

// Fails if a tensor that is not written yet has other memory: the caller's code has run since the last step.
void PendingSave::check_memory() const {
    uint64_t end = plan_->header().size();
    for (size_t place = 0; place < tensors_.size(); ++place) {
        end += plan_->nbytes(place);
        if (end > download_->done_bytes()) {
            const size_t i = plan_->tensor(place);
            memory_[i].check(tensors_[i].first, tensors_[i].second);
        }
    }
}

bool PendingSave::advance(Deadline until) {
    if (!make_sink_) {
        fail(ErrorCategory::value, "the save has no target, has failed, or was cancelled");
    }
    try {
        if (download_ == nullptr) {
            download_ = std::make_unique<Download>(tensors_, *plan_, make_sink_());
        }
        check_memory();
        return download_->advance(until);
    } catch (...) {
        cancel();
        throw;
    }
}

bool PendingSave::is_on_host() const {
    return std::all_of(tensors_.begin(), tensors_.end(),
                       [](const auto& entry) { return safetensors_torch::layer::is_on_host(entry.second); });
}

uint64_t PendingSave::done() const { return download_ == nullptr ? 0 : download_->done_bytes(); }

void PendingSave::cancel() {
    download_.reset();
    make_sink_ = nullptr;
}

void PendingSave::finish() {
    advance(Deadline::never());
    cancel();
}

void register_pending_save(torch::Library& library) {
    using Self = c10::intrusive_ptr<PendingSave>;
    register_pending<PendingSave>(library, "PendingSave")
        .def(torch::init([](std::vector<std::string> names, std::vector<at::Tensor> tensors,
                            const std::optional<Metadata>& metadata, const std::string& path, bool force_contiguous,
                            const std::string& shared) {
            return guarded([&] {
                return c10::make_intrusive<PendingSave>(to_pairs(std::move(names), std::move(tensors)), metadata, path,
                                                        save_rules(force_contiguous, shared));
            });
        }))
        .def("set_file", [](const Self& self, const std::string& path,
                            bool durable) { guarded([&] { self->set_file(path, durable); }); })
        .def("set_memory", [](const Self& self, const at::Tensor& out) { guarded([&] { self->set_memory(out); }); });
}

}  // namespace safetensors_torch::layer
