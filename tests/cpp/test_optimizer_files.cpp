// load_optimizer: files of several kinds and sources, and failed loads, which must not change the optimizer.

#include <torch/nn.h>
#include <torch/optim.h>
#include <torch/script.h>

#include <cstring>
#include <limits>
#include <memory>
#include <safetensors_torch/optimizer.hpp>
#include <stdexcept>

#include "saved_adam.h"
#include "support.h"

using namespace support;
using Names = std::vector<std::string>;
namespace optim = torch::optim;

namespace {

// One file that the program reads by its own means.
class StateInMemory : public st::Source {
  public:
    explicit StateInMemory(std::string bytes) : bytes_(std::move(bytes)) {}
    std::uint64_t length() override { return bytes_.size(); }
    void read(std::uint64_t offset, const sft_buffer* buffers, std::size_t count) override {
        for (std::size_t i = 0; i < count; ++i) {
            std::memcpy(buffers[i].data, bytes_.data() + offset, buffers[i].nbytes);
            offset += buffers[i].nbytes;
        }
    }

  private:
    std::string bytes_;
};

class StateFilesystem : public st::Filesystem {
  public:
    explicit StateFilesystem(std::string bytes) : bytes_(std::move(bytes)) {}
    std::shared_ptr<st::Source> open(const std::string&) override { return std::make_shared<StateInMemory>(bytes_); }

  private:
    std::string bytes_;
};

}  // namespace

// An Adagrad has a state before its first step, and cannot step without it.
TEST(optimizer_adagrad_needs_its_state) {
    const TempDir dir;
    torch::nn::Linear layer(2, 3);
    optim::Adagrad optimizer(layer->parameters());
    st::save_optimizer(optimizer, layer, dir.file("o"));
    st::Tensors tensors = st::load_file(dir.file("o"));
    EXPECT_EQ(tensors.erase("state.bias.step") + tensors.erase("state.bias.sum"), 2U);
    st::save_file(tensors, dir.file("o"));
    EXPECT_HAS(ERROR_OF(st::load_optimizer(optimizer, layer, dir.file("o"))),
               "tensor \"state.bias.step\": does not exist, and Adagrad needs it; ");
    EXPECT_EQ(optimizer.state().size(), 2U);
}

TEST(optimizer_options_are_changed_in_place) {
    SavedAdam saved;
    auto& options = static_cast<optim::AdamOptions&>(saved.optimizer.param_groups()[0].options());
    options.lr(0.5);
    st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("o"));
    EXPECT_EQ(options.lr(), 0.25);
}

TEST(optimizer_steps_are_exact) {
    SavedAdam saved;
    const auto reload = [&](const at::Tensor& step) {
        st::save_file(saved.with("state.weight.step", step), saved.dir.file("changed"));
        st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("changed"));
        st::save_optimizer(saved.optimizer, saved.layer, saved.dir.file("changed"));
        st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("changed"));
        return saved.state(saved.layer->weight).step();
    };
    for (const int64_t step : {int64_t{0}, int64_t{1000}, int64_t{1} << 24, (int64_t{1} << 24) + 1, int64_t{1} << 53}) {
        EXPECT_EQ(reload(at::scalar_tensor(step, at::kLong)), step);
    }
    EXPECT_EQ(reload(at::scalar_tensor(7, at::kFloat)), 7);
    EXPECT_EQ(reload(at::scalar_tensor(16777217.0, at::kDouble)), 16777217);
    for (const double step : {-1.0, 0.5, 1e300}) {
        st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("o"));
        EXPECT_HAS(saved.error(saved.with("state.weight.step", at::scalar_tensor(step, at::kDouble))),
                   "tensor \"state.weight.step\": its value is ");
    }
}

