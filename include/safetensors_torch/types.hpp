/// @file
/// The types of safetensors_torch.hpp, which includes this: tensors and metadata by name, and what can be asked for.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/Dict.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

/// Tensors, modules and parts of files, from and to safetensors.
namespace safetensors_torch {

/// Tensors by name. A loaded one iterates in the order of the data in the file.
using Tensors = c10::Dict<std::string, at::Tensor>;

/// The free-form text beside the tensors. Empty means none: no `__metadata__` is written, or there was none.
using Metadata = std::map<std::string, std::string>;

/// How the bytes of a file become host memory.
enum class Backend {
    /// One private copy-on-write mapping and no copy; it lives until the last tensor over it dies. Writing to a tensor
    /// never changes the file. The file must not be cut short meanwhile: touching a lost page is a SIGBUS.
    mmap,
    /// Parallel reads into memory that the tensors own. A file that is cut short meanwhile is an error; one that is
    /// changed in place gives whatever it holds when it is read.
    pread,
};

/// Is told of the bytes that are done and the bytes in all, some ten times a second and at the end, on the thread that
/// loads or saves. What is mapped is no work: a load that maps everything tells (0, 0). What it throws ends the load or
/// save, and reaches the caller; when `done` is `total`, the file is complete already. It must not free or resize the
/// memory of the tensors: the load or save fails then.
using Progress = std::function<void(int64_t done, int64_t total)>;

/// Whether a tensor of this name is wanted.
using NameFilter = std::function<bool(const std::string& name)>;

/// Which tensors are loaded, and how.
struct LoadOptions {
    /// How the bytes become host memory; to a device they are read, whatever this says.
    Backend backend = Backend::mmap;
    /// About Backend::mmap on the CPU, whose tensors cost a page fault every few pages where they are touched first,
    /// and a wait for the disk where the file is not in memory. Without a value, threads in the background bring the
    /// file in while the caller goes on, if it loads all of it (a cold file only if it takes no more than half of the
    /// memory available); true has that done when the call returns, false leaves it to the touch.
    std::optional<bool> prefault = std::nullopt;
    /// A floating-point dtype that floating-point tensors are converted to, on their device, some MiB at a time.
    std::optional<at::ScalarType> dtype = std::nullopt;
    /// Loads the tensors whose names it accepts; others are not read. Empty means all.
    NameFilter names = {};
    /// Is told how far the load is, if there is one.
    Progress progress = {};
};

/// What is done about tensors that the files of a checkpoint hold, and its index does not list.
enum class Extra {
    /// The checkpoint is refused: index and files may be of two checkpoints.
    error,
    /// They are left out.
    ignore,
};

/// Which checkpoint of a directory is opened, and how its index is checked.
struct CheckpointOptions {
    /// With a value, the checkpoint of this variant: "fp16" opens `model.fp16.safetensors`,
    /// `model.safetensors.index.fp16.json` and the other names that diffusers and transformers use.
    std::optional<std::string> variant = std::nullopt;
    /// What is done about tensors that the index does not list.
    Extra extra = Extra::error;
};

/// What becomes of tensors that share memory when they are saved.
enum class Shared {
    /// They are refused.
    error,
    /// Of each group the first name, alphabetically, whose tensor covers the whole memory is written; the others are
    /// left out, and noted in the metadata as `metadata[left out] = written` unless it has that key.
    keep_one,
};

/// How a file is written.
struct SaveOptions {
    /// Whether the file is on the disk when the call returns, so that it survives a loss of power (fsync of the file
    /// and its directory). Otherwise the kernel writes it there within half a minute or so.
    bool durable = false;
    /// Is told how far the save is, if there is one; its bytes are those of the file.
    Progress progress = {};
    /// Whether tensors that are not contiguous are written as if they were, one copy at a time, or refused.
    bool force_contiguous = false;
    /// What becomes of tensors that share memory.
    Shared shared = Shared::error;
};

/// A tensor that is to be written, without its data.
struct TensorSpec {
    /// Its dtype.
    at::ScalarType dtype = at::kFloat;
    /// Its shape, as torch has it.
    std::vector<int64_t> shape = {};
};

/// Such tensors by name.
using TensorSpecs = std::map<std::string, TensorSpec>;

/// How a file is written tensor by tensor.
struct IncrementalWriterOptions {
    /// As in SaveOptions, of the commit.
    bool durable = false;
};

/// New text for keys of the metadata; without a value, the key is removed.
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
    /// The most bytes of tensors in one file, 1 or more; a tensor that is larger has a file of its own.
    int64_t max_shard_size = int64_t(5'000'000'000);
    /// What the names of the files begin with.
    std::string stem = "model";
    /// As in SaveOptions, of all files.
    bool durable = false;
    /// As in SaveOptions, of all files together.
    Progress progress = {};
    /// As in SaveOptions.
    bool force_contiguous = false;
    /// As in SaveOptions.
    Shared shared = Shared::error;
};

/// Gives the name that a tensor of a module has in a file.
using Rename = std::function<std::string(const std::string& name)>;

/// How a module is loaded.
struct LoadModelOptions {
    /// Whether it is an error if a name of the module is not in the checkpoint, or the other way round.
    bool strict = true;
    /// How the bytes become host memory.
    Backend backend = Backend::mmap;
    /// What the module's names in the checkpoint begin with, such as "transformer."; what it has of other names is
    /// passed over. So a module can be filled from the checkpoint of a larger one.
    std::string prefix = {};
    /// From the module's names to those in the checkpoint, which `prefix` is then put before. Empty means the same
    /// names.
    Rename rename = {};
    /// Is told how far the load is, if there is one.
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
    /// With a value, the path is a directory, and the module is divided as by save_sharded.
    std::optional<int64_t> max_shard_size = std::nullopt;
    /// As in ShardedSaveOptions, where the path is a directory.
    std::string stem = "model";
};

/// What load_model found, in names of the checkpoint: those that the module has and the checkpoint has not, and the
/// other way round. Both sorted.
struct LoadResult {
    /// What the module has and the checkpoint has not.
    std::vector<std::string> missing;
    /// What the checkpoint has, under the prefix, and the module has not.
    std::vector<std::string> unexpected;
};

/// What loads and saves may use.
struct TransferOptions {
    /// The most pinned host memory that all transfers between files and devices keep, in bytes; taken in slabs of 2
    /// MiB, as it is needed. 0 means none: copies then go through memory that is not pinned.
    int64_t pinned_pool_bytes = int64_t(64) << 20;
    /// The most threads that one load or save uses, to the CPU or a device: the calling one, those that read and copy,
    /// and those that go on in the background (prefault). 1 means the calling one alone; 0 as many as suit the machine
    /// and the work. torch's own threads, which convert tensors on the CPU, are at::set_num_threads'.
    int64_t threads = 0;
};

}  // namespace safetensors_torch
