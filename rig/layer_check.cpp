#include <algorithm>
#include <cmath>

#include "oracle/rounding.hpp"
#include "oracle/router.hpp"
#include "rig/layer_run.hpp"
#include "rig/moe_run.hpp"
#include "rig/naive.hpp"

namespace sonicmoe::rig {
namespace {

// What the oracle reads, in host memory.
struct HostLayer {
  MoEInputs inputs;
  Tensor router_weight, router_bias, topk_ids, token_ids, expert_ids, routing_weights;

  explicit HostLayer(const LayerRun& run)
      : inputs(host_target(), run.c.experts),
        router_weight(run.router_weight.to(host_target())),
        router_bias(run.router_bias.to(host_target())),
        topk_ids(run.topk_ids.to(host_target())),
        token_ids(run.token_ids.to(host_target())),
        expert_ids(run.expert_ids.to(host_target())),
        routing_weights(run.routing_weights.to(host_target())) {}

  oracle::Problem problem(const LayerRun& run) const {
    Routing routing = TopKRouting{topk_ids.view(), routing_weights.view()};
    if (run.c.rounding) {
      routing = PairRouting{token_ids.view(), expert_ids.view(), routing_weights.view()};
    }
    return {run.options.experts, inputs.x.view(), inputs.weights(), routing};
  }
};

Values plus(Values a, const Values& b) {
  for (std::size_t i = 0; i < a.size(); ++i) a[i] += b[i];
  return a;
}

Values stored(DType dtype, Values values) {
  for (double& value : values) value = oracle::rounded_to(dtype, value);
  return values;
}

class LayerCheck {
 public:
  LayerCheck(const LayerRun& run, Strictness strictness)
      : run_(run),
        strictness_(strictness),
        host_(run),
        problem_(host_.problem(run)),
        rows_(oracle::rows_of(problem_)),
        logits_(run.logits.values()),
        problems_(run.violations()) {
    const std::size_t all =
        oracle::sorted_rows(problem_.routing, run.c.experts.num_tokens, run.c.experts.num_experts)
            .size();
    if (run.rows_dropped.values()[0] != static_cast<double>(all - rows_.size())) {
      add("rows_dropped", "not the number of rows beyond max_rows");
    }
  }

  std::vector<std::string> operator()() {
    check_logits();
    check_choice();
    if (!problems_.empty()) return problems_;  // the rest would be a consequence
    check_weights();
    check_experts();
    return problems_;
  }

 private:
  void check_logits();
  void check_choice();
  void check_weights();
  void check_experts();
  void check_router_gradients(const Values& exact, const Values& naive, double magnitude);
  Values grad_logits(const Values& grad_weights) const;

  void add(const char* name, const std::string& what) {
    if (!what.empty()) problems_.push_back(std::string(name) + ": " + what);
  }
  // `magnitude`: of the sums behind an element, for shapes of a few elements.
  void compare_with(const char* name, const Tensor& actual, const Values& reference,
                    const Values& naive, double magnitude) {
    if (!actual.defined()) return;
    if (strictness_ == Strictness::kRealistic && max_abs(reference) == 0.0) {
      add(name, "the reference is all zeros, the case tests nothing");
    }
    const double floor = relative_floor(dtype());
    check_tensor(name, actual.values(), reference, naive,
                 strictness_ == Strictness::kRealistic
                     ? 2 * floor * max_abs(reference)
                     : 2 * floor * std::max(magnitude, max_abs(reference)),
                 strictness_, problems_);
  }
  DType dtype() const { return run_.c.experts.dtype; }
  std::int64_t num_experts() const { return run_.c.experts.num_experts; }

