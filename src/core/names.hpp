// Enumerators and their public names: tables whose rows have a `value` and a `name`.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>

#include "sonicmoe/error.hpp"

namespace sonicmoe {

/// A row of a table that holds nothing but names.
template <class Enum>
struct Name {
  Enum value;
  std::string_view name;
};

/// "?" where no row has the value.
template <class Row, std::size_t kCount, class Enum>
std::string_view find_name(const Row (&table)[kCount], Enum value) noexcept {
  for (const Row& row : table) {
    if (row.value == value) return row.name;
  }
  return "?";
}

/// Throws Error listing the legal names.
template <class Row, std::size_t kCount>
auto find_value(const Row (&table)[kCount], std::string_view what, std::string_view name) {
  std::string legal;
  for (const Row& row : table) {
    if (row.name == name) return row.value;
    legal += (legal.empty() ? "" : ", ") + std::string(row.name);
  }
  throw Error("sonicmoe", std::string(what), "one of " + legal, "\"" + std::string(name) + "\"");
}

/// The enumerators of a table. Its rows stand in the order of the integers, which start at 0.
template <class Row, std::size_t kCount>
constexpr auto values_of(const Row (&table)[kCount]) {
  std::array<decltype(Row::value), kCount> values{};
  for (std::size_t i = 0; i < kCount; ++i) {
    values[i] = table[i].value;
    if (static_cast<std::size_t>(table[i].value) != i)
      throw "rows out of order";  // at compile time
  }
  return values;
}

}  // namespace sonicmoe