TEST(optimizer_options_of_python) {
    SavedAdam saved;
    const std::string prefix = "param_groups.weight.";
    st::Tensors tensors = saved.tensors;
    tensors.insert(prefix + "foreach", at::scalar_tensor(true, at::kBool));
    tensors.insert(prefix + "initial_lr", at::scalar_tensor(3.0, at::kDouble));
    tensors.insert(prefix + "maximize", at::scalar_tensor(false, at::kBool));
    tensors.insert(prefix + "decoupled_weight_decay", at::scalar_tensor(false, at::kBool));
    tensors.insert_or_assign(prefix + "weight_decay", at::scalar_tensor(0, at::kLong));
    st::save_file(tensors, saved.dir.file("python"));
    const auto result = st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("python"));
    EXPECT(result.missing.empty() && result.unexpected.empty());

    const at::Tensor yes = at::scalar_tensor(true, at::kBool);
    EXPECT_HAS(saved.error(saved.with(prefix + "maximize", yes)),
               "tensor \"param_groups.weight.maximize\": is true, and C++ only minimizes");
    EXPECT_HAS(saved.error(saved.with(prefix + "decoupled_weight_decay", yes)), "has the state of AdamW, not of Adam");
}

TEST(optimizer_with_a_parameter_twice_in_a_group) {
    const TempDir dir;
    torch::nn::Linear layer(2, 2);
    optim::SGD optimizer({layer->weight, layer->weight}, optim::SGDOptions(0.1));
    st::save_optimizer(optimizer, layer, dir.file("o"));
    st::load_optimizer(optimizer, layer, dir.file("o"));
    EXPECT_EQ(st::File(dir.file("o")).size(), 5U);
}

TEST(optimizer_with_missing_and_unexpected_parameters) {
    const TempDir dir;
    torch::nn::Linear source(2, 3);
    st::save_optimizer(optim::SGD({source->weight}, optim::SGDOptions(0.5)), source, dir.file("weight"));
    optim::SGD optimizer({source->bias}, optim::SGDOptions(0.25));
    const std::string text = ERROR_OF(st::load_optimizer(optimizer, source, dir.file("weight")));
    EXPECT_EQ(text, dir.file("weight") +
                        ": its parameters are not those of the optimizer"
                        "\n    missing: \"bias\""
                        "\n    unexpected: \"weight\""
                        "\npass the optimizer and the module that were saved, or set `strict` to false");
    const st::LoadResult result = st::load_optimizer(optimizer, source, dir.file("weight"), {/*strict=*/false});
    EXPECT_EQ(result.missing, (Names{"bias"}));
    EXPECT_EQ(result.unexpected, (Names{"weight"}));
    EXPECT_EQ(optimizer.param_groups()[0].options().get_lr(), 0.25);

    optim::SGD both(source->parameters(), optim::SGDOptions(0.25).momentum(0.5));
    source->forward(at::ones({1, 2})).sum().backward();
    both.step();
    EXPECT_EQ(st::load_optimizer(both, source, dir.file("weight"), {/*strict=*/false}).missing, (Names{"bias"}));
    // The weight had no state in the checkpoint; the bias keeps its own.
    EXPECT_EQ(both.state().count(source->weight.unsafeGetTensorImpl()), 0U);
    EXPECT_EQ(both.state().count(source->bias.unsafeGetTensorImpl()), 1U);
    EXPECT_EQ(both.param_groups()[0].options().get_lr(), 0.5);
}

TEST(optimizer_names_with_a_prefix_and_renamed) {
    SavedAdam saved;
    st::SaveOptimizerOptions options;
    options.prefix = "encoder.";
    options.rename = [](const std::string& name) { return name == "weight" ? "kernel" : name; };
    st::save_optimizer(saved.optimizer, saved.layer, saved.dir.file("renamed"), options);
    st::Tensors tensors = st::load_file(saved.dir.file("renamed"));
    EXPECT(tensors.contains("state.encoder.kernel.exp_avg") && tensors.contains("param_groups.encoder.bias.lr"));
    tensors.insert("param_groups.decoder.kernel.lr", at::zeros({}));
    tensors.insert("random_state", at::zeros({}));
    st::save_file(tensors, saved.dir.file("larger"));

    optim::Adam optimizer(saved.layer->parameters(), optim::AdamOptions(1));
    st::LoadModelOptions load;
    load.prefix = options.prefix;
    load.rename = options.rename;
    st::load_optimizer(optimizer, saved.layer, saved.dir.file("larger"), load);
    st::save_optimizer(optimizer, saved.layer, saved.dir.file("again"));
    EXPECT(read_file(saved.dir.file("again")) == read_file(saved.dir.file("o")));
}

