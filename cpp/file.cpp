#include "cpp/file.h"

#include <algorithm>

#include "cpp/bytes.h"
#include "cpp/error.h"
#include "cpp/pending.h"
#include "include/safetensors_torch.h"

namespace safetensors_torch::layer {
namespace {

uint64_t not_negative(int64_t value) {
    if (value < 0) {
        fail(ErrorCategory::value, "a slice is given by starts, stops and steps that are not negative");
    }
    return static_cast<uint64_t>(value);
}

}  // namespace

File::File(const std::string& path, const std::string& backend)
    : File(guarded([&] { return std::make_shared<const Checkpoint>(open_file(path, backend)); }), backend == "mmap") {}

File::File(const at::Tensor& data)
    : File(guarded([&] { return std::make_shared<const Checkpoint>(open_bytes(data)); }), /*is_mapped=*/false) {}

File::File(SharedCheckpoint checkpoint, bool is_mapped) : checkpoint_(std::move(checkpoint)), is_mapped_(is_mapped) {}

SharedCheckpoint File::opened() const {
    SharedCheckpoint checkpoint = checkpoint_.take();
    if (checkpoint == nullptr) {
        fail(ErrorCategory::safetensor, "File is closed", SFT_ERROR_CLOSED);
    }
    return checkpoint;
}

StorageSharing File::sharing_for(c10::Device device) const {
    if (is_mapped_ && device.is_cpu()) {
        is_shared_ = true;
    }
    return {is_mapped_, {}, is_shared_ ? core::ReadFrom::Mapping : core::ReadFrom::File};
}

namespace {

std::vector<std::string> names_at(const Checkpoint& checkpoint, const std::vector<core::TensorLocation>& places) {
    std::vector<std::string> names;
    names.reserve(places.size());
    for (const core::TensorLocation& place : places) {
        names.push_back(checkpoint.name(place));
    }
    return names;
}

}  // namespace

std::vector<std::string> File::keys() const {
    const auto checkpoint = opened();
    return names_at(*checkpoint, checkpoint->sorted_by_name());
}

std::vector<std::string> File::offset_keys() const {
    const auto checkpoint = opened();
    return names_at(*checkpoint, checkpoint->in_file_order());
}

// If several files have a key, the first counts.
std::optional<Metadata> File::metadata() const {
    const auto checkpoint = opened();
    std::optional<Metadata> metadata;
    for (const SharedFile& file : checkpoint->files()) {
        if (!(*file)->has_metadata()) {
            continue;
        }
        if (!metadata) {
            metadata.emplace();
        }
        add_entries(*metadata, (*file)->metadata());
    }
    return metadata;
}

int64_t File::size() const { return static_cast<int64_t>(opened()->count()); }

bool File::contains(const std::string& name) const { return opened()->contains(name); }

std::vector<int64_t> File::shape(const std::string& name) const { return std::get<0>(shape_and_dtype(name)); }

std::string File::dtype(const std::string& name) const { return std::get<1>(shape_and_dtype(name)); }

std::tuple<std::vector<int64_t>, std::string> File::shape_and_dtype(const std::string& name) const {
    const auto checkpoint = opened();
    const auto [file, index] = checkpoint->at(name);
    const auto shape = file.shape(index);
    return {std::vector<int64_t>(shape.begin(), shape.end()), std::string(core::dtype_code(file.dtype(index)))};
}

std::vector<int64_t> File::tensor_shape(const std::string& name) const {
    const auto checkpoint = opened();
    const auto [file, index] = checkpoint->at(name);
    const auto shape = describe(file, index).second;
    return {shape.begin(), shape.end()};
}

c10::ScalarType File::tensor_dtype(const std::string& name) const {
    const auto checkpoint = opened();
    const auto [file, index] = checkpoint->at(name);
    return describe(file, index).first;
}

std::tuple<int64_t, int64_t> File::byte_range(const std::string& name) const {
    const auto checkpoint = opened();
    const auto [file, index] = checkpoint->at(name);
    const auto begin = static_cast<int64_t>(file.begin(index));
    return {begin, begin + static_cast<int64_t>(file.nbytes(index))};
}

std::tuple<std::string, std::vector<int64_t>, std::tuple<int64_t, int64_t>> File::meta(const std::string& name) const {
    const auto checkpoint = opened();
    const auto [file, index] = checkpoint->at(name);
    const auto shape = file.shape(index);
    const auto begin = static_cast<int64_t>(file.begin(index) - file.data_start());
    return {std::string(core::dtype_code(file.dtype(index))),
            {shape.begin(), shape.end()},
            {begin, begin + static_cast<int64_t>(file.nbytes(index))}};
}

bool File::is_remote() const {
    const auto checkpoint = opened();
    return std::any_of(checkpoint->files().begin(), checkpoint->files().end(),
                       [](const SharedFile& file) { return (*file)->is_remote(); });
}

std::vector<std::string> File::shards() const { return opened()->file_names(); }

std::string File::shard_of(const std::string& name) const {
    const auto checkpoint = opened();
    const auto names = checkpoint->file_names();
    const size_t shard = checkpoint->find(name).shard;
    return names.empty() ? "" : names[shard];
}

at::Tensor File::get_tensor(const std::string& name, c10::Device device) const {
    const auto checkpoint = opened();
    const core::TensorLocation place = checkpoint->find(name);
    if (device.is_cpu()) {
        checkpoint->file(place).read_ahead(place.index);
    }
    return load_tensor(checkpoint->files()[place.shard], sharing_for(device), place.index, device);
}

at::Tensor File::view(const std::string& name) const {
    const auto checkpoint = opened();
    const core::TensorLocation place = checkpoint->find(name);
    return load_tensor(checkpoint->files()[place.shard], sharing_for(c10::kCPU), place.index, c10::kCPU);
}

void File::read_ahead(const std::string& name, const at::Tensor& part) const {
    const auto checkpoint = opened();
    if (part.numel() == 0 || !part.is_cpu()) {
        return;
    }
    // From the first element to the last: torch has no negative strides.
    size_t elements = 1;
    for (int64_t axis = 0; axis < part.dim(); ++axis) {
        elements += static_cast<size_t>((part.size(axis) - 1) * part.stride(axis));
    }
    const auto address = reinterpret_cast<uintptr_t>(part.const_data_ptr());
    const core::TensorLocation place = checkpoint->find(name);
    checkpoint->file(place).read_ahead_at(place.index, address, elements * part.itemsize(), part.nbytes());
}

std::vector<at::Tensor> File::get_tensors(const std::vector<std::string>& names, c10::Device device) const {
    const auto checkpoint = opened();
    std::vector<core::TensorLocation> places;
    places.reserve(names.size());
    for (const std::string& name : names) {
        places.push_back(checkpoint->find(name));
    }
    CheckpointLoader loads(*checkpoint, sharing_for(device), places, Target{device, {}});
    return tensors_of(loads);
}

namespace {

SliceLoader slice_loader(const Checkpoint& checkpoint, const std::string& name, const std::vector<int64_t>& starts,
                         const std::vector<int64_t>& stops, const std::vector<int64_t>& steps, c10::Device device) {
    if (starts.size() != stops.size() || starts.size() != steps.size()) {
        fail(ErrorCategory::value, "a slice takes one start, one stop and one step a dimension");
    }
    std::vector<core::Range> ranges;
    for (size_t axis = 0; axis < starts.size(); ++axis) {
        ranges.push_back({not_negative(starts[axis]), not_negative(stops[axis]), not_negative(steps[axis])});
    }
    const core::TensorLocation place = checkpoint.find(name);
    return {checkpoint.files()[place.shard], place.index, std::move(ranges), device};
}

}  // namespace

at::Tensor File::get_slice(const std::string& name, const std::vector<int64_t>& starts,
                           const std::vector<int64_t>& stops, const std::vector<int64_t>& steps,
                           c10::Device device) const {
    SliceLoader loader = slice_loader(*opened(), name, starts, stops, steps, device);
    loader.advance(Deadline::never());
    return loader.tensor();
}

c10::intrusive_ptr<PendingLoad> File::start_load(const std::optional<std::vector<std::string>>& names,
                                                 c10::Device device, std::optional<c10::ScalarType> dtype,
                                                 std::optional<bool> prefault) const {
    auto loader = load_all(*opened(), sharing_for(device), Target{device, dtype}, {names, prefault});
    return c10::make_intrusive<PendingLoad>(std::make_unique<CheckpointLoader>(std::move(loader)));
}

c10::intrusive_ptr<PendingSlice> File::start_slice(const std::string& name, const std::vector<int64_t>& starts,
                                                   const std::vector<int64_t>& stops, const std::vector<int64_t>& steps,
                                                   c10::Device device) const {
    auto loader = std::make_unique<SliceLoader>(slice_loader(*opened(), name, starts, stops, steps, device));
    return c10::make_intrusive<PendingSlice>(std::move(loader));
}

c10::intrusive_ptr<PendingState> File::start_state(const Tensors& state, const std::vector<std::string>& optional,
                                                   const std::string& class_name, bool strict,
                                                   const std::string& prefix) const {
    auto loader =
        std::make_unique<StateLoader>(opened(), sharing_for(c10::kMeta), state, optional, class_name, strict, prefix);
    return c10::make_intrusive<PendingState>(std::move(loader));
}

c10::intrusive_ptr<PendingFill> File::start_fill(const std::vector<std::string>& names,
                                                 const std::vector<std::vector<int64_t>>& starts,
                                                 const std::vector<at::Tensor>& targets) const {
    auto loader = std::make_unique<FillLoader>(opened(), sharing_for(c10::kMeta), names, starts, targets);
    return c10::make_intrusive<PendingFill>(std::move(loader));
}

void File::add_to(PrefetchPlan& plan, const std::optional<std::vector<std::string>>& names,
                  const std::vector<std::vector<int64_t>>& slices) const {
    plan.add(*opened(), sharing_for(c10::kMeta).read_from, names, slices);
}

void File::close() { checkpoint_.close(); }

bool File::is_open() const { return checkpoint_.is_open(); }

namespace {

// Returns a method for torch, with errors without backtraces.
template <typename Result, typename... Args>
auto clean(Result (File::*method)(Args...) const) {
    return [method](const c10::intrusive_ptr<File>& self, Args... args) -> Result {
        return guarded([&] { return ((*self).*method)(args...); });
    };
}

}  // namespace

PendingFile::PendingFile(const std::string& path, const std::string& backend, const std::optional<std::string>& variant,
                         const std::string& extra)
    : pending_(core::begin_open(as_bytes(path), checkpoint_options(backend, variant, extra))),
      is_mapped_(backend == "mmap") {}

core::PendingOpen& PendingFile::pending() {
    if (!pending_) {
        fail(ErrorCategory::value, "this opening was cancelled");
    }
    return **pending_;
}

bool PendingFile::advance(Deadline until) { return pending().advance(until.milliseconds_left()); }

c10::intrusive_ptr<File> PendingFile::result() {
    auto checkpoint = std::make_shared<const Checkpoint>(core::finish_open(pending()));
    return c10::make_intrusive<File>(std::move(checkpoint), is_mapped_);
}

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
        .def("shape_and_dtype", clean(&File::shape_and_dtype))
        .def("meta", clean(&File::meta))
        .def("byte_range", clean(&File::byte_range))
        .def("is_remote", clean(&File::is_remote))
        .def("shards", clean(&File::shards))
        .def("shard_of", clean(&File::shard_of))
        .def("get_tensor", clean(&File::get_tensor))
        .def("view", clean(&File::view))
        .def("read_ahead", clean(&File::read_ahead))
        .def("get_tensors", clean(&File::get_tensors))
        .def("get_slice", clean(&File::get_slice))
        .def("start_load", clean(&File::start_load))
        .def("start_slice", clean(&File::start_slice))
        .def("start_state", clean(&File::start_state))
        .def("start_fill", clean(&File::start_fill))
        .def("close", &File::close)
        .def("is_open", &File::is_open);
    // After File, the type of its result.
    register_pending<PendingFile>(library, "PendingFile")
        .def(torch::init([](const std::string& path, const std::string& backend,
                            const std::optional<std::string>& variant, const std::string& extra) {
            return guarded([&] { return c10::make_intrusive<PendingFile>(path, backend, variant, extra); });
        }))
        .def("result",
             [](const c10::intrusive_ptr<PendingFile>& self) { return guarded([&] { return self->result(); }); });
}

}  // namespace safetensors_torch::layer
