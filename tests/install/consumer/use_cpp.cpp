// Writes files, from C++ and from C, reads them back and compares:  use_cpp FILE
#include <torch/version.h>

#include <cstdio>
#include <iostream>
#include <safetensors_torch.hpp>
#include <string>

#if SFT_VERSION_NUMBER < 100
#error "the header has no version that the preprocessor can compare"
#endif

namespace {

int failures = 0;

void check(bool holds, const char* what) {
    if (!holds) {
        std::cerr << "failed: " << what << "\n";
        ++failures;
    }
}

}  // namespace

int main(int argc, char** argv) {
    const std::string path = argc > 1 ? argv[1] : "use_cpp.safetensors";
    const at::Tensor weight = at::arange(12, at::kFloat).view({3, 4});
    safetensors_torch::Tensors tensors;
    tensors.insert("weight", weight);
    tensors.insert("bias", at::full({5}, 7, at::kLong));
    safetensors_torch::save_file(tensors, path, {{"format", "pt"}});

    const safetensors_torch::Tensors loaded = safetensors_torch::load_file(path);
    check(loaded.size() == 2, "two tensors are loaded");
    check(at::equal(loaded.at("weight"), weight), "weight is unchanged");
    check(loaded.at("bias").dtype() == at::kLong && at::equal(loaded.at("bias"), tensors.at("bias")),
          "bias is unchanged");
    const safetensors_torch::File file(path);
    check(at::equal(file.get_slice("weight", {1}), weight[1]), "a slice is a row");
    check(file.metadata().at("format") == "pt", "metadata is kept");
    try {
        safetensors_torch::load_file("/nowhere/model.safetensors");
        check(false, "a missing file is an error");
    } catch (const c10::Error& error) {
        check(std::string(error.what()).find("/nowhere/model.safetensors") != std::string::npos,
              "the error names the file");
    }

    // C functions, from the same library.
    sft_file* handle = nullptr;
    std::size_t count = 0;
    check(
        sft_file_open(path.c_str(), nullptr, &handle) == SFT_OK && sft_file_get_tensor_count(handle, &count) == SFT_OK,
        "C opens what C++ wrote");
    check(count == 2, "C counts two tensors");
    sft_file_free(handle);

    // The library was built for the torch of this program.
    const auto [version, torch] = c10::Dispatcher::singleton()
                                      .findSchemaOrThrow("safetensors_torch::_built_for", "")
                                      .typed<std::tuple<std::string, std::string>()>()
                                      .call();
    check(version == sft_get_version() && torch == TORCH_VERSION, "the library was built for this torch");
    std::cout << "C++: " << (failures == 0 ? "all well" : "failed") << ", library " << sft_get_version() << ", torch "
              << torch << "\n";
    return failures == 0 ? 0 : 1;
}
