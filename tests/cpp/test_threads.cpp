// Thread safety: every function on several threads at once, and a File that they share.

#include <atomic>
#include <memory>
#include <thread>

#include "support.h"

using namespace support;

namespace {

constexpr int kThreads = 8;
constexpr int kRounds = 10;

// Calls `body` on every thread, with the thread's number. The threads start together, and the test does not synchronize
// them after that, so that ThreadSanitizer detects data races of the library.
template <typename Body>
void on_threads(const Body& body) {
    std::atomic<int> absent{kThreads};
    std::vector<std::thread> threads;
    for (int number = 0; number < kThreads; ++number) {
        threads.emplace_back([&, number] {
            --absent;
            while (absent > 0) {
                std::this_thread::yield();
            }
            try {
                body(number);
            } catch (const std::exception& error) {
                check::report(__FILE__, __LINE__, std::string("uncaught on a thread: ") + error.what());
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
}

// Returns tensors, one of which is large enough for the library to read it with several threads.
st::Tensors tensors_for_threads() {
    st::Tensors tensors;
    tensors.insert("large", make({(6 << 20) + 5}, at::kByte, 1));
    tensors.insert("matrix", make({40, 30}, at::kInt, 2));
    tensors.insert("none", make({0, 5}, at::kLong, 3));
    tensors.insert("weight", at::arange(5000, at::kFloat));
    return tensors;
}

// Calls every method except close. `part` is the expected slice of "matrix", another one for each thread.
void use_every_method(const st::File& file, const st::Tensors& expected, int number, const at::Tensor& part) {
    using Names = std::vector<std::string>;
    using Shape = std::vector<std::int64_t>;
    using at::indexing::Slice;
    EXPECT_EQ(file.keys(), (Names{"large", "matrix", "none", "weight"}));
    EXPECT_EQ(file.offset_keys(), (Names{"none", "weight", "matrix", "large"}));
    EXPECT(file.metadata() == (st::Metadata{{"format", "pt"}}));
    EXPECT_EQ(file.size(), 4U);
    EXPECT(file.contains("matrix") && !file.contains("Matrix") && file.is_open());
    EXPECT_EQ(file.shape("matrix"), (Shape{40, 30}));
    EXPECT_EQ(file.tensor_shape("none"), (Shape{0, 5}));
    EXPECT_EQ(file.dtype("weight"), "F32");
    EXPECT_EQ(file.tensor_dtype("weight"), at::kFloat);
    EXPECT(identical(file.get_tensor("matrix"), expected.at("matrix")));
    EXPECT(identical(file.get_tensor("none"), expected.at("none")));
    const std::vector<at::Tensor> two = file.get_tensors({"weight", "large"});
    EXPECT(identical(two[0], expected.at("weight")) && identical(two[1], expected.at("large")));
    EXPECT(identical(file.get_slice("matrix", {Slice(number, number + 13), Slice(number % 2, 30, 2)}), part));
    // Error texts are per thread.
    const std::string absent = "absent" + std::to_string(number);
    EXPECT_HAS(ERROR_OF(file.get_tensor(absent)), "File does not contain tensor " + absent);
}

// One parameter under two names.
struct TwoNamesImpl : torch::nn::Module {
    TwoNamesImpl() {
        first = register_parameter("first", at::arange(600, at::kFloat).reshape({20, 30}));
        second = register_parameter("second", first);
        register_buffer("buffer", at::arange(7, at::kLong));
    }
    at::Tensor first;
    at::Tensor second;
};

}  // namespace

TEST(threads_read_one_file) {
    const TempDir dir;
    const st::Tensors expected = tensors_for_threads();
    st::save_file(expected, dir.file("f"), {{"format", "pt"}});
    std::vector<at::Tensor> parts;
    for (int number = 0; number < kThreads; ++number) {
        parts.push_back(expected.at("matrix").slice(0, number, number + 13).slice(1, number % 2, 30, 2).contiguous());
    }
    for (const st::Backend backend : kBackends) {
        const st::File file(dir.file("f"), at::kCPU, backend);
        on_threads([&](int number) {
            const st::File copy = file;
            for (int round = 0; round < kRounds; ++round) {
                use_every_method(round % 2 == 0 ? file : copy, expected, number, parts[number]);
            }
            EXPECT(identical(file.get_tensors(), expected));
        });
    }
    const st::File file(dir.file("f"), at::kMeta);
    on_threads([&](int) { EXPECT_EQ(file.get_tensor("matrix").sizes(), (at::IntArrayRef{40, 30})); });
}

TEST(threads_read_a_file_that_one_of_them_closes) {
    const TempDir dir;
    const st::Tensors expected = tensors_for_threads();
    st::save_file(expected, dir.file("f"));
    for (const st::Backend backend : kBackends) {
        for (int round = 0; round < kRounds; ++round) {
            const st::File file(dir.file("f"), at::kCPU, backend);
            on_threads([&](int number) {
                st::File own = file;
                // A read returns the tensor or fails, but never reads a file that was freed.
                for (int read = 0; number != 0 || read < 3; ++read) {
                    try {
                        EXPECT(identical(own.get_tensor("matrix"), expected.at("matrix")));
                    } catch (const c10::Error& error) {
                        EXPECT_EQ(std::string(error.what()), "File is closed");
                        break;
                    }
                }
                own.close();
                EXPECT(!own.is_open());
            });
            EXPECT(!file.is_open());
        }
    }
}

TEST(threads_load_in_every_way) {
    const TempDir dir;
    const st::Tensors expected = tensors_for_threads();
    st::save_file(expected, dir.file("f"));
    const std::string bytes = read_file(dir.file("f"));
    const at::Tensor half = expected.at("weight").to(at::kHalf);
    on_threads([&](int number) {
        for (int round = 0; round < kRounds; ++round) {
            const st::Backend backend = kBackends[(number + round) % 2];
            std::int64_t reported = 0;
            st::LoadOptions options;
            options.backend = backend;
            options.dtype = at::kHalf;
            options.prefault = round % 3 == 0;
            options.names = [](const std::string& name) { return name != "large"; };
            options.progress = [&](std::int64_t done, std::int64_t) { reported = done; };
            const st::Tensors converted = st::load_file(dir.file("f"), at::kCPU, options);
            EXPECT(converted.size() == 3 && identical(converted.at("weight"), half));
            EXPECT(identical(converted.at("matrix"), expected.at("matrix")));
            EXPECT(reported > 0);
            EXPECT(identical(st::load(bytes, at::kCPU, options).at("weight"), half));
            EXPECT(identical(st::load_file(dir.file("f"), at::kCPU, backend, round % 2 == 0), expected));
            EXPECT(identical(st::load(bytes), expected));
        }
    });
}

TEST(threads_save_one_set_of_tensors) {
    const TempDir dir;
    const st::Tensors tensors = tensors_for_threads();
    const std::string bytes = st::save(tensors);
    on_threads([&](int number) {
        const std::string own = dir.file("own" + std::to_string(number));
        for (int round = 0; round < kRounds; ++round) {
            st::save_file(tensors, own);
            EXPECT(read_file(own) == bytes);
            EXPECT(st::save(tensors) == bytes);
            // All threads save to the same path: each save replaces the file atomically.
            st::save_file(tensors, dir.file("shared"));
            EXPECT(read_file(dir.file("shared")) == bytes);
        }
    });
    EXPECT_EQ(dir.count(), static_cast<std::size_t>(kThreads + 1));
}

TEST(threads_save_one_model_and_load_their_own) {
    const TempDir dir;
    TwoNamesImpl model;
    std::vector<std::unique_ptr<TwoNamesImpl>> own;
    for (int number = 0; number < kThreads; ++number) {
        own.push_back(std::make_unique<TwoNamesImpl>());
        const at::NoGradGuard no_grad;
        own.back()->first.zero_();
    }
    on_threads([&](int number) {
        const std::string path = dir.file("own" + std::to_string(number));
        for (int round = 0; round < kRounds; ++round) {
            st::save_model(model, path);
            const st::LoadResult result = st::load_model(*own[number], path, {/*strict=*/true, kBackends[round % 2]});
            EXPECT(result.missing.empty() && result.unexpected.empty());
        }
    });
    for (const auto& loaded : own) {
        EXPECT(identical(loaded->second.detach(), model.first.detach()));
    }
}

TEST(threads_set_the_transfer_options) {
    const st::TransferOptions before = st::transfer_options();
    st::set_transfer_options({0, 0});
    on_threads([](int number) {
        for (int round = 0; round < kRounds; ++round) {
            st::set_transfer_options({number * (std::int64_t(2) << 20), number});
            // Each value was set by one of the threads.
            const st::TransferOptions seen = st::transfer_options();
            EXPECT(seen.pinned_pool_bytes % (2 << 20) == 0 &&
                   seen.pinned_pool_bytes < kThreads * (std::int64_t(2) << 20));
            EXPECT(seen.threads >= 0 && seen.threads < kThreads);
            if (!at::hasCUDA()) {
                EXPECT_EQ(st::reserve_transfer_memory(2 << 20), 0);
            }
            st::release_transfer_memory();
            EXPECT(st::transfer_memory() >= 0);
        }
    });
    st::set_transfer_options(before);
}
