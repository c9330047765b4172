#include "cpp/write/edit.h"

#include "cpp/error.h"

namespace safetensors_torch::layer {
namespace {

rust::Box<core::MetadataEdit> begin(const std::string& path, const Metadata& set,
                                    const std::vector<std::string>& removed, bool in_place, int64_t reserve,
                                    bool durable) {
    if (reserve < 0) {
        fail(Kind::value, "reserve is " + std::to_string(reserve) +
                              ": give the bytes that are to be left for later edits, 0 or more");
    }
    const auto entries = entries_of(set);
    std::vector<core::Piece> keys;
    keys.reserve(removed.size());
    for (const std::string& key : removed) {
        keys.push_back({as_bytes(key)});
    }
    return core::begin_edit(as_bytes(path), {entries.data(), entries.size()}, {keys.data(), keys.size()}, in_place,
                            static_cast<uint64_t>(reserve), durable);
}

}  // namespace

PendingEdit::PendingEdit(const std::string& path, const Metadata& set, const std::vector<std::string>& removed,
                         bool in_place, int64_t reserve, bool durable)
    : edit_(begin(path, set, removed, in_place, reserve, durable)) {}

const rust::Box<core::MetadataEdit>& PendingEdit::under_way() const {
    if (!edit_) {
        fail(Kind::value, "this edit has failed, or was cancelled");
    }
    return *edit_;
}

bool PendingEdit::advance(Deadline until) {
    under_way();
    try {
        return (*edit_)->advance(until.milliseconds_left());
    } catch (...) {
        cancel();
        throw;
    }
}

Metadata PendingEdit::metadata() const {
    Metadata metadata;
    for (const auto& entry : under_way()->metadata()) {
        metadata.insert(std::string(entry.key.begin(), entry.key.end()),
                        std::string(entry.value.begin(), entry.value.end()));
    }
    return metadata;
}

void register_pending_edit(torch::Library& library) {
    using Self = c10::intrusive_ptr<PendingEdit>;
    library.class_<PendingEdit>("PendingEdit")
        .def(torch::init([](const std::string& path, const Metadata& set, const std::vector<std::string>& removed,
                            bool in_place, int64_t reserve, bool durable) {
            return guarded(
                [&] { return c10::make_intrusive<PendingEdit>(path, set, removed, in_place, reserve, durable); });
        }))
        .def("size", [](const Self& self) { return guarded([&] { return self->size(); }); })
        .def("advance", [](const Self& self,
                           double seconds) { return guarded([&] { return self->advance(Deadline::in(seconds)); }); })
        .def("done", [](const Self& self) { return guarded([&] { return self->done(); }); })
        .def("cancel", [](const Self& self) { self->cancel(); })
        .def("metadata", [](const Self& self) { return guarded([&] { return self->metadata(); }); });
}

}  // namespace safetensors_torch::layer
