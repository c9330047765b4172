// Ownership of the memory of loaded tensors: lifetimes, aliasing, copy-on-write, and threads.

#include <algorithm>
#include <atomic>
#include <thread>

#include "support.h"

using namespace support;

namespace {

st::Tensors some_tensors() {
    st::Tensors tensors;
    tensors.insert("a", make({100, 7}, at::kFloat, 1));
    tensors.insert("b", make({33}, at::kLong, 2));
    tensors.insert("c", make({5}, at::kByte, 3));
    return tensors;
}

const void* data_of(const at::Tensor& tensor) { return tensor.const_data_ptr(); }

}  // namespace

TEST(a_tensor_outlives_file_dictionary_and_the_deleted_file) {
    const st::Tensors expected = some_tensors();
    for (const st::Backend backend : kBackends) {
        at::Tensor from_dict;
        at::Tensor from_file;
        at::Tensor from_slice;
        {
            const TempDir dir;
            st::save_file(expected, dir.file("f"));
            from_dict = st::load_file(dir.file("f"), at::kCPU, backend).at("a");
            st::File file(dir.file("f"), at::kCPU, backend);
            from_file = file.get_tensor("a");
            from_slice = file.get_slice("a", {at::indexing::Slice(10, 20)});
            file.close();
        }
        EXPECT(identical(from_dict, expected.at("a")));
        EXPECT(identical(from_file, expected.at("a")));
        EXPECT(identical(from_slice, expected.at("a").slice(0, 10, 20)));
    }
}

TEST(a_tensor_outlives_a_file_that_is_replaced) {
    const TempDir dir;
    const st::Tensors old_tensors = some_tensors();
    st::save_file(old_tensors, dir.file("f"));
    const st::Tensors loaded = st::load_file(dir.file("f"));
    st::Tensors replacement;
    replacement.insert("a", make({1}, at::kByte));
    st::save_file(replacement, dir.file("f"));
    EXPECT(identical(loaded, old_tensors));
    EXPECT(identical(st::load_file(dir.file("f")), replacement));
}

TEST(a_file_can_be_saved_over_itself) {
    const TempDir dir;
    const st::Tensors expected = some_tensors();
    st::save_file(expected, dir.file("f"));
    st::save_file(st::load_file(dir.file("f")), dir.file("f"));
    EXPECT(identical(st::load_file(dir.file("f")), expected));
}

TEST(writing_to_a_loaded_tensor_does_not_change_the_file) {
    const TempDir dir;
    st::save_file(some_tensors(), dir.file("f"));
    const std::string before = read_file(dir.file("f"));
    for (const st::Backend backend : kBackends) {
        const st::Tensors loaded = st::load_file(dir.file("f"), at::kCPU, backend);
        for (const auto& entry : loaded) {
            entry.second.fill_(42);
        }
        EXPECT(loaded.at("a").eq(42).all().item<bool>());
        EXPECT(read_file(dir.file("f")) == before);
    }
}

TEST(two_loads_never_alias) {
    const TempDir dir;
    const st::Tensors expected = some_tensors();
    st::save_file(expected, dir.file("f"));
    for (const st::Backend backend : kBackends) {
        const st::Tensors first = st::load_file(dir.file("f"), at::kCPU, backend);
        const st::Tensors second = st::load_file(dir.file("f"), at::kCPU, backend);
        first.at("a").zero_();
        EXPECT(identical(second, expected));
    }
}

TEST(reads_of_one_file_alias_only_if_it_is_mapped) {
    const TempDir dir;
    st::save_file(some_tensors(), dir.file("f"));
    const st::File mapped(dir.file("f"));
    EXPECT(data_of(mapped.get_tensor("a")) == data_of(mapped.get_tensor("a")));
    const st::File read(dir.file("f"), at::kCPU, st::Backend::pread);
    const at::Tensor once = read.get_tensor("a");
    EXPECT(data_of(once) != data_of(read.get_tensor("a")));
}

