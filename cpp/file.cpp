#include "cpp/file.h"

#include <atomic>

#include "cpp/dtype.h"
#include "cpp/error.h"
#include "include/safetensors_torch.h"

namespace safetensors_torch {
namespace {

size_t find(const core::File& file, const std::string& name) { return file.find(as_bytes(name)); }

std::string name_at(const core::File& file, size_t index) { return std::string(file.name(index)); }

uint64_t not_negative(int64_t value) {
    if (value < 0) {
        fail(Kind::value, "a slice is given by starts, stops and steps that are not negative");
    }
    return static_cast<uint64_t>(value);
}

}  // namespace

File::File(const std::string& path, const std::string& backend)
    : file_(guarded([&] { return open_file(path, backend); })) {
    lender_.lends = backend == "mmap";
}

File::File(const at::Tensor& data) : file_(guarded([&] { return open_bytes(data); })) {}

SharedFile File::opened() const {
    SharedFile file = std::atomic_load(&file_);
    if (file == nullptr) {
        fail(Kind::safetensor, "File is closed", SFT_ERROR_CLOSED);
    }
    return file;
}

Lender File::lender_for(c10::Device device) const {
    Lender lender = lender_;
    if (lender.lends && device.is_cpu()) {
        is_lent_ = true;
    }
    lender.shown = is_lent_;
    return lender;
}

std::vector<std::string> File::keys() const {
    const auto file = opened();
    std::vector<std::string> names;
    names.reserve((*file)->count());
    for (const uint32_t index : (*file)->sorted_by_name()) {
        names.push_back(name_at(**file, index));
    }
    return names;
}

std::vector<std::string> File::offset_keys() const {
    const auto file = opened();
    std::vector<std::string> names;
    names.reserve((*file)->count());
    for (size_t index = 0; index < (*file)->count(); ++index) {
        names.push_back(name_at(**file, index));
    }
    return names;
}

std::optional<Metadata> File::metadata() const {
    const auto file = opened();
    if (!(*file)->has_metadata()) {
        return std::nullopt;
    }
    Metadata metadata;
    for (const auto& entry : (*file)->metadata()) {
        metadata.insert(std::string(entry.key.begin(), entry.key.end()),
                        std::string(entry.value.begin(), entry.value.end()));
    }
    return metadata;
}

int64_t File::size() const { return static_cast<int64_t>((*opened())->count()); }

bool File::contains(const std::string& name) const { return (*opened())->contains(as_bytes(name)); }

std::vector<int64_t> File::shape(const std::string& name) const {
    const auto file = opened();
    const auto shape = (*file)->shape(find(**file, name));
    return {shape.begin(), shape.end()};
}

std::vector<int64_t> File::tensor_shape(const std::string& name) const {
    const auto file = opened();
    const auto shape = describe(**file, find(**file, name)).second;
    return {shape.begin(), shape.end()};
}

c10::ScalarType File::tensor_dtype(const std::string& name) const {
    const auto file = opened();
    return describe(**file, find(**file, name)).first;
}

std::string File::dtype(const std::string& name) const {
    const auto file = opened();
    return std::string(core::dtype_code((*file)->dtype(find(**file, name))));
}

at::Tensor File::get_tensor(const std::string& name, c10::Device device) const {
    const auto file = opened();
    return load_tensor(file, lender_for(device), find(**file, name), device);
}

std::vector<at::Tensor> File::get_tensors(const std::vector<std::string>& names, c10::Device device) const {
    const auto file = opened();
    std::vector<size_t> indices;
    indices.reserve(names.size());
    for (const std::string& name : names) {
        indices.push_back(find(**file, name));
    }
    Loader loader(file, lender_for(device), std::move(indices), Target{device, {}});
    return tensors_of(loader);
}

namespace {

SliceLoader slice_loader(const SharedFile& file, const std::string& name, const std::vector<int64_t>& starts,
                         const std::vector<int64_t>& stops, const std::vector<int64_t>& steps, c10::Device device) {
    if (starts.size() != stops.size() || starts.size() != steps.size()) {
        fail(Kind::value, "a slice takes one start, one stop and one step a dimension");
    }
    std::vector<core::Range> ranges;
    for (size_t axis = 0; axis < starts.size(); ++axis) {
        ranges.push_back({not_negative(starts[axis]), not_negative(stops[axis]), not_negative(steps[axis])});
    }
    return {file, find(**file, name), std::move(ranges), device};
}

}  // namespace

at::Tensor File::get_slice(const std::string& name, const std::vector<int64_t>& starts,
                           const std::vector<int64_t>& stops, const std::vector<int64_t>& steps,
                           c10::Device device) const {
    SliceLoader loader = slice_loader(opened(), name, starts, stops, steps, device);
    loader.advance(Deadline::never());
    return loader.tensor();
}

c10::intrusive_ptr<PendingLoad> File::start_load(const std::optional<std::vector<std::string>>& names,
                                                 c10::Device device, std::optional<c10::ScalarType> dtype) const {
    auto loader = std::make_unique<Loader>(load_all(opened(), lender_for(device), Target{device, dtype}, names));
    return c10::make_intrusive<PendingLoad>(std::move(loader));
}

c10::intrusive_ptr<PendingSlice> File::start_slice(const std::string& name, const std::vector<int64_t>& starts,
                                                   const std::vector<int64_t>& stops, const std::vector<int64_t>& steps,
                                                   c10::Device device) const {
    auto loader = std::make_unique<SliceLoader>(slice_loader(opened(), name, starts, stops, steps, device));
    return c10::make_intrusive<PendingSlice>(std::move(loader));
}

c10::intrusive_ptr<PendingState> File::start_state(const Tensors& state, const std::vector<std::string>& optional,
                                                   const std::string& class_name, bool strict) const {
    auto loader = std::make_unique<StateLoader>(opened(), lender_for(c10::kMeta), state, optional, class_name, strict);
    return c10::make_intrusive<PendingState>(std::move(loader));
}

void File::prefault(bool wait) const { (*opened())->prefault(wait); }

void File::close() { std::atomic_store(&file_, SharedFile()); }

bool File::is_open() const { return std::atomic_load(&file_) != nullptr; }

namespace {

// A method that torch can call, with clean errors.
template <typename Result, typename... Args>
auto clean(Result (File::*method)(Args...) const) {
    return [method](const c10::intrusive_ptr<File>& self, Args... args) -> Result {
        return guarded([&] { return ((*self).*method)(args...); });
    };
}

}  // namespace

void register_file(torch::Library& library) {
    library.class_<File>("File")
        .def(torch::init<const std::string&, const std::string&>())
        .def("keys", clean(&File::keys))
        .def("offset_keys", clean(&File::offset_keys))
        .def("metadata", clean(&File::metadata))
        .def("size", clean(&File::size))
        .def("contains", clean(&File::contains))
        .def("shape", clean(&File::shape))
        .def("tensor_shape", clean(&File::tensor_shape))
        .def("tensor_dtype", clean(&File::tensor_dtype))
        .def("dtype", clean(&File::dtype))
        .def("get_tensor", clean(&File::get_tensor))
        .def("get_tensors", clean(&File::get_tensors))
        .def("get_slice", clean(&File::get_slice))
        .def("start_load", clean(&File::start_load))
        .def("start_slice", clean(&File::start_slice))
        .def("start_state", clean(&File::start_state))
        .def("prefault", clean(&File::prefault))
        .def("close", &File::close)
        .def("is_open", &File::is_open);
}

}  // namespace safetensors_torch
