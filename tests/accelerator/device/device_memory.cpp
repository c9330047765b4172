#include "device_memory.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <iomanip>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <utility>
#include <vector>

#include "stream.h"

namespace testaccel {
namespace {

constexpr size_t kGranule = 512;
// Address space of a device. Memory is taken as it is touched.
constexpr size_t kRegion = size_t{64} << 30;
constexpr int kPoison = 0xDB;

struct Block {
    char* data;
    size_t size;
    c10::DeviceIndex device;
    c10::StreamId stream;
    // Beside the one that it was allocated on.
    std::vector<c10::Stream> used_on;
    // Set when it is freed: where those streams were.
    std::vector<SharedMark> until;
};

using Blocks = std::vector<std::unique_ptr<Block>>;

struct Memory {
    std::mutex mutex;
    int file = -1;
    char* region = nullptr;
    char* reachable = nullptr;
    size_t touched = 0;
    // By the stream that may reuse them, and their size.
    std::map<std::pair<c10::StreamId, size_t>, Blocks> cached;
    // Freed, but used on other streams.
    Blocks awaited;
    // For any stream.
    std::map<size_t, Blocks> spare;
    int64_t limit = -1;
    MemoryStatistics statistics;
};

char* map_region(int file, int protection) {
    void* const region = mmap(nullptr, kRegion, protection, MAP_SHARED | MAP_NORESERVE, file, 0);
    TORCH_CHECK(region != MAP_FAILED, "testaccel: mmap failed: ", std::strerror(errno));
    return static_cast<char*>(region);
}

std::array<Memory, kDevices>& memories() {
    // Never destroyed: tensors may be freed until the process ends.
    static auto* const instance = [] {
        auto* const all = new std::array<Memory, kDevices>;
        for (Memory& memory : *all) {
            memory.file = memfd_create("testaccel", MFD_CLOEXEC);
            TORCH_CHECK(memory.file >= 0 && ftruncate(memory.file, kRegion) == 0,
                        "testaccel: memfd_create failed: ", std::strerror(errno));
            memory.region = map_region(memory.file, PROT_NONE);
            memory.reachable = map_region(memory.file, PROT_READ | PROT_WRITE);
        }
        return all;
    }();
    return *instance;
}

std::string as_text(int64_t bytes) {
    std::ostringstream text;
    text << std::fixed << std::setprecision(2);
    if (bytes < (1 << 20)) {
        text << static_cast<double>(bytes) / (1 << 10) << " KiB";
    } else {
        text << static_cast<double>(bytes) / (1 << 20) << " MiB";
    }
    return text.str();
}

// Freed blocks that other streams are through with.
void collect(Memory& memory) {
    const auto first_free = std::stable_partition(memory.awaited.begin(), memory.awaited.end(), [](const auto& block) {
        return !std::all_of(block->until.begin(), block->until.end(), is_passed);
    });
    for (auto it = first_free; it != memory.awaited.end(); ++it) {
        (*it)->until.clear();
        memory.cached[{(*it)->stream, (*it)->size}].push_back(std::move(*it));
    }
    memory.awaited.erase(first_free, memory.awaited.end());
}

// Frees the pages, and keeps the addresses: work that is queued too late does not crash.
void give_back(const Memory& memory, const Block& block) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const auto start = static_cast<size_t>(block.data - memory.region);
    const size_t first = (start + page - 1) / page * page;
    const size_t end = (start + block.size) / page * page;
    if (first < end) {
        // Where this fails, the memory stays in use, which does no harm.
        (void)fallocate(memory.file, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(first),
                        static_cast<off_t>(end - first));
    }
}

void empty_cache(Memory& memory, c10::DeviceIndex index) {
    if (memory.cached.empty() && memory.awaited.empty()) {
        return;
    }
    for (const auto& block : memory.awaited) {
        for (const SharedMark& mark : block->until) {
            wait_for_mark(mark);
        }
    }
    collect(memory);
    wait_for_device(index);
    for (auto& [key, blocks] : memory.cached) {
        for (auto& block : blocks) {
            memory.statistics.reserved -= static_cast<int64_t>(block->size);
            give_back(memory, *block);
            memory.spare[block->size].push_back(std::move(block));
        }
    }
    memory.cached.clear();
}

template <typename Map>
std::unique_ptr<Block> take(Map& blocks, const typename Map::key_type& key) {
    const auto found = blocks.find(key);
    if (found == blocks.end()) {
        return nullptr;
    }
    auto block = std::move(found->second.back());
    found->second.pop_back();
    if (found->second.empty()) {
        blocks.erase(found);
    }
    return block;
}

bool exceeds_limit(const Memory& memory, size_t size) {
    return memory.limit >= 0 && memory.statistics.reserved + static_cast<int64_t>(size) > memory.limit;
}

std::unique_ptr<Block> fresh_block(Memory& memory, c10::DeviceIndex index, size_t size) {
    if (exceeds_limit(memory, size)) {
        empty_cache(memory, index);
    }
    TORCH_CHECK_WITH(OutOfMemoryError, !exceeds_limit(memory, size), "testaccel out of memory. Tried to allocate ",
                     as_text(static_cast<int64_t>(size)), ". Device ", static_cast<int>(index),
                     " has a total capacity of ", as_text(memory.limit), ", of which ",
                     as_text(memory.statistics.reserved), " is in use.");
    auto block = take(memory.spare, size);
    if (!block) {
        TORCH_CHECK_WITH(OutOfMemoryError, size <= kRegion - memory.touched, "testaccel out of addresses");
        block = std::make_unique<Block>(Block{memory.region + memory.touched, size, index, 0, {}, {}});
        memory.touched += size;
    }
    memory.statistics.reserved += static_cast<int64_t>(size);
    std::memset(memory.reachable + (block->data - memory.region), kPoison, size);
    return block;
}

void free_block(void* context) {
    std::unique_ptr<Block> block(static_cast<Block*>(context));
    Memory& memory = memories()[block->device];
    const std::lock_guard<std::mutex> lock(memory.mutex);
    memory.statistics.allocated -= static_cast<int64_t>(block->size);
    if (block->used_on.empty()) {
        memory.cached[{block->stream, block->size}].push_back(std::move(block));
        return;
    }
    for (const c10::Stream& stream : std::exchange(block->used_on, {})) {
        block->until.push_back(mark(stream));
    }
    memory.awaited.push_back(std::move(block));
}

class DeviceAllocator final : public c10::Allocator {
  public:
    c10::DataPtr allocate(size_t nbytes) override {
        const c10::Stream stream = current_stream(-1);
        if (nbytes == 0) {
            return {nullptr, stream.device()};
        }
        Memory& memory = memories()[stream.device_index()];
        const size_t size = (nbytes + kGranule - 1) / kGranule * kGranule;
        const std::lock_guard<std::mutex> lock(memory.mutex);
        collect(memory);
        auto block = take(memory.cached, {stream.id(), size});
        if (!block) {
            block = fresh_block(memory, stream.device_index(), size);
            block->stream = stream.id();
        }
        MemoryStatistics& statistics = memory.statistics;
        statistics.allocated += static_cast<int64_t>(size);
        statistics.peak = std::max(statistics.peak, statistics.allocated);
        ++statistics.allocations;
        char* const data = block->data;
        return {data, block.release(), &free_block, stream.device()};
    }

