// An object that one thread may close while others use it.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <utility>

namespace safetensors_torch::layer {

// A shared object until close(). It is destroyed with the last pointer that was taken before.
//
// Lock-free: after a fork, a thread that the child does not have may hold a lock. std::atomic_load of a shared_ptr
// locks one of a few mutexes.
template <typename T>
class Closable {
  public:
    explicit Closable(std::shared_ptr<T> object) : object_(std::move(object)) {}

    // Returns the object; null once it is closed.
    std::shared_ptr<T> take() {
        std::shared_ptr<T> taken;
        if ((state_.fetch_add(kTaker) & kClosed) == 0) {
            // Not released while this thread is counted.
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
    // Added by each thread that is in take(). A forked child may count threads that it does not have: then the object
    // lives until this is destroyed.
    static constexpr uint64_t kTaker = 4;

    // Releases the object if it is closed, no thread is in take(), and no other thread releases it.
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
