// Errors of loading and saving: a c10::Error with its text, and no files left behind.

#include <torch/nn.h>

#include <cerrno>

#include "support.h"

using namespace support;

namespace {

// Checks that save and save_file refuse `tensors` with a text that contains `part`, and change no file.
void check_refused(const st::Tensors& tensors, const std::string& part) {
    const TempDir dir;
    write_file(dir.file("f"), "as it was");
    const std::string text = ERROR_OF(st::save_file(tensors, dir.file("f")));
    EXPECT_HAS(text, part);
    EXPECT_HAS(ERROR_OF(st::save_file(tensors, dir.file("new"))), part);
    EXPECT_HAS(ERROR_OF(st::save(tensors)), part);
    EXPECT_EQ(read_file(dir.file("f")), "as it was");
    EXPECT_EQ(dir.count(), 1U);
}

st::Tensors dict(const std::string& name, const at::Tensor& tensor) {
    st::Tensors tensors;
    tensors.insert(name, tensor);
    return tensors;
}

// Checks that every way of loading refuses a file of these bytes. Returns the text of the error.
std::string refused(const std::string& bytes) {
    const TempDir dir;
    write_file(dir.file("bad"), bytes);
    const std::string text = ERROR_OF(st::load_file(dir.file("bad")));
    EXPECT_HAS(text, dir.file("bad"));
    for (const st::Backend backend : kBackends) {
        EXPECT_EQ(ERROR_OF(st::load_file(dir.file("bad"), at::kCPU, backend)), text);
        EXPECT_EQ(ERROR_OF(st::File(dir.file("bad"), at::kCPU, backend)), text);
    }
    EXPECT(!ERROR_OF(st::load(bytes)).empty());
    return text;
}

}  // namespace

TEST(a_missing_file) {
    const TempDir dir;
    const std::string path = dir.file("not here");
    for (const st::Backend backend : kBackends) {
        EXPECT_EQ(ERROR_OF(st::load_file(path, at::kCPU, backend)), "No such file or directory: " + path);
        EXPECT_EQ(ERROR_OF(st::File(path, at::kCPU, backend)), "No such file or directory: " + path);
    }
    EXPECT_EQ(ERROR_OF(st::load_file("")), "No such file or directory: \"\"");
}

TEST(a_directory_is_refused) {
    const TempDir dir;
    for (const st::Backend backend : kBackends) {
        EXPECT_HAS(ERROR_OF(st::load_file(dir.file("."), at::kCPU, backend)), dir.file("."));
    }
    EXPECT_HAS(ERROR_OF(st::save_file(st::Tensors(), dir.file("."))), dir.file("."));
    EXPECT_HAS(ERROR_OF(st::save_file(st::Tensors(), dir.file("no/such/directory"))), "No such file or directory");
    EXPECT_EQ(dir.count(), 0U);
}

TEST(truncated_files) {
    const std::string bytes = st::save(dict("x", make({100}, at::kFloat)));
    for (const std::size_t length : {std::size_t{0}, std::size_t{4}, std::size_t{7}, std::size_t{8}, std::size_t{20},
                                     bytes.size() - 400, bytes.size() - 1}) {
        EXPECT(!refused(bytes.substr(0, length)).empty());
    }
    EXPECT(!refused(bytes + '\0').empty());
}

