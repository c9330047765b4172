// The class Tensors, and what functions accept as devices, bytes and names. tests/guesses has whole programs.

#include <torch/nn.h>

#include <map>
#include <unordered_map>

#include "support.h"

using namespace support;

namespace {

st::Tensors three() { return {{"b", make({2}, at::kFloat, 1)}, {"a", make({3}, at::kLong, 2)}, {"c", at::ones({})}}; }

}  // namespace

TEST(tensors_keep_the_order_of_insertion) {
    st::Tensors tensors = three();
    EXPECT_EQ(tensors.keys(), (Names{"b", "a", "c"}));
    EXPECT(tensors.values()[1].is_same(tensors.at("a")));
    EXPECT_EQ(tensors.erase("a"), 1U);
    EXPECT_EQ(tensors.erase("a"), 0U);
    tensors["a"] = at::zeros({1});
    tensors["b"] = at::zeros({1});
    EXPECT_EQ(tensors.keys(), (Names{"b", "c", "a"}));
    EXPECT(tensors.erase(tensors.find("c"))->first == "a");
    EXPECT(tensors.find("c") == tensors.end() && tensors.size() == 2);
    tensors.clear();
    EXPECT(tensors.empty() && !tensors.contains("a") && tensors.begin() == tensors.end());
}

TEST(insertions_keep_or_replace) {
    st::Tensors tensors = three();
    const at::Tensor old = tensors.at("a"), replacement = at::zeros({1});
    EXPECT(!tensors.insert("a", replacement).second && !tensors.emplace("a", replacement).second);
    EXPECT(!tensors.insert({"a", replacement}).second && tensors.at("a").is_same(old));
    EXPECT(!tensors.insert_or_assign("a", replacement).second && tensors.at("a").is_same(replacement));
    EXPECT(tensors.insert_or_assign("d", replacement).second && tensors.at("d").is_same(replacement));
    const std::map<std::string, at::Tensor> more{{"a", old}, {"e", old}};
    tensors.insert(more.begin(), more.end());
    EXPECT(tensors.size() == 5 && tensors.at("a").is_same(replacement) && tensors.at("e").is_same(old));
    EXPECT_HAS(ERROR_OF(st::save({{"x", old}, {"x", replacement}})), "tensor \"x\": occurs twice; give each");
}

TEST(copies_of_tensors_have_their_own_entries) {
    const st::Tensors first = three();
    st::Tensors second = first;
    second.at("a") = at::zeros({7});
    EXPECT(second.erase("b") == 1 && first.contains("b"));
    EXPECT(first.at("a").numel() == 3 && second.at("c").is_same(first.at("c")));
    st::Tensors third = std::move(second);
    EXPECT_EQ(third.keys(), (Names{"a", "c"}));
    EXPECT(third.at("a").numel() == 7);
    second = third;
    third = {};
    EXPECT(third.empty() && second.size() == 2 && second.contains("c"));
}

TEST(a_name_that_does_not_exist) {
    st::Tensors tensors = three();
    EXPECT_EQ(ERROR_OF(tensors.at("d")), "tensor \"d\": does not exist; the names are \"a\", \"b\", \"c\"");
    EXPECT_EQ(ERROR_OF(st::Tensors().at("d")), "tensor \"d\": does not exist; there are no tensors");
    for (int i = 0; i < 1000; ++i) {
        tensors["layers." + std::to_string(i) + ".weight"] = at::Tensor();
    }
    const std::string expected =
        "tensor \"layers.77.wieght\": does not exist; the most similar names are \"layers.77.weight\", "
        "\"layers.17.weight\", \"layers.177.weight\"";
    EXPECT_EQ(ERROR_OF(tensors.at("layers.77.wieght")), expected);
    EXPECT_EQ(ERROR_OF(std::as_const(tensors)["layers.77.wieght"]), expected);
    EXPECT_EQ(ERROR_OF(st::Tensors{tensors}["layers.77.wieght"]), expected);
    EXPECT_EQ(tensors.size(), 1003U);
    EXPECT(!tensors["new"].defined() && tensors.size() == 1004);
    EXPECT_HAS(ERROR_OF(st::save(st::Tensors{{"new", tensors["new"]}})), "tensor 'new' is undefined");
    try {
        three().at("d");
    } catch (const st::Error& error) {
        EXPECT(error.category() == st::ErrorCategory::safetensor && error.code() == SFT_ERROR_TENSOR_NOT_FOUND);
    }
}

TEST(tensors_convert_from_and_to_other_maps) {
    const st::Tensors all = three();
    const torch::OrderedDict<std::string, at::Tensor> ordered = all;
    const c10::Dict<std::string, at::Tensor> dict = all;
    const std::map<std::string, at::Tensor> map = all;
    const std::unordered_map<std::string, at::Tensor> hashed = all;
    const std::vector<std::pair<std::string, at::Tensor>> pairs(all.begin(), all.end());
    EXPECT_EQ(ordered.keys(), all.keys());
    for (const st::Tensors& same : {st::Tensors(ordered), st::Tensors(dict), st::Tensors(pairs)}) {
        EXPECT_EQ(same.keys(), all.keys());
        EXPECT(same.at("a").is_same(all.at("a")));
    }
    for (const st::Tensors& sorted : {st::Tensors(map), st::Tensors(hashed)}) {
        EXPECT_EQ(sorted.keys(), (Names{"a", "b", "c"}));
        EXPECT(sorted.at("a").is_same(all.at("a")));
    }
    torch::nn::Linear layer(3, 2);
    EXPECT(st::load(st::save(layer->named_parameters())).at("weight").equal(layer->weight));
}

TEST(devices_by_name) {
    EXPECT(at::Device(st::DeviceLike("cuda:1")) == at::Device(at::kCUDA, 1));
    EXPECT(at::Device(st::DeviceLike(std::string("meta"))) == at::kMeta);
    EXPECT(at::Device(st::DeviceLike(at::kCPU)) == at::Device("cpu"));
    EXPECT_EQ(ERROR_OF(st::load(std::string("x"), "gpu")),
              "device \"gpu\": torch has no device of this name; use one such as \"cpu\" or \"cuda:0\"");
}

TEST(a_path_is_not_taken_for_bytes) {
    const TempDir dir;
    const std::string advice = ": load takes the bytes of a file, and this is a path; call load_file";
    EXPECT_EQ(ERROR_OF(st::load(std::string("absent.safetensors"))), "absent.safetensors" + advice);
    write_file(dir.file("model"), "x");
    EXPECT_EQ(ERROR_OF(st::load(dir.file("model"))), dir.file("model") + advice);
    // Bytes that do not name a file are not called a path.
    EXPECT(!has(ERROR_OF(st::load(std::string("<html>"))), "path"));
    EXPECT(!has(ERROR_OF(st::load(std::string())), "path"));
}

TEST(names_are_a_list_or_a_function) {
    const std::string bytes = st::save(three());
    st::LoadOptions options;
    EXPECT_EQ(st::load(bytes, options).size(), 3U);
    options.names = {"c", "a"};
    EXPECT_EQ(st::load(bytes, options).keys(), (Names{"a", "c"}));
    options.names = Names();
    EXPECT(st::load(bytes, options).empty());
    options.names = [](const std::string& name) { return name < "c"; };
    EXPECT_EQ(st::load(bytes, options).keys(), (Names{"a", "b"}));
    options.names = {};
    EXPECT_EQ(st::load(bytes, options).size(), 3U);
    options.names = {"a", "d"};
    EXPECT_HAS(ERROR_OF(st::load(bytes, options)), "File does not contain tensor d");
}
