// Divides a checkpoint into shards, merges shards into one file, or changes the floating-point dtype.
//
// Build:  cmake -S examples/cpp/convert -B BUILD -DCMAKE_PREFIX_PATH=PREFIX -DLIBTORCH=TORCH && cmake --build BUILD
// Run:    BUILD/convert shard IN DIRECTORY --max-shard-size 1GB    model-00001-of-00003.safetensors, ..., and the index
//         BUILD/convert unshard DIRECTORY OUT                      one file
//         BUILD/convert cast IN OUT --dtype bf16                one file; integers and 8-bit floats stay as they are
//
// IN: a file, the directory of a checkpoint, or the index of a sharded one. PREFIX: the prefix of `make install`.
// TORCH: an unpacked libtorch, or the directory of the Python package torch.
//
// Metadata is kept. The tensors are mapped, not loaded: only those that `cast` converts need memory. The output is
// replaced atomically, and may be the input.

#include <getopt.h>

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <map>
#include <optional>
#include <safetensors_torch.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>

namespace {

constexpr const char* kUsage =
    "usage: convert shard IN DIRECTORY [--max-shard-size SIZE]    SIZE: 500MB, 5GB (the default), 2GiB, or bytes\n"
    "       convert unshard DIRECTORY OUT\n"
    "       convert cast IN OUT --dtype DTYPE                  DTYPE: f64, f32, f16 or bf16\n";

const std::map<std::string_view, at::ScalarType> kDtypes{
    {"f64", at::kDouble}, {"f32", at::kFloat}, {"f16", at::kHalf}, {"bf16", at::kBFloat16}};

const std::map<std::string_view, std::int64_t> kUnits{
    {"", 1},          {"B", 1},         {"KB", 1'000},   {"MB", 1'000'000}, {"GB", 1'000'000'000},
    {"KiB", 1 << 10}, {"MiB", 1 << 20}, {"GiB", 1 << 30}};

// Parses a number with a unit as bytes. Returns nothing if `text` is invalid, or the number overflows.
std::optional<std::int64_t> parse_size(std::string_view text) {
    std::int64_t number = 0, bytes = 0;
    const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    const auto unit = kUnits.find(text.substr(static_cast<std::size_t>(stop - text.data())));
    if (error != std::errc() || unit == kUnits.end() || number <= 0 ||
        __builtin_mul_overflow(number, unit->second, &bytes)) {
        return std::nullopt;
    }
    return bytes;
}

void shard(const std::string& in, const std::string& directory, std::int64_t max_shard_size) {
    const safetensors_torch::Checkpoint checkpoint(in);
    safetensors_torch::ShardedSaveOptions options;
    options.max_shard_size = max_shard_size;
    for (const std::string& name :
         safetensors_torch::save_sharded(checkpoint.get_tensors(), directory, checkpoint.metadata(), options)) {
        std::printf("%s\n", name.c_str());
    }
}

void unshard(const std::string& in, const std::string& out) {
    const safetensors_torch::Checkpoint checkpoint(in);
    safetensors_torch::save_file(checkpoint.get_tensors(), out, checkpoint.metadata());
}

// Throws if a finite value would become infinite.
at::Tensor cast(const at::Tensor& tensor, at::ScalarType dtype, const std::string& name) {
    at::Tensor result = tensor.to(dtype);
    if (!at::equal(result.isfinite(), tensor.isfinite())) {
        throw std::runtime_error("tensor " + name + " has values that are too large for " + at::toString(dtype) +
                                 ": take a dtype of wider range, such as bf16");
    }
    return result;
}

void cast(const std::string& in, const std::string& out, at::ScalarType dtype) {
    const safetensors_torch::Checkpoint checkpoint(in);
    safetensors_torch::Tensors tensors;
    for (const std::string& name : checkpoint.offset_keys()) {
        const at::Tensor tensor = checkpoint.get_tensor(name);
        const bool converts = tensor.is_floating_point() && tensor.element_size() > 1;
        tensors[name] = converts ? cast(tensor, dtype, name) : tensor;
    }
    safetensors_torch::save_file(tensors, out, checkpoint.metadata());
}

struct Arguments {
    std::string command, in, out;
    std::int64_t max_shard_size = 5'000'000'000;
    std::optional<at::ScalarType> dtype;
};

std::optional<Arguments> parse(int argc, char** argv) {
    static const option options[] = {
        {"max-shard-size", required_argument, nullptr, 's'}, {"dtype", required_argument, nullptr, 'd'}, {}};
    Arguments arguments;
    bool has_size = false;
    for (int found; (found = getopt_long(argc, argv, "", options, nullptr)) != -1;) {
        if (found == 's') {
            const auto size = parse_size(optarg);
            if (!size) {
                std::fprintf(stderr, "convert: no size: %s\n", optarg);
                return std::nullopt;
            }
            arguments.max_shard_size = *size;
            has_size = true;
        } else if (found == 'd') {
            const auto dtype = kDtypes.find(optarg);
            if (dtype == kDtypes.end()) {
                std::fprintf(stderr, "convert: no dtype to convert to: %s\n", optarg);
                return std::nullopt;
            }
            arguments.dtype = dtype->second;
        } else {
            return std::nullopt;
        }
    }
    if (argc - optind != 3) {
        return std::nullopt;
    }
    arguments.command = argv[optind];
    arguments.in = argv[optind + 1];
    arguments.out = argv[optind + 2];
    const std::string& command = arguments.command;
    const bool fits = (command == "shard" || command == "unshard" || command == "cast") &&
                      (!has_size || command == "shard") && arguments.dtype.has_value() == (command == "cast");
    return fits ? std::optional(arguments) : std::nullopt;
}

}  // namespace

int main(int argc, char** argv) {
    const std::optional<Arguments> arguments = parse(argc, argv);
    if (!arguments) {
        std::fputs(kUsage, stderr);
        return 2;
    }
    try {
        if (arguments->command == "shard") {
            shard(arguments->in, arguments->out, arguments->max_shard_size);
        } else if (arguments->command == "unshard") {
            unshard(arguments->in, arguments->out);
        } else {
            cast(arguments->in, arguments->out, *arguments->dtype);
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "convert: %s\n", error.what());
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
