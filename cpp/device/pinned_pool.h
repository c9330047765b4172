// Pinned host memory for transfers to and from devices, kept from one transfer to the next.
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

// A piece of host memory, and the event after which it may be written to again.
struct Slab {
    // One-dimensional, uint8.
    at::Tensor memory;
    // Completes with the last copy from or to this slab; none if there was no copy.
    std::optional<c10::Event> copied;

    // Returns whether no copy is running.
    bool is_idle() const { return !copied || copied->query(); }

    // The same for a slab that another device may use: returns false if that device has failed.
    bool is_surely_idle() const noexcept;
};

// The settings of the process.
struct TransferOptions {
    // The most pinned memory, in bytes, of all transfers together; with 0 they use none.
    int64_t pinned_pool_bytes;
    // The most threads that a load or save uses; 0 chooses by machine and work.
    int64_t threads;
    // Whether reads bypass the page cache: 0 if the file is not in it, 1 never, 2 always.
    int64_t direct;
};

// Returns the settings; until they are set, SAFETENSORS_TORCH_PINNED_POOL_BYTES, SAFETENSORS_TORCH_THREADS and
// SAFETENSORS_TORCH_DIRECT.
TransferOptions transfer_options();

// Sets those with a value, from the next load or save on. Fails for numbers out of range, and then sets nothing.
void set_transfer_options(std::optional<int64_t> pinned_pool_bytes, std::optional<int64_t> threads,
                          std::optional<int64_t> direct);

// The slabs of the process, in use or waiting for the next transfer.
//
// Pinning takes about a millisecond for each MiB, thirty times as long as copying as much over the bus. So only a
// fraction of the bytes that transfers have moved is pinned.
class PinnedPool {
  public:
    static PinnedPool& of_process();

    // For for_all_forks(). A child begins without slabs.
    void before_fork();
    void after_fork(bool is_child) noexcept;

    // The most bytes of all slabs: SAFETENSORS_TORCH_PINNED_POOL_BYTES until it is set, which frees idle slabs beyond
    // it.
    int64_t capacity();
    void set_capacity(int64_t bytes);

    // Takes up to `most` waiting slabs that are idle.
    std::vector<Slab> take(size_t most);

    // Takes up to `most` waiting slabs in which a copy of an earlier transfer is still running.
    std::vector<Slab> take_busy(size_t most);

    // Returns whether a transfer of `bytes` is worth `more` slabs.
    bool is_worth(size_t more, uint64_t bytes);

    // Pins a new slab for the current accelerator; none if the pool is full, or pinned memory is not available.
    std::optional<Slab> pin();

    // Returns a slab to the pool, which frees idle slabs beyond its capacity.
    void give(Slab slab);

    // Stops counting slabs that were taken and are never returned.
    void forget(size_t slabs);

    // Counts what a transfer has moved.
    void note_moved(uint64_t bytes);

    // Pins slabs for the current accelerator up to `bytes`, or to capacity; returns the bytes of all slabs.
    int64_t reserve(int64_t bytes);

    // Frees the waiting slabs, and returns their bytes.
    int64_t release();

    // Returns the bytes of all slabs, including those in use.
    int64_t bytes();

  private:
    std::vector<Slab> take_where(bool idle, size_t most);
    size_t most_slabs();
    void trim();

    std::mutex mutex_;
    // None until it is needed.
    std::optional<int64_t> capacity_;
    std::vector<Slab> waiting_;
    // Slabs that exist or are being pinned.
    size_t count_ = 0;
    // Slabs that are being pinned, which may fail.
    size_t pinning_ = 0;
    // Bytes, by all transfers since memory was last released.
    uint64_t moved_ = 0;
};

}  // namespace safetensors_torch::layer
