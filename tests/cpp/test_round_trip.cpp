// load_file, load, save_file and save: loaded tensors equal saved ones, bit for bit, in the right order.

#include "support.h"

using namespace support;
using Names = std::vector<std::string>;

namespace {

// The CPU, and an accelerator if one exists and its kernels are linked.
std::vector<at::Device> devices() {
    std::vector<at::Device> found{at::kCPU};
    if (at::hasCUDA()) {
        found.emplace_back(at::kCUDA, 0);
    }
    return found;
}

st::Tensors one_of_each() {
    st::Tensors tensors;
    unsigned seed = 0;
    for (const Dtype& dtype : dtypes()) {
        tensors.insert(dtype.code, make({3, 4}, dtype.type, ++seed));
    }
    return tensors;
}

st::Tensors to_cpu(const st::Tensors& tensors) {
    st::Tensors result;
    for (const auto& [name, tensor] : tensors) {
        result.insert(name, tensor.cpu());
    }
    return result;
}

}  // namespace

TEST(prefault_and_durable_change_no_byte) {
    const TempDir dir;
    st::Tensors tensors = one_of_each();
    tensors.insert("large", make({20 << 20}, at::kByte, 7));
    st::save_file(tensors, dir.file("plain"));
    st::save_file(tensors, dir.file("durable"), {}, {/*durable=*/true});
    EXPECT(read_file(dir.file("durable")) == read_file(dir.file("plain")));
    for (const st::Backend backend : kBackends) {
        for (const std::optional<bool> prefault : {std::optional<bool>(), {true}, {false}}) {
            EXPECT(identical(st::load_file(dir.file("plain"), at::kCPU, backend, prefault), tensors));
        }
    }
}

TEST(every_dtype_on_every_backend_and_device) {
    const TempDir dir;
    const st::Tensors tensors = one_of_each();
    EXPECT(tensors.size() >= 18);
    for (const at::Device device : devices()) {
        st::Tensors source;
        for (const auto& [name, tensor] : tensors) {
            source.insert(name, tensor.to(device));
        }
        st::save_file(source, dir.file("all"));
        for (const st::Backend backend : kBackends) {
            const st::Tensors loaded = st::load_file(dir.file("all"), device, backend);
            EXPECT(identical(to_cpu(loaded), tensors));
            for (const auto& entry : loaded) {
                EXPECT_EQ(entry.second.device(), device);
            }
        }
        EXPECT(identical(to_cpu(st::load(read_file(dir.file("all")), device)), tensors));
    }
    const st::File file(dir.file("all"));
    for (const Dtype& dtype : dtypes()) {
        EXPECT_EQ(file.dtype(dtype.code), dtype.code);
    }
}

TEST(device_defaults_to_the_cpu) {
    const TempDir dir;
    st::Tensors tensors;
    tensors.insert("a", make({2}, at::kFloat));
    st::save_file(tensors, dir.file("a"));
    EXPECT(st::load_file(dir.file("a")).at("a").is_cpu());
    EXPECT(st::load(st::save(tensors)).at("a").is_cpu());
}

TEST(meta_device_loads_shapes_and_dtypes) {
    const TempDir dir;
    st::save_file(one_of_each(), dir.file("all"));
    const st::Tensors loaded = st::load_file(dir.file("all"), at::kMeta);
    EXPECT_EQ(loaded.size(), dtypes().size());
    for (const Dtype& dtype : dtypes()) {
        const at::Tensor tensor = loaded.at(dtype.code);
        EXPECT(tensor.is_meta());
        EXPECT_EQ(tensor.scalar_type(), dtype.type);
        EXPECT_EQ(tensor.sizes(), (at::IntArrayRef{3, 4}));
    }
}

