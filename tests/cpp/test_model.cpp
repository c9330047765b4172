// save_model and load_model: names, tied weights, strictness, and failed loads, which must not change the model.

#include <torch/nn.h>

#include "support.h"

using namespace support;
using Names = std::vector<std::string>;

namespace {

// A layer that uses the weight of another module.
struct TiedImpl : torch::nn::Module {
    explicit TiedImpl(const at::Tensor& shared) : weight(register_parameter("weight", shared)) {}
    at::Tensor weight;
};
TORCH_MODULE(Tied);

// Parameters and buffers at every level, undefined buffers, and a weight shared by two modules.
struct NetImpl : torch::nn::Module {
    torch::nn::Embedding embedding{6, 4};
    torch::nn::Sequential body{torch::nn::Linear(4, 4), torch::nn::BatchNorm1d(4),
                               torch::nn::Linear(torch::nn::LinearOptions(4, 4).bias(false))};
    Tied head{embedding->weight};
    at::Tensor scale;
    at::Tensor positions;

    NetImpl() {
        register_module("embedding", embedding);
        register_module("body", body);
        register_module("head", head);
        scale = register_parameter("scale", at::rand({}));
        positions = register_buffer("positions", at::arange(3));
        register_buffer("unused", at::Tensor());
    }
};
TORCH_MODULE(Net);

// Returns a new net. Seeds the generator, so nets with the same seed are equal.
Net net(std::uint64_t seed) {
    at::manual_seed(seed);
    return Net();
}

st::Tensors state_of(const torch::nn::Module& module) {
    st::Tensors state;
    for (const auto& entry : module.named_parameters()) {
        state[entry.key()] = entry.value().detach().clone();
    }
    for (const auto& entry : module.named_buffers()) {
        if (entry.value().defined()) {
            state[entry.key()] = entry.value().clone();
        }
    }
    return state;
}

st::Tensors without(st::Tensors tensors, const std::string& name) {
    EXPECT_EQ(tensors.erase(name), 1U);
    return tensors;
}

const Names kSaved = {"body.0.bias",         "body.0.weight",      "body.1.bias",   "body.1.num_batches_tracked",
                      "body.1.running_mean", "body.1.running_var", "body.1.weight", "body.2.weight",
                      "embedding.weight",    "positions",          "scale"};

}  // namespace

TEST(model_round_trip) {
    const TempDir dir;
    const Net source = net(1);
    st::save_model(*source, dir.file("m"));
    EXPECT_EQ(st::File(dir.file("m")).keys(), kSaved);
    for (const st::Backend backend : kBackends) {
        Net target = net(2);
        const at::Tensor weight = target->embedding->weight;
        EXPECT(!identical(state_of(*target), state_of(*source)));
        const st::LoadResult result = st::load_model(*target, dir.file("m"), {/*strict=*/true, backend});
        EXPECT(result.missing.empty() && result.unexpected.empty());
        EXPECT(identical(state_of(*target), state_of(*source)));
        // Loading is in place: other handles of a parameter see the new values, and it still requires a gradient.
        EXPECT(identical(weight.detach(), source->embedding->weight.detach()));
        EXPECT(weight.requires_grad() && weight.is_leaf());
        EXPECT(target->head->weight.is_same(weight));
    }
    EXPECT_EQ(dir.count(), 1U);
}

TEST(model_state_is_not_part_of_a_graph) {
    const TempDir dir;
    Net source = net(1);
    st::save_model(*source, dir.file("m"));
    Net target = net(2);
    const at::Tensor before = target->body[0]->as<torch::nn::Linear>()->weight;
    const auto version = before._version();
    st::load_model(*target, dir.file("m"));
    EXPECT(!before.grad_fn());
    EXPECT(before._version() > version);
}

TEST(model_metadata) {
    const TempDir dir;
    const Net source = net(1);
    st::save_model(*source, dir.file("m"), {{"format", "pt"}});
    EXPECT(st::File(dir.file("m")).metadata() == (st::Metadata{{"format", "pt"}, {"head.weight", "embedding.weight"}}));
    st::save_model(*source, dir.file("m"), {{"head.weight", "mine"}});
    EXPECT(st::File(dir.file("m")).metadata() == (st::Metadata{{"head.weight", "mine"}}));
    torch::nn::Linear untied(2, 2);
    st::save_model(*untied, dir.file("m"));
    EXPECT(st::File(dir.file("m")).metadata().empty());
}

