// Continues a text with a GPT-2 model that Hugging Face's transformers saved: prints the most likely next tokens.
//
// Build:  cmake -S examples/cpp/inference -B BUILD -DCMAKE_PREFIX_PATH=PREFIX -DLIBTORCH=TORCH && cmake --build BUILD
// Run:    BUILD/inference MODEL 464,3290,318 --new 20                 prints 20 tokens
//         BUILD/inference MODEL 464,3290,318 --logits OUT.safetensors
//
// MODEL: the directory that save_pretrained wrote, a model.safetensors, or the index of a sharded model. PREFIX: the
// prefix of `make install`. TORCH: an unpacked libtorch, or the directory of the Python package torch.
//
// Calls the same operators as transformers with attn_implementation="eager", in the same order and on one thread, so
// the logits are equal to the last bit.

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>
#include <getopt.h>
#include <torch/nn/modules/container/modulelist.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/normalization.h>

#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <limits>
#include <memory>
#include <safetensors_torch.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace {

namespace nn = torch::nn;

struct Config {
    std::int64_t vocabulary, context, width, layers, heads;
};

// The keys and values of the tokens so far, in one layer.
struct Cache {
    at::Tensor keys, values;
};

// Modules and parameters have the names of transformers, so load_model needs no renaming.

// A linear layer whose weight is [in, out].
struct Conv1D : nn::Module {
    Conv1D(std::int64_t in, std::int64_t out)
        : weight(register_parameter("weight", at::empty({in, out}), /*requires_grad=*/false)),
          bias(register_parameter("bias", at::empty({out}), /*requires_grad=*/false)) {}

    at::Tensor forward(const at::Tensor& x) const {
        return at::addmm(bias, x.view({-1, x.size(-1)}), weight).view({x.size(0), x.size(1), weight.size(1)});
    }

    at::Tensor weight, bias;
};

struct Attention : nn::Module {
    explicit Attention(const Config& config)
        : c_attn(register_module("c_attn", std::make_shared<Conv1D>(config.width, 3 * config.width))),
          c_proj(register_module("c_proj", std::make_shared<Conv1D>(config.width, config.width))),
          head_width(config.width / config.heads) {}

    at::Tensor forward(const at::Tensor& x, const at::Tensor& mask, Cache& cache) const {
        const std::vector<at::Tensor> qkv = c_attn->forward(x).split(x.size(2), 2);
        cache.keys = append(cache.keys, by_head(qkv[1]));
        cache.values = append(cache.values, by_head(qkv[2]));
        const double scale = std::pow(static_cast<double>(head_width), -0.5);
        const at::Tensor scores = at::matmul(by_head(qkv[0]), cache.keys.transpose(-1, -2)) * scale + mask;
        const at::Tensor y = at::matmul(at::softmax(scores, -1), cache.values);
        return c_proj->forward(y.transpose(1, 2).reshape(x.sizes()));
    }

    at::Tensor by_head(const at::Tensor& part) const {
        return part.view({part.size(0), part.size(1), -1, head_width}).transpose(1, 2);
    }

    static at::Tensor append(const at::Tensor& past, const at::Tensor& now) {
        return past.defined() ? at::cat({past, now}, -2) : now.contiguous();
    }

    std::shared_ptr<Conv1D> c_attn, c_proj;
    std::int64_t head_width;
};

struct MLP : nn::Module {
    explicit MLP(const Config& config)
        : c_fc(register_module("c_fc", std::make_shared<Conv1D>(config.width, 4 * config.width))),
          c_proj(register_module("c_proj", std::make_shared<Conv1D>(4 * config.width, config.width))) {}

    at::Tensor forward(const at::Tensor& x) const { return c_proj->forward(gelu(c_fc->forward(x))); }

    // The tanh approximation as transformers computes it: at::gelu(x, "tanh") may differ in the last bit.
    static at::Tensor gelu(const at::Tensor& x) {
        return 0.5 * x * (1.0 + at::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * at::pow(x, 3.0))));
    }

    std::shared_ptr<Conv1D> c_fc, c_proj;
};

