#include "pinned_memory.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "controls.h"

namespace testaccel {
namespace {

constexpr size_t kPage = 4096;
constexpr int kPoison = 0xA7;

struct Pinned {
    std::mutex mutex;
    // All blocks, by address.
    std::map<char*, size_t> sizes;
    // Those not in use, by size.
    std::map<size_t, std::vector<char*>> cached;
    PinnedStatistics statistics;
};

// Never destroyed: tensors may be freed until the process ends.
Pinned& pinned() {
    static auto* const instance = new Pinned;
    return *instance;
}

char* new_block(Pinned& all, size_t size) {
    void* const block = std::aligned_alloc(kPage, std::max(size, kPage));
    if (block == nullptr) {
        throw std::bad_alloc();
    }
    const auto mib = static_cast<double>(size) / (1 << 20);
    const double cost = mib * static_cast<double>(faults().pinning_us_per_mib.load());
    std::this_thread::sleep_for(std::chrono::duration<double, std::micro>(cost));
    all.sizes.emplace(static_cast<char*>(block), size);
    all.statistics.total += static_cast<int64_t>(size);
    std::memset(block, kPoison, size);
    return static_cast<char*>(block);
}

void free_pinned(void* data) {
    Pinned& all = pinned();
    const std::lock_guard<std::mutex> lock(all.mutex);
    auto* const block = static_cast<char*>(data);
    const size_t size = all.sizes.at(block);
    std::memset(block, kPoison, size);
    all.cached[size].push_back(block);
    all.statistics.in_use -= static_cast<int64_t>(size);
}

class PinnedAllocator final : public c10::Allocator {
  public:
    c10::DataPtr allocate(size_t nbytes) override {
        if (nbytes == 0) {
            return {nullptr, c10::kCPU};
        }
        TORCH_CHECK(!faults().pinning, "testaccel: injected pinning failure");
        size_t size = 1;
        while (size < nbytes) {
            size *= 2;
        }
        Pinned& all = pinned();
        const std::lock_guard<std::mutex> lock(all.mutex);
        auto& cached = all.cached[size];
        char* block = nullptr;
        if (cached.empty()) {
            block = new_block(all, size);
        } else {
            block = cached.back();
            cached.pop_back();
        }
        PinnedStatistics& statistics = all.statistics;
        statistics.in_use += static_cast<int64_t>(size);
        statistics.peak = std::max(statistics.peak, statistics.in_use);
        ++statistics.allocations;
        return {block, block, &free_pinned, c10::kCPU};
    }

    c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }

    void copy_data(void* dest, const void* src, std::size_t count) const override { std::memcpy(dest, src, count); }
};

}  // namespace

c10::Allocator* pinned_allocator() {
    static auto* const instance = new PinnedAllocator;
    return instance;
}

bool is_pinned(const void* data, size_t nbytes) {
    Pinned& all = pinned();
    const std::lock_guard<std::mutex> lock(all.mutex);
    const auto* const start = static_cast<const char*>(data);
    auto after = all.sizes.upper_bound(const_cast<char*>(start));
    if (after == all.sizes.begin()) {
        return false;
    }
    const auto& [block, size] = *std::prev(after);
    return start + nbytes <= block + size;
}

void empty_pinned_cache() {
    Pinned& all = pinned();
    const std::lock_guard<std::mutex> lock(all.mutex);
    for (auto& [size, blocks] : all.cached) {
        for (char* const block : blocks) {
            all.sizes.erase(block);
            std::free(block);
            all.statistics.total -= static_cast<int64_t>(size);
        }
    }
    all.cached.clear();
}

PinnedStatistics pinned_statistics() {
    Pinned& all = pinned();
    const std::lock_guard<std::mutex> lock(all.mutex);
    return all.statistics;
}

void reset_pinned_statistics() {
    Pinned& all = pinned();
    const std::lock_guard<std::mutex> lock(all.mutex);
    all.statistics.peak = all.statistics.in_use;
    all.statistics.allocations = 0;
}

}  // namespace testaccel
