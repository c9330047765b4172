#include "cpp/model.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/copy.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <map>
#include <set>
#include <unordered_set>

#include "cpp/error.h"
#include "cpp/shared.h"

namespace safetensors_torch {
namespace {

// A tensor of the file and the one of the model that it goes into.
struct Match {
    size_t index;
    std::string name;
    at::Tensor destination;
};

std::string quoted_list(const std::vector<std::string>& names) {
    std::string out;
    for (const std::string& name : names) {
        out += (out.empty() ? "\"" : ", \"") + name + "\"";
    }
    return out;
}

std::string torch_size(c10::IntArrayRef shape) {
    std::string out;
    for (const int64_t dim : shape) {
        out += (out.empty() ? "" : ", ") + std::to_string(dim);
    }
    return "torch.Size([" + out + "])";
}

std::string heading(const std::string& class_name) { return "Error(s) in loading state_dict for " + class_name + ":"; }

// load_state_dict takes a 1-D tensor of one element for a scalar, as files from torch 0.3 need it.
bool is_old_scalar(c10::IntArrayRef source, c10::IntArrayRef destination) {
    return destination.empty() && source.size() == 1 && source[0] == 1;
}

void check_shapes(const core::File& file, const std::vector<Match>& matches, const std::string& class_name) {
    std::string faults;
    for (const Match& match : matches) {
        const auto shape = describe(file, match.index).second;
        const auto expected = match.destination.sizes();
        if (expected != c10::IntArrayRef(shape) && !is_old_scalar(shape, expected)) {
            faults += "\n\tsize mismatch for " + match.name + ": copying a param with shape " + torch_size(shape) +
                      " from checkpoint, the shape in current model is " + torch_size(expected) + ".";
        }
    }
    if (!faults.empty()) {
        fail(Kind::runtime, heading(class_name) + faults);
    }
}

void check_on_device(const NamedTensors& state) {
    for (const auto& [name, tensor] : state) {
        if (tensor.is_meta()) {
            fail(Kind::runtime, "Cannot load into " + repr(name) +
                                    ": it is on the meta device and has no memory. Give the model memory first, with "
                                    "`model.to_empty(device=...)`");
        }
    }
}

void check_names(const Mismatch& mismatch, const std::string& class_name) {
    const auto& [missing, unexpected] = mismatch;
    if (missing.empty() && unexpected.empty()) {
        return;
    }
    std::string text = heading(class_name);
    if (!missing.empty()) {
        text += "\n    Missing key(s) in state_dict: " + quoted_list(missing);
    }
    if (!unexpected.empty()) {
        text += "\n    Unexpected key(s) in state_dict: " + quoted_list(unexpected);
    }
    fail(Kind::runtime, text);
}

// Torch refuses to copy into an expanded tensor, whose elements share memory with each other.
void check_destinations(const std::vector<Match>& matches, const std::string& class_name) {
    for (const Match& match : matches) {
        if (at::has_internal_overlap(match.destination) == at::MemOverlap::Yes) {
            fail(Kind::runtime,
                 heading(class_name) + "\n\t" + match.name +
                     " is expanded: several of its elements are one place in memory, so that nothing can "
                     "be loaded into it. Give it memory of its own with `.clone()`.");
        }
    }
}

// Tries each conversion that the load will need on one element, as torch has no other way to ask.
void check_conversions(const core::File& file, const std::vector<Match>& matches, const std::string& class_name) {
    const at::NoGradGuard no_grad;
    std::set<std::pair<c10::ScalarType, c10::ScalarType>> known;
    for (const Match& match : matches) {
        const auto from = describe(file, match.index).first;
        const auto to = match.destination.scalar_type();
        if (from == to || known.count({from, to}) != 0) {
            continue;
        }
        try {
            const auto options = at::TensorOptions().device(at::kCPU);
            at::empty({1}, options.dtype(to)).copy_(at::empty({1}, options.dtype(from)));
        } catch (const c10::Error& error) {
            fail(Kind::runtime, heading(class_name) + "\n\tdtype mismatch for " + match.name + ": a param of " +
                                    c10::getDtypeNames(from).first + " from checkpoint cannot be copied into the " +
                                    c10::getDtypeNames(to).first +
                                    " of the current model: " + error.what_without_backtrace());
        }
        known.insert({from, to});
    }
}

// Whether the file's bytes are, as they are, what the tensor is to hold.
bool takes_bytes(const core::File& file, const Match& match) {
    const auto [type, shape] = describe(file, match.index);
    const at::Tensor& tensor = match.destination;
    return tensor.is_cpu() && tensor.layout() == at::kStrided && tensor.scalar_type() == type &&
           tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg() && tensor.sizes() == c10::IntArrayRef(shape);
}

// Fills the model's tensors: in parallel, straight into their memory, where the bytes fit and no two share it. With
// `aliased`, some do, and the file has both: one after the other then, so that the last one counts.
void fill(const SharedFile& shared_file, const Lender& lender, const std::vector<Match>& matches, bool aliased) {
    const at::NoGradGuard no_grad;
    const core::File& file = **shared_file;
    std::vector<std::pair<size_t, at::Tensor>> direct;
    for (const Match& match : matches) {
        if (!aliased && takes_bytes(file, match)) {
            direct.emplace_back(match.index, match.destination);
        }
    }
    read_into(file, direct);
    for (const Match& match : matches) {
        if (aliased || !takes_bytes(file, match)) {
            at::Tensor loaded = load_tensor(shared_file, lender, match.index, at::kCPU);
            if (is_old_scalar(loaded.sizes(), match.destination.sizes())) {
                loaded = loaded.select(0, 0);
            }
            match.destination.copy_(loaded);
        }
    }
}

}  // namespace

Mismatch load_state(const SharedFile& shared_file, const Lender& lender, const Tensors& state,
                    const std::vector<std::string>& optional, const std::string& class_name, bool strict) {
    const core::File& file = **shared_file;
    const NamedTensors tensors = named(state);
    check_on_device(tensors);
    std::unordered_set<std::string> in_file;
    for (size_t index = 0; index < file.count(); ++index) {
        in_file.emplace(file.name(index));
    }
    const auto dropped = tied_names(tensors, in_file);
    const std::unordered_set<std::string> may_be_absent(optional.begin(), optional.end());

    std::vector<Match> matches;
    Mismatch mismatch;
    bool aliased = false;
    for (const auto& [name, tensor] : tensors) {
        const bool is_dropped = dropped.count(name) != 0;
        if (in_file.count(name) == 0) {
            if (!is_dropped && may_be_absent.count(name) == 0) {
                mismatch.first.push_back(name);
            }
            continue;
        }
        // A file with a tied name beside the kept one was not made from such a model.
        if (is_dropped) {
            mismatch.second.push_back(name);
            aliased = true;
        }
        matches.push_back({file.find(as_bytes(name)), name, tensor});
        in_file.erase(name);
    }
    mismatch.second.insert(mismatch.second.end(), in_file.begin(), in_file.end());
    std::sort(mismatch.first.begin(), mismatch.first.end());
    std::sort(mismatch.second.begin(), mismatch.second.end());

    check_destinations(matches, class_name);
    check_shapes(file, matches, class_name);
    check_conversions(file, matches, class_name);
    if (strict) {
        check_names(mismatch, class_name);
    }
    fill(shared_file, lender, matches, aliased);
    return mismatch;
}

}  // namespace safetensors_torch
