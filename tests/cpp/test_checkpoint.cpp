// Checkpoints of several files: loading tensors and modules, saving, and errors of the index.

#include <sys/mman.h>
#include <torch/nn.h>

#include <thread>

#include "support.h"

using namespace support;
using Names = std::vector<std::string>;

namespace {

constexpr const char* kIndex = "model.safetensors.index.json";

// Returns 5 tensors of 16 bytes each; two fit into a shard of 40 bytes.
st::Tensors five() {
    st::Tensors tensors;
    for (const char* name : {"e", "b", "a", "d", "c"}) {
        tensors.insert(name, make({4}, at::kFloat, static_cast<unsigned>(name[0])));
    }
    return tensors;
}

st::ShardedSaveOptions of_at_most(int64_t bytes) {
    st::ShardedSaveOptions options;
    options.max_shard_size = bytes;
    return options;
}

Names save_five(const TempDir& dir) { return st::save_sharded(five(), dir.file(""), {{"by", "test"}}, of_at_most(40)); }

void write_index(const TempDir& dir, const std::string& weight_map) {
    write_file(dir.file(kIndex), "{\"metadata\": {}, \"weight_map\": " + weight_map + "}");
}

}  // namespace

TEST(sharded_round_trip) {
    const TempDir dir;
    EXPECT_EQ(save_five(dir), (Names{"model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors",
                                     "model-00003-of-00003.safetensors", kIndex}));
    EXPECT_EQ(dir.count(), 4U);
    for (const std::string& path : {dir.file(""), dir.file(kIndex)}) {
        for (const st::Backend backend : kBackends) {
            st::LoadOptions options;
            options.backend = backend;
            const st::Tensors loaded = st::load_sharded(path, at::kCPU, options);
            EXPECT(identical(loaded, five()));
            // In the order of shards, then names, because all have the same dtype.
            EXPECT_EQ(loaded.keys(), (Names{"b", "e", "a", "d", "c"}));
        }
    }
    EXPECT(st::File(dir.file("model-00002-of-00003.safetensors")).metadata() ==
           (st::Metadata{{"by", "test"}, {"format", "pt"}}));
    EXPECT_EQ(read_file(dir.file(kIndex)),
              "{\n  \"metadata\": {\n    \"total_size\": 80\n  },\n  \"weight_map\": {\n"
              "    \"a\": \"model-00002-of-00003.safetensors\",\n    \"b\": \"model-00001-of-00003.safetensors\",\n"
              "    \"c\": \"model-00003-of-00003.safetensors\",\n    \"d\": \"model-00002-of-00003.safetensors\",\n"
              "    \"e\": \"model-00001-of-00003.safetensors\"\n  }\n}\n");
}

TEST(sharded_in_one_file) {
    const TempDir dir;
    save_five(dir);
    st::ShardedSaveOptions options;
    options.durable = true;
    // The file replaces the shards.
    EXPECT_EQ(st::save_sharded(five(), dir.file(""), {}, options), (Names{"model.safetensors"}));
    EXPECT_EQ(dir.count(), 1U);
    EXPECT(identical(st::load_sharded(dir.file("")), five()));
    EXPECT(identical(st::load_sharded(dir.file("model.safetensors")), st::load_file(dir.file("model.safetensors"))));
    options.stem = "other";
    st::save_sharded(st::Tensors(), dir.file("new/directory"), {}, options);
    EXPECT_EQ(st::load_sharded(dir.file("new/directory")).size(), 0U);
}

TEST(sharded_options) {
    const TempDir dir;
    save_five(dir);
    st::LoadOptions load;
    load.names = [](const std::string& name) { return name == "a" || name == "c"; };
    load.dtype = at::kHalf;
    int64_t last = 0;
    int64_t total = 0;
    load.progress = [&](int64_t done, int64_t all) {
        last = done;
        total = all;
    };
    const st::Tensors loaded = st::load_sharded(dir.file(""), at::kCPU, load);
    EXPECT_EQ(loaded.keys(), (Names{"a", "c"}));
    EXPECT(at::equal(loaded.at("c"), five().at("c").to(at::kHalf)));
    EXPECT(last == 32 && total == 32);
    EXPECT(st::load_sharded(dir.file(""), at::kMeta).at("a").is_meta());

    st::ShardedSaveOptions save = of_at_most(16);
    save.progress = load.progress;
    st::save_sharded(five(), dir.file("b"), {}, save);
    EXPECT(last == total && total > 80);
    save.progress = [](int64_t, int64_t) { throw std::runtime_error("enough"); };
    bool stopped = false;
    try {
        st::save_sharded(five(), dir.file("c"), {}, save);
    } catch (const std::runtime_error& error) {
        stopped = std::string(error.what()) == "enough";
    }
    EXPECT(stopped);
}

