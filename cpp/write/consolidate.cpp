#include "cpp/write/consolidate.h"

#include "cpp/error.h"
#include "cpp/pending.h"

namespace safetensors_torch::layer {
namespace {

rust::Box<core::Consolidation> start(const std::string& input, const std::string& output,
                                     const std::vector<std::string>& names, const std::vector<int64_t>& files,
                                     int64_t max_shard_size, bool durable) {
    if (names.size() != files.size()) {
        fail(ErrorCategory::value,
             std::to_string(names.size()) + " tensors, but the files of " + std::to_string(files.size()));
    }
    std::vector<uint64_t> numbers;
    numbers.reserve(files.size());
    for (size_t i = 0; i < files.size(); ++i) {
        if (files[i] < 1) {
            fail(ErrorCategory::value, "tensor " + repr(names[i]) + " has file number " + std::to_string(files[i]) +
                                           ": number the files from 1 on");
        }
        numbers.push_back(static_cast<uint64_t>(files[i]));
    }
    const auto texts = as_texts(names);
    return core::start_consolidation(as_bytes(input), as_bytes(output), {texts.data(), texts.size()},
                                     {numbers.data(), numbers.size()}, static_cast<uint64_t>(max_shard_size), durable);
}

}  // namespace

PendingConsolidation::PendingConsolidation(const std::string& input, const std::string& output,
                                           const std::vector<std::string>& names, const std::vector<int64_t>& files,
                                           int64_t max_shard_size, bool durable)
    : work_(start(input, output, names, files, max_shard_size, durable)) {}

const core::Consolidation& PendingConsolidation::work() const {
    if (!work_) {
        fail(ErrorCategory::value, "this consolidation has failed, or was cancelled");
    }
    return **work_;
}

bool PendingConsolidation::advance(Deadline until) {
    work();
    try {
        return (*work_)->advance(until.milliseconds_left());
    } catch (...) {
        cancel();
        throw;
    }
}

std::vector<std::string> PendingConsolidation::result() const {
    std::vector<std::string> names;
    for (const auto& name : work().file_names()) {
        names.emplace_back(name);
    }
    return names;
}

void register_pending_consolidation(torch::Library& library) {
    using Self = c10::intrusive_ptr<PendingConsolidation>;
    register_pending<PendingConsolidation>(library, "PendingConsolidation")
        .def(torch::init([](const std::string& input, const std::string& output, const std::vector<std::string>& names,
                            const std::vector<int64_t>& files, int64_t max_shard_size, bool durable) {
            return guarded([&] {
                return c10::make_intrusive<PendingConsolidation>(input, output, names, files, max_shard_size, durable);
            });
        }))
        .def("result", [](const Self& self) { return guarded([&] { return self->result(); }); });
}

}  // namespace safetensors_torch::layer