    void copy_data(void* dest, const void* src, std::size_t count) const override {
        launch(current_stream(device_of(dest)),
               [to = reachable(dest), from = reachable(src), count] { std::memcpy(to, from, count); });
    }
};

}  // namespace

c10::Allocator* device_allocator() {
    static auto* const instance = new DeviceAllocator;
    return instance;
}

c10::DeviceIndex device_of(const void* data) {
    for (c10::DeviceIndex index = 0; index < kDevices; ++index) {
        const char* const region = memories()[index].region;
        if (data >= region && data < region + kRegion) {
            return index;
        }
    }
    return -1;
}

void* reachable(const void* data) {
    const c10::DeviceIndex index = device_of(data);
    TORCH_CHECK(index >= 0, "testaccel: ", data, " is no memory of a device");
    const Memory& memory = memories()[index];
    return memory.reachable + (static_cast<const char*>(data) - memory.region);
}

void use_on_stream(const c10::DataPtr& data, const c10::Stream& stream) {
    // Memory that came from elsewhere, or an empty tensor's.
    if (data.get_deleter() != &free_block) {
        return;
    }
    auto* const block = static_cast<Block*>(data.get_context());
    const std::lock_guard<std::mutex> lock(memories()[block->device].mutex);
    if (stream == stream_of(block->device, block->stream)) {
        return;
    }
    if (std::find(block->used_on.begin(), block->used_on.end(), stream) == block->used_on.end()) {
        block->used_on.push_back(stream);
    }
}

void empty_device_cache(c10::DeviceIndex index) {
    Memory& memory = memories()[checked_index(index)];
    const std::lock_guard<std::mutex> lock(memory.mutex);
    empty_cache(memory, checked_index(index));
}

void set_memory_limit(c10::DeviceIndex index, int64_t limit) {
    Memory& memory = memories()[checked_index(index)];
    const std::lock_guard<std::mutex> lock(memory.mutex);
    memory.limit = limit;
}

MemoryStatistics memory_statistics(c10::DeviceIndex index) {
    Memory& memory = memories()[checked_index(index)];
    const std::lock_guard<std::mutex> lock(memory.mutex);
    return memory.statistics;
}

void reset_memory_statistics(c10::DeviceIndex index) {
    Memory& memory = memories()[checked_index(index)];
    const std::lock_guard<std::mutex> lock(memory.mutex);
    memory.statistics.peak = memory.statistics.allocated;
    memory.statistics.allocations = 0;
}

}  // namespace testaccel
