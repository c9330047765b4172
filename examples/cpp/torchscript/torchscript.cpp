// Loads weights into a scripted module, which itself reads safetensors files, and runs it.
//
// Build:  cmake -S examples/cpp/torchscript -B BUILD -DCMAKE_PREFIX_PATH=PREFIX -DLIBTORCH=TORCH &&
//         cmake --build BUILD
// Run:    python examples/cpp/torchscript/make_module.py DIRECTORY
//         BUILD/torchscript DIRECTORY
//
// PREFIX: the prefix of `make install`. TORCH: an unpacked libtorch, or the directory of the Python package torch.
//
// The module calls torch.ops.safetensors_torch.load_file and get_tensor, which torch::jit::load finds because the
// program links the library. The exit status is not 0 unless the result equals Python's to the last bit.

#include <ATen/Parallel.h>
#include <torch/script.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <safetensors_torch.hpp>
#include <stdexcept>
#include <string>

namespace {

void run(const std::filesystem::path& directory) {
    // The order of a summation may depend on the number of threads; make_module.py sets the same number.
    at::set_num_threads(1);
    const c10::InferenceMode inference;

    torch::jit::Module module = torch::jit::load(directory / "module.pt");
    safetensors_torch::load_model(module, directory / "model.safetensors");

    const safetensors_torch::Tensors expected = safetensors_torch::load_file(directory / "expected.safetensors");
    for (const char* name : {"first", "second"}) {
        const std::string adapter = directory / (std::string("adapter-") + name + ".safetensors");
        const at::Tensor y = module.forward({expected.at("x"), adapter}).toTensor();
        if (!at::equal(y, expected.at(name))) {
            throw std::runtime_error(adapter + ": the result differs from Python's by up to " +
                                     std::to_string((y - expected.at(name)).abs().max().item<double>()));
        }
        std::printf("%s: equal to Python, mean %.6f\n", name, y.mean().item<double>());
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
        return 2;
    }
    try {
        run(argv[1]);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "torchscript: %s\n", error.what());
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
