// File::prefetch, PrefetchLoader and iterate.

#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <thread>

#include "support.h"

using namespace support;
using at::indexing::Ellipsis;
using at::indexing::Slice;

namespace {

// Enough bytes for threads.
st::Tensors several_tensors(unsigned seed = 1) {
    st::Tensors tensors;
    tensors.insert("large", make({3, 1 << 20}, at::kFloat, seed));
    tensors.insert("matrix", make({6, 4}, at::kFloat, seed + 1));
    tensors.insert("half", make({5, 3}, at::kHalf, seed + 2));
    tensors.insert("scalar", make({}, at::kLong, seed + 3));
    tensors.insert("empty", make({0, 3}, at::kFloat, seed + 4));
    return tensors;
}

st::Tensors rest_of(const st::PrefetchLoader& loader) {
    st::Tensors tensors;
    for (auto& [name, tensor] : loader) {
        tensors.insert(name, tensor);
    }
    return tensors;
}

}  // namespace

TEST(prefetch_hands_out_each_tensor_once) {
    const TempDir dir;
    const st::Tensors tensors = several_tensors();
    st::save_file(tensors, dir.file("f"));
    for (const st::Backend backend : kBackends) {
        for (const std::optional<int64_t> buffer_bytes : {std::optional<int64_t>(), std::optional<int64_t>(1)}) {
            st::PrefetchOptions options;
            options.buffer_bytes = buffer_bytes;
            st::File file(dir.file("f"), at::kCPU, backend);
            const st::PrefetchLoader loader = file.prefetch({}, options);
            EXPECT_EQ(loader.names(), file.offset_keys());
            EXPECT_EQ(loader.size(), 5U);
            file.close();
            EXPECT(identical(loader.take("matrix"), tensors.at("matrix")));
            EXPECT_HAS(ERROR_OF(loader.take("matrix")), "'matrix': already delivered");
            EXPECT_HAS(ERROR_OF(loader.take("nope")), "'nope' is not in the prefetch plan");
            st::Tensors rest = rest_of(loader);
            EXPECT(rest.find("matrix") == rest.end());
            rest.insert("matrix", tensors.at("matrix"));
            EXPECT(identical(rest, tensors));
            EXPECT(!loader.next());
            loader.close();
            loader.close();
            EXPECT_HAS(ERROR_OF(loader.next()), "PrefetchLoader is closed");
        }
    }
}

TEST(prefetch_reads_parts) {
    const TempDir dir;
    const st::Tensors tensors = several_tensors();
    st::save_file(tensors, dir.file("f"));
    const std::map<std::string, std::vector<at::indexing::TensorIndex>> plan = {
        {"large", {Slice(1, 3), Slice(0, 9, 2)}}, {"matrix", {-1}}, {"half", {Ellipsis, 1}}, {"scalar", {}}};
    const st::File file(dir.file("f"));
    const st::Tensors parts = rest_of(file.prefetch(plan));
    EXPECT_EQ(parts.size(), 4U);
    for (const auto& [name, part] : parts) {
        const at::Tensor& whole = tensors.at(name);
        const at::Tensor expected = plan.at(name).empty() ? whole : whole.index(plan.at(name));
        EXPECT(identical(part.contiguous(), expected.contiguous()));
    }
    EXPECT_EQ(parts.at("large").storage().nbytes(), std::size_t{2 * 5 * 4});
    EXPECT_HAS(ERROR_OF(file.prefetch({{"nope", {}}})), "does not contain tensor nope");
    EXPECT_HAS(ERROR_OF(file.prefetch({{"nope", {0}}})), "does not contain tensor nope");
    bool is_refused = false;
    try {
        file.prefetch({{"matrix", {6}}});
    } catch (const c10::IndexError&) {
        is_refused = true;
    }
    EXPECT(is_refused);
}

TEST(prefetch_converts) {
    const TempDir dir;
    const st::Tensors tensors = several_tensors();
    st::save_file(tensors, dir.file("f"));
    st::PrefetchOptions options;
    options.dtype = at::kDouble;
    const st::File file(dir.file("f"));
    EXPECT(identical(file.prefetch({}, options).take("half"), tensors.at("half").to(at::kDouble)));
    EXPECT_EQ(file.prefetch({}, options).take("scalar").scalar_type(), at::kLong);
    options.device = at::kMeta;
    EXPECT(file.prefetch({}, options).take("large").is_meta());
    options.dtype = at::kInt;
    EXPECT_HAS(ERROR_OF(file.prefetch({}, options)), "must be a floating-point one");
}

