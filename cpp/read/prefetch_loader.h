// Tensors that are handed out as soon as they have landed.
#pragma once

#include <torch/custom_class.h>
#include <torch/library.h>

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "cpp/closable.h"
#include "cpp/deadline.h"
#include "cpp/read/checkpoint.h"
#include "cpp/read/load.h"

namespace safetensors_torch::layer {

// A tensor to prefetch, or a part of one.
struct PrefetchItem {
    SharedFile file;
    size_t index;
    // The part to read; none for the whole tensor.
    std::optional<std::vector<core::Range>> ranges;
    // The dtype in the file, and the shape in torch.
    c10::ScalarType stored;
    c10::DimVector shape;

    std::string name() const { return std::string((*file)->name(index)); }
    size_t nbytes() const { return c10::multiply_integers(shape) * c10::elementSize(stored); }
};

// Thrown if a tensor was handed out before.
struct AlreadyDelivered : std::exception {};

// The tensors of a list of items, read in the background to a device. All methods are thread-safe.
class Prefetch {
  public:
    // The number of an item and its tensor, once that is ready.
    using Item = std::pair<size_t, at::Tensor>;

    virtual ~Prefetch() = default;

    // Returns whether tensors are left, and the next one that is ready; none before the deadline has passed. Later work
    // of the caller's stream sees the tensor.
    virtual std::pair<bool, std::optional<Item>> next(Deadline until) = 0;

    // Returns the tensor of an item; none before the deadline has passed. Throws AlreadyDelivered.
    virtual std::optional<at::Tensor> take(size_t item, Deadline until) = 0;
};

// How a Prefetch reads.
struct PrefetchOptions {
    Target target;
    core::ReadFrom read_from = core::ReadFrom::File;
    uint64_t buffer_bytes;
    uint64_t most_threads;
};

// Hands out each tensor of a plan once: `torch.classes.safetensors_torch.PrefetchLoader`. It keeps the files open.
class PrefetchLoader : public torch::CustomClassHolder {
  public:
    PrefetchLoader(std::vector<PrefetchItem> items, PrefetchOptions options);

    // Returns the names in the order of the plan.
    const std::vector<std::string>& names() const { return names_; }

    // The bytes of all tensors in the files, and those of the tensors that were handed out.
    uint64_t total() const { return total_; }
    uint64_t done() const { return done_; }

    // Returns whether tensors are left, and the next one that is ready.
    std::tuple<bool, std::optional<std::tuple<std::string, at::Tensor>>> next(Deadline until);

    // Returns the tensor called `name`, or none if it is not ready.
    std::optional<at::Tensor> take(const std::string& name, Deadline until);

    // Ends all reading, and frees the tensors that were not handed out. Every later call fails.
    void close() { prefetch_.close(); }

  private:
    template <typename Body>
    auto with_prefetch(Body&& body) -> decltype(body(std::declval<Prefetch&>()));

    std::vector<std::string> names_;
    std::vector<uint64_t> bytes_;
    uint64_t total_;
    std::atomic<uint64_t> done_{0};
    // For each name, its first item.
    std::unordered_map<std::string, size_t> numbers_;
    Closable<Prefetch> prefetch_;
};

// Tensors of any files, to be read in order: `torch.classes.safetensors_torch.PrefetchPlan`.
class PrefetchPlan : public torch::CustomClassHolder {
  public:
    // Adds tensors of a checkpoint in file order: those of `names`, or all. `slices` has one list for each name: the
    // starts, the stops and the steps of its part, or nothing for a whole tensor; an empty `slices` takes all of them
    // whole. Fails, naming it, for a tensor that torch cannot hold.
    void add(const Checkpoint& checkpoint, core::ReadFrom read_from,
             const std::optional<std::vector<std::string>>& names, const std::vector<std::vector<int64_t>>& slices);

    // Starts to read. `buffer_bytes` limits the bytes that are read ahead.
    c10::intrusive_ptr<PrefetchLoader> start(Target target, std::optional<int64_t> buffer_bytes,
                                             int64_t most_threads) const;

  private:
    std::vector<PrefetchItem> items_;
    core::ReadFrom read_from_ = core::ReadFrom::File;
};

void register_prefetch(torch::Library& library);

}  // namespace safetensors_torch::layer
