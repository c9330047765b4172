// File::get_slice returns the same, and refuses the same, as indexing the whole tensor.

#include "support.h"

using namespace support;
using at::indexing::Ellipsis;
using at::indexing::None;
using at::indexing::Slice;
using Index = std::vector<at::indexing::TensorIndex>;

namespace {

constexpr at::IntArrayRef::value_type kDims[] = {5, 4, 6};

// Opens a file with a tensor "x" of shape 5x4x6, a scalar and an empty tensor, on each backend.
struct Fixture {
    TempDir dir;
    at::Tensor x = at::arange(5 * 4 * 6, at::kInt).reshape(kDims);
    std::vector<st::File> files;

    Fixture() {
        st::Tensors tensors;
        tensors.insert("x", x);
        tensors.insert("scalar", at::scalar_tensor(7, at::kInt));
        tensors.insert("hollow", at::empty({0, 3}, at::kInt));
        st::save_file(tensors, dir.file("f"));
        for (const st::Backend backend : kBackends) {
            files.emplace_back(dir.file("f"), at::kCPU, backend);
        }
    }
};

void check_same(const Fixture& fixture, const Index& index, int line) {
    const at::Tensor expected = fixture.x.index(index);
    for (const st::File& file : fixture.files) {
        const at::Tensor part = file.get_slice("x", index);
        if (part.sizes() != expected.sizes() || !at::equal(part, expected)) {
            std::ostringstream out;
            out << "get_slice returns shape " << part.sizes() << ", index() returns " << expected.sizes()
                << ", or other values";
            check::report(__FILE__, line, out.str());
        }
    }
}

}  // namespace

#define EXPECT_SAME(...) check_same(fixture, Index{__VA_ARGS__}, __LINE__)

TEST(slice_by_integers_slices_and_ellipsis) {
    const Fixture fixture;
    EXPECT_SAME(0);
    EXPECT_SAME(4);
    EXPECT_SAME(-1);
    EXPECT_SAME(-5, -4, -6);
    EXPECT_SAME(2, 3);
    EXPECT_SAME(1, 2, 3);
    EXPECT_SAME(Slice());
    EXPECT_SAME(Slice(1, 3));
    EXPECT_SAME(Slice(None, 3));
    EXPECT_SAME(Slice(2, None));
    EXPECT_SAME(Slice(None, None, 2));
    EXPECT_SAME(Slice(1, None, 3), Slice(), Slice(0, 6, 4));
    EXPECT_SAME(Slice(-3, -1), Slice(-100, 100), Slice(5, 2));
    EXPECT_SAME(Slice(100, 200));
    EXPECT_SAME(Slice(0, 5, 100));
    EXPECT_SAME(Slice(0, 2), 1, Slice(2, 5));
    EXPECT_SAME(1, Slice(0, 2), -2);
    EXPECT_SAME(Ellipsis);
    EXPECT_SAME("...", 2);
    EXPECT_SAME(2, Ellipsis);
    EXPECT_SAME(1, Ellipsis, Slice(0, 2));
    EXPECT_SAME(1, Ellipsis, 2, 3);
    EXPECT_SAME(Slice(1, 2), Ellipsis, Slice(), Slice());
}

TEST(slice_of_everything) {
    const Fixture fixture;
    for (const st::File& file : fixture.files) {
        EXPECT(identical(file.get_slice("x", {}), fixture.x));
        EXPECT_EQ(file.get_slice("scalar", {}).item<int>(), 7);
        EXPECT_EQ(file.get_slice("scalar", {Ellipsis}).item<int>(), 7);
        EXPECT_EQ(file.get_slice("hollow", {Slice(0, 2), 1}).sizes(), (at::IntArrayRef{0}));
    }
}

