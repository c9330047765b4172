// Trains a small module and saves it with the state of its optimizer. Python continues the training from the files, and
// C++ from the files of Python.
//
// Build:  cmake -S examples/cpp/finetune -B BUILD -DCMAKE_PREFIX_PATH=PREFIX -DLIBTORCH=TORCH && cmake --build BUILD
// Run:    BUILD/finetune DIRECTORY                             creates DIRECTORY/data, model and optimizer.safetensors
//         python examples/cpp/finetune/finetune.py DIRECTORY   continues in Python
//         BUILD/finetune DIRECTORY                             continues in C++
//
// PREFIX: the prefix of `make install`. TORCH: an unpacked libtorch, or the directory of the Python package torch.
//
// An argument after DIRECTORY is the number of steps. Two runs of 100 steps write exactly the files of one run of 200.
// Python's AdamW rounds differently, so its steps have other last digits than those of C++.
//
// Each program checks that the loaded model has exactly the loss that the other one recorded.

#include <ATen/Parallel.h>
#include <torch/nn/modules/batchnorm.h>
#include <torch/nn/modules/linear.h>
#include <torch/optim/adamw.h>

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <safetensors_torch.hpp>
#include <safetensors_torch/optimizer.hpp>
#include <stdexcept>
#include <string>

namespace {

// Parameters and buffers have the same names as in finetune.py: the file identifies them by name.
struct Net : torch::nn::Module {
    torch::nn::Linear hidden =
        register_module("hidden", torch::nn::Linear(torch::nn::LinearOptions(2, 64).bias(false)));
    torch::nn::BatchNorm1d norm = register_module("norm", torch::nn::BatchNorm1d(64));
    torch::nn::Linear output = register_module("output", torch::nn::Linear(64, 1));

    at::Tensor forward(const at::Tensor& x) { return output(at::tanh(norm(hidden(x)))); }
};

double evaluate(Net& net, const at::Tensor& x, const at::Tensor& y) {
    const c10::NoGradGuard no_grad;
    net.eval();
    return at::mse_loss(net.forward(x), y).item<double>();
}

void train(Net& net, torch::optim::Optimizer& optimizer, const at::Tensor& x, const at::Tensor& y, int steps) {
    net.train();
    for (int step = 0; step < steps; ++step) {
        optimizer.zero_grad();
        at::mse_loss(net.forward(x), y).backward();
        optimizer.step();
    }
}

// Prints enough digits to restore the same double.
std::string exact(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.17g", value);
    return text;
}

void run(const std::filesystem::path& directory, int steps) {
    // The order of a summation may depend on the number of threads; finetune.py sets the same number.
    at::set_num_threads(1);
    torch::manual_seed(2019);
    const std::filesystem::path data_path = directory / "data.safetensors";
    const std::filesystem::path model_path = directory / "model.safetensors";
    const std::filesystem::path optimizer_path = directory / "optimizer.safetensors";
    Net net;
    torch::optim::AdamW optimizer(net.parameters(), torch::optim::AdamWOptions(0.005));
    const bool is_resumed = std::filesystem::exists(model_path);
    if (is_resumed) {
        safetensors_torch::load_model(net, model_path);
        safetensors_torch::load_optimizer(optimizer, net, optimizer_path);
    } else {
        std::filesystem::create_directories(directory);
        const at::Tensor x = at::randn({256, 2});
        safetensors_torch::save_file({{"x", x}, {"y", at::sin(2 * x).sum(1, /*keepdim=*/true)}}, data_path);
    }
    const safetensors_torch::Tensors data = safetensors_torch::load_file(data_path);
    const at::Tensor x = data["x"], y = data["y"];

    const double before = evaluate(net, x, y);
    int64_t step = 0;
    if (is_resumed) {
        const auto metadata = safetensors_torch::File(model_path).metadata();
        // The process may have been killed between the saves of the two files.
        if (metadata.at("step") != safetensors_torch::File(optimizer_path).metadata().at("step")) {
            throw std::runtime_error(optimizer_path.string() + ": it is of another step than " + model_path.string());
        }
        if (exact(before) != exact(std::stod(metadata.at("loss")))) {
            throw std::runtime_error(model_path.string() + ": its loss was " + metadata.at("loss") + ", not " +
                                     exact(before));
        }
        step = std::stoll(metadata.at("step"));
    }
    train(net, optimizer, x, y, steps);
    const double after = evaluate(net, x, y);
    std::printf("C++     %d steps: loss %.6f -> %.6f\n", steps, before, after);
    const std::string total = std::to_string(step + steps);
    safetensors_torch::save_optimizer(optimizer, net, optimizer_path, {{"step", total}});
    safetensors_torch::save_model(net, model_path, {{"loss", exact(after)}, {"step", total}});
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2 && argc != 3) {
        std::fprintf(stderr, "usage: %s DIRECTORY [STEPS]\n", argv[0]);
        return 2;
    }
    try {
        run(argv[1], argc == 3 ? std::stoi(argv[2]) : 200);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "finetune: %s\n", error.what());
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
