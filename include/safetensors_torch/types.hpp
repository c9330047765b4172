/// @file
/// The types of safetensors_torch.hpp, which includes this: metadata, what functions accept, and all options.
#pragma once

#include <ATen/ATen.h>

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "error.hpp"
#include "tensors.hpp"

/// Loads and saves of safetensors files.
namespace safetensors_torch {

/// Text in the header of a file. Empty means that the file has no `__metadata__`.
using Metadata = std::map<std::string, std::string>;

/// A device: an at::Device, a type such as at::kCUDA, or a name such as "cuda:0".
class DeviceLike {
  public:
    /// This device.
    DeviceLike(at::Device device) : device_(device) {}
    /// The current device of this type.
    DeviceLike(at::DeviceType type) : device_(type) {}
    /// The device of this name. Throws Error if torch has none.
    DeviceLike(const std::string& name) : device_(parsed(name)) {}
    /// The device of this name. Throws Error if torch has none.
    DeviceLike(const char* name) : device_(parsed(name)) {}
    /// A number does not name a device: write "cuda:0". 0 would be a null pointer.
    DeviceLike(int) = delete;

    /// The device.
    operator at::Device() const { return device_; }

  private:
    static at::Device parsed(const std::string& name) {
        try {
            return at::Device(name);
        } catch (const c10::Error&) {
            throw Error(
                "device \"" + name + "\": torch has no device of this name; use one such as \"cpu\" or \"cuda:0\"",
                ErrorCategory::value, 0, 0);
        }
    }

    at::Device device_;
};

namespace detail {

template <typename Buffer, typename = void>
inline constexpr bool is_bytes = false;
template <typename Buffer>
inline constexpr bool is_bytes<Buffer, std::void_t<decltype(std::declval<const Buffer&>().data()),
                                                   decltype(std::declval<const Buffer&>().size())>> =
    sizeof(*std::declval<const Buffer&>().data()) == 1;

}  // namespace detail

/// The bytes of a safetensors file, in memory that belongs to the caller: a std::string, a std::string_view, or a
/// container of char, unsigned char or std::byte, such as std::vector<uint8_t>.
class BytesView {
  public:
    /// A view of all bytes of `buffer`.
    template <typename Buffer>
    BytesView(const Buffer& buffer) {
        static_assert(detail::is_bytes<Buffer>,
                      "safetensors_torch::load takes the bytes of a file, as a std::string, a std::string_view or a "
                      "container of bytes; for the path of a file, call load_file");
        if constexpr (detail::is_bytes<Buffer>) {
            bytes_ = {reinterpret_cast<const char*>(buffer.data()), buffer.size()};
        }
    }

    /// The bytes.
    operator std::string_view() const { return bytes_; }

  private:
    std::string_view bytes_;
};

/// How the bytes of a file are loaded into host memory.
enum class Backend {
    /// One private copy-on-write mapping and no copy; it lives until the last tensor over it is destroyed. Writing to a
    /// tensor never changes the file. The file must not be truncated: touching a lost page raises SIGBUS.
    mmap,
    /// Parallel reads into memory that the tensors own. A file that is truncated during the load is an error. If it is
    /// changed in place, the load returns old or new bytes.
    pread,
};

/// Called about ten times a second and at the end, with bytes done and total, on the thread that loads or saves. A load
/// that maps everything calls it with (0, 0). An exception ends the load or save, and reaches the caller; if `done` is
/// `total`, the file is complete already. It must not free or resize the memory of the tensors: the load or save fails
/// then.
using Progress = std::function<void(int64_t done, int64_t total)>;

/// Returns whether to load the tensor of this name.
using NameFilter = std::function<bool(const std::string& name)>;

/// The tensors to load: all, those of a list of names or globs, or those whose names a function accepts.
class NameSelection {
  public:
    /// All tensors.
    NameSelection() = default;
    /// The tensors of these names, which may be globs ("layers.0.*"). One that no tensor has or matches is an error.
    NameSelection(std::vector<std::string> names) : names_(std::move(names)) {}
    /// The tensors of these names, which may be globs ("layers.0.*"). One that no tensor has or matches is an error.
    NameSelection(std::initializer_list<std::string> names) : names_(names) {}
    /// The tensors whose names `filter` accepts; all if it is an empty std::function.
    template <typename Filter, typename = std::enable_if_t<std::is_convertible_v<Filter, NameFilter>>>
    NameSelection(Filter filter) : filter_(std::move(filter)) {}

