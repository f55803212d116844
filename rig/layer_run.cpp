#include "rig/layer_run.hpp"

#include <cmath>
#include <utility>

#include "rig/backward_steps.hpp"
#include "rig/random.hpp"

namespace sonicmoe::rig {
namespace {

Values normal(Random& random, std::int64_t count, double scale) {
  Values values(static_cast<std::size_t>(count));
  for (double& value : values) value = scale * random.normal();
  return values;
}

MoELayerOptions options_of(const LayerCase& c) {
  MoELayerOptions options{c.experts.options(), c.router, c.rounding};
  options.router.top_k = c.experts.top_k;
  options.experts.max_rows = c.max_rows;
  return options;
}

}  // namespace

std::string LayerCase::describe() const {
  return "layer " + experts.describe() + " " + std::string(name_of(router.scoring)) +
         (max_rows ? " max_rows=" + std::to_string(*max_rows) : "") +
         (router_bias ? " router bias" : "") + (auxiliary ? " auxiliary" : "") +
         (rounding ? " " + std::string(name_of(rounding->policy)) +
                         " tile=" + std::to_string(rounding->tile)
                   : "");
}

LayerRun::LayerRun(const Target& target_, const LayerCase& layer_case,
                   std::optional<std::size_t> forward_limit,
                   std::optional<std::size_t> backward_limit)
    : target(target_),
      c(layer_case),
      options(options_of(c)),
      inputs(target, c.experts),
      shape(moe_layer_shape(options, inputs.x.view(), inputs.weights())),
      forward_limit_(forward_limit),
      backward_limit_(backward_limit) {
  const MoECase& e = c.experts;
  const std::int64_t T = e.num_tokens, d = e.hidden_size, E = e.num_experts, K = e.top_k;
  const std::int64_t n = e.intermediate_size, columns = shape.h_columns();
  const auto make = [&](DType dtype, std::vector<std::int64_t> extents) {
    return Tensor(target, dtype, std::move(extents));
  };
  const bool large = e.values == Numbers::kLarge;
  Random random(e.seed + 1);
  router_weight = make(c.router_dtype, {E, d});
  const double scale = 1.0 / std::sqrt(static_cast<double>(d));
  large ? router_weight.fill_random(random, scale)
        : router_weight.fill(normal(random, E * d, scale));
  if (c.router_bias) {
    router_bias = make(c.router_dtype, {E});
    router_bias.fill(normal(random, E, 0.5));
    grad_router_bias = make(c.router_gradient_dtype, {E});
  }
  if (c.auxiliary) {
    grad_logits = make(DType::kFloat32, {T, E});
    grad_logits.fill(normal(random, T * E, 0.05));
  }
  out = make(e.dtype, {T, d});
  logits = make(DType::kFloat32, {T, E});
  rows_per_expert = make(DType::kInt32, {E});
  topk_ids = make(DType::kInt32, {T, K});
  if (c.rounding) {
    token_ids = make(DType::kInt32, {shape.num_pairs});
    expert_ids = make(DType::kInt32, {shape.num_pairs});
    routing_weights = make(DType::kFloat32, {shape.num_pairs});
  } else {
    routing_weights = make(DType::kFloat32, {T, K});
  }
  rows_dropped = make(DType::kInt32, {1});
  h = make(e.dtype, {shape.row_capacity(), columns});
  metadata = GuardedBuffer(target, moe_metadata_bytes(shape));
  grad_x = make(e.dtype, {T, d});
  grad_router_weight = make(c.router_gradient_dtype, {E, d});
  grad_w1 = make(e.dtype, {E, columns, d});
  grad_w2 = make(e.dtype, {E, d, n});
  if (e.biases) {
    grad_b1 = make(e.dtype, {E, columns});
    grad_b2 = make(e.dtype, {E, d});
  }
  const Context context = target.context();
  forward_plan = moe_layer_forward_workspace(context, options, shape, false, forward_limit_);
  backward_plan = moe_layer_backward_workspace(context, options, shape, backward_limit_);
  forward_workspace = GuardedBuffer(target, forward_plan.bytes);
  backward_workspace = GuardedBuffer(target, backward_plan.bytes);
}

MoELayerSaved LayerRun::saved() const {
  return {topk_ids.view(),        token_ids.view(), expert_ids.view(),
          routing_weights.view(), h.view(),         metadata.view()};
}

Routing LayerRun::routing() const {
  if (c.rounding) return PairRouting{token_ids.view(), expert_ids.view(), routing_weights.view()};
  return TopKRouting{topk_ids.view(), routing_weights.view()};
}

void LayerRun::forward() {
  MoELayerForwardArgs args;
  args.options = options;
  args.x = inputs.x.view();
  args.router_weight = router_weight.view();
  args.router_bias = router_bias.view();
  args.weights = inputs.weights();
  args.out = out.view();
  args.logits = logits.view();
  args.rows_per_expert = rows_per_expert.view();
  args.rows_dropped = rows_dropped.view();
  args.saved = saved();
  args.workspace = forward_workspace.view();
  args.workspace_limit = forward_limit_;
  moe_layer_forward(target.context(), args);
}

MoELayerBackwardArgs LayerRun::backward_args() const {
  MoELayerBackwardArgs args;
  args.options = options;
  args.grad_out = inputs.grad_out.view();
  args.grad_logits = grad_logits.view();
  args.x = inputs.x.view();
  args.router_weight = router_weight.view();
  args.weights = inputs.weights();
  args.logits = logits.view();
  args.saved = saved();
  args.grad_x = grad_x.view();
  args.grad_router_weight = grad_router_weight.view();
  args.grad_router_bias = grad_router_bias.view();
  args.grad_w1 = grad_w1.view();
  args.grad_b1 = grad_b1.view();
  args.grad_w2 = grad_w2.view();
  args.grad_b2 = grad_b2.view();
  args.workspace_limit = backward_limit_;
  return args;
}

void LayerRun::backward() {
  MoELayerBackwardArgs args = backward_args();
  args.workspace = backward_workspace.view();
  moe_layer_backward(target.context(), args);
}

void LayerRun::backward_in_steps() {
  const MoECase& e = c.experts;
  const Context context = target.context();
  const auto extents = routing_weights.view().shape();
  const Tensor grad_h(target, e.dtype, {shape.row_capacity(), shape.h_columns()});
  const Tensor scaled_a(target, e.dtype, {shape.row_capacity(), shape.intermediate_size});
  const Tensor ds(target, DType::kFloat32, {extents.begin(), extents.end()});
  const GuardedBuffer row_lists(target, moe_row_lists_bytes(context, shape));
  MoELayerBackwardArgs all = backward_args();
  all.grad_h = grad_h.view();
  all.scaled_a = scaled_a.view();
  all.grad_routing_weights = ds.view();
  if (row_lists.size() > 0) all.row_lists = row_lists.view();
  for (const BackwardStep step : kBackwardSteps) {
    const GuardedBuffer workspace(
        target, moe_layer_backward_workspace(context, options, shape, backward_limit_, step).bytes);
    MoELayerBackwardArgs args = of_step(all, step);
    args.workspace = workspace.view();
    moe_layer_backward(context, args);
    if (!workspace.guards_intact())
      step_violations_.emplace_back("a step wrote outside its scratch");
  }
  for (const Tensor* tensor : {&grad_h, &scaled_a, &ds}) {
    const std::string violation = tensor->violation_as_output();
    if (!violation.empty()) step_violations_.emplace_back("a step: " + violation);
  }
  if (!row_lists.guards_intact()) step_violations_.emplace_back("a step wrote outside row_lists");
}

Tensor LayerRun::grad_routing_weights() const {
  const auto extents = routing_weights.view().shape();
  Tensor result(target, DType::kFloat32, {extents.begin(), extents.end()});
  const GuardedBuffer workspace(target, moe_backward_workspace(target.context(), shape).bytes);
  MoEBackwardArgs args;
  args.options = options.experts;
  args.grad_out = inputs.grad_out.view();
  args.x = inputs.x.view();
  args.weights = inputs.weights();
  args.routing = routing();
  args.h = h.view();
  args.metadata = metadata.view();
  args.grad_routing_weights = result.view();
  args.workspace = workspace.view();
  moe_backward(target.context(), args);
  return result;
}

std::vector<std::string> LayerRun::violations() const {
  std::vector<std::string> result = inputs.violations();
  result.insert(result.end(), step_violations_.begin(), step_violations_.end());
  const auto note = [&](const char* name, const std::string& what) {
    if (!what.empty()) result.push_back(std::string(name) + ": " + what);
  };
  for (const Tensor* input : {&router_weight, &router_bias, &grad_logits}) {
    note("an input of the router", input->violation_as_input());
  }
  for (const Tensor* output : {&out, &logits, &rows_per_expert, &rows_dropped, &topk_ids,
                               &token_ids, &expert_ids, &routing_weights, &h}) {
    note("an output of forward", output->violation_as_output());
  }
  for (const Tensor* output :
       {&grad_x, &grad_router_weight, &grad_router_bias, &grad_w1, &grad_b1, &grad_w2, &grad_b2}) {
    note("an output of backward", output->violation_as_output());
  }
  for (const GuardedBuffer* buffer : {&metadata, &forward_workspace, &backward_workspace}) {
    note("a buffer", buffer->guards_intact() ? "" : "wrote outside");
  }
  return result;
}

}  // namespace sonicmoe::rig
