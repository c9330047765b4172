// From an index, as at::Tensor::index takes it, to the slice of a tensor that has to be read for it.
//
// Internal part of safetensors_torch.hpp, which includes it.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

namespace safetensors_torch {
namespace detail {

using Index = std::vector<at::indexing::TensorIndex>;

// The bounding box of an index: one range for each dimension, and the index to apply to the box.
struct Box {
    std::vector<int64_t> starts, stops, steps;
    Index rest;
    bool has_rest = false;
};

inline int64_t dimensions_of(const at::indexing::TensorIndex& index) {
    if (index.is_tensor()) {
        const at::ScalarType dtype = index.tensor().scalar_type();
        return dtype == at::kBool || dtype == at::kByte ? index.tensor().dim() : 1;
    }
    return index.is_integer() || index.is_slice() ? 1 : 0;
}

inline void add_range(Box& box, int64_t start, int64_t stop, int64_t step) {
    box.starts.push_back(start);
    box.stops.push_back(stop);
    box.steps.push_back(step);
}

// The end of an error.
inline std::string of(const std::string& name) { return " of tensor \"" + name + "\""; }

inline void add_integer(Box& box, int64_t index, int64_t size, const std::string& name) {
    if (index < -size || index >= size) {
        throw c10::IndexError("index " + std::to_string(index) + " is out of bounds for dimension " +
                                  std::to_string(box.starts.size()) + of(name) + " with size " + std::to_string(size),
                              nullptr);
    }
    const int64_t start = index < 0 ? index + size : index;
    add_range(box, start, start + 1, 1);
}

inline void add_slice(Box& box, const at::indexing::Slice& slice, int64_t size, const std::string& name) {
    const int64_t step = slice.step().expect_int();
    if (step <= 0) {
        throw c10::ValueError(
            "step must be greater than zero for dimension " + std::to_string(box.starts.size()) + of(name), nullptr);
    }
    const auto clamp = [size](int64_t bound) { return std::clamp<int64_t>(bound < 0 ? bound + size : bound, 0, size); };
    const int64_t start = clamp(slice.start().expect_int());
    add_range(box, start, std::max(start, clamp(slice.stop().expect_int())), step);
}

inline Box bounding_box(const Index& index, const std::vector<int64_t>& shape, const std::string& name) {
    int64_t given = 0;
    int64_t ellipses = 0;
    for (const auto& item : index) {
        given += dimensions_of(item);
        ellipses += item.is_ellipsis() ? 1 : 0;
    }
    const auto dimensions = static_cast<int64_t>(shape.size());
    if (given > dimensions) {
        throw c10::IndexError("too many indices for the " + std::to_string(dimensions) + " dimension(s)" + of(name),
                              nullptr);
    }
    if (ellipses > 1) {
        throw c10::IndexError("an index can have one ellipsis only, for a slice" + of(name), nullptr);
    }
    Box box;
    const auto add_whole = [&](int64_t count) {
        for (; count > 0; --count) {
            add_range(box, 0, shape[box.starts.size()], 1);
        }
    };
    for (const auto& item : index) {
        if (item.is_integer()) {
            add_integer(box, item.integer().expect_int(), shape[box.starts.size()], name);
            box.rest.emplace_back(0);
            box.has_rest = true;
        } else if (item.is_slice()) {
            add_slice(box, item.slice(), shape[box.starts.size()], name);
            box.rest.emplace_back(at::indexing::Slice());
        } else {
            add_whole(item.is_ellipsis() ? dimensions - given : dimensions_of(item));
            box.rest.push_back(item);
            box.has_rest = box.has_rest || !item.is_ellipsis();
        }
    }
    add_whole(dimensions - static_cast<int64_t>(box.starts.size()));
    return box;
}

}  // namespace detail
}  // namespace safetensors_torch
