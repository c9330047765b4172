// The time at which a step of pending work returns.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <limits>

namespace safetensors_torch::layer {

class Deadline {
  public:
    // `seconds` from now; an infinite number never passes.
    static Deadline in(double seconds) {
        constexpr double kLongest = 1e9;
        const auto duration = std::chrono::duration<double>(std::clamp(seconds, 0.0, kLongest));
        return Deadline(Clock::now() + std::chrono::duration_cast<Clock::duration>(duration));
    }

    static Deadline never() { return in(std::numeric_limits<double>::infinity()); }

    // This deadline, or `seconds` from now if that is earlier.
    Deadline at_most(double seconds) const { return Deadline(std::min(time_, in(seconds).time_)); }

    bool passed() const { return Clock::now() >= time_; }

    uint64_t milliseconds_left() const { return left<std::chrono::milliseconds>(); }
    uint64_t microseconds_left() const { return left<std::chrono::microseconds>(); }

  private:
    using Clock = std::chrono::steady_clock;

    explicit Deadline(Clock::time_point time) : time_(time) {}

    template <typename Unit>
    uint64_t left() const {
        return std::max<int64_t>(std::chrono::duration_cast<Unit>(time_ - Clock::now()).count(), 0);
    }

    Clock::time_point time_;
};

}  // namespace safetensors_torch::layer