TEST(optimizer_in_several_files) {
    SavedAdam saved;
    st::SaveOptimizerOptions options;
    options.max_shard_size = 64;
    st::save_optimizer(saved.optimizer, saved.layer, saved.dir.file("sharded"), {}, options);
    EXPECT(std::filesystem::exists(saved.dir.file("sharded/optimizer.safetensors.index.json")));
    optim::Adam optimizer(saved.layer->parameters(), optim::AdamOptions(1));
    int calls = 0;
    st::LoadModelOptions load;
    load.progress = [&](int64_t, int64_t) { ++calls; };
    st::load_optimizer(optimizer, saved.layer, saved.dir.file("sharded"), load);
    EXPECT(calls > 0);
    st::save_optimizer(optimizer, saved.layer, saved.dir.file("again"));
    EXPECT(read_file(saved.dir.file("again")) == read_file(saved.dir.file("o")));
}

TEST(optimizer_from_a_filesystem_of_the_program) {
    SavedAdam saved;
    StateFilesystem filesystem(read_file(saved.dir.file("o")));
    optim::Adam optimizer(saved.layer->parameters(), optim::AdamOptions(1));
    st::load_optimizer(optimizer, saved.layer, filesystem, "s3://bucket/optimizer.safetensors");
    st::save_optimizer(optimizer, saved.layer, saved.dir.file("again"));
    EXPECT(read_file(saved.dir.file("again")) == read_file(saved.dir.file("o")));

    optim::SGD other(saved.layer->parameters(), optim::SGDOptions(1));
    EXPECT_EQ(
        ERROR_OF(st::load_optimizer(other, saved.layer, filesystem, "s3://bucket/optimizer.safetensors")),
        "s3://bucket/optimizer.safetensors: has the state of Adam, not of SGD; make the optimizer that was saved");
}

TEST(optimizer_of_a_torchscript_module) {
    const TempDir dir;
    torch::jit::Module child("Child"), module("Net");
    child.register_parameter("weight", at::ones({2}).requires_grad_(), /*is_buffer=*/false);
    module.register_module("child", child);
    const at::Tensor weight = child.attr("weight").toTensor();
    optim::SGD optimizer({weight}, optim::SGDOptions(0.5).momentum(0.5));
    weight.sum().backward();
    optimizer.step();
    st::save_optimizer(optimizer, module, dir.file("o"));
    EXPECT(st::File(dir.file("o")).contains("state.child.weight.momentum_buffer"));
    optim::SGD other({weight}, optim::SGDOptions(1));
    st::load_optimizer(other, module, dir.file("o"));
    EXPECT_EQ(other.state().size(), 1U);
    EXPECT_EQ(other.param_groups()[0].options().get_lr(), 0.5);
}

