// IncrementalWriter and edit_metadata.

#include <thread>

#include "support.h"

using namespace support;

namespace {

st::Tensors tensors_to_write() {
    st::Tensors tensors;
    tensors.insert("weight", make({30, 40}, at::kFloat, 1));
    tensors.insert("bias", make({40}, at::kHalf, 2));
    tensors.insert("steps", make({}, at::kLong, 3));
    tensors.insert("none", make({0, 3}, at::kFloat, 4));
    return tensors;
}

st::TensorSpecs specs_of(const st::Tensors& tensors) {
    st::TensorSpecs specs;
    for (const auto& [name, tensor] : tensors) {
        specs[name] = {tensor.scalar_type(), tensor.sizes().vec()};
    }
    return specs;
}

st::Tensors only(const at::Tensor& tensor) {
    st::Tensors tensors;
    tensors.insert("a", tensor);
    return tensors;
}

}  // namespace

TEST(incremental_writer_writes_the_bytes_of_a_save) {
    const TempDir dir;
    const st::Tensors tensors = tensors_to_write();
    const st::Metadata metadata{{"format", "pt"}};
    st::save_file(tensors, dir.file("saved"), metadata);
    const std::string expected = read_file(dir.file("saved"));
    for (const bool durable : {false, true}) {
        st::IncrementalWriterOptions options;
        options.durable = durable;
        st::IncrementalWriter by_specs(dir.file("specs"), specs_of(tensors), metadata, options);
        st::IncrementalWriter by_tensors(dir.file("tensors"), tensors, metadata, options);
        for (const char* name : {"none", "weight", "steps", "bias"}) {
            by_specs.write(name, tensors.at(name));
            by_tensors.write(name, tensors.at(name));
        }
        EXPECT(by_specs.missing().empty());
        by_specs.commit();
        by_tensors.commit();
        EXPECT(read_file(dir.file("specs")) == expected);
        EXPECT(read_file(dir.file("tensors")) == expected);
    }
    EXPECT_EQ(dir.count(), 3u);
}

TEST(processes_write_and_read_parts_of_a_file) {
    const TempDir dir;
    const st::Tensors tensors = tensors_to_write();
    st::save_file(tensors, dir.file("saved"));
    const at::Tensor weight = tensors.at("weight");
    st::IncrementalWriter writer(dir.file("joined"), tensors);
    const std::filesystem::path hidden = writer.make_joinable();
    // Rows by one process; columns of the rest by another, which are not contiguous.
    st::write_joined(hidden, {{"weight", {0, 0}, weight.narrow(0, 0, 10)}, {"bias", {0}, tensors.at("bias")}}, true);
    const at::Tensor rest = weight.narrow(0, 10, 20);
    st::write_joined(hidden, {{"weight", {10, 0}, rest.narrow(1, 0, 15)},
                              {"weight", {10, 15}, rest.narrow(1, 15, 25)},
                              {"steps", {}, tensors.at("steps")}});
    EXPECT_HAS(ERROR_OF(writer.commit()), "missing");
    EXPECT_HAS(ERROR_OF(st::write_joined(hidden, {{"other", {0}, tensors.at("bias")}})), "other");
    EXPECT_HAS(ERROR_OF(st::write_joined(hidden, {{"weight", {25, 0}, weight.narrow(0, 0, 10)}})), "25..35");
    EXPECT_HAS(ERROR_OF(st::write_joined(hidden, {{"weight", {0, 0}, weight.to(at::kHalf)}})), "F16");
    EXPECT_HAS(ERROR_OF(st::write_joined(hidden, {{"weight", {0}, weight}})), "1 starts");
    EXPECT_HAS(ERROR_OF(st::write_joined(dir.file("saved"), {})), "not a file that another process is saving");
    writer.commit_joined();
    EXPECT(read_file(dir.file("joined")) == read_file(dir.file("saved")));
    EXPECT_EQ(dir.count(), 2u);

    const st::File file(dir.file("joined"));
    const at::Tensor contiguous = at::zeros({5, 40}), converted = at::zeros({5, 40}, at::kDouble);
    const at::Tensor strided = at::zeros({40, 30});
    const at::Tensor scalar = at::zeros({}, at::kLong);
    file.read_into({{"weight", {7, 0}, contiguous},
                    {"weight", {7, 0}, converted},
                    {"weight", {0, 0}, strided.t()},
                    {"steps", {}, scalar},
                    {"none", {0, 0}, at::zeros({0, 3})}});
    // Some values are NaN.
    const auto rows = weight.narrow(0, 7, 5);
    EXPECT(at::allclose(contiguous, rows, 0, 0, /*equal_nan=*/true));
    EXPECT(at::allclose(converted, rows.to(at::kDouble), 0, 0, /*equal_nan=*/true));
    EXPECT(at::allclose(strided.t(), weight, 0, 0, /*equal_nan=*/true));
    EXPECT(at::equal(scalar, tensors.at("steps")));
    EXPECT_HAS(ERROR_OF(file.read_into({{"weight", {28, 0}, contiguous}})), "28..33");
    EXPECT_HAS(ERROR_OF(file.read_into({{"weight", {0}, contiguous}})), "1 starts");
    EXPECT_HAS(ERROR_OF(file.read_into({{"other", {0, 0}, contiguous}})), "other");
    EXPECT_HAS(ERROR_OF(file.read_into({{"weight", {0, 0}, at::empty({5, 40}, at::kMeta)}})), "meta device");
}

