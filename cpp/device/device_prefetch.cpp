#include "cpp/device/device_prefetch.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>

#include "cpp/device/device_copy_stream.h"
#include "cpp/device/upload.h"
#include "cpp/error.h"
#include "cpp/read/load.h"
#include "include/safetensors_torch.h"

namespace safetensors_torch::layer {
namespace {

// How long the thread copies before it looks whether it is to end.
constexpr double kStepSeconds = 0.1;

c10::Stream current_stream(c10::Device device) { return c10::impl::VirtualGuardImpl(device.type()).getStream(device); }

// Makes a stream from the pool the current one of this thread, if the device has streams and events.
class ThreadStream {
  public:
    explicit ThreadStream(c10::Device device) {
        try {
            const c10::Stream stream = take_stream(device);
            c10::Event(device.type()).record(stream);
            stream_ = stream;
        } catch (const c10::Error&) {
            return;
        }
        guard_.emplace(*stream_);
    }
    ~ThreadStream() {
        if (stream_) {
            guard_.reset();
            give_stream(*stream_);
        }
    }
    ThreadStream(const ThreadStream&) = delete;
    ThreadStream& operator=(const ThreadStream&) = delete;

    bool exists() const { return stream_.has_value(); }

  private:
    std::optional<c10::Stream> stream_;
    std::optional<c10::StreamGuard> guard_;
};

}  // namespace

// What the thread and the callers share.
struct DevicePrefetch::State {
    // A tensor whose copies are queued.
    struct Landed {
        at::Tensor tensor;
        // Completes with the copies; none if they are done.
        std::shared_ptr<const c10::Event> copied;
    };

    State(std::vector<PrefetchItem> all, Target to) : items(std::move(all)), target(to) {}

    std::vector<PrefetchItem> items;
    Target target;
    uint64_t total = 0;
    bool converts = false;
    SharedPrefetcher prefetcher;
    std::atomic<bool> is_stopped{false};

    // For what follows, until the end of the thread.
    std::mutex mutex;
    // Notified when tensors have landed, and after a failure.
    std::condition_variable has_landed;
    std::vector<std::optional<Landed>> landed;
    std::vector<bool> is_taken;
    // The items that have landed in their order, and some that were taken.
    std::deque<size_t> ready;
    size_t left = 0;
    std::optional<CarriedError> failure;

    c10::ScalarType type(size_t item) const { return converted(items[item].stored, target.dtype); }

    // Waits until find() returns a value or the deadline has passed. Fails after a failure of the thread.
    template <typename Find>
    auto wait(Deadline until, Find&& find) -> decltype(find()) {
        std::unique_lock<std::mutex> lock(mutex);
        while (true) {
            if (failure) {
                failure->rethrow();
            }
            auto found = find();
            if (found || until.passed()) {
                return found;
            }
            has_landed.wait_for(lock, std::chrono::microseconds(until.microseconds_left()));
        }
    }

    // Returns an item that has landed, which is taken then.
    Landed remove(size_t item) {
        Landed found = std::move(*landed[item]);
        landed[item].reset();
        is_taken[item] = true;
        --left;
        return found;
    }

    // Makes the caller's stream wait for the copies.
    at::Tensor hand_out(size_t item, Landed found) const {
        if (items[item].nbytes() > 0) {
            (*prefetcher)->hand_out(item);
        }
        if (found.copied) {
            const c10::Stream current = current_stream(target.device);
            found.copied->block(current);
            // The memory belongs to the stream of the copies.
            c10::impl::VirtualGuardImpl(current.device_type())
                .recordDataPtrOnStream(found.tensor.storage().data_ptr(), current);
        }
        return std::move(found.tensor);
    }
};

// The copies of all tensors. Each is allocated when its first bytes arrive.
class DevicePrefetch::Copies final : public Upload {
  public:
    Copies(State& state, bool has_stream)
        : Upload(state.prefetcher, destinations_of(state), state.target.device, state.total, state.converts),
          state_(state),
          has_stream_(has_stream) {
        for (const PrefetchItem& item : state.items) {
            left_.push_back(item.nbytes());
        }
    }

    // Returns whether all copies are queued.
    bool work(Deadline until) { return copy_until(until); }

  private:
    static std::vector<Destination> destinations_of(const State& state) {
        std::vector<Destination> destinations;
        destinations.reserve(state.items.size());
        for (const PrefetchItem& item : state.items) {
            destinations.push_back({item.index, item.stored, {}});
        }
        return destinations;
    }

    std::string name(size_t request) const override { return state_.items[request].name(); }

    void allocate(size_t request) override {
        destination(request).tensor = layer::allocate(state_.target.device, state_.type(request),
                                                      state_.items[request].shape, "tensor " + repr(name(request)));
    }