TEST(optimizer_of_another_kind) {
    SavedAdam saved;
    EXPECT_HAS(saved.error(saved.tensors, {{"optimizer", "Lion"}}), "has the state of Lion, not of Adam; ");
    torch::nn::Linear other(2, 3);
    const auto check = [&](const optim::Optimizer& optimizer, const std::string& name) {
        st::save_optimizer(optimizer, other, saved.dir.file("other"));
        const st::Tensors tensors = st::load_file(saved.dir.file("other"));
        // By the metadata, and by the options.
        EXPECT_HAS(saved.error(tensors, {{"optimizer", name}}), "has the state of " + name + ", not of Adam; ");
        EXPECT_HAS(saved.error(tensors), "has the state of " + name + ", not of Adam; ");
    };
    check(optim::SGD(other->parameters(), optim::SGDOptions(1)), "SGD");
    check(optim::RMSprop(other->parameters()), "RMSprop");
    check(optim::Adagrad(other->parameters()), "Adagrad");

    optim::AdamW adamw(saved.layer->parameters());
    EXPECT_HAS(ERROR_OF(st::load_optimizer(adamw, saved.layer, saved.dir.file("o"))),
               "has the state of Adam, not of AdamW; ");
}

TEST(optimizer_that_cannot_be_saved) {
    const TempDir dir;
    torch::nn::Linear layer(2, 3);
    optim::LBFGS lbfgs(layer->parameters());
    for (const std::string& text : {ERROR_OF(st::save_optimizer(lbfgs, layer, dir.file("o"))),
                                    ERROR_OF(st::load_optimizer(lbfgs, layer, dir.file("o")))}) {
        EXPECT_EQ(text,
                  "optimizer torch::optim::LBFGS: its state cannot be saved by the names of parameters; that of these "
                  "can: Adagrad, Adam, AdamW, RMSprop, SGD");
    }
    std::vector<optim::OptimizerParamGroup> groups;
    groups.emplace_back(layer->parameters(), std::make_unique<optim::AdamOptions>(0.1));
    const optim::AdamW mixed(groups, optim::AdamWOptions(0.1));
    EXPECT_HAS(ERROR_OF(st::save_optimizer(mixed, layer, dir.file("o"))),
               "options, or a parameter has a state, of another optimizer's class; ");
    EXPECT_EQ(dir.count(), 0U);
}

TEST(optimizer_with_parameters_that_do_not_fit_the_module) {
    const TempDir dir;
    torch::nn::Linear layer(2, 3), other(4, 5);
    optim::SGD optimizer(layer->parameters(), optim::SGDOptions(1));
    const std::string text =
        "parameter 0 of group 0 of SGD, of shape [3, 2]: torch::nn::LinearImpl does not have it; pass the module whose "
        "parameters the optimizer has";
    EXPECT_EQ(ERROR_OF(st::save_optimizer(optimizer, other, dir.file("o"))), text);
    st::save_optimizer(optimizer, layer, dir.file("o"));
    EXPECT_EQ(ERROR_OF(st::load_optimizer(optimizer, other, dir.file("o"))), text);

    std::vector<optim::OptimizerParamGroup> groups;
    groups.emplace_back(layer->parameters());
    groups.emplace_back(std::vector<at::Tensor>{layer->bias});
    const optim::SGD twice(groups, optim::SGDOptions(1));
    EXPECT_EQ(
        ERROR_OF(st::save_optimizer(twice, layer, dir.file("o"))),
        "parameter 0 of group 1 of SGD, of shape [3]: group 0 has it too, as \"bias\"; give each parameter to one "
        "group");
}

