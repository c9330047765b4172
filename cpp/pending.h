// The protocol of all work that is done in steps: advance, total, done, cancel, and result if there is one.
//
// Between two steps, Python handles signals and the caller reports progress. The layer never calls Python. An object is
// for one thread at a time.
#pragma once

#include <torch/custom_class.h>
#include <torch/library.h>

#include <cstdint>

#include "cpp/deadline.h"
#include "cpp/error.h"

namespace safetensors_torch::layer {

// Registers `Work` as `torch.classes.safetensors_torch.NAME`, with the methods of the protocol:
//   advance(seconds)  works for about that long; returns whether all is done
//   total(), done()   return bytes
//   cancel()          releases everything and undoes unfinished work
template <typename Work>
torch::class_<Work> register_pending(torch::Library& library, const char* name) {
    using Self = c10::intrusive_ptr<Work>;
    return library.class_<Work>(name)
        .def("advance", [](const Self& self,
                           double seconds) { return guarded([&] { return self->advance(Deadline::in(seconds)); }); })
        .def("total", [](const Self& self) { return guarded([&] { return static_cast<int64_t>(self->total()); }); })
        .def("done", [](const Self& self) { return guarded([&] { return static_cast<int64_t>(self->done()); }); })
        .def("cancel", [](const Self& self) { self->cancel(); });
}

}  // namespace safetensors_torch::layer