TEST(incremental_writer_takes_every_dtype) {
    const TempDir dir;
    st::Tensors tensors;
    for (const Dtype& dtype : dtypes()) {
        tensors.insert(dtype.code, make({2, 4}, dtype.type));
    }
    st::IncrementalWriter writer(dir.file("f"), specs_of(tensors));
    for (const auto& [name, tensor] : tensors) {
        writer.write(name, tensor);
    }
    writer.commit();
    EXPECT(read_file(dir.file("f")) == st::save(tensors));
}

TEST(incremental_writer_stays_open_after_an_error) {
    const TempDir dir;
    const at::Tensor ones = at::ones({2, 3});
    st::IncrementalWriter writer(dir.file("f"), {{"a", {at::kFloat, {2, 3}}}, {"b", {at::kFloat, {2}}}});
    EXPECT_HAS(ERROR_OF(writer.write("absent", ones)), "f: no tensor \"absent\" was declared");
    EXPECT_HAS(ERROR_OF(writer.write("a", ones.to(at::kDouble))), "\"a\" was declared as F32 of shape [2, 3]");
    EXPECT_HAS(ERROR_OF(writer.write("a", at::ones({3, 2}))), "but given as F32 of shape [3, 2]");
    EXPECT_EQ(ERROR_OF(writer.write("a", at::ones({3, 2}).t())), ERROR_OF(st::save(only(at::ones({3, 2}).t()))));
    EXPECT_EQ(ERROR_OF(writer.write("a", ones.to(at::kMeta))), ERROR_OF(st::save(only(ones.to(at::kMeta)))));
    writer.write("a", ones);
    EXPECT_HAS(ERROR_OF(writer.write("a", ones)), "\"a\" was written already");
    EXPECT_HAS(ERROR_OF(writer.commit()), "f: 1 of 2 tensors are missing, or parts of them: \"b\"");
    EXPECT_EQ(writer.missing(), std::vector<std::string>{"b"});
    EXPECT(writer.is_open());
    writer.write("b", at::ones({2}));
    writer.commit();
    EXPECT(!writer.is_open());
    EXPECT_HAS(ERROR_OF(writer.commit()), "committed or discarded already");
    try {
        writer.write("b", at::ones({2}));
        EXPECT(false);
    } catch (const st::Error& error) {
        EXPECT_EQ(error.code(), SFT_ERROR_CLOSED);
        EXPECT(error.category() == st::ErrorCategory::safetensor);
    }
    writer.discard();
    st::IncrementalWriter moved = std::move(writer);
    EXPECT_HAS(ERROR_OF(writer.missing()), "File is closed");

    EXPECT_HAS(ERROR_OF(st::IncrementalWriter(dir.file("absent/f"), st::TensorSpecs{})), "No such file or directory");
    EXPECT_HAS(ERROR_OF(st::IncrementalWriter(dir.file("f"), {{"__metadata__", {at::kFloat, {}}}})), "__metadata__");
    EXPECT_HAS(ERROR_OF(st::IncrementalWriter(dir.file("f"), {{"c", {at::kComplexDouble, {1}}}})), "complex128");
    EXPECT_EQ(dir.count(), 1u);
}

