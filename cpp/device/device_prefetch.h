// Tensors that are copied to a device in the background.
#pragma once

#include <memory>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "cpp/read/prefetch_loader.h"

namespace safetensors_torch::layer {

// Reads tensors and copies them to a device on a thread of its own, while the caller works.
//
// Memory and copies are on streams of that thread. A tensor that is handed out belongs to the caller's stream: that
// waits for the copies, and the allocator knows that it uses the memory. The host does not wait for the device.
class DevicePrefetch final : public Prefetch {
  public:
    // The device must have memory with addresses.
    DevicePrefetch(std::vector<PrefetchItem> items, const PrefetchOptions& options);
    ~DevicePrefetch() override;

    std::pair<bool, std::optional<Item>> next(Deadline until) override;
    std::optional<at::Tensor> take(size_t item, Deadline until) override;

  private:
    struct State;
    class Copies;

    static void work(State& state);
    bool is_forked() const;

    std::shared_ptr<State> state_;
    std::thread thread_;
};

}  // namespace safetensors_torch::layer