struct Block : nn::Module {
    explicit Block(const Config& config)
        : ln_1(register_module("ln_1", nn::LayerNorm(nn::LayerNormOptions({config.width})))),
          attn(register_module("attn", std::make_shared<Attention>(config))),
          ln_2(register_module("ln_2", nn::LayerNorm(nn::LayerNormOptions({config.width})))),
          mlp(register_module("mlp", std::make_shared<MLP>(config))) {}

    at::Tensor forward(const at::Tensor& input, const at::Tensor& mask, Cache& cache) {
        const at::Tensor x = attn->forward(ln_1(input), mask, cache) + input;
        return x + mlp->forward(ln_2(x));
    }

    nn::LayerNorm ln_1;
    std::shared_ptr<Attention> attn;
    nn::LayerNorm ln_2;
    std::shared_ptr<MLP> mlp;
};

struct GPT2 : nn::Module {
    explicit GPT2(const Config& config)
        : wte(register_module("wte", embedding(config.vocabulary, config.width))),
          wpe(register_module("wpe", embedding(config.context, config.width))),
          h(register_module("h", nn::ModuleList())),
          ln_f(register_module("ln_f", nn::LayerNorm(nn::LayerNormOptions({config.width})))),
          cache(config.layers) {
        for (std::int64_t layer = 0; layer < config.layers; ++layer) {
            h->push_back(std::make_shared<Block>(config));
        }
    }

    // Not nn::Embedding, which would initialize the weights that load_model overwrites.
    static nn::Embedding embedding(std::int64_t count, std::int64_t width) {
        return nn::Embedding::from_pretrained(at::empty({count, width}));
    }

    // Returns the output of the last layer for tokens that continue those of the last call.
    at::Tensor forward(const at::Tensor& tokens) {
        const std::int64_t count = tokens.size(1), past = cache[0].keys.defined() ? cache[0].keys.size(-2) : 0;
        const at::Tensor mask = at::full({count, past + count}, std::numeric_limits<float>::lowest()).triu(past + 1);
        at::Tensor x = wte(tokens) + wpe(at::arange(past, past + count).unsqueeze(0));
        for (std::size_t layer = 0; layer < cache.size(); ++layer) {
            x = h->ptr<Block>(layer)->forward(x, mask, cache[layer]);
        }
        return ln_f(x);
    }

    // Returns a score for each token of the vocabulary. GPT-2 ties this weight to its embedding.
    at::Tensor logits(const at::Tensor& x) const { return at::linear(x, wte->weight); }

    nn::Embedding wte, wpe;
    nn::ModuleList h;
    nn::LayerNorm ln_f;
    std::vector<Cache> cache;
};

// Loads a GPT-2 from the checkpoint at `path`. Its shapes define the size of the model, except for the number of heads:
// 0 means heads of the usual width, 64.
std::shared_ptr<GPT2> load(const std::string& path, std::int64_t heads) {
    const safetensors_torch::Checkpoint checkpoint(path);
    safetensors_torch::LoadModelOptions options;
    // Checkpoints of a GPT2Model have no prefix, and no other tensors.
    options.prefix = checkpoint.contains("transformer.wte.weight") ? "transformer." : "";
    const auto shape = [&](const std::string& name) { return checkpoint.shape(options.prefix + name); };

    Config config{shape("wte.weight").at(0), shape("wpe.weight").at(0), shape("wte.weight").at(1), 0, heads};
    while (checkpoint.contains(options.prefix + "h." + std::to_string(config.layers) + ".ln_1.weight")) {
        ++config.layers;
    }
    config.heads = heads != 0 ? heads : config.width / 64;
    if (config.layers == 0 || config.heads == 0 || config.width % config.heads != 0) {
        throw std::runtime_error(path + ": no GPT-2 of " + std::to_string(config.layers) + " layers of " +
                                 std::to_string(config.width) + ", with " + std::to_string(config.heads) +
                                 " heads: see --heads, and n_head in config.json");
    }
    if (checkpoint.contains("lm_head.weight") &&
        !at::equal(checkpoint.get_tensor("lm_head.weight"), checkpoint.get_tensor(options.prefix + "wte.weight"))) {
        throw std::runtime_error(path + ": lm_head.weight is not wte.weight, as it is in a GPT-2");
    }

    auto model = std::make_shared<GPT2>(config);
    // Old files also contain the causal masks (h.0.attn.bias), which are not weights.
    options.strict = false;
    const safetensors_torch::LoadResult result = safetensors_torch::load_model(*model, path, options);
    if (!result.missing.empty()) {
        throw std::runtime_error(path + ": no tensor " + result.missing.front());
    }
    model->eval();
    return model;
}

