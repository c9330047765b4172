#include <torch/torch.h>

#include <safetensors_torch.hpp>

namespace st = safetensors_torch;

int main() {
    torch::nn::Sequential model(torch::nn::Linear(4, 8), torch::nn::ReLU(), torch::nn::Linear(8, 2));
    st::save_model(model, "strict.safetensors", {{"epoch", "1"}});
    auto tensors = st::load_file("strict.safetensors");
    tensors.erase("0.bias");
    st::save_file(tensors, "strict.safetensors");

    st::LoadModelOptions options;
    options.strict = false;
    auto result = st::load_model(model, "strict.safetensors", options);
    TORCH_CHECK(result.missing == std::vector<std::string>{"0.bias"});
    TORCH_CHECK(result.unexpected.empty());
}
