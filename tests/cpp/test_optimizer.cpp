// save_optimizer and load_optimizer: resumed trainings of each optimizer, and the names in the file.

#include <torch/nn.h>
#include <torch/optim.h>

#include <memory>
#include <safetensors_torch/optimizer.hpp>

#include "support.h"

using namespace support;
using Names = std::vector<std::string>;
namespace optim = torch::optim;

namespace {

// A convolution whose weight has the strides of its memory format, a tied weight, and a parameter without a gradient.
struct TrainedImpl : torch::nn::Module {
    torch::nn::Conv2d conv = register_module("conv", torch::nn::Conv2d(2, 4, 3));
    torch::nn::Linear linear = register_module("linear", torch::nn::Linear(4, 4));
    at::Tensor tied = register_parameter("tied", linear->weight);
    at::Tensor idle = register_parameter("idle", at::rand({3}));

    at::Tensor forward(const at::Tensor& x) { return at::matmul(at::tanh(linear(conv(x).mean({2, 3}))), tied); }
};
TORCH_MODULE(Trained);

Trained trained() {
    at::manual_seed(11);
    Trained module;
    module->conv->weight.set_data(module->conv->weight.contiguous(at::MemoryFormat::ChannelsLast));
    return module;
}

// A module and its optimizer, with one group for the convolution and one for the other parameters.
template <typename Optimizer>
struct Training {
    Trained module = trained();
    Optimizer optimizer;

    template <typename Options>
    Training(const Options& of_first, const Options& of_second) : optimizer(groups(of_first, of_second), of_second) {}

    void train(int steps) {
        for (int step = 0; step < steps; ++step) {
            const at::Tensor x = at::arange(2 * 2 * 25, at::kFloat).reshape({2, 2, 5, 5}).sin();
            optimizer.zero_grad();
            at::mse_loss(module->forward(x), at::ones({2, 4})).backward();
            optimizer.step();
        }
    }

    // The bytes of a file of the optimizer's state.
    std::string bytes() const {
        const TempDir dir;
        st::save_optimizer(optimizer, module, dir.file("o"));
        return read_file(dir.file("o"));
    }

  private:
    template <typename Options>
    std::vector<optim::OptimizerParamGroup> groups(const Options& of_first, const Options& of_second) const {
        std::vector<optim::OptimizerParamGroup> all;
        all.emplace_back(module->conv->parameters(), std::make_unique<Options>(of_first));
        all.emplace_back(std::vector<at::Tensor>{module->linear->weight, module->linear->bias, module->idle},
                         std::make_unique<Options>(of_second));
        return all;
    }
};

// Checks that a training of seven steps equals one of three steps that an optimizer with other options resumes.
template <typename Optimizer, typename Options>
void check_resumed(const Options& of_first, const Options& of_second, const Options& other) {
    const TempDir dir;
    Training<Optimizer> whole(of_first, of_second);
    whole.train(3);
    st::save_model(whole.module, dir.file("model"));
    st::save_optimizer(whole.optimizer, whole.module, dir.file("optimizer"));
    const std::string saved = whole.bytes();

    Training<Optimizer> resumed(other, other);
    resumed.train(1);
    st::load_model(resumed.module, dir.file("model"));
    EXPECT(resumed.bytes() != saved);
    const st::LoadResult result = st::load_optimizer(resumed.optimizer, resumed.module, dir.file("optimizer"));
    EXPECT(result.missing.empty() && result.unexpected.empty());
    EXPECT(resumed.bytes() == saved);
    EXPECT_EQ(resumed.optimizer.state().size(), whole.optimizer.state().size());

    whole.train(4);
    resumed.train(4);
    EXPECT(resumed.bytes() == whole.bytes());
    EXPECT(at::equal(whole.module->conv->weight, resumed.module->conv->weight));
    EXPECT(at::equal(whole.module->linear->bias, resumed.module->linear->bias));
    EXPECT(at::equal(whole.module->tied, resumed.module->tied));
}

}  // namespace

TEST(optimizer_adam_resumes) {
    check_resumed<optim::Adam>(optim::AdamOptions(0.01).betas({0.8, 0.95}).amsgrad(true),
                               optim::AdamOptions(0.02).eps(1e-7).weight_decay(0.1),
                               optim::AdamOptions(0.5).weight_decay(0.7));
}

TEST(optimizer_adamw_resumes) {
    check_resumed<optim::AdamW>(optim::AdamWOptions(0.01).betas({0.8, 0.95}).weight_decay(0.3),
                                optim::AdamWOptions(0.02).eps(1e-7).amsgrad(true), optim::AdamWOptions(0.5));
}

TEST(optimizer_sgd_resumes) {
    check_resumed<optim::SGD>(optim::SGDOptions(0.1).momentum(0.9).nesterov(true),
                              optim::SGDOptions(0.2).weight_decay(0.01),
                              optim::SGDOptions(0.3).momentum(0.5).dampening(0.1));
    check_resumed<optim::SGD>(optim::SGDOptions(0.1).momentum(0.9).dampening(0.2), optim::SGDOptions(0.2).momentum(0.1),
                              optim::SGDOptions(0.3));
}

TEST(optimizer_rmsprop_resumes) {
    check_resumed<optim::RMSprop>(optim::RMSpropOptions(0.01).centered(true).momentum(0.8).alpha(0.9),
                                  optim::RMSpropOptions(0.02).eps(1e-6).weight_decay(0.1),
                                  optim::RMSpropOptions(0.5).momentum(0.1));
}

