#include "cpp/write/save_sharded.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <iterator>
#include <mutex>
#include <optional>
#include <system_error>
#include <thread>
#include <utility>

#include "cpp/bytes.h"
#include "cpp/error.h"
#include "cpp/pending.h"

namespace safetensors_torch::layer {

std::vector<uint64_t> nbytes_of_each(const NamedTensors& tensors) {
    std::vector<uint64_t> sizes;
    sizes.reserve(tensors.size());
    for (const auto& entry : tensors) {
        sizes.push_back(entry.second.nbytes());
    }
    return sizes;
}

rust::Box<core::ShardPlan> divide(const NamedTensors& tensors, const std::string& stem, int64_t max_shard_size) {
    if (max_shard_size <= 0) {
        fail(ErrorCategory::value, "max_shard_size is " + std::to_string(max_shard_size) +
                                       ": give the most bytes of tensors that one file may have, 1 or more");
    }
    const auto sizes = nbytes_of_each(tensors);
    return core::plan_shards({sizes.data(), sizes.size()}, as_bytes(stem), static_cast<uint64_t>(max_shard_size));
}

rust::Box<core::ShardedWriter> begin_checkpoint(const std::string& directory, const core::ShardPlan& plan,
                                                const std::vector<std::string>& names) {
    const auto pieces = as_texts(names);
    return core::create_shards(as_bytes(directory), plan, {pieces.data(), pieces.size()});
}

std::vector<std::string> file_names_of(const std::optional<rust::Box<core::ShardedWriter>>& writer, bool is_committed) {
    if (!writer || !is_committed) {
        fail(ErrorCategory::value, "this checkpoint is not written");
    }
    std::vector<std::string> names;
    for (const auto& name : (*writer)->file_names()) {
        names.emplace_back(name);
    }
    return names;
}

namespace {

// How long a thread writes before it looks whether another one has failed.
constexpr double kCheckSeconds = 0.01;

rust::Box<core::ShardPlan> plan(NamedTensors& tensors, std::optional<Metadata>& metadata, const std::string& stem,
                                int64_t max_shard_size, const SaveRules& rules) {
    check_saveable(tensors, metadata, rules);
    return divide(tensors, stem, max_shard_size);
}

// The file of one shard, which goes to `complete` at the end.
class ShardSink final : public Sink {
  public:
    ShardSink(const core::ShardedWriter& checkpoint, size_t shard, uint64_t length, CompleteFile& complete)
        : complete_(complete), writer_(checkpoint.create(shard, length)) {}

    uint64_t write(const std::vector<core::Piece>& pieces, Deadline until) override {
        return writer_->write({pieces.data(), pieces.size()}, until.milliseconds_left());
    }

    void finish() override { complete_ = std::move(writer_); }

