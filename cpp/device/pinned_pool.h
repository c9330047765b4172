// Pinned host memory that transfers to and from a device take turns with, kept from one transfer to the next.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Event.h>

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <vector>

namespace safetensors_torch::layer {

// Long enough that a copy to a device runs at the bus's speed, short enough that a few of them keep many threads busy.
constexpr size_t kSlabBytes = size_t(2) << 20;

// A piece of host memory, and when it may be written to again.
struct Slab {
    // One-dimensional, uint8.
    at::Tensor memory;
    // Passes once the last copy from or to this slab is done; none where there was no such copy.
    std::optional<c10::Event> copied;

    // Whether no copy is under way.
    bool is_idle() const { return !copied || copied->query(); }

    // The same of a slab of somebody else's device, whose errors are none of ours: then it is not.
    bool is_surely_idle() const noexcept;
};

// What this process has set.
struct TransferOptions {
    // Pinned memory, in bytes, for all transfers at a time; with 0 they go without.
    int64_t pinned_pool_bytes;
    // The most threads that a load or save uses; with 0 as many as suit the machine.
    int64_t threads;
};

// Those of SAFETENSORS_TORCH_PINNED_POOL_BYTES and SAFETENSORS_TORCH_THREADS until others are set.
TransferOptions transfer_options();

// Sets what is given, from the next load or save on. Fails for negative numbers, and sets nothing then.
void set_transfer_options(std::optional<int64_t> pinned_pool_bytes, std::optional<int64_t> threads);

// The slabs of the process: those in use, and those that wait for the next transfer.
//
// Pinning memory takes the system about a millisecond for each MiB, thirty times as long as copying as much over the
// bus. So no more is pinned than a part of what transfers have moved.
class PinnedPool {
  public:
    static PinnedPool& of_process();

    // For for_all_forks(). A child has no slab to begin with.
    void before_fork();
    void after_fork(bool is_child) noexcept;

    // Up to `most` of the slabs that wait and are idle.
    std::vector<Slab> take(size_t most);

    // Up to `most` of those in which a copy of an earlier transfer is still under way.
    std::vector<Slab> take_busy(size_t most);

    // Whether a transfer of `bytes` is worth `more` slabs.
    bool is_worth(size_t more, uint64_t bytes);

    // A new slab, pinned for the current accelerator; none where the pool has all that it may have, or where there is
    // no such memory to be had.
    std::optional<Slab> pin();

    // Lets the slab wait for the next transfer; where the pool may not have so many any more, until it is idle.
    void give(Slab slab);

    // What was taken and will not be given back.
    void forget(size_t slabs);

    // Counts what a transfer has moved.
    void note_moved(uint64_t bytes);

    // Frees idle slabs that are more than the pool may have.
    void trim();

    // Pins slabs for the current accelerator until there are `bytes`, or as many as may be; gives the bytes of all
    // slabs.
    int64_t reserve(int64_t bytes);

    // Frees the slabs that wait; gives their bytes.
    int64_t release();

    // The bytes of all slabs, those in use among them.
    int64_t bytes();

  private:
    std::vector<Slab> take_where(bool idle, size_t most);

    std::mutex mutex_;
    std::vector<Slab> waiting_;
    // Of all slabs, and of the places of those that are being pinned.
    size_t count_ = 0;
    // Of the latter, which may yet be refused.
    size_t pinning_ = 0;
    // By all transfers since memory was released last.
    uint64_t moved_ = 0;
};

}  // namespace safetensors_torch::layer