    /// The list, if there is one.
    const std::optional<std::vector<std::string>>& names() const { return names_; }
    /// The function; empty if there is none.
    const NameFilter& filter() const { return filter_; }

  private:
    std::optional<std::vector<std::string>> names_;
    NameFilter filter_;
};

/// Which tensors are loaded, and how.
struct LoadOptions {
    /// How the bytes are loaded into host memory. Tensors for a device are always read.
    Backend backend = Backend::mmap;
    /// When the pages of Backend::mmap are brought into memory, on the CPU. True: before the call returns. False: when
    /// they are touched, with page faults and waits for the disk. Without a value: by background threads, if all
    /// tensors are loaded (a cold file only if it takes at most half of the available memory).
    std::optional<bool> prefault = std::nullopt;
    /// A floating-point dtype to which floating-point tensors are converted, on their device, a few MiB at a time.
    std::optional<at::ScalarType> dtype = std::nullopt;
    /// The tensors to load, as a list of names or a function; others are not read. By default all.
    NameSelection names = {};
    /// Called with the progress of the load, if it is not empty.
    Progress progress = {};
};

/// The treatment of tensors that the files of a checkpoint contain and its index does not list.
enum class Extra {
    /// Opening fails: index and files may belong to two checkpoints.
    error,
    /// They are ignored.
    ignore,
};

/// The choice of a checkpoint in a directory, and the check of its index.
struct CheckpointOptions {
    /// The variant to open: "fp16" opens `model.fp16.safetensors`, `model.safetensors.index.fp16.json` and the other
    /// names that diffusers and transformers use.
    std::optional<std::string> variant = std::nullopt;
    /// The treatment of tensors that the index does not list.
    Extra extra = Extra::error;
};

/// How tensors of an open file are read ahead.
struct PrefetchOptions {
    /// The device of the tensors; without a value, that of the file.
    std::optional<DeviceLike> device = std::nullopt;
    /// A floating-point dtype to which floating-point tensors are converted.
    std::optional<at::ScalarType> dtype = std::nullopt;
    /// The most bytes of tensors that are read ahead, including the tensor that was handed out last. If no tensor
    /// waits to be taken, the next one is read even if it does not fit. Without a value, everything is read ahead.
    std::optional<int64_t> buffer_bytes = std::nullopt;
    /// The most threads that read; set_transfer_options limits them, too.
    int64_t threads = 8;
};

/// Which tensors iterate() reads, and how.
struct IterateOptions {
    /// The device of the tensors. CPU tensors have memory of their own, with either backend.
    DeviceLike device = at::kCPU;
    /// A floating-point dtype to which floating-point tensors are converted.
    std::optional<at::ScalarType> dtype = std::nullopt;
    /// The tensors to read, as in LoadOptions. At least one file must have each name.
    NameSelection names = {};
    /// How files are opened. With Backend::pread, all of them stay open.
    Backend backend = Backend::mmap;
    /// As in PrefetchOptions.
    std::optional<int64_t> buffer_bytes = int64_t{256} << 20;
};

/// The treatment of tensors that share memory when they are saved.
enum class Shared {
    /// The save fails.
    error,
    /// Writes one name of each group: the first, alphabetically, whose tensor covers the whole memory. The others are
    /// dropped and recorded as `metadata[dropped] = kept`, unless the metadata has that key.
    keep_one,
};

/// How a file is written.
struct SaveOptions {
    /// Whether the file is on the disk when the call returns, so that it survives a power cut (fsync of the file and
    /// its directory). Otherwise the kernel writes it to the disk within about half a minute.
    bool durable = false;
    /// Called with the progress of the save, in bytes of the file, if it is not empty.
    Progress progress = {};
    /// True writes tensors that are not contiguous as if they were, one copy at a time; false refuses them.
    bool force_contiguous = false;
    /// The treatment of tensors that share memory.
    Shared shared = Shared::error;
};

/// The dtype and the shape of a tensor.
struct TensorSpec {
    /// Its dtype.
    at::ScalarType dtype = at::kFloat;
    /// Its shape, as torch has it.
    std::vector<int64_t> shape = {};
};

/// Dtypes and shapes by name.
using TensorSpecs = std::map<std::string, TensorSpec>;

/// A box of the elements of a tensor in a file, and a tensor of its shape.
struct TensorPart {
    /// The name of the tensor in the file.
    std::string name;
    /// The first element, in each dimension.
    std::vector<int64_t> starts;
    /// The values of the box, or their destination.
    at::Tensor tensor;
};

/// How a file is written tensor by tensor.
struct IncrementalWriterOptions {
    /// As in SaveOptions, for the commit.
    bool durable = false;
};

/// New values of metadata keys; a key without a value is removed.
using MetadataChanges = std::map<std::string, std::optional<std::string>>;

/// How metadata is changed.
struct EditOptions {
    /// Overwrites the header with one short write instead of rewriting the file. Files that are open or mapped are not
    /// affected, but a power cut, or a program that opens the file during the write, can meet a torn header. An error
    /// if the new header does not fit, the file has another name (hard link), or the path is a symbolic link.
    bool in_place = false;
    /// Free bytes to leave in the header for later edits, at least.
    int64_t reserve = 0;
    /// As in SaveOptions.
    bool durable = false;
    /// As in SaveOptions; its bytes are those that are written.
    Progress progress = {};
};

/// How a checkpoint is divided into files, and written.
struct ShardedSaveOptions {
    /// The most bytes of tensors in one file, 1 or more; a larger tensor has a file of its own.
    int64_t max_shard_size = int64_t(5'000'000'000);
    /// The prefix of the files' names.
    std::string stem = "model";
    /// As in SaveOptions, for all files.
    bool durable = false;
    /// As in SaveOptions, for all files together.
    Progress progress = {};
    /// As in SaveOptions.
    bool force_contiguous = false;
    /// As in SaveOptions.
    Shared shared = Shared::error;
};

/// Returns the name in a file of a tensor of a module.
using Rename = std::function<std::string(const std::string& name)>;

/// How a module is loaded.
struct LoadModelOptions {
    /// Whether names that only the module or only the checkpoint has are an error.
    bool strict = true;
    /// How the bytes are loaded into host memory.
    Backend backend = Backend::mmap;
    /// The prefix of the module's names in the checkpoint, such as "transformer."; other names are ignored. So a module
    /// can be loaded from the checkpoint of a larger one.
    std::string prefix = {};
    /// Maps the module's names to those in the checkpoint, before `prefix` is added. Empty means the same names.
    Rename rename = {};
    /// Called with the progress of the load, if it is not empty.
    Progress progress = {};
    /// As in CheckpointOptions.
    std::optional<std::string> variant = std::nullopt;
    /// As in CheckpointOptions.
    Extra extra = Extra::error;
};

/// How a module is saved.
struct SaveModelOptions {
    /// As in SaveOptions.
    bool force_contiguous = true;
    /// As in SaveOptions.
    bool durable = false;
    /// As in LoadModelOptions.
    std::string prefix = {};
    /// As in LoadModelOptions.
    Rename rename = {};
    /// As in SaveOptions.
    Progress progress = {};
    /// With a value, the path is a directory, and the module is saved as by save_sharded.
    std::optional<int64_t> max_shard_size = std::nullopt;
    /// As in ShardedSaveOptions, if the path is a directory.
    std::string stem = "model";
};

/// The result of load_model: names in the checkpoint, sorted.
struct LoadResult {
    /// Names that only the module has.
    std::vector<std::string> missing;
    /// Names under the prefix that only the checkpoint has.
    std::vector<std::string> unexpected;
};

/// Whether large reads into memory bypass the page cache (O_DIRECT).
enum class Direct {
    /// If the file is not in the page cache, and its storage is fast.
    automatic = 0,
    /// Never: the page cache keeps what was read.
    never = 1,
    /// Even if the file is in the page cache, which takes several times as long.
    always = 2,
};

/// Resources of loads and saves.
struct TransferOptions {
    /// The most pinned host memory of all transfers between files and devices, in bytes; allocated in slabs of 2 MiB
    /// when it is needed. With 0, copies go through pageable memory.
    int64_t pinned_pool_bytes = int64_t(64) << 20;
    /// The most threads that one load or save uses: the calling thread, those that read and copy, and background
    /// threads (prefault). 1 means the calling thread only; 0 chooses by machine and work. torch's own threads, which
    /// convert tensors on the CPU, are set by at::set_num_threads.
    int64_t threads = 0;
    /// Whether large reads into memory bypass the page cache.
    Direct direct = Direct::automatic;
};

}  // namespace safetensors_torch
