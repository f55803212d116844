#include "rig/moe_run.hpp"

#include <algorithm>
#include <bit>
#include <sstream>
#include <utility>

namespace sonicmoe::rig {
namespace {

void note(std::vector<std::string>& violations, const std::string& name, const std::string& what) {
  if (!what.empty()) violations.push_back(name + ": " + what);
}

// The elements of the R rows that exist. Rows at and past R must still be poison.
Values rows_of_h(const ExpertsRun& run, const MoECase& c, const MoEInputs& inputs,
                 std::vector<std::string>& violations) {
  std::optional<MoEInputs> copy;  // the oracle reads host memory
  if (inputs.x.view().device().type != DeviceType::kCpu) copy.emplace(host_target(), c);
  const Routing routing = (copy ? *copy : inputs).routing();
  const auto rows = oracle::sorted_rows(routing, c.tokens(), c.num_experts).size();
  const std::size_t used = rows * static_cast<std::size_t>(c.h_columns());
  Values h = run.h.values();
  if (!std::all_of(h.begin() + static_cast<std::ptrdiff_t>(used), h.end(),
                   [&](double value) { return is_poison(value, c.dtype); })) {
    note(violations, "h", "wrote a row at or past R");
  }
  h.resize(used);
  return h;
}

}  // namespace

ExpertsRun::ExpertsRun(const Target& target, const MoEInputs& inputs, const RunOptions& options)
    : target_(target), inputs_(inputs), options_(options) {
  const MoECase& c = inputs.description;
  const Context context = target.context(options.num_threads);
  const MoEShape shape = inputs.shape();
  forward_plan = moe_forward_workspace(context, shape, options.inference, options.forward_limit);
  forward_workspace = GuardedBuffer(target, forward_plan.bytes);
  out = Tensor(target, c.dtype, {c.tokens(), c.hidden_size}, c.x_strides);
  if (options.inference) return;
  h = Tensor(target, c.dtype, {c.pairs(), c.h_columns()});
  metadata = GuardedBuffer(target, moe_metadata_bytes(shape));
  backward_plan = moe_backward_workspace(context, shape, options.backward_limit);
  backward_workspace = GuardedBuffer(target, backward_plan.bytes);
  if (options.gradients & kGradX) {
    grad_x = Tensor(target, c.dtype, {c.tokens(), c.hidden_size}, c.x_strides);
  }
  grad_w1 = gradient(kGradW1, inputs.w1, c.w1_strides);
  grad_b1 = gradient(kGradB1, inputs.b1, Strides::kContiguous);
  grad_w2 = gradient(kGradW2, inputs.w2, c.w2_strides);
  grad_b2 = gradient(kGradB2, inputs.b2, Strides::kContiguous);
  if ((options.gradients & kGradRoutingWeights) && inputs.routing_weights.defined()) {
    const auto extents = inputs.routing_weights.view().shape();
    grad_routing_weights = Tensor(target, DType::kFloat32, {extents.begin(), extents.end()});
  }
}

Tensor ExpertsRun::gradient(unsigned bit, const Tensor& like, Strides strides) const {
  if ((options_.gradients & bit) == 0 || !like.defined()) return {};
  const auto shape = like.view().shape();
  Tensor tensor(target_, options_.gradient_dtype.value_or(inputs_.description.dtype),
                {shape.begin(), shape.end()}, strides);
  if (options_.accumulate) tensor.fill_constant(options_.accumulate_onto);
  return tensor;
}

void ExpertsRun::forward() {
  MoEForwardArgs args;
  args.options = inputs_.description.options();
  args.x = inputs_.x.view();
  args.weights = inputs_.weights();
  args.routing = inputs_.routing();
  args.out = out.view();
  args.h = h.view();
  if (!options_.inference) args.metadata = metadata.view();
  args.workspace = forward_workspace.view();
  args.workspace_limit = options_.forward_limit;
  moe_forward(target_.context(options_.num_threads), args);
}

void ExpertsRun::backward() {
  MoEBackwardArgs args;
  args.options = inputs_.description.options();
  args.grad_out = inputs_.grad_out.view();
  args.x = inputs_.x.view();
  args.weights = inputs_.weights();
  args.routing = inputs_.routing();
  args.h = h.view();
  args.metadata = metadata.view();
  args.grad_x = grad_x.view();
  args.grad_w1 = grad_w1.view();
  args.grad_b1 = grad_b1.view();
  args.grad_w2 = grad_w2.view();
  args.grad_b2 = grad_b2.view();
  args.grad_routing_weights = grad_routing_weights.view();
  args.accumulate = options_.accumulate;
  args.workspace = backward_workspace.view();
  args.workspace_limit = options_.backward_limit;
  moe_backward(target_.context(options_.num_threads), args);
}

std::vector<std::string> ExpertsRun::violations() const {
  std::vector<std::string> result;
  const std::pair<const char*, const Tensor*> tensors[] = {
      {"out", &out},         {"h", &h},
      {"grad_x", &grad_x},   {"grad_w1", &grad_w1},
      {"grad_b1", &grad_b1}, {"grad_w2", &grad_w2},
      {"grad_b2", &grad_b2}, {"grad_routing_weights", &grad_routing_weights}};
  for (const auto& [name, tensor] : tensors) note(result, name, tensor->violation_as_output());
  const std::pair<const char*, const GuardedBuffer*> buffers[] = {
      {"forward workspace", &forward_workspace},
      {"backward workspace", &backward_workspace},
      {"metadata", &metadata}};
  for (const auto& [name, buffer] : buffers) {
    note(result, name, buffer->guards_intact() ? "" : "wrote outside its buffer");
  }
  return result;
}

RunResult run_moe(const Target& target, const MoECase& test_case, const RunOptions& options) {
  const MoECase fit = fitted(target, test_case);
  const MoEInputs inputs(target, fit);
  ExpertsRun run(target, inputs, options);
  RunResult result;
  result.forward_plan = run.forward_plan;
  result.backward_plan = run.backward_plan;
  run.forward();
  result.out = run.out.values();
  if (!options.inference) {
    result.metadata = run.metadata.download();
    const Values h = run.h.values();
    run.backward();
    note(result.violations, "h", bitwise_difference(h, run.h.values()));
    if (result.metadata != run.metadata.download()) {
      note(result.violations, "metadata", "changed by backward");
    }
    result.h = rows_of_h(run, fit, inputs, result.violations);
  }
  const auto values = [](const Tensor& tensor) {
    return tensor.defined() ? tensor.values() : Values();
  };
  result.grad_x = values(run.grad_x);
  result.grad_w1 = values(run.grad_w1);
  result.grad_b1 = values(run.grad_b1);
  result.grad_w2 = values(run.grad_w2);
  result.grad_b2 = values(run.grad_b2);
  result.grad_routing_weights = values(run.grad_routing_weights);
  for (const auto& violations : {run.violations(), inputs.violations()}) {
    result.violations.insert(result.violations.end(), violations.begin(), violations.end());
  }
  return result;
}

std::string bitwise_difference(const Values& a, const Values& b) {
  if (a.size() != b.size()) {
    return std::to_string(a.size()) + " against " + std::to_string(b.size()) + " elements";
  }
  for (std::size_t i = 0; i < a.size(); ++i) {
    if (std::bit_cast<std::uint64_t>(a[i]) == std::bit_cast<std::uint64_t>(b[i])) continue;
    std::ostringstream out;
    out.precision(17);
    out << "element " << i << " of " << a.size() << ": " << a[i] << " against " << b[i];
    return out.str();
  }
  return {};
}

std::string bitwise_difference(const RunResult& a, const RunResult& b) {
  std::string all;
  const auto compare = [&](const char* name, const Values& left, const Values& right) {
    const std::string difference = bitwise_difference(left, right);
    if (!difference.empty()) all += std::string(name) + ": " + difference + "\n";
  };
  compare("out", a.out, b.out);
  compare("h", a.h, b.h);
  compare("grad_x", a.grad_x, b.grad_x);
  compare("grad_w1", a.grad_w1, b.grad_w1);
  compare("grad_b1", a.grad_b1, b.grad_b1);
  compare("grad_w2", a.grad_w2, b.grad_w2);
  compare("grad_b2", a.grad_b2, b.grad_b2);
  compare("grad_routing_weights", a.grad_routing_weights, b.grad_routing_weights);
  return all;
}

}  // namespace sonicmoe::rig
