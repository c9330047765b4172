// Loads tensors from a bucket of Amazon S3, or of a server with its interface such as MinIO, without a file on the
// disk.
//
// Build:  cmake -S examples/cpp/s3 -B BUILD -DCMAKE_PREFIX_PATH=PREFIX -DLIBTORCH=TORCH && cmake --build BUILD
// Run:    BUILD/s3 s3://BUCKET/KEY                        prints all tensors
//         BUILD/s3 s3://BUCKET/KEY --device cuda:0        loads them to the device
//         BUILD/s3 s3://BUCKET/KEY NAME                   reads one tensor
//         BUILD/s3 s3://BUCKET/KEY NAME 10:20             reads these rows of it, and no others
//
// KEY is that of a file, of an index (*.safetensors.index.json), or of a directory with model.safetensors or its index.
//
// PREFIX: the prefix of `make install`. TORCH: an unpacked libtorch, or the directory of the Python package torch.
// Debian has libcurl in libcurl4-openssl-dev.
//
// The bucket and the keys are those of AWS_ENDPOINT_URL (for other servers than Amazon's), AWS_REGION,
// AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN. Without a key, requests are not signed.

#include <getopt.h>

#include <charconv>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <optional>
#include <safetensors_torch.hpp>
#include <string>
#include <string_view>
#include <system_error>

#include "s3_object.hpp"

namespace {

constexpr const char* kUsage = "usage: s3 s3://BUCKET/KEY [--device DEVICE] [NAME [FIRST:END]]\n";

struct Arguments {
    std::string url, name;
    at::Device device = at::kCPU;
    std::optional<at::indexing::Slice> rows;
};

void print(const std::string& name, const at::Tensor& tensor) {
    std::cout << name << " " << tensor.scalar_type() << " " << tensor.sizes() << " on " << tensor.device() << ", sum "
              << tensor.to(at::kDouble).sum().item<double>() << "\n";
}

void run(const Arguments& arguments) {
    S3Filesystem s3;
    std::cout.precision(17);
    if (arguments.name.empty()) {
        for (const auto& [name, tensor] : safetensors_torch::load_sharded(s3, arguments.url, arguments.device)) {
            print(name, tensor);
        }
        return;
    }
    const safetensors_torch::Checkpoint file(s3, arguments.url, arguments.device);
    print(arguments.name,
          arguments.rows ? file.get_slice(arguments.name, {*arguments.rows}) : file.get_tensor(arguments.name));
}

// Parses FIRST:END.
std::optional<at::indexing::Slice> parse_rows(std::string_view text) {
    std::int64_t first = 0, end = 0;
    const char* const stop = text.data() + text.size();
    const auto left = std::from_chars(text.data(), stop, first);
    if (left.ec != std::errc() || left.ptr == stop || *left.ptr != ':') {
        return std::nullopt;
    }
    const auto right = std::from_chars(left.ptr + 1, stop, end);
    return right.ec == std::errc() && right.ptr == stop ? std::optional(at::indexing::Slice(first, end)) : std::nullopt;
}

std::optional<Arguments> parse(int argc, char** argv) {
    static const option options[] = {{"device", required_argument, nullptr, 'd'}, {}};
    Arguments arguments;
    for (int found; (found = getopt_long(argc, argv, "", options, nullptr)) != -1;) {
        if (found != 'd') {
            return std::nullopt;
        }
        arguments.device = at::Device(optarg);
    }
    const int count = argc - optind;
    if (count < 1 || count > 3) {
        return std::nullopt;
    }
    arguments.url = argv[optind];
    arguments.name = count > 1 ? argv[optind + 1] : "";
    if (count > 2 && !(arguments.rows = parse_rows(argv[optind + 2]))) {
        return std::nullopt;
    }
    return arguments;
}

}  // namespace

int main(int argc, char** argv) {
    try {
        const std::optional<Arguments> arguments = parse(argc, argv);
        if (!arguments) {
            std::fputs(kUsage, stderr);
            return 2;
        }
        run(*arguments);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "s3: %s\n", error.what());
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
