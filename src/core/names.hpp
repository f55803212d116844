// Enumerators and their public names, one table each.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <utility>

#include "sonicmoe/error.hpp"

namespace sonicmoe {

template <class Enum>
using NameTable = std::span<const std::pair<Enum, std::string_view>>;

template <class Enum>
std::string_view find_name(NameTable<Enum> table, Enum value) noexcept {
  for (const auto& [entry, name] : table) {
    if (entry == value) return name;
  }
  return "?";
}

/// Throws Error listing the legal names.
template <class Enum>
Enum find_value(NameTable<Enum> table, std::string_view what, std::string_view name) {
  std::string legal;
  for (const auto& [value, entry] : table) {
    if (entry == name) return value;
    legal += (legal.empty() ? "" : ", ") + std::string(entry);
  }
  throw Error("sonicmoe", std::string(what), "one of " + legal, "\"" + std::string(name) + "\"");
}

}  // namespace sonicmoe
