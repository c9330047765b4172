// Source: files that a program reads by its own means.

#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

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

// A bucket.
class Bucket : public st::Filesystem {
  public:
    std::shared_ptr<st::Source> open(const std::string& path) override {
        const auto found = objects.find(path);
        if (found == objects.end()) {
            throw st::Error("404: no such object", st::ErrorCategory::os, SFT_ERROR_IO, ENOENT);
        }
        return found->second;
    }

    std::optional<std::vector<std::string>> list(const std::string& directory) override {
        if (!has_listing) {
            return st::Filesystem::list(directory);
        }
        std::vector<std::string> names;
        for (const auto& [path, object] : objects) {
            if (path.rfind(directory + "/", 0) == 0) {
                names.push_back(path.substr(directory.size() + 1));
            }
        }
        return names;
    }

    std::map<std::string, std::shared_ptr<Object>> objects;
    bool has_listing = true;
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

TEST(a_filesystem_holds_checkpoints) {
    torch::nn::Sequential model(torch::nn::Linear(30, 20), torch::nn::Linear(20, 10));
    const TempDir dir;
    const auto directory = dir.file("llm");
    st::SaveModelOptions save;
    save.max_shard_size = 1000;
    st::save_model(model, directory, {}, save);
    Bucket bucket;
    for (const auto& entry : std::filesystem::directory_iterator(directory)) {
        bucket.objects["s3://bucket/llm/" + entry.path().filename().string()] =
            std::make_shared<Object>(read_file(entry.path()));
    }
    const st::Tensors tensors = st::load_sharded(directory);
    for (const bool has_listing : {true, false}) {
        bucket.has_listing = has_listing;
        EXPECT(identical(st::load_sharded(bucket, "s3://bucket/llm"), tensors));
        st::Checkpoint checkpoint(bucket, "s3://bucket/llm/model.safetensors.index.json");
        EXPECT_EQ(checkpoint.shards().size() + 1, bucket.objects.size());
        EXPECT_EQ(checkpoint.shards(), st::Checkpoint(directory).shards());
        EXPECT(identical(checkpoint.get_slice("0.weight", {Slice(3, 5)}), tensors.at("0.weight").narrow(0, 3, 2)));
    }
    torch::nn::Sequential other(torch::nn::Linear(30, 20), torch::nn::Linear(20, 10));
    const st::LoadResult result = st::load_model(other, bucket, "s3://bucket/llm");
    EXPECT(result.missing.empty() && result.unexpected.empty());
    for (const auto& named : other->named_parameters()) {
        EXPECT(torch::equal(named.value(), tensors.at(named.key())));
    }
    EXPECT_HAS(ERROR_OF(st::load_sharded(bucket, "s3://bucket/none")), "s3://bucket/none: 404: no such object");
    EXPECT_HAS(ERROR_OF(st::load_model(other, bucket, "s3://bucket/none/")), "s3://bucket/none/");
    for (const auto& [path, object] : bucket.objects) {
        EXPECT_EQ(object.use_count(), 1);
    }
    bucket.objects.begin()->second = nullptr;
    EXPECT_HAS(ERROR_OF(st::load_sharded(bucket, "s3://bucket/llm")), "source is null");
    bucket.has_listing = true;
    st::CheckpointOptions options;
    options.variant = "fp16";
    EXPECT_HAS(ERROR_OF(st::load_sharded(bucket, "s3://bucket/llm", at::kCPU, {}, options)), "variant \"fp16\"");
}
