// sonicmoe route: token rounding seen. Counts per expert, padding, rows dropped and added.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <string>
#include <vector>

#include "cli/command.hpp"
#include "cli/npy.hpp"
#include "cli/options.hpp"
#include "cli/table.hpp"
#include "rig/host_memory.hpp"
#include "rig/tensor.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe::cli {
namespace {

struct RouteCommand {
  RunOptions run;
  std::optional<std::int64_t> tokens;   // else those of the file, or kTokens
  std::optional<std::int64_t> experts;  // else those of the file, or kExperts
  std::optional<double> skew;           // of random logits
  std::string logits_file;
  std::int64_t top_k = 4;
  std::uint64_t seed = 0;
  Scoring scoring = Scoring::kSoftmaxTopK;
  std::vector<RoundingPolicy> policies;
  std::vector<std::int64_t> tiles;
  bool json = false;
};

// Token choice rounded by one policy to one tile.
struct Outcome {
  RoundingPolicy policy;
  std::int64_t tile = 0;
  std::vector<std::int32_t> before;  // rows per expert of token choice
  std::vector<std::int32_t> after;
  std::int64_t dropped = 0;       // pairs of token choice that are gone
  std::int64_t added = 0;         // pairs that token choice did not have
  std::int64_t empty_tokens = 0;  // tokens left without any row
};

std::int64_t sum(const std::vector<std::int32_t>& counts) {
  return std::accumulate(counts.begin(), counts.end(), std::int64_t{0});
}

// Rows that a kernel with tiles of `tile` rows computes in vain.
std::int64_t padding(const std::vector<std::int32_t>& counts, std::int64_t tile) {
  std::int64_t padded = 0;
  for (const std::int32_t count : counts) padded += (tile - count % tile) % tile;
  return padded;
}

void check_sizes(const RouteCommand& command, std::int64_t T, std::int64_t E) {
  if (command.top_k > E) {
    throw usage_error("--top-k", "1 to the number of experts (" + std::to_string(E) + ")",
                      std::to_string(command.top_k));
  }
  for (const std::int64_t tile : command.tiles) {
    if (tile <= T) continue;
    throw usage_error("--tile", "1 to the number of tokens (" + std::to_string(T) + ")",
                      std::to_string(tile));
  }
}

// What is rounded.
struct RouteProblem {
  std::int64_t T, E, K;
  std::vector<float> logits;  // [T, E]
  std::string origin;         // of the logits, in words
};

// More than the process may use would end it, or the machine's other work, while the data are made.
void require_memory(const RouteCommand& command, const Context& context, std::int64_t T,
                    std::int64_t E, std::int64_t K) {
  const std::size_t memory = rig::usable_memory(context.device);
  const double limit = memory > 0 ? 0.9 * static_cast<double>(memory) : 0x1p60;
  double needed = 4.0 * static_cast<double>(T) * static_cast<double>(E);
  if (needed <= limit) {  // else the other sizes need not be countable
    const std::int64_t longest_tile = *std::max_element(command.tiles.begin(), command.tiles.end());
    needed += static_cast<double>(round_tokens_workspace_bytes(context, T, E, K)) +
              24.0 * (static_cast<double>(T) * static_cast<double>(2 * K) +
                      static_cast<double>(E) * static_cast<double>(longest_tile));
  }
  if (needed <= limit) return;
  throw usage_error(
      command.logits_file.empty() ? "--tokens" : "--logits",
      "logits and scratch of at most " + format_bytes(limit) +
          ", 90% of the memory that this process may use",
      std::to_string(T) + " tokens and " + std::to_string(E) + " experts, " + format_bytes(needed));
}

// Standard normal logits; expert e is (e + 1)^skew times less likely than expert 0.
RouteProblem random_problem(const RouteCommand& command, const Context& context) {
  constexpr std::int64_t kTokens = 4096, kExperts = 32;
  constexpr double kSkew = 0.5;
  const std::int64_t T = command.tokens.value_or(kTokens), E = command.experts.value_or(kExperts);
  const double skew = command.skew.value_or(kSkew);
  check_sizes(command, T, E);
  require_memory(command, context, T, E, command.top_k);
  RouteProblem problem{T, E, command.top_k, std::vector<float>(static_cast<std::size_t>(T * E)),
                       "seed " + std::to_string(command.seed) + ", skew " + format_fixed(skew, 2)};
  rig::Random random(command.seed);
  for (std::size_t i = 0; i < problem.logits.size(); ++i) {
    const auto e = static_cast<double>(i % static_cast<std::size_t>(E));
    problem.logits[i] = static_cast<float>(random.normal() - skew * std::log1p(e));
  }
  return problem;
}

// The file decides tokens and experts; options that say something else are not passed over.
RouteProblem problem_of_file(const RouteCommand& command, const Context& context) {
  if (command.skew) {
    throw usage_error("--skew", "none beside --logits", format_fixed(*command.skew, 2));
  }
  Matrix matrix = read_npy("--logits", command.logits_file);
  const auto require_same = [&](const char* option, std::optional<std::int64_t> given,
                                std::int64_t held) {
    if (!given || *given == held) return;
    throw usage_error(option, std::to_string(held) + " as in " + command.logits_file,
                      std::to_string(*given));
  };
  require_same("--tokens", command.tokens, matrix.rows);
  require_same("--experts", command.experts, matrix.columns);
  check_sizes(command, matrix.rows, matrix.columns);
  require_memory(command, context, matrix.rows, matrix.columns, command.top_k);
  return {matrix.rows, matrix.columns, command.top_k, std::move(matrix.values),
          command.logits_file};
}

// Which pairs rounding dropped and added, which tokens it left without any.
void compare_pairs(Outcome& outcome, const RouteProblem& problem,
                   const std::vector<std::int32_t>& topk_ids,
                   const std::vector<std::int32_t>& token_ids,
                   const std::vector<std::int32_t>& expert_ids) {
  std::vector<bool> has_row(static_cast<std::size_t>(problem.T), false);
  std::int64_t kept = 0;
  for (std::size_t p = 0; p < token_ids.size() && token_ids[p] >= 0; ++p) {
    has_row[static_cast<std::size_t>(token_ids[p])] = true;
    const auto chosen = topk_ids.begin() + token_ids[p] * problem.K, end = chosen + problem.K;
    const bool was_chosen = std::find(chosen, end, expert_ids[p]) != end;
    ++(was_chosen ? kept : outcome.added);
  }
  outcome.dropped = problem.T * problem.K - kept;
  outcome.empty_tokens = std::count(has_row.begin(), has_row.end(), false);
}

// `logits` on the context's device.
Outcome round(const Context& context, const RouteCommand& command, const RouteProblem& problem,
              const ConstTensorView& logits, RoundingPolicy policy, std::int64_t tile) {
  const std::int64_t T = problem.T, E = problem.E, K = problem.K;
  RoundTokensForwardArgs args;
  args.options.top_k = K;
  args.options.scoring = command.scoring;
  args.rounding.tile = tile;
  args.rounding.policy = policy;
  args.rounding.seed = command.seed;
  const std::int64_t capacity = rounded_capacity(T, E, K, args.rounding);
  const rig::Target target = rig::target_of(context);
  const rig::Tensor token_ids(target, DType::kInt32, {capacity});
  const rig::Tensor expert_ids(target, DType::kInt32, {capacity});
  const rig::Tensor weights(target, DType::kFloat32, {capacity});
  const rig::Tensor topk_ids(target, DType::kInt32, {T, K});
  const rig::Tensor before(target, DType::kInt32, {E}), after(target, DType::kInt32, {E});
  const rig::GuardedBuffer workspace(target, round_tokens_workspace_bytes(context, T, E, K));
  args.logits = logits;
  args.token_ids = token_ids.view();
  args.expert_ids = expert_ids.view();
  args.pair_weights = weights.view();
  args.topk_ids = topk_ids.view();
  args.rows_per_expert = after.view();
  args.rows_per_expert_before = before.view();
  args.workspace = workspace.view();
  round_tokens_forward(context, args);

  Outcome outcome{policy, tile, before.elements<std::int32_t>(), after.elements<std::int32_t>(), 0,
                  0,      0};
  compare_pairs(outcome, problem, topk_ids.elements<std::int32_t>(),
                token_ids.elements<std::int32_t>(), expert_ids.elements<std::int32_t>());
  return outcome;
}

void print_json(const RouteCommand& command, const RouteProblem& problem,
                const std::vector<Outcome>& outcomes) {
  nlohmann::ordered_json root;
  root["tokens"] = problem.T;
  root["experts"] = problem.E;
  root["top_k"] = problem.K;
  root["scoring"] = name_of(command.scoring);
  root["seed"] = command.seed;
  root["outcomes"] = nlohmann::ordered_json::array();
  for (const Outcome& o : outcomes) {
    root["outcomes"].push_back({{"policy", name_of(o.policy)},
                                {"tile", o.tile},
                                {"rows_before", sum(o.before)},
                                {"rows_after", sum(o.after)},
                                {"rows_dropped", o.dropped},
                                {"rows_added", o.added},
                                {"tokens_without_rows", o.empty_tokens},
                                {"padding_before", padding(o.before, o.tile)},
                                {"padding_after", padding(o.after, o.tile)},
                                {"rows_per_expert_before", o.before},
                                {"rows_per_expert_after", o.after}});
  }
  std::printf("%s\n", root.dump(2).c_str());
}

std::string with_share(std::int64_t rows, std::int64_t of) {
  const double share = of == 0 ? 0.0 : 100.0 * static_cast<double>(rows) / static_cast<double>(of);
  return std::to_string(rows) + " (" + format_fixed(share, 2) + "%)";
}

void print_summary(const std::vector<Outcome>& outcomes) {
  Table table({"policy", "tile", "rows before", "after", "dropped", "added", "padding before",
               "after", "tokens without rows"});
  for (const Outcome& o : outcomes) {
    const std::int64_t rows = sum(o.before);
    table.add_row({std::string(name_of(o.policy)), std::to_string(o.tile), std::to_string(rows),
                   std::to_string(sum(o.after)), with_share(o.dropped, rows),
                   with_share(o.added, rows), with_share(padding(o.before, o.tile), rows),
                   with_share(padding(o.after, o.tile), sum(o.after)),
                   std::to_string(o.empty_tokens)});
  }
  table.print();
}

// One bar per expert: '#' what stays, '-' what rounding drops, '+' what it adds.
void print_bars(const Outcome& o) {
  constexpr std::int64_t kWidth = 64;
  std::int64_t longest = 1;
  for (std::size_t e = 0; e < o.before.size(); ++e) {
    longest = std::max<std::int64_t>({longest, o.before[e], o.after[e]});
  }
  std::printf("\nRows per expert, policy %s, tile %lld ('#' kept, '-' dropped, '+' added)\n",
              std::string(name_of(o.policy)).c_str(), static_cast<long long>(o.tile));
  std::printf("expert  before   after\n");
  for (std::size_t e = 0; e < o.before.size(); ++e) {
    const auto cells = [&](std::int64_t rows) {
      return static_cast<std::size_t>((rows * kWidth + longest / 2) / longest);
    };
    const std::size_t low = cells(std::min(o.before[e], o.after[e]));
    const std::size_t high = cells(std::max(o.before[e], o.after[e]));
    const char change = o.after[e] > o.before[e] ? '+' : '-';
    std::printf("%6zu %7d %7d  %s%s\n", e, o.before[e], o.after[e], std::string(low, '#').c_str(),
                std::string(high - low, change).c_str());
  }
}

// Many experts: how many of them have how many rows.
void print_histogram(const Outcome& o) {
  constexpr int kBuckets = 16;
  constexpr std::size_t kWidth = 48;
  std::int32_t most = 1;
  for (const auto* counts : {&o.before, &o.after}) {
    most = std::max(most, *std::max_element(counts->begin(), counts->end()));
  }
  const std::int32_t width = (most + kBuckets) / kBuckets;
  const auto fill = [&](const std::vector<std::int32_t>& counts) {
    std::array<std::size_t, kBuckets + 1> buckets{};
    for (const std::int32_t count : counts) ++buckets[static_cast<std::size_t>(count / width)];
    return buckets;
  };
  const auto before = fill(o.before), after = fill(o.after);
  const std::size_t highest = std::max(*std::max_element(before.begin(), before.end()),
                                       *std::max_element(after.begin(), after.end()));
  std::printf("\nExperts by rows, policy %s, tile %lld ('.' before, '#' after)\n",
              std::string(name_of(o.policy)).c_str(), static_cast<long long>(o.tile));
  for (std::int32_t b = 0; b * width <= most; ++b) {
    const auto i = static_cast<std::size_t>(b);
    const std::string range =
        std::to_string(b * width) + ".." + std::to_string((b + 1) * width - 1);
    std::printf("%13s  %5zu  %s\n", range.c_str(), before[i],
                std::string(before[i] * kWidth / highest, '.').c_str());
    std::printf("%13s  %5zu  %s\n", "", after[i],
                std::string(after[i] * kWidth / highest, '#').c_str());
  }
}

int run(RouteCommand command) {
  const Context context = command.run.context();
  if (command.tiles.empty()) command.tiles = {64, 128};
  if (command.policies.empty()) {
    const auto all = all_rounding_policies();
    command.policies.assign(all.begin(), all.end());
  }
  const RouteProblem problem = command.logits_file.empty() ? random_problem(command, context)
                                                           : problem_of_file(command, context);
  ConstTensorView logits(problem.logits.data(), DType::kFloat32, {problem.T, problem.E});
  rig::Tensor placed;
  if (context.device.type != DeviceType::kCpu) {
    placed = rig::Tensor(rig::target_of(context), DType::kFloat32, {problem.T, problem.E});
    placed.fill_floats(problem.logits);
    logits = placed.view();
  }

  std::vector<Outcome> outcomes;
  for (const std::int64_t tile : command.tiles) {
    for (const RoundingPolicy policy : command.policies) {
      outcomes.push_back(round(context, command, problem, logits, policy, tile));
    }
  }
  if (command.json) return print_json(command, problem, outcomes), kSuccess;
  std::printf("T=%lld E=%lld K=%lld %s, logits from %s\n\n", static_cast<long long>(problem.T),
              static_cast<long long>(problem.E), static_cast<long long>(problem.K),
              std::string(name_of(command.scoring)).c_str(), problem.origin.c_str());
  print_summary(outcomes);
  // The first policy, the last tile.
  const Outcome& shown = outcomes[outcomes.size() - command.policies.size()];
  problem.E <= 64 ? print_bars(shown) : print_histogram(shown);
  return kSuccess;
}

}  // namespace

