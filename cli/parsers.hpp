// The text of an option to its value. A value is taken exactly as written or refused, never read
// as something else: no number is cut to what fits, and nothing empty stands for a default.
#pragma once

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cli/problems.hpp"
#include "sonicmoe/dtype.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe::cli {

template <class T>
struct Parser {
  /// Of the value, for the help text. Names within braces are values: the help shows them and
  /// completion offers them.
  std::string type;
  std::string expected;  ///< what is accepted, as the error says it
  std::function<std::optional<T>(std::string_view)> parse;  ///< nothing: not what is expected
};

/// The error of a wrong value of an option or of an environment variable, in the library's words.
Error usage_error(const std::string& option, const std::string& expected,
                  const std::string& actual);

std::string join(const std::vector<std::string>& parts, std::string_view separator);

/// What stands between the commas; one empty text of an empty list.
std::vector<std::string> split_list(std::string_view list);

/// The value of `text`. Errors: empty text, and what the parser refuses.
template <class T>
T parse_value(const std::string& option, const Parser<T>& parser, const std::string& text) {
  std::optional<T> value;
  if (!text.empty()) value = parser.parse(text);
  if (!value) throw usage_error(option, parser.expected, text);
  return *std::move(value);
}

/// All of `text` as a T in [low, high], or nothing.
template <class T>
std::optional<T> in_range(std::string_view text, T low, T high) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = error == std::errc() && end == text.data() + text.size();
  if (!whole || !(value >= low && value <= high)) return {};  // NaN is in no range
  return value;
}

/// Decimal digits, with a sign where T has one, in [low, high].
template <class T>
Parser<T> integer(T low, T high = std::numeric_limits<T>::max()) {
  return {"N", "an integer from " + std::to_string(low) + " to " + std::to_string(high),
          [low, high](std::string_view text) { return in_range(text, low, high); }};
}

/// The same, or with a suffix k (2^10) or m (2^20) in either case: 32k is 32768.
Parser<std::int64_t> count(std::int64_t low, std::int64_t high);

/// A finite number in [low, high].
Parser<double> number(double low, double high);

/// Bytes: a number with an optional suffix KB, MB, GB, TB, KiB, MiB, GiB, TiB; below 2^63.
Parser<std::size_t> bytes();

/// T,d,n,E,K: five counts from 1 to 2^31 with K <= E.
Parser<LayerShape> layer_shape();

/// Errors: a shape without countable bytes, as a wrong value of `option`.
void require_countable_bytes(const std::string& option, const LayerShape& shape,
                             Activation activation);

/// "float32" or "bfloat16" (fp32, bf16 are understood), or "both".
Parser<std::vector<DType>> float_dtypes();
/// As above without "both".
Parser<DType> float_dtype();

/// Anything.
Parser<std::string> text(std::string type, std::string expected);

/// One of these names.
Parser<std::string> one_of(std::vector<std::string> names);

/// An enumerator by its public name.
template <class Enum>
Parser<Enum> enumerator(std::span<const Enum> values) {
  std::vector<std::string> names;
  for (const Enum value : values) names.emplace_back(name_of(value));
  const Parser<std::string> name = one_of(std::move(names));
  return {name.type, name.expected,
          [values = std::vector<Enum>(values.begin(), values.end())](
              std::string_view text) -> std::optional<Enum> {
            for (const Enum value : values) {
              if (name_of(value) == text) return value;
            }
            return {};
          }};
}

}  // namespace sonicmoe::cli
