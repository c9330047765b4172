/// @file
/// Tensors by name. Part of safetensors_torch.hpp, which includes it.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/Dict.h>
#include <torch/ordered_dict.h>

#include <algorithm>
#include <cstddef>
#include <initializer_list>
#include <iterator>
#include <list>
#include <map>
#include <numeric>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "error.hpp"

namespace safetensors_torch {
namespace detail {

template <typename Map, typename = void>
inline constexpr bool is_unordered = false;
template <typename Map>
inline constexpr bool is_unordered<Map, std::void_t<typename Map::hasher>> = true;

// Returns how many characters have to be inserted, removed or replaced to turn one name into the other.
inline std::size_t edit_distance(std::string_view from, std::string_view to) {
    std::vector<std::size_t> row(to.size() + 1);
    std::iota(row.begin(), row.end(), std::size_t{0});
    for (std::size_t i = 0; i < from.size(); ++i) {
        std::size_t diagonal = std::exchange(row[0], i + 1);
        for (std::size_t j = 0; j < to.size(); ++j) {
            const std::size_t replaced = diagonal + (from[i] == to[j] ? 0 : 1);
            diagonal = row[j + 1];
            row[j + 1] = std::min({replaced, row[j] + 1, row[j + 1] + 1});
        }
    }
    return row.back();
}

}  // namespace detail

/// Tensors by name, with the interface of a std::map. Iterates in the order of insertion, which for a loaded file is
/// the order of the data in the file.
///
///     for (auto& [name, tensor] : load_file("model.safetensors")) std::cout << name << " " << tensor.sizes() << "\n";
///
/// A copy has its own entries; its tensors share memory with the original's, as copies of a tensor do. References and
/// iterators stay valid until their entry is erased.
///
/// Converts from and to c10::Dict, std::map, std::unordered_map and torch::OrderedDict, so every function that takes
/// Tensors takes those too, such as `module->named_parameters()`.
class Tensors {
    using List = std::list<std::pair<const std::string, at::Tensor>>;

  public:
    /// The type of names.
    using key_type = std::string;
    /// The type of tensors.
    using mapped_type = at::Tensor;
    /// A name and its tensor.
    using value_type = List::value_type;
    /// The type of numbers of entries.
    using size_type = std::size_t;
    /// Refers to an entry; its tensor can be replaced.
    using iterator = List::iterator;
    /// Refers to an entry.
    using const_iterator = List::const_iterator;

    /// No tensors.
    Tensors() = default;
    /// These names and tensors: `{{"weight", weight}, {"bias", bias}}`. Throws Error if a name occurs twice.
    Tensors(std::initializer_list<value_type> entries) { add(entries); }
    /// The entries of a map, or of another container of pairs, in its order; sorted by name if it has no order, as a
    /// std::unordered_map. Throws Error if a name occurs twice.
    template <typename Map, typename Entry = decltype(*std::begin(std::declval<const Map&>())),
              typename = std::enable_if_t<std::is_convertible_v<decltype((std::declval<Entry>().first)), std::string> &&
                                          std::is_convertible_v<decltype((std::declval<Entry>().second)), at::Tensor>>>
    Tensors(const Map& map) {
        add(map);
        if constexpr (detail::is_unordered<Map>) {
            entries_.sort([](const value_type& a, const value_type& b) { return a.first < b.first; });
        }
    }
    /// The entries of a c10::Dict, in its order.
    Tensors(const c10::Dict<std::string, at::Tensor>& dict) {
        for (const auto& entry : dict) {
            insert(entry.key(), entry.value());
        }
    }
    /// The entries of a torch::OrderedDict, such as module->named_parameters(), in its order.
    Tensors(const torch::OrderedDict<std::string, at::Tensor>& dict) {
        for (const auto& item : dict) {
            insert(item.key(), item.value());
        }
    }

