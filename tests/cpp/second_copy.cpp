// Loads a second copy of the library, such as the layer of the Python package: it must use the operators of the first.
// With an argument, pretends that the linked library has another version than the operators: the first call must
// report it.

#define sft_get_version linked_version
#include <safetensors_torch.hpp>
#undef sft_get_version

#include <dlfcn.h>
#include <stdlib.h>

#include <cstdio>
#include <filesystem>
#include <string>

extern "C" const char* sft_get_version(void);

namespace {

bool is_other_version = false;

// Returns the path of a copy of the library.
std::string copy_library(const std::filesystem::path& directory) {
    Dl_info info;
    if (dladdr(dlsym(RTLD_DEFAULT, "sft_get_version"), &info) == 0) {
        return "";
    }
    std::filesystem::copy_file(info.dli_fname, directory / "copy.so");
    return (directory / "copy.so").string();
}

bool is_second_copy(const std::string& path) {
    void* copy = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    return copy != nullptr && dlsym(copy, "sft_get_version") != dlsym(RTLD_DEFAULT, "sft_get_version");
}

bool works() {
    safetensors_torch::Tensors tensors;
    tensors.insert("x", at::ones({3}));
    try {
        const at::Tensor loaded = safetensors_torch::load(safetensors_torch::save(tensors)).at("x");
        return !is_other_version && loaded.equal(tensors.at("x"));
    } catch (const c10::Error& error) {
        const std::string text = error.what();
        std::printf("%s\n", text.c_str());
        return is_other_version && text.find("linked to libsafetensors_torch 99.0.0") != std::string::npos &&
               text.find(std::string("version ") + sft_get_version()) != std::string::npos;
    }
}

}  // namespace

extern "C" const char* linked_version(void) { return is_other_version ? "99.0.0" : sft_get_version(); }

int main(int argc, char**) {
    is_other_version = argc > 1;
    std::string directory = (std::filesystem::temp_directory_path() / "safetensors_torch_XXXXXX").string();
    if (mkdtemp(directory.data()) == nullptr) {
        return 2;
    }
    const bool is_well = is_second_copy(copy_library(directory)) && works() && works();
    std::filesystem::remove_all(directory);
    return is_well ? 0 : 1;
}