void add_route(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "route", "Token rounding seen: rows per expert, padding, rows dropped and added");
  auto options = std::make_shared<RouteCommand>();
  const Parser<std::int64_t> size = count(1, std::numeric_limits<std::int32_t>::max());
  add_option(*command, "--tokens", options->tokens, size, "Tokens T; default: 4096");
  add_option(*command, "--experts", options->experts, size, "Experts E; default: 32");
  add_option(*command, "--top-k", options->top_k, size, "Experts per token K");
  add_option(*command, "--seed", options->seed, integer<std::uint64_t>(0),
             "Seed of the logits and of stochastic rounding");
  add_option(*command, "--skew", options->skew, number(-100, 100),
             "Expert e is (e + 1)^SKEW times less likely than expert 0; default: 0.5");
  add_option(*command, "--logits", options->logits_file, text("FILE", "the name of a .npy file"),
             "Logits [T, E] from a .npy file (float32 or float64) in place of random ones");
  add_option(*command, "--scoring", options->scoring, enumerator(all_scorings()),
             "Scoring function");
  add_list_option(*command, "--policy", options->policies, enumerator(all_rounding_policies()),
                  "Rounding policies; default: all. The first is drawn");
  add_list_option(*command, "--tile", options->tiles, size,
                  "Tiles; default: 64,128. The last is drawn");
  options->run.add_to(*command);
  add_flag(*command, "--json", options->json, "Print JSON");
  add_examples(*command, {"sonicmoe route --tokens 16k --experts 64 --top-k 8",
                          "sonicmoe route --policy nearest --tile 128 --skew 1",
                          "sonicmoe route --logits logits.npy --json"});
  command->callback([&action, options] { action = [options] { return run(*options); }; });
}

}  // namespace sonicmoe::cli
