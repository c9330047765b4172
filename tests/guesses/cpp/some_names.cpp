#include <torch/torch.h>

#include <iostream>
#include <safetensors_torch.hpp>

int main() {
    using namespace safetensors_torch;
    save_file({{"layer.weight", torch::ones(2)}, {"layer.bias", torch::ones(2)}, {"head", torch::ones(1)}},
              "names.safetensors");
    LoadOptions options;
    options.names = {"layer.bias", "head"};
    TORCH_CHECK(load_file("names.safetensors", options).size() == 2);
    std::vector<std::string> wanted{"head"};
    options.names = wanted;
    TORCH_CHECK(load_file("names.safetensors", "cpu", options).keys() == wanted);
    options.names = [](const std::string& name) { return name.find("layer.") == 0; };
    TORCH_CHECK(load_file("names.safetensors", options).size() == 2);

    options.names = {"layer.*", "layer.bias", "head"};
    TORCH_CHECK(load_file("names.safetensors", options).keys() ==
                std::vector<std::string>({"head", "layer.bias", "layer.weight"}));

    options.names = {"layers.*"};
    try {
        load_file("names.safetensors", options);
        TORCH_CHECK(false, "not thrown");
    } catch (const Error& e) {
        TORCH_CHECK(std::string(e.what()).find("layers.*") != std::string::npos);
    }

    options.names = {"layer.wieght"};
    try {
        load_file("names.safetensors", options);
        TORCH_CHECK(false, "not thrown");
    } catch (const Error& e) {
        TORCH_CHECK(std::string(e.what()).find("layer.wieght") != std::string::npos);
    }
    const Tensors tensors = load_file("names.safetensors");
    for (auto read :
         {+[](const Tensors& t) { return t.at("layer.wieght"); }, +[](const Tensors& t) { return t["layer.wieght"]; },
          +[](const Tensors&) { return load_file("names.safetensors")["layer.wieght"]; }}) {
        try {
            read(tensors);
            TORCH_CHECK(false, "not thrown");
        } catch (const Error& e) {
            std::cout << e.what() << std::endl;
            TORCH_CHECK(std::string(e.what()).find("\"layer.weight\"") != std::string::npos);
        }
    }
}
