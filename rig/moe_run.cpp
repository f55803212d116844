#include "rig/moe_run.hpp"

#include <algorithm>
#include <bit>
#include <sstream>
#include <utility>

#include "rig/backward_steps.hpp"

namespace sonicmoe::rig {
namespace {

void note(std::vector<std::string>& violations, const std::string& name, const std::string& what) {
  if (!what.empty()) violations.push_back(name + ": " + what);
}

// R.
std::size_t used_rows(const MoECase& c, const MoEInputs& inputs) {
  std::optional<MoEInputs> copy;  // the oracle reads host memory
  if (inputs.x.view().device().type != DeviceType::kCpu) copy.emplace(host_target(), c);
  const Routing routing = (copy ? *copy : inputs).routing();
  return std::min(oracle::sorted_rows(routing, c.tokens(), c.num_experts).size(),
                  static_cast<std::size_t>(c.row_capacity()));
}

// [T, d], with zeros where the case lets anything stand.
Values rows_of_tokens(const Tensor& tensor, const MoEInputs& inputs) {
  Values values = tensor.values();
  if (inputs.description.zero_absent_tokens) return values;
  const std::vector<std::int64_t>& used = inputs.used_tokens();
  const std::int64_t d = inputs.description.hidden_size;
  for (std::size_t i = 0; i < values.size(); ++i) {
    const std::int64_t t = static_cast<std::int64_t>(i) / d;
    if (!std::binary_search(used.begin(), used.end(), t)) values[i] = 0.0;
  }
  return values;
}

// The elements of the first `rows` rows of a tensor [P, columns]. The others must still be poison.
Values first_rows(const char* name, const Tensor& tensor, std::size_t rows,
                  std::vector<std::string>& violations) {
  if (!tensor.defined()) return {};
  const std::size_t used = rows * static_cast<std::size_t>(tensor.view().size(1));
  Values values = tensor.values();
  if (!std::all_of(values.begin() + static_cast<std::ptrdiff_t>(used), values.end(),
                   [&](double value) { return is_poison(value, tensor.dtype()); })) {
    note(violations, name, "wrote a row at or past R");
  }
  values.resize(used);
  return values;
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
  rows_dropped = Tensor(target, DType::kInt32, {1});
  if (options.inference) return;
  h = Tensor(target, c.dtype, {c.row_capacity(), c.h_columns()});
  metadata = GuardedBuffer(target, moe_metadata_bytes(shape));
  backward_plan = moe_backward_workspace(context, shape, options.backward_limit);
  if (options.in_steps) {
    grad_h = Tensor(target, c.dtype, {c.row_capacity(), c.h_columns()});
    scaled_a = Tensor(target, c.dtype, {c.row_capacity(), c.intermediate_size});
    row_lists = GuardedBuffer(target, moe_row_lists_bytes(context, shape));
  } else {
    backward_workspace = GuardedBuffer(target, backward_plan.bytes);
  }
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
  args.rows_dropped = rows_dropped.view();
  if (!options_.inference) args.metadata = metadata.view();
  args.workspace = forward_workspace.view();
  args.workspace_limit = options_.forward_limit;
  moe_forward(target_.context(options_.num_threads), args);
}

MoEBackwardArgs ExpertsRun::backward_args() const {
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
  args.workspace_limit = options_.backward_limit;
  return args;
}

void ExpertsRun::backward() {
  if (options_.in_steps) return backward_in_steps();
  MoEBackwardArgs args = backward_args();
  args.workspace = backward_workspace.view();
  moe_backward(target_.context(options_.num_threads), args);
}

void ExpertsRun::backward_in_steps() {
  const Context context = target_.context(options_.num_threads);
  MoEBackwardArgs all = backward_args();
  all.grad_h = grad_h.view();
  all.scaled_a = scaled_a.view();
  if (row_lists.size() > 0) all.row_lists = row_lists.view();
  const std::size_t handed_on =
      grad_h.view().nbytes() + scaled_a.view().nbytes() + row_lists.size();
  for (const BackwardStep step : kBackwardSteps) {
    MoEBackwardArgs args = of_step(all, step);
    const std::size_t bytes =
        moe_backward_workspace(context, inputs_.shape(), options_.backward_limit, step).bytes;
    const GuardedBuffer workspace(target_, bytes);
    args.workspace = workspace.view();
    moe_backward(context, args);
    note(step_violations_, "workspace of a step",
         workspace.guards_intact() ? "" : "wrote outside its buffer");
    const bool fits =
        target_.backend == "reference" || !options_.backward_limit ||
        bytes + handed_on - (step > BackwardStep::kDown ? scaled_a.view().nbytes() : 0) <=
            *options_.backward_limit;
    note(step_violations_, "a step", fits ? "" : "exceeds workspace_limit");
    if (step == BackwardStep::kDown) scaled_a.fill_constant(1e30);  // nobody reads it any more
  }
}

std::vector<std::string> ExpertsRun::violations() const {
  std::vector<std::string> result = step_violations_;
  const std::pair<const char*, const Tensor*> tensors[] = {
      {"out", &out},
      {"h", &h},
      {"rows_dropped", &rows_dropped},
      {"grad_h", &grad_h},
      {"scaled_a", &scaled_a},
      {"grad_x", &grad_x},
      {"grad_w1", &grad_w1},
      {"grad_b1", &grad_b1},
      {"grad_w2", &grad_w2},
      {"grad_b2", &grad_b2},
      {"grad_routing_weights", &grad_routing_weights}};
  for (const auto& [name, tensor] : tensors) note(result, name, tensor->violation_as_output());
  const std::pair<const char*, const GuardedBuffer*> buffers[] = {
      {"forward workspace", &forward_workspace},
      {"backward workspace", &backward_workspace},
      {"row lists", &row_lists},
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
  result.out = rows_of_tokens(run.out, inputs);
  result.rows_dropped = static_cast<std::int64_t>(run.rows_dropped.values()[0]);
  if (!options.inference) {
    result.metadata = run.metadata.download();
    const Values h = run.h.values();
    const std::size_t rows = used_rows(fit, inputs);
    run.backward();
    note(result.violations, "h", bitwise_difference(h, run.h.values()));
    if (result.metadata != run.metadata.download()) {
      note(result.violations, "metadata", "changed by backward");
    }
    result.h = first_rows("h", run.h, rows, result.violations);
    first_rows("grad_h", run.grad_h, rows, result.violations);
  }
  const auto values = [](const Tensor& tensor) {
    return tensor.defined() ? tensor.values() : Values();
  };
  result.grad_x = run.grad_x.defined() ? rows_of_tokens(run.grad_x, inputs) : Values();
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
  if (a.rows_dropped != b.rows_dropped) all += "rows_dropped\n";
  return all;
}

}  // namespace sonicmoe::rig
