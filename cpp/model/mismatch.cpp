#include "cpp/model/mismatch.h"

#include <algorithm>
#include <map>
#include <string_view>

#include "cpp/error.h"

namespace safetensors_torch::layer {
namespace {

// The prefix of torch.compile, which can be at every level of a name, and that of DataParallel, which is at the start.
constexpr std::string_view compiled = "_orig_mod.";
constexpr std::string_view parallel = "module.";

std::string quoted_list(const std::vector<std::string>& names) {
    std::string out;
    for (const std::string& name : names) {
        out += (out.empty() ? "\"" : ", \"") + shortened(name) + "\"";
    }
    return out;
}

bool begins_with(std::string_view text, std::string_view start) { return text.substr(0, start.size()) == start; }

bool ends_with(std::string_view text, std::string_view end) {
    return text.size() >= end.size() && text.substr(text.size() - end.size()) == end;
}

// Returns the name of the tensor in the wrapped module.
std::string unwrapped(std::string name) {
    for (size_t at = name.find(compiled); at != std::string::npos; at = name.find(compiled, at)) {
        if (at == 0 || name[at - 1] == '.') {
            name.erase(at, compiled.size());
        } else {
            ++at;
        }
    }
    while (begins_with(name, parallel)) {
        name.erase(0, parallel.size());
    }
    return name;
}

// Returns the wrappers that made `name`, for a person.
std::string wrappers_of(std::string_view name) {
    const bool is_compiled = name.find(compiled) != std::string_view::npos;
    const bool is_parallel = name.find(parallel) != std::string_view::npos;
    return is_compiled && is_parallel ? "torch.compile and DataParallel"
           : is_compiled              ? "torch.compile"
                                      : "DataParallel or DistributedDataParallel";
}

// Returns what to do if a missing name and an unexpected one differ only by wrappers.
std::string advice(const Mismatch& mismatch, const std::string& prefix) {
    const auto inside = [&](const std::string& name) {
        return name.substr(begins_with(name, prefix) ? prefix.size() : 0);
    };
    std::map<std::string, std::string> in_file;
    for (const std::string& name : mismatch.second) {
        in_file.emplace(unwrapped(inside(name)), inside(name));
    }
    for (const std::string& missing : mismatch.first) {
        const std::string in_module = inside(missing);
        const std::string bare = unwrapped(in_module);
        const auto found = in_file.find(bare);
        if (found == in_file.end() || found->second == in_module) {
            continue;
        }
        std::string text;
        if (in_module != bare) {
            text += "\n    The names of the module are those that " + wrappers_of(in_module) +
                    " makes: load the module inside, or give a `rename` that takes away what was added (in Python: "
                    "rename=lambda name: name.replace(\"_orig_mod.\", \"\").removeprefix(\"module.\")).";
        }
        if (found->second != bare) {
            text += "\n    The names in the checkpoint are those that " + wrappers_of(found->second) + " makes: give ";
            text += ends_with(found->second, bare)
                        ? "the prefix \"" + prefix + found->second.substr(0, found->second.size() - bare.size()) + "\"."
                        : "a `rename` that makes \"" + found->second + "\" of \"" + in_module + "\", and so on.";
        }
        return text;
    }
    return "";
}

}  // namespace

std::string heading(const std::string& class_name) { return "Error(s) in loading state_dict for " + class_name + ":"; }

void check_names(const Mismatch& mismatch, const std::string& class_name, const std::string& prefix) {
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
    fail(ErrorCategory::runtime, text + advice(mismatch, prefix));
}

}  // namespace safetensors_torch::layer