    void copied(const rust::Vec<core::SlabPart>& parts) override {
        std::vector<size_t> whole;
        for (const core::SlabPart& part : parts) {
            left_[part.request] -= part.length;
            if (left_[part.request] == 0) {
                whole.push_back(part.request);
            }
        }
        if (whole.empty()) {
            return;
        }
        std::shared_ptr<c10::Event> event;
        if (has_stream_) {
            event = std::make_shared<c10::Event>(state_.target.device.type());
            event->record(current_stream(state_.target.device));
        }
        const std::lock_guard<std::mutex> lock(state_.mutex);
        for (const size_t request : whole) {
            // Only the caller owns the tensor from now on.
            state_.landed[request] = State::Landed{std::move(destination(request).tensor), event};
            state_.ready.push_back(request);
        }
        state_.has_landed.notify_all();
    }

    State& state_;
    bool has_stream_;
    // The bytes of each item that are not queued.
    std::vector<uint64_t> left_;
};

DevicePrefetch::DevicePrefetch(std::vector<PrefetchItem> items, const PrefetchOptions& options)
    : state_(std::make_shared<State>(std::move(items), options.target)) {
    State& state = *state_;
    auto plan = core::plan_prefetch();
    for (size_t i = 0; i < state.items.size(); ++i) {
        const PrefetchItem& item = state.items[i];
        const uint64_t bytes = item.nbytes();
        const uint64_t device_bytes = stored_bytes(c10::multiply_integers(item.shape), state.type(i));
        const uint64_t extra = std::max(device_bytes, bytes) - bytes;
        if (item.ranges) {
            plan->add_slice(**item.file, item.index, {item.ranges->data(), item.ranges->size()}, extra);
        } else {
            plan->add(**item.file, item.index, extra);
        }
        state.total += bytes;
        state.converts = state.converts || state.type(i) != item.stored;
        state.is_taken.push_back(false);
        state.landed.emplace_back();
        if (bytes == 0) {
            state.landed.back() = State::Landed{empty_on(state.target.device, state.type(i), item.shape), nullptr};
            state.ready.push_back(i);
        }
    }
    state.left = state.items.size();
    state.prefetcher = std::make_shared<const rust::Box<core::Prefetcher>>(
        plan->start_slabs(options.read_from, options.buffer_bytes, options.most_threads, used_slab_bytes(state.total)));
    if (state.total > 0) {
        thread_ = std::thread([shared = state_] { work(*shared); });
    }
}

DevicePrefetch::~DevicePrefetch() {
    if (!thread_.joinable()) {
        return;
    }
    if (is_forked()) {
        // The thread does not exist in this process, and device memory belongs to the parent.
        static_cast<void>(new std::thread(std::move(thread_)));
        static_cast<void>(new std::shared_ptr<State>(std::move(state_)));
        return;
    }
    state_->is_stopped = true;
    (*state_->prefetcher)->stop();
    thread_.join();
}

bool DevicePrefetch::is_forked() const {
    try {
        (*state_->prefetcher)->check_process("prefetch");
        return false;
    } catch (const rust::Error&) {
        return true;
    }
}

// Runs on the thread.
void DevicePrefetch::work(State& state) {
    // As the threads that read.
    pthread_setname_np(pthread_self(), "safetensors");
    try {
        guarded([&] {
            const c10::DeviceGuard on_device(state.target.device);
            const ThreadStream stream(state.target.device);
            Copies copies(state, stream.exists());
            while (!state.is_stopped && !copies.work(Deadline::in(kStepSeconds))) {
            }
        });
    } catch (const std::exception&) {
        const std::lock_guard<std::mutex> lock(state.mutex);
        state.failure = CarriedError::current();
        state.landed.clear();
        state.has_landed.notify_all();
    }
}

std::pair<bool, std::optional<Prefetch::Item>> DevicePrefetch::next(Deadline until) {
    State& state = *state_;
    (*state.prefetcher)->check_process("prefetch");
    bool is_over = false;
    std::pair<size_t, State::Landed> item;
    state.wait(until, [&] {
        while (!state.ready.empty()) {
            item.first = state.ready.front();
            state.ready.pop_front();
            if (state.landed[item.first]) {
                item.second = state.remove(item.first);
                return true;
            }
        }
        is_over = state.left == 0;
        return is_over;
    });
    if (!item.second.tensor.defined()) {
        return {!is_over, std::nullopt};
    }
    return {true, Item{item.first, state.hand_out(item.first, std::move(item.second))}};
}

std::optional<at::Tensor> DevicePrefetch::take(size_t item, Deadline until) {
    State& state = *state_;
    (*state.prefetcher)->check_process("prefetch");
    (*state.prefetcher)->prioritize(item);
    auto found = state.wait(until, [&]() -> std::optional<State::Landed> {
        if (state.is_taken[item]) {
            throw AlreadyDelivered();
        }
        return state.landed[item] ? std::optional(state.remove(item)) : std::nullopt;
    });
    return found ? std::optional(state.hand_out(item, std::move(*found))) : std::nullopt;
}

}  // namespace safetensors_torch::layer
