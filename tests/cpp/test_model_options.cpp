// load_model and save_model: parts of a checkpoint, other names, several files, TorchScript modules.

#include <torch/nn.h>
#include <torch/script.h>

#include "support.h"

using namespace support;
using Names = std::vector<std::string>;

namespace {

torch::nn::Sequential layers(std::uint64_t seed) {
    at::manual_seed(seed);
    return torch::nn::Sequential(torch::nn::Linear(3, 4), torch::nn::BatchNorm1d(4), torch::nn::Linear(4, 2));
}

template <typename Module>
bool same(const Module& a, const Module& b) {
    const auto theirs = b.named_parameters();
    auto it = theirs.begin();
    for (const auto& mine : a.named_parameters()) {
        if (!at::equal(mine.value(), (it++)->value())) {
            return false;
        }
    }
    return true;
}

// Returns the name that a file has for a name of layers().
std::string renamed(const std::string& name) { return "layer_" + name; }

st::LoadModelOptions within(const std::string& prefix) {
    st::LoadModelOptions options;
    options.prefix = prefix;
    return options;
}

// A TorchScript module with a parameter, a buffer and a child.
torch::jit::Module script(float value) {
    torch::jit::Module child("Child");
    child.register_parameter("weight", at::full({2}, value), /*is_buffer=*/false);
    torch::jit::Module module("Net");
    module.register_parameter("bias", at::full({3}, value + 1), /*is_buffer=*/false);
    module.register_buffer("steps", at::full({}, static_cast<int64_t>(value), at::kLong));
    module.register_module("child", child);
    return module;
}

}  // namespace

TEST(modules_by_holder_and_by_shared_pointer) {
    const TempDir dir;
    const torch::nn::Linear source(2, 3);
    st::save_model(source, dir.file("m"));
    torch::nn::Linear holder(2, 3);
    const std::shared_ptr<torch::nn::LinearImpl> pointer = torch::nn::Linear(2, 3).ptr();
    st::load_model(holder, dir.file("m"));
    EXPECT(same(*source, *holder));
    st::load_model(pointer, dir.file("m"), st::LoadModelOptions());
    EXPECT(same(*source, *pointer));
    st::save_model(pointer, dir.file("p"), {}, st::SaveModelOptions());
    EXPECT_EQ(read_file(dir.file("p")), read_file(dir.file("m")));
    EXPECT_HAS(ERROR_OF(st::load_model(std::shared_ptr<torch::nn::Module>(), dir.file("m"))), "module pointer is null");
}

TEST(braces_mean_the_defaults) {
    const TempDir dir;
    torch::nn::Linear layer(2, 3);
    st::Tensors state = layer->named_parameters();
    EXPECT_EQ(state.erase("bias"), 1U);
    st::save_file(state, dir.file("m"));
    EXPECT_HAS(ERROR_OF(st::load_model(layer, dir.file("m"), {})), "Missing key(s)");
    layer->weight.set_data(at::ones({2, 3}).t());
    st::save_model(layer, dir.file("t"), {}, {});
    EXPECT(identical(st::load_file(dir.file("t")).at("weight"), at::ones({3, 2})));
}

TEST(model_of_part_of_a_checkpoint) {
    const TempDir dir;
    const auto source = layers(1);
    st::SaveModelOptions save;
    save.prefix = "body.";
    st::save_model(*source, dir.file("m"), {{"k", "v"}}, save);
    EXPECT_EQ(st::File(dir.file("m")).keys().front(), "body.0.bias");
    EXPECT_EQ(st::File(dir.file("m")).metadata().at("k"), "v");

    // The head belongs to another module.
    st::Tensors tensors = st::load_file(dir.file("m"));
    tensors.insert("head.weight", make({1}, at::kFloat));
    st::save_file(tensors, dir.file("m"));
    auto target = layers(2);
    const st::LoadResult result = st::load_model(*target, dir.file("m"), within("body."));
    EXPECT(result.missing.empty() && result.unexpected.empty());
    EXPECT(same(*source, *target));

    // Tensors under the prefix that the module does not have are unexpected.
    tensors.insert("body.extra", make({1}, at::kFloat));
    st::save_file(tensors, dir.file("m"));
    EXPECT_HAS(ERROR_OF(st::load_model(*target, dir.file("m"), within("body."))),
               "Unexpected key(s) in state_dict: \"body.extra\"");
    EXPECT_HAS(ERROR_OF(st::load_model(*target, dir.file("m"), within("tail."))), "\"tail.0.bias\"");
}

