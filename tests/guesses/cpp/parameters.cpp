#include <torch/torch.h>

#include <safetensors_torch.hpp>

struct Net : torch::nn::Module {
    Net() { fc = register_module("fc", torch::nn::Linear(4, 2)); }
    torch::nn::Linear fc{nullptr};
};

int main() {
    auto model = std::make_shared<Net>();
    safetensors_torch::save_file(model->named_parameters(), "parameters.safetensors");
    auto weights = safetensors_torch::load_file("parameters.safetensors");
    torch::NoGradGuard no_grad;
    for (auto& p : model->named_parameters()) {
        p.value().zero_();
        p.value().copy_(weights[p.key()]);
    }
    TORCH_CHECK(model->fc->weight.equal(weights["fc.weight"]));
    safetensors_torch::load_model(model, "parameters.safetensors");
    safetensors_torch::load_model(*model, std::filesystem::path("parameters.safetensors"));
    safetensors_torch::save_model(model, "net.safetensors");
    safetensors_torch::save_sharded(model->named_parameters(), "net_shards");
    TORCH_CHECK(safetensors_torch::load_sharded("net_shards").size() == 2);
}
