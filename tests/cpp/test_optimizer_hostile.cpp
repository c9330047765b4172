// load_optimizer: hostile files, unusual names and dtypes, and parts of an optimizer.

#include <torch/nn.h>
#include <torch/optim.h>

#include <safetensors_torch/optimizer.hpp>
#include <string>

#include "saved_adam.h"
#include "support.h"

using namespace support;
using Names = std::vector<std::string>;
namespace optim = torch::optim;

TEST(optimizer_prefix_that_begins_with_the_name_of_a_parameter) {
    SavedAdam saved;
    st::SaveOptimizerOptions options;
    options.prefix = "head.";
    st::save_optimizer(saved.optimizer, saved.layer, saved.dir.file("changed"), options);
    st::Tensors tensors = st::load_file(saved.dir.file("changed"));
    tensors.insert("param_groups.head.lr", at::zeros({}));  // of the parameter "head"
    tensors.insert("state.head.step", at::zeros({}));
    st::save_file(tensors, saved.dir.file("changed"));
    st::LoadModelOptions load;
    load.prefix = options.prefix;
    const st::LoadResult result = st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("changed"), load);
    EXPECT(result.unexpected.empty());
}

TEST(optimizer_options_that_a_kept_state_does_not_fit) {
    const TempDir dir;
    torch::nn::Linear layer(2, 3);
    const auto train = [&](optim::Optimizer& optimizer) {
        layer->forward(at::ones({1, 2})).sum().backward();
        optimizer.step();
    };
    const st::LoadModelOptions not_strict{/*strict=*/false};
    st::save_optimizer(optim::Adam({layer->weight}, optim::AdamOptions(0.5).amsgrad(true)), layer, dir.file("adam"));
    optim::Adam adam(layer->parameters(), optim::AdamOptions(0.25));
    train(adam);
    EXPECT_EQ(ERROR_OF(st::load_optimizer(adam, layer, dir.file("adam"), not_strict)),
              dir.file("adam") +
                  ": does not have \"bias\", whose state has no `max_exp_avg_sq`, which the loaded options of group 0 "
                  "need; give that parameter a group of its own");
    EXPECT_EQ(adam.param_groups()[0].options().get_lr(), 0.25);
    train(adam);

    st::save_optimizer(optim::RMSprop({layer->weight}, optim::RMSpropOptions(0.5).momentum(0.5)), layer,
                       dir.file("rmsprop"));
    optim::RMSprop rmsprop(layer->parameters(), optim::RMSpropOptions(0.25));
    // Without a state, a step makes one.
    EXPECT_EQ(st::load_optimizer(rmsprop, layer, dir.file("rmsprop"), not_strict).missing, (Names{"bias"}));
    train(rmsprop);
    // The state fits.
    st::load_optimizer(rmsprop, layer, dir.file("rmsprop"), not_strict);
    train(rmsprop);
    optim::RMSprop plain(layer->parameters(), optim::RMSpropOptions(0.25));
    train(plain);
    EXPECT_HAS(ERROR_OF(st::load_optimizer(plain, layer, dir.file("rmsprop"), not_strict)), "no `momentum_buffer`, ");
}

TEST(optimizer_loaded_in_inference_mode) {
    SavedAdam saved;
    {
        const c10::InferenceMode inference;
        st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("o"));
    }
    EXPECT(!saved.state(saved.layer->weight).exp_avg().is_inference());
    saved.optimizer.step();
    EXPECT_EQ(saved.state(saved.layer->weight).step(), 2);
}

TEST(optimizer_values_of_any_dtype) {
    SavedAdam saved;
    for (const Dtype& dtype : dtypes()) {
        if (std::string(dtype.code) == "F4") {
            continue;  // torch cannot convert it
        }
        const at::Tensor average = make({3, 2}, dtype.type);
        if (at::isFloatingType(dtype.type)) {
            st::save_file(saved.with("state.weight.exp_avg", average), saved.dir.file("changed"));
            st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("changed"));
            EXPECT(at::allclose(saved.state(saved.layer->weight).exp_avg(), average.to(at::kFloat), 0, 0,
                                /*equal_nan=*/true));
            st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("o"));
        } else {
            EXPECT_HAS(saved.error(saved.with("state.weight.exp_avg", average)), "and that of the parameter Float; ");
        }
        const st::Tensors changed = saved.with("state.weight.step", at::full({}, 2).to(dtype.type));
        if (at::isComplexType(dtype.type)) {
            EXPECT_HAS(saved.error(changed), "\"state.weight.step\": is ComplexFloat [], not one number; ");
            continue;
        }
        st::save_file(changed, saved.dir.file("changed"));
        st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("changed"));
        EXPECT_EQ(saved.state(saved.layer->weight).step(), dtype.type == at::kBool ? 1 : 2);
        st::load_optimizer(saved.optimizer, saved.layer, saved.dir.file("o"));
    }
}

TEST(optimizer_errors_show_texts_of_the_file_with_escapes) {
    SavedAdam saved;
    const std::string odd = "\x1b[31m\n\x7f\xc2\x9b\xe2\x80\xae\xf3\xa0\x80\x81\xc3\xa9";
    const std::string shown = "\\x1b[31m\\x0a\\x7f\\xc2\\x9b\\xe2\\x80\\xae\\xf3\\xa0\\x80\\x81\xc3\xa9";
    EXPECT_HAS(saved.error(saved.with("state." + odd + ".exp_avg", at::zeros({1}))),
               "unexpected: \"" + shown + "\"\npass");
    EXPECT_HAS(saved.error(saved.with("state.weight." + odd, at::zeros({1}))),
               "tensor \"state.weight." + shown + "\": Adam has no such state; ");
    EXPECT_HAS(saved.error(saved.tensors, {{"optimizer", odd}}), ": has the state of " + shown + ", not of Adam; ");
    const std::string text = saved.error(saved.with("state." + std::string(100000, 'x') + ".step", at::zeros({1})));
    EXPECT_HAS(text, "xxx... (100000 bytes)\"");
    EXPECT(text.size() < 1000);
    st::save_file({{"x", at::zeros({1})}}, saved.dir.file("a\x1b"
                                                          "b"));
    EXPECT_HAS(ERROR_OF(st::load_optimizer(saved.optimizer, saved.layer,
                                           saved.dir.file("a\x1b"
                                                          "b"))),
               "/a\\x1bb: not the");
}
