// moe_forward and moe_backward in the three forms of routing.
#include <algorithm>

#include "rig/backward_steps.hpp"
#include "rig/workbench.hpp"
#include "sonicmoe/sonicmoe.hpp"

namespace sonicmoe::rig {
namespace {

using Form = MoEShape::Form;

// The inputs that forward and backward have in common.
struct Experts {
  ExpertOptions options;
  ConstTensorView x;
  ExpertWeights weights;
  Routing routing;
  MoEShape shape;

  Experts(Workbench& bench, Form form) {
    const std::vector<Activation> activations(all_activations().begin(), all_activations().end());
    options.activation = bench.random.pick(activations);
    options.gate_up_layout = bench.random.pick(all_gate_up_layouts());
    options.limit = 0.75f;
    const std::int64_t columns = gate_factor(options.activation) * bench.n;
    x = bench.floats(bench.dtype, {bench.T, bench.d}, 1.0);
    weights.w1 = bench.floats(bench.dtype, {bench.E, columns, bench.d}, 0.3);
    weights.w2 = bench.floats(bench.dtype, {bench.E, bench.d, bench.n}, 0.3);
    if (bench.present()) weights.b1 = bench.floats(bench.dtype, {bench.E, columns}, 0.5);
    if (bench.present()) weights.b2 = bench.floats(bench.dtype, {bench.E, bench.d}, 0.5);
    routing = make_routing(bench, form);
    shape = moe_shape(options, x, weights, routing);
  }