TEST(scalars_and_zero_sizes) {
    const TempDir dir;
    st::Tensors tensors;
    tensors.insert("scalar", make({}, at::kDouble));
    tensors.insert("bit", make({}, at::kBool));
    tensors.insert("empty", make({0}, at::kFloat));
    tensors.insert("hollow", make({2, 0, 3}, at::kLong));
    st::save_file(tensors, dir.file("odd"));
    for (const st::Backend backend : kBackends) {
        EXPECT(identical(st::load_file(dir.file("odd"), at::kCPU, backend), tensors));
    }
    EXPECT(identical(st::load(st::save(tensors)), tensors));
}

TEST(no_tensors) {
    const TempDir dir;
    const std::string bytes = st::save(st::Tensors());
    EXPECT_EQ(bytes, file_bytes("{}      "));
    EXPECT(st::load(bytes).empty());
    st::save_file(st::Tensors(), dir.file("none"));
    EXPECT_EQ(read_file(dir.file("none")), bytes);
    EXPECT(st::load_file(dir.file("none")).empty());
}

TEST(unusual_names) {
    const TempDir dir;
    st::Tensors tensors;
    for (const char* name : {"", " ", "a.b.c", "quote\"back\\slash", "new\nline\ttab", "\x01\x1f", "\u00e9\u00df\u6f22",
                             "\U0001F600", "/", "metadata", "{}", "\u2028"}) {
        tensors.insert(name, make({2}, at::kFloat, static_cast<unsigned>(tensors.size())));
    }
    tensors.insert(std::string("nul\0inside", 10), make({2}, at::kFloat, 99));
    st::save_file(tensors, dir.file("names"));
    for (const st::Backend backend : kBackends) {
        EXPECT(identical(st::load_file(dir.file("names"), at::kCPU, backend), tensors));
    }
    const st::File file(dir.file("names"));
    for (const auto& [name, tensor] : tensors) {
        EXPECT(file.contains(name));
        EXPECT(identical(file.get_tensor(name), tensor));
    }
}

TEST(tensors_come_in_file_order) {
    const TempDir dir;
    // A foreign file: the data are sorted neither by name nor by dtype, and the header has another order.
    write_file(dir.file("foreign"), file_bytes(R"({"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]},)"
                                               R"("c":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                                               R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                                               "\x0a\x0b\x0c"));
    for (const st::Backend backend : kBackends) {
        const st::Tensors loaded = st::load_file(dir.file("foreign"), at::kCPU, backend);
        EXPECT_EQ(loaded.keys(), (Names{"c", "a", "b"}));
        EXPECT_EQ(loaded.at("c").item<int>(), 10);
        EXPECT_EQ(loaded.at("a").item<int>(), 11);
        EXPECT_EQ(loaded.at("b").item<int>(), 12);
    }
    // Our order: wide dtypes first, names bytewise.
    st::Tensors tensors;
    tensors.insert("b", make({2}, at::kFloat));
    tensors.insert("B", make({2}, at::kFloat));
    tensors.insert("a", make({2}, at::kByte));
    tensors.insert("c", make({2}, at::kLong));
    EXPECT_EQ(st::load(st::save(tensors)).keys(), (Names{"c", "B", "b", "a"}));
}

TEST(bytes_on_disk) {
    st::Tensors tensors;
    tensors.insert("x", at::tensor({1, 2}, at::kByte));
    EXPECT_EQ(st::save(tensors), file_bytes(R"({"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}   )", "\x01\x02"));
    EXPECT_EQ(st::save(tensors, {{"format", "pt"}, {"a", "b"}}),
              file_bytes(R"({"__metadata__":{"a":"b","format":"pt"},)"
                         R"("x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}    )",
                         "\x01\x02"));
}

TEST(save_returns_the_bytes_of_save_file) {
    const TempDir dir;
    const st::Tensors tensors = one_of_each();
    const st::Metadata metadata{{"k", "v"}};
    st::save_file(tensors, dir.file("f"), metadata);
    EXPECT(read_file(dir.file("f")) == st::save(tensors, metadata));
}

