// CheckpointLoader that Python runs in steps: `torch.classes.safetensors_torch.PendingLoad` and `PendingState`.
//
// Between two steps the interpreter looks after signals, and the caller after its progress. No call goes from here to
// Python. An object is for one thread at a time.
#pragma once

#include <torch/custom_class.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "cpp/deadline.h"
#include "cpp/error.h"
#include "cpp/model/model.h"
#include "cpp/read/checkpoint.h"
#include "cpp/read/load.h"

namespace safetensors_torch::layer {

// Something that is loaded in steps; `Work` is a loader.
template <typename Work>
class Pending : public torch::CustomClassHolder {
  public:
    explicit Pending(std::unique_ptr<Work> work) : work_(std::move(work)) {}

    // Goes on for about `seconds`; whether all is done.
    bool advance(double seconds) {
        Work& work = under_way();
        try {
            return work.advance(Deadline::in(seconds));
        } catch (...) {
            cancel();
            throw;
        }
    }

    int64_t total() const { return static_cast<int64_t>(under_way().total_bytes()); }
    int64_t done() const { return static_cast<int64_t>(under_way().done_bytes()); }

    // Lets go of everything: threads, slabs, and tensors that nobody has.
    void cancel() { work_.reset(); }

    Work& under_way() const {
        if (work_ == nullptr) {
            fail(Kind::value, "this load has failed, or was cancelled");
        }
        return *work_;
    }

  private:
    std::unique_ptr<Work> work_;
};

using PendingLoad = Pending<CheckpointLoader>;
using PendingSlice = Pending<SliceLoader>;
using PendingState = Pending<StateLoader>;

// Tells torch of the classes.
void register_pending_loads(torch::Library& library);

}  // namespace safetensors_torch::layer