TEST(checkpoint_is_read_like_a_file) {
    const TempDir dir;
    save_five(dir);
    const st::Tensors all = five();
    for (const st::Backend backend : kBackends) {
        const st::Checkpoint checkpoint(dir.file(""), at::kCPU, backend);
        EXPECT_EQ(checkpoint.keys(), (Names{"a", "b", "c", "d", "e"}));
        EXPECT_EQ(checkpoint.offset_keys(), (Names{"b", "e", "a", "d", "c"}));
        EXPECT_EQ(checkpoint.size(), 5U);
        EXPECT_EQ(checkpoint.shards().size(), 3U);
        EXPECT_EQ(checkpoint.shard_of("d"), "model-00002-of-00003.safetensors");
        EXPECT(checkpoint.contains("c") && !checkpoint.contains("z"));
        EXPECT_EQ(checkpoint.dtype("c"), "F32");
        EXPECT_EQ(checkpoint.shape("c"), (std::vector<int64_t>{4}));
        EXPECT_EQ(checkpoint.metadata().at("by"), "test");
        const auto [begin, end] = checkpoint.byte_range("d");
        EXPECT_EQ(end - begin, 16);
        const std::string bytes = read_file(dir.file(checkpoint.shard_of("d")));
        EXPECT(std::string(static_cast<const char*>(all.at("d").data_ptr()), 16) ==
               bytes.substr(static_cast<std::size_t>(begin), 16));
        EXPECT(identical(checkpoint.get_tensor("d"), all.at("d")));
        const std::vector<at::Tensor> some = checkpoint.get_tensors(Names{"c", "a", "e"});
        EXPECT(identical(some[0], all.at("c")) && identical(some[1], all.at("a")) && identical(some[2], all.at("e")));
        EXPECT(identical(checkpoint.get_tensors(), all));
        const auto is_low = [](const std::string& name) { return name < "c"; };
        EXPECT_EQ(checkpoint.get_tensors(is_low).keys(), (Names{"b", "a"}));
        EXPECT(checkpoint.get_tensors(is_low, at::kMeta).at("a").is_meta());
        EXPECT(checkpoint.get_tensor("a", at::kMeta).is_meta());
        EXPECT(identical(checkpoint.get_slice("c", {at::indexing::Slice(1, 3)}), all.at("c").slice(0, 1, 3)));
        EXPECT_HAS(ERROR_OF(checkpoint.get_tensor("z")), "File does not contain tensor z");
        EXPECT_HAS(ERROR_OF(checkpoint.shard_of("z")), "File does not contain tensor z");
    }
    const st::Checkpoint one(dir.file("model-00001-of-00003.safetensors"));
    EXPECT_EQ(one.shards(), (Names{"model-00001-of-00003.safetensors"}));
}

TEST(invalid_indexes_are_refused) {
    const TempDir dir;
    const Names files = save_five(dir);
    const std::string first = files[0];
    const std::string index = read_file(dir.file(kIndex));

    write_index(dir, "{\"b\": \"../x.safetensors\"}");
    std::string text = ERROR_OF(st::load_sharded(dir.file("")));
    EXPECT_HAS(text, dir.file(kIndex));
    EXPECT_HAS(text, "tensor \"b\" into \"../x.safetensors\", which is not a file in the directory of the index");
    write_index(dir, "{\"b\": \"/etc/hostname\"}");
    EXPECT_HAS(ERROR_OF(st::Checkpoint(dir.file(""))), "/etc/hostname");
    write_index(dir, "{\"b\": \"" + first + "\"}");
    text = ERROR_OF(st::load_sharded(dir.file("")));
    EXPECT_HAS(text, first);
    EXPECT_HAS(text, "\"e\"");
    write_index(dir, "{\"a\": \"" + first + "\", \"b\": \"" + first + "\", \"e\": \"" + first + "\"}");
    EXPECT_HAS(ERROR_OF(st::load_sharded(dir.file(""))), "the index puts tensor \"a\" into shard \"" + first + "\"");
    write_index(dir, "7");
    EXPECT_HAS(ERROR_OF(st::load_sharded(dir.file(""))), "the index is not valid");

    write_file(dir.file(kIndex), index);
    std::filesystem::remove(dir.file(files[2]));
    text = ERROR_OF(st::load_sharded(dir.file("")));
    EXPECT_HAS(text, "No such file or directory: " + dir.file(files[2]));
    EXPECT_HAS(text, kIndex);
    write_file(dir.file(files[2]), "0123456789");
    EXPECT_HAS(ERROR_OF(st::load_sharded(dir.file(""))), files[2]);

    std::filesystem::remove(dir.file(kIndex));
    EXPECT_HAS(ERROR_OF(st::load_sharded(dir.file(""))), "not their index");
    EXPECT_HAS(ERROR_OF(st::load_sharded(dir.file("nothing"))), "No such file or directory: " + dir.file("nothing"));
}

