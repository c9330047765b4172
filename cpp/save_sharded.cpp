#include "cpp/save_sharded.h"

#include <utility>

#include "cpp/error.h"

namespace safetensors_torch {
namespace {

rust::Box<core::ShardPlan> plan(const NamedTensors& tensors, const std::string& stem, int64_t max_shard_bytes) {
    if (max_shard_bytes <= 0) {
        fail(Kind::value, "max_shard_bytes is " + std::to_string(max_shard_bytes) +
                              ": give the most bytes of tensors that one file may have, 1 or more");
    }
    check_saveable(tensors);
    std::vector<uint64_t> sizes;
    sizes.reserve(tensors.size());
    for (const auto& entry : tensors) {
        sizes.push_back(entry.second.nbytes());
    }
    return core::plan_shards({sizes.data(), sizes.size()}, as_bytes(stem), static_cast<uint64_t>(max_shard_bytes));
}

// The file of one shard, which its checkpoint keeps until all are complete.
class ShardSink final : public Sink {
  public:
    ShardSink(core::ShardedWriter& checkpoint, size_t shard, uint64_t length)
        : checkpoint_(checkpoint), writer_(checkpoint.create(shard, length)) {}

    void write(const std::vector<core::Piece>& pieces) override { (*writer_)->write({pieces.data(), pieces.size()}); }

    void finish() override {
        checkpoint_.keep(std::move(*writer_));
        writer_.reset();
    }

  private:
    core::ShardedWriter& checkpoint_;
    std::optional<rust::Box<core::FileWriter>> writer_;
};

}  // namespace

PendingShardedSave::PendingShardedSave(const NamedTensors& tensors, const std::optional<Metadata>& metadata,
                                       std::string folder, const std::string& stem, int64_t max_shard_bytes)
    : folder_(std::move(folder)), plan_(plan(tensors, stem, max_shard_bytes)) {
    std::vector<NamedTensors> members(plan_->count());
    const auto shard_of = plan_->shard_of();
    names_.reserve(tensors.size());
    for (size_t i = 0; i < tensors.size(); ++i) {
        names_.push_back(tensors[i].first);
        members[shard_of[i]].push_back(tensors[i]);
    }
    for (NamedTensors& shard : members) {
        shards_.push_back(c10::make_intrusive<PendingSave>(std::move(shard), metadata, folder_));
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
    std::vector<core::Piece> names;
    names.reserve(names_.size());
    for (const std::string& name : names_) {
        names.push_back({as_bytes(name)});
    }
    writer_ = core::create_shards(as_bytes(folder_), *plan_, {names.data(), names.size()});
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
        for (const auto& name : core::commit_shards(std::move(*writer_), durable_)) {
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

void register_pending_sharded_save(torch::Library& library) {
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

}  // namespace safetensors_torch