 private:
  static Routing make_routing(Workbench& bench, Form form) {
    const DType ids = bench.id_dtype(), floats = bench.float_dtype();
    if (form == Form::kTopK) {
      return TopKRouting{bench.ids(ids, {bench.T, bench.K}, bench.topk_ids(0.1)),
                         bench.floats(floats, {bench.T, bench.K}, 0.2, 0.6)};
    }
    if (form == Form::kSorted) {
      std::vector<std::int64_t> ends;
      for (std::int64_t e = 1; e < bench.E; ++e) ends.push_back(bench.random.integer(0, bench.T));
      ends.push_back(bench.T - bench.random.integer(0, 1));  // the last row may belong to nobody
      for (std::int64_t& end : ends) end = std::min(end, ends.back());
      std::sort(ends.begin(), ends.end());
      SortedRouting sorted{bench.ids(DType::kInt32, {bench.E}, ends), {}};
      if (bench.present()) sorted.row_weights = bench.floats(floats, {bench.T}, 0.2, 0.6);
      return sorted;
    }
    const std::int64_t pairs = bench.random.integer(bench.T, 2 * bench.T);
    std::vector<std::int64_t> tokens, experts;
    for (std::int64_t p = 0; p < pairs; ++p) {
      tokens.push_back(bench.random.integer(0, bench.T - 1));
      experts.push_back(bench.random.chance(0.1) ? bench.E : bench.random.integer(0, bench.E - 1));
    }
    return PairRouting{bench.ids(ids, {pairs}, tokens), bench.ids(ids, {pairs}, experts),
                       bench.floats(floats, {pairs}, 0.2, 0.6)};
  }
};

MoEForwardArgs forward_args(Workbench& bench, const Experts& experts, bool inference) {
  const MoEShape& shape = experts.shape;
  MoEForwardArgs args;
  args.options = experts.options;
  args.x = experts.x;
  args.weights = experts.weights;
  args.routing = experts.routing;
  args.out = bench.blank(bench.dtype, {bench.T, bench.d});
  if (!inference) {
    args.h = bench.blank(bench.dtype, {shape.row_capacity(), shape.h_columns()});
    args.metadata = bench.bytes(moe_metadata_bytes(shape));
  }
  if (bench.present()) args.rows_dropped = bench.blank(DType::kInt32, {1});
  args.workspace = bench.bytes(moe_forward_workspace(bench.context(), shape, inference).bytes);
  return args;
}

std::string call_name(const char* operation, Form form) {
  constexpr const char* kForms[] = {"topk", "sorted", "pairs"};
  return std::string(operation) + "/" + kForms[static_cast<int>(form)];
}

void set_optional(Call& call) {
  for (const char* bias : {"b1", "b2"}) call.set_optional(bias, 0.0);
  call.set_optional("row_weights", 1.0);
  call.set_optional("rows_dropped");
}

template <Form form>
Call make_forward(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  const Experts experts(bench, form);
  const MoEForwardArgs args = forward_args(bench, experts, !bench.present());
  CallMaker<MoEForwardArgs> maker;
  spoil_expert_options(maker, [](MoEForwardArgs& a) -> auto& { return a.options; });
  spoil_workspace_limit(maker);
  if (form != Form::kSorted) {
    const auto assign = [](MoEForwardArgs& a, std::int64_t first) {
      auto* topk = std::get_if<TopKRouting>(&a.routing);
      (topk != nullptr ? topk->first_expert : std::get<PairRouting>(a.routing).first_expert) =
          first;
    };
    maker.each("first_expert", Expected::kRefused,
               {std::int64_t{-1}, std::numeric_limits<std::int64_t>::min()}, assign);
    maker.each("first_expert", Expected::kEither,
               {std::int64_t{1}, kTwo62, std::numeric_limits<std::int64_t>::max()}, assign);
  }
  Call call = maker.make(call_name("moe_forward", form), target, args, moe_forward, bench.memory,
                         bench.num_threads);
  set_optional(call);
  return call;
}

// A valid call with kAll but for its workspace, after a forward call.
MoEBackwardArgs backward_args(Workbench& bench, const Experts& experts, Form form) {
  const MoEForwardArgs forward = forward_args(bench, experts, false);
  moe_forward(bench.context(), forward);
  bench.remember();

  const auto gradient = [&](const ConstTensorView& of) {
    if (!of.defined() || !bench.present()) return TensorView();
    const DType dtype = bench.random.chance(0.5) ? DType::kFloat32 : of.dtype();
    return bench.blank(dtype, {of.shape().begin(), of.shape().end()});
  };
  const ExpertWeights& w = experts.weights;
  MoEBackwardArgs args;
  args.options = experts.options;
  args.grad_out = bench.floats(bench.dtype, {bench.T, bench.d}, 1.0);
  args.x = experts.x;
  args.weights = w;
  args.routing = experts.routing;
  args.h = forward.h;
  args.metadata = forward.metadata;
  args.grad_w1 = gradient(w.w1);
  args.grad_b1 = gradient(w.b1);
  args.grad_w2 = gradient(w.w2);
  args.grad_b2 = gradient(w.b2);
  const auto* sorted = std::get_if<SortedRouting>(&args.routing);
  if ((sorted == nullptr || sorted->row_weights.defined()) && bench.present()) {
    const std::int64_t P = experts.shape.num_pairs;
    args.grad_routing_weights = form == Form::kTopK
                                    ? bench.blank(DType::kFloat32, {bench.T, bench.K})
                                    : bench.blank(DType::kFloat32, {P});
  }
  // Without optional tensors there is still one result.
  args.grad_x = bench.blank(bench.dtype, {bench.T, bench.d});
  return args;
}

Call make_call(Workbench& bench, const std::string& title, const MoEBackwardArgs& args) {
  CallMaker<MoEBackwardArgs> maker;
  spoil_expert_options(maker, [](MoEBackwardArgs& a) -> auto& { return a.options; });
  spoil_workspace_limit(maker);
  spoil_step(maker);
  Call call = maker.make(title, bench.target, args, moe_backward, bench.memory, bench.num_threads);
  set_optional(call);
  for (const char* name :
       {"grad_x", "grad_w1", "grad_b1", "grad_w2", "grad_b2", "grad_routing_weights"}) {
    call.set_optional(name);
  }
  return call;
}

template <Form form>
Call make_backward(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  const Experts experts(bench, form);
  MoEBackwardArgs args = backward_args(bench, experts, form);
  args.workspace = bench.bytes(moe_backward_workspace(bench.context(), experts.shape).bytes);
  return make_call(bench, call_name("moe_backward", form), args);
}

// One step of a backward, in a form that the seed chooses, after those before it.
template <BackwardStep step>
Call make_step(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  const auto form = static_cast<Form>(seed % 3);
  const Experts experts(bench, form);
  const MoEShape& shape = experts.shape;
  MoEBackwardArgs all = backward_args(bench, experts, form);
  hand_on(bench, all, shape);
  // Each step has a result.
  all.grad_w1 = bench.blank(bench.dtype, {bench.E, shape.h_columns(), bench.d});
  all.grad_w2 = bench.blank(bench.dtype, {bench.E, bench.d, bench.n});
  const auto args_of = [&](BackwardStep which) {
    MoEBackwardArgs args = of_step(all, which);
    args.workspace = bench.bytes(moe_backward_workspace(bench.context(), shape, {}, which).bytes);
    return args;
  };
  if (step != BackwardStep::kHidden) {
    moe_backward(bench.context(), args_of(BackwardStep::kHidden));
    bench.remember();
  }
  const std::string name = "moe_backward/step " + std::to_string(static_cast<int>(step));
  return make_call(bench, name, args_of(step));
}

}  // namespace

const std::vector<Operation>& expert_operations() {
  static const std::vector<Operation> list = {
      {"moe_forward_topk", make_forward<Form::kTopK>},
      {"moe_forward_sorted", make_forward<Form::kSorted>},
      {"moe_forward_pairs", make_forward<Form::kPairs>},
      {"moe_backward_topk", make_backward<Form::kTopK>},
      {"moe_backward_sorted", make_backward<Form::kSorted>},
      {"moe_backward_pairs", make_backward<Form::kPairs>},
      {"moe_backward_step_hidden", make_step<BackwardStep::kHidden>},
      {"moe_backward_step_down", make_step<BackwardStep::kDown>},
      {"moe_backward_step_input", make_step<BackwardStep::kInput>},
      {"moe_backward_step_up", make_step<BackwardStep::kUp>},
  };
  return list;
}

const std::vector<Operation>& all_operations() {
  static const std::vector<Operation> list = [] {
    std::vector<Operation> all = expert_operations();
    for (const auto* part : {&layer_operations(), &router_operations()}) {
      all.insert(all.end(), part->begin(), part->end());
    }
    return all;
  }();
  return list;
}

}  // namespace sonicmoe::rig
