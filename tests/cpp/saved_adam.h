// A trained layer with its optimizer, whose file the tests of load_optimizer change.
#pragma once

#include <torch/nn.h>
#include <torch/optim.h>

#include <safetensors_torch/optimizer.hpp>
#include <string>

#include "support.h"

namespace support {

namespace optim = torch::optim;

// A trained layer, and changed copies of the file of its optimizer.
struct SavedAdam {
    TempDir dir;
    torch::nn::Linear layer{2, 3};
    optim::Adam optimizer{layer->parameters(), optim::AdamOptions(0.25)};
    st::Tensors tensors;

    SavedAdam() {
        layer->forward(at::ones({1, 2})).sum().backward();
        optimizer.step();
        st::save_optimizer(optimizer, layer, dir.file("o"));
        tensors = st::load_file(dir.file("o"));
    }

    const optim::AdamParamState& state(const at::Tensor& parameter) const {
        return static_cast<const optim::AdamParamState&>(*optimizer.state().at(parameter.unsafeGetTensorImpl()));
    }

    // Returns the error of loading `changed`, and checks that the optimizer is as before.
    std::string error(const st::Tensors& changed, const st::Metadata& metadata = {}) {
        st::save_file(changed, dir.file("changed"), metadata);
        const std::string text = ERROR_OF(st::load_optimizer(optimizer, layer, dir.file("changed")));
        EXPECT_HAS(text, dir.file("changed"));
        st::save_optimizer(optimizer, layer, dir.file("now"));
        EXPECT(read_file(dir.file("now")) == read_file(dir.file("o")));
        return text;
    }

    st::Tensors with(const std::string& name, const at::Tensor& tensor) const {
        st::Tensors changed = tensors;
        changed.insert_or_assign(name, tensor);
        return changed;
    }

    st::Tensors without(const std::string& name) const {
        st::Tensors changed = tensors;
        EXPECT_EQ(changed.erase(name), 1U);
        return changed;
    }
};

}  // namespace support
