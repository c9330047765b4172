#include "cpp/ring.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <string>
#include <utility>

#include "cpp/error.h"

namespace safetensors_torch {
namespace {

constexpr int64_t kDefaultRingBytes = int64_t(64) << 20;

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

std::mutex& options_mutex() {
    static std::mutex mutex;
    return mutex;
}

TransferOptions& options() {
    static TransferOptions options{from_environment("SAFETENSORS_TORCH_RING_BYTES", kDefaultRingBytes),
                                   from_environment("SAFETENSORS_TORCH_THREADS", 0)};
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
    const std::lock_guard<std::mutex> lock(options_mutex());
    return options();
}

void set_transfer_options(TransferOptions chosen) {
    if (chosen.ring_bytes < 0 || chosen.threads < 0) {
        fail(Kind::value, "ring_bytes and threads must not be negative, but are " + std::to_string(chosen.ring_bytes) +
                              " and " + std::to_string(chosen.threads));
    }
    const std::lock_guard<std::mutex> lock(options_mutex());
    options() = chosen;
}

Ring& Ring::of_process() {
    // Never destroyed: when a process ends, the device's driver may be gone before its static objects are.
    static Ring& ring = *new Ring;
    return ring;
}

std::vector<Slab> Ring::take(size_t most) {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::vector<Slab> taken;
    for (size_t i = waiting_.size(); i > 0 && taken.size() < most; --i) {
        if (waiting_[i - 1].is_idle()) {
            taken.push_back(std::move(waiting_[i - 1]));
            waiting_.erase(waiting_.begin() + (i - 1));
        }
    }
    return taken;
}

std::optional<Slab> Ring::pin() {
    const size_t most = most_slabs();
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (count_ >= most) {
            return std::nullopt;
        }
        ++count_;
    }
    try {
        const auto options = at::TensorOptions().dtype(at::kByte).device(at::kCPU).pinned_memory(true);
        at::Tensor memory = at::empty({static_cast<int64_t>(kSlabBytes)}, options);
        if (memory.is_pinned()) {
            return Slab{std::move(memory), std::nullopt};
        }
    } catch (const c10::Error&) {
        // No pinned memory, or no more of it: transfers go without.
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    --count_;
    return std::nullopt;
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

void Ring::give(Slab slab) {
    const size_t most = most_slabs();
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (count_ <= most) {
            waiting_.push_back(std::move(slab));
            return;
        }
        --count_;
    }
    wait_for(slab);
}

int64_t Ring::release() {
    std::vector<Slab> freed;
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        freed.swap(waiting_);
        count_ -= freed.size();
    }
    std::for_each(freed.begin(), freed.end(), wait_for);
    return static_cast<int64_t>(freed.size() * kSlabBytes);
}

int64_t Ring::bytes() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int64_t>(count_ * kSlabBytes);
}

}  // namespace safetensors_torch
