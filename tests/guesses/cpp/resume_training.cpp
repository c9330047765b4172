#include <torch/torch.h>

#include <memory>
#include <safetensors_torch.hpp>
#include <safetensors_torch/optimizer.hpp>

int main() {
    auto net = std::make_shared<torch::nn::LinearImpl>(4, 2);
    std::unique_ptr<torch::optim::Optimizer> optimizer =
        std::make_unique<torch::optim::Adam>(net->parameters(), torch::optim::AdamOptions(1e-3));
    net->forward(torch::ones({1, 4})).sum().backward();
    optimizer->step();
    optimizer->param_groups()[0].options().set_lr(5e-4);
    safetensors_torch::save_model(net, "resume_model.safetensors");
    safetensors_torch::save_optimizer(*optimizer, net, "resume_optimizer.safetensors", {{"epoch", "1"}});

    torch::nn::Linear again(4, 2);
    torch::optim::Adam resumed(again->parameters(), 1e-3);
    safetensors_torch::load_model(again, "resume_model.safetensors");
    safetensors_torch::load_optimizer(resumed, again, "resume_optimizer.safetensors");
    TORCH_CHECK(resumed.param_groups()[0].options().get_lr() == 5e-4);
    TORCH_CHECK(resumed.state().size() == 2);
    net->zero_grad();
    for (const auto& parameters : {net->parameters(), again->parameters()}) {
        parameters[0].mutable_grad() = torch::ones({2, 4});
        parameters[1].mutable_grad() = torch::ones({2});
    }
    optimizer->step();
    resumed.step();
    TORCH_CHECK(again->weight.equal(net->weight) && again->bias.equal(net->bias));

    torch::optim::SGD sgd(again->parameters(), 0.1);
    try {
        safetensors_torch::load_optimizer(sgd, again, "resume_optimizer.safetensors");
        TORCH_CHECK(false, "the state of an Adam was loaded into an SGD");
    } catch (const safetensors_torch::Error& error) {
        const std::string text = error.what();
        TORCH_CHECK(text.find("has the state of Adam, not of SGD") != std::string::npos, text);
    }
}