TEST(model_under_other_names) {
    const TempDir dir;
    const auto source = layers(1);
    st::SaveModelOptions save;
    save.prefix = "p.";
    save.rename = renamed;
    st::save_model(*source, dir.file("m"), {}, save);
    EXPECT(st::File(dir.file("m")).contains("p.layer_0.weight"));
    st::LoadModelOptions load = within("p.");
    load.rename = renamed;
    load.backend = st::Backend::pread;
    int64_t last = 0;
    load.progress = [&](int64_t done, int64_t) { last = done; };
    auto target = layers(2);
    st::load_model(*target, dir.file("m"), load);
    EXPECT(same(*source, *target));
    EXPECT(last > 0);

    // The counter may also be missing under its other name.
    st::Tensors tensors = st::load_file(dir.file("m"));
    EXPECT_EQ(tensors.erase("p.layer_1.num_batches_tracked"), 1U);
    st::save_file(tensors, dir.file("m"));
    EXPECT(st::load_model(*target, dir.file("m"), load).missing.empty());

    load.strict = false;
    load.rename = [](const std::string& name) { return "none." + name; };
    const st::LoadResult result = st::load_model(*target, dir.file("m"), load);
    EXPECT_EQ(result.missing.front(), "p.none.0.bias");
    EXPECT_EQ(result.unexpected.front(), "p.layer_0.bias");

    load.rename = [](const std::string&) { return "same"; };
    EXPECT_HAS(ERROR_OF(st::load_model(*target, dir.file("m"), load)), "are called p.same by `rename`, `0.bias`");
    save.rename = load.rename;
    EXPECT_HAS(ERROR_OF(st::save_model(*target, dir.file("m"), {}, save)), "are called p.same by `rename`");
}

TEST(model_in_several_files) {
    const TempDir dir;
    const auto source = layers(1);
    st::SaveModelOptions save;
    save.max_shard_size = 50;
    st::save_model(*source, dir.file("m"), {{"k", "v"}}, save);
    const st::Checkpoint checkpoint(dir.file("m"));
    EXPECT(checkpoint.shards().size() > 2);
    EXPECT_EQ(checkpoint.metadata().at("k"), "v");
    for (const std::string& path : {dir.file("m"), dir.file("m/model.safetensors.index.json")}) {
        for (const st::Backend backend : kBackends) {
            auto target = layers(2);
            EXPECT(st::load_model(*target, path, {/*strict=*/true, backend}).missing.empty());
            EXPECT(same(*source, *target));
        }
    }
    // All files are checked before the first tensor changes.
    torch::nn::Sequential other(torch::nn::Linear(3, 4), torch::nn::BatchNorm1d(4), torch::nn::Linear(4, 3));
    const at::Tensor before = other->parameters()[0].detach().clone();
    EXPECT_HAS(ERROR_OF(st::load_model(*other, dir.file("m"))), "size mismatch for 2.weight");
    EXPECT(at::equal(other->parameters()[0], before));
}

TEST(model_tied_under_other_names) {
    const TempDir dir;
    torch::nn::Linear a(2, 2);
    torch::nn::Linear b(2, 2);
    b->weight = b->register_parameter("weight2", a->weight);
    torch::nn::Sequential both(a, b);
    st::SaveModelOptions save;
    save.prefix = "x.";
    st::save_model(*both, dir.file("m"), {}, save);
    EXPECT_EQ(st::File(dir.file("m")).metadata().at("x.1.weight2"), "x.0.weight");
    EXPECT(st::load_model(*both, dir.file("m"), within("x.")).missing.empty());
}

TEST(script_module) {
    const TempDir dir;
    const torch::jit::Module source = script(3);
    st::save_model(source, dir.file("m"));
    EXPECT_EQ(st::File(dir.file("m")).keys(), (Names{"bias", "child.weight", "steps"}));
    torch::jit::Module target = script(5);
    const at::Tensor bias = target.attr("bias").toTensor();
    const st::LoadResult result = st::load_model(target, dir.file("m"));
    EXPECT(result.missing.empty() && result.unexpected.empty());
    // Loading is in place.
    EXPECT(at::equal(bias, at::full({3}, 4.0F)));
    EXPECT(at::equal(target.attr("child").toModule().attr("weight").toTensor(), at::full({2}, 3.0F)));
    EXPECT_EQ(target.attr("steps").toTensor().item<int64_t>(), 3);

    st::LoadModelOptions options = within("nowhere.");
    EXPECT_HAS(ERROR_OF(st::load_model(target, dir.file("m"), options)), "Error(s) in loading state_dict for Net:");
    options.strict = false;
    EXPECT_EQ(st::load_model(target, dir.file("m"), options).missing,
              (Names{"nowhere.bias", "nowhere.child.weight", "nowhere.steps"}));
    st::SaveModelOptions save;
    save.max_shard_size = 1;
    st::save_model(source, dir.file("s"), {}, save);
    EXPECT_EQ(st::Checkpoint(dir.file("s")).shards().size(), 3U);
}

TEST(prefixes_of_wrappers_are_suggested) {
    const TempDir dir;
    const auto source = layers(1), target = layers(2);
    st::SaveModelOptions options;
    options.prefix = "_orig_mod.";
    st::save_model(source, dir.file("m"), {}, options);
    const std::string error = ERROR_OF(st::load_model(target, dir.file("m")));
    EXPECT_HAS(error, "torch.compile");
    EXPECT_HAS(error, "give the prefix \"_orig_mod.\"");
    st::load_model(target, dir.file("m"), within("_orig_mod."));
    EXPECT(same(*source, *target));
}