TEST(optimizer_is_not_changed_by_a_file_that_does_not_fit) {
    SavedAdam saved;
    const auto wrong = [&](const std::string& name, const at::Tensor& tensor) {
        return saved.error(saved.with(name, tensor));
    };
    EXPECT_HAS(wrong("state.weight.exp_avg", at::zeros({2, 3})),
               "tensor \"state.weight.exp_avg\": its shape is [2, 3], and that of the parameter is [3, 2]; ");
    EXPECT_HAS(wrong("state.bias.exp_avg_sq", at::zeros({3}, at::kInt)),
               "its dtype is Int, and that of the parameter Float; ");
    EXPECT_HAS(wrong("state.bias.mu_product", at::zeros({3})),
               "tensor \"state.bias.mu_product\": Adam has no such state; ");
    EXPECT_HAS(wrong("param_groups.bias.lr", at::zeros({1})),
               "tensor \"param_groups.bias.lr\": is Float [1], not one number; ");
    EXPECT_HAS(wrong("param_groups.bias.betas", at::zeros({3})),
               "tensor \"param_groups.bias.betas\": is Float [3], not two numbers; ");
    EXPECT_HAS(wrong("param_groups.bias.amsgrad", at::scalar_tensor(2)), "not an integer from 0 to 1; ");
    for (const std::string name : {"param_groups.weight.lr", "param_groups.weight.betas", "state.bias.step"}) {
        const at::Tensor value = at::full_like(saved.tensors[name], std::numeric_limits<double>::quiet_NaN());
        EXPECT_HAS(wrong(name, value), "tensor \"" + name + "\": its value is not a number; ");
    }
    EXPECT_HAS(wrong("param_groups.bias.lr", at::scalar_tensor(0.125, at::kDouble)),
               ": `lr` of \"bias\" and \"weight\" differs, which are in group 0 of the optimizer; ");
    EXPECT_HAS(wrong("random_state", at::zeros({3})), "\n    unexpected: \"random_state\"\n");
    // amsgrad needs one more tensor.
    st::Tensors amsgrad = saved.with("param_groups.bias.amsgrad", at::scalar_tensor(true, at::kBool));
    amsgrad.insert_or_assign("param_groups.weight.amsgrad", at::scalar_tensor(true, at::kBool));
    EXPECT_HAS(saved.error(amsgrad), "max_exp_avg_sq\": does not exist, and Adam needs it; ");

    for (const std::string name : {"state.weight.exp_avg", "state.bias.step", "param_groups.weight.lr"}) {
        EXPECT_HAS(saved.error(saved.without(name)), "tensor \"" + name + "\": does not exist, and Adam needs it; ");
    }
    EXPECT_HAS(saved.error({{"weight", at::zeros({3, 2})}, {"bias", at::zeros({3})}}),
               "not the state of an optimizer: no name begins with \"param_groups.\"; ");

    std::filesystem::copy(saved.dir.file("o"), saved.dir.file("short"));
    std::filesystem::resize_file(saved.dir.file("short"), std::filesystem::file_size(saved.dir.file("o")) - 4);
    EXPECT_HAS(ERROR_OF(st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("short"))),
               saved.dir.file("short"));
    EXPECT_EQ(ERROR_OF(st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("absent"))),
              "No such file or directory: " + saved.dir.file("absent"));
}

TEST(optimizer_is_not_changed_by_a_load_that_progress_ends) {
    SavedAdam saved;
    st::save_file(saved.with("state.weight.exp_avg", at::full({3, 2}, 9.0)), saved.dir.file("other"));
    st::LoadModelOptions options;
    options.progress = [](int64_t, int64_t) { throw std::runtime_error("enough"); };
    try {
        st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("other"), options);
        EXPECT(!"an exception");
    } catch (const std::runtime_error& error) {
        EXPECT_EQ(std::string(error.what()), "enough");
    }
    st::save_optimizer(saved.optimizer, saved.layer, saved.dir.file("now"));
    EXPECT(read_file(saved.dir.file("now")) == read_file(saved.dir.file("o")));
}

TEST(optimizer_of_parameters_on_the_meta_device) {
    SavedAdam saved;
    torch::nn::Module module("Linear");
    const at::Tensor weight = module.register_parameter("weight", at::empty({3, 2}, at::kMeta));
    const at::Tensor bias = module.register_parameter("bias", at::empty({3}, at::kMeta));
    optim::Adam optimizer({weight, bias}, optim::AdamOptions(1));
    EXPECT_HAS(ERROR_OF(st::load_optimizer(optimizer, module, saved.dir.file("o"))), "it is on the meta device");
    EXPECT(optimizer.state().empty());
    EXPECT_EQ(optimizer.param_groups()[0].options().get_lr(), 1.0);
}
