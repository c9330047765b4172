// File: everything but get_slice.

#include <sys/resource.h>

#include "support.h"

using namespace support;
using Names = std::vector<std::string>;
using Shape = std::vector<std::int64_t>;

namespace {

st::Tensors three_tensors() {
    st::Tensors tensors;
    tensors.insert("b", make({2, 3}, at::kFloat, 1));
    tensors.insert("a", make({4}, at::kByte, 2));
    tensors.insert("scalar", make({}, at::kLong, 3));
    return tensors;
}

}  // namespace

TEST(file_lists_its_tensors_and_metadata) {
    const TempDir dir;
    st::save_file(three_tensors(), dir.file("f"), {{"format", "pt"}});
    for (const st::Backend backend : kBackends) {
        const st::File file(dir.file("f"), at::kCPU, backend);
        EXPECT_EQ(file.size(), 3U);
        EXPECT_EQ(file.keys(), (Names{"a", "b", "scalar"}));
        EXPECT_EQ(file.offset_keys(), (Names{"scalar", "b", "a"}));
        EXPECT(file.metadata() == (st::Metadata{{"format", "pt"}}));
        EXPECT(file.contains("a") && !file.contains("A") && !file.contains("") && !file.contains("__metadata__"));
        EXPECT_EQ(file.shape("b"), (Shape{2, 3}));
        EXPECT_EQ(file.tensor_shape("b"), (Shape{2, 3}));
        EXPECT_EQ(file.shape("scalar"), Shape{});
        EXPECT_EQ(file.dtype("b"), "F32");
        EXPECT_EQ(file.tensor_dtype("b"), at::kFloat);
        EXPECT_EQ(file.tensor_dtype("scalar"), at::kLong);
        EXPECT(file.is_open());
    }
}

TEST(file_returns_tensors) {
    const TempDir dir;
    const st::Tensors tensors = three_tensors();
    st::save_file(tensors, dir.file("f"));
    for (const st::Backend backend : kBackends) {
        const st::File file(dir.file("f"), at::kCPU, backend);
        for (const auto& [name, tensor] : tensors) {
            EXPECT(identical(file.get_tensor(name), tensor));
        }
        const st::Tensors all = file.get_tensors();
        EXPECT(identical(all, tensors));
        EXPECT_EQ(all.keys(), file.offset_keys());
        // In the order of the given names, which may repeat.
        const std::vector<at::Tensor> some = file.get_tensors({"a", "scalar", "a"});
        EXPECT_EQ(some.size(), 3U);
        EXPECT(identical(some[0], tensors.at("a")));
        EXPECT(identical(some[1], tensors.at("scalar")));
        EXPECT(identical(some[2], tensors.at("a")));
        EXPECT_EQ(file.get_tensors({"b"}).size(), 1U);
        EXPECT(file.get_tensors({}).empty());
        EXPECT_EQ(file.get_tensors(st::NameFilter()).size(), all.size());
    }
}

TEST(file_puts_tensors_on_its_device) {
    const TempDir dir;
    st::save_file(three_tensors(), dir.file("f"));
    const st::File file(dir.file("f"), at::kMeta);
    EXPECT(file.get_tensor("b").is_meta());
    EXPECT(file.get_slice("b", {0}).is_meta());
    EXPECT_EQ(file.get_slice("b", {0}).sizes(), (at::IntArrayRef{3}));
    for (const auto& entry : file.get_tensors()) {
        EXPECT(entry.second.is_meta());
    }
    EXPECT(file.get_tensors({"a"}).front().is_meta());
}

TEST(file_reports_a_missing_tensor) {
    const TempDir dir;
    st::save_file(three_tensors(), dir.file("f"));
    for (const st::Backend backend : kBackends) {
        const st::File file(dir.file("f"), at::kCPU, backend);
        const std::string text = dir.file("f") + ": File does not contain tensor absent";
        EXPECT_HAS(ERROR_OF(file.get_tensor("absent")), text);
        EXPECT_HAS(ERROR_OF(file.get_tensors({"a", "absent"})), text);
        EXPECT_HAS(ERROR_OF(file.get_slice("absent", {0})), text);
        EXPECT_HAS(ERROR_OF(file.shape("absent")), text);
        EXPECT_HAS(ERROR_OF(file.tensor_shape("absent")), text);
        EXPECT_HAS(ERROR_OF(file.dtype("absent")), text);
        EXPECT_HAS(ERROR_OF(file.tensor_dtype("absent")), text);
    }
}

