// Text and byte counts for the core.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "safetensors-torch/src/bridge.rs.h"

namespace safetensors_torch::layer {

// Returns the bytes of a text; the core checks whether they are UTF-8.
inline rust::Slice<const uint8_t> as_bytes(const std::string& text) {
    return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

// Returns the bytes of each text, which must outlive the result.
inline std::vector<core::Text> as_texts(const std::vector<std::string>& texts) {
    std::vector<core::Text> pieces;
    pieces.reserve(texts.size());
    for (const std::string& text : texts) {
        pieces.push_back({as_bytes(text)});
    }
    return pieces;
}

// Returns the bytes of all pieces together.
inline uint64_t bytes_of(const std::vector<core::Piece>& pieces) {
    uint64_t bytes = 0;
    for (const core::Piece& piece : pieces) {
        bytes += piece.length;
    }
    return bytes;
}

}  // namespace safetensors_torch::layer
