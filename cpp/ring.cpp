#include "cpp/ring.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <exception>
#include <string>
#include <utility>

#include "cpp/error.h"
#include "cpp/fork.h"

namespace safetensors_torch {
namespace {

constexpr int64_t kDefaultRingBytes = int64_t(64) << 20;

// A transfer may pin one part in so many of what it moves, which it earns back itself.
constexpr uint64_t kPartOfOne = 16;

// Or all of them together one part in so many of what they have moved, which costs each next to nothing.
constexpr uint64_t kPartOfAll = 64;

// A number from the environment; fails where it is none, as a setting that has no effect would be worse.
int64_t from_environment(const char* name, int64_t otherwise) {
    const char* text = std::getenv(name);
    if (text == nullptr || *text == '\0') {
        return otherwise;
    }
    char* end = nullptr;
    errno = 0;
    const long long value = std::strtoll(text, &end, 10);
    if (errno != 0 || *end != '\0' || value < 0) {
        fail(Kind::value, std::string("the environment variable ") + name +
                              " must be a number that is not negative, not " + repr(text));
    }
    return value;
}

// Options in one word, so that nobody sees those of two threads mixed: the number of threads is in the lower bits.
constexpr int kThreadsBits = 16;
constexpr int64_t kMostThreads = (int64_t(1) << kThreadsBits) - 1;
constexpr int64_t kMostRingBytes = (int64_t(1) << (63 - kThreadsBits)) - 1;

int64_t packed(const TransferOptions& options) {
    return std::min(options.ring_bytes, kMostRingBytes) << kThreadsBits | std::min(options.threads, kMostThreads);
}

// Without a lock, which a process that is forked at the wrong moment would find locked for ever.
std::atomic<int64_t>& options() {
    static std::atomic<int64_t> options{packed({from_environment("SAFETENSORS_TORCH_RING_BYTES", kDefaultRingBytes),
                                                from_environment("SAFETENSORS_TORCH_THREADS", 0)})};
    return options;
}

size_t most_slabs() { return static_cast<size_t>(transfer_options().ring_bytes) / kSlabBytes; }

// Waits for the copies that are under way: not every allocator of pinned memory does that before it gives it to the
// next.
void wait_for(const Slab& slab) {
    if (slab.copied) {
        slab.copied->synchronize();
    }
}

}  // namespace

TransferOptions transfer_options() {
    const int64_t now = options();
    return {now >> kThreadsBits, now & kMostThreads};
}

void set_transfer_options(TransferOptions chosen) {
    if (chosen.ring_bytes < 0 || chosen.threads < 0) {
        fail(Kind::value, "ring_bytes and threads must not be negative, but are " + std::to_string(chosen.ring_bytes) +
                              " and " + std::to_string(chosen.threads));
    }
    options() = packed(chosen);
    Ring::of_process().trim();
}

bool Slab::is_surely_idle() const noexcept {
    try {
        return is_idle();
    } catch (const std::exception&) {
        return false;
    }
}

namespace {

// Never destroyed: when a process ends, the device's driver may be gone before its static objects are.
Ring& ring = *new Ring;
[[maybe_unused]] const bool ring_is_for_all_forks = for_all_forks<Ring>();

}  // namespace

Ring& Ring::of_process() { return ring; }

void Ring::before_fork() { mutex_.lock(); }

void Ring::after_fork(bool is_child) noexcept {
    if (is_child) {
        // The memory is the parent's to free, and so are the places of slabs that its other threads were pinning.
        count_ -= waiting_.size() + pinning_;
        static_cast<void>(new std::vector<Slab>(std::move(waiting_)));
        waiting_.clear();
        pinning_ = 0;
        moved_ = 0;
    }
    mutex_.unlock();
}

std::vector<Slab> Ring::take_where(bool idle, size_t most) {
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

std::vector<Slab> Ring::take(size_t most) { return take_where(/*idle=*/true, most); }

std::vector<Slab> Ring::take_busy(size_t most) { return take_where(/*idle=*/false, most); }

bool Ring::is_worth(size_t more, uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const uint64_t pinned = (count_ + more) * kSlabBytes;
    return pinned * kPartOfOne <= bytes || pinned * kPartOfAll <= moved_ + bytes;
}

std::optional<Slab> Ring::pin() {
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
        // No pinned memory, or no more of it: transfers go without.
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    --pinning_;
    if (!slab) {
        --count_;
    }
    return slab;
}

void Ring::give(Slab slab) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        waiting_.push_back(std::move(slab));
    }
    trim();
}

void Ring::forget(size_t slabs) {
    const std::lock_guard<std::mutex> lock(mutex_);
    count_ -= slabs;
}

void Ring::note_moved(uint64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    moved_ += bytes;
}

void Ring::trim() {
    const size_t most = most_slabs();
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = waiting_.size(); i > 0 && count_ > most; --i) {
        if (waiting_[i - 1].is_surely_idle()) {
            waiting_.erase(waiting_.begin() + (i - 1));
            --count_;
        }
    }
}

int64_t Ring::reserve(int64_t wanted) {
    while (bytes() < wanted) {
        auto slab = pin();
        if (!slab) {
            break;
        }
        give(std::move(*slab));
    }
    return bytes();
}

int64_t Ring::release() {
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

int64_t Ring::bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>((count_ - pinning_) * kSlabBytes);
}

}  // namespace safetensors_torch