struct Arguments {
    std::string model, logits;
    std::vector<std::int64_t> tokens;
    std::int64_t count = 1, heads = 0;
};

void run(const Arguments& arguments) {
    // The order of a summation may depend on the number of threads.
    at::set_num_threads(1);
    const c10::InferenceMode inference;
    const std::shared_ptr<GPT2> model = load(arguments.model, arguments.heads);
    const std::int64_t context = model->wpe->weight.size(0);
    if (static_cast<std::int64_t>(arguments.tokens.size()) + arguments.count > context) {
        throw std::runtime_error("the model has room for " + std::to_string(context) + " tokens, old and new");
    }

    at::Tensor x = model->forward(at::tensor(arguments.tokens).unsqueeze(0));
    safetensors_torch::Tensors out;
    out.insert("prompt_logits", model->logits(x)[0]);
    std::vector<at::Tensor> logits, tokens;
    for (std::int64_t i = 0; i < arguments.count; ++i) {
        logits.push_back(model->logits(x.slice(1, -1))[0]);
        tokens.push_back(logits.back().argmax(-1));
        std::printf("%s%lld", i == 0 ? "" : ",", static_cast<long long>(tokens.back().item<std::int64_t>()));
        if (i + 1 < arguments.count) {
            x = model->forward(tokens.back().unsqueeze(0));
        }
    }
    std::printf("\n");
    out.insert("logits", at::cat(logits));
    out.insert("tokens", at::cat(tokens));
    if (!arguments.logits.empty()) {
        safetensors_torch::save_file(out, arguments.logits);
    }
}

// Parses numbers separated by commas. Returns an empty vector if one is invalid or less than `least`.
std::vector<std::int64_t> numbers(std::string_view text, std::int64_t least) {
    std::vector<std::int64_t> result;
    const char* const end = text.data() + text.size();
    for (const char* begin = text.data();; ++begin) {
        std::int64_t number;
        const auto [stop, error] = std::from_chars(begin, end, number);
        if (error != std::errc() || number < least || (stop != end && *stop != ',')) {
            return {};
        }
        result.push_back(number);
        if (stop == end) {
            return result;
        }
        begin = stop;
    }
}

bool parse(int argc, char** argv, Arguments& arguments) {
    static const option options[] = {{"new", required_argument, nullptr, 'n'},
                                     {"heads", required_argument, nullptr, 'h'},
                                     {"logits", required_argument, nullptr, 'l'},
                                     {}};
    for (int found; (found = getopt_long(argc, argv, "", options, nullptr)) != -1;) {
        if (found == 'l') {
            arguments.logits = optarg;
            continue;
        }
        const std::vector<std::int64_t> value = found == '?' ? std::vector<std::int64_t>{} : numbers(optarg, 1);
        if (value.size() != 1) {
            return false;
        }
        (found == 'n' ? arguments.count : arguments.heads) = value[0];
    }
    if (argc - optind != 2) {
        return false;
    }
    arguments.model = argv[optind];
    arguments.tokens = numbers(argv[optind + 1], 0);
    return !arguments.tokens.empty();
}

}  // namespace

int main(int argc, char** argv) {
    Arguments arguments;
    if (!parse(argc, argv, arguments)) {
        std::fprintf(stderr, "usage: %s MODEL TOKEN[,TOKEN...] [--new COUNT] [--heads COUNT] [--logits FILE]\n",
                     argv[0]);
        return 2;
    }
    try {
        run(arguments);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "inference: %s\n", error.what());
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
