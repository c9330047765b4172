#include "cpp/write/save_sharded.h"

#include <utility>

#include "cpp/error.h"

namespace safetensors_torch::layer {
namespace {

// `tensors` may be without data.
rust::Box<core::ShardPlan> divide(const NamedTensors& tensors, const std::string& stem, int64_t max_shard_size) {
    if (max_shard_size <= 0) {
        fail(Kind::value, "max_shard_size is " + std::to_string(max_shard_size) +
                              ": give the most bytes of tensors that one file may have, 1 or more");
    }
    std::vector<uint64_t> sizes;
    sizes.reserve(tensors.size());
    for (const auto& entry : tensors) {
        sizes.push_back(entry.second.nbytes());
    }
    return core::plan_shards({sizes.data(), sizes.size()}, as_bytes(stem), static_cast<uint64_t>(max_shard_size));
}

rust::Box<core::ShardPlan> plan(NamedTensors& tensors, std::optional<Metadata>& metadata, const std::string& stem,
                                int64_t max_shard_size, const SaveRules& rules) {
    check_saveable(tensors, metadata, rules);
    return divide(tensors, stem, max_shard_size);
}

rust::Box<core::ShardedWriter> begin(const std::string& directory, const core::ShardPlan& plan,
                                     const std::vector<std::string>& names) {
    std::vector<core::Piece> pieces;
    pieces.reserve(names.size());
    for (const std::string& name : names) {
        pieces.push_back({as_bytes(name)});
    }
    return core::create_shards(as_bytes(directory), plan, {pieces.data(), pieces.size()});
}

// The file of one shard, which its checkpoint keeps until all are complete.
class ShardSink final : public Sink {
  public:
    ShardSink(core::ShardedWriter& checkpoint, size_t shard, uint64_t length)
        : checkpoint_(checkpoint), writer_(checkpoint.create(shard, length)) {}

    uint64_t write(const std::vector<core::Piece>& pieces, Deadline until) override {
        return (*writer_)->write({pieces.data(), pieces.size()}, until.milliseconds_left());
    }

    void finish() override {
        checkpoint_.keep(std::move(*writer_));
        writer_.reset();
    }

  private:
    core::ShardedWriter& checkpoint_;
    std::optional<rust::Box<core::FileWriter>> writer_;
};

}  // namespace

PendingShardedSave::PendingShardedSave(NamedTensors tensors, std::optional<Metadata> metadata, std::string directory,
                                       const std::string& stem, int64_t max_shard_size, const SaveRules& rules)
    : directory_(std::move(directory)), plan_(plan(tensors, metadata, stem, max_shard_size, rules)) {
    std::vector<NamedTensors> members(plan_->count());
    const auto shard_of = plan_->shard_of();
    names_.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        names_.push_back(tensors[i].first);
        members[shard_of[i]].push_back(tensors[i]);
    }
    for (NamedTensors& shard : members) {
        shards_.push_back(c10::make_intrusive<PendingSave>(std::move(shard), metadata, directory_, rules));
    }
}

int64_t PendingShardedSave::size() const {
    int64_t bytes = 0;
    for (const auto& shard : shards_) {
        bytes += shard->size();
    }
    return bytes;
}

void PendingShardedSave::start(bool durable) {
    writer_ = begin(directory_, *plan_, names_);
    durable_ = durable;
    next_ = 0;
    done_ = 0;
    has_begun_next_ = false;
}

bool PendingShardedSave::advance(Deadline until) {
    if (!writer_) {
        fail(Kind::value, "nothing was begun that could be gone on with");
    }
    try {
        for (; next_ < shards_.size(); ++next_) {
            PendingSave& shard = *shards_[next_];
            if (!std::exchange(has_begun_next_, true)) {
                shard.start(std::make_unique<ShardSink>(**writer_, next_, static_cast<uint64_t>(shard.size())));
            }
            if (!shard.advance(until)) {
                return false;
            }
            done_ += shard.done();
            shard.cancel();
            has_begun_next_ = false;
        }
        if (!(*writer_)->commit(durable_, until.milliseconds_left())) {
            return false;
        }
        for (const auto& name : (*writer_)->file_names()) {
            file_names_.emplace_back(name);
        }
        writer_.reset();
        return true;
    } catch (...) {
        cancel();
        throw;
    }
}

int64_t PendingShardedSave::done() const {
    return done_ + (has_begun_next_ && next_ < shards_.size() ? shards_[next_]->done() : 0);
}

void PendingShardedSave::cancel() {
    // The sink of a shard refers to the writer.
    for (const auto& shard : shards_) {
        shard->cancel();
    }
    has_begun_next_ = false;
    writer_.reset();
}

