// moe_forward and moe_backward in the three routing forms against the float64 reference.
#include <algorithm>

#include "cli/check.hpp"
#include "cli/experts.hpp"

namespace sonicmoe::cli {
namespace {

using Form = MoEShape::Form;

ExpertsConfig random_config(Form form, Device device, Random& random) {
  ExpertsConfig config;
  config.form = form;
  config.num_tokens = random.chance(0.05) ? random.integer(0, 1) : random.integer(2, 96);
  config.hidden_size = random.integer(1, 96);
  config.intermediate_size = random.integer(1, 64);
  config.num_experts = random.integer(1, 16);
  config.top_k = random.integer(1, std::min<std::int64_t>(config.num_experts, 6));
  config.num_pairs = random.integer(0, 3 * config.num_tokens);
  const auto activations = all_activations();
  config.options.activation = activations[static_cast<std::size_t>(
      random.integer(0, static_cast<std::int64_t>(activations.size()) - 1))];
  config.options.gate_up_layout =
      random.chance(0.5) ? GateUpLayout::kConcatenated : GateUpLayout::kInterleaved;
  config.options.limit = random.chance(0.5) ? 7.0f : 0.75f;  // the second clamps a lot
  config.dtype = random.chance(0.5) ? DType::kFloat32 : DType::kBFloat16;
  if (config.dtype == DType::kBFloat16) {
    // A gradient of a few elements can be one sum that cancels, which bfloat16 cannot resolve.
    config.hidden_size = std::max<std::int64_t>(config.hidden_size, 8);
    config.intermediate_size = std::max<std::int64_t>(config.intermediate_size, 8);
  }
  config.index_dtype = random.chance(0.5) ? DType::kInt32 : DType::kInt64;
  config.weight_dtype = random.chance(0.7) ? DType::kFloat32 : DType::kBFloat16;
  config.biases = random.chance(0.4);
  config.transposed = random.chance(0.3);
  config.dropped_share = random.chance(0.4) ? 0.3 : 0.0;
  config.without_weights = random.chance(0.3);
  config.float32_gradients = random.chance(0.3);
  config.accumulate = random.chance(0.3);
  config.fit(device);
  return config;
}

// Nothing may depend on the thread count or on how the workspace is cut into slabs.
void compare_bits(Findings& findings, const Context& context, const ExpertsInputs& inputs,
                  const ExpertsRun& run) {
  const std::size_t limit =
      std::max(run.forward_plan().minimum_bytes, run.backward_plan().minimum_bytes);
  ExpertsRun again(context, inputs, limit);
  findings.require(again.forward_plan().bytes <= limit && again.backward_plan().bytes <= limit,
                   "workspace: a plan exceeds workspace_limit");
  Context single = context;
  single.num_threads = 1;
  again.forward(single);
  again.backward(single);
  findings.same_bits("out", run.out, again.out);
  findings.same_bits("grad_x", run.grad_x, again.grad_x);
  findings.same_bits("grad_w1", run.grad_w1, again.grad_w1);
  findings.same_bits("grad_b1", run.grad_b1, again.grad_b1);
  findings.same_bits("grad_w2", run.grad_w2, again.grad_w2);
  findings.same_bits("grad_b2", run.grad_b2, again.grad_b2);
  findings.same_bits("grad_routing_weights", run.grad_routing_weights, again.grad_routing_weights);
}

Findings check_form(Form form, const Context& context, Random& random) {
  const ExpertsInputs inputs(random_config(form, context.device, random), random);
  const ExpertsInputs placed = inputs.to(context.device);
  Findings findings;
  findings.description = inputs.config.to_string();
  const std::int64_t rows = inputs.num_rows();
  const auto columns = static_cast<std::size_t>(inputs.config.intermediate_size *
                                                gate_factor(inputs.config.options.activation));

  ExpertsRun run(context, placed);
  run.forward(context);
  const ExpertsInputs reference_inputs = inputs.to_float32();
  const Context reference = reference_context();
  ExpertsRun expected(reference, reference_inputs);
  expected.forward(reference);
  const Tolerance tolerance = Tolerance::of(inputs.config.dtype);
  // A handful of relu values may well be zero together.
  const bool may_vanish = rows * inputs.config.intermediate_size < 64;
  findings.compare("out", run.out, expected.out, tolerance, may_vanish);
  findings.compare("h", run.h, expected.h, tolerance, may_vanish,
                   static_cast<std::size_t>(rows) * columns);

  // Backward from the same H, so that an activation's kink cannot fall on either side.
  run.backward(context);
  expected.h.copy_from(run.h);
  expected.backward(reference);
  findings.compare("grad_x", run.grad_x, expected.grad_x, tolerance, may_vanish);
  findings.compare("grad_w1", run.grad_w1, expected.grad_w1, tolerance, may_vanish);
  findings.compare("grad_w2", run.grad_w2, expected.grad_w2, tolerance, may_vanish);
  if (inputs.config.biases) {
    findings.compare("grad_b1", run.grad_b1, expected.grad_b1, tolerance, may_vanish);
    findings.compare("grad_b2", run.grad_b2, expected.grad_b2, tolerance, may_vanish);
  }
  if (run.grad_routing_weights.defined()) {
    findings.compare("grad_routing_weights", run.grad_routing_weights,
                     expected.grad_routing_weights, tolerance, may_vanish);
  }
  for (const Tensor* scratch : {&run.forward_workspace, &run.backward_workspace, &run.metadata}) {
    findings.require(scratch->guards_intact(),
                     "workspace or metadata: wrote outside of the buffer");
  }
  compare_bits(findings, context, placed, run);
  return findings;
}

}  // namespace

Findings check_moe(const Context& context, Random& random) {
  return check_form(Form::kTopK, context, random);
}
Findings check_moe_sorted(const Context& context, Random& random) {
  return check_form(Form::kSorted, context, random);
}
Findings check_moe_pairs(const Context& context, Random& random) {
  return check_form(Form::kPairs, context, random);
}

}  // namespace sonicmoe::cli
