#include "cli/parsers.hpp"

#include <algorithm>
#include <array>
#include <cstdio>

namespace sonicmoe::cli {
namespace {

struct Unit {
  std::string_view suffix;
  std::uint64_t bytes;
};
constexpr std::array<Unit, 10> kUnits{{{"", 1},
                                       {"B", 1},
                                       {"KB", 1'000},
                                       {"MB", 1'000'000},
                                       {"GB", 1'000'000'000},
                                       {"TB", 1'000'000'000'000},
                                       {"KiB", std::uint64_t{1} << 10},
                                       {"MiB", std::uint64_t{1} << 20},
                                       {"GiB", std::uint64_t{1} << 30},
                                       {"TiB", std::uint64_t{1} << 40}}};
constexpr std::uint64_t kMostBytes = (std::uint64_t{1} << 63) - 1;

// A number at the start of `text`, followed by a unit. Nothing where either is missing.
template <class T>
std::optional<std::pair<T, std::uint64_t>> number_with_unit(std::string_view text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc()) return {};
  const std::string_view suffix = text.substr(static_cast<std::size_t>(end - text.data()));
  for (const Unit& unit : kUnits) {
    if (unit.suffix == suffix) return std::pair{value, unit.bytes};
  }
  return {};
}

std::optional<std::size_t> parse_bytes(std::string_view text) {
  // Whole numbers exactly: a double holds 53 bits of them.
  if (const auto whole = number_with_unit<std::uint64_t>(text)) {
    const auto [value, unit] = *whole;
    if (value > kMostBytes / unit) return {};
    return static_cast<std::size_t>(value * unit);
  }
  const auto part = number_with_unit<double>(text);
  if (!part) return {};
  const double value = part->first * static_cast<double>(part->second);
  const bool in_range = value >= 0.0 && value < 0x1p63;  // false for NaN
  if (!in_range ||
      (part->second == 1 && value != static_cast<double>(static_cast<std::uint64_t>(value)))) {
    return {};
  }
  return static_cast<std::size_t>(value);
}

std::optional<LayerShape> parse_layer_shape(std::string_view text) {
  const Parser<std::int64_t> extent = count(1, std::int64_t{1} << 31);
  std::vector<std::int64_t> sizes;
  for (const std::string& size : split_list(text)) {
    const auto value = extent.parse(size);
    if (!value) return {};
    sizes.push_back(*value);
  }
  if (sizes.size() != 5 || sizes[4] > sizes[3]) return {};
  return LayerShape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
}

std::optional<DType> parse_float_dtype(std::string_view text) {
  if (text == "float32" || text == "fp32") return DType::kFloat32;
  if (text == "bfloat16" || text == "bf16") return DType::kBFloat16;
  return {};
}

std::string in_digits(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.15g", value);
  return buffer;
}

}  // namespace

Error usage_error(const std::string& option, const std::string& expected,
                  const std::string& actual) {
  constexpr std::size_t kMostShown = 200;
  const bool cut = actual.size() > kMostShown;
  return Error("sonicmoe", option, expected,
               "\"" + actual.substr(0, kMostShown) + (cut ? "..." : "") + "\"");
}

std::string join(const std::vector<std::string>& parts, std::string_view separator) {
  std::string text;
  for (const std::string& part : parts) {
    text.append(&part == &parts.front() ? "" : separator).append(part);
  }
  return text;
}

std::vector<std::string> split_list(std::string_view list) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= list.size();) {
    const std::size_t comma = std::min(list.find(',', begin), list.size());
    parts.emplace_back(list.substr(begin, comma - begin));
    begin = comma + 1;
  }
  return parts;
}

Parser<std::int64_t> count(std::int64_t low, std::int64_t high) {
  return {
      "N",
      "an integer from " + std::to_string(low) + " to " + std::to_string(high) + " (32k is 32768)",
      [low, high](std::string_view text) {
        const std::size_t end = text.find_last_not_of("kKmM") + 1;
        if (end + 1 != text.size()) return in_range(text, low, high);
        const int shift = text.ends_with('k') || text.ends_with('K') ? 10 : 20;
        const auto value = in_range(text.substr(0, end), std::int64_t{0}, high >> shift);
        if (!value || *value << shift < low) return std::optional<std::int64_t>();
        return std::optional(*value << shift);
      }};
}

Parser<double> number(double low, double high) {
  return {"X", "a number from " + in_digits(low) + " to " + in_digits(high),
          [low, high](std::string_view text) { return in_range(text, low, high); }};
}

Parser<std::size_t> bytes() {
  return {"BYTES", "bytes such as 1048576, 512MiB or 80GB, below 8 EiB", parse_bytes};
}

Parser<LayerShape> layer_shape() {
  return {"T,d,n,E,K",
          "T,d,n,E,K: five positive integers of at most 2^31 with K <= E (32k is 32768)",
          parse_layer_shape};
}

void require_countable_bytes(const std::string& option, const LayerShape& shape,
                             Activation activation) {
  if (shape.has_countable_bytes(activation)) return;
  throw usage_error(option, "a layer whose bytes stay below 2^62", shape.to_string());
}

Parser<std::vector<DType>> float_dtypes() {
  return {"{float32,bfloat16,both}", "float32, bfloat16 or both",
          [](std::string_view text) -> std::optional<std::vector<DType>> {
            if (text == "both") return std::vector{DType::kFloat32, DType::kBFloat16};
            const auto one = parse_float_dtype(text);
            if (!one) return {};
            return std::vector{*one};
          }};
}

Parser<DType> float_dtype() {
  return {"{float32,bfloat16}", "float32 or bfloat16", parse_float_dtype};
}

Parser<std::string> text(std::string type, std::string expected) {
  return {std::move(type), std::move(expected),
          [](std::string_view value) { return std::optional<std::string>(value); }};
}

Parser<std::string> one_of(std::vector<std::string> names) {
  return {"{" + join(names, ",") + "}", "one of " + join(names, ", "),
          [names = std::move(names)](std::string_view value) -> std::optional<std::string> {
            if (std::find(names.begin(), names.end(), value) == names.end()) return {};
            return std::string(value);
          }};
}

}  // namespace sonicmoe::cli
