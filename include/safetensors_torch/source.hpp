/// @file
/// Part of safetensors_torch.hpp: files that a program reads by its own means.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "detail.hpp"
#include "types.hpp"

namespace safetensors_torch {

/// A file that the program reads by its own means: an object in a bucket, an entry of an archive, a cache.
///
///     class Object : public safetensors_torch::Source {
///       public:
///         std::uint64_t length() override { return client_.size(url_); }
///         void read(std::uint64_t offset, const sft_buffer* buffers, std::size_t count) override {
///             client_.get(url_, offset, buffers, count);
///         }
///     };
///     safetensors_torch::File file(std::make_shared<Object>(), "s3://bucket/model.safetensors");
///
/// Several threads call the functions at once, up to 32 or as many as set_transfer_options says. They may throw: the
/// call that needs the bytes fails with the text of the exception, behind the name of the file; an Error keeps its code
/// and its os_error, a std::system_error its errno. They must not use the file.
class Source {
  public:
    virtual ~Source() = default;

    /// Returns the size of the file in bytes. Called once for each File that is opened over the source.
    virtual std::uint64_t length() = 0;

    /// Returns what identifies the bytes that the last call of length or read on this thread was about, such as an
    /// ETag; std::nullopt if the source makes sure by itself that they do not change. Called after each of these: if
    /// the identity changes, reads fail with SFT_ERROR_FILE_CHANGED.
    virtual std::optional<std::string> identity() { return std::nullopt; }

    /// Returns how many calls of read the source can answer at once; 0 for as many as suit the library. With 1, a load
    /// reads in the order of the file, as a stream needs it. Called once, after length.
    virtual std::uint32_t max_requests() noexcept { return 0; }

    /// Fills `count` buffers, one after the other, with the bytes from `offset` on: at most 8 MiB, inside the length.
    virtual void read(std::uint64_t offset, const sft_buffer* buffers, std::size_t count) = 0;
};

/// Files that the program reads by its own means, by their paths: the objects of a bucket, for example. With it,
/// Checkpoint, load_sharded and load_model open a file, an index or a directory.
///
/// Paths are the program's own: the library only joins the path of a directory and the name of a file with a slash.
/// Several threads call the functions at once. They may throw: the opening fails with the text of the exception.
class Filesystem {
  public:
    virtual ~Filesystem() = default;

    /// Returns the file at `path`. If there is none, this or its length throws Error with the os_error ENOENT; for a
    /// directory, with EISDIR.
    virtual std::shared_ptr<Source> open(const std::string& path) = 0;

    /// Returns the names of the files in a directory; std::nullopt if directories cannot be listed: a checkpoint is
    /// then found in one if its names begin with `model`.
    virtual std::optional<std::vector<std::string>> list(const std::string& directory) {
        (void)directory;
        return std::nullopt;
    }
};

namespace detail {

// Calls a function of a source, from C.
template <typename Function>
sft_status call_source(sft_source_error* error, const Function& function) noexcept {
    try {
        function();
        return SFT_OK;
    } catch (const Error& failure) {
        sft_source_error_set(error, failure.os_error(), failure.what());
        return failure.code() == 0 ? SFT_ERROR_IO : failure.code();
    } catch (const std::system_error& failure) {
        sft_source_error_set(error, failure.code().value(), failure.what());
    } catch (const std::exception& failure) {
        sft_source_error_set(error, EIO, failure.what());
    } catch (...) {
        sft_source_error_set(error, EIO, "the source has thrown something that is not a std::exception");
    }
    return SFT_ERROR_IO;
}

inline Source& source_of(void* context) { return **static_cast<std::shared_ptr<Source>*>(context); }

// Returns the functions of a source, which own it.
inline sft_source functions_of(std::shared_ptr<Source> source) {
    if (source == nullptr) {
        fail("source is null; pass an object of a class derived from Source", ErrorCategory::value);
    }
    sft_source functions = SFT_SOURCE_INIT;
    functions.get_length = [](void* context, std::uint64_t* length, sft_source_error* error) {
        return call_source(error, [&] { *length = source_of(context).length(); });
    };
    functions.get_identity = [](void* context, const char** identity, sft_source_error* error) {
        // Valid until the next call on this thread.
        thread_local std::optional<std::string> last;
        return call_source(error, [&] {
            last = source_of(context).identity();
            *identity = last ? last->c_str() : nullptr;
        });
    };
    functions.read = [](void* context, std::uint64_t offset, const sft_buffer* buffers, std::size_t count,
                        sft_source_error* error) {
        return call_source(error, [&] { source_of(context).read(offset, buffers, count); });
    };
    functions.get_max_requests = [](void* context) { return source_of(context).max_requests(); };
    functions.free = [](void* context) { delete static_cast<std::shared_ptr<Source>*>(context); };
    functions.context = new std::shared_ptr<Source>(std::move(source));
    return functions;
}

template <typename Struct>
int64_t address_of(const Struct& functions) {
    return static_cast<int64_t>(reinterpret_cast<std::uintptr_t>(&functions));
}

inline Object open_source(std::shared_ptr<Source> source, const std::string& name) {
    const auto op = find_op("safetensors_torch::_open_source");
    const sft_source functions = functions_of(std::move(source));
    // The library has copied the functions, and frees the context, when this returns or throws.
    return call_boxed(op, address_of(functions), name, false).toObject();
}

inline Object open_checkpoint(Filesystem& filesystem, const std::string& path, const CheckpointOptions& options) {
    sft_filesystem functions = SFT_FILESYSTEM_INIT;
    functions.context = &filesystem;
    functions.open = [](void* context, const char* name, sft_source* source, sft_source_error* error) {
        return call_source(error, [&] { *source = functions_of(static_cast<Filesystem*>(context)->open(name)); });
    };
    functions.list = [](void* context, const char* directory, const char* const** names, std::size_t* count,
                        sft_source_error* error) {
        // Valid until the next call on this thread.
        thread_local std::vector<std::string> last;
        thread_local std::vector<const char*> pointers;
        return call_source(error, [&] {
            auto found = static_cast<Filesystem*>(context)->list(directory);
            if (!found) {
                // As for a bucket that refuses to list.
                throw Error("directories cannot be listed", ErrorCategory::os, SFT_ERROR_IO, EACCES);
            }
            last = std::move(*found);
            pointers.clear();
            for (const std::string& name : last) {
                pointers.push_back(name.c_str());
            }
            *names = pointers.data();
            *count = pointers.size();
        });
    };
    const auto op = find_op("safetensors_torch::_open_filesystem");
    const std::string extra = options.extra == Extra::ignore ? "ignore" : "error";
    return call_boxed(op, address_of(functions), path, options.variant, extra, false).toObject();
}

}  // namespace detail

}  // namespace safetensors_torch
