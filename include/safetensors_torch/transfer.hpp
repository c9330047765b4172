/// @file
/// How many threads loads and saves use, and the pinned host memory through which tensors go to devices and come from
/// them. Part of safetensors_torch.hpp, which includes it. All of it is for the whole process; docs/devices.md says
/// what it is good for.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "detail.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// What loads and saves may use: until it is set, what the environment variables SAFETENSORS_TORCH_PINNED_POOL_BYTES
/// (otherwise 64 MiB) and SAFETENSORS_TORCH_THREADS (otherwise 0) say. Throws Error for variables that are no numbers.
inline TransferOptions transfer_options() {
    const auto op = detail::find_op("safetensors_torch::_transfer_options").typed<std::tuple<int64_t, int64_t>()>();
    const auto [pinned_pool_bytes, threads] = detail::call(op);
    return {pinned_pool_bytes, threads};
}

/// Sets what loads and saves may use, from the next one on. Throws Error for negative numbers.
inline void set_transfer_options(const TransferOptions& options) {
    const auto op = detail::find_op("safetensors_torch::_set_transfer_options")
                        .typed<void(std::optional<int64_t>, std::optional<int64_t>)>();
    detail::call(op, std::optional(options.pinned_pool_bytes), std::optional(options.threads));
}

/// Pins host memory for transfers to come, so that the first of them need not, until there are `bytes` (but no more
/// than pinned_pool_bytes). Returns how many bytes there are: 0 where there is no accelerator that has such memory.
inline int64_t reserve_transfer_memory(int64_t bytes) {
    const auto op = detail::find_op("safetensors_torch::_reserve_transfer_memory").typed<int64_t(int64_t)>();
    return detail::call(op, bytes);
}

/// The bytes of pinned host memory that transfers have, in use or waiting for the next one.
inline int64_t transfer_memory() {
    const auto op = detail::find_op("safetensors_torch::_transfer_memory").typed<int64_t()>();
    return detail::call(op);
}

/// Frees the pinned host memory that waits for the next transfer; returns its bytes.
inline int64_t release_transfer_memory() {
    const auto op = detail::find_op("safetensors_torch::_release_transfer_memory").typed<int64_t()>();
    return detail::call(op);
}

}  // namespace safetensors_torch
