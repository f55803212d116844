// Options that several subcommands share, and the parsing of their values.
#pragma once

#include <CLI/CLI.hpp>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "sonicmoe/context.hpp"
#include "sonicmoe/dtype.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe::cli {

/// --backend, --device, --threads.
struct RunOptions {
  std::string backend;
  std::string device = "cpu";
  int threads = 0;

  void add_to(CLI::App& command);
  /// The context of these options. The view in it points into *this.
  /// Errors: a malformed device; a device or backend that this machine does not have, with the
  /// reason; a backend that does not serve the device; a negative thread count.
  Context context() const;
};

/// A layer on the command line: T,d,n,E,K.
struct LayerShape {
  std::int64_t num_tokens = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t num_experts = 0;
  std::int64_t top_k = 0;

  std::string to_string() const;
};

/// Errors: anything but five positive integers with K <= E.
LayerShape parse_layer_shape(const std::string& text);

/// "float32" or "bfloat16" (fp32, bf16 are understood).
DType parse_float_dtype(const std::string& text);

/// Bytes: a number with an optional suffix KiB, MiB, GiB, KB, MB, GB. `option` names the argument
/// in the error.
std::size_t parse_bytes(const std::string& option, const std::string& text);

/// "12.3 MiB", "812 B".
std::string format_bytes(double bytes);
/// `value` with `digits` places behind the point.
std::string format_fixed(double value, int digits);

/// The error of a wrong option value, in the library's words.
inline Error usage_error(const std::string& option, const std::string& expected,
                         const std::string& actual) {
  return Error("sonicmoe", option, expected, "\"" + actual + "\"");
}

}  // namespace sonicmoe::cli
