#include "cpp/device/pinned_pool.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <exception>
#include <limits>
#include <string>
#include <utility>

#include "cpp/error.h"
#include "cpp/fork.h"
#include "safetensors-torch/src/bridge.rs.h"

namespace safetensors_torch::layer {
namespace {

constexpr uint64_t kDefaultPoolBytes = uint64_t(64) << 20;

// The largest value that the ops can return.
constexpr uint64_t kMostPoolBytes = std::numeric_limits<int64_t>::max();

// One transfer may pin this fraction of its bytes, which pays off within the transfer.
constexpr uint64_t kPartOfOne = 16;

// All together may pin this fraction of the bytes that they have moved, which costs each almost nothing.
constexpr uint64_t kPartOfAll = 64;

// Waits for running copies: not every allocator of pinned memory does so before it reuses memory.
void wait_for(const Slab& slab) {
    if (slab.copied) {
        slab.copied->synchronize();
    }
}

}  // namespace

TransferOptions transfer_options() {
    const uint64_t threads = core::threads();
    return {PinnedPool::of_process().capacity(), static_cast<int64_t>(std::min(threads, kMostPoolBytes)),
            core::direct()};
}

void set_transfer_options(std::optional<int64_t> pinned_pool_bytes, std::optional<int64_t> threads,
                          std::optional<int64_t> direct) {
    if (pinned_pool_bytes.value_or(0) < 0 || threads.value_or(0) < 0) {
        fail(ErrorCategory::value, "pinned_pool_bytes and threads must not be negative, but are " +
                                       std::to_string(pinned_pool_bytes.value_or(0)) + " and " +
                                       std::to_string(threads.value_or(0)));
    }
    if (direct) {
        if (*direct < 0 || *direct > 2) {
            fail(ErrorCategory::value, "direct must be 0, 1 or 2, but is " + std::to_string(*direct));
        }
        core::set_direct(static_cast<uint8_t>(*direct));
    }
    if (threads) {
        core::set_threads(static_cast<size_t>(*threads));
    }
    if (pinned_pool_bytes) {
        PinnedPool::of_process().set_capacity(*pinned_pool_bytes);
    }
}

bool Slab::is_surely_idle() const noexcept {
    try {
        return is_idle();
    } catch (const std::exception&) {
        return false;
    }
}

namespace {

// Never destroyed: the device's driver may be unloaded before the static objects of the process.
PinnedPool& pool = *new PinnedPool;
[[maybe_unused]] const bool pool_is_for_all_forks = for_all_forks<PinnedPool>();

}  // namespace

PinnedPool& PinnedPool::of_process() { return pool; }

void PinnedPool::before_fork() { mutex_.lock(); }

void PinnedPool::after_fork(bool is_child) noexcept {
    if (is_child) {
        // The memory belongs to the parent, and no thread of this process pins slabs.
        count_ -= waiting_.size() + pinning_;
        static_cast<void>(new std::vector<Slab>(std::move(waiting_)));
        waiting_.clear();
        pinning_ = 0;
        moved_ = 0;
    }
    mutex_.unlock();
}

int64_t PinnedPool::capacity() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!capacity_) {
        const uint64_t bytes = core::env_number("SAFETENSORS_TORCH_PINNED_POOL_BYTES", kDefaultPoolBytes);
        capacity_ = static_cast<int64_t>(std::min(bytes, kMostPoolBytes));
    }
    return *capacity_;
}

void PinnedPool::set_capacity(int64_t bytes) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        capacity_ = bytes;
    }
    trim();
}

size_t PinnedPool::most_slabs() { return static_cast<size_t>(capacity()) / kSlabBytes; }

std::vector<Slab> PinnedPool::take_where(bool idle, size_t most) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Slab> taken;
    taken.reserve(std::min(most, waiting_.size()));
    for (size_t i = waiting_.size(); i > 0 && taken.size() < most; --i) {
        if (waiting_[i - 1].is_surely_idle() == idle) {
            taken.push_back(std::move(waiting_[i - 1]));
            waiting_.erase(waiting_.begin() + (i - 1));
        }
    }
    return taken;
}

std::vector<Slab> PinnedPool::take(size_t most) { return take_where(/*idle=*/true, most); }

std::vector<Slab> PinnedPool::take_busy(size_t most) { return take_where(/*idle=*/false, most); }

bool PinnedPool::is_worth(size_t more, uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t pinned = (count_ + more) * kSlabBytes;
    return pinned * kPartOfOne <= bytes || pinned * kPartOfAll <= moved_ + bytes;
}

std::optional<Slab> PinnedPool::pin() {
    const size_t most = most_slabs();
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (count_ >= most) {
            return std::nullopt;
        }
        ++count_;
        ++pinning_;
    }
    std::optional<Slab> slab;
    try {
        const auto options = at::TensorOptions().dtype(at::kByte).device(at::kCPU).pinned_memory(true);
        at::Tensor memory = at::empty({static_cast<int64_t>(kSlabBytes)}, options);
        if (memory.is_pinned()) {
            slab = Slab{std::move(memory), std::nullopt};
        }
    } catch (const std::exception&) {
        // Pinned memory is not available or used up: transfers work without it.
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    --pinning_;
    if (!slab) {
        --count_;
    }
    return slab;
}

void PinnedPool::give(Slab slab) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        waiting_.push_back(std::move(slab));
    }
    trim();
}

void PinnedPool::forget(size_t slabs) {
    const std::lock_guard<std::mutex> lock(mutex_);
    count_ -= slabs;
}

void PinnedPool::note_moved(uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    moved_ += bytes;
}

void PinnedPool::trim() {
    const size_t most = most_slabs();
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = waiting_.size(); i > 0 && count_ > most; --i) {
        if (waiting_[i - 1].is_surely_idle()) {
            waiting_.erase(waiting_.begin() + (i - 1));
            --count_;
        }
    }
}

int64_t PinnedPool::reserve(int64_t wanted) {
    while (bytes() < wanted) {
        auto slab = pin();
        if (!slab) {
            break;
        }
        give(std::move(*slab));
    }
    return bytes();
}

int64_t PinnedPool::release() {
    std::vector<Slab> freed;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        freed.swap(waiting_);
        count_ -= freed.size();
        moved_ = 0;
    }
    std::for_each(freed.begin(), freed.end(), wait_for);
    return static_cast<int64_t>(freed.size() * kSlabBytes);
}

int64_t PinnedPool::bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>((count_ - pinning_) * kSlabBytes);
}

}  // namespace safetensors_torch::layer
