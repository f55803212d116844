#include "rig/router_run.hpp"

#include <deque>
#include <limits>
#include <utility>

#include "oracle/balancing.hpp"
#include "oracle/rounding.hpp"
#include "oracle/router.hpp"
#include "rig/compare.hpp"
#include "rig/moe_run.hpp"

namespace sonicmoe::rig {
namespace {

// The tensors of a call.
class Operands {
 public:
  explicit Operands(const Target& target) : target_(target) {}

  const Tensor& floats(std::vector<std::int64_t> shape, const Values& values) {
    inputs_.emplace_back(target_, DType::kFloat32, std::move(shape)).fill(values);
    return inputs_.back();
  }
  const Tensor& ids(DType dtype, std::vector<std::int64_t> shape, const Values& values) {
    inputs_.emplace_back(target_, dtype, std::move(shape))
        .fill_ids(Ids(values.begin(), values.end()));
    return inputs_.back();
  }
  const Tensor& output(DType dtype, std::vector<std::int64_t> shape) {
    return outputs_.emplace_back(target_, dtype, std::move(shape));
  }
  const Tensor& scratch(std::size_t bytes) {
    return output(DType::kUInt8, {static_cast<std::int64_t>(bytes)});
  }
  RouterOptions options(const RouterProblem& problem) {
    RouterOptions result = problem.options;
    if (!problem.bias.empty()) {
      result.selection_bias = floats({problem.num_experts}, problem.bias).view();
    }
    return result;
  }
  std::vector<std::string> violations() const {
    std::vector<std::string> result;
    const auto add = [&](const Tensor& tensor, const std::string& what) {
      if (!what.empty()) result.push_back(tensor.view().describe() + ": " + what);
    };
    for (const Tensor& tensor : inputs_) add(tensor, tensor.violation_as_input());
    for (const Tensor& tensor : outputs_) add(tensor, tensor.violation_as_output());
    return result;
  }

 private:
  const Target& target_;
  std::deque<Tensor> inputs_, outputs_;
};

// The problem's options with its bias on the host, for the oracle.
struct HostOptions {
  std::vector<float> bias;
  RouterOptions options;

  explicit HostOptions(const RouterProblem& problem)
      : bias(problem.bias.begin(), problem.bias.end()), options(problem.options) {
    if (bias.empty()) return;
    options.selection_bias = ConstTensorView(bias.data(), DType::kFloat32, {problem.num_experts});
  }
};

Values to_values(const Ids& ids) { return Values(ids.begin(), ids.end()); }

Values padded(const Ids& ids, std::int64_t length) {
  Values values = to_values(ids);
  values.resize(static_cast<std::size_t>(length), -1.0);
  return values;
}

Values scaled(Values values, double factor) {
  for (double& value : values) value *= factor;
  return values;
}

// Elements of a [T, E] matrix at pairs, and its inverse, which adds them up.
Values gather(const Values& matrix, std::int64_t num_experts, const Ids& tokens,
              const Ids& experts) {
  Values result;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    result.push_back(matrix[static_cast<std::size_t>(tokens[i] * num_experts + experts[i])]);
  }
  return result;
}
Values scatter(const Values& values, const RouterProblem& problem, const Ids& tokens,
               const Ids& experts) {
  Values matrix(problem.logits.size(), 0.0);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    matrix[static_cast<std::size_t>(tokens[i] * problem.num_experts + experts[i])] += values[i];
  }
  return matrix;
}

std::string difference_of_floats(const Values& actual, const Values& expected, double tolerance) {
  constexpr double kVanishing = 1e-7;
  const double largest = max_abs(expected);
  const double limit = largest > kVanishing ? tolerance * largest : 10 * kVanishing;
  const double error = max_error(actual, expected);
  if (error <= limit) return {};
  return "error " + std::to_string(error) + " > " + std::to_string(limit) + ", max|expected| " +
         std::to_string(largest);
}

}  // namespace

std::string RouterProblem::describe() const {
  return "T=" + std::to_string(num_tokens) + " E=" + std::to_string(num_experts) +
         " K=" + std::to_string(options.top_k) + " " + std::string(name_of(options.scoring)) +
         (options.renormalizes() ? " renormalize" : "") +
         (options.num_groups > 1 ? " groups=" + std::to_string(options.top_groups) + "/" +
                                       std::to_string(options.num_groups)
                                 : "") +
         (bias.empty() ? "" : " bias");
}