// Checks that every method of a closed file throws.
static void check_closed(st::File& file) {
    EXPECT(!file.is_open());
    EXPECT_EQ(ERROR_OF(file.keys()), "File is closed");
    EXPECT_EQ(ERROR_OF(file.offset_keys()), "File is closed");
    EXPECT_EQ(ERROR_OF(file.metadata()), "File is closed");
    EXPECT_EQ(ERROR_OF(file.size()), "File is closed");
    EXPECT_EQ(ERROR_OF(file.contains("a")), "File is closed");
    EXPECT_EQ(ERROR_OF(file.shape("a")), "File is closed");
    EXPECT_EQ(ERROR_OF(file.tensor_shape("a")), "File is closed");
    EXPECT_EQ(ERROR_OF(file.dtype("a")), "File is closed");
    EXPECT_EQ(ERROR_OF(file.tensor_dtype("a")), "File is closed");
    EXPECT_EQ(ERROR_OF(file.get_tensor("a")), "File is closed");
    EXPECT_EQ(ERROR_OF(file.get_tensors()), "File is closed");
    EXPECT_EQ(ERROR_OF(file.get_tensors({"a"})), "File is closed");
    EXPECT_EQ(ERROR_OF(file.get_slice("a", {0})), "File is closed");
    file.close();
    EXPECT(!file.is_open());
}

TEST(closing_a_file_closes_every_copy) {
    const TempDir dir;
    st::save_file(three_tensors(), dir.file("f"));
    for (const st::Backend backend : kBackends) {
        st::File file(dir.file("f"), at::kCPU, backend);
        st::File copy = file;
        const at::Tensor before = file.get_tensor("b");
        copy.close();
        check_closed(file);
        check_closed(copy);
        EXPECT(identical(before, three_tensors().at("b")));
    }
}

TEST(moved_from_file_is_closed) {
    const TempDir dir;
    st::save_file(three_tensors(), dir.file("f"));
    st::File file(dir.file("f"));
    st::File target = std::move(file);
    check_closed(file);
    EXPECT(target.is_open());
    EXPECT_EQ(target.size(), 3U);
    file = st::File(dir.file("f"));
    EXPECT_EQ(file.size(), 3U);
    file.close();
    EXPECT(target.is_open());
}

TEST(mapped_files_do_not_use_descriptors) {
    const TempDir dir;
    const st::Tensors expected = three_tensors();
    st::save_file(expected, dir.file("f"));
    rlimit before{};
    EXPECT(getrlimit(RLIMIT_NOFILE, &before) == 0);
    rlimit lower = before;
    lower.rlim_cur = 100;
    EXPECT(setrlimit(RLIMIT_NOFILE, &lower) == 0);
    std::vector<st::File> files;
    for (int number = 0; number < 300; ++number) {
        files.emplace_back(dir.file("f"));
    }
    for (const st::File& file : files) {
        EXPECT(identical(file.get_tensor("b"), expected.at("b")));
    }
    const std::string refused = ERROR_OF({
        for (int number = 0; number < 300; ++number) {
            files.emplace_back(dir.file("f"), at::kCPU, st::Backend::pread);
        }
    });
    EXPECT_HAS(refused, "as many files open as it may (100)");
    files.clear();
    EXPECT(setrlimit(RLIMIT_NOFILE, &before) == 0);
}

TEST(file_packs_two_values_in_a_byte_as_torch_does) {
    const TempDir dir;
    write_file(dir.file("f4"), file_bytes(R"({"x":{"dtype":"F4","shape":[2,4],"data_offsets":[0,4]}})", "1234"));
    const st::File file(dir.file("f4"));
    EXPECT_EQ(file.shape("x"), (Shape{2, 4}));
    const bool has_float4 = dtypes().back().code == std::string("F4");
    if (has_float4) {
        EXPECT_EQ(file.tensor_shape("x"), (Shape{2, 2}));
        EXPECT_EQ(file.get_tensor("x").sizes(), (at::IntArrayRef{2, 2}));
    } else {
        EXPECT_HAS(ERROR_OF(file.tensor_shape("x")), "F4");
    }
}
