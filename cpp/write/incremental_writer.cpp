#include "cpp/write/incremental_writer.h"

#include <memory>
#include <utility>

#include "cpp/bytes.h"
#include "cpp/error.h"

namespace safetensors_torch::layer {
namespace {

// Writes one tensor to its place. The save is that of a file with this tensor alone, so its header, the first piece, is
// skipped.
class TensorSink final : public Sink {
  public:
    explicit TensorSink(rust::Box<core::TensorWriter> writer) : writer_(std::move(writer)) {}

    uint64_t write(const std::vector<core::Piece>& pieces, Deadline) override {
        const size_t first = std::exchange(is_past_header_, true) ? 0 : 1;
        (*writer_)->write({pieces.data() + first, pieces.size() - first});
        return bytes_of(pieces);
    }

    void finish() override {
        core::finish_tensor(std::move(*writer_));
        writer_.reset();
    }

  private:
    std::optional<rust::Box<core::TensorWriter>> writer_;
    bool is_past_header_ = false;
};

rust::Box<core::IncrementalWriter> create(const std::string& path, const NamedTensors& tensors,
                                          const std::optional<Metadata>& metadata, bool durable) {
    const Specs specs(tensors);
    const auto entries = entries_of(metadata);
    return core::create_incremental_writer(specs.slice(), {entries.data(), entries.size()}, metadata.has_value(),
                                           as_bytes(path), durable);
}

}  // namespace

IncrementalWriter::IncrementalWriter(std::string path, const NamedTensors& specs,
                                     const std::optional<Metadata>& metadata, bool durable)
    : path_(std::move(path)), writer_(create(path_, specs, metadata, durable)) {}

std::optional<c10::intrusive_ptr<PendingSave>> IncrementalWriter::write(const std::string& name,
                                                                        const at::Tensor& tensor,
                                                                        Deadline until) const {
    const NamedTensors one{{name, tensor}};
    auto save = c10::make_intrusive<PendingSave>(one, std::nullopt, path_);
    const Specs specs(one);
    // Now: the tensor must have been declared, and no other thread may be writing it.
    const auto writer =
        std::make_shared<std::optional<rust::Box<core::TensorWriter>>>(writer_->begin(specs.slice()[0]));
    save->set_sink([writer] { return std::make_unique<TensorSink>(std::move(**writer)); });
    // The first step, so that a small tensor takes one call from Python.
    if (save->advance(until)) {
        return std::nullopt;
    }
    return save;
}

std::vector<std::string> IncrementalWriter::missing() const {
    std::vector<std::string> names;
    for (const auto& name : writer_->missing()) {
        names.emplace_back(name);
    }
    return names;
}

std::string IncrementalWriter::make_joinable() const {
    const auto path = writer_->make_joinable();
    return {path.begin(), path.end()};
}

void register_incremental_writer(torch::Library& library) {
    using Self = c10::intrusive_ptr<IncrementalWriter>;
    library.class_<IncrementalWriter>("IncrementalWriter")
        .def(torch::init([](const std::string& path, std::vector<std::string> names, std::vector<at::Tensor> specs,
                            const std::optional<Metadata>& metadata, bool durable) {
            return guarded([&] {
                return c10::make_intrusive<IncrementalWriter>(path, to_pairs(std::move(names), std::move(specs)),
                                                              metadata, durable);
            });
        }))
        .def("write",
             [](const Self& self, const std::string& name, const at::Tensor& tensor, double seconds) {
                 return guarded([&] { return self->write(name, tensor, Deadline::in(seconds)); });
             })
        .def("missing", [](const Self& self) { return guarded([&] { return self->missing(); }); })
        .def("is_open", [](const Self& self) { return self->is_open(); })
        .def("commit", [](const Self& self) { guarded([&] { self->commit(); }); })
        .def("make_joinable", [](const Self& self) { return guarded([&] { return self->make_joinable(); }); })
        .def("commit_joined", [](const Self& self) { guarded([&] { self->commit_joined(); }); })
        .def("discard", [](const Self& self) { self->discard(); });
}

}  // namespace safetensors_torch::layer