std::vector<std::string> differences(const RouterResult& actual, const RouterResult& expected,
                                     double tolerance) {
  std::vector<std::string> problems = actual.violations;
  const auto note = [&](const char* name, const std::string& what) {
    if (!what.empty()) problems.push_back(std::string(name) + ": " + what);
  };
  using Member = Values RouterResult::*;
  const std::pair<const char*, Member> exact[] = {
      {"topk_ids", &RouterResult::topk_ids},
      {"token_ids", &RouterResult::token_ids},
      {"expert_ids", &RouterResult::expert_ids},
      {"rows_per_expert", &RouterResult::rows_per_expert},
      {"rows_per_expert_before", &RouterResult::rows_per_expert_before}};
  for (const auto& [name, member] : exact) {
    note(name, bitwise_difference(actual.*member, expected.*member));
  }
  const std::pair<const char*, Member> floats[] = {{"weights", &RouterResult::weights},
                                                   {"grad_logits", &RouterResult::grad_logits},
                                                   {"loss", &RouterResult::loss}};
  for (const auto& [name, member] : floats) {
    note(name, difference_of_floats(actual.*member, expected.*member, tolerance));
  }
  return problems;
}

// ---------------------------------------------------------------------------------------- routing

RouterResult run_route(const Target& target, const RouterProblem& problem,
                       const Values& grad_weights, DType id_dtype, int threads) {
  const std::int64_t T = problem.num_tokens, E = problem.num_experts, K = problem.options.top_k;
  Operands operands(target);
  const RouterOptions options = operands.options(problem);
  const Tensor& logits = operands.floats({T, E}, problem.logits);
  const Tensor& ids = operands.output(id_dtype, {T, K});
  const Tensor& weights = operands.output(DType::kFloat32, {T, K});
  const Tensor& rows = operands.output(DType::kInt32, {E});
  const Context context = target.context(threads);
  route_forward(context, {options, logits.view(), ids.view(), weights.view(), rows.view()});
  const Tensor& grad = operands.floats({T, K}, grad_weights);
  const Tensor& grad_logits = operands.output(DType::kFloat32, {T, E});
  route_backward(context, {options, logits.view(), ids.view(), grad.view(), grad_logits.view()});
  RouterResult result;
  result.topk_ids = ids.values();
  result.weights = weights.values();
  result.rows_per_expert = rows.values();
  result.grad_logits = grad_logits.values();
  result.violations = operands.violations();
  return result;
}

RouterResult expected_route(const RouterProblem& problem, const Values& grad_weights) {
  const std::int64_t E = problem.num_experts;
  const HostOptions host(problem);
  const Ids ids = oracle::token_choice(host.options, problem.logits, E);
  Ids tokens;
  for (std::size_t p = 0; p < ids.size(); ++p) {
    tokens.push_back(static_cast<std::int64_t>(p) / host.options.top_k);
  }
  RouterResult result;
  result.topk_ids = to_values(ids);
  result.rows_per_expert.assign(static_cast<std::size_t>(E), 0.0);
  for (const std::int64_t id : ids) result.rows_per_expert[static_cast<std::size_t>(id)] += 1;
  result.weights =
      gather(oracle::weight_matrix(host.options, problem.logits, E, ids), E, tokens, ids);
  result.grad_logits = oracle::weight_matrix_gradient(host.options, problem.logits, E, ids,
                                                      scatter(grad_weights, problem, tokens, ids));
  return result;
}

// --------------------------------------------------------------------------------- token rounding

