// Shows what is in a safetensors file, and saves a copy with every floating-point tensor scaled.
//
// Build:  cmake -S examples/cpp -B BUILD -DCMAKE_PREFIX_PATH=PREFIX -DLIBTORCH=TORCH && cmake --build BUILD
// Run:    BUILD/inspect FILE                    names, dtypes, shapes and sums
//         BUILD/inspect FILE COPY FACTOR        the same, then FILE times FACTOR in COPY
//
// PREFIX: where `make install PREFIX=` put the library. TORCH: an unpacked libtorch, or the folder of the Python
// package torch.

#include <cstdlib>
#include <iostream>
#include <safetensors_torch.hpp>
#include <string>

namespace {

// Two values packed in a byte: torch moves them, and has no arithmetic for them.
constexpr const char* kPacked = "F4";

void show(const safetensors_torch::File& file) {
    for (const auto& [key, value] : file.metadata()) {
        std::cout << "# " << key << " = " << value << '\n';
    }
    for (const std::string& name : file.offset_keys()) {
        std::cout << name << "  " << file.dtype(name) << "  " << at::IntArrayRef(file.shape(name));
        // The data are read here, and not before.
        const at::Tensor tensor = file.get_tensor(name);
        if (!tensor.is_complex() && file.dtype(name) != kPacked) {
            std::cout << "  sum " << tensor.to(at::kDouble).sum().item<double>();
        }
        std::cout << '\n';
    }
}

void save_scaled(const std::string& path, const std::string& copy, double factor) {
    const safetensors_torch::File file(path);
    safetensors_torch::Tensors scaled;
    for (const auto& entry : file.get_tensors()) {
        const at::Tensor& tensor = entry.value();
        const bool scales = tensor.is_floating_point() && file.dtype(entry.key()) != kPacked;
        scaled.insert(entry.key(), scales ? (tensor.to(at::kDouble) * factor).to(tensor.scalar_type()) : tensor);
    }
    safetensors_torch::save_file(scaled, copy, file.metadata());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2 && argc != 4) {
        std::cerr << "usage: inspect FILE [COPY FACTOR]\n";
        return EXIT_FAILURE;
    }
    try {
        show(safetensors_torch::File(argv[1]));
        if (argc == 4) {
            save_scaled(argv[1], argv[2], std::stod(argv[3]));
            std::cout << "wrote " << argv[2] << '\n';
        }
    } catch (const std::exception& error) {
        std::cerr << "inspect: " << error.what() << '\n';
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