  const LayerRun& run_;
  Strictness strictness_;
  HostLayer host_;
  oracle::Problem problem_;
  std::vector<oracle::Row> rows_;
  Values logits_;
  std::vector<std::string> problems_;
};

// Sums of d products in float32, whatever the dtype of x.
void LayerCheck::check_logits() {
  const Values reference =
      oracle::router_logits(problem_.x, host_.router_weight.view(), host_.router_bias.view());
  const double error = max_error(logits_, reference);
  if (!(error <= 2e-6 * max_abs(reference) + 1e-6)) {
    add("logits", "error " + std::to_string(error) + " beside max|reference| " +
                      std::to_string(max_abs(reference)));
  }
}

// From the logits that the layer wrote, bit for bit.
void LayerCheck::check_choice() {
  const RouterOptions& options = run_.options.router;
  const Ids ids = oracle::token_choice(options, logits_, num_experts());
  add("topk_ids", bitwise_difference(run_.topk_ids.values(), Values(ids.begin(), ids.end())));
  Ids counts(static_cast<std::size_t>(num_experts()), 0);
  if (run_.c.rounding) {
    const oracle::RoundedRows rounded = oracle::round_rows(
        *run_.c.rounding, oracle::ranking_matrix(options, logits_, num_experts()), ids,
        run_.c.experts.num_tokens);
    const auto padded = [&](const Ids& list) {
      Values values(list.begin(), list.end());
      values.resize(static_cast<std::size_t>(run_.shape.num_pairs), -1.0);
      return values;
    };
    add("token_ids", bitwise_difference(run_.token_ids.values(), padded(rounded.token_ids)));
    add("expert_ids", bitwise_difference(run_.expert_ids.values(), padded(rounded.expert_ids)));
    counts = rounded.rows_per_expert;
  } else {
    for (const std::int64_t id : ids) ++counts[static_cast<std::size_t>(id)];
  }
  add("rows_per_expert",
      bitwise_difference(run_.rows_per_expert.values(), Values(counts.begin(), counts.end())));
}

void LayerCheck::check_weights() {
  const Values expected = oracle::weight_matrix(run_.options.router, logits_, num_experts(),
                                                oracle::to_ids(host_.topk_ids.view()));
  const Values actual = run_.routing_weights.values();
  for (const oracle::Row& row : rows_) {
    const double weight =
        expected[static_cast<std::size_t>(row.token * num_experts() + row.expert)];
    if (std::abs(actual[static_cast<std::size_t>(row.position)] - weight) <= 1e-6 * weight)
      continue;
    return add("routing_weights", "wrong at " + std::to_string(row.position));
  }
}

// d(sum of the rows' dS * weight) / dlogits, and what an auxiliary loss adds.
Values LayerCheck::grad_logits(const Values& grad_weights) const {
  Values matrix(logits_.size(), 0.0);
  for (const oracle::Row& row : rows_) {
    matrix[static_cast<std::size_t>(row.token * num_experts() + row.expert)] +=
        grad_weights[static_cast<std::size_t>(row.position)];
  }
  const Values gradient = oracle::weight_matrix_gradient(
      run_.options.router, logits_, num_experts(), oracle::to_ids(host_.topk_ids.view()), matrix);
  return run_.c.auxiliary ? plus(gradient, run_.grad_logits.values()) : gradient;
}

void LayerCheck::check_router_gradients(const Values& exact, const Values& naive,
                                        double magnitude) {
  const auto reference = oracle::router_gradients(exact, num_experts(), problem_.x);
  const auto rounded = oracle::router_gradients(naive, num_experts(), problem_.x);
  const double T = static_cast<double>(run_.c.experts.num_tokens);
  const double x = max_abs(oracle::to_double(problem_.x));
  compare_with("grad_router_weight", run_.grad_router_weight, reference.weight, rounded.weight,
               magnitude * x * T);
  if (!run_.c.router_bias) return;
  // Softmax gradients of a token cancel in the sum over the tokens: the terms are the scale.
  const double scale =
      strictness_ == Strictness::kRealistic ? max_abs(exact) : std::max(magnitude, max_abs(exact));
  check_tensor("grad_router_bias", run_.grad_router_bias.values(), reference.bias, rounded.bias,
               relative_floor(dtype()) * scale * std::sqrt(T), Strictness::kTiny, problems_);
}

void LayerCheck::check_experts() {
  Values h = run_.h.values();
  h.resize(rows_.size() * static_cast<std::size_t>(run_.shape.h_columns()));
  const ConstTensorView grad_out = host_.inputs.grad_out.view();
  const Magnitudes magnitude = magnitudes(problem_, rows_, h, grad_out);
  compare_with("out", run_.out, oracle::forward(problem_).out, naive_forward(problem_).out,
               magnitude.out);
  const auto exact = oracle::backward(problem_, rows_, h, grad_out);
  const auto naive = naive_backward(problem_, rows_, h, grad_out, dtype());
  compare_with("grad_w1", run_.grad_w1, exact.grad_w1, naive.grad_w1, magnitude.grad_w1);
  compare_with("grad_b1", run_.grad_b1, exact.grad_b1, naive.grad_b1, magnitude.grad_b1);
  compare_with("grad_w2", run_.grad_w2, exact.grad_w2, naive.grad_w2, magnitude.grad_w2);
  compare_with("grad_b2", run_.grad_b2, exact.grad_b2, naive.grad_b2, magnitude.grad_b2);

  const Values exact_logits = grad_logits(exact.grad_routing_weights);
  const Values naive_logits = grad_logits(naive.grad_routing_weights);
  const double scale = static_cast<double>(run_.options.router.scale);
  const double logit_magnitude = 2 * scale * magnitude.grad_routing_weights;
  check_router_gradients(exact_logits, naive_logits, logit_magnitude);
  const ConstTensorView weight = host_.router_weight.view();
  const double largest_weight = max_abs(oracle::to_double(weight));
  compare_with(
      "grad_x", run_.grad_x, plus(exact.grad_x, oracle::router_grad_x(exact_logits, weight)),
      stored(dtype(), plus(naive.grad_x, oracle::router_grad_x(naive_logits, weight))),
      magnitude.grad_x + logit_magnitude * largest_weight * static_cast<double>(num_experts()));
}

}  // namespace

std::vector<std::string> check_layer(const LayerRun& run, Strictness strictness) {
  return LayerCheck(run, strictness)();
}

}  // namespace sonicmoe::rig
