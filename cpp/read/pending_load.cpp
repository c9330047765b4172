#include "cpp/read/pending_load.h"

#include <torch/library.h>

namespace safetensors_torch::layer {
namespace {

// A class with what all loads have.
template <typename Work>
torch::class_<Pending<Work>> register_class(torch::Library& library, const char* name) {
    using Self = c10::intrusive_ptr<Pending<Work>>;
    return library.class_<Pending<Work>>(name)
        .def("advance",
             [](const Self& self, double seconds) { return guarded([&] { return self->advance(seconds); }); })
        .def("total", [](const Self& self) { return guarded([&] { return self->total(); }); })
        .def("done", [](const Self& self) { return guarded([&] { return self->done(); }); })
        .def("cancel", [](const Self& self) { self->cancel(); });
}

}  // namespace

void register_pending_loads(torch::Library& library) {
    register_class<CheckpointLoader>(library, "PendingLoad")
        .def("result", [](const c10::intrusive_ptr<PendingLoad>& self) {
            return guarded([&] { return lists_of(self->under_way()); });
        });
    register_class<SliceLoader>(library, "PendingSlice")
        .def("result", [](const c10::intrusive_ptr<PendingSlice>& self) {
            return guarded([&] { return self->under_way().tensor(); });
        });
    register_class<StateLoader>(library, "PendingState")
        .def("result", [](const c10::intrusive_ptr<PendingState>& self) {
            return guarded([&]() -> std::tuple<std::vector<std::string>, std::vector<std::string>> {
                return self->under_way().mismatch();
            });
        });
}

}  // namespace safetensors_torch::layer