    /// Copies the entries; the tensors share memory.
    Tensors(const Tensors& other) { add(other); }
    /// Takes the entries of `other`, and leaves it empty.
    Tensors(Tensors&& other) noexcept { swap(other); }
    /// Replaces all entries.
    Tensors& operator=(Tensors other) noexcept {
        swap(other);
        return *this;
    }
    ~Tensors() = default;

    /// The same entries as a c10::Dict.
    operator c10::Dict<std::string, at::Tensor>() const {
        c10::Dict<std::string, at::Tensor> dict;
        dict.reserve(size());
        for (const auto& [name, tensor] : entries_) {
            dict.insert(name, tensor);
        }
        return dict;
    }
    /// The same entries as a torch::OrderedDict.
    operator torch::OrderedDict<std::string, at::Tensor>() const {
        torch::OrderedDict<std::string, at::Tensor> dict;
        dict.reserve(size());
        for (const auto& [name, tensor] : entries_) {
            dict.insert(name, tensor);
        }
        return dict;
    }
    /// The same entries as a std::map.
    operator std::map<std::string, at::Tensor>() const { return {begin(), end()}; }
    /// The same entries as a std::unordered_map.
    operator std::unordered_map<std::string, at::Tensor>() const { return {begin(), end()}; }

    /// Returns the number of tensors.
    size_type size() const { return entries_.size(); }
    /// Returns whether there are no tensors.
    bool empty() const { return entries_.empty(); }

    /// Returns the first entry.
    iterator begin() { return entries_.begin(); }
    /// Returns the end of the entries.
    iterator end() { return entries_.end(); }
    /// Returns the first entry.
    const_iterator begin() const { return entries_.begin(); }
    /// Returns the end of the entries.
    const_iterator end() const { return entries_.end(); }

    /// Returns the names, in order.
    std::vector<std::string> keys() const {
        std::vector<std::string> names;
        names.reserve(size());
        for (const auto& entry : entries_) {
            names.push_back(entry.first);
        }
        return names;
    }
    /// Returns the tensors, in order.
    std::vector<at::Tensor> values() const {
        std::vector<at::Tensor> tensors;
        tensors.reserve(size());
        for (const auto& entry : entries_) {
            tensors.push_back(entry.second);
        }
        return tensors;
    }

    /// Returns the entry of this name, or end().
    iterator find(std::string_view name) {
        const auto found = index_.find(name);
        return found == index_.end() ? end() : found->second;
    }
    /// Returns the entry of this name, or end().
    const_iterator find(std::string_view name) const {
        const auto found = index_.find(name);
        return found == index_.end() ? end() : const_iterator(found->second);
    }
    /// Returns whether there is a tensor of this name.
    bool contains(std::string_view name) const { return index_.find(name) != index_.end(); }
    /// Returns 1 if there is a tensor of this name, otherwise 0.
    size_type count(std::string_view name) const { return contains(name) ? 1 : 0; }

    /// Returns the tensor of this name. Throws Error, which lists similar names, if there is none.
    const at::Tensor& at(std::string_view name) const& {
        const const_iterator found = find(name);
        if (found == end()) {
            throw Error("tensor \"" + std::string(name) + "\": does not exist; " + similar_to(name),
                        ErrorCategory::safetensor, SFT_ERROR_TENSOR_NOT_FOUND, 0);
        }
        return found->second;
    }
    /// The same; the tensor can be replaced.
    at::Tensor& at(std::string_view name) & { return const_cast<at::Tensor&>(std::as_const(*this).at(name)); }
    /// The same of a temporary: `load_file(path).at("weight")`.
    at::Tensor at(std::string_view name) && { return std::as_const(*this).at(name); }

