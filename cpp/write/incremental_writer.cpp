#include "cpp/write/incremental_writer.h"

#include <memory>
#include <utility>

#include "cpp/error.h"

namespace safetensors_torch::layer {
namespace {

// One tensor's bytes in its place. The save of it, which is of a file with this tensor alone, begins with a header that
// the file has already.
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
    save->start(std::make_unique<TensorSink>(writer_->begin(specs.slice()[0])));
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

void register_incremental_writer(torch::Library& library) {
    using Self = c10::intrusive_ptr<IncrementalWriter>;
    library.class_<IncrementalWriter>("IncrementalWriter")
        .def(torch::init([](const std::string& path, std::vector<std::string> names, std::vector<at::Tensor> specs,
                            const std::optional<Metadata>& metadata, bool durable) {
            return guarded([&] {
                if (names.size() != specs.size()) {
                    fail(Kind::value, "a file takes as many names as tensors");
                }
                NamedTensors named;
                named.reserve(names.size());
                for (size_t i = 0; i < names.size(); ++i) {
                    named.emplace_back(std::move(names[i]), std::move(specs[i]));
                }
                return c10::make_intrusive<IncrementalWriter>(path, named, metadata, durable);
            });
        }))
        .def("write",
             [](const Self& self, const std::string& name, const at::Tensor& tensor, double seconds) {
                 return guarded([&] { return self->write(name, tensor, Deadline::in(seconds)); });
             })
        .def("missing", [](const Self& self) { return guarded([&] { return self->missing(); }); })
        .def("is_open", [](const Self& self) { return self->is_open(); })
        .def("commit", [](const Self& self) { guarded([&] { self->commit(); }); })
        .def("discard", [](const Self& self) { self->discard(); });
}

}  // namespace safetensors_torch::layer