TEST(invalid_sharded_saves_are_refused) {
    const TempDir dir;
    const Names before = save_five(dir);
    const at::Tensor shared = make({8}, at::kFloat);
    st::Tensors tied = five();
    tied.insert("x", shared);
    tied.insert("y", shared);
    // Aliasing is checked across shards, too.
    EXPECT_HAS(ERROR_OF(st::save_sharded(tied, dir.file(""), {}, of_at_most(1))), "share memory");
    EXPECT_HAS(ERROR_OF(st::save_sharded(five(), dir.file(""), {}, of_at_most(0))), "max_shard_size is 0");
    st::ShardedSaveOptions options;
    options.stem = "../model";
    EXPECT_HAS(ERROR_OF(st::save_sharded(five(), dir.file(""), {}, options)), "../model");
    st::Tensors reserved = five();
    reserved.insert("__metadata__", make({1}, at::kFloat));
    EXPECT_HAS(ERROR_OF(st::save_sharded(reserved, dir.file(""), {}, of_at_most(1))), "__metadata__");
    write_file(dir.file("file"), "");
    EXPECT_HAS(ERROR_OF(st::save_sharded(five(), dir.file("file"))), dir.file("file"));
    EXPECT_EQ(dir.count(), before.size() + 1);
    EXPECT(identical(st::load_sharded(dir.file("")), five()));
}

TEST(an_error_stops_the_threads_that_write_other_files) {
    if (std::thread::hardware_concurrency() == 1) {
        return;  // one thread writes all files
    }
    const TempDir dir;
    // The second file fails at once. Pages of fresh memory show how much of the first is read to be written.
    std::filesystem::create_directory(dir.file("model-00002-of-00002.safetensors"));
    const at::Tensor large = at::empty({512 << 20}, at::kByte);
    EXPECT_HAS(ERROR_OF(st::save_sharded({{"a", large}, {"b", at::zeros({1})}}, dir.file(""), {}, of_at_most(1))),
               "model-00002-of-00002.safetensors");
    // Aligned to any size of pages.
    const auto last_page = (reinterpret_cast<uintptr_t>(large.data_ptr()) + large.nbytes() - 1) & ~uintptr_t{0xffff};
    unsigned char is_resident = 9;
    EXPECT_EQ(mincore(reinterpret_cast<void*>(last_page), 1, &is_resident), 0);
    EXPECT_EQ(is_resident & 1, 0);
    EXPECT_EQ(dir.count(), 1U);
}

TEST(variants_and_extra_tensors) {
    const TempDir dir;
    save_five(dir);
    st::ShardedSaveOptions half = of_at_most(40);
    half.stem = "model.fp16";
    st::Tensors others;
    for (const auto& [name, tensor] : five()) {
        others.insert(name, tensor + 1);
    }
    st::save_sharded(others, dir.file(""), {}, half);
    std::filesystem::rename(dir.file("model.fp16.safetensors.index.json"),
                            dir.file("model.safetensors.index.fp16.json"));
    st::CheckpointOptions options;
    options.variant = "fp16";
    EXPECT(identical(st::load_sharded(dir.file("")), five()));
    EXPECT(identical(st::load_sharded(dir.file(""), at::kCPU, {}, options), others));
    const st::Checkpoint checkpoint(dir.file(""), at::kCPU, st::Backend::pread, options);
    EXPECT(at::equal(checkpoint.get_tensor("a"), others.at("a")));
    options.variant = "bf16";
    EXPECT_HAS(ERROR_OF(st::load_sharded(dir.file(""), at::kCPU, {}, options)), "fp16.json (variant \"fp16\")");
    EXPECT_HAS(ERROR_OF(st::load_sharded(dir.file(kIndex), at::kCPU, {}, options)), "this is a file");

    // The index omits a tensor of its files.
    write_index(dir, "{\"a\": \"model-00002-of-00003.safetensors\", \"e\": \"model-00001-of-00003.safetensors\"}");
    options = {};
    EXPECT_HAS(ERROR_OF(st::load_sharded(dir.file(""))), "set `extra` to \"ignore\"");
    options.extra = st::Extra::ignore;
    const st::Tensors listed = st::load_sharded(dir.file(""), at::kCPU, {}, options);
    EXPECT_EQ(listed.size(), std::size_t(2));
    EXPECT(at::equal(listed.at("a"), five().at("a")) && at::equal(listed.at("e"), five().at("e")));
    const st::Checkpoint part(dir.file(""), at::kCPU, st::Backend::mmap, options);
    EXPECT_EQ(part.size(), std::size_t(2));
    EXPECT_EQ(part.offset_keys(), (Names{"e", "a"}));
    EXPECT(!part.contains("b"));
    torch::nn::Module module;
    const at::Tensor a = module.register_buffer("a", at::zeros({4}));
    const at::Tensor e = module.register_buffer("e", at::zeros({4}));
    st::LoadModelOptions model_options;
    model_options.extra = st::Extra::ignore;
    EXPECT(st::load_model(module, dir.file(""), model_options).unexpected.empty());
    EXPECT(at::equal(a, five().at("a")));
    model_options = {};
    model_options.strict = false;
    model_options.variant = "fp16";
    st::load_model(module, dir.file(""), model_options);
    EXPECT(at::equal(e, others.at("e")));
}