TEST(incremental_writer_without_a_commit_changes_nothing) {
    const TempDir dir;
    write_file(dir.file("f"), "old");
    {
        st::IncrementalWriter writer(dir.file("f"), only(at::ones({2})));
        const st::IncrementalWriter copy = writer;
        writer.write("a", at::ones({2}));
    }
    st::IncrementalWriter writer(dir.file("f"), only(at::ones({2})));
    writer.discard();
    EXPECT(!writer.is_open());
    EXPECT_EQ(read_file(dir.file("f")), "old");
    EXPECT_EQ(dir.count(), 1u);
}

TEST(threads_share_an_incremental_writer) {
    const TempDir dir;
    st::Tensors tensors;
    std::vector<std::string> names;
    for (int i = 0; i < 24; ++i) {
        names.push_back("t" + std::to_string(i));
        tensors.insert(names.back(), make({i, 1001}, at::kFloat, static_cast<unsigned>(i)));
    }
    st::IncrementalWriter writer(dir.file("f"), tensors);
    std::vector<std::thread> threads;
    for (std::size_t first = 0; first < 8; ++first) {
        threads.emplace_back([&, first] {
            try {
                for (std::size_t i = first; i < names.size(); i += 8) {
                    writer.write(names[i], tensors.at(names[i]));
                }
            } catch (const std::exception& error) {
                check::report(__FILE__, __LINE__, error.what());
            }
        });
    }
    for (std::thread& thread : threads) {
        thread.join();
    }
    writer.commit();
    EXPECT(read_file(dir.file("f")) == st::save(tensors));
}

TEST(metadata_is_edited_in_place_or_by_a_rewrite) {
    const TempDir dir;
    const st::Tensors tensors = tensors_to_write();
    st::save_file(tensors, dir.file("f"), {{"format", "pt"}});
    const st::Tensors mapped = st::load_file(dir.file("f"));

    st::EditOptions in_place;
    in_place.in_place = true;
    const std::string value(300, 'x');
    EXPECT_HAS(ERROR_OF(st::edit_metadata(dir.file("f"), {{"k", value}}, in_place)),
               "leave in_place out, or make room first");
    st::EditOptions roomy;
    roomy.reserve = 400;
    roomy.durable = true;
    int64_t reported = 0;
    roomy.progress = [&](int64_t done, int64_t total) { reported = done == total ? total : reported; };
    EXPECT((st::edit_metadata(dir.file("f"), {}, roomy) == st::Metadata{{"format", "pt"}}));
    EXPECT_EQ(reported, static_cast<int64_t>(read_file(dir.file("f")).size()));
    const st::Metadata expected{{"k", value}};
    EXPECT((st::edit_metadata(dir.file("f"), {{"k", value}, {"format", {}}, {"absent", {}}}, in_place) == expected));
    EXPECT(st::File(dir.file("f")).metadata() == expected);
    EXPECT(identical(st::load_file(dir.file("f")), tensors));
    EXPECT(st::edit_metadata(dir.file("f"), {{"k", value}, {"more", {}}}) == expected);
    EXPECT(identical(st::load_file(dir.file("f")), tensors));
    EXPECT(identical(mapped, tensors));

    st::EditOptions wrong;
    wrong.reserve = -1;
    EXPECT_HAS(ERROR_OF(st::edit_metadata(dir.file("f"), {}, wrong)), "reserve is -1");
    EXPECT_HAS(ERROR_OF(st::edit_metadata(dir.file("absent"), {})), "No such file or directory");
    EXPECT_HAS(ERROR_OF(st::edit_metadata(dir.file("f"), {{"k", "\xff"}})), "not UTF-8");
    EXPECT_EQ(dir.count(), 1u);
}
