// Options of loads and saves: dtype, names, progress, transfers.

#include <limits>

#include "support.h"

using namespace support;

namespace {

st::Tensors weights_and_steps() {
    st::Tensors tensors;
    tensors.insert("a.weight", make({300, 1001}, at::kFloat, 1));
    tensors.insert("a.steps", make({7}, at::kLong, 2));
    tensors.insert("b.weight", at::arange(5, at::kHalf));
    return tensors;
}

// Records the calls of a progress function.
struct ProgressRecord {
    int64_t last = -1;
    int64_t total = -1;
    int calls = 0;

    st::Progress function() {
        return [this](int64_t done, int64_t all) {
            EXPECT(done >= last && done <= all);
            last = done;
            total = all;
            ++calls;
        };
    }
};

}  // namespace

TEST(floating_point_tensors_are_converted_and_others_are_not) {
    const TempDir dir;
    const st::Tensors tensors = weights_and_steps();
    st::save_file(tensors, dir.file("f"));
    const std::string bytes = st::save(tensors);
    for (const st::Backend backend : kBackends) {
        st::LoadOptions options;
        options.backend = backend;
        options.dtype = at::kBFloat16;
        for (const st::Tensors& loaded :
             {st::load_file(dir.file("f"), at::kCPU, options), st::load(bytes, at::kCPU, options)}) {
            EXPECT(identical(loaded.at("a.weight"), tensors.at("a.weight").to(at::kBFloat16)));
            EXPECT(identical(loaded.at("b.weight"), tensors.at("b.weight").to(at::kBFloat16)));
            EXPECT(identical(loaded.at("a.steps"), tensors.at("a.steps")));
        }
    }
    st::LoadOptions options;
    options.dtype = at::kInt;
    EXPECT_HAS(ERROR_OF(st::load_file(dir.file("f"), at::kCPU, options)),
               "dtype must be a floating-point one, not int32");
}

TEST(a_filter_selects_by_name) {
    const TempDir dir;
    const st::Tensors tensors = weights_and_steps();
    st::save_file(tensors, dir.file("f"));
    st::LoadOptions options;
    options.names = [](const std::string& name) { return name.rfind("a.", 0) == 0; };
    for (const st::Backend backend : kBackends) {
        options.backend = backend;
        const st::Tensors loaded = st::load_file(dir.file("f"), at::kCPU, options);
        EXPECT(loaded.size() == 2 && identical(loaded.at("a.weight"), tensors.at("a.weight")));
    }
    options.names = [](const std::string&) { return false; };
    EXPECT(st::load(st::save(tensors), at::kCPU, options).empty());
}

TEST(progress_reaches_the_total) {
    const TempDir dir;
    const st::Tensors tensors = weights_and_steps();
    ProgressRecord saved;
    st::save_file(tensors, dir.file("f"), {}, {/*durable=*/false, saved.function()});
    EXPECT(saved.calls > 0 && saved.last == saved.total &&
           saved.total == static_cast<int64_t>(std::filesystem::file_size(dir.file("f"))));
    ProgressRecord in_memory;
    st::SaveOptions save_options;
    save_options.progress = in_memory.function();
    EXPECT(static_cast<int64_t>(st::save(tensors, {}, save_options).size()) == in_memory.last);
    int64_t bytes = 0;
    for (const auto& entry : tensors) {
        bytes += static_cast<int64_t>(entry.second.nbytes());
    }
    st::LoadOptions options;
    options.backend = st::Backend::pread;
    ProgressRecord loaded;
    options.progress = loaded.function();
    EXPECT(identical(st::load_file(dir.file("f"), at::kCPU, options), tensors));
    EXPECT(loaded.last == bytes && loaded.total == bytes);
}

TEST(an_exception_of_progress_ends_the_save) {
    const TempDir dir;
    write_file(dir.file("f"), "as it was");
    struct Enough {};
    bool thrown = false;
    try {
        st::save_file(weights_and_steps(), dir.file("f"), {},
                      {/*durable=*/false, [](int64_t, int64_t) { throw Enough(); }});
    } catch (const Enough&) {
        thrown = true;
    }
    // Such a small file is complete at the first call of the progress function.
    EXPECT(thrown && dir.count() == 1 && read_file(dir.file("f")) == st::save(weights_and_steps()));
}