TEST(slice_by_new_axes_booleans_and_tensors) {
    const Fixture fixture;
    const at::Tensor rows = at::tensor({3, 0, 3}, at::kLong);
    const at::Tensor mask = at::tensor({1, 0, 1, 1}).to(at::kBool);
    EXPECT_SAME(None);
    EXPECT_SAME(None, 1, None, Slice(0, 2));
    EXPECT_SAME(Ellipsis, None);
    EXPECT_SAME(true);
    EXPECT_SAME(false, 1);
    EXPECT_SAME(rows);
    EXPECT_SAME(rows, 1);
    EXPECT_SAME(1, rows, Slice(1, 3));
    EXPECT_SAME(Slice(1, 3), mask);
    EXPECT_SAME(rows, Slice(), rows);
    EXPECT_SAME(fixture.x > 50);
    EXPECT_SAME(fixture.x.select(2, 0) > 50, Slice(0, 2));
    EXPECT_SAME(at::scalar_tensor(2, at::kLong), Slice(1, 2));
}

TEST(slice_refuses_what_indexing_refuses) {
    const Fixture fixture;
    for (const st::File& file : fixture.files) {
        EXPECT_EQ(ERROR_OF(file.get_slice("x", {5})),
                  "index 5 is out of bounds for dimension 0 of tensor \"x\" with size 5");
        EXPECT_EQ(ERROR_OF(file.get_slice("x", {Slice(), -5})),
                  "index -5 is out of bounds for dimension 1 of tensor \"x\" with size 4");
        EXPECT_EQ(ERROR_OF(file.get_slice("x", {0, 0, 0, 0})),
                  "too many indices for the 3 dimension(s) of tensor \"x\"");
        EXPECT_EQ(ERROR_OF(file.get_slice("scalar", {0})),
                  "too many indices for the 0 dimension(s) of tensor \"scalar\"");
        EXPECT_HAS(ERROR_OF(file.get_slice("x", {Ellipsis, Ellipsis})), "ellipsis");
        EXPECT_EQ(ERROR_OF(file.get_slice("x", {Slice(None, None, -1)})),
                  "step must be greater than zero for dimension 0 of tensor \"x\"");
        EXPECT_EQ(ERROR_OF(file.get_slice("hollow", {0})),
                  "index 0 is out of bounds for dimension 0 of tensor \"hollow\" with size 0");
    }
    try {
        fixture.files.front().get_slice("x", {5});
        EXPECT(!"thrown");
    } catch (const c10::IndexError&) {
    }
    try {
        fixture.files.front().get_slice("x", {Slice(None, None, -1)});
        EXPECT(!"thrown");
    } catch (const c10::ValueError&) {
    }
}

TEST(slice_owns_no_more_than_it_needs) {
    const Fixture fixture;
    for (const st::File& file : fixture.files) {
        const at::Tensor part = file.get_slice("x", {1, Slice(0, 2)});
        EXPECT_EQ(part.storage().nbytes(), part.nbytes());
        part.zero_();
        EXPECT(identical(file.get_tensor("x"), fixture.x));
    }
}

TEST(slice_of_every_dtype) {
    const TempDir dir;
    st::Tensors tensors;
    for (const Dtype& dtype : dtypes()) {
        tensors.insert(dtype.code, make({4, 6}, dtype.type));
    }
    st::save_file(tensors, dir.file("all"));
    for (const st::Backend backend : kBackends) {
        const st::File file(dir.file("all"), at::kCPU, backend);
        for (const auto& [name, tensor] : tensors) {
            const at::Tensor expected = tensor.slice(0, 1, 3);
            EXPECT(identical(file.get_slice(name, {Slice(1, 3)}), expected));
            EXPECT_EQ(file.get_slice(name, {2, Slice(2, 4)}).sizes(), (at::IntArrayRef{2}));
        }
    }
}

namespace {

// Reads "x" into `target`, a view of `memory`, with each backend; returns whether nothing else of the memory changes.
bool is_read_into(const Fixture& fixture, const at::Tensor& memory, const at::Tensor& target) {
    for (const st::File& file : fixture.files) {
        memory.fill_(-1);
        file.read_into({{"x", {0, 0, 0}, target}});
        const at::Tensor changed = at::sum(memory != -1);
        if (!at::equal(target, fixture.x) || changed.item<int64_t>() != fixture.x.numel()) {
            return false;
        }
    }
    return true;
}

}  // namespace

