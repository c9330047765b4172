/// @file
/// The number of threads of loads and saves, and the pinned host memory of transfers to and from devices, for the whole
/// process. Part of safetensors_torch.hpp, which includes it. docs/devices.md explains both.
#pragma once

#include <cstdint>
#include <optional>
#include <tuple>

#include "detail.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// Returns the options. The defaults are the environment variables SAFETENSORS_TORCH_PINNED_POOL_BYTES (otherwise 64
/// MiB), SAFETENSORS_TORCH_THREADS (otherwise 0) and SAFETENSORS_TORCH_DIRECT (otherwise automatic). Throws Error if a
/// variable has another value.
inline TransferOptions transfer_options() {
    const auto op =
        detail::find_op("safetensors_torch::_transfer_options").typed<std::tuple<int64_t, int64_t, int64_t>()>();
    const auto [pinned_pool_bytes, threads, direct] = detail::call(op);
    return {pinned_pool_bytes, threads, static_cast<Direct>(direct)};
}

/// Sets the options, from the next load or save on. Throws Error for negative numbers.
inline void set_transfer_options(const TransferOptions& options) {
    const auto op = detail::find_op("safetensors_torch::_set_transfer_options")
                        .typed<void(std::optional<int64_t>, std::optional<int64_t>, std::optional<int64_t>)>();
    detail::call(op, std::optional(options.pinned_pool_bytes), std::optional(options.threads),
                 std::optional(static_cast<int64_t>(options.direct)));
}

/// Pins host memory for later transfers, up to `bytes` or pinned_pool_bytes. Returns the bytes that are pinned: 0
/// without an accelerator that uses pinned memory.
inline int64_t reserve_transfer_memory(int64_t bytes) {
    const auto op = detail::find_op("safetensors_torch::_reserve_transfer_memory").typed<int64_t(int64_t)>();
    return detail::call(op, bytes);
}

/// Returns the bytes of pinned host memory, in use or waiting for the next transfer.
inline int64_t transfer_memory() {
    const auto op = detail::find_op("safetensors_torch::_transfer_memory").typed<int64_t()>();
    return detail::call(op);
}

/// Frees the pinned host memory that is not in use, and returns its bytes.
inline int64_t release_transfer_memory() {
    const auto op = detail::find_op("safetensors_torch::_release_transfer_memory").typed<int64_t()>();
    return detail::call(op);
}

}  // namespace safetensors_torch
