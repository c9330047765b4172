#include "cpp/read/prefetch_loader.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <numeric>

#include "cpp/bytes.h"
#include "cpp/device/device_prefetch.h"
#include "cpp/dtype.h"
#include "cpp/error.h"
#include "cpp/file.h"
#include "cpp/tensor_memory.h"
#include "include/safetensors_torch.h"

namespace safetensors_torch::layer {
namespace {

// Reads into host memory. A tensor for a device whose memory has no addresses, or of another dtype, is copied when it
// is handed out.
class HostPrefetch final : public Prefetch {
  public:
    HostPrefetch(std::vector<PrefetchItem> items, const PrefetchOptions& options)
        : items_(std::move(items)), target_(options.target), loader_(start(options)) {}

    std::pair<bool, std::optional<Item>> next(Deadline until) override {
        const core::PrefetchedTensor next = loader_->next(until.milliseconds_left());
        if (next.state != core::PrefetchState::Ready) {
            return {next.state != core::PrefetchState::End, std::nullopt};
        }
        return {true, Item{next.request, tensor(next)}};
    }

    std::optional<at::Tensor> take(size_t item, Deadline until) override {
        const core::PrefetchedTensor taken = loader_->take(item, until.milliseconds_left());
        if (taken.state == core::PrefetchState::End) {
            throw AlreadyDelivered();
        }
        return taken.state == core::PrefetchState::Ready ? std::optional(tensor(taken)) : std::nullopt;
    }

  private:
    rust::Box<core::PrefetchLoader> start(const PrefetchOptions& options) const {
        rust::Box<core::PrefetchPlan> plan = core::plan_prefetch();
        for (const PrefetchItem& item : items_) {
            const auto type = converted(item.stored, target_.dtype);
            const bool is_copied = !target_.device.is_cpu() || type != item.stored;
            const uint64_t extra = is_copied ? c10::multiply_integers(item.shape) * c10::elementSize(type) : 0;
            if (item.ranges) {
                plan->add_slice(**item.file, item.index, {item.ranges->data(), item.ranges->size()}, extra);
            } else {
                plan->add(**item.file, item.index, extra);
            }
        }
        return plan->start(options.read_from, options.buffer_bytes, options.most_threads);
    }

    at::Tensor tensor(const core::PrefetchedTensor& ready) const {
        const PrefetchItem& item = items_[ready.request];
        const at::Tensor host = over_block(ready.start, ready.block, item.nbytes(), item.stored, item.shape);
        const auto type = converted(item.stored, target_.dtype);
        if (target_.device.is_cpu() && type == item.stored) {
            return host;
        }
        const at::NoGradGuard no_grad;
        try {
            return host.to(target_.device).to(type);
        } catch (const c10::OutOfMemoryError& error) {
            const std::string what =
                "tensor " + repr(item.name()) + " of " + std::to_string(item.nbytes()) + " bytes: ";
            throw c10::OutOfMemoryError(what + error.what_without_backtrace(), nullptr);
        }
    }

    // Declared before the loader, which may read from memory that they own.
    std::vector<PrefetchItem> items_;
    Target target_;
    rust::Box<core::PrefetchLoader> loader_;
};

// Tensors without data.
class MetaPrefetch final : public Prefetch {
  public:
    MetaPrefetch(std::vector<PrefetchItem> items, Target target)
        : items_(std::move(items)), target_(target), is_taken_(items_.size()) {}

    std::pair<bool, std::optional<Item>> next(Deadline) override {
        for (size_t item = first_++; item < items_.size(); item = first_++) {
            if (!is_taken_[item].exchange(true)) {
                return {true, Item{item, tensor(item)}};
            }
        }
        return {false, std::nullopt};
    }

    std::optional<at::Tensor> take(size_t item, Deadline) override {
        if (is_taken_[item].exchange(true)) {
            throw AlreadyDelivered();
        }
        return tensor(item);
    }

  private:
    at::Tensor tensor(size_t item) const {
        return empty_on(target_.device, converted(items_[item].stored, target_.dtype), items_[item].shape);
    }