RouterResult run_round_tokens(const Target& target, const RouterProblem& problem,
                              const RoundingOptions& rounding, const Values& grad_weights,
                              int threads) {
  const std::int64_t T = problem.num_tokens, E = problem.num_experts, K = problem.options.top_k;
  const std::int64_t P = rounded_capacity(T, E, K, rounding);
  const Context context = target.context(threads);
  Operands operands(target);
  RoundTokensForwardArgs args;
  args.options = operands.options(problem);
  args.rounding = rounding;
  args.logits = operands.floats({T, E}, problem.logits).view();
  const Tensor& tokens = operands.output(DType::kInt32, {P});
  const Tensor& experts = operands.output(DType::kInt32, {P});
  const Tensor& weights = operands.output(DType::kFloat32, {P});
  const Tensor& ids = operands.output(DType::kInt32, {T, K});
  const Tensor& after = operands.output(DType::kInt32, {E});
  const Tensor& before = operands.output(DType::kInt32, {E});
  args.token_ids = tokens.view();
  args.expert_ids = experts.view();
  args.pair_weights = weights.view();
  args.topk_ids = ids.view();
  args.rows_per_expert = after.view();
  args.rows_per_expert_before = before.view();
  args.workspace = operands.scratch(round_tokens_workspace_bytes(context, T, E, K)).view();
  round_tokens_forward(context, args);

  RouterResult result;
  result.token_ids = tokens.values();
  Values read = grad_weights;
  for (std::size_t p = 0; p < read.size(); ++p) {
    if (result.token_ids[p] < 0) read[p] = std::numeric_limits<double>::quiet_NaN();
  }
  const Tensor& grad = operands.floats({P}, read);
  const Tensor& grad_logits = operands.output(DType::kFloat32, {T, E});
  round_tokens_backward(context, {args.options, args.logits, ids.view(), tokens.view(),
                                  experts.view(), grad.view(), grad_logits.view()});
  result.expert_ids = experts.values();
  result.topk_ids = ids.values();
  result.rows_per_expert = after.values();
  result.rows_per_expert_before = before.values();
  result.weights = weights.values();
  result.grad_logits = grad_logits.values();
  result.violations = operands.violations();
  return result;
}

RouterResult expected_round_tokens(const RouterProblem& problem, const RoundingOptions& rounding,
                                   const Values& grad_weights) {
  const std::int64_t T = problem.num_tokens, E = problem.num_experts;
  const HostOptions host(problem);
  const std::int64_t P = rounded_capacity(T, E, host.options.top_k, rounding);
  const Ids ids = oracle::token_choice(host.options, problem.logits, E);
  const oracle::RoundedRows rows =
      oracle::round_rows(rounding, oracle::ranking_matrix(host.options, problem.logits, E), ids, T);
  RouterResult result;
  result.topk_ids = to_values(ids);
  result.token_ids = padded(rows.token_ids, P);
  result.expert_ids = padded(rows.expert_ids, P);
  result.rows_per_expert = to_values(rows.rows_per_expert);
  result.rows_per_expert_before = to_values(rows.rows_per_expert_before);
  result.weights = gather(oracle::weight_matrix(host.options, problem.logits, E, ids), E,
                          rows.token_ids, rows.expert_ids);
  result.weights.resize(static_cast<std::size_t>(P), 0.0);
  result.grad_logits = oracle::weight_matrix_gradient(
      host.options, problem.logits, E, ids,
      scatter(grad_weights, problem, rows.token_ids, rows.expert_ids));
  return result;
}

RouterResult run_round_select(const Target& target, const Choice& choice,
                              const RoundingOptions& rounding, int threads,
                              std::optional<std::int64_t> seed_tensor) {
  const std::int64_t T = choice.num_tokens, E = choice.num_experts, K = choice.top_k;
  const std::int64_t P = rounded_capacity(T, E, K, rounding);
  const Context context = target.context(threads);
  Operands operands(target);
  RoundSelectArgs args;
  args.rounding = rounding;
  if (seed_tensor) {
    args.rounding.seed_tensor =
        operands.ids(DType::kInt64, {1}, {static_cast<double>(*seed_tensor)}).view();
  }
  args.scores = operands.floats({T, E}, choice.scores).view();
  args.topk_ids = operands.ids(DType::kInt32, {T, K}, choice.ids).view();
  const Tensor& tokens = operands.output(DType::kInt32, {P});
  const Tensor& experts = operands.output(DType::kInt32, {P});
  const Tensor& after = operands.output(DType::kInt32, {E});
  const Tensor& before = operands.output(DType::kInt32, {E});
  args.token_ids = tokens.view();
  args.expert_ids = experts.view();
  args.rows_per_expert = after.view();
  args.rows_per_expert_before = before.view();
  args.workspace = operands.scratch(round_tokens_workspace_bytes(context, T, E, K)).view();
  round_select(context, args);
  RouterResult result;
  result.token_ids = tokens.values();
  result.expert_ids = experts.values();
  result.rows_per_expert = after.values();
  result.rows_per_expert_before = before.values();
  result.violations = operands.violations();
  return result;
}

