// Tests of safetensors_torch/aoti.hpp with the packages that tests/examples/test_aoti.py compiles.

#include <ATen/Parallel.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <safetensors_torch.hpp>
#include <safetensors_torch/aoti.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "support.h"

namespace {

namespace st = safetensors_torch;
using Loader = torch::inductor::AOTIModelPackageLoader;

std::string package_path(const std::string& name) { return std::string(std::getenv("AOTI_PACKAGES")) + "/" + name; }

at::Tensor input() { return at::arange(8, at::kFloat).reshape({2, 4}); }

// whole.pt2: has weights, and folds 2 * matrix, whose strides are those of a transposed tensor.
st::Tensors whole_state(double value) {
    st::Tensors state;
    state["matrix"] = at::arange(12, at::kFloat).reshape({4, 3}) * value;
    state["bn.weight"] = at::full({3}, value);
    state["bn.bias"] = at::arange(3, at::kFloat) + value;
    state["bn.running_mean"] = at::full({3}, 0.5);
    state["bn.running_var"] = at::full({3}, 4.0);
    state["bn.num_batches_tracked"] = at::tensor(7);
    return state;
}

at::Tensor whole_result(const st::Tensors& state) {
    const at::Tensor x = input().matmul(state["matrix"] * 2);
    const at::Tensor normal =
        (x - state["bn.running_mean"]) / (state["bn.running_var"] + 1e-5).sqrt() * state["bn.weight"] +
        state["bn.bias"];
    return normal + at::arange(3) * 10 + at::tensor({1.0, 2.0, 3.0});
}

st::LoadConstantsOptions whole_options() {
    st::LoadConstantsOptions options;
    options.optional = [](const std::string& name) { return name == "freq"; };
    return options;
}

// bare.pt2: has no weights; up.weight and down.weight are tied.
st::Tensors bare_state(double value, const std::string& tied = "up.weight") {
    st::Tensors state;
    state[tied] = at::arange(12, at::kFloat).reshape({3, 4}) * value;
    state["up.bias"] = at::full({3}, value);
    state["offset"] = at::arange(4, at::kFloat);
    return state;
}

at::Tensor bare_result(const st::Tensors& state) {
    const at::Tensor& weight = state["up.weight"];
    return (input().matmul(weight.t()) + state["up.bias"]).matmul(weight) + state["offset"];
}

template <typename Package>
at::Tensor run(Package& package) {
    return package.run({input()}).at(0);
}

bool close(const at::Tensor& a, const at::Tensor& b) { return at::allclose(a.to(at::kDouble), b.to(at::kDouble)); }

// The name that the package has for its tied constant.
std::string tied_name(Loader& package) {
    for (const std::string& name : package.get_constant_fqns()) {
        if (name == "down.weight") {
            return name;
        }
    }
    return "up.weight";
}

st::Tensors bare_tensors(Loader& package, double value) { return bare_state(value, tied_name(package)); }

// Tensors whose memory counts when it is freed.
st::Tensors counted(const st::Tensors& tensors, std::atomic<int>& freed) {
    st::Tensors result;
    for (const auto& [name, tensor] : tensors) {
        const at::Tensor copy = tensor.clone();
        result[name] = at::from_blob(
            copy.data_ptr(), copy.sizes(), copy.strides(), [copy, &freed](void*) { ++freed; }, copy.options());
    }
    return result;
}

TEST(a_package_without_weights_gets_them_from_a_file) {
    const support::TempDir directory;
    for (const double value : {1.0, -2.0}) {
        const st::Tensors state = bare_state(value);
        st::save_file(state, directory.file("model.safetensors"), {{"down.weight", "up.weight"}});
        st::PackageLoader package(package_path("bare.pt2"));
        for (int i = 0; i < 3; ++i) {
            const st::LoadResult result = st::load_constants(package, directory.file("model.safetensors"));
            EXPECT(result.missing.empty() && result.unexpected.empty());
            EXPECT(close(run(package), bare_result(state)));
        }
    }
}

TEST(either_of_two_tied_names_will_do_if_the_metadata_tells) {
    const support::TempDir directory;
    const std::string path = directory.file("model.safetensors");
    st::PackageLoader package(package_path("bare.pt2"));
    for (const std::string kept : {"up.weight", "down.weight"}) {
        const std::string dropped = kept == "up.weight" ? "down.weight" : "up.weight";
        st::save_file(bare_state(3.0, kept), path, {{dropped, kept}});
        st::load_constants(package, path);
        EXPECT(close(run(package), bare_result(bare_state(3.0))));
        st::save_file(bare_state(3.0, kept), path);
        if (kept != tied_name(package)) {
            EXPECT_HAS(ERROR_OF(st::load_constants(package, path)), "Missing key(s) in state_dict: \"" + dropped);
        }
    }
}

TEST(prefix_rename_and_shards_of_constants) {
    const support::TempDir directory;
    st::PackageLoader package(package_path("bare.pt2"));
    st::Tensors state;
    for (const auto& [name, tensor] : bare_tensors(package, 2.0)) {
        state["model." + (name == "offset" ? "shift" : name)] = tensor;
    }
    state["optimizer.step"] = at::ones({1});
    st::ShardedSaveOptions sharded;
    sharded.max_shard_size = 32;
    st::save_sharded(state, directory.file("sharded"), {}, sharded);
    st::LoadConstantsOptions options;
    options.prefix = "model.";
    options.rename = [](const std::string& name) { return name == "offset" ? "shift" : name; };
    st::load_constants(package, directory.file("sharded"), options);
    EXPECT(close(run(package), bare_result(bare_state(2.0))));
    options.prefix = "";
    EXPECT_HAS(ERROR_OF(st::load_constants(package, directory.file("sharded"), options)), "optimizer.step");
}

// Files in memory.
class Memory : public st::Source {
  public:
    explicit Memory(std::string bytes) : bytes_(std::move(bytes)) {}
    std::uint64_t length() override { return bytes_.size(); }
    void read(std::uint64_t offset, const sft_buffer* buffers, std::size_t count) override {
        for (std::size_t i = 0; i < count; ++i) {
            bytes_.copy(static_cast<char*>(buffers[i].data), buffers[i].nbytes, offset);
            offset += buffers[i].nbytes;
        }
    }

