// Random cases of the router's operations.
#include <algorithm>

#include "oracle/balancing.hpp"
#include "rig/checks.hpp"
#include "rig/random.hpp"
#include "rig/router_run.hpp"

namespace sonicmoe::rig {
namespace {

// Sums of a token or of the tokens, in other orders.
constexpr double kSums = 1e-6;

Values normal(Random& random, std::int64_t count, double scale = 1.0) {
  Values values(static_cast<std::size_t>(count));
  for (double& value : values) value = static_cast<float>(scale * random.normal());
  return values;
}

Values counts(Random& random, std::int64_t num_experts, std::int64_t most) {
  Values rows;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    rows.push_back(static_cast<double>(random.integer(0, most)));
  }
  return rows;
}

RouterProblem random_problem(Random& random, std::int64_t fewest_tokens) {
  RouterProblem p;
  p.num_tokens = random.integer(fewest_tokens, 48);
  p.num_experts = random.integer(1, 24);
  p.options.scoring = random.pick(all_scorings());
  if (p.options.scoring != Scoring::kTopKSoftmax && random.chance(0.6)) {
    p.options.renormalize = random.chance(0.5);
  }
  p.options.scale = random.chance(0.5) ? 1.0f : 2.5f;
  std::int64_t most = p.num_experts;  // experts that can be chosen
  if (traits_of(p.options.scoring).biased && random.chance(0.5)) {
    p.options.num_groups = random.integer(2, 4);
    p.options.top_groups = random.integer(1, p.options.num_groups);
    const std::int64_t size = random.integer(1, 6);
    p.num_experts = p.options.num_groups * size;
    most = p.options.top_groups * size;
  }
  p.options.top_k = random.integer(1, std::min<std::int64_t>(most, 6));
  if (traits_of(p.options.scoring).biased && random.chance(0.5)) {
    p.bias = normal(random, p.num_experts, 0.2);
  }
  p.logits = normal(random, p.num_tokens * p.num_experts);
  if (random.chance(0.3)) {  // many equal ones
    for (double& logit : p.logits) logit = static_cast<double>(random.integer(-2, 2)) / 2;
  }
  return p;
}

RoundingOptions random_rounding(Random& random, std::int64_t num_tokens) {
  RoundingOptions rounding;
  rounding.tile = random.integer(1, std::min<std::int64_t>(num_tokens, 16));
  rounding.policy = random.pick(all_rounding_policies());
  rounding.seed = random.bits();
  return rounding;
}

std::string describe(const RoundingOptions& rounding) {
  return " " + std::string(name_of(rounding.policy)) + " tile=" + std::to_string(rounding.tile);
}

}  // namespace

void check_route(const Target& target, std::uint64_t seed, Finding& finding) {
  Random random(seed);
  const RouterProblem p = random_problem(random, 0);
  finding.description = "route " + p.describe();
  const Values grad = normal(random, p.num_tokens * p.options.top_k);
  const DType id_dtype = random.chance(0.5) ? DType::kInt32 : DType::kInt64;
  finding.problems =
      differences(run_route(target, p, grad, id_dtype), expected_route(p, grad), kSums);
}

void check_round_tokens(const Target& target, std::uint64_t seed, Finding& finding) {
  Random random(seed);
  const RouterProblem p = random_problem(random, 1);
  const RoundingOptions rounding = random_rounding(random, p.num_tokens);
  finding.description = "round_tokens " + p.describe() + describe(rounding);
  const Values grad =
      normal(random, rounded_capacity(p.num_tokens, p.num_experts, p.options.top_k, rounding));
  finding.problems = differences(run_round_tokens(target, p, rounding, grad),
                                 expected_round_tokens(p, rounding, grad), kSums);
}

void check_round_select(const Target& target, std::uint64_t seed, Finding& finding) {
  Random random(seed);
  const bool ties = random.chance(0.5);
  Choice choice{random.integer(1, 64), random.integer(1, 16), 1, {}, {}};
  choice.top_k = random.integer(1, std::min<std::int64_t>(choice.num_experts, 6));
  for (std::int64_t i = 0; i < choice.num_tokens * choice.num_experts; ++i) {
    choice.scores.push_back(ties ? static_cast<double>(random.integer(-4, 8)) / 8.0
                                 : static_cast<float>(random.uniform()));
  }
  for (std::int64_t t = 0; t < choice.num_tokens; ++t) {  // any distinct ids are legal
    const std::int64_t first = random.integer(0, choice.num_experts - 1);
    for (std::int64_t k = 0; k < choice.top_k; ++k) {
      choice.ids.push_back(static_cast<double>((first + k) % choice.num_experts));
    }
  }
  const RoundingOptions rounding = random_rounding(random, choice.num_tokens);
  finding.description = "round_select T=" + std::to_string(choice.num_tokens) +
                        " E=" + std::to_string(choice.num_experts) +
                        " K=" + std::to_string(choice.top_k) + describe(rounding) +
                        (ties ? " ties" : "");
  finding.problems = differences(run_round_select(target, choice, rounding),
                                 expected_round_select(choice, rounding));
}

void check_load_balancing_loss(const Target& target, std::uint64_t seed, Finding& finding) {
  Random random(seed);
  const RouterProblem p = random_problem(random, 1);
  finding.description = "load_balancing_loss " + p.describe();
  const Values rows = counts(random, p.num_experts, 3 * p.num_tokens);
  finding.problems = differences(run_load_balancing_loss(target, p, rows, 1.5),
                                 expected_load_balancing_loss(p, rows, 1.5), kSums);
}

void check_router_z_loss(const Target& target, std::uint64_t seed, Finding& finding) {
  Random random(seed);
  const RouterProblem p = random_problem(random, 1);
  finding.description = "router_z_loss " + p.describe();
  finding.problems =
      differences(run_router_z_loss(target, p, 1.5), expected_router_z_loss(p, 1.5), kSums);
}

void check_update_expert_bias(const Target& target, std::uint64_t seed, Finding& finding) {
  Random random(seed);
  const std::int64_t E = random.integer(1, 64);
  finding.description = "update_expert_bias E=" + std::to_string(E);
  Values bias = counts(random, E, 32);
  for (double& value : bias) value = (value - 16.0) / 4.0;
  const Values rows = counts(random, E, 12);
  const Values expected = oracle::updated_expert_bias(bias, Ids(rows.begin(), rows.end()), 0.125);
  if (run_update_expert_bias(target, bias, rows, 0.125f) != expected) {
    finding.problems.emplace_back("bias: wrong");
  }
}

}  // namespace sonicmoe::rig