TEST(the_mapping_lives_until_the_last_tensor_dies) {
    const TempDir dir;
    st::save_file(some_tensors(), dir.file("f"));
    const auto is_mapped = [&] { return has(read_file("/proc/self/maps"), dir.file("f")); };
    {
        const st::Tensors read = st::load_file(dir.file("f"), at::kCPU, st::Backend::pread);
        const st::File file(dir.file("f"), at::kCPU, st::Backend::pread);
        const at::Tensor tensor = file.get_tensor("a");
        EXPECT(!is_mapped());
    }
    at::Tensor last;
    {
        const st::Tensors mapped = st::load_file(dir.file("f"));
        last = mapped.at("b");
        EXPECT(is_mapped());
    }
    EXPECT(is_mapped());
    last.reset();
    EXPECT(!is_mapped());
}

TEST(each_tensor_owns_a_storage_of_its_size) {
    const TempDir dir;
    st::save_file(some_tensors(), dir.file("f"));
    const std::string bytes = read_file(dir.file("f"));
    for (const st::Tensors& loaded :
         {st::load_file(dir.file("f")), st::load(bytes), st::load_file(dir.file("f"), at::kCPU, st::Backend::pread)}) {
        for (const auto& entry : loaded) {
            EXPECT_EQ(entry.second.storage().nbytes(), entry.second.nbytes());
            EXPECT_EQ(entry.second.storage_offset(), 0);
        }
        // Loaded tensors can therefore be saved again.
        EXPECT(st::save(loaded) == bytes);
    }
}

TEST(load_does_not_depend_on_its_input) {
    const st::Tensors expected = some_tensors();
    std::string bytes = st::save(expected);
    const st::Tensors loaded = st::load(bytes);
    std::fill(bytes.begin(), bytes.end(), '\0');
    EXPECT(identical(loaded, expected));
    std::string again = st::save(expected);
    const std::string copy = again;
    st::load(again).at("a").fill_(1);
    EXPECT(again == copy);
}

TEST(a_file_cut_short_is_an_error_for_pread) {
    const TempDir dir;
    st::save_file(some_tensors(), dir.file("f"));
    const st::File file(dir.file("f"), at::kCPU, st::Backend::pread);
    std::filesystem::resize_file(dir.file("f"), 300);
    EXPECT(!ERROR_OF(file.get_tensor("a")).empty());
    EXPECT(!ERROR_OF(file.get_tensors()).empty());
}

TEST(threads_load_and_save_at_the_same_time) {
    const TempDir dir;
    const st::Tensors expected = some_tensors();
    st::save_file(expected, dir.file("f"));
    const std::string bytes = read_file(dir.file("f"));
    const st::File mapped(dir.file("f"));
    const st::File read(dir.file("f"), at::kCPU, st::Backend::pread);
    std::vector<std::thread> threads;
    for (int number = 0; number < 8; ++number) {
        threads.emplace_back([&, number] {
            const std::string own = dir.file("own" + std::to_string(number));
            for (int round = 0; round < 25; ++round) {
                EXPECT(identical(st::load_file(dir.file("f"), at::kCPU, kBackends[round % 2]), expected));
                EXPECT(identical(st::load(bytes), expected));
                EXPECT(identical((round % 2 == 0 ? mapped : read).get_tensor("a"), expected.at("a")));
                st::save_file(expected, own);
                EXPECT(read_file(own) == bytes);
                // Error texts are per thread.
                const std::string absent = dir.file("absent" + std::to_string(number));
                EXPECT_EQ(ERROR_OF(st::load_file(absent)), "No such file or directory: " + absent);
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
}

TEST(readers_of_a_file_being_replaced_see_a_complete_file) {
    const TempDir dir;
    const st::Tensors one = some_tensors();
    st::Tensors other;
    other.insert("z", make({4000}, at::kDouble, 9));
    st::save_file(one, dir.file("f"));
    std::atomic<bool> done{false};
    std::thread writer([&] {
        for (int round = 0; round < 100; ++round) {
            st::save_file(round % 2 == 0 ? other : one, dir.file("f"));
        }
        done = true;
    });
    do {
        for (const st::Backend backend : kBackends) {
            const st::Tensors loaded = st::load_file(dir.file("f"), at::kCPU, backend);
            EXPECT(identical(loaded, one) || identical(loaded, other));
        }
    } while (!done);
    writer.join();
    EXPECT_EQ(dir.count(), 1U);
}
