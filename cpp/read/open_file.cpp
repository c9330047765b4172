#include "cpp/read/open_file.h"

#include "cpp/bytes.h"
#include "cpp/dtype.h"
#include "cpp/error.h"
#include "cpp/tensor_memory.h"
#include "include/safetensors_torch.h"

namespace safetensors_torch::layer {

SharedFile open_file(const std::string& path, const std::string& backend) {
    return std::make_shared<const rust::Box<core::File>>(core::open_file(as_bytes(path), as_bytes(backend)));
}

SharedFile open_bytes(const at::Tensor& data) {
    if (data.scalar_type() != at::kByte || data.dim() != 1 || !data.is_cpu() || !data.is_contiguous() ||
        (data.numel() != 0 && !has_memory(data))) {
        fail(ErrorCategory::value,
             "load takes the bytes of a file as a contiguous one-dimensional uint8 tensor on the CPU");
    }
    check_whole("data", data);
    struct Owner {
        at::Tensor data;
        rust::Box<core::File> file;
    };
    const auto* start = static_cast<const uint8_t*>(data.const_data_ptr());
    const auto owner = std::make_shared<const Owner>(Owner{data, core::open_memory(start, data.nbytes())});
    return {owner, &owner->file};
}

SharedFile open_source(int64_t address, const std::string& name, bool is_interpreted) {
    const auto* source = reinterpret_cast<const sft_source*>(static_cast<uintptr_t>(address));
    if (source == nullptr || source->struct_size != sizeof(sft_source)) {
        fail(ErrorCategory::value, "a source is given by the address of an sft_source of this version");
    }
    return std::make_shared<const rust::Box<core::File>>(
        core::open_source(static_cast<size_t>(static_cast<uintptr_t>(address)), as_bytes(name), is_interpreted));
}

core::CheckpointOptions checkpoint_options(const std::string& backend, const std::optional<std::string>& variant,
                                           const std::string& extra) {
    return {as_bytes(backend), variant.has_value(), variant ? as_bytes(*variant) : rust::Slice<const uint8_t>(),
            as_bytes(extra)};
}

rust::Box<core::Checkpoint> open_filesystem(int64_t address, const std::string& path,
                                            const core::CheckpointOptions& options, bool is_interpreted) {
    const auto* filesystem = reinterpret_cast<const sft_filesystem*>(static_cast<uintptr_t>(address));
    if (filesystem == nullptr || filesystem->struct_size != sizeof(sft_filesystem)) {
        fail(ErrorCategory::value, "a filesystem is given by the address of an sft_filesystem of this version");
    }
    return core::open_filesystem(static_cast<size_t>(static_cast<uintptr_t>(address)), as_bytes(path), options,
                                 is_interpreted);
}

std::pair<c10::ScalarType, c10::DimVector> describe(const core::File& file, size_t index) {
    const uint8_t dtype = file.dtype(index);
    const rust::Str name = file.name(index);
    return {to_torch(dtype, name), to_torch_shape(dtype, file.shape(index), name)};
}

}  // namespace safetensors_torch::layer