TEST(tensors_are_read_into_strided_memory) {
    const Fixture fixture;
    const at::Tensor memory = at::empty({20, 20, 20}, at::kInt);
    const auto box = [&](int64_t a, int64_t b, int64_t c) {
        return memory.narrow(0, 3, a).narrow(1, 2, b).narrow(2, 1, c);
    };
    EXPECT(is_read_into(fixture, memory, box(5, 4, 6)));
    EXPECT(is_read_into(fixture, memory, box(6, 5, 4).permute({1, 2, 0})));
    EXPECT(is_read_into(fixture, memory, box(4, 6, 5).permute({2, 0, 1})));
    EXPECT(is_read_into(fixture, memory, memory.flatten().narrow(0, 7, 360).view({5, 4, 18}).slice(2, 0, 18, 3)));
    // The core does not take strides that interleave, torch does.
    EXPECT(is_read_into(fixture, memory, at::as_strided(memory, {5, 4, 6}, {55, 13, 3})));
    EXPECT_HAS(
        ERROR_OF(fixture.files[0].read_into({{"x", {0, 0, 0}, at::zeros({5, 4, 1}, at::kInt).expand({5, 4, 6})}})),
        "single memory location");
}

// As large as several reads.
TEST(large_tensors_are_read_into_strided_memory) {
    const TempDir dir;
    const at::Tensor matrix = at::arange(1500 * 1300, at::kInt).reshape({1500, 1300});
    const at::Tensor images = at::arange(4 * 30 * 60 * 70, at::kInt).to(at::kShort).reshape({4, 30, 60, 70});
    st::Tensors tensors;
    tensors.insert("matrix", matrix);
    tensors.insert("images", images);
    st::save_file(tensors, dir.file("f"));
    for (const st::Backend backend : kBackends) {
        const st::File file(dir.file("f"), at::kCPU, backend);
        const at::Tensor transposed = at::zeros({1300, 1500}, at::kInt).t();
        const at::Tensor wide = at::zeros({1500, 2000}, at::kInt);
        const at::Tensor channels_last = at::zeros({4, 30, 60, 70}, at::kShort).to(at::MemoryFormat::ChannelsLast);
        // Runs of more than a page, and of less.
        file.read_into({{"matrix", {0, 0}, transposed},
                        {"matrix", {0, 100}, wide.narrow(1, 0, 1200)},
                        {"matrix", {0, 0}, wide.narrow(1, 1200, 100)},
                        {"images", {0, 0, 0, 0}, channels_last}});
        EXPECT(at::equal(transposed, matrix) && at::equal(channels_last, images));
        EXPECT(at::equal(wide.narrow(1, 0, 1200), matrix.narrow(1, 100, 1200)));
        EXPECT(at::equal(wide.narrow(1, 1200, 100), matrix.narrow(1, 0, 100)));
        EXPECT_EQ(at::sum(wide.narrow(1, 1300, 700)).item<int64_t>(), 0);
    }
}

TEST(packed_values_are_read_into_strided_memory) {
    const auto types = dtypes();
    if (types.back().code != std::string("F4")) {
        return;
    }
    const TempDir dir;
    write_file(dir.file("f"), file_bytes(R"({"x":{"dtype":"F4","shape":[3,4],"data_offsets":[0,6]}})", "123456"));
    for (const st::Backend backend : kBackends) {
        // With a gap, the strides of the pairs are those of the values in row-major memory.
        const at::Tensor bytes = at::zeros({3, 4}, at::kByte);
        const at::Tensor pairs = bytes.view(types.back().type).narrow(1, 0, 2);
        st::File(dir.file("f"), at::kCPU, backend).read_into({{"x", {0, 0}, pairs}});
        EXPECT(at::equal(bytes.narrow(1, 0, 2), at::tensor({'1', '2', '3', '4', '5', '6'}, at::kByte).view({3, 2})));
        EXPECT_EQ(at::sum(bytes.narrow(1, 2, 2)).item<int64_t>(), 0);
    }
}
