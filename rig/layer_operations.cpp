// moe_layer_forward and moe_layer_backward, with top-K routing and with token rounding.
#include "rig/backward_steps.hpp"
#include "rig/workbench.hpp"
#include "sonicmoe/sonicmoe.hpp"

namespace sonicmoe::rig {
namespace {

MoELayerForwardArgs forward_args(Workbench& bench, bool rounding, bool inference) {
  MoELayerForwardArgs args;
  args.options.experts.activation = Activation::kSwiGLU;
  args.options.router = router_options(bench);
  if (rounding) args.options.rounding = rounding_options(bench);
  const DType router_dtype = bench.random.chance(0.5) ? DType::kFloat32 : bench.dtype;
  const std::int64_t T = bench.T, E = bench.E, d = bench.d, n = bench.n;
  args.x = bench.floats(bench.dtype, {T, d}, 1.0);
  args.router_weight = bench.floats(router_dtype, {E, d}, 0.4);
  if (bench.present()) args.router_bias = bench.floats(router_dtype, {E}, 0.5);
  args.weights.w1 = bench.floats(bench.dtype, {E, 2 * n, d}, 0.3);
  args.weights.w2 = bench.floats(bench.dtype, {E, d, n}, 0.3);
  if (bench.present()) args.weights.b1 = bench.floats(bench.dtype, {E, 2 * n}, 0.5);
  if (bench.present()) args.weights.b2 = bench.floats(bench.dtype, {E, d}, 0.5);

  const MoEShape shape = moe_layer_shape(args.options, args.x, args.weights);
  const std::int64_t P = shape.num_pairs;
  args.out = bench.blank(bench.dtype, {T, d});
  args.logits = bench.blank(DType::kFloat32, {T, E});
  args.rows_per_expert = bench.blank(DType::kInt32, {E});
  args.saved.topk_ids = bench.blank(DType::kInt32, {T, bench.K});
  if (rounding) {
    args.saved.token_ids = bench.blank(DType::kInt32, {P});
    args.saved.expert_ids = bench.blank(DType::kInt32, {P});
    args.saved.routing_weights = bench.blank(DType::kFloat32, {P});
  } else {
    args.saved.routing_weights = bench.blank(DType::kFloat32, {T, bench.K});
  }
  if (!inference) {
    args.saved.h = bench.blank(bench.dtype, {shape.row_capacity(), 2 * n});
    args.saved.metadata = bench.bytes(moe_metadata_bytes(shape));
  }
  if (bench.present()) args.rows_dropped = bench.blank(DType::kInt32, {1});
  args.workspace = bench.bytes(
      moe_layer_forward_workspace(bench.context(), args.options, shape, inference).bytes);
  return args;
}

template <class Args>
void spoil_options(CallMaker<Args>& maker, const Workbench& bench, bool rounding) {
  spoil_expert_options(maker, [](Args& a) -> auto& { return a.options.experts; });
  spoil_router_options(maker, bench.E, [](Args& a) -> auto& { return a.options.router; });
  if (rounding) {
    spoil_rounding_options(maker, bench.T, [](Args& a) -> auto& { return *a.options.rounding; });
  }
  spoil_workspace_limit(maker);
}

void set_optional(Call& call) {
  for (const char* name : {"selection_bias", "seed_tensor", "router_bias", "b1", "b2"}) {
    call.set_optional(name, 0.0);
  }
  call.set_optional("rows_dropped");
}

template <bool rounding>
Call make_forward(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  const MoELayerForwardArgs args = forward_args(bench, rounding, !bench.present());
  CallMaker<MoELayerForwardArgs> maker;
  spoil_options(maker, bench, rounding);
  Call call = maker.make(rounding ? "moe_layer_forward/rounding" : "moe_layer_forward/topk", target,
                         args, moe_layer_forward, bench.memory, bench.num_threads);
  set_optional(call);
  return call;
}

// A valid call with kAll but for its workspace, after a forward call.
MoELayerBackwardArgs backward_args(Workbench& bench, bool rounding) {
  const MoELayerForwardArgs forward = forward_args(bench, rounding, false);
  moe_layer_forward(bench.context(), forward);
  bench.remember();

  const auto gradient = [&](const ConstTensorView& of) {
    if (!of.defined() || !bench.present()) return TensorView();
    const DType dtype = bench.random.chance(0.5) ? DType::kFloat32 : of.dtype();
    return bench.blank(dtype, {of.shape().begin(), of.shape().end()});
  };
  MoELayerBackwardArgs args;
  args.options = forward.options;
  args.grad_out = bench.floats(bench.dtype, {bench.T, bench.d}, 1.0);
  if (bench.present()) args.grad_logits = bench.floats(DType::kFloat32, {bench.T, bench.E}, 0.1);
  args.x = forward.x;
  args.router_weight = forward.router_weight;
  args.weights = forward.weights;
  args.logits = forward.logits;
  args.saved = forward.saved;
  args.grad_x = bench.blank(bench.dtype, {bench.T, bench.d});
  args.grad_router_weight = gradient(forward.router_weight);
  args.grad_router_bias = gradient(forward.router_bias);
  args.grad_w1 = gradient(forward.weights.w1);
  args.grad_b1 = gradient(forward.weights.b1);
  args.grad_w2 = gradient(forward.weights.w2);
  args.grad_b2 = gradient(forward.weights.b2);
  return args;
}

TensorView workspace_of(Workbench& bench, const MoELayerBackwardArgs& args) {
  const MoEShape shape = moe_layer_shape(args.options, args.x, args.weights);
  return bench.bytes(
      moe_layer_backward_workspace(bench.context(), args.options, shape, {}, args.step).bytes);
}

Call make_call(Workbench& bench, const std::string& title, const MoELayerBackwardArgs& args) {
  CallMaker<MoELayerBackwardArgs> maker;
  spoil_options(maker, bench, args.options.rounding.has_value());
  spoil_step(maker);
  Call call =
      maker.make(title, bench.target, args, moe_layer_backward, bench.memory, bench.num_threads);
  set_optional(call);
  for (const char* name : {"grad_logits", "grad_x", "grad_router_weight", "grad_router_bias",
                           "grad_w1", "grad_b1", "grad_w2", "grad_b2"}) {
    call.set_optional(name, 0.0);
  }
  return call;
}

template <bool rounding>
Call make_backward(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  MoELayerBackwardArgs args = backward_args(bench, rounding);
  args.workspace = workspace_of(bench, args);
  return make_call(bench, rounding ? "moe_layer_backward/rounding" : "moe_layer_backward/topk",
                   args);
}

// One step of a backward, with token rounding where the seed chooses it, after those before it.
template <BackwardStep step>
Call make_step(const Target& target, std::uint64_t seed, Optionals optionals) {
  Workbench bench(target, seed, optionals);
  MoELayerBackwardArgs all = backward_args(bench, seed % 2 == 0);
  const MoEShape shape = moe_layer_shape(all.options, all.x, all.weights);
  hand_on(bench, all, shape);
  // Each step has a result.
  all.grad_w1 = bench.blank(bench.dtype, {bench.E, shape.h_columns(), bench.d});
  all.grad_w2 = bench.blank(bench.dtype, {bench.E, bench.d, bench.n});
  const auto extents = all.saved.routing_weights.shape();
  all.grad_routing_weights = bench.blank(DType::kFloat32, {extents.begin(), extents.end()});
  const auto args_of = [&](BackwardStep which) {
    MoELayerBackwardArgs args = of_step(all, which);
    args.workspace = workspace_of(bench, args);
    return args;
  };
  if (step != BackwardStep::kHidden) {
    moe_layer_backward(bench.context(), args_of(BackwardStep::kHidden));
    bench.remember();
  }
  const std::string name = "moe_layer_backward/step " + std::to_string(static_cast<int>(step));
  return make_call(bench, name, args_of(step));
}

}  // namespace

const std::vector<Operation>& layer_operations() {
  static const std::vector<Operation> list = {
      {"moe_layer_forward_topk", make_forward<false>},
      {"moe_layer_forward_rounding", make_forward<true>},
      {"moe_layer_backward_topk", make_backward<false>},
      {"moe_layer_backward_rounding", make_backward<true>},
      {"moe_layer_backward_step_hidden", make_step<BackwardStep::kHidden>},
      {"moe_layer_backward_step_down", make_step<BackwardStep::kDown>},
      {"moe_layer_backward_step_input", make_step<BackwardStep::kInput>},
      {"moe_layer_backward_step_up", make_step<BackwardStep::kUp>},
  };
  return list;
}

}  // namespace sonicmoe::rig
