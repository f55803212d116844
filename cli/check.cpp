// sonicmoe check: self-test of every operation against the float64 oracle on random shapes.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "cli/command.hpp"
#include "cli/options.hpp"
#include "cli/table.hpp"
#include "rig/checks.hpp"
#include "rig/random.hpp"

namespace sonicmoe::cli {
namespace {

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
  rig::Finding finding;
  std::string repro;
};

struct Tally {
  std::string operation;
  std::int64_t passed = 0;
  std::int64_t failed = 0;
};

std::vector<std::string> operation_names() {
  std::vector<std::string> names;
  for (const rig::CheckOperation& operation : rig::check_operations()) {
    names.emplace_back(operation.name);
  }
  return names;
}

void print_failure(const Failure& failure) {
  std::printf("FAIL %s\n", failure.finding.description.c_str());
  for (const std::string& problem : failure.finding.problems) {
    std::printf("     %s\n", problem.c_str());
  }
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
                                {"description", failure.finding.description},
                                {"problems", failure.finding.problems},
                                {"repro", failure.repro}});
  }
  std::printf("%s\n", root.dump(2).c_str());
}

// All cases of operation `i` of the list; failures are appended, and printed as they happen.
Tally run_operation(const CheckCommand& command, const rig::Target& target, std::size_t i,
                    Progress& progress, std::vector<Failure>& failures) {
  const rig::CheckOperation& operation = rig::check_operations()[i];
  Tally tally{operation.name};
  for (std::int64_t done = 0; done < command.cases; ++done) {
    const std::int64_t index = command.first + done;
    progress.show(tally.operation + " " + std::to_string(done + 1) + "/" +
                  std::to_string(command.cases));
    // Independent of the cases before it and of the operations selected.
    rig::Random seeds{command.seed, i, static_cast<std::uint64_t>(index)};
    const rig::Finding finding = rig::run_check(operation, target, seeds.bits());
    ++(finding.problems.empty() ? tally.passed : tally.failed);
    if (finding.problems.empty()) continue;
    failures.push_back({tally.operation, index, finding,
                        "sonicmoe check --op " + tally.operation + " --seed " +
                            std::to_string(command.seed) + " --first " + std::to_string(index) +
                            " --cases 1" + command.run.words()});
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
  const rig::Target target = rig::target_of(context);
  const std::vector<std::string> known = operation_names();
  std::vector<Tally> tallies;
  std::vector<Failure> failures;
  Progress progress(!command.json);
  for (const std::string& name : command.operations.empty() ? known : command.operations) {
    const auto place = std::find(known.begin(), known.end(), name) - known.begin();
    tallies.push_back(
        run_operation(command, target, static_cast<std::size_t>(place), progress, failures));
  }
  progress.clear();
  if (command.json) {
    print_json(command, tallies, failures);
  } else {
    Table table({"operation", "passed", "failed"});
    for (const auto& [name, passed, failed] : tallies) {
      table.add_row({name, std::to_string(passed), std::to_string(failed)});
    }
    table.print();
  }
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
  add_examples(*command, {"sonicmoe check", "sonicmoe check --op moe,route --cases 20 --json",
                          "sonicmoe check --device cuda"});
  command->callback([&action, options] { action = [options] { return run(*options); }; });
}

}  // namespace sonicmoe::cli