  private:
    CompleteFile& complete_;
    rust::Box<core::FileWriter> writer_;
};

}  // namespace

PendingShardedSave::PendingShardedSave(NamedTensors tensors, std::optional<Metadata> metadata, std::string directory,
                                       const std::string& stem, int64_t max_shard_size, const SaveRules& rules,
                                       bool durable)
    : directory_(std::move(directory)), durable_(durable), plan_(plan(tensors, metadata, stem, max_shard_size, rules)) {
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

uint64_t PendingShardedSave::total() const {
    uint64_t bytes = 0;
    for (const auto& shard : shards_) {
        bytes += shard->total();
    }
    return bytes;
}

std::vector<std::string> PendingShardedSave::file_names() const {
    const auto names = plan_->file_names();
    return {names.begin(), names.end()};
}

std::string PendingShardedSave::index() const {
    const auto pieces = as_texts(names_);
    const auto text = plan_->index({pieces.data(), pieces.size()});
    return {text.begin(), text.end()};
}

std::vector<std::string> PendingShardedSave::stale(const std::vector<std::string>& names) const {
    std::vector<std::string> stale;
    std::copy_if(names.begin(), names.end(), std::back_inserter(stale),
                 [this](const std::string& name) { return plan_->makes_stale(as_bytes(name)); });
    return stale;
}

bool PendingShardedSave::advance(Deadline until) {
    if (is_cancelled_) {
        fail(ErrorCategory::value, "this save has failed, or was cancelled");
    }
    try {
        if (!writer_) {
            start();
        }
        while (next_ < shards_.size()) {
            write(until);
            for (; next_ < shards_.size() && files_[next_]; ++next_) {
                (*writer_)->add(std::move(*files_[next_]));
                files_[next_].reset();
            }
            if (next_ < shards_.size() && until.passed()) {
                return false;
            }
        }
        if (!is_committed_) {
            is_committed_ = (*writer_)->commit(durable_, until.milliseconds_left());
        }
        return is_committed_;
    } catch (...) {
        cancel();
        throw;
    }
}

void PendingShardedSave::start() {
    writer_ = begin_checkpoint(directory_, *plan_, names_);
    files_.resize(shards_.size());
    for (size_t i = 0; i < shards_.size(); ++i) {
        shards_[i]->set_sink([this, i, length = shards_[i]->total()] {
            return std::make_unique<ShardSink>(**writer_, i, length, files_[i]);
        });
    }
}

// Writes the next file, or several if their bytes are in host memory. Others need slabs or copies: one at a time.
void PendingShardedSave::write(Deadline until) {
    size_t end = next_;
    while (end < shards_.size() && (is_complete(end) || shards_[end]->is_on_host())) {
        ++end;
    }
    if (end - next_ > 1) {
        write_together(end, until);
    } else {
        shards_[next_]->advance(until);
    }
}

// Writes the files from the next one up to `end`, a thread to a file, in order.
void PendingShardedSave::write_together(size_t end, Deadline until) {
    uint64_t left = 0;
    size_t files = 0;
    for (size_t i = next_; i < end; ++i) {
        left += shards_[i]->total() - shards_[i]->done();
        files += is_complete(i) ? 0 : 1;
    }
    std::atomic<size_t> following{next_};
    std::atomic<bool> has_failed{false};
    std::mutex mutex;
    std::optional<CarriedError> failure;
    const auto run = [&]() noexcept {
        try {
            guarded([&] {
                for (size_t i = following++; i < end; i = following++) {
                    while (!is_complete(i)) {
                        shards_[i]->advance(until.at_most(kCheckSeconds));
                        if (has_failed || until.passed()) {
                            return;
                        }
                    }
                }
            });
        } catch (const std::exception&) {
            has_failed = true;
            const std::lock_guard<std::mutex> lock(mutex);
            if (!failure) {
                failure = CarriedError::current();
            }
        }
    };
    const size_t count = core::thread_count(left, files);
    std::vector<std::thread> others;
    others.reserve(count);
    try {
        while (others.size() + 1 < count) {
            others.emplace_back(run);
        }
    } catch (const std::system_error&) {
        // No more threads can be started: those that run write everything.
    }
    run();
    for (std::thread& other : others) {
        other.join();
    }
    if (failure) {
        failure->rethrow();
    }
}

uint64_t PendingShardedSave::done() const {
    uint64_t bytes = 0;
    for (size_t i = 0; i < shards_.size(); ++i) {
        bytes += shards_[i]->done();
    }
    return bytes;
}

void PendingShardedSave::cancel() {
    // The sink of a shard refers to the writer and to its file.
    for (const auto& shard : shards_) {
        shard->cancel();
    }
    files_.clear();
    writer_.reset();
    is_cancelled_ = true;
}

std::vector<std::string> PendingShardedSave::result() const { return file_names_of(writer_, is_committed_); }

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
    writer_ = begin_checkpoint(directory_, *plan, names);
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
        fail(ErrorCategory::value, "all files of this checkpoint are written, or one is being written");
    }
    const std::vector<size_t>& members = members_[next_];
    if (tensors.size() != members.size()) {
        fail(ErrorCategory::value, "file " + std::to_string(next_ + 1) + " of the checkpoint takes " +
                                       std::to_string(members.size()) + " tensors, not " +
                                       std::to_string(tensors.size()));
    }
    NamedTensors pairs;
    for (size_t i = 0; i < members.size(); ++i) {
        const auto& [name, spec] = specs_[members[i]];
        if (tensors[i].scalar_type() != spec.scalar_type() || tensors[i].sizes() != spec.sizes()) {
            fail(ErrorCategory::value,
                 "tensor " + repr(name) + " does not have the dtype and the shape that were declared");
        }
        pairs.emplace_back(name, tensors[i]);
    }
    auto file = std::make_unique<PendingSave>(std::move(pairs), metadata_, directory_);
    total_ = file->total();
    file->set_sink([this, shard = next_, length = total_] {
        return std::make_unique<ShardSink>(**writer_, shard, length, file_);
    });
    current_ = std::move(file);
}

