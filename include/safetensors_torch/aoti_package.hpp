// Internal part of aoti.hpp, which includes it: the constants of a package, and their replacement.
#pragma once

#include <ATen/ATen.h>
#include <ATen/DynamicLibrary.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/inductor/aoti_runner/model_container_runner.h>
#include <torch/csrc/inductor/aoti_runtime/constant_type.h>
#include <torch/version.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "detail.hpp"
#include "error.hpp"
#include "types.hpp"

namespace safetensors_torch::detail {

using Runner = torch::inductor::AOTIModelContainerRunner;

// Before 2.13, two threads that run a container whose constants are not folded yet wait for each other forever.
inline constexpr bool must_fold = TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13;

// What a runner has for runners that derive from it: torch has no other access to the types of constants.
struct RunnerMembers : Runner {
    static void* symbol(Runner& runner, const char* name) { return (runner.*(&RunnerMembers::model_so_))->sym(name); }

    static bool is_single_threaded(Runner& runner) {
        return reinterpret_cast<void*>(runner.*(&RunnerMembers::run_func_)) ==
               symbol(runner, "AOTInductorModelContainerRunSingleThreaded");
    }

    // Calls a getter of the container, with the index of a constant if the getter takes one.
    template <typename Value, typename... Index>
    static Value get(Runner& runner, const char* name, Index... index) {
        using Getter = AOTIRuntimeError (*)(AOTInductorModelContainerHandle, Index..., Value*);
        Value value{};
        if (reinterpret_cast<Getter>(symbol(runner, name))(runner.*(&RunnerMembers::container_handle_), index...,
                                                           &value) != 0) {
            fail(std::string("AOTIModelPackageLoader: ") + name +
                     " failed; compile the package with the torch that runs it",
                 ErrorCategory::runtime);
        }
        return value;
    }
};

// Containers keep references to tensors for good (before 2.15), so they get tensors over memory that is owned by the
// context of the storage, and that can be freed.
inline void delete_owner(void* tensor) { delete static_cast<at::Tensor*>(tensor); }

inline at::Tensor managed(const at::Tensor& tensor) {
    return at::for_blob(tensor.data_ptr(), tensor.sizes())
        .strides(tensor.strides())
        .context(new at::Tensor(tensor), delete_owner)
        .options(tensor.options())
        .target_device(tensor.device())
        .make_tensor();
}

// Returns those of the active constants that this library has loaded.
inline std::vector<at::Tensor> managed_constants(const Runner& runner) {
    std::vector<at::Tensor> constants;
    for (const auto& entry : runner.extract_constants_map(/*use_inactive=*/false)) {
        if (entry.second.storage().data_ptr().get_deleter() == &delete_owner) {
            constants.push_back(entry.second);
        }
    }
    return constants;
}

// Waits for the work of a device that may use memory.
inline void synchronize(at::Device device) {
    if (!device.is_cpu()) {
        const c10::impl::VirtualGuardImpl guard(device.type());
        guard.synchronizeDevice(device.has_index() ? device.index() : guard.getDevice().index());
    }
}

// Frees the memory of tensors that managed() has made. No run may use them.
inline void release(const std::vector<at::Tensor>& constants) {
    for (const at::Tensor& constant : constants) {
        synchronize(constant.device());
        constant.storage().unsafeGetStorageImpl()->reset();
    }
}

// One constant of a package.
struct Constant {
    std::string name;  // in the compiled code
    std::string fqn;   // in the module
    at::ScalarType dtype;
    at::Device device;
    std::size_t nbytes;
    bool is_of_program;  // neither a parameter nor a buffer
    at::Tensor value;    // the active one; undefined in a package without weights
    at::Tensor shaped;   // has the shape; undefined if it is unknown

    bool fits(at::IntArrayRef shape) const {
        return shaped.defined()
                   ? shape == shaped.sizes()
                   : static_cast<std::size_t>(c10::multiply_integers(shape)) * c10::elementSize(dtype) == nbytes;
    }