TEST(optimizer_adagrad_resumes) {
    check_resumed<optim::Adagrad>(optim::AdagradOptions(0.1).lr_decay(0.01).initial_accumulator_value(0.5),
                                  optim::AdagradOptions(0.2).eps(1e-6).weight_decay(0.1), optim::AdagradOptions(0.5));
}

TEST(optimizer_names_and_dtypes) {
    const TempDir dir;
    Training<optim::AdamW> training(optim::AdamWOptions(0.1).betas({0.75, 0.5}), optim::AdamWOptions(0.3));
    training.train(2);
    st::save_optimizer(training.optimizer, training.module, dir.file("o"), {{"step", "2"}});
    const st::File file(dir.file("o"));
    EXPECT(file.metadata() == (st::Metadata{{"optimizer", "AdamW"}, {"step", "2"}}));
    Names expected;
    // The tied weight has the first of its names; `idle` has no state.
    for (const std::string name : {"conv.bias", "conv.weight", "idle", "linear.bias", "tied"}) {
        for (const std::string option : {"amsgrad", "betas", "eps", "lr", "weight_decay"}) {
            expected.push_back("param_groups." + name + "." + option);
        }
    }
    for (const std::string name : {"conv.bias", "conv.weight", "linear.bias", "tied"}) {
        for (const std::string part : {"exp_avg", "exp_avg_sq", "step"}) {
            expected.push_back("state." + name + "." + part);
        }
    }
    EXPECT_EQ(file.keys(), expected);
    EXPECT_EQ(file.get_tensor("param_groups.conv.bias.lr").item<double>(), 0.1);
    EXPECT_EQ(file.get_tensor("param_groups.idle.lr").item<double>(), 0.3);
    EXPECT(identical(file.get_tensor("param_groups.conv.weight.betas"), at::tensor({0.75, 0.5}, at::kDouble)));
    EXPECT(identical(file.get_tensor("param_groups.tied.amsgrad"), at::scalar_tensor(false, at::kBool)));
    EXPECT(identical(file.get_tensor("state.tied.step"), at::scalar_tensor(2, at::kFloat)));
    EXPECT_EQ(file.get_tensor("state.conv.weight.exp_avg").sizes(), training.module->conv->weight.sizes());
}

TEST(optimizer_state_has_the_device_strides_and_dtype_of_its_parameter) {
    const TempDir dir;
    Training<optim::Adam> training(optim::AdamOptions(0.1), optim::AdamOptions(0.1));
    training.train(1);
    st::save_optimizer(training.optimizer, training.module, dir.file("o"));
    Training<optim::Adam> other(optim::AdamOptions(0.1), optim::AdamOptions(0.1));
    other.module->to(at::hasCUDA() ? at::kCUDA : at::kCPU);
    other.module->linear->bias.set_data(other.module->linear->bias.to(at::kDouble));
    st::load_optimizer(other.optimizer, other.module, dir.file("o"));
    const auto state_of = [](const Training<optim::Adam>& of, const at::Tensor& parameter) {
        return static_cast<const optim::AdamParamState&>(*of.optimizer.state().at(parameter.unsafeGetTensorImpl()));
    };
    const at::Tensor average = state_of(other, other.module->conv->weight).exp_avg();
    EXPECT(!average.is_contiguous() && average.is_contiguous(at::MemoryFormat::ChannelsLast));
    EXPECT_EQ(average.device(), other.module->conv->weight.device());
    EXPECT(at::equal(average.cpu(), state_of(training, training.module->conv->weight).exp_avg()));
    const at::Tensor wide = state_of(other, other.module->linear->bias).exp_avg_sq();
    EXPECT_EQ(wide.scalar_type(), at::kDouble);
    EXPECT(at::equal(wide.cpu(), state_of(training, training.module->linear->bias).exp_avg_sq().to(at::kDouble)));
}

TEST(optimizer_without_a_step) {
    const TempDir dir;
    Training<optim::Adam> fresh(optim::AdamOptions(0.1), optim::AdamOptions(0.2));
    st::save_optimizer(fresh.optimizer, fresh.module, dir.file("o"));
    Training<optim::Adam> used(optim::AdamOptions(0.3), optim::AdamOptions(0.4));
    used.train(2);
    st::load_optimizer(used.optimizer, used.module, dir.file("o"));
    EXPECT(used.optimizer.state().empty());
    EXPECT(used.bytes() == fresh.bytes());
}

TEST(optimizer_state_under_another_name_of_a_tied_parameter) {
    const TempDir dir;
    Training<optim::Adam> source(optim::AdamOptions(0.1), optim::AdamOptions(0.1));
    source.train(2);
    st::save_optimizer(source.optimizer, source.module, dir.file("o"));
    st::Tensors tensors;
    for (const auto& [name, tensor] : st::load_file(dir.file("o"))) {
        const auto found = name.find(".tied.");
        tensors.insert(found == std::string::npos ? name : std::string(name).replace(found, 6, ".linear.weight."),
                       tensor);
    }
    st::save_file(tensors, dir.file("renamed"));
    Training<optim::Adam> target(optim::AdamOptions(0.1), optim::AdamOptions(0.1));
    st::load_optimizer(target.optimizer, target.module, dir.file("renamed"));
    EXPECT(target.bytes() == source.bytes());
}
