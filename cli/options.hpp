// Options of the subcommands. All go through the parsers, whichever command they belong to.
#pragma once

#include <CLI/CLI.hpp>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

#include "cli/parsers.hpp"
#include "sonicmoe/context.hpp"

namespace sonicmoe::cli {

/// "12.3 MiB", "812 B".
std::string format_bytes(double bytes);
/// `value` with `digits` places behind the point.
std::string format_fixed(double value, int digits);

/// Adds an option whose values, one for each time it is given, are handed to `take`.
void add_raw_option(CLI::App& command, const std::string& name, const std::string& type,
                    const std::string& default_value, const std::string& description,
                    std::function<void(const std::vector<std::string>&)> take);

/// A default as the help text shows it; empty: not at all.
template <class T>
std::string default_text(const T& value) {
  if constexpr (std::is_same_v<T, std::string>) {
    return value;
  } else if constexpr (std::is_same_v<T, LayerShape>) {
    return value.to_string();
  } else if constexpr (std::is_floating_point_v<T>) {
    return format_fixed(value, 1);
  } else if constexpr (std::is_arithmetic_v<T>) {
    return std::to_string(value);
  } else if constexpr (std::is_enum_v<T>) {
    return std::string(name_of(value));
  } else {
    return {};
  }
}

/// Adds an option that is given once at most. `target` (a T, or an optional of it) is what holds
/// without it. Errors while parsing: what the parser refuses, a second value.
template <class Target, class T>
void add_option(CLI::App& command, const std::string& name, Target& target, Parser<T> parser,
                const std::string& description) {
  add_raw_option(command, name, parser.type, default_text(target), description,
                 [&target, name, parser](const std::vector<std::string>& texts) {
                   if (texts.size() != 1) {
                     throw usage_error(name, "one value", texts.front() + " " + texts.back());
                   }
                   target = parse_value(name, parser, texts.front());
                 });
}

/// Adds an option whose values stand in a list with commas, or that is given several times.
template <class T>
void add_list_option(CLI::App& command, const std::string& name, std::vector<T>& target,
                     Parser<T> parser, const std::string& description) {
  add_raw_option(command, name, parser.type + ",...", "", description,
                 [&target, name, parser](const std::vector<std::string>& texts) {
                   for (const std::string& list : texts) {
                     for (const std::string& text : split_list(list)) {
                       target.push_back(parse_value(name, parser, text));
                     }
                   }
                 });
}

/// Adds an option without a value.
void add_flag(CLI::App& command, const std::string& name, bool& target,
              const std::string& description);

/// Ends the help text of a command with lines that can be run.
void add_examples(CLI::App& command, const std::vector<std::string>& lines);

/// --backend, --device, --threads, and the environment variables that do the same.
struct RunOptions {
  std::string backend;
  std::string device = "cpu";
  int threads = 0;

  void add_to(CLI::App& command);
  /// " --backend cpu --threads 2": what repeats them, defaults left out.
  std::string words() const;
  /// Reads the environment where no option overrules it, and checks all against this machine. To be
  /// called once, before anything runs; the context points into *this.
  /// Errors: a malformed device; a device or backend that this machine does not have, with the
  /// reason; a backend that does not serve the device; a variable of the library with a value that
  /// it does not know; more threads or memory than this process may have.
  Context context();
};

}  // namespace sonicmoe::cli
