#include "cpp/write/joined.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <iterator>
#include <memory>
#include <unordered_set>
#include <utility>

#include "cpp/bytes.h"
#include "cpp/dtype.h"
#include "cpp/error.h"
#include "cpp/pending.h"

namespace safetensors_torch::layer {
namespace {

// A save of parts is that of a file with these parts alone, so its header, the first piece, is skipped.
class JoinedSink final : public Sink {
  public:
    JoinedSink(rust::Box<core::JoinedWriter> writer, bool durable) : writer_(std::move(writer)), durable_(durable) {}

    uint64_t write(const std::vector<core::Piece>& pieces, Deadline) override {
        const size_t first = std::exchange(is_past_header_, true) ? 0 : 1;
        (*writer_)->write({pieces.data() + first, pieces.size() - first});
        return bytes_of(pieces);
    }

    void finish() override {
        core::finish_joined(std::move(*writer_), durable_);
        writer_.reset();
    }

  private:
    std::optional<rust::Box<core::JoinedWriter>> writer_;
    bool durable_;
    bool is_past_header_ = false;
};

rust::Box<core::ShardPlan> assign(const NamedTensors& tensors, const std::string& stem,
                                  const std::vector<int64_t>& files) {
    if (files.size() != tensors.size()) {
        fail(ErrorCategory::value,
             std::to_string(tensors.size()) + " tensors, but the files of " + std::to_string(files.size()));
    }
    const auto sizes = nbytes_of_each(tensors);
    std::vector<size_t> numbers;
    numbers.reserve(files.size());
    for (const int64_t file : files) {
        if (file < 0) {
            fail(ErrorCategory::value, "file number " + std::to_string(file) + ": number the files from 1 on");
        }
        numbers.push_back(static_cast<size_t>(file));
    }
    return core::assign_shards({sizes.data(), sizes.size()}, {numbers.data(), numbers.size()}, as_bytes(stem));
}

// Names that differ, for parts that may be of one tensor.
std::vector<std::string> labels_of(const std::vector<std::string>& names) {
    std::unordered_set<std::string> used(names.begin(), names.end());
    std::unordered_set<std::string> seen;
    std::vector<std::string> labels;
    labels.reserve(names.size());
    for (const std::string& name : names) {
        std::string label = name;
        if (!seen.insert(name).second) {
            for (size_t part = 2; !used.insert(label).second; ++part) {
                label = name + " (part " + std::to_string(part) + ")";
            }
        }
        labels.push_back(std::move(label));
    }
    return labels;
}

// Starts in elements of the header, which counts single values where torch counts pairs.
std::vector<uint64_t> header_starts(const at::Tensor& part, const std::vector<int64_t>& starts,
                                    const std::string& name) {
    if (static_cast<int64_t>(starts.size()) != part.dim()) {
        fail(ErrorCategory::value, "tensor " + repr(name) + ": " + std::to_string(starts.size()) +
                                       " starts for a part with " + std::to_string(part.dim()) + " dimension(s)");
    }
    for (const int64_t start : starts) {
        if (start < 0) {
            fail(ErrorCategory::value, "tensor " + repr(name) + ": a part cannot start at " + std::to_string(start));
        }
    }
    std::vector<uint64_t> dims;
    append_header_shape(dims, part.scalar_type(), starts, name);
    return dims;
}

constexpr SaveRules kPartRules{/*force_contiguous=*/true, /*keep_one=*/false, /*allow_shared=*/true};

}  // namespace

CheckpointLayout::CheckpointLayout(const NamedTensors& specs, const std::optional<Metadata>& metadata,
                                   const std::string& directory, const std::string& stem, int64_t max_shard_size,
                                   const std::vector<int64_t>& files)
    : plan_(files.empty() ? divide(specs, stem, max_shard_size) : assign(specs, stem, files)) {
    std::vector<NamedTensors> members(plan_->count());
    members_.resize(plan_->count());
    const auto shard_of = plan_->shard_of();
    for (size_t i = 0; i < specs.size(); ++i) {
        shard_of_.push_back(static_cast<int64_t>(shard_of[i]));
        names_.push_back(specs[i].first);
        members[shard_of[i]].push_back(specs[i]);
        members_[shard_of[i]].push_back(static_cast<int64_t>(i));
    }
    const auto entries = entries_of(metadata);
    for (const NamedTensors& shard : members) {
        saves_.push_back(core::plan_save(Specs(shard).slice(), {entries.data(), entries.size()}, metadata.has_value(),
                                         as_bytes(directory)));
    }
}

at::Tensor CheckpointLayout::header(int64_t file) const {
    const auto bytes = saves_.at(static_cast<size_t>(file))->header();
    at::Tensor header = at::empty({static_cast<int64_t>(bytes.size())}, at::kByte);
    std::copy(bytes.begin(), bytes.end(), static_cast<uint8_t*>(header.mutable_data_ptr()));
    return header;
}

std::vector<int64_t> CheckpointLayout::order(int64_t file) const {
    const auto& members = members_.at(static_cast<size_t>(file));
    const auto& save = saves_.at(static_cast<size_t>(file));
    std::vector<int64_t> order;
    order.reserve(members.size());
    for (size_t place = 0; place < members.size(); ++place) {
        order.push_back(members[save->tensor(place)]);
    }
    return order;
}

std::vector<std::string> CheckpointLayout::file_names() const {
    const auto names = plan_->file_names();
    return {names.begin(), names.end()};
}

std::string CheckpointLayout::index() const {
    const auto pieces = as_texts(names_);
    const auto text = plan_->index({pieces.data(), pieces.size()});
    return {text.begin(), text.end()};
}

std::vector<std::string> CheckpointLayout::stale(const std::vector<std::string>& names) const {
    std::vector<std::string> stale;
    std::copy_if(names.begin(), names.end(), std::back_inserter(stale),
                 [this](const std::string& name) { return plan_->makes_stale(as_bytes(name)); });
    return stale;
}

JoinedCheckpoint::JoinedCheckpoint(const NamedTensors& specs, const std::optional<Metadata>& metadata,
                                   const std::string& directory, const std::string& stem, int64_t max_shard_size,
                                   const std::vector<int64_t>& files, int64_t first_number, bool durable)
    : durable_(durable) {
    if (first_number < 0) {
        fail(ErrorCategory::value, "first_number is " + std::to_string(first_number) + ": give 0 or more");
    }
    const CheckpointLayout layout(specs, metadata, directory, stem, max_shard_size, files);
    shard_of_ = layout.files();
    writer_ = begin_checkpoint(directory, layout.plan(), layout.names());
    for (size_t shard = 0; shard < layout.saves().size(); ++shard) {
        const auto& save = layout.saves()[shard];
        created_.push_back((*writer_)->create(shard, save->total_bytes()));
        const auto header = save->header();
        const core::Piece piece{header.data(), header.size()};
        created_.back()->write({&piece, 1}, 0);
        const auto name = created_.back()->make_joinable(static_cast<uint64_t>(first_number) + shard);
        hidden_names_.emplace_back(name.begin(), name.end());
    }
}

bool JoinedCheckpoint::advance(Deadline until) {
    if (!writer_) {
        fail(ErrorCategory::value, "this checkpoint has failed, or was cancelled");
    }
    try {
        for (rust::Box<core::FileWriter>& file : created_) {
            (*writer_)->add(std::move(file));
        }
        created_.clear();
        is_committed_ = is_committed_ || (*writer_)->commit(durable_, until.milliseconds_left());
        return is_committed_;
    } catch (...) {
        cancel();
        throw;
    }
}

void JoinedCheckpoint::cancel() {
    created_.clear();
    writer_.reset();
}

JoinedSave::JoinedSave(const std::string& path, const std::vector<std::string>& names, std::vector<at::Tensor> parts,
                       std::vector<std::vector<int64_t>> starts, bool durable)
    : PendingSave(to_pairs(labels_of(names), std::move(parts)), std::nullopt, path, kPartRules) {
    if (starts.size() != names.size()) {
        fail(ErrorCategory::value,
             std::to_string(names.size()) + " parts, but the starts of " + std::to_string(starts.size()));
    }
    std::vector<std::vector<uint64_t>> begins;
    begins.reserve(starts.size());
    for (size_t i = 0; i < starts.size(); ++i) {
        begins.push_back(header_starts(tensors()[i].second, starts[i], names[i]));
    }
    set_sink([this, path, names, begins = std::move(begins), durable] {
        auto writer = core::join_file(as_bytes(path));
        const Specs specs(tensors());
        for (size_t place = 0; place < names.size(); ++place) {
            const size_t i = tensor_at(place);
            core::Spec spec = specs.slice()[i];
            spec.name = as_bytes(names[i]);
            writer->add(spec, {begins[i].data(), begins[i].size()});
        }
        return std::make_unique<JoinedSink>(std::move(writer), durable);
    });
}

void register_joined(torch::Library& library) {
    using Layout = c10::intrusive_ptr<CheckpointLayout>;
    library.class_<CheckpointLayout>("CheckpointLayout")
        .def(torch::init([](std::vector<std::string> names, std::vector<at::Tensor> specs,
                            const std::optional<Metadata>& metadata, const std::string& directory,
                            const std::string& stem, int64_t max_shard_size, const std::vector<int64_t>& files) {
            return guarded([&] {
                return c10::make_intrusive<CheckpointLayout>(to_pairs(std::move(names), std::move(specs)), metadata,
                                                             directory, stem, max_shard_size, files);
            });
        }))
        .def("files", [](const Layout& self) { return self->files(); })
        .def("header", [](const Layout& self, int64_t file) { return guarded([&] { return self->header(file); }); })
        .def("order", [](const Layout& self, int64_t file) { return guarded([&] { return self->order(file); }); })
        .def("file_names", [](const Layout& self) { return self->file_names(); })
        .def("index", [](const Layout& self) { return guarded([&] { return self->index(); }); })
        .def("stale", [](const Layout& self, const std::vector<std::string>& names) { return self->stale(names); });
    using Checkpoint = c10::intrusive_ptr<JoinedCheckpoint>;
    register_pending<JoinedCheckpoint>(library, "JoinedCheckpoint")
        .def(torch::init([](std::vector<std::string> names, std::vector<at::Tensor> specs,
                            const std::optional<Metadata>& metadata, const std::string& directory,
                            const std::string& stem, int64_t max_shard_size, const std::vector<int64_t>& files,
                            int64_t first_number, bool durable) {
            return guarded([&] {
                return c10::make_intrusive<JoinedCheckpoint>(to_pairs(std::move(names), std::move(specs)), metadata,
                                                             directory, stem, max_shard_size, files, first_number,
                                                             durable);
            });
        }))
        .def("files", [](const Checkpoint& self) { return self->files(); })
        .def("hidden_names", [](const Checkpoint& self) { return self->hidden_names(); })
        .def("result", [](const Checkpoint& self) { return guarded([&] { return self->result(); }); });
    register_pending<JoinedSave>(library, "JoinedSave")
        .def(torch::init([](const std::string& path, const std::vector<std::string>& names,
                            std::vector<at::Tensor> parts, std::vector<std::vector<int64_t>> starts, bool durable) {
            return guarded([&] {
                return c10::make_intrusive<JoinedSave>(path, names, std::move(parts), std::move(starts), durable);
            });
        }));
}

}  // namespace safetensors_torch::layer
