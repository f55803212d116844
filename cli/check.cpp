// sonicmoe check: self-test of every operation against float64 definitions on random shapes.
#include "cli/check.hpp"

#include <algorithm>
#include <array>
#include <cstdio>
#include <exception>
#include <limits>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <string>
#include <system_error>
#include <vector>

#include "cli/command.hpp"
#include "cli/options.hpp"
#include "cli/resources.hpp"
#include "cli/table.hpp"

namespace sonicmoe::cli {
namespace {

constexpr std::array kOperations{
    CheckOperation{"moe", check_moe},
    CheckOperation{"moe_sorted", check_moe_sorted},
    CheckOperation{"moe_pairs", check_moe_pairs},
    CheckOperation{"moe_layer", check_moe_layer},
    CheckOperation{"route", check_route},
    CheckOperation{"round_tokens", check_round_tokens},
    CheckOperation{"round_select", check_round_select},
    CheckOperation{"load_balancing_loss", check_load_balancing_loss},
    CheckOperation{"router_z_loss", check_router_z_loss},
    CheckOperation{"update_expert_bias", check_update_expert_bias},
};

struct CheckCommand {
  RunOptions run;
  std::vector<std::string> operations;
  std::uint64_t seed = 0;
  std::int64_t first = 0;
  std::int64_t cases = 20;
  bool json = false;
};

struct Failure {
  std::string operation;
  std::int64_t index = 0;
  std::string description;
  std::vector<std::string> problems;
  std::string repro;
};

struct Tally {
  std::string operation;
  std::int64_t passed = 0;
  std::int64_t failed = 0;
};

std::string repro_line(const CheckCommand& command, const char* operation, std::int64_t index) {
  std::string line = "sonicmoe check --op " + std::string(operation) + " --seed " +
                     std::to_string(command.seed) + " --first " + std::to_string(index) +
                     " --cases 1";
  if (!command.run.backend.empty()) line += " --backend " + command.run.backend;
  if (command.run.device != "cpu") line += " --device " + command.run.device;
  if (command.run.threads != 0) line += " --threads " + std::to_string(command.run.threads);
  return line;
}

// The case's own generator: independent of the cases before it and of the operations selected.
Random case_random(const CheckCommand& command, std::size_t operation, std::int64_t index) {
  return Random{command.seed, operation, static_cast<std::uint64_t>(index)};
}

std::vector<std::string> operation_names() {
  std::vector<std::string> names;
  for (const CheckOperation& operation : kOperations) names.emplace_back(operation.name);
  return names;
}

// Numbers of the operations asked for, in that order; none named: all.
std::vector<std::size_t> selected_operations(const CheckCommand& command) {
  const std::vector<std::string> known = operation_names();
  std::vector<std::size_t> selected;
  for (const std::string& name : command.operations.empty() ? known : command.operations) {
    const auto found = std::find(known.begin(), known.end(), name);
    selected.push_back(static_cast<std::size_t>(found - known.begin()));
  }
  return selected;
}

// An exception in the middle of a case is a finding of that case. Lack of memory or threads is not:
// it says nothing about the operation.
Findings run_case(const CheckOperation& operation, const Context& context, Random random) {
  try {
    return operation.run(context, random);
  } catch (const std::bad_alloc&) {
    throw;
  } catch (const std::system_error&) {
    throw;
  } catch (const OutOfMemory&) {
    throw std::bad_alloc();
  } catch (const std::exception& error) {
    Findings findings;
    findings.description = "error";
    findings.add(error.what());
    return findings;
  }
}

void print_failure(const Failure& failure) {
  std::printf("FAIL %s\n", failure.description.c_str());
  for (const std::string& problem : failure.problems) std::printf("     %s\n", problem.c_str());
  std::printf("     repeat: %s\n", failure.repro.c_str());
}

void print_json(const CheckCommand& command, const std::vector<Tally>& tallies,
                const std::vector<Failure>& failures) {
  nlohmann::ordered_json root;
  root["backend"] = command.run.backend;
  root["device"] = command.run.device;
  root["seed"] = command.seed;
  root["passed"] = failures.empty();
  root["operations"] = nlohmann::ordered_json::array();
  for (const Tally& tally : tallies) {
    root["operations"].push_back(
        {{"operation", tally.operation}, {"passed", tally.passed}, {"failed", tally.failed}});
  }
  root["failures"] = nlohmann::ordered_json::array();
  for (const Failure& failure : failures) {
    root["failures"].push_back({{"operation", failure.operation},
                                {"case", failure.index},
                                {"description", failure.description},
                                {"problems", failure.problems},
                                {"repro", failure.repro}});
  }
  std::printf("%s\n", root.dump(2).c_str());
}

void print_table(const std::vector<Tally>& tallies) {
  Table table({"operation", "passed", "failed"});
  for (const Tally& tally : tallies) {
    table.add_row({tally.operation, std::to_string(tally.passed), std::to_string(tally.failed)});
  }
  table.print();
}

// All cases of one operation; failures are appended, and printed as they happen.
Tally run_operation(const CheckCommand& command, const Context& context, std::size_t i,
                    Progress& progress, std::vector<Failure>& failures) {
  const CheckOperation& operation = kOperations[i];
  Tally tally{operation.name};
  for (std::int64_t done = 0; done < command.cases; ++done) {
    const std::int64_t index = command.first + done;
    progress.show(tally.operation + " " + std::to_string(done + 1) + "/" +
                  std::to_string(command.cases));
    const Findings findings = run_case(operation, context, case_random(command, i, index));
    ++(findings.passed() ? tally.passed : tally.failed);
    if (findings.passed()) continue;
    failures.push_back({tally.operation, index, findings.description, findings.problems(),
                        repro_line(command, operation.name, index)});
    if (command.json) continue;
    progress.clear();
    print_failure(failures.back());
  }
  return tally;
}

int run(CheckCommand command) {
  const Context context = command.run.context();
  const std::int64_t last = std::numeric_limits<std::int64_t>::max();
  if (command.cases - 1 > last - command.first) {
    throw usage_error("--cases",
                      "at most " + std::to_string(last - command.first + 1) + " with --first " +
                          std::to_string(command.first),
                      std::to_string(command.cases));
  }

  std::vector<Tally> tallies;
  std::vector<Failure> failures;
  Progress progress(!command.json);
  for (const std::size_t i : selected_operations(command)) {
    tallies.push_back(run_operation(command, context, i, progress, failures));
  }
  progress.clear();
  command.json ? print_json(command, tallies, failures) : print_table(tallies);
  return failures.empty() ? kSuccess : kFailure;
}

}  // namespace

void add_check(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "check", "Self-test of every operation against float64 definitions on random shapes");
  auto options = std::make_shared<CheckCommand>();
  add_list_option(*command, "--op", options->operations, one_of(operation_names()),
                  "Operations to check; default: all");
  add_option(*command, "--seed", options->seed, integer<std::uint64_t>(0),
             "Seed of shapes and data");
  add_option(*command, "--first", options->first, integer<std::int64_t>(0),
             "Number of the first case");
  add_option(*command, "--cases", options->cases, integer<std::int64_t>(1), "Cases per operation");
  options->run.add_to(*command);
  add_flag(*command, "--json", options->json, "Print JSON");
  command->callback([&action, options] { action = [options] { return run(*options); }; });
}

}  // namespace sonicmoe::cli