    // Returns new memory, for a tensor of this shape, which fits. The code is compiled for certain strides.
    at::Tensor make_memory(at::IntArrayRef shape) const {
        const auto options = at::TensorOptions(dtype).device(device);
        return value.defined() ? at::empty_strided(value.sizes(), value.strides(), options) : at::empty(shape, options);
    }
};

class Package {
  public:
    // `swapping`, if it is not null, keeps new runs from beginning while it is locked.
    Package(torch::inductor::AOTIModelPackageLoader& loader, std::mutex* swapping)
        : runner_(*loader.get_runner()),
          swapping_(swapping),
          is_single_threaded_(RunnerMembers::is_single_threaded(runner_)) {
        const auto values = runner_.extract_constants_map(/*use_inactive=*/false);
        const at::Device device(loader.get_metadata().at("AOTI_DEVICE_KEY"));
        const auto count = RunnerMembers::get<std::size_t>(runner_, "AOTInductorModelContainerGetNumConstants");
        for (std::size_t i = 0; i < count; ++i) {
            add(i, values, device);
        }
        if (!has_all_values_ && !has_folded_) {
            find_shapes(device);
        }
    }

    const std::vector<Constant>& constants() const { return constants_; }

    // Fails unless each constant has a tensor or a value.
    void check_complete(const std::vector<at::Tensor>& tensors, const std::string& origin) const {
        std::string names;
        for (std::size_t i = 0; i < constants_.size(); ++i) {
            if (!tensors[i].defined() && !constants_[i].value.defined()) {
                names += (names.empty() ? "\"" : ", \"") + constants_[i].fqn + "\"" +
                         (constants_[i].is_of_program ? " (a tensor of the program: make it a buffer)" : "");
            }
        }
        if (!names.empty()) {
            fail(origin + ": lacks constants that have no value in the package: " + names +
                     "; add them, give a `rename`, or compile the package with weights",
                 ErrorCategory::runtime);
        }
    }

    // Returns whether the tensor shares memory with an active constant, which replace() frees.
    bool is_active(const at::Tensor& tensor) const {
        return std::any_of(constants_.begin(), constants_.end(), [&](const Constant& constant) {
            return constant.value.defined() && constant.value.storage().is_alias_of(tensor.storage());
        });
    }

    // Makes the package use `tensors`, one for each constant. If one is undefined, the constant keeps its value.
    void replace(const std::vector<at::Tensor>& tensors, const std::function<void()>& before_swap) {
        const bool in_place = is_single_threaded_ || !has_all_values_;
        std::unordered_map<std::string, at::Tensor> added;
        std::vector<at::Tensor> old;
        for (std::size_t i = 0; i < constants_.size(); ++i) {
            const Constant& constant = constants_[i];
            if (tensors[i].defined()) {
                check_program(constant, tensors[i], in_place);
                added.emplace(constant.name, managed(tensors[i]));
            } else if (!in_place) {
                added.emplace(constant.name, managed(constant.value.clone()));
            }
            const bool is_replaced = added.count(constant.name) != 0 && constant.value.defined();
            if (is_replaced && constant.value.storage().data_ptr().get_deleter() == &delete_owner) {
                old.push_back(constant.value);
            }
        }
        if (in_place) {
            if (before_swap) {
                before_swap();
            }
            update(added, /*inactive=*/false);
        } else {
            try {
                update(added, /*inactive=*/true);
                if (before_swap) {
                    before_swap();
                }
            } catch (...) {
                for (const auto& entry : added) {
                    release({entry.second});
                }
                throw;
            }
            swap();
        }
        release(old);
        // A container that has freed folded constants cannot be updated again.
        if (!in_place && !has_folded_) {
            runner_.free_inactive_constant_buffer();
        }
    }

  private:
    void add(std::size_t index, const std::unordered_map<std::string, at::Tensor>& values, at::Device device) {
        const auto type = static_cast<torch::aot_inductor::ConstantType>(
            RunnerMembers::get<std::int32_t>(runner_, "AOTInductorModelContainerGetConstantType", index));
        if (RunnerMembers::get<bool>(runner_, "AOTInductorModelContainerGetConstantFromFolded", index)) {
            has_folded_ = true;
            return;
        }
        Constant constant{
            RunnerMembers::get<const char*>(runner_, "AOTInductorModelContainerGetConstantName", index),
            RunnerMembers::get<const char*>(runner_, "AOTInductorModelContainerGetConstantOriginalFQN", index),
            static_cast<at::ScalarType>(
                RunnerMembers::get<std::int32_t>(runner_, "AOTInductorModelContainerGetConstantDtype", index)),
            device,
            RunnerMembers::get<std::size_t>(runner_, "AOTInductorModelContainerGetConstantDataSize", index),
            type == torch::aot_inductor::ConstantType::TensorConstant,
            {},
            {}};
        const auto found = values.find(constant.fqn);
        if (found == values.end()) {
            has_all_values_ = false;
        } else {
            constant.value = constant.shaped = found->second;
            constant.device = found->second.device();
        }
        constants_.push_back(std::move(constant));
    }

