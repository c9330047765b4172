#include "cpp/metadata.h"

namespace safetensors_torch::layer {
namespace {

rust::Vec<uint8_t> copy_of(const std::string& text) {
    rust::Vec<uint8_t> bytes;
    bytes.reserve(text.size());
    for (const char c : text) {
        bytes.push_back(static_cast<uint8_t>(c));
    }
    return bytes;
}

}  // namespace

void add_entries(Metadata& metadata, const rust::Vec<core::Entry>& entries) {
    for (const core::Entry& entry : entries) {
        metadata.insert(std::string(entry.key.begin(), entry.key.end()),
                        std::string(entry.value.begin(), entry.value.end()));
    }
}

rust::Vec<core::Entry> entries_of(const std::optional<Metadata>& metadata) {
    rust::Vec<core::Entry> entries;
    if (metadata) {
        for (const auto& entry : *metadata) {
            entries.push_back({copy_of(entry.key()), copy_of(entry.value())});
        }
    }
    return entries;
}

}  // namespace safetensors_torch::layer
