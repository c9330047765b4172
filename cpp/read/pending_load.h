// Loads in steps: `torch.classes.safetensors_torch.PendingLoad`, `PendingSlice`, `PendingState` and
// `PendingFill`.
#pragma once

#include <torch/custom_class.h>

#include <cstdint>
#include <memory>
#include <utility>

#include "cpp/deadline.h"
#include "cpp/error.h"
#include "cpp/model/model.h"
#include "cpp/read/checkpoint_loader.h"
#include "cpp/read/fill.h"
#include "cpp/read/load.h"

namespace safetensors_torch::layer {

// A load that can be cancelled; `Work` is a loader.
template <typename Work>
class Pending : public torch::CustomClassHolder {
  public:
    explicit Pending(std::unique_ptr<Work> work) : work_(std::move(work)) {}

    // Loads until everything is loaded or the deadline has passed; returns whether everything is loaded.
    bool advance(Deadline until) {
        Work& work = loader();
        try {
            return work.advance(until);
        } catch (...) {
            cancel();
            throw;
        }
    }

    uint64_t total() const { return loader().total_bytes(); }
    uint64_t done() const { return loader().done_bytes(); }
    void cancel() { work_.reset(); }

    // Fails after cancel().
    Work& loader() const {
        if (work_ == nullptr) {
            fail(ErrorCategory::value, "this load has failed, or was cancelled");
        }
        return *work_;
    }

  private:
    std::unique_ptr<Work> work_;
};

using PendingLoad = Pending<CheckpointLoader>;
using PendingSlice = Pending<SliceLoader>;
using PendingState = Pending<StateLoader>;
using PendingFill = Pending<FillLoader>;

void register_pending_loads(torch::Library& library);

}  // namespace safetensors_torch::layer