ShardedWriter::ShardedWriter(NamedTensors specs, std::optional<Metadata> metadata, std::string directory,
                             const std::string& stem, int64_t max_shard_size)
    : specs_(std::move(specs)), metadata_(std::move(metadata)), directory_(std::move(directory)) {
    const auto plan = divide(specs_, stem, max_shard_size);
    members_.resize(plan->count());
    const auto shard_of = plan->shard_of();
    std::vector<std::string> names;
    for (size_t i = 0; i < specs_.size(); ++i) {
        members_[shard_of[i]].push_back(i);
        names.push_back(specs_[i].first);
    }
    writer_ = begin(directory_, *plan, names);
}

std::vector<std::vector<std::string>> ShardedWriter::members() const {
    std::vector<std::vector<std::string>> names(members_.size());
    for (size_t shard = 0; shard < members_.size(); ++shard) {
        for (const size_t place : members_[shard]) {
            names[shard].push_back(specs_[place].first);
        }
    }
    return names;
}

void ShardedWriter::start(const std::vector<at::Tensor>& tensors) {
    if (!writer_ || current_ || next_ == members_.size()) {
        fail(Kind::value, "this checkpoint waits for no other file");
    }
    const std::vector<size_t>& members = members_[next_];
    if (tensors.size() != members.size()) {
        fail(Kind::value, "file " + std::to_string(next_ + 1) + " of the checkpoint takes " +
                              std::to_string(members.size()) + " tensors, not " + std::to_string(tensors.size()));
    }
    NamedTensors named;
    for (size_t i = 0; i < members.size(); ++i) {
        const auto& [name, spec] = specs_[members[i]];
        if (tensors[i].scalar_type() != spec.scalar_type() || tensors[i].sizes() != spec.sizes()) {
            fail(Kind::value, "tensor " + repr(name) + " is not of the dtype and the shape that were declared");
        }
        named.emplace_back(name, tensors[i]);
    }
    auto file = std::make_unique<PendingSave>(std::move(named), metadata_, directory_);
    size_ = file->size();
    file->start(std::make_unique<ShardSink>(**writer_, next_, static_cast<uint64_t>(size_)));
    current_ = std::move(file);
}

bool ShardedWriter::advance(Deadline until) {
    if (!current_) {
        fail(Kind::value, "no file of this checkpoint was begun");
    }
    if (!current_->advance(until)) {
        return false;
    }
    current_.reset();
    ++next_;
    return true;
}

bool ShardedWriter::commit(bool durable, Deadline until) {
    if (!writer_ || next_ < members_.size()) {
        fail(Kind::value, "not all files of this checkpoint are written");
    }
    if (!(*writer_)->commit(durable, until.milliseconds_left())) {
        return false;
    }
    for (const auto& name : (*writer_)->file_names()) {
        file_names_.emplace_back(name);
    }
    writer_.reset();
    return true;
}

void ShardedWriter::cancel() {
    current_.reset();
    writer_.reset();
}

namespace {

void register_sharded_writer(torch::Library& library) {
    using Self = c10::intrusive_ptr<ShardedWriter>;
    library.class_<ShardedWriter>("ShardedWriter")
        .def(torch::init([](std::vector<std::string> names, std::vector<at::Tensor> specs,
                            const std::optional<Metadata>& metadata, const std::string& directory,
                            const std::string& stem, int64_t max_shard_size) {
            return guarded([&] {
                return c10::make_intrusive<ShardedWriter>(named(std::move(names), std::move(specs)), metadata,
                                                          directory, stem, max_shard_size);
            });
        }))
        .def("members", [](const Self& self) { return self->members(); })
        .def("start",
             [](const Self& self, const std::vector<at::Tensor>& tensors) { guarded([&] { self->start(tensors); }); })
        .def("advance", [](const Self& self,
                           double seconds) { return guarded([&] { return self->advance(Deadline::in(seconds)); }); })
        .def("size", [](const Self& self) { return self->size(); })
        .def("done", [](const Self& self) { return self->done(); })
        .def("commit",
             [](const Self& self, bool durable, double seconds) {
                 return guarded([&] { return self->commit(durable, Deadline::in(seconds)); });
             })
        .def("file_names", [](const Self& self) { return self->file_names(); })
        .def("cancel", [](const Self& self) { self->cancel(); });
}

}  // namespace

void register_sharded_saves(torch::Library& library) {
    register_sharded_writer(library);
    using Self = c10::intrusive_ptr<PendingShardedSave>;
    library.class_<PendingShardedSave>("PendingShardedSave")
        .def("size", [](const Self& self) { return self->size(); })
        .def("start",
             [](const Self& self, bool durable, double seconds) {
                 return guarded([&] {
                     self->start(durable);
                     return self->advance(Deadline::in(seconds));
                 });
             })
        .def("advance", [](const Self& self,
                           double seconds) { return guarded([&] { return self->advance(Deadline::in(seconds)); }); })
        .def("done", [](const Self& self) { return self->done(); })
        .def("cancel", [](const Self& self) { self->cancel(); })
        .def("file_names", [](const Self& self) { return self->file_names(); });
}

}  // namespace safetensors_torch::layer
