// One subcommand = one function that adds itself to the command line.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <string>
#include <vector>

namespace sonicmoe::cli {

/// Exit statuses of the command.
inline constexpr int kSuccess = 0;
inline constexpr int kFailure = 1;  ///< the work was done and something is wrong
inline constexpr int kUsage = 2;    ///< the request makes no sense: one line on stderr

/// What runs after a successful parse; returns the exit status.
using Action = std::function<int()>;

void add_info(CLI::App& app, Action& action);
void add_check(CLI::App& app, Action& action);
void add_bench(CLI::App& app, Action& action);
void add_memory(CLI::App& app, Action& action);
void add_route(CLI::App& app, Action& action);
void add_completion(CLI::App& app, Action& action);
void add_man(CLI::App& app, Action& action);

/// What `sonicmoe complete WORD...` prints: the candidates for the last of `words`, one a line.
void print_candidates(const CLI::App& app, std::vector<std::string> words);

}  // namespace sonicmoe::cli
