#include "cpp/read/pending_load.h"

#include "cpp/pending.h"

namespace safetensors_torch::layer {

void register_pending_loads(torch::Library& library) {
    register_pending<PendingLoad>(library, "PendingLoad")
        .def("result", [](const c10::intrusive_ptr<PendingLoad>& self) {
            return guarded([&] { return lists_of(self->loader()); });
        });
    register_pending<PendingSlice>(library, "PendingSlice")
        .def("result", [](const c10::intrusive_ptr<PendingSlice>& self) {
            return guarded([&] { return self->loader().tensor(); });
        });
    register_pending<PendingState>(library, "PendingState")
        .def("result", [](const c10::intrusive_ptr<PendingState>& self) {
            return guarded([&]() -> std::tuple<std::vector<std::string>, std::vector<std::string>> {
                return self->loader().mismatch();
            });
        });
    register_pending<PendingFill>(library, "PendingFill");
}

}  // namespace safetensors_torch::layer
