#include "rig/moe_run.hpp"

#include <bit>
#include <sstream>

namespace sonicmoe::rig {
namespace {

void note(std::vector<std::string>& violations, const std::string& name, const std::string& what) {
  if (!what.empty()) violations.push_back(name + ": " + what);
}

void note_buffer(std::vector<std::string>& violations, const char* name,
                 const GuardedBuffer& buffer) {
  note(violations, name, buffer.guards_intact() ? "" : "wrote outside its buffer");
}

// Checks an output tensor and returns its elements; nothing for an absent one.
std::vector<double> collect(std::vector<std::string>& violations, const char* name,
                            const Tensor& tensor) {
  if (!tensor.defined()) return {};
  note(violations, name, tensor.violation_as_output());
  return tensor.values();
}

bool is_poison(double value, DType dtype) {
  if (dtype == DType::kBFloat16) return bfloat16(static_cast<float>(value)).bits == 0xFFF5;
  return std::bit_cast<std::uint32_t>(static_cast<float>(value)) == 0xFFF5FFF5u;
}

class Run {
 public:
  Run(const Target& target, const MoECase& test_case, const RunOptions& options)
      : target_(target), case_(test_case), options_(options), inputs_(target, test_case) {}

  RunResult operator()() {
    forward();
    if (!options_.inference) backward();
    for (const std::string& violation : inputs_.violations()) {
      result_.violations.push_back(violation);
    }
    return std::move(result_);
  }

 private:
  void forward();
  void backward();
  void cut_h_tail();
  Tensor gradient(unsigned bit, const Tensor& like, Strides strides) const;

  const Target& target_;
  const MoECase& case_;
  const RunOptions& options_;
  MoEInputs inputs_;
  Tensor h_;
  GuardedBuffer metadata_;
  RunResult result_;
};

void Run::forward() {
  const Context context = target_.context(options_.num_threads);
  const MoEShape shape = inputs_.shape();
  result_.forward_plan =
      moe_forward_workspace(context, shape, options_.inference, options_.forward_limit);
  const GuardedBuffer workspace(target_, result_.forward_plan.bytes);
  const Tensor out(target_, case_.dtype, {case_.tokens(), case_.hidden_size}, case_.x_strides);
  MoEForwardArgs args;
  args.options = case_.options();
  args.x = inputs_.x.view();
  args.weights = inputs_.weights();
  args.routing = inputs_.routing();
  args.out = out.view();
  args.workspace = workspace.view();
  args.workspace_limit = options_.forward_limit;
  if (!options_.inference) {
    h_ = Tensor(target_, case_.dtype, {case_.pairs(), case_.h_columns()});
    metadata_ = GuardedBuffer(target_, moe_metadata_bytes(shape));
    args.h = h_.view();
    args.metadata = metadata_.view();
  }
  moe_forward(context, args);
  result_.out = collect(result_.violations, "out", out);
  note_buffer(result_.violations, "forward workspace", workspace);
  note_buffer(result_.violations, "metadata", metadata_);
  result_.metadata = metadata_.download();
  result_.h = collect(result_.violations, "h", h_);
  if (!options_.inference) cut_h_tail();
}

// Rows of H at and past R must still be poison; they are cut off.
void Run::cut_h_tail() {
  std::optional<MoEInputs> copy;  // the oracle reads host memory
  if (target_.device.type != DeviceType::kCpu) copy.emplace(host_target(), case_);
  const Routing routing = (copy ? *copy : inputs_).routing();
  const auto rows = oracle::sorted_rows(routing, case_.tokens(), case_.num_experts).size();
  const std::size_t used = rows * static_cast<std::size_t>(case_.h_columns());
  std::vector<double>& h = result_.h;
  for (std::size_t i = used; i < h.size(); ++i) {
    if (is_poison(h[i], case_.dtype)) continue;
    note(result_.violations, "h", "wrote a row at or past R");
    break;
  }
  h.resize(used);
}

Tensor Run::gradient(unsigned bit, const Tensor& like, Strides strides) const {
  if ((options_.gradients & bit) == 0 || !like.defined()) return {};
  const auto shape = like.view().shape();
  Tensor tensor(target_, options_.gradient_dtype.value_or(case_.dtype),
                {shape.begin(), shape.end()}, strides);
  if (options_.accumulate) tensor.fill_constant(options_.accumulate_onto);
  return tensor;
}

void Run::backward() {
  const Context context = target_.context(options_.num_threads);
  const MoEShape shape = inputs_.shape();
  result_.backward_plan = moe_backward_workspace(context, shape, options_.backward_limit);
  const GuardedBuffer workspace(target_, result_.backward_plan.bytes);

  Tensor grad_x, grad_weights;
  if (options_.gradients & kGradX) {
    grad_x = Tensor(target_, case_.dtype, {case_.tokens(), case_.hidden_size}, case_.x_strides);
  }
  if ((options_.gradients & kGradRoutingWeights) && inputs_.routing_weights.defined()) {
    const auto extents = inputs_.routing_weights.view().shape();
    grad_weights = Tensor(target_, DType::kFloat32, {extents.begin(), extents.end()});
  }
  const Tensor grad_w1 = gradient(kGradW1, inputs_.w1, case_.w1_strides);
  const Tensor grad_b1 = gradient(kGradB1, inputs_.b1, Strides::kContiguous);
  const Tensor grad_w2 = gradient(kGradW2, inputs_.w2, case_.w2_strides);
  const Tensor grad_b2 = gradient(kGradB2, inputs_.b2, Strides::kContiguous);

  MoEBackwardArgs args;
  args.options = case_.options();
  args.grad_out = inputs_.grad_out.view();
  args.x = inputs_.x.view();
  args.weights = inputs_.weights();
  args.routing = inputs_.routing();
  args.h = h_.view();
  args.metadata = metadata_.view();
  args.grad_x = grad_x.view();
  args.grad_w1 = grad_w1.view();
  args.grad_b1 = grad_b1.view();
  args.grad_w2 = grad_w2.view();
  args.grad_b2 = grad_b2.view();
  args.grad_routing_weights = grad_weights.view();
  args.accumulate = options_.accumulate;
  args.workspace = workspace.view();
  args.workspace_limit = options_.backward_limit;
  const std::vector<double> h_values = h_.values();
  moe_backward(context, args);

  note_buffer(result_.violations, "backward workspace", workspace);
  note(result_.violations, "h", bitwise_difference(h_values, h_.values()));
  note(result_.violations, "metadata",
       result_.metadata == metadata_.download() ? "" : "changed by backward");
  result_.grad_x = collect(result_.violations, "grad_x", grad_x);
  result_.grad_w1 = collect(result_.violations, "grad_w1", grad_w1);
  result_.grad_b1 = collect(result_.violations, "grad_b1", grad_b1);
  result_.grad_w2 = collect(result_.violations, "grad_w2", grad_w2);
  result_.grad_b2 = collect(result_.violations, "grad_b2", grad_b2);
  result_.grad_routing_weights = collect(result_.violations, "grad_routing_weights", grad_weights);
}

}  // namespace

RunResult run_moe(const Target& target, const MoECase& test_case, const RunOptions& options) {
  const MoECase fit = fitted(target, test_case);
  return Run(target, fit, options)();
}

std::string bitwise_difference(const std::vector<double>& a, const std::vector<double>& b) {
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
  const auto compare = [&](const char* name, const std::vector<double>& left,
                           const std::vector<double>& right) {
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
