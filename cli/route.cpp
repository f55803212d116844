// sonicmoe route: token rounding seen. Counts per expert, padding, rows dropped and added.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cli/command.hpp"
#include "cli/npy.hpp"
#include "cli/options.hpp"
#include "cli/random.hpp"
#include "cli/table.hpp"
#include "cli/tensor.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe::cli {
namespace {

constexpr std::array kPolicies{RoundingPolicy::kNearest,  RoundingPolicy::kUp,
                               RoundingPolicy::kDown,     RoundingPolicy::kStochastic,
                               RoundingPolicy::kBalanced, RoundingPolicy::kNearestScore};

struct RouteCommand {
  RunOptions run;
  std::int64_t tokens = 4096;
  std::int64_t experts = 32;
  std::int64_t top_k = 4;
  std::uint64_t seed = 0;
  double skew = 0.5;
  std::string logits_file;
  std::string scoring = "softmax_topk";
  std::vector<std::string> policies;
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
  std::int64_t total = 0;
  for (const std::int32_t count : counts) total += count;
  return total;
}

// Rows that a kernel with tiles of `tile` rows computes in vain.
std::int64_t padding(const std::vector<std::int32_t>& counts, std::int64_t tile) {
  std::int64_t padded = 0;
  for (const std::int32_t count : counts) padded += (tile - count % tile) % tile;
  return padded;
}

// Standard normal logits; expert e is (e + 1)^skew times less likely than expert 0.
Tensor make_logits(const RouteCommand& command) {
  Random random(command.seed);
  Tensor logits(DType::kFloat32, {command.tokens, command.experts});
  for (std::size_t i = 0; i < logits.count(); ++i) {
    const auto e = static_cast<double>(i % static_cast<std::size_t>(command.experts));
    logits.set(i, static_cast<float>(random.normal() - command.skew * std::log1p(e)));
  }
  return logits;
}

Tensor load_logits(RouteCommand& command) {
  const Matrix matrix = read_npy(command.logits_file);
  if (matrix.values.empty()) {
    throw usage_error("--logits", "at least one token and one expert", command.logits_file);
  }
  command.tokens = matrix.rows;
  command.experts = matrix.columns;
  Tensor logits(DType::kFloat32, {matrix.rows, matrix.columns});
  std::copy(matrix.values.begin(), matrix.values.end(), logits.as<float>());
  return logits;
}

// Which pairs rounding dropped and added, which tokens it left without any. Tensors on the host.
void compare_pairs(Outcome& outcome, const RouteCommand& command, const Tensor& topk_ids,
                   const Tensor& token_ids, const Tensor& expert_ids) {
  const auto K = static_cast<std::size_t>(command.top_k);
  std::set<std::pair<std::int32_t, std::int32_t>> chosen;  // (token, expert) of token choice
  for (std::size_t i = 0; i < topk_ids.count(); ++i) {
    chosen.emplace(static_cast<std::int32_t>(i / K), topk_ids.as<std::int32_t>()[i]);
  }
  std::vector<bool> has_row(static_cast<std::size_t>(command.tokens), false);
  std::int64_t kept = 0;
  for (std::size_t p = 0; p < token_ids.count(); ++p) {
    const std::int32_t token = token_ids.as<std::int32_t>()[p];
    if (token < 0) continue;
    has_row[static_cast<std::size_t>(token)] = true;
    const bool was_chosen = chosen.contains({token, expert_ids.as<std::int32_t>()[p]});
    ++(was_chosen ? kept : outcome.added);
  }
  outcome.dropped = command.tokens * command.top_k - kept;
  outcome.empty_tokens = std::count(has_row.begin(), has_row.end(), false);
}

std::vector<std::int32_t> to_vector(const Tensor& tensor) {
  const Tensor host = tensor.to_host();
  return {host.as<std::int32_t>(), host.as<std::int32_t>() + host.count()};
}

// `logits` on the context's device.
Outcome round(const Context& context, const RouteCommand& command, const Tensor& logits,
              RoundingPolicy policy, std::int64_t tile) {
  const std::int64_t T = command.tokens, E = command.experts, K = command.top_k;
  RoundTokensForwardArgs args;
  args.options.top_k = K;
  args.options.scoring = scoring_from_name(command.scoring);
  args.rounding.tile = tile;
  args.rounding.policy = policy;
  args.rounding.seed = command.seed;
  const std::int64_t capacity = rounded_capacity(T, E, K, args.rounding);
  const Device device = context.device;
  const Tensor token_ids(DType::kInt32, {capacity}, device);
  const Tensor expert_ids(DType::kInt32, {capacity}, device);
  const Tensor weights(DType::kFloat32, {capacity}, device);
  const Tensor topk_ids(DType::kInt32, {T, K}, device);
  const Tensor before(DType::kInt32, {E}, device), after(DType::kInt32, {E}, device);
  const auto bytes = round_tokens_workspace_bytes(context, T, E, K);
  const Tensor workspace(DType::kUInt8, {static_cast<std::int64_t>(bytes)}, device);
  args.logits = logits.view();
  args.token_ids = token_ids.view();
  args.expert_ids = expert_ids.view();
  args.pair_weights = weights.view();
  args.topk_ids = topk_ids.view();
  args.rows_per_expert = after.view();
  args.rows_per_expert_before = before.view();
  args.workspace = workspace.view();
  round_tokens_forward(context, args);

  Outcome outcome{policy, tile, to_vector(before), to_vector(after), 0, 0, 0};
  compare_pairs(outcome, command, topk_ids.to_host(), token_ids.to_host(), expert_ids.to_host());
  return outcome;
}

void print_json(const RouteCommand& command, const std::vector<Outcome>& outcomes) {
  nlohmann::ordered_json root;
  root["tokens"] = command.tokens;
  root["experts"] = command.experts;
  root["top_k"] = command.top_k;
  root["scoring"] = command.scoring;
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
  const auto before = fill(o.before);
  const auto after = fill(o.after);
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

void check_options(const RouteCommand& command) {
  const auto require = [](bool condition, const char* option, const char* expected,
                          std::int64_t actual) {
    if (!condition) throw usage_error(option, expected, std::to_string(actual));
  };
  require(command.tokens >= 1, "--tokens", "a positive number", command.tokens);
  require(command.experts >= 1, "--experts", "a positive number", command.experts);
  require(command.top_k >= 1 && command.top_k <= command.experts, "--top-k",
          "1 to the number of experts", command.top_k);
  for (const std::int64_t tile : command.tiles) {
    require(tile >= 1 && tile <= command.tokens, "--tile", "1 to the number of tokens", tile);
  }
  if (!std::isfinite(command.skew)) {
    throw usage_error("--skew", "a finite number", std::to_string(command.skew));
  }
}

int run(RouteCommand command) {
  const Context context = command.run.context();
  if (command.tiles.empty()) command.tiles = {64, 128};
  Tensor logits;
  if (!command.logits_file.empty()) logits = load_logits(command);  // decides tokens and experts
  check_options(command);
  if (!logits.defined()) logits = make_logits(command);
  logits = logits.to(context.device);
  std::vector<RoundingPolicy> policies;
  for (const std::string& name : command.policies) {
    policies.push_back(rounding_policy_from_name(name));
  }
  if (policies.empty()) policies.assign(kPolicies.begin(), kPolicies.end());

  std::vector<Outcome> outcomes;
  for (const std::int64_t tile : command.tiles) {
    for (const RoundingPolicy policy : policies) {
      outcomes.push_back(round(context, command, logits, policy, tile));
    }
  }
  if (command.json) {
    print_json(command, outcomes);
    return kSuccess;
  }
  std::printf("T=%lld E=%lld K=%lld %s, logits from %s\n\n", static_cast<long long>(command.tokens),
              static_cast<long long>(command.experts), static_cast<long long>(command.top_k),
              command.scoring.c_str(),
              command.logits_file.empty() ? ("seed " + std::to_string(command.seed) + ", skew " +
                                             format_fixed(command.skew, 2))
                                                .c_str()
                                          : command.logits_file.c_str());
  print_summary(outcomes);
  const Outcome& shown = outcomes[outcomes.size() - policies.size()];  // first policy, last tile
  command.experts <= 64 ? print_bars(shown) : print_histogram(shown);
  return kSuccess;
}

}  // namespace

void add_route(CLI::App& app, Action& action) {
  CLI::App* command = app.add_subcommand(
      "route", "Token rounding seen: rows per expert, padding, rows dropped and added");
  auto options = std::make_shared<RouteCommand>();
  command->add_option("--tokens", options->tokens, "Tokens T")->capture_default_str();
  command->add_option("--experts", options->experts, "Experts E")->capture_default_str();
  command->add_option("--top-k", options->top_k, "Experts per token K")->capture_default_str();
  command->add_option("--seed", options->seed, "Seed of the logits and of stochastic rounding")
      ->capture_default_str();
  command
      ->add_option("--skew", options->skew,
                   "Expert e is (e + 1)^SKEW times less likely than expert 0")
      ->type_name("SKEW")
      ->capture_default_str();
  command
      ->add_option("--logits", options->logits_file,
                   "Logits [T, E] from a .npy file (float32 or float64) in place of random ones")
      ->type_name("FILE");
  command->add_option("--scoring", options->scoring, "topk_softmax, softmax_topk or sigmoid_topk")
      ->capture_default_str();
  command
      ->add_option("--policy", options->policies,
                   "Rounding policies; default: all six. The first is drawn")
      ->type_name("NAME")
      ->delimiter(',');
  command->add_option("--tile", options->tiles, "Tiles; default: 64,128. The last is drawn")
      ->type_name("ROWS")
      ->delimiter(',');
  options->run.add_to(*command);
  command->add_flag("--json", options->json, "Print JSON");
  command->callback([&action, options] { action = [options] { return run(*options); }; });
}

}  // namespace sonicmoe::cli