RouterResult expected_round_select(const Choice& choice, const RoundingOptions& rounding) {
  const std::int64_t P =
      rounded_capacity(choice.num_tokens, choice.num_experts, choice.top_k, rounding);
  const oracle::RoundedRows rows =
      oracle::round_rows(rounding, {choice.scores.begin(), choice.scores.end()},
                         Ids(choice.ids.begin(), choice.ids.end()), choice.num_tokens);
  RouterResult result;
  result.token_ids = padded(rows.token_ids, P);
  result.expert_ids = padded(rows.expert_ids, P);
  result.rows_per_expert = to_values(rows.rows_per_expert);
  result.rows_per_expert_before = to_values(rows.rows_per_expert_before);
  return result;
}

// -------------------------------------------------------------------------------------- balancing

RouterResult run_load_balancing_loss(const Target& target, const RouterProblem& problem,
                                     const Values& rows, double grad_loss, int threads) {
  const std::int64_t T = problem.num_tokens, E = problem.num_experts, K = problem.options.top_k;
  const Context context = target.context(threads);
  Operands operands(target);
  const Tensor& logits = operands.floats({T, E}, problem.logits);
  const Tensor& counts = operands.ids(DType::kInt32, {E}, rows);
  const Tensor& grad = operands.floats({1}, {grad_loss});
  const Tensor& loss = operands.output(DType::kFloat32, {1});
  const Tensor& grad_logits = operands.output(DType::kFloat32, {T, E});
  load_balancing_loss_forward(context, problem.options.scoring, K, logits.view(), counts.view(),
                              loss.view());
  load_balancing_loss_backward(context, problem.options.scoring, K, logits.view(), counts.view(),
                               grad.view(), grad_logits.view());
  RouterResult result;
  result.loss = loss.values();
  result.grad_logits = grad_logits.values();
  result.violations = operands.violations();
  return result;
}

RouterResult expected_load_balancing_loss(const RouterProblem& problem, const Values& rows,
                                          double grad_loss) {
  const oracle::Balance balance{problem.options.scoring, problem.options.top_k,
                                Ids(rows.begin(), rows.end())};
  RouterResult result;
  result.loss = {oracle::load_balancing_loss(balance, problem.logits)};
  result.grad_logits =
      scaled(oracle::load_balancing_loss_gradient(balance, problem.logits), grad_loss);
  return result;
}

RouterResult run_router_z_loss(const Target& target, const RouterProblem& problem, double grad_loss,
                               int threads) {
  const std::int64_t T = problem.num_tokens, E = problem.num_experts;
  const Context context = target.context(threads);
  Operands operands(target);
  const Tensor& logits = operands.floats({T, E}, problem.logits);
  const Tensor& grad = operands.floats({1}, {grad_loss});
  const Tensor& loss = operands.output(DType::kFloat32, {1});
  const Tensor& grad_logits = operands.output(DType::kFloat32, {T, E});
  router_z_loss_forward(context, logits.view(), loss.view());
  router_z_loss_backward(context, logits.view(), grad.view(), grad_logits.view());
  RouterResult result;
  result.loss = loss.values();
  result.grad_logits = grad_logits.values();
  result.violations = operands.violations();
  return result;
}

RouterResult expected_router_z_loss(const RouterProblem& problem, double grad_loss) {
  RouterResult result;
  result.loss = {oracle::router_z_loss(problem.logits, problem.num_experts)};
  result.grad_logits =
      scaled(oracle::router_z_loss_gradient(problem.logits, problem.num_experts), grad_loss);
  return result;
}

Values run_update_expert_bias(const Target& target, const Values& bias, const Values& rows,
                              float rate) {
  const auto E = static_cast<std::int64_t>(bias.size());
  Operands operands(target);
  const Tensor& counts = operands.ids(DType::kInt32, {E}, rows);
  Tensor updated(target, DType::kFloat32, {E});
  updated.fill(bias);
  update_expert_bias(target.context(), updated.view(), counts.view(), rate);
  return updated.violation_as_output().empty() ? updated.values() : Values();
}

}  // namespace sonicmoe::rig