TEST(model_with_the_other_tied_name_in_the_file) {
    const TempDir dir;
    const Net source = net(1);
    st::Tensors tensors = without(state_of(*source), "embedding.weight");
    st::save_file(tensors, dir.file("m"));
    Net target = net(2);
    const st::LoadResult result = st::load_model(*target, dir.file("m"));
    EXPECT(result.missing.empty() && result.unexpected.empty());
    EXPECT(identical(state_of(*target), state_of(*source)));
}

TEST(model_with_a_tied_weight_missing_under_every_name) {
    const TempDir dir;
    st::save_file(without(without(state_of(*net(1)), "embedding.weight"), "head.weight"), dir.file("m"));
    Net target = net(2);
    EXPECT_EQ(st::load_model(*target, dir.file("m"), {/*strict=*/false}).missing, (Names{"embedding.weight"}));
}

TEST(model_with_missing_and_unexpected_tensors) {
    const TempDir dir;
    const st::Tensors full = state_of(*net(1));
    st::Tensors tensors = without(without(without(full, "scale"), "body.0.bias"), "head.weight");
    tensors.insert("zz", make({1}, at::kFloat));
    tensors.insert("extra", make({1}, at::kFloat));
    st::save_file(tensors, dir.file("m"));
    Net target = net(2);
    const st::Tensors before = state_of(*target);
    const std::string text = ERROR_OF(st::load_model(*target, dir.file("m")));
    EXPECT_EQ(text, "Error(s) in loading state_dict for " + target->name() +
                        ":\n    Missing key(s) in state_dict: \"body.0.bias\", \"scale\""
                        "\n    Unexpected key(s) in state_dict: \"extra\", \"zz\"");
    EXPECT(identical(state_of(*target), before));

    const st::LoadResult result = st::load_model(*target, dir.file("m"), {/*strict=*/false});
    EXPECT_EQ(result.missing, (Names{"body.0.bias", "scale"}));
    EXPECT_EQ(result.unexpected, (Names{"extra", "zz"}));
    EXPECT(identical(target->scale.detach(), before.at("scale")));
    EXPECT(identical(target->embedding->weight.detach(), full.at("embedding.weight")));
}

TEST(model_file_without_the_counter_of_batches) {
    const TempDir dir;
    const Net source = net(1);
    const st::Tensors tensors = without(without(state_of(*source), "head.weight"), "body.1.num_batches_tracked");
    st::save_file(tensors, dir.file("m"));
    Net target = net(2);
    auto& counter = target->body[1]->as<torch::nn::BatchNorm1d>()->num_batches_tracked;
    counter.fill_(17);
    const st::LoadResult result = st::load_model(*target, dir.file("m"));
    EXPECT(result.missing.empty() && result.unexpected.empty());
    EXPECT_EQ(counter.item<int>(), 17);
}

TEST(model_with_a_shape_mismatch) {
    const TempDir dir;
    st::Tensors tensors = without(state_of(*net(1)), "head.weight");
    tensors.insert_or_assign("body.2.weight", make({4, 5}, at::kFloat));
    st::save_file(tensors, dir.file("m"));
    for (const bool strict : {true, false}) {
        Net target = net(2);
        const st::Tensors before = state_of(*target);
        const std::string text = ERROR_OF(st::load_model(*target, dir.file("m"), {strict}));
        EXPECT_HAS(text, "Error(s) in loading state_dict for " + target->name() + ":");
        EXPECT_HAS(text, "size mismatch for body.2.weight");
        EXPECT(identical(state_of(*target), before));
    }
}

TEST(model_file_that_is_missing) {
    const TempDir dir;
    torch::nn::Linear module(2, 2);
    EXPECT_EQ(ERROR_OF(st::load_model(*module, dir.file("absent"))),
              "No such file or directory: " + dir.file("absent"));
}

TEST(model_is_not_changed_by_a_truncated_file) {
    const TempDir dir;
    st::save_model(*net(1), dir.file("m"));
    std::filesystem::resize_file(dir.file("m"), std::filesystem::file_size(dir.file("m")) - 4);
    Net target = net(2);
    const st::Tensors before = state_of(*target);
    for (const st::Backend backend : kBackends) {
        EXPECT_HAS(ERROR_OF(st::load_model(*target, dir.file("m"), {/*strict=*/true, backend})), dir.file("m"));
        EXPECT(identical(state_of(*target), before));
    }
}