  private:
    std::string bytes_;
};

class Bucket : public st::Filesystem {
  public:
    explicit Bucket(std::string bytes) : bytes_(std::move(bytes)) {}
    std::shared_ptr<st::Source> open(const std::string&) override { return std::make_shared<Memory>(bytes_); }

  private:
    std::string bytes_;
};

TEST(constants_of_a_filesystem_of_the_program) {
    st::PackageLoader package(package_path("bare.pt2"));
    Bucket bucket(st::save(bare_tensors(package, 2.0)));
    st::load_constants(package, bucket, "bucket/model.safetensors");
    EXPECT(close(run(package), bare_result(bare_state(2.0))));
}

// strided.pt2: has no weights; its matrix has the strides of a transposed tensor, which it does not tell.
TEST(strides_of_the_first_tensors_are_kept) {
    const support::TempDir directory;
    const std::string path = directory.file("model.safetensors");
    st::PackageLoader package(package_path("strided.pt2"));
    for (const double value : {1.0, 2.0, 3.0}) {
        const at::Tensor matrix = at::arange(12, at::kFloat).reshape({4, 3}) * value;
        st::save_file({{"matrix", matrix}}, path);
        if (value == 1.0) {
            st::load_constants(package, {{"matrix", matrix.t().contiguous().t()}});
        } else if (value == 2.0) {
            st::load_constants(package, path);
        } else {
            st::load_constants(package, {{"matrix", matrix}});
        }
        EXPECT(close(run(package), input().matmul(matrix)));
    }
}

TEST(two_constants_can_have_one_tensor) {
    const support::TempDir directory;
    st::PackageLoader package(package_path("whole.pt2"));
    st::Tensors state = whole_state(2.0);
    st::LoadConstantsOptions options = whole_options();
    options.rename = [](const std::string& name) { return name == "bn.running_mean" ? "bn.weight" : name; };
    state["bn.running_mean"] = state["bn.weight"].clone();
    const at::Tensor expected = whole_result(state);
    state.erase("bn.running_mean");
    st::save_file(state, directory.file("model.safetensors"));
    for (const bool is_file : {true, false}) {
        st::load_constants(package, whole_state(1.0), whole_options());
        if (is_file) {
            st::load_constants(package, directory.file("model.safetensors"), options);
        } else {
            st::load_constants(package, state, options);
        }
        EXPECT(close(run(package), expected));
    }
}

TEST(another_dtype_or_shape_is_refused_before_anything_changes) {
    const support::TempDir directory;
    const std::string path = directory.file("model.safetensors");
    st::PackageLoader package(package_path("bare.pt2"));
    const std::string tied = tied_name(package);
    for (const bool is_first : {true, false}) {
        st::Tensors state = bare_tensors(package, 2.0);
        state["up.bias"] = state["up.bias"].to(at::kHalf);
        state[tied] = state[tied].t().contiguous();
        st::save_file(state, path);
        st::LoadConstantsOptions options;
        for (const bool strict : {true, false}) {
            options.strict = strict;
            const std::string error = ERROR_OF(st::load_constants(package, path, options));
            EXPECT_HAS(error, path + ": 2 tensor(s) do not fit");
            EXPECT_HAS(error, "\"up.bias\": Half [3] on cpu; compiled for Float [3] on cpu");
            EXPECT_HAS(error, "\"" + tied + "\": Float [4, 3] on cpu; compiled for Float [3, 4] on cpu");
            EXPECT_HAS(error, "LoadConstantsOptions::convert");
            EXPECT_EQ(ERROR_OF(st::load_constants(package, state, options)).substr(0, 7), "tensors");
        }
        options.strict = true;
        options.convert = true;
        EXPECT_HAS(ERROR_OF(st::load_constants(package, path, options)), "[4, 3]");
        if (!is_first) {
            EXPECT(close(run(package), bare_result(bare_state(1.0))));
        }
        state[tied] = state[tied].t().contiguous();
        st::save_file(state, path);
        st::load_constants(package, path, options);
        EXPECT(close(run(package), bare_result(bare_state(2.0))));
        st::load_constants(package, state, options);
        EXPECT(close(run(package), bare_result(bare_state(2.0))));
        state["offset"] = at::arange(4);
        EXPECT_HAS(ERROR_OF(st::load_constants(package, state, options)), "Long [4] on cpu; compiled for Float [4]");
        st::load_constants(package, bare_tensors(package, 1.0));
    }
}

TEST(tensors_on_another_device_are_refused) {
    st::PackageLoader package(package_path("bare.pt2"));
    st::Tensors state = bare_tensors(package, 2.0);
    state["offset"] = state["offset"].to(at::kMeta);
    EXPECT_HAS(ERROR_OF(st::load_constants(package, state)),
               "\"offset\": Float [4] on meta; compiled for Float [4] on cpu");
    state["offset"] = at::Tensor();
    EXPECT_HAS(ERROR_OF(st::load_constants(package, state)), "tensor \"offset\": undefined");
}

TEST(missing_and_unexpected_constants) {
    const support::TempDir directory;
    const std::string path = directory.file("model.safetensors");
    st::PackageLoader package(package_path("bare.pt2"));
    st::Tensors state = bare_tensors(package, 2.0);
    state.erase("offset");
    state["extra"] = at::ones({1});
    st::save_file(state, path);
    st::LoadConstantsOptions options;
    for (const bool strict : {true, false}) {
        options.strict = strict;
        EXPECT_HAS(ERROR_OF(st::load_constants(package, path, options)), "\"offset\"");
        EXPECT_HAS(ERROR_OF(st::load_constants(package, state, options)), "\"offset\"");
    }
    // Now the package has values.
    st::load_constants(package, bare_tensors(package, 1.0));
    for (int i = 0; i < 4; ++i) {
        options.strict = false;
        const st::LoadResult result =
            i % 2 == 0 ? st::load_constants(package, path, options) : st::load_constants(package, state, options);
        EXPECT_EQ(result.missing, std::vector<std::string>{"offset"});
        EXPECT_EQ(result.unexpected, std::vector<std::string>{"extra"});
        EXPECT(close(run(package), bare_result(bare_state(2.0))));
        options.strict = true;
        for (const std::string& error : {ERROR_OF(st::load_constants(package, path, options)),
                                         ERROR_OF(st::load_constants(package, state, options))}) {
            EXPECT_HAS(error, "Missing key(s) in state_dict: \"offset\"");
            EXPECT_HAS(error, "Unexpected key(s) in state_dict: \"extra\"");
        }
    }
}

TEST(folded_constants_and_strides_and_tensors_of_the_program) {
    const support::TempDir directory;
    const std::string path = directory.file("model.safetensors");
    for (const bool is_single_threaded : {false, true}) {
        st::PackageLoader package(package_path("whole.pt2"), "model", is_single_threaded);
        for (const double value : {2.0, -1.0, 0.5, 3.0}) {
            const st::Tensors state = whole_state(value);
            st::save_file(state, path);
            EXPECT_HAS(ERROR_OF(st::load_constants(package, path)), "Missing key(s) in state_dict: \"freq\"");
            EXPECT_HAS(ERROR_OF(st::load_constants(package, state)), "Missing key(s) in state_dict: \"freq\"");
            const st::LoadResult result = value > 0 ? st::load_constants(package, path, whole_options())
                                                    : st::load_constants(package, state, whole_options());
            EXPECT(result.missing.empty() && result.unexpected.empty());
            EXPECT(close(run(package), whole_result(state)));
        }
    }
}

TEST(tensors_of_the_program_cannot_be_swapped) {
    st::PackageLoader package(package_path("whole.pt2"));
    st::Tensors state = whole_state(2.0);
    for (const std::string& name : package.get_constant_fqns()) {
        if (name.find("_tensor_constant") == 0) {
            state[name] = at::ones({3});
        }
    }
    EXPECT_EQ(state.size(), std::size_t{7});
    EXPECT_HAS(ERROR_OF(st::load_constants(package, state, whole_options())), "make a new AOTIModelPackageLoader");
    state[state.keys().back()] = at::tensor({1.0F, 2.0F, 3.0F});
    st::load_constants(package, state, whole_options());
    EXPECT(close(run(package), whole_result(state)));
}

TEST(an_exception_before_the_swap_keeps_the_constants) {
    for (const std::string name : {"bare.pt2", "whole.pt2"}) {
        st::PackageLoader package(package_path(name));
        const auto state = [&](double value) {
            return name == "bare.pt2" ? bare_tensors(package, value) : whole_state(value);
        };
        st::load_constants(package, state(1.0), whole_options());
        const at::Tensor before = run(package);
        st::LoadConstantsOptions options = whole_options();
        options.before_swap = [&] {
            EXPECT(at::equal(run(package), before));
            throw std::runtime_error("not now");
        };
        std::atomic<int> freed{0};
        for (int i = 0; i < 2; ++i) {
            try {
                st::load_constants(package, counted(state(2.0), freed), options);
                EXPECT(false);
            } catch (const std::runtime_error& error) {
                EXPECT_EQ(std::string(error.what()), "not now");
            }
            EXPECT(at::equal(run(package), before));
        }
        EXPECT_EQ(freed.load(), static_cast<int>(2 * state(2.0).size()));
        st::load_constants(package, state(2.0), whole_options());
        EXPECT(!at::equal(run(package), before));
    }
}

TEST(constants_are_freed_when_they_are_replaced) {
    for (const bool is_single_threaded : {false, true}) {
        std::atomic<int> first{0}, second{0};
        {
            st::PackageLoader package(package_path("bare.pt2"), "model", is_single_threaded);
            const int count = static_cast<int>(bare_tensors(package, 1.0).size());
            st::load_constants(package, counted(bare_tensors(package, 1.0), first));
            EXPECT(close(run(package), bare_result(bare_state(1.0))));
            EXPECT_EQ(first.load(), 0);
            st::load_constants(package, counted(bare_tensors(package, 2.0), second));
            EXPECT_EQ(first.load(), count);
            EXPECT(close(run(package), bare_result(bare_state(2.0))));
            EXPECT_EQ(second.load(), 0);
            // The tensors of the package itself, whose memory it frees.
            const auto extracted = package.get_runner()->extract_constants_map(false);
            st::load_constants(package, extracted);
            EXPECT_EQ(second.load(), count);
            EXPECT(close(run(package), bare_result(bare_state(2.0))));
        }
        EXPECT_EQ(first.load(), second.load());
    }
    std::atomic<int> freed{0};
    {
        st::PackageLoader package(package_path("bare.pt2"));
        st::load_constants(package, counted(bare_tensors(package, 1.0), freed));
        EXPECT_EQ(freed.load(), 0);
    }
    EXPECT_EQ(freed.load(), 3);
}

TEST(weights_of_the_package_can_be_replaced_by_its_own) {
    Loader package(package_path("whole.pt2"));
    const at::Tensor before = run(package);
    for (int i = 0; i < 3; ++i) {
        st::load_constants(package, package.get_runner()->extract_constants_map(false));
        EXPECT(at::equal(run(package), before));
    }
}

// Serves on several threads while the constants change; each answer is of one set or the other.
void serve(const std::string& name, std::size_t runners) {
    st::PackageLoader package(package_path(name), "model", false, runners);
    const bool is_bare = name == "bare.pt2";
    std::vector<st::Tensors> states;
    std::vector<at::Tensor> results;
    for (const double value : {1.0, 2.0}) {
        states.push_back(is_bare ? bare_tensors(package, value) : whole_state(value));
        st::load_constants(package, states.back(), whole_options());
        results.push_back(run(package));
    }
    std::atomic<bool> is_stopped{false};
    std::atomic<int> wrong{0};
    std::atomic<int> counts[2] = {{0}, {0}};
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] {
            while (!is_stopped) {
                const at::Tensor result = run(package);
                const bool is_first = at::equal(result, results[0]);
                ++(is_first ? counts[0] : at::equal(result, results[1]) ? counts[1] : wrong);
            }
        });
    }
    for (int i = 0; i < 40; ++i) {
        st::load_constants(package, states[i % 2], whole_options());
        const int before = counts[i % 2];
        while (counts[i % 2] == before && wrong == 0) {
            std::this_thread::yield();
        }
    }
    is_stopped = true;
    for (std::thread& thread : threads) {
        thread.join();
    }
    EXPECT_EQ(wrong.load(), 0);
    EXPECT(at::equal(run(package), results[1]));
}

TEST(threads_run_while_constants_change) {
    for (const std::size_t runners : {1, 3}) {
        serve("bare.pt2", runners);
        serve("whole.pt2", runners);
    }
}

}  // namespace
