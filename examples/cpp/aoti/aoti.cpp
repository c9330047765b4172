// Serves a GPT that AOTInductor has compiled without weights: loads its weights, and replaces them while it serves.
//
// Build:  cmake -S examples/cpp/aoti -B BUILD -DCMAKE_PREFIX_PATH=PREFIX -DLIBTORCH=TORCH && cmake --build BUILD
// Run:    python examples/cpp/aoti/make_package.py DIRECTORY
//         BUILD/aoti DIRECTORY [DEVICE]
//
// PREFIX: the prefix of `make install`. TORCH: an unpacked libtorch, or the directory of the Python package torch.
// DEVICE: loads the first weights to this device, and then hands the tensors to the package.
//
// Two threads serve. The exit status is not 0 unless every answer equals Python's to the last bit, with the first
// weights or with the second. Needs torch 2.8 or later.

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <safetensors_torch.hpp>
#include <safetensors_torch/aoti.hpp>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace {

namespace st = safetensors_torch;

// Threads that run the package and count its answers.
class Server {
  public:
    Server(st::PackageLoader& package, const st::Tensors& expected) : package_(package), expected_(expected) {
        for (int i = 0; i < 2; ++i) {
            threads_.emplace_back([this] { serve(); });
        }
    }
    ~Server() { stop(); }

    void stop() {
        stopped_ = true;
        for (std::thread& thread : threads_) {
            thread.join();
        }
        threads_.clear();
    }

    std::atomic<long> first{0}, second{0}, others{0};

  private:
    void serve() {
        at::set_num_threads(1);
        const c10::InferenceMode inference;
        while (!stopped_) {
            const at::Tensor logits = package_.run({expected_.at("tokens")}).at(0);
            const bool is_first = at::equal(logits, expected_.at("first"));
            ++(is_first ? first : at::equal(logits, expected_.at("second")) ? second : others);
        }
    }

    st::PackageLoader& package_;
    const st::Tensors& expected_;
    std::atomic<bool> stopped_{false};
    std::vector<std::thread> threads_;
};

void check(st::PackageLoader& package, const st::Tensors& expected, const std::string& name) {
    const at::Tensor logits = package.run({expected.at("tokens")}).at(0);
    if (!at::equal(logits, expected.at(name))) {
        throw std::runtime_error(name + ": the logits differ from Python's by up to " +
                                 std::to_string((logits - expected.at(name)).abs().max().item<double>()));
    }
    std::printf("%s: equal to Python\n", name.c_str());
}

// Waits until the server has counted a hundred more.
void wait_for(const Server& server, const std::atomic<long>& count) {
    for (const long enough = count + 100; count < enough && server.others == 0;) {
        std::this_thread::yield();
    }
}

void run(const std::filesystem::path& directory, const char* device) {
    // The order of a summation may depend on the number of threads; make_package.py sets the same number.
    at::set_num_threads(1);
    const c10::InferenceMode inference;
    const st::Tensors expected = st::load_file(directory / "expected.safetensors");

    st::PackageLoader package(directory / "gpt.pt2", "model", /*run_single_threaded=*/false, /*num_runners=*/2);
    if (device == nullptr) {
        st::load_constants(package, directory / "first.safetensors");
    } else {
        st::load_constants(package, st::load_file(directory / "first.safetensors", device));
    }
    check(package, expected, "first");

    Server server(package, expected);
    wait_for(server, server.first);
    st::load_constants(package, directory / "second");
    const long before = server.first;
    wait_for(server, server.second);
    server.stop();
    // The swap waits until no run uses the first weights.
    if (server.others != 0 || server.first > before + 2) {
        throw std::runtime_error("second: " + std::to_string(server.others) + " answers are of neither weights, and " +
                                 std::to_string(server.first - before) + " of the first came after the swap");
    }
    check(package, expected, "second");
    std::printf("served %ld answers of the first and %ld of the second\n", server.first.load(), server.second.load());
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2 && argc != 3) {
        std::fprintf(stderr, "usage: %s DIRECTORY [DEVICE]\n", argv[0]);
        return 2;
    }
    try {
        run(argv[1], argc == 3 ? argv[2] : nullptr);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "aoti: %s\n", error.what());
        return EXIT_FAILURE;
    }
    return EXIT_SUCCESS;
}