TEST(model_on_the_meta_device) {
    const TempDir dir;
    torch::nn::Linear source(2, 3);
    st::save_model(*source, dir.file("m"));
    torch::nn::Module target("Linear");
    target.register_parameter("weight", at::empty({3, 2}, at::kMeta));
    target.register_parameter("bias", at::empty({3}, at::kMeta));
    EXPECT_HAS(ERROR_OF(st::load_model(target, dir.file("m"))), "meta device");
    EXPECT_HAS(ERROR_OF(st::save_model(target, dir.file("other"))), "Cannot copy out of meta tensor");
    EXPECT_EQ(dir.count(), 1U);
}

TEST(model_of_another_dtype_and_layout_in_memory) {
    const TempDir dir;
    torch::nn::Linear source(3, 2);
    st::save_model(*source, dir.file("m"));
    torch::nn::Linear target(3, 2);
    target->to(at::kDouble);
    {
        const torch::NoGradGuard no_grad;
        target->weight.set_data(at::empty({3, 2}, at::kDouble).t());
    }
    st::load_model(*target, dir.file("m"));
    EXPECT_EQ(target->weight.scalar_type(), at::kDouble);
    EXPECT(!target->weight.is_contiguous());
    EXPECT(at::equal(target->weight, source->weight.to(at::kDouble)));
    EXPECT(at::equal(target->bias, source->bias.to(at::kDouble)));
}

TEST(model_that_is_not_contiguous) {
    const TempDir dir;
    torch::nn::Linear module(3, 2);
    {
        const torch::NoGradGuard no_grad;
        module->weight.set_data(at::rand({3, 2}).t());
    }
    st::save_model(*module, dir.file("m"));
    EXPECT(at::equal(st::load_file(dir.file("m")).at("weight"), module->weight));
    EXPECT(!module->weight.is_contiguous());

    const std::string text = ERROR_OF(st::save_model(*module, dir.file("new"), {}, {/*force_contiguous=*/false}));
    EXPECT_HAS(text, "`weight`");
    EXPECT_HAS(text, "`force_contiguous`");
    EXPECT_EQ(dir.count(), 1U);

    // Other errors do not contain this advice.
    module->weight.set_data(module->weight.contiguous());
    EXPECT(!has(ERROR_OF(st::save_model(*module, dir.file("no/directory"), {}, {/*force_contiguous=*/false})),
                "force_contiguous"));
    st::save_model(*module, dir.file("new"), {}, {/*force_contiguous=*/false});
    EXPECT(at::equal(st::load_file(dir.file("new")).at("weight"), module->weight));
}

TEST(model_without_a_tensor_that_covers_the_shared_memory) {
    const TempDir dir;
    const at::Tensor memory = at::rand({4});
    torch::nn::Module module("halves");
    module.register_buffer("first", memory.slice(0, 0, 3));
    module.register_buffer("second", memory.slice(0, 1, 4));
    const std::string text = ERROR_OF(st::save_model(module, dir.file("m")));
    EXPECT_HAS(text, "{'first', 'second'}");
    EXPECT_HAS(text, "entire storage");
    EXPECT_EQ(dir.count(), 0U);
}

TEST(model_keeps_the_first_name_that_covers_the_memory) {
    const TempDir dir;
    const at::Tensor memory = at::rand({4});
    torch::nn::Module module("parts");
    module.register_buffer("a_part", memory.slice(0, 1, 3));
    module.register_buffer("whole_2", memory);
    module.register_buffer("whole_1", memory);
    st::save_model(module, dir.file("m"));
    const st::File file(dir.file("m"));
    EXPECT_EQ(file.keys(), (Names{"whole_1"}));
    EXPECT(file.metadata() == (st::Metadata{{"a_part", "whole_1"}, {"whole_2", "whole_1"}}));
    const at::Tensor saved = memory.clone();
    memory.zero_();
    const st::LoadResult result = st::load_model(module, dir.file("m"));
    EXPECT(result.missing.empty() && result.unexpected.empty());
    EXPECT(identical(memory, saved));
}

TEST(model_without_tensors) {
    const TempDir dir;
    torch::nn::Module module("bare");
    st::save_model(module, dir.file("m"));
    EXPECT_EQ(st::File(dir.file("m")).size(), 0U);
    EXPECT(st::load_model(module, dir.file("m")).missing.empty());
}
