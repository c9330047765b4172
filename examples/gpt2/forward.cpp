// Runs the model of make_model.py in C++, and writes it again.
//
// Build:  cmake -S examples/gpt2 -B BUILD -DCMAKE_PREFIX_PATH=PREFIX -DLIBTORCH=TORCH && cmake --build BUILD
// Run:    BUILD/forward DIRECTORY        (after make_model.py DIRECTORY)
//
// Reads DIRECTORY/model.safetensors and DIRECTORY/reference.safetensors, and writes DIRECTORY/from_cpp.safetensors.
// Calls the same operators in the same order as make_model.py, so the logits must be equal to the last bit: otherwise
// the exit status is not 0.

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <filesystem>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>

#include "safetensors_torch.hpp"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// The weights by name. A tied weight is in the file once; the metadata maps its other names to that one.
class Weights {
  public:
    Weights(safetensors_torch::Tensors tensors, safetensors_torch::Metadata metadata)
        : tensors_(std::move(tensors)), metadata_(std::move(metadata)) {}

    at::Tensor operator()(const std::string& name) const {
        return tensors_.at(tensors_.contains(name) ? name : entry(name));
    }

    at::Tensor linear(const at::Tensor& x, const std::string& module) const {
        return at::linear(x, (*this)(module + ".weight"), (*this)(module + ".bias"));
    }

    at::Tensor layer_norm(const at::Tensor& x, const std::string& module) const {
        const at::Tensor weight = (*this)(module + ".weight");
        return at::layer_norm(x, weight.sizes(), weight, (*this)(module + ".bias"));
    }

    std::int64_t heads() const { return std::stoll(entry("n_head")); }

    std::int64_t layers() const {
        std::int64_t count = 0;
        while (tensors_.contains("h." + std::to_string(count) + ".ln_1.weight")) ++count;
        return count;
    }

  private:
    const std::string& entry(const std::string& key) const {
        const auto found = metadata_.find(key);
        if (found == metadata_.end()) throw std::runtime_error("the file has no " + key);
        return found->second;
    }

    safetensors_torch::Tensors tensors_;
    safetensors_torch::Metadata metadata_;
};

at::Tensor attention(const Weights& weights, const at::Tensor& x, const std::string& module) {
    const std::int64_t width = x.size(2);
    const std::int64_t heads = weights.heads();
    const auto qkv = weights.linear(x, module + ".c_attn").split(width, 2);
    const auto by_head = [&](const at::Tensor& part) {
        return part.view({x.size(0), x.size(1), heads, width / heads}).transpose(1, 2);
    };
    const at::Tensor y = at::scaled_dot_product_attention(by_head(qkv[0]), by_head(qkv[1]), by_head(qkv[2]),
                                                          /*attn_mask=*/{}, /*dropout_p=*/0.0, /*is_causal=*/true);
    return weights.linear(y.transpose(1, 2).reshape(x.sizes()), module + ".c_proj");
}

at::Tensor mlp(const Weights& weights, const at::Tensor& x, const std::string& module) {
    return weights.linear(at::gelu(weights.linear(x, module + ".c_fc"), "tanh"), module + ".c_proj");
}

at::Tensor forward(const Weights& weights, const at::Tensor& tokens) {
    const at::Tensor positions = at::arange(tokens.size(1), at::kLong);
    at::Tensor x = at::embedding(weights("wte.weight"), tokens) + at::embedding(weights("wpe.weight"), positions);
    const std::int64_t layers = weights.layers();
    for (std::int64_t layer = 0; layer < layers; ++layer) {
        const std::string block = "h." + std::to_string(layer);
        x = x + attention(weights, weights.layer_norm(x, block + ".ln_1"), block + ".attn");
        x = x + mlp(weights, weights.layer_norm(x, block + ".ln_2"), block + ".mlp");
    }
    return at::linear(weights.layer_norm(x, "ln_f"), weights("lm_head.weight"));
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
    return a.dtype() == b.dtype() && a.sizes() == b.sizes() && a.is_contiguous() && b.is_contiguous() &&
           std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

// Prints one line for a step, in the columns of make_model.py.
void report(const char* call, const std::string& what, double size, double seconds) {
    char megabytes[32], duration[32];
    std::snprintf(megabytes, sizeof megabytes, "%.1f MB", size / 1e6);
    if (seconds >= 1) {
        std::snprintf(duration, sizeof duration, "%.2f s", seconds);
    } else {
        std::snprintf(duration, sizeof duration, "%.*f ms", seconds < 0.1 ? 1 : 0, seconds * 1e3);
    }
    std::printf("%-8s%-14s%-62s%9s%9s\n", "C++", call, what.c_str(), megabytes, duration);
    std::fflush(stdout);
}

int run(const std::filesystem::path& directory) {
    const std::string model = directory / "model.safetensors";
    const std::string reference = directory / "reference.safetensors";
    const std::string written = directory / "from_cpp.safetensors";
    // As in make_model.py: the order of a summation may depend on the number of threads.
    at::set_num_threads(1);
    const c10::InferenceMode inference;

    auto start = Clock::now();
    const auto tensors = safetensors_torch::load_file(model);
    double elapsed = seconds_since(start);
    const auto size = static_cast<double>(std::filesystem::file_size(model));
    report("load_file", "model.safetensors, mapped: " + std::to_string(tensors.size()) + " tensors", size, elapsed);

    start = Clock::now();
    const auto expected = safetensors_torch::load_file(reference);
    elapsed = seconds_since(start);
    report("load_file", "reference.safetensors: Python's tokens and logits",
           static_cast<double>(std::filesystem::file_size(reference)), elapsed);

    const auto metadata = safetensors_torch::File(model).metadata();
    const Weights weights(tensors, metadata);
    const at::Tensor tokens = expected.at("tokens");
    start = Clock::now();
    const at::Tensor logits = forward(weights, tokens);
    elapsed = seconds_since(start);
    report("forward",
           std::to_string(weights.layers()) + " layers, " + std::to_string(tokens.numel()) + " tokens, " +
               std::to_string(at::get_num_threads()) + " thread",
           static_cast<double>(logits.nbytes()), elapsed);

    start = Clock::now();
    const at::Tensor python = expected.at("logits");
    if (logits.sizes() != python.sizes()) throw std::runtime_error("the shape of the logits differs from Python's");
    const double difference = (logits - python).abs().max().item<double>();
    const bool equal = same_bits(logits, python);
    elapsed = seconds_since(start);
    char verdict[96];
    std::snprintf(verdict, sizeof verdict, "logits and Python's: max |difference| = %g, %s", difference,
                  equal ? "bit for bit equal" : "NOT EQUAL");
    report("compare", verdict, static_cast<double>(logits.nbytes()), elapsed);
    if (!equal) return 1;

    start = Clock::now();
    safetensors_torch::save_file(tensors, written, metadata);
    elapsed = seconds_since(start);
    report("save_file", "from_cpp.safetensors: the same tensors and metadata",
           static_cast<double>(std::filesystem::file_size(written)), elapsed);
    return 0;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s DIRECTORY\n", argv[0]);
        return 2;
    }
    try {
        return run(argv[1]);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
}