TEST(transfer_options_can_be_set) {
    const st::TransferOptions before = st::transfer_options();
    EXPECT(before.pinned_pool_bytes == 64 << 20 && before.threads == 0);
    st::set_transfer_options({8 << 20, 3});
    EXPECT(st::transfer_options().pinned_pool_bytes == 8 << 20 && st::transfer_options().threads == 3);
    EXPECT_HAS(ERROR_OF(st::set_transfer_options({-1, 0})), "must not be negative");
    EXPECT_HAS(ERROR_OF(st::set_transfer_options({0, -1})), "must not be negative");
    EXPECT(st::transfer_options().threads == 3);
    const std::int64_t most = std::numeric_limits<std::int64_t>::max();
    st::set_transfer_options({most, most});
    EXPECT(st::transfer_options().pinned_pool_bytes == most && st::transfer_options().threads == most);
    st::set_transfer_options(before);
    if (!at::hasCUDA()) {
        EXPECT(st::reserve_transfer_memory(8 << 20) == 0);
    }
    st::release_transfer_memory();
    EXPECT(st::release_transfer_memory() == 0);
}

TEST(noncontiguous_tensors_are_written_if_requested) {
    const TempDir dir;
    const at::Tensor matrix = make({30, 20}, at::kFloat, 3);
    st::Tensors tensors;
    tensors.insert("transposed", matrix.t());
    tensors.insert("row", make({5}, at::kLong, 4));
    st::Tensors packed;
    packed.insert("transposed", matrix.t().contiguous());
    packed.insert("row", tensors.at("row"));
    EXPECT_HAS(ERROR_OF(st::save(tensors)), "`force_contiguous`");

    st::SaveOptions options;
    options.force_contiguous = true;
    EXPECT(st::save(tensors, {}, options) == st::save(packed));
    st::save_file(tensors, dir.file("f"), {}, options);
    EXPECT(identical(st::load_file(dir.file("f")).at("transposed"), packed.at("transposed")));
    st::ShardedSaveOptions sharded;
    sharded.force_contiguous = true;
    sharded.max_shard_size = 100;
    EXPECT_EQ(st::save_sharded(tensors, dir.file("directory"), {}, sharded).size(), 3U);
    EXPECT(identical(st::load_sharded(dir.file("directory")).at("transposed"), packed.at("transposed")));
}

TEST(one_of_several_aliasing_tensors_is_written_if_requested) {
    const TempDir dir;
    const at::Tensor memory = make({40}, at::kFloat, 5);
    st::Tensors tensors;
    tensors.insert("b", memory);
    tensors.insert("a part", memory.slice(0, 3, 9));
    tensors.insert("c", memory.view({8, 5}));
    tensors.insert("other", make({3}, at::kLong, 6));
    EXPECT_HAS(ERROR_OF(st::save(tensors)), "keep_one");

    st::SaveOptions options;
    options.shared = st::Shared::keep_one;
    const st::Metadata metadata{{"c", "the caller's"}};
    st::save_file(tensors, dir.file("f"), metadata, options);
    const st::File file(dir.file("f"));
    EXPECT_EQ(file.keys(), (Names{"b", "other"}));
    EXPECT(file.metadata() == (st::Metadata{{"a part", "b"}, {"c", "the caller's"}}));
    EXPECT(identical(file.get_tensor("b"), memory));
    EXPECT(tensors.size() == 4 && metadata.size() == 1);
    st::ShardedSaveOptions sharded;
    sharded.shared = st::Shared::keep_one;
    st::save_sharded(tensors, dir.file("directory"), metadata, sharded);
    EXPECT_EQ(st::Checkpoint(dir.file("directory")).keys(), (Names{"b", "other"}));

    tensors.erase("b");
    tensors.erase("c");
    tensors.insert("another part", memory.slice(0, 8, 12));
    EXPECT_HAS(ERROR_OF(st::save(tensors, {}, options)), "entire storage");
}
