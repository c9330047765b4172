#include "cpp/write/edit.h"

#include "cpp/bytes.h"
#include "cpp/error.h"
#include "cpp/pending.h"

namespace safetensors_torch::layer {
namespace {

rust::Box<core::MetadataEdit> begin(const std::string& path, const Metadata& set,
                                    const std::vector<std::string>& removed, bool in_place, int64_t reserve,
                                    bool durable) {
    if (reserve < 0) {
        fail(ErrorCategory::value, "reserve is " + std::to_string(reserve) +
                                       ": give the bytes that are to be left for later edits, 0 or more");
    }
    const auto entries = entries_of(set);
    const auto keys = as_texts(removed);
    return core::begin_edit(as_bytes(path), {entries.data(), entries.size()}, {keys.data(), keys.size()}, in_place,
                            static_cast<uint64_t>(reserve), durable);
}

}  // namespace

PendingEdit::PendingEdit(const std::string& path, const Metadata& set, const std::vector<std::string>& removed,
                         bool in_place, int64_t reserve, bool durable)
    : edit_(begin(path, set, removed, in_place, reserve, durable)) {}

const core::MetadataEdit& PendingEdit::edit() const {
    if (!edit_) {
        fail(ErrorCategory::value, "this edit has failed, or was cancelled");
    }
    return **edit_;
}

bool PendingEdit::advance(Deadline until) {
    edit();
    try {
        return (*edit_)->advance(until.milliseconds_left());
    } catch (...) {
        cancel();
        throw;
    }
}

Metadata PendingEdit::result() const {
    Metadata metadata;
    add_entries(metadata, edit().metadata());
    return metadata;
}

void register_pending_edit(torch::Library& library) {
    using Self = c10::intrusive_ptr<PendingEdit>;
    register_pending<PendingEdit>(library, "PendingEdit")
        .def(torch::init([](const std::string& path, const Metadata& set, const std::vector<std::string>& removed,
                            bool in_place, int64_t reserve, bool durable) {
            return guarded(
                [&] { return c10::make_intrusive<PendingEdit>(path, set, removed, in_place, reserve, durable); });
        }))
        .def("result", [](const Self& self) { return guarded([&] { return self->result(); }); });
}

}  // namespace safetensors_torch::layer
