// Source: files that a program reads by its own means.

#include <atomic>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <thread>

#include "support.h"

using namespace support;
using at::indexing::Slice;

namespace {

constexpr const char* kObjectName = "s3://bucket/model.safetensors";

// An object in a bucket.
class Object : public st::Source {
  public:
    explicit Object(std::string bytes) : bytes_(std::move(bytes)) {}

    std::uint64_t length() override { return bytes_.size(); }

    std::optional<std::string> identity() override { return etag; }

    void read(std::uint64_t offset, const sft_buffer* buffers, std::size_t count) override {
        ++reads;
        if (fault) {
            fault();
        }
        for (std::size_t i = 0; i < count; ++i) {
            std::memcpy(buffers[i].data, bytes_.data() + offset, buffers[i].nbytes);
            offset += buffers[i].nbytes;
        }
    }

    std::atomic<int> reads{0};
    std::function<void()> fault;
    std::optional<std::string> etag;

  private:
    std::string bytes_;
};

st::Tensors stored_tensors() {
    st::Tensors tensors;
    tensors.insert("large", make({3, 1 << 20}, at::kFloat, 1));
    tensors.insert("matrix", make({6, 4}, at::kHalf, 2));
    tensors.insert("empty", make({0, 3}, at::kFloat, 3));
    return tensors;
}

std::shared_ptr<Object> object_of(const st::Tensors& tensors) {
    const TempDir dir;
    st::save_file(tensors, dir.file("f"), {{"key", "value"}});
    return std::make_shared<Object>(read_file(dir.file("f")));
}

}  // namespace

TEST(a_source_is_read_like_a_file) {
    const st::Tensors tensors = stored_tensors();
    const auto object = object_of(tensors);
    EXPECT(identical(st::load_file(object, kObjectName), tensors));
    st::LoadOptions options;
    options.names = {"m*"};
    EXPECT_EQ(st::load_file(object, kObjectName, at::kCPU, options).size(), 1U);

    st::File file(object, kObjectName);
    EXPECT_EQ(file.metadata().at("key"), "value");
    EXPECT(identical(file.get_tensors(), tensors));
    EXPECT(
        identical(file.get_slice("large", {1, Slice(7, 9)}), tensors.at("large").index({1, Slice(7, 9)}).contiguous()));
    at::Tensor part = at::zeros({2, 4}, at::kHalf);
    file.read_into({{"matrix", {2, 0}, part}});
    EXPECT(identical(part, tensors.at("matrix").narrow(0, 2, 2).contiguous()));
    st::Tensors fetched;
    for (auto& [name, tensor] : file.prefetch()) {
        fetched.insert(name, tensor);
    }
    EXPECT(identical(fetched, tensors));
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
        threads.emplace_back([&] { EXPECT(identical(file.get_tensor("large"), tensors.at("large"))); });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    EXPECT_EQ(object.use_count(), 2);
    file.close();
    EXPECT_EQ(object.use_count(), 1);
}

TEST(what_a_source_throws_is_in_the_error) {
    const auto object = object_of(stored_tensors());
    st::File file(object, kObjectName);
    object->fault = [] { throw std::runtime_error("503: try again later"); };
    const std::string text = ERROR_OF(file.get_tensor("large"));
    EXPECT_HAS(text, kObjectName);
    EXPECT_HAS(text, "503: try again later");
    EXPECT_HAS(text, "\"large\"");
    EXPECT_HAS(ERROR_OF(st::File(object, kObjectName)), "503: try again later");
    object->fault = [] { throw 7; };
    EXPECT_HAS(ERROR_OF(file.get_tensor("large")), "not a std::exception");
    object->fault = [] { throw st::Error("404: gone", st::ErrorCategory::os, SFT_ERROR_IO, ENOENT); };
    try {
        file.get_tensor("large");
        EXPECT(false);
    } catch (const st::Error& error) {
        EXPECT_EQ(error.code(), SFT_ERROR_IO);
        EXPECT_EQ(error.os_error(), ENOENT);
        EXPECT_HAS(error.what(), "404: gone");
    }
    object->fault = nullptr;
    object->etag = "another";
    EXPECT_HAS(ERROR_OF(file.get_tensor("large")), "was replaced while it was read");
    EXPECT_HAS(ERROR_OF(st::File(std::make_shared<Object>("not safetensors"), kObjectName)), kObjectName);
    EXPECT_HAS(ERROR_OF(st::File(std::shared_ptr<st::Source>(), kObjectName)), "source is null");
    file.close();
    EXPECT_EQ(object.use_count(), 1);
}
