// Tensors whose storage is too small, or changes during a load or a save.

#include <c10/core/CPUAllocator.h>
#include <c10/core/InferenceMode.h>
#include <torch/nn.h>

#include <cstring>
#include <limits>

#include "support.h"

using namespace support;

namespace {

// A module with one tensor.
struct OneImpl : torch::nn::Module {
    explicit OneImpl(const at::Tensor& tensor) : value(register_buffer("value", tensor)) {}
    at::Tensor value;
};
TORCH_MODULE(One);

at::Tensor resized(at::Tensor tensor, size_t nbytes) {
    tensor.storage().unsafeGetStorageImpl()->set_nbytes(nbytes);
    if (nbytes == 0) {
        tensor.storage().set_data_ptr(c10::DataPtr(nullptr, c10::kCPU));
    } else {
        c10::DataPtr data = c10::GetCPUAllocator()->allocate(nbytes);
        std::memset(data.get(), 0, nbytes);
        tensor.storage().set_data_ptr(std::move(data));
    }
    return tensor;
}

// Returns tensors of 40 floats whose storages are too small.
std::vector<at::Tensor> too_small() {
    return {resized(at::ones({40}), 0), resized(at::ones({40}), 159), resized(at::ones({80}).slice(0, 40), 319),
            resized(at::ones({8, 5}).t(), 100)};
}

st::Tensors dict(const at::Tensor& tensor) {
    st::Tensors tensors;
    tensors.insert("value", tensor);
    return tensors;
}

}  // namespace

TEST(storages_that_are_too_small_are_refused) {
    const TempDir dir;
    st::save_file(dict(at::ones({40})), dir.file("good"));
    for (const at::Tensor& bad : too_small()) {
        const std::string said = "tensor 'value': its storage has ";
        const One module(bad);
        EXPECT_HAS(ERROR_OF(st::save_model(*module, dir.file("f"))), said);
        if (bad.is_contiguous()) {
            EXPECT_HAS(ERROR_OF(st::save_file(dict(bad), dir.file("f"))), said);
            EXPECT_HAS(ERROR_OF(st::save(dict(bad))), said);
            EXPECT_HAS(ERROR_OF(st::save_sharded(dict(bad), dir.file("sharded"))), said);
            st::IncrementalWriter writer(dir.file("f"), dict(bad));
            EXPECT_HAS(ERROR_OF(writer.write("value", bad)), said);
        }
        st::save_file(dict(at::ones(bad.sizes())), dir.file("good"));
        for (const st::Backend backend : kBackends) {
            EXPECT_HAS(ERROR_OF(st::load_model(*module, dir.file("good"), {/*strict=*/true, backend})), said);
        }
    }
    EXPECT_EQ(dir.count(), 1U);
}

TEST(a_zero_tensor_is_saved_and_not_loaded_into) {
    const TempDir dir;
    const at::Tensor zero = at::_efficientzerotensor({3, 2}, at::kFloat);
    EXPECT(st::save(dict(zero)) == st::save(dict(at::zeros({3, 2}))));
    st::save_file(dict(at::ones({3, 2})), dir.file("f"));
    EXPECT_HAS(ERROR_OF(st::load_model(One(zero), dir.file("f"))), "value is a zero tensor, which is immutable");
}

TEST(an_inference_tensor_is_written_in_inference_mode_only) {
    const TempDir dir;
    st::save_file(dict(at::ones({3})), dir.file("f"));
    at::Tensor tensor;
    {
        const c10::InferenceMode mode;
        tensor = at::zeros({3});
    }
    const One module(tensor);
    EXPECT_HAS(ERROR_OF(st::load_model(*module, dir.file("f"))), "value is an inference tensor");
    EXPECT(tensor.eq(0).all().item<bool>());
    const c10::InferenceMode mode;
    st::load_model(*module, dir.file("f"));
    EXPECT(tensor.eq(1).all().item<bool>());
}

TEST(a_tensor_that_changes_between_two_steps) {
    const TempDir dir;
    // More than one step of a load reads, and more than two steps of a save write.
    st::Tensors tensors;
    for (int i = 0; i < 4; ++i) {
        tensors.insert("t" + std::to_string(i), at::ones({9 << 20}));
    }
    st::save_file(tensors, dir.file("f"));
    const std::string said = "tensor 't3': its memory was freed, resized or replaced";
    // As the functions of the header do with a progress function, except that those use steps of a tenth of a second.
    const auto files = st::detail::open_checkpoint(dir.file("f"), st::Backend::pread, {});
    const auto load = st::detail::call_method(files, "start_state", st::detail::Dict(tensors),
                                              std::vector<std::string>(), "Module", true, "")
                          .toObject();
    const auto save = st::detail::plan_save(tensors, {}, "", {});
    st::detail::call_method(save, "set_file", dir.file("g"), false);
    EXPECT(!st::detail::call_method(save, "advance", 0.0).toBool());
    EXPECT(!st::detail::call_method(load, "advance", 0.0).toBool());
    resized(tensors.at("t3"), 64);
    const double forever = std::numeric_limits<double>::infinity();
    EXPECT_HAS(ERROR_OF(st::detail::call_method(load, "advance", forever)), said);
    EXPECT_HAS(ERROR_OF(st::detail::call_method(save, "advance", forever)), said);
    EXPECT_EQ(dir.count(), 1U);
}