TEST(metadata) {
    const TempDir dir;
    st::Tensors tensors;
    tensors.insert("x", make({1}, at::kByte));
    st::save_file(tensors, dir.file("none"));
    EXPECT(st::File(dir.file("none")).metadata().empty());
    EXPECT(!has(read_file(dir.file("none")), "__metadata__"));

    const st::Metadata metadata{{"format", "pt"}, {"", "empty key"}, {"quote\"", "line\n\u00e9"}, {"empty", ""}};
    st::save_file(tensors, dir.file("some"), metadata);
    EXPECT(st::File(dir.file("some")).metadata() == metadata);

    write_file(dir.file("empty"), file_bytes(R"({"__metadata__":{}})"));
    EXPECT(st::File(dir.file("empty")).metadata().empty());
}

TEST(saving_replaces_a_file) {
    const TempDir dir;
    st::Tensors small;
    small.insert("x", make({2}, at::kByte));
    st::Tensors large;
    large.insert("y", make({5000}, at::kDouble));
    st::save_file(large, dir.file("f"));
    st::save_file(small, dir.file("f"));
    EXPECT(identical(st::load_file(dir.file("f")), small));
    EXPECT_EQ(dir.count(), 1U);
}

TEST(conjugate_and_negative_views_are_saved_with_their_values) {
    const TempDir dir;
    const at::Tensor z = make({2, 3}, at::kInt).to(at::kComplexFloat);
    const at::Tensor w = at::complex(at::arange(4, at::kFloat), at::ones({4}, at::kFloat));
    st::Tensors tensors;
    tensors.insert("conj", w.conj());
    tensors.insert("neg", at::_neg_view(at::arange(4, at::kFloat)));
    tensors.insert("neg_conj", at::_neg_view(z.conj()));
    EXPECT(tensors.at("conj").is_conj() && tensors.at("neg").is_neg());
    st::save_file(tensors, dir.file("views"));
    for (const st::Tensors& loaded : {st::load_file(dir.file("views")), st::load(st::save(tensors))}) {
        EXPECT(identical(loaded.at("conj"), at::complex(at::arange(4, at::kFloat), -at::ones({4}, at::kFloat))));
        EXPECT(identical(loaded.at("neg"), at::neg(at::arange(4, at::kFloat))));
        EXPECT(at::equal(loaded.at("neg_conj"), tensors.at("neg_conj").resolve_conj().resolve_neg()));
    }
}

TEST(gradients_are_not_saved) {
    const TempDir dir;
    st::Tensors tensors;
    tensors.insert("leaf", make({2}, at::kFloat).requires_grad_());
    tensors.insert("result", tensors.at("leaf") * 2);
    st::save_file(tensors, dir.file("grad"));
    for (const auto& [name, tensor] : st::load_file(dir.file("grad"))) {
        EXPECT(!tensor.requires_grad());
        EXPECT(identical(tensor, tensors.at(name).detach()));
    }
}

TEST(load_takes_a_view_into_a_longer_string) {
    st::Tensors tensors;
    tensors.insert("x", make({7}, at::kDouble));
    const std::string bytes = st::save(tensors);
    // Shifted by one byte, so the data are not aligned to their elements.
    for (const std::size_t shift : {0, 1, 3, 8}) {
        const std::string padded = std::string(shift, '#') + bytes + "behind";
        const st::Tensors loaded = st::load(std::string_view(padded).substr(shift, bytes.size()));
        EXPECT(identical(loaded, tensors));
    }
}

TEST(misaligned_data_of_a_foreign_file) {
    const TempDir dir;
    const at::Tensor expected = make({3}, at::kDouble);
    const std::string data(static_cast<const char*>(expected.const_data_ptr()), expected.nbytes());
    // A header of odd length, which our writers never produce.
    write_file(dir.file("odd"), file_bytes(R"({"x":{"dtype":"F64","shape":[3],"data_offsets":[0,24]}})", data));
    for (const st::Backend backend : kBackends) {
        const at::Tensor loaded = st::load_file(dir.file("odd"), at::kCPU, backend).at("x");
        EXPECT(identical(loaded, expected));
        EXPECT_EQ(reinterpret_cast<std::uintptr_t>(loaded.const_data_ptr()) % alignof(double), 0U);
    }
}
