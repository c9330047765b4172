// An object that one thread closes while others use it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

namespace safetensors_torch::layer {

// A shared object until close(); it goes with the last of those who have taken it before.
//
// Without a lock: in a process that is forked, a thread that is not there may hold it for ever. What the standard
// library has for this, std::atomic_load of a shared_ptr, locks one of a few mutexes.
template <typename T>
class Closable {
  public:
    explicit Closable(std::shared_ptr<T> object) : object_(std::move(object)) {}

    // The object; null once it is closed.
    std::shared_ptr<T> take() {
        std::shared_ptr<T> taken;
        if ((state_.fetch_add(kTaker) & kClosed) == 0) {
            // It stays for as long as this thread counts.
            taken = object_;
        }
        if (state_.fetch_sub(kTaker) - kTaker == kClosed) {
            release();
        }
        return taken;
    }

    void close() {
        state_.fetch_or(kClosed);
        release();
    }

    bool is_open() const { return (state_.load() & kClosed) == 0; }

  private:
    static constexpr uint64_t kClosed = 1;
    static constexpr uint64_t kReleased = 2;
    // Of each thread that is taking it at the moment. In a forked process some may count that are not there: then the
    // object stays until this is destroyed.
    static constexpr uint64_t kTaker = 4;

    // Lets the object go if it is closed, nobody is taking it, and nobody else does this.
    void release() {
        uint64_t idle = kClosed;
        if (state_.compare_exchange_strong(idle, kClosed | kReleased)) {
            object_.reset();
        }
    }

    std::shared_ptr<T> object_;
    std::atomic<uint64_t> state_{0};
};

}  // namespace safetensors_torch::layer
