// Pretends to be compiled for another torch than the library: the first call must report it. A program of its own,
// because it redefines torch's version for the header.

#include <torch/version.h>

#undef TORCH_VERSION_MINOR
#define TORCH_VERSION_MINOR 99
#undef TORCH_VERSION
#define TORCH_VERSION "2.99.1"

#include <cstdio>
#include <safetensors_torch.hpp>
#include <string>

int main() {
    for (int call = 0; call < 2; ++call) {
        try {
            safetensors_torch::load_file("none");
        } catch (const c10::Error& error) {
            const std::string text = error.what();
            const bool names_both = text.find(" was built for torch 2.") != std::string::npos &&
                                    text.find("this program for torch 2.99.1") != std::string::npos;
            std::printf("%s\n", text.c_str());
            if (names_both) {
                continue;
            }
        }
        return 1;
    }
    return 0;
}