void ShardedWriter::start_commit(bool durable) {
    if (!writer_ || current_ || next_ < members_.size()) {
        fail(ErrorCategory::value, "not all files of this checkpoint are written");
    }
    commit_durable_ = durable;
    total_ = 0;
}

bool ShardedWriter::advance(Deadline until) {
    if (commit_durable_ && writer_) {
        is_committed_ = is_committed_ || (*writer_)->commit(*commit_durable_, until.milliseconds_left());
        return is_committed_;
    }
    if (!current_) {
        fail(ErrorCategory::value, "no file of this checkpoint is being written");
    }
    if (!current_->advance(until)) {
        return false;
    }
    current_.reset();
    (*writer_)->add(std::move(*file_));
    file_.reset();
    ++next_;
    return true;
}

void ShardedWriter::cancel() {
    current_.reset();
    file_.reset();
    writer_.reset();
}

std::vector<std::string> ShardedWriter::result() const { return file_names_of(writer_, is_committed_); }

namespace {

void register_sharded_writer(torch::Library& library) {
    using Self = c10::intrusive_ptr<ShardedWriter>;
    register_pending<ShardedWriter>(library, "ShardedWriter")
        .def(torch::init([](std::vector<std::string> names, std::vector<at::Tensor> specs,
                            const std::optional<Metadata>& metadata, const std::string& directory,
                            const std::string& stem, int64_t max_shard_size) {
            return guarded([&] {
                return c10::make_intrusive<ShardedWriter>(to_pairs(std::move(names), std::move(specs)), metadata,
                                                          directory, stem, max_shard_size);
            });
        }))
        .def("members", [](const Self& self) { return self->members(); })
        .def("start",
             [](const Self& self, const std::vector<at::Tensor>& tensors) { guarded([&] { self->start(tensors); }); })
        .def("start_commit", [](const Self& self, bool durable) { guarded([&] { self->start_commit(durable); }); })
        .def("result", [](const Self& self) { return guarded([&] { return self->result(); }); });
}

}  // namespace

void register_sharded_saves(torch::Library& library) {
    register_sharded_writer(library);
    using Self = c10::intrusive_ptr<PendingShardedSave>;
    using Strings = std::vector<std::string>;
    register_pending<PendingShardedSave>(library, "PendingShardedSave")
        .def(torch::init([](std::vector<std::string> names, std::vector<at::Tensor> tensors,
                            const std::optional<Metadata>& metadata, const std::string& directory,
                            const std::string& stem, int64_t max_shard_size, bool force_contiguous,
                            const std::string& shared, bool durable) {
            return guarded([&] {
                return c10::make_intrusive<PendingShardedSave>(to_pairs(std::move(names), std::move(tensors)), metadata,
                                                               directory, stem, max_shard_size,
                                                               save_rules(force_contiguous, shared), durable);
            });
        }))
        .def("result", [](const Self& self) { return guarded([&] { return self->result(); }); })
        .def("shards", [](const Self& self) { return self->shards(); })
        .def("file_names", [](const Self& self) { return self->file_names(); })
        .def("index", [](const Self& self) { return guarded([&] { return self->index(); }); })
        .def("stale", [](const Self& self, const Strings& names) { return self->stale(names); });
}

}  // namespace safetensors_torch::layer