TEST(prefetch_reports_a_truncated_file) {
    const TempDir dir;
    st::save_file(several_tensors(), dir.file("f"));
    for (const st::Backend backend : kBackends) {
        const st::File file(dir.file("f"), at::kCPU, backend);
        std::filesystem::resize_file(dir.file("f"), std::filesystem::file_size(dir.file("f")) - (4 << 20));
        const st::PrefetchLoader loader = file.prefetch();
        EXPECT_HAS(ERROR_OF(rest_of(loader)), "became shorter while it was read");
        EXPECT_HAS(ERROR_OF(loader.next()), "PrefetchLoader is closed");
        st::save_file(several_tensors(), dir.file("f"));
    }
}

TEST(prefetch_is_shared_by_threads_and_closed_meanwhile) {
    const TempDir dir;
    const st::Tensors tensors = several_tensors();
    st::save_file(tensors, dir.file("f"));
    const st::File file(dir.file("f"));
    for (int round = 0; round < 10; ++round) {
        const st::PrefetchLoader loader = file.prefetch();
        std::vector<std::thread> threads;
        std::atomic<int> seen{0};
        for (int number = 0; number < 4; ++number) {
            threads.emplace_back([&] {
                try {
                    for (auto& [name, tensor] : loader) {
                        EXPECT(identical(tensor, tensors.at(name)));
                        ++seen;
                    }
                } catch (const st::Error& error) {
                    EXPECT(round % 2 == 1 && error.code() == SFT_ERROR_CLOSED);
                }
            });
        }
        if (round % 2 == 1) {
            loader.close();
        }
        for (std::thread& thread : threads) {
            thread.join();
        }
        EXPECT(round % 2 == 1 || seen == 5);
    }
}

TEST(prefetch_in_a_forked_child_is_refused) {
    const TempDir dir;
    st::save_file(several_tensors(), dir.file("f"));
    const st::File file(dir.file("f"));
    const st::PrefetchLoader loader = file.prefetch();
    const pid_t pid = fork();
    if (pid == 0) {
        alarm(20);  // kills a child that hangs
        try {
            loader.next();
        } catch (const st::Error& error) {
            _exit(std::string(error.what()).find("this prefetch was begun by process") == std::string::npos);
        }
        _exit(1);
    }
    int status = 1;
    EXPECT(pid > 0 && waitpid(pid, &status, 0) == pid && status == 0);
    EXPECT_EQ(rest_of(loader).size(), 5U);
}

TEST(iterate_reads_files_in_order) {
    const TempDir dir;
    const st::Tensors first = several_tensors(1), second = several_tensors(9);
    st::save_file(first, dir.file("a"));
    st::save_file(second, dir.file("b"));
    st::IterateOptions options;
    options.buffer_bytes = 1;
    std::vector<std::string> names;
    for (auto& [name, tensor] : st::iterate({dir.file("b"), dir.file("a")}, options)) {
        EXPECT(identical(tensor, (names.size() < 5 ? second : first).at(name)));
        names.push_back(name);
    }
    EXPECT_EQ(names.size(), 10U);
    EXPECT(!st::iterate({}).next());

    options.names = {"half", "m*"};
    options.dtype = at::kFloat;
    EXPECT_EQ(st::iterate({dir.file("a"), dir.file("b")}, options).size(), 4U);
    EXPECT_EQ(st::iterate({dir.file("a")}, options).take("half").scalar_type(), at::kFloat);
    options.names = [](const std::string& name) { return name == "scalar"; };
    EXPECT_EQ(st::iterate({dir.file("a"), dir.file("b")}, options).size(), 2U);
    options.names = {"nope"};
    EXPECT_HAS(ERROR_OF(st::iterate({dir.file("a")}, options)), "no file has a tensor \"nope\"");
    EXPECT_HAS(ERROR_OF(st::iterate({dir.file("c")})), "No such file or directory");
}

TEST(iterate_opens_checkpoints) {
    const TempDir dir;
    const st::Tensors tensors = several_tensors();
    st::ShardedSaveOptions options;
    options.max_shard_size = 1 << 20;
    st::save_sharded(tensors, dir.file("model"), {}, options);
    EXPECT(identical(rest_of(st::iterate({dir.file("model")})), tensors));
}
