// The header of a .npy file: a literal of a Python dictionary with three entries.
#include <algorithm>
#include <charconv>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "cli/npy.hpp"

namespace sonicmoe::cli {
namespace {

constexpr std::string_view kBlanks = " \t\n";

[[noreturn]] void fail(const std::string& expected, std::string_view actual) {
  constexpr std::size_t kMostShown = 40;
  const bool cut = actual.size() > kMostShown;
  throw std::invalid_argument(
      "expected " + expected + ", got " +
      (actual.empty() ? "its end" : std::string(actual.substr(0, kMostShown))) +
      (cut ? "..." : ""));
}

// Takes the tokens of the literal one by one, in one pass.
class Tokens {
 public:
  explicit Tokens(std::string_view text) : rest_(text) {}

  /// What is left, without the blanks before it.
  std::string_view rest() {
    rest_.remove_prefix(std::min(rest_.find_first_not_of(kBlanks), rest_.size()));
    return rest_;
  }
  bool accept(std::string_view token) {
    if (!rest().starts_with(token)) return false;
    rest_.remove_prefix(token.size());
    return true;
  }
  void require(std::string_view token, const char* where) {
    if (!accept(token)) fail("\"" + std::string(token) + "\" " + where, rest());
  }
  std::string_view quoted(const char* what) {
    const char quote = accept("'") ? '\'' : accept("\"") ? '"' : '\0';
    const std::size_t end = quote == '\0' ? std::string_view::npos : rest_.find(quote);
    if (end == std::string_view::npos) fail(what, rest());
    const std::string_view value = rest_.substr(0, end);
    rest_.remove_prefix(end + 1);
    return value;
  }
  std::int64_t extent() {
    std::int64_t value = 0;
    const std::string_view text = rest();
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || value < 1 || value > std::numeric_limits<std::int32_t>::max()) {
      fail("an extent from 1 to 2147483647 in the shape", text);
    }
    rest_.remove_prefix(static_cast<std::size_t>(end - text.data()));
    accept("L");  // as Python 2 wrote it
    return value;
  }

 private:
  std::string_view rest_;
};

std::size_t element_bytes_of(Tokens& tokens) {
  const char* expected = "a dtype of float32 or float64 ('<f4' or '<f8')";
  const std::string_view descr = tokens.quoted(expected);
  if (descr == "<f4") return 4;
  if (descr == "<f8") return 8;
  fail(expected, descr);
}

bool boolean_of(Tokens& tokens) {
  if (tokens.accept("True")) return true;
  if (tokens.accept("False")) return false;
  fail("True or False as fortran_order", tokens.rest());
}

void shape_of(Tokens& tokens, NpyHeader& header) {
  const char* expected = "in the shape: two dimensions [tokens, experts]";
  tokens.require("(", expected);
  header.rows = tokens.extent();
  tokens.require(",", expected);
  if (tokens.rest().starts_with(")")) fail("two dimensions [tokens, experts]", "one");
  header.columns = tokens.extent();
  tokens.accept(",");
  if (!tokens.accept(")")) fail("two dimensions [tokens, experts] and \")\"", tokens.rest());
}

}  // namespace

NpyHeader parse_npy_header(std::string_view text) {
  NpyHeader header;
  std::optional<std::size_t> element_bytes;
  std::optional<bool> fortran_order;
  bool has_shape = false;
  Tokens tokens(text);
  tokens.require("{", "at the start of the header");
  while (!tokens.accept("}")) {
    const std::string_view key = tokens.quoted("a key of the header");
    tokens.require(":", "after a key of the header");
    if (key == "descr" && !element_bytes) {
      element_bytes = element_bytes_of(tokens);
    } else if (key == "fortran_order" && !fortran_order) {
      fortran_order = boolean_of(tokens);
    } else if (key == "shape" && !has_shape) {
      shape_of(tokens, header);
      has_shape = true;
    } else {
      fail("the keys descr, fortran_order and shape once each", key);
    }
    if (tokens.accept(",")) continue;
    tokens.require("}", "at the end of the header");
    break;
  }
  if (!tokens.rest().empty()) fail("nothing after the header's }", tokens.rest());
  if (!element_bytes || !fortran_order || !has_shape) {
    fail("the keys descr, fortran_order and shape", "only some of them");
  }
  header.element_bytes = *element_bytes;
  header.fortran_order = *fortran_order;
  return header;
}

}  // namespace sonicmoe::cli