    // A container tells the shapes only of constants that have values. Copies values without elements into the
    // inactive buffer: the container takes their shapes from the compiled code, and copies no bytes.
    void find_shapes(at::Device device) {
        std::vector<std::int64_t> ones(64, 1);  // the container reads as many strides as the constant has dimensions
        ones.front() = 0;
        std::unordered_map<std::string, at::Tensor> empty;
        for (const Constant& constant : constants_) {
            empty.emplace(constant.name, at::empty(ones, at::TensorOptions(constant.dtype).device(device)));
        }
        runner_.update_constant_buffer(empty, /*use_inactive=*/true, /*validate_full_updates=*/false);
        const auto values = runner_.extract_constants_map(/*use_inactive=*/true);
        runner_.free_inactive_constant_buffer();
        for (Constant& constant : constants_) {
            if (!constant.shaped.defined()) {
                constant.shaped = values.at(constant.fqn);
                constant.device = constant.shaped.device();
            }
        }
    }

    // When a container prepares the constants that are swapped in, it copies the tensors of the program.
    static void check_program(const Constant& constant, const at::Tensor& tensor, bool in_place) {
        if (!in_place && constant.is_of_program && !at::equal(tensor, constant.value)) {
            fail("constant \"" + constant.fqn +
                     "\": it is a tensor of the program, which cannot be replaced in a package that has a value of it; "
                     "make a new AOTIModelPackageLoader",
                 ErrorCategory::runtime);
        }
    }

    // The container prefers runs: to folding, for which a model must be free, and to the swap, which needs its lock.
    std::unique_lock<std::mutex> hold_runs() const {
        return swapping_ != nullptr ? std::unique_lock<std::mutex>(*swapping_) : std::unique_lock<std::mutex>();
    }

    void swap() {
        const auto held = hold_runs();
        runner_.swap_constant_buffer();
    }

    void update(std::unordered_map<std::string, at::Tensor>& tensors, bool inactive) {
        for (const auto& entry : tensors) {
            synchronize(entry.second.device());  // the load may be queued
        }
        runner_.update_constant_buffer(tensors, inactive, /*validate_full_updates=*/false, /*user_managed=*/true);
        if (must_fold || has_folded_) {
            const auto held = hold_runs();
            runner_.run_const_fold(inactive);
        }
        for (const auto& entry : tensors) {
            synchronize(entry.second.device());
        }
    }

    Runner& runner_;
    std::mutex* swapping_;
    bool is_single_threaded_;
    bool has_folded_ = false;
    bool has_all_values_ = true;
    std::vector<Constant> constants_;
};

// What a checkpoint has for the constants of a package, to be checked together.
class Candidates {
  public:
    Candidates(std::string origin, bool convert) : origin_(std::move(origin)), convert_(convert) {}

    void add(const Constant& constant, const std::string& name, at::ScalarType dtype, at::IntArrayRef shape,
             at::Device device) {
        const bool is_converted = convert_ && at::isFloatingType(dtype) && at::isFloatingType(constant.dtype);
        if ((dtype == constant.dtype || is_converted) && constant.fits(shape) && device == constant.device) {
            return;
        }
        constexpr int most = 10;
        if (++count_ <= most) {
            faults_ += "\n\t\"" + name + "\": " + c10::toString(dtype) + " " + c10::str(shape) + " on " + device.str() +
                       "; compiled for " + c10::toString(constant.dtype) + " " +
                       (constant.shaped.defined() ? c10::str(constant.shaped.sizes())
                                                  : "of " + std::to_string(constant.nbytes) + " bytes") +
                       " on " + constant.device.str();
        }
    }

    void check() const {
        if (count_ != 0) {
            fail(
                origin_ + ": " + std::to_string(count_) +
                    " tensor(s) do not fit the package, whose code reads them as it was compiled; change them, compile "
                    "the package for them, or set LoadConstantsOptions::convert if only floating-point dtypes differ:" +
                    faults_,
                ErrorCategory::runtime);
        }
    }

  private:
    std::string origin_;
    bool convert_;
    int count_ = 0;
    std::string faults_;  // the first of them
};

}  // namespace safetensors_torch::detail
