#include <torch/torch.h>

#include <map>
#include <safetensors_torch.hpp>
#include <string>
#include <unordered_map>
#include <vector>

namespace st = safetensors_torch;

int main() {
    std::map<std::string, torch::Tensor> sorted;
    sorted["a"] = torch::rand({2});
    sorted["b"] = torch::rand({3});
    st::save_file(sorted, "sorted.safetensors");
    std::unordered_map<std::string, torch::Tensor> hashed(sorted.begin(), sorted.end());
    st::save_file(hashed, "hashed.safetensors", {{"from", "unordered_map"}});
    c10::Dict<std::string, at::Tensor> dict;
    dict.insert("a", sorted["a"]);
    st::save_file(dict, "dict.safetensors");
    std::vector<std::pair<std::string, torch::Tensor>> pairs = {{"a", sorted["a"]}};
    st::save_file(pairs, "pairs.safetensors");

    std::map<std::string, torch::Tensor> m = st::load_file("hashed.safetensors");
    TORCH_CHECK(m.size() == 2 && m.at("b").equal(sorted["b"]));
    std::unordered_map<std::string, torch::Tensor> u = st::load_file("sorted.safetensors");
    TORCH_CHECK(u["a"].equal(sorted["a"]));
    c10::Dict<std::string, at::Tensor> d = st::load_file("dict.safetensors");
    TORCH_CHECK(d.at("a").equal(sorted["a"]));
    torch::OrderedDict<std::string, torch::Tensor> o = st::load_file("sorted.safetensors");
    TORCH_CHECK(o["b"].equal(sorted["b"]));
    m = st::load_file("pairs.safetensors");
    std::string bytes = st::save(m);
    TORCH_CHECK(st::load(bytes).size() == 1);
}
