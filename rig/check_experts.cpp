// Random cases of the experts and of the whole layer.
#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "rig/checks.hpp"
#include "rig/compare.hpp"
#include "rig/layer_run.hpp"
#include "rig/moe_run.hpp"
#include "rig/random.hpp"

namespace sonicmoe::rig {
namespace {

using Form = MoEShape::Form;

// Sizes that matter: tiny ones, and those around the widths of vectors and tiles.
std::int64_t random_size(Random& random, std::int64_t most) {
  if (random.chance(0.5)) return random.integer(1, std::min<std::int64_t>(most, 9));
  return random.integer(1, most);
}

MoECase random_case(Form form, Random& random) {
  const std::vector<Activation> activations(all_activations().begin(), all_activations().end());
  const std::vector<Strides> weight_strides = {Strides::kContiguous, Strides::kPadded,
                                               Strides::kTransposed, Strides::kTransposedPadded};
  MoECase c;
  c.form = form;
  c.seed = random.bits() >> 2;
  c.num_tokens = random.chance(0.03) ? 0 : random_size(random, 40);
  c.hidden_size = random_size(random, 40);
  c.intermediate_size = random_size(random, 36);
  c.num_experts = random_size(random, 20);
  c.top_k = random.integer(1, std::min<std::int64_t>(c.num_experts, 6));
  c.num_pairs = random.chance(0.03) ? 0 : random_size(random, 90);
  c.tail_rows = random.chance(0.5) ? random.integer(0, c.num_pairs) : 0;
  c.activation = random.pick(activations);
  c.gate_up_layout =
      random.pick<GateUpLayout>({GateUpLayout::kConcatenated, GateUpLayout::kInterleaved});
  c.limit = random.pick<float>({0.75f, 7.0f});
  c.dtype = random.pick<DType>({DType::kFloat32, DType::kBFloat16});
  c.id_dtype = random.pick<DType>({DType::kInt32, DType::kInt64});
  c.routing_weight_dtype = random.pick<DType>({DType::kFloat32, DType::kBFloat16});
  c.biases = random.chance(0.5);
  c.row_weights = random.chance(0.7);
  c.x_strides = random.pick<Strides>({Strides::kContiguous, Strides::kPadded});
  c.w1_strides = random.pick(weight_strides);
  c.w2_strides = random.pick(weight_strides);
  c.load = random.pick<Load>({Load::kUniform, Load::kUniform, Load::kOneExpert, Load::kSomeEmpty});
  c.drop_probability = random.pick<double>({0.0, 0.0, 0.3, 0.8, 1.0});
  if (form == Form::kSorted) return c;
  if (random.chance(0.3)) c.first_expert = random.integer(1, 50);
  if (random.chance(0.4)) c.max_rows = random.integer(0, c.pairs() + 2);
  c.zero_absent_tokens = random.chance(0.7);
  return c;
}

RunOptions random_options(Random& random, const Target& target, const MoECase& c) {
  RunOptions options;
  options.num_threads = static_cast<int>(random.integer(1, 3));
  if (target.num_threads > 0) options.num_threads = target.num_threads;
  options.inference = random.chance(0.2);
  if (random.chance(0.3)) options.gradients = static_cast<unsigned>(random.integer(0, 63));
  if (random.chance(0.4)) options.gradient_dtype = DType::kFloat32;
  const bool float_gradients = options.gradient_dtype.value_or(c.dtype) == DType::kFloat32;
  options.accumulate = float_gradients && random.chance(0.3);
  options.accumulate_onto = options.accumulate ? 1.0 : 0.0;
  return options;
}

void check_form(Form form, const Target& target, std::uint64_t seed, Finding& finding) {
  Random random(seed);
  const MoECase c = fitted(target, random_case(form, random));
  finding.description = c.describe();
  RunOptions options = random_options(random, target, c);
  const RunResult run = run_moe(target, c, options);
  finding.problems = check_run(c, options, run, Strictness::kTiny);
  // Nothing may depend on the thread count, on how the workspace is cut into slabs, or on who else
  // uses the device.
  Target shared = target;
  shared.shared_device = true;
  options.num_threads = 1;
  options.forward_limit = run.forward_plan.minimum_bytes;
  options.backward_limit = run.backward_plan.minimum_bytes;
  // Nor on how many calls a backward takes; what the reference hands on it rounds.
  options.in_steps = target.backend != "reference" && random.chance(0.5);
  const RunResult again = run_moe(shared, c, options);
  if (again.forward_plan.bytes > *options.forward_limit ||
      again.backward_plan.bytes > *options.backward_limit) {
    finding.problems.emplace_back("a plan exceeds workspace_limit");
  }
  const std::string difference = bitwise_difference(run, again);
  if (!difference.empty()) {
    finding.problems.push_back("with one thread, the least workspace and a shared device: " +
                               difference);
  }
  finding.problems.insert(finding.problems.end(), again.violations.begin(), again.violations.end());
}

LayerCase random_layer(const Target& target, Random& random) {
  LayerCase c;
  MoECase experts = random_case(Form::kTopK, random);
  experts.num_tokens = random.integer(1, 64);
  experts.drop_probability = 0.0;
  experts.load = Load::kUniform;
  experts.first_expert = 0;
  c.max_rows = std::exchange(experts.max_rows, std::nullopt);
  experts.zero_absent_tokens = true;
  experts.x_strides = experts.w1_strides = experts.w2_strides = Strides::kContiguous;
  c.experts = fitted(target, experts);
  c.router.scoring = random.pick(all_scorings());
  if (c.router.scoring != Scoring::kTopKSoftmax) c.router.renormalize = random.chance(0.5);
  c.router.scale = random.pick<float>({1.0f, 2.5f});
  c.router_dtype = random.chance(0.5) ? c.experts.dtype : DType::kFloat32;
  c.router_bias = random.chance(0.3);
  c.auxiliary = random.chance(0.5);
  if (random.chance(0.5)) {
    c.rounding.emplace();
    c.rounding->tile = random.integer(1, std::min<std::int64_t>(experts.num_tokens, 16));
    c.rounding->policy = random.pick(all_rounding_policies());
    c.rounding->seed = random.bits();
  }
  return c;
}

}  // namespace

void check_moe(const Target& target, std::uint64_t seed, Finding& finding) {
  check_form(Form::kTopK, target, seed, finding);
}
void check_moe_sorted(const Target& target, std::uint64_t seed, Finding& finding) {
  check_form(Form::kSorted, target, seed, finding);
}
void check_moe_pairs(const Target& target, std::uint64_t seed, Finding& finding) {
  check_form(Form::kPairs, target, seed, finding);
}

void check_moe_layer(const Target& target, std::uint64_t seed, Finding& finding) {
  Random random(seed);
  const LayerCase c = random_layer(target, random);
  finding.description = c.describe();
  LayerRun run(target, c);
  run.forward();
  random.chance(0.5) ? run.backward_in_steps() : run.backward();
  finding.problems = check_layer(run, Strictness::kTiny);
}

}  // namespace sonicmoe::rig