    std::vector<PrefetchItem> items_;
    Target target_;
    std::vector<std::atomic<bool>> is_taken_;
    std::atomic<size_t> first_{0};
};

std::shared_ptr<Prefetch> make_prefetch(std::vector<PrefetchItem> items, const PrefetchOptions& options) {
    if (options.target.device.is_meta()) {
        return std::make_shared<MetaPrefetch>(std::move(items), options.target);
    }
    if (!options.target.device.is_cpu() && has_memory(empty_on(options.target.device, at::kByte, {1}))) {
        return std::make_shared<DevicePrefetch>(std::move(items), options);
    }
    return std::make_shared<HostPrefetch>(std::move(items), options);
}

std::vector<std::string> names_of(const std::vector<PrefetchItem>& items) {
    std::vector<std::string> names;
    names.reserve(items.size());
    for (const PrefetchItem& item : items) {
        names.push_back(item.name());
    }
    return names;
}

std::vector<uint64_t> sizes_of(const std::vector<PrefetchItem>& items) {
    std::vector<uint64_t> bytes;
    bytes.reserve(items.size());
    for (const PrefetchItem& item : items) {
        bytes.push_back(item.nbytes());
    }
    return bytes;
}

}  // namespace

PrefetchLoader::PrefetchLoader(std::vector<PrefetchItem> items, PrefetchOptions options)
    : names_(names_of(items)),
      bytes_(sizes_of(items)),
      total_(std::accumulate(bytes_.begin(), bytes_.end(), uint64_t{0})),
      prefetch_(make_prefetch(std::move(items), options)) {
    for (size_t item = 0; item < names_.size(); ++item) {
        numbers_.emplace(names_[item], item);
    }
}

// Calls body(prefetch). A failure ends the reading and frees the tensors that were not handed out.
template <typename Body>
auto PrefetchLoader::with_prefetch(Body&& body) -> decltype(body(std::declval<Prefetch&>())) {
    try {
        const std::shared_ptr<Prefetch> prefetch = prefetch_.take();
        if (prefetch == nullptr) {
            fail(ErrorCategory::safetensor, "PrefetchLoader is closed; start another one", SFT_ERROR_CLOSED);
        }
        return std::forward<Body>(body)(*prefetch);
    } catch (const AlreadyDelivered&) {
        throw;
    } catch (...) {
        close();
        throw;
    }
}

std::tuple<bool, std::optional<std::tuple<std::string, at::Tensor>>> PrefetchLoader::next(Deadline until) {
    auto [is_left, item] = with_prefetch([&](Prefetch& prefetch) { return prefetch.next(until); });
    if (!item) {
        return {is_left, std::nullopt};
    }
    done_ += bytes_[item->first];
    return {is_left, std::tuple(names_[item->first], std::move(item->second))};
}

std::optional<at::Tensor> PrefetchLoader::take(const std::string& name, Deadline until) {
    const auto found = numbers_.find(name);
    if (found == numbers_.end()) {
        fail(ErrorCategory::safetensor, "tensor " + repr(name) + " is not in the prefetch plan",
             SFT_ERROR_TENSOR_NOT_FOUND);
    }
    const size_t item = found->second;
    try {
        auto tensor = with_prefetch([&](Prefetch& prefetch) { return prefetch.take(item, until); });
        if (tensor) {
            done_ += bytes_[item];
        }
        return tensor;
    } catch (const AlreadyDelivered&) {
        fail(ErrorCategory::safetensor, "tensor " + repr(name) + ": already delivered; each is handed out once",
             SFT_ERROR_INVALID_ARGUMENT);
    }
}

namespace {

// Returns the ranges of a list of starts, stops and steps.
std::vector<core::Range> ranges_of(const std::vector<int64_t>& slice) {
    const size_t dimensions = slice.size() / 3;
    std::vector<core::Range> ranges;
    for (size_t axis = 0; axis < dimensions; ++axis) {
        const auto at = [&](size_t part) {
            const int64_t value = slice[part * dimensions + axis];
            if (value < 0) {
                fail(ErrorCategory::value, "a slice is given by starts, stops and steps that are not negative");
            }
            return static_cast<uint64_t>(value);
        };
        ranges.push_back({at(0), at(1), at(2)});
    }
    return ranges;
}

}  // namespace

void PrefetchPlan::add(const Checkpoint& checkpoint, core::ReadFrom read_from,
                       const std::optional<std::vector<std::string>>& names,
                       const std::vector<std::vector<int64_t>>& slices) {
    if (!slices.empty() && (!names || names->size() != slices.size())) {
        fail(ErrorCategory::value, "a prefetch plan takes one slice a name");
    }
    // Places, and the number of the slice.
    std::vector<std::pair<core::TensorLocation, size_t>> places;
    if (names) {
        for (size_t i = 0; i < names->size(); ++i) {
            places.emplace_back(checkpoint.find((*names)[i]), i);
        }
        const auto rank = [](const auto& place) { return std::tuple(place.first.shard, place.first.index); };
        std::sort(places.begin(), places.end(), [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
    } else {
        for (const core::TensorLocation& place : checkpoint.in_file_order()) {
            places.emplace_back(place, 0);
        }
    }
    items_.reserve(items_.size() + places.size());
    for (const auto& [place, number] : places) {
        const SharedFile& file = checkpoint.files()[place.shard];
        if (slices.empty() || slices[number].empty()) {
            const auto [stored, shape] = describe(**file, place.index);
            items_.push_back({file, place.index, std::nullopt, stored, shape});
        } else {
            auto [ranges, stored, shape] = plan_slice(**file, place.index, ranges_of(slices[number]));
            items_.push_back({file, place.index, std::move(ranges), stored, std::move(shape)});
        }
    }
    if (read_from == core::ReadFrom::Mapping) {
        read_from_ = read_from;
    }
}

c10::intrusive_ptr<PrefetchLoader> PrefetchPlan::start(Target target, std::optional<int64_t> buffer_bytes,
                                                       int64_t most_threads) const {
    check_wanted(target.dtype);
    for (const PrefetchItem& item : items_) {
        check_conversion(item.stored, converted(item.stored, target.dtype), (*item.file)->name(item.index));
    }
    target.device = with_index(target.device);
    const uint64_t most_bytes = buffer_bytes ? static_cast<uint64_t>(std::max<int64_t>(*buffer_bytes, 0))
                                             : std::numeric_limits<uint64_t>::max();
    const auto threads = static_cast<uint64_t>(std::max<int64_t>(most_threads, 1));
    return c10::make_intrusive<PrefetchLoader>(items_, PrefetchOptions{target, read_from_, most_bytes, threads});
}

void register_prefetch(torch::Library& library) {
    using Loader = c10::intrusive_ptr<PrefetchLoader>;
    library.class_<PrefetchLoader>("PrefetchLoader")
        .def("names", [](const Loader& self) { return self->names(); })
        .def("total", [](const Loader& self) { return static_cast<int64_t>(self->total()); })
        .def("done", [](const Loader& self) { return static_cast<int64_t>(self->done()); })
        .def("next", [](const Loader& self,
                        double seconds) { return guarded([&] { return self->next(Deadline::in(seconds)); }); })
        .def("take", [](const Loader& self, const std::string& name,
                        double seconds) { return guarded([&] { return self->take(name, Deadline::in(seconds)); }); })
        .def("close", [](const Loader& self) { self->close(); });
    using Plan = c10::intrusive_ptr<PrefetchPlan>;
    library.class_<PrefetchPlan>("PrefetchPlan")
        .def(torch::init<>())
        .def("add",
             [](const Plan& self, const c10::intrusive_ptr<File>& file,
                const std::optional<std::vector<std::string>>& names, const std::vector<std::vector<int64_t>>& slices) {
                 guarded([&] { file->add_to(*self, names, slices); });
             })
        .def("start", [](const Plan& self, c10::Device device, std::optional<c10::ScalarType> dtype,
                         std::optional<int64_t> buffer_bytes, int64_t most_threads) {
            return guarded([&] { return self->start(Target{device, dtype}, buffer_bytes, most_threads); });
        });
}

}  // namespace safetensors_torch::layer