    /// Returns the tensor of this name; inserts an undefined one, for an assignment, if there is none, as std::map
    /// does. To read a tensor that may be absent, use at(), find(), or Tensors that are const.
    at::Tensor& operator[](std::string_view name) & { return insert(std::string(name), at::Tensor()).first->second; }
    /// Returns the tensor of this name. Throws Error as at() does.
    const at::Tensor& operator[](std::string_view name) const& { return at(name); }
    /// The same of a temporary: `load_file(path)["weight"]`.
    at::Tensor operator[](std::string_view name) && { return std::as_const(*this).at(name); }

    /// Appends a tensor, unless there is one of this name. Returns the entry of this name, and whether it is new.
    std::pair<iterator, bool> insert(std::string name, at::Tensor tensor) {
        const iterator found = find(name);
        if (found != end()) {
            return {found, false};
        }
        List entry;
        entry.emplace_back(std::move(name), std::move(tensor));
        const iterator added = entry.begin();
        index_.emplace(added->first, added);
        entries_.splice(end(), entry);
        return {added, true};
    }
    /// The same with a pair.
    std::pair<iterator, bool> insert(value_type entry) { return insert(entry.first, std::move(entry.second)); }
    /// The same for each pair of a range.
    template <typename Iterator>
    void insert(Iterator first, Iterator last) {
        for (; first != last; ++first) {
            insert(first->first, first->second);
        }
    }
    /// The same as insert.
    std::pair<iterator, bool> emplace(std::string name, at::Tensor tensor) {
        return insert(std::move(name), std::move(tensor));
    }
    /// Appends a tensor, or replaces the one of this name. Returns its entry, and whether it is new.
    std::pair<iterator, bool> insert_or_assign(std::string name, at::Tensor tensor) {
        const auto result = insert(std::move(name), tensor);
        result.first->second = std::move(tensor);
        return result;
    }

    /// Removes the tensor of this name. Returns the number of removed entries: 0 or 1.
    size_type erase(std::string_view name) {
        const auto found = index_.find(name);
        if (found == index_.end()) {
            return 0;
        }
        const iterator entry = found->second;
        index_.erase(found);  // before the entry, whose name it refers to
        entries_.erase(entry);
        return 1;
    }
    /// Removes an entry. Returns the one behind it.
    iterator erase(const_iterator entry) {
        index_.erase(entry->first);
        return entries_.erase(entry);
    }
    /// Removes all tensors.
    void clear() {
        index_.clear();
        entries_.clear();
    }
    /// Prepares for this number of tensors.
    void reserve(size_type count) { index_.reserve(count); }
    /// Exchanges all entries.
    void swap(Tensors& other) noexcept {
        entries_.swap(other.entries_);
        index_.swap(other.index_);
    }

  private:
    template <typename Entries>
    void add(const Entries& entries) {
        for (const auto& [name, tensor] : entries) {
            if (!insert(name, tensor).second) {
                throw Error("tensor \"" + std::string(name) + "\": occurs twice; give each tensor its own name",
                            ErrorCategory::value, 0, 0);
            }
        }
    }

    // Returns a sentence with the names that are most similar to `wanted`.
    std::string similar_to(std::string_view wanted) const {
        constexpr std::size_t most = 3;
        std::vector<std::pair<std::size_t, std::string_view>> ranked;
        for (const auto& entry : entries_) {
            ranked.emplace_back(detail::edit_distance(wanted, entry.first), entry.first);
        }
        if (ranked.empty()) {
            return "there are no tensors";
        }
        const std::size_t shown = std::min(most, ranked.size());
        std::partial_sort(ranked.begin(), ranked.begin() + static_cast<std::ptrdiff_t>(shown), ranked.end());
        std::string text;
        for (std::size_t i = 0; i < shown; ++i) {
            text += (i == 0 ? "\"" : ", \"") + std::string(ranked[i].second) + "\"";
        }
        return shown == ranked.size() ? "the names are " + text : "the most similar names are " + text;
    }

    List entries_;
    std::unordered_map<std::string_view, iterator> index_;  // views of the names in entries_
};

}  // namespace safetensors_torch