TEST(garbage_files) {
    refused(std::string(64, '\0'));
    refused(std::string(64, '\xff'));
    refused(file_bytes("[]"));
    refused(file_bytes("{\"x\":"));
    refused(file_bytes("\xc3\x28"));
    refused(file_bytes(R"({"x":{"dtype":"F99","shape":[],"data_offsets":[0,4]}})", "1234"));
    refused(file_bytes(R"({"x":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "1234"));
    refused(file_bytes(R"({"x":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}})", "1"));
    refused(file_bytes(R"({"x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})", "12"));
    EXPECT_HAS(refused("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), "Git LFS");
}

TEST(a_dtype_without_a_torch_dtype) {
    const TempDir dir;
    write_file(dir.file("f6"), file_bytes(R"({"six":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}})", "123"));
    const std::string text = ERROR_OF(st::load_file(dir.file("f6")));
    EXPECT_HAS(text, "six");
    EXPECT_HAS(text, "F6_E2M3");
    const st::File file(dir.file("f6"));
    EXPECT_EQ(file.dtype("six"), "F6_E2M3");
    EXPECT_EQ(file.shape("six"), (std::vector<std::int64_t>{4}));
    EXPECT_HAS(ERROR_OF(file.get_tensor("six")), "F6_E2M3");
    EXPECT_HAS(ERROR_OF(file.tensor_dtype("six")), "F6_E2M3");
}

TEST(sparse_tensors) {
    check_refused(
        dict("test", at::eye(3).to_sparse()),
        "You are trying to save a sparse tensors: `['test']` which this library does not support. You can make "
        "it a dense tensor before saving with `.to_dense()` but be aware this might make a much larger file "
        "than needed.");
}

TEST(shared_memory) {
    const at::Tensor whole = make({4, 4}, at::kFloat);
    st::Tensors tensors = dict("whole", whole);
    tensors.insert("row", whole[1]);
    tensors.insert("other", make({2}, at::kFloat));
    check_refused(tensors, "share memory");
    check_refused(tensors, "{'row', 'whole'}");
    check_refused(tensors, "save_model");
    // Adjacent tensors of one storage do not overlap.
    st::Tensors halves = dict("first", whole.slice(0, 0, 2));
    halves.insert("second", whole.slice(0, 2, 4));
    EXPECT(identical(st::load(st::save(halves)), halves));
}

TEST(tensors_that_are_not_contiguous) {
    const st::Tensors tensors = dict("bent", make({2, 3}, at::kFloat).t());
    check_refused(tensors, "`bent`");
    check_refused(tensors, ".contiguous()");
}

TEST(meta_tensors) { check_refused(dict("m", at::empty({2}, at::kMeta)), "Cannot copy out of meta tensor"); }

TEST(dtypes_without_a_code) {
    check_refused(dict("wide", make({2}, at::kComplexDouble)), "wide");
    check_refused(dict("wide", make({2}, at::kComplexDouble)), "omplex");
}

TEST(reserved_names) { check_refused(dict("__metadata__", make({2}, at::kFloat)), "__metadata__"); }

TEST(text_that_is_not_utf8) {
    check_refused(dict("\xff", make({2}, at::kFloat)), "UTF-8");
    EXPECT_HAS(ERROR_OF(st::save(dict("x", make({2}, at::kFloat)), {{"key", "\xff"}})), "UTF-8");
}

TEST(checks_come_in_order) {
    // With every fault at once, the first in the list is reported.
    const at::Tensor bent = make({2, 3}, at::kFloat).t();
    st::Tensors tensors = dict("meta", at::empty({2}, at::kMeta));
    tensors.insert("bent", bent);
    EXPECT_HAS(ERROR_OF(st::save(tensors)), "`bent`");
    tensors.insert("same", bent);
    EXPECT_HAS(ERROR_OF(st::save(tensors)), "share memory");
    tensors.insert("sparse", at::eye(2).to_sparse());
    EXPECT_HAS(ERROR_OF(st::save(tensors)), "['sparse']");
}

TEST(undefined_tensors) { check_refused(dict("hole", at::Tensor()), "tensor 'hole' is undefined"); }

TEST(load_file_refers_checkpoints_to_load_sharded) {
    const TempDir dir;
    write_file(dir.file("model.safetensors.index.json"), "{\"metadata\": {}, \"weight_map\": {}}");
    EXPECT_HAS(ERROR_OF(st::load_file(dir.file("."))), "load_sharded");
    EXPECT_HAS(ERROR_OF(st::load_file(dir.file("model.safetensors.index.json"))), "load_sharded");
}

namespace {

// Returns the error that `body` throws.
template <typename Body>
st::Error caught(Body&& body) {
    try {
        body();
    } catch (const st::Error& error) {
        return error;
    }
    check::report(__FILE__, __LINE__, "nothing was thrown");
    return {"", st::ErrorCategory::safetensor, -1, -1};
}

void check_numbers(const st::Error& error, st::ErrorCategory kind, sft_status code, int os_error) {
    EXPECT(error.category() == kind);
    EXPECT_EQ(error.code(), code);
    EXPECT_EQ(error.os_error(), os_error);
}

}  // namespace

TEST(errors_have_categories) {
    const TempDir dir;
    const st::Tensors tensors = dict("x", make({2}, at::kFloat));
    st::save_file(tensors, dir.file("f"));
    write_file(dir.file("short"), "1234");
    st::File file(dir.file("f"));
    using Kind = st::ErrorCategory;
    check_numbers(caught([&] { st::load_file(dir.file("absent")); }), Kind::os, SFT_ERROR_IO, ENOENT);
    check_numbers(caught([&] { st::File(dir.file(".")); }), Kind::os, SFT_ERROR_IO, EISDIR);
    check_numbers(caught([&] { st::save_file(tensors, dir.file("no/f")); }), Kind::os, SFT_ERROR_IO, ENOENT);
    check_numbers(caught([&] { st::load_file(dir.file("short")); }), Kind::safetensor, SFT_ERROR_FILE_TOO_SMALL, 0);
    check_numbers(caught([&] { st::load(std::string("1234")); }), Kind::safetensor, SFT_ERROR_FILE_TOO_SMALL, 0);
    check_numbers(caught([&] { st::load(std::string("1234"), at::kCPU, st::LoadOptions()); }), Kind::safetensor,
                  SFT_ERROR_FILE_TOO_SMALL, 0);
    check_numbers(caught([&] { file.get_tensor("y"); }), Kind::safetensor, SFT_ERROR_TENSOR_NOT_FOUND, 0);
    check_numbers(caught([&] { st::load_sharded(dir.file(".")); }), Kind::safetensor, SFT_ERROR_INDEX, 0);
    check_numbers(caught([&] { st::save(dict("x", at::eye(2).to_sparse())); }), Kind::value, 0, 0);
    check_numbers(caught([&] { st::save_sharded(tensors, dir.file("d"), {}, {0}); }), Kind::value, 0, 0);
    check_numbers(caught([&] { st::save_sharded(tensors, dir.file("d"), {}, {1, "a/b"}); }), Kind::safetensor,
                  SFT_ERROR_INVALID_ARGUMENT, 0);
    check_numbers(caught([&] { st::set_transfer_options({-1, 0}); }), Kind::value, 0, 0);
    check_numbers(caught([&] { st::load_model(torch::nn::Linear(2, 2), dir.file("f")); }), Kind::runtime, 0, 0);
    file.close();
    check_numbers(caught([&] { file.keys(); }), Kind::safetensor, SFT_ERROR_CLOSED, 0);
}

TEST(the_shared_vectors_are_refused_with_the_listed_status) {
    std::ifstream list(VECTORS "/malformed.tsv");
    int count = 0;
    for (std::string name, status; list >> name >> status; ++count) {
        const std::string path = std::string(VECTORS "/malformed/") + name + ".safetensors";
        for (const st::Backend backend : kBackends) {
            const st::Error error = caught([&] { st::load_file(path, at::kCPU, backend); });
            EXPECT_EQ(std::string(sft_status_get_name(error.code())), status);
            EXPECT_HAS(error.what(), path);
        }
    }
    EXPECT(count >= 150);
}

TEST(an_error_is_a_plain_c10_error) {
    const TempDir dir;
    try {
        st::load_file(dir.file("absent"));
        EXPECT(!"thrown");
    } catch (const c10::Error& error) {
        EXPECT_EQ(std::string(error.what()), std::string(error.what_without_backtrace()));
        EXPECT_EQ(error.msg(), "No such file or directory: " + dir.file("absent"));
    }
}
