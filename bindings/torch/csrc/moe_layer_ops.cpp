// moe_layer_forward and moe_layer_backward: router GEMM, routing and experts as one operator each
// way.
#include <string>
#include <tuple>

#include "backward_steps.hpp"
#include "gradients.hpp"
#include "kept_memory.hpp"
#include "ops.hpp"
#include "options.hpp"

namespace sonicmoe_torch {
namespace {

constexpr const char* kForwardSchema =
    "moe_layer_forward(Tensor x, Tensor router_weight, Tensor? router_bias, Tensor w1, Tensor? b1, "
    "Tensor w2, Tensor? b2, Tensor? selection_bias, Tensor? seed_tensor, int[] options, "
    "float[] reals, bool save_for_backward) -> (Tensor y, Tensor logits, Tensor rows_per_expert, "
    "Tensor topk_ids, Tensor token_ids, Tensor expert_ids, Tensor routing_weights, Tensor h, "
    "Tensor metadata, Tensor rows_dropped)";

// x and y [..., d], logits [..., E]. token_ids and expert_ids are empty for plain top-K, h and
// metadata without save_for_backward, rows_dropped [1] int32 without max_rows.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
moe_layer_forward(const Tensor& x, const Tensor& router_weight, const OptionalTensor& router_bias,
                  const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                  const OptionalTensor& b2, const OptionalTensor& selection_bias,
                  const OptionalTensor& seed_tensor, const Integers& options, const Reals& reals,
                  bool save_for_backward) {
  const Views views("moe_layer_forward");
  const Call call(x);
  const LayerCall layer = unpack_layer(PackedOptions(views.operation(), options, reals), views,
                                       selection_bias, seed_tensor);
  sonicmoe::MoELayerForwardArgs args{
      .options = layer.options,
      .x = views.rows("x", x),
      .router_weight = views.in("router_weight", router_weight),
      .router_bias = views.in("router_bias", router_bias),
      .weights = {views.in("w1", w1), views.in("b1", b1), views.in("w2", w2), views.in("b2", b2)},
      .workspace_limit = layer.workspace_limit};
  const auto shape =
      views.ask([&] { return sonicmoe::moe_layer_shape(args.options, args.x, args.weights); });
  const auto plan = views.ask([&] {
    return sonicmoe::moe_layer_forward_workspace(call.context(), args.options, shape,
                                                 !save_for_backward, args.workspace_limit);
  });

  const bool rounds = args.options.rounding.has_value();
  const std::int64_t top_k = args.options.router.top_k;
  const std::int64_t listed = rounds ? shape.num_pairs : 0;
  const Tensor y = new_like_contiguous(x, x.scalar_type());
  const Tensor logits = new_rows(x, shape.num_experts, ScalarType::Float);
  const Tensor rows = new_tensor(x, {shape.num_experts}, ScalarType::Int);
  const Tensor topk_ids = new_tensor(x, {shape.num_tokens, top_k}, ScalarType::Int);
  const Tensor token_ids = new_tensor(x, {listed}, ScalarType::Int);
  const Tensor expert_ids = new_tensor(x, {listed}, ScalarType::Int);
  const Tensor routing_weights = rounds ? new_tensor(x, {listed}, ScalarType::Float)
                                        : new_like_contiguous(topk_ids, ScalarType::Float);
  const Tensor h = save_for_backward
                       ? new_kept(x, {shape.row_capacity(), shape.h_columns()}, x.scalar_type())
                       : nothing(x);
  const Tensor metadata = new_bytes(x, save_for_backward ? sonicmoe::moe_metadata_bytes(shape) : 0);
  const Tensor rows_dropped = new_tensor(x, {shape.max_rows ? 1 : 0}, ScalarType::Int);
  const Tensor workspace = new_workspace(x, plan.bytes, args.workspace_limit.has_value());

  args.out = views.out_rows("out", y);
  args.logits = views.out_rows("logits", logits);
  args.rows_per_expert = views.out("rows_per_expert", rows);
  if (shape.max_rows) args.rows_dropped = views.out("rows_dropped", rows_dropped);
  args.saved.topk_ids = views.out("topk_ids", topk_ids);
  args.saved.routing_weights = views.out("routing_weights", routing_weights);
  if (rounds) {
    args.saved.token_ids = views.out("token_ids", token_ids);
    args.saved.expert_ids = views.out("expert_ids", expert_ids);
  }
  if (save_for_backward) {
    args.saved.h = views.out("h", h);
    args.saved.metadata = views.out("metadata", metadata);
  }
  args.workspace = views.out("workspace", workspace);
  sonicmoe::moe_layer_forward(call.context(), args);
  return {y,          logits,          rows, topk_ids, token_ids,
          expert_ids, routing_weights, h,    metadata, rows_dropped};
}

// What forward saved of the routing, in the order of its results.
struct SavedRouting {
  Tensor logits, topk_ids, token_ids, expert_ids, routing_weights, metadata;
};

// The inputs of a backward, without grad_out and h.
sonicmoe::MoELayerBackwardArgs backward_args(const Views& views, const LayerCall& layer,
                                             const Tensor& x, const Tensor& router_weight,
                                             const Tensor& w1, const OptionalTensor& b1,
                                             const Tensor& w2, const OptionalTensor& b2,
                                             const SavedRouting& saved) {
  sonicmoe::MoELayerBackwardArgs args{
      .options = layer.options,
      .x = views.rows("x", x),
      .router_weight = views.in("router_weight", router_weight),
      .weights = {views.in("w1", w1), views.in("b1", b1), views.in("w2", w2), views.in("b2", b2)},
      .logits = views.rows("logits", saved.logits),
      .workspace_limit = layer.workspace_limit};
  args.saved.topk_ids = views.out("topk_ids", saved.topk_ids);
  args.saved.routing_weights = views.out("routing_weights", saved.routing_weights);
  if (args.options.rounding) {
    args.saved.token_ids = views.out("token_ids", saved.token_ids);
    args.saved.expert_ids = views.out("expert_ids", saved.expert_ids);
  }
  args.saved.metadata = views.out("metadata", saved.metadata);
  return args;
}

sonicmoe::MoEShape shape_of(const Views& views, const sonicmoe::MoELayerBackwardArgs& args) {
  return views.ask([&] { return sonicmoe::moe_layer_shape(args.options, args.x, args.weights); });
}

LayerCall unpack(const Views& views, const Integers& options, const Reals& reals) {
  return unpack_layer(PackedOptions(views.operation(), options, reals), views, std::nullopt,
                      std::nullopt);
}

constexpr const char* kBackwardSchema =
    "moe_layer_backward(Tensor grad_out, Tensor? grad_logits, Tensor x, Tensor router_weight, "
    "Tensor? router_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor[] saved, "
    "int[] options, float[] reals, bool[] needs, Tensor(a!)[] main_grads) -> "
    "(Tensor grad_x, Tensor grad_router_weight, Tensor grad_router_bias, Tensor grad_w1, "
    "Tensor grad_b1, Tensor grad_w2, Tensor grad_b2)";

// saved: logits and what follows rows_per_expert in the results of forward. Of the results those
// that `needs` does not name come back empty. main_grads: none, or a float32 buffer for each
// parameter that `needs` names, in order, to which its gradient is added in place of a result.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_layer_backward(
    const Tensor& grad_out, const OptionalTensor& grad_logits, const Tensor& x,
    const Tensor& router_weight, const OptionalTensor& router_bias, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, const Tensors& saved,
    const Integers& options, const Reals& reals, const Needs& needs, const Tensors& main_grads) {
  const Views views("moe_layer_backward");
  const Call call(x);
  const LayerCall layer = unpack(views, options, reals);
  const auto [logits, topk_ids, token_ids, expert_ids, routing_weights, h, metadata] =
      exactly<7>(views, "saved", saved);
  sonicmoe::MoELayerBackwardArgs args =
      backward_args(views, layer, x, router_weight, w1, b1, w2, b2,
                    {logits, topk_ids, token_ids, expert_ids, routing_weights, metadata});
  args.grad_out = views.rows("grad_out", grad_out);
  args.grad_logits = views.rows("grad_logits", grad_logits);
  args.saved.h = views.out("h", h);
  // Before anything is allocated.
  const auto shape = shape_of(views, args);

  Gradients gradients(views, x, needs, 7, main_grads);
  const Gradient grad_x = gradients.of_input("grad_x", x);
  const Gradient grad_router_weight = gradients.of_weight("grad_router_weight", router_weight);
  const Gradient grad_router_bias = gradients.of_bias("grad_router_bias", router_bias);
  const Gradient grad_w1 = gradients.of_weight("grad_w1", w1);
  const Gradient grad_b1 = gradients.of_bias("grad_b1", b1);
  const Gradient grad_w2 = gradients.of_weight("grad_w2", w2);
  const Gradient grad_b2 = gradients.of_bias("grad_b2", b2);
  args.grad_x = grad_x.view;
  args.grad_router_weight = grad_router_weight.view;
  args.grad_router_bias = grad_router_bias.view;
  args.grad_w1 = grad_w1.view;
  args.grad_b1 = grad_b1.view;
  args.grad_w2 = grad_w2.view;
  args.grad_b2 = grad_b2.view;
  args.accumulate = gradients.accumulate();

  run_step(views, call, x, shape, args, sonicmoe::BackwardStep::kAll);
  return {grad_x.tensor,           grad_router_weight.tensor,
          grad_router_bias.tensor, grad_w1.tensor,
          grad_b1.tensor,          grad_w2.tensor,
          grad_b2.tensor};
}

// Backward by three operators, so that the caller can let h go after the first and scaled_a after
// the second. `saved` begins with logits, topk_ids, token_ids, expert_ids, routing_weights and
// metadata of forward.
constexpr const char* kHiddenSchema =
    "moe_layer_backward_hidden(Tensor grad_out, Tensor x, Tensor router_weight, Tensor w1, "
    "Tensor? b1, Tensor w2, Tensor? b2, Tensor[] saved, int[] options, float[] reals) -> "
    "(Tensor grad_h, Tensor scaled_a, Tensor row_lists, Tensor grad_routing_weights)";

// saved: h as well.
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_layer_backward_hidden(
    const Tensor& grad_out, const Tensor& x, const Tensor& router_weight, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2, const Tensors& saved,
    const Integers& options, const Reals& reals) {
  const Views views("moe_layer_backward_hidden");
  const Call call(x);
  const LayerCall layer = unpack(views, options, reals);
  const auto [logits, topk_ids, token_ids, expert_ids, routing_weights, metadata, h] =
      exactly<7>(views, "saved", saved);
  sonicmoe::MoELayerBackwardArgs args =
      backward_args(views, layer, x, router_weight, w1, b1, w2, b2,
                    {logits, topk_ids, token_ids, expert_ids, routing_weights, metadata});
  args.grad_out = views.rows("grad_out", grad_out);
  args.saved.h = views.out("h", h);
  const auto shape = shape_of(views, args);
  const HandedOn handed_on = new_handed_on(views, call, x, shape);
  const Tensor ds = new_like_contiguous(routing_weights, ScalarType::Float);
  args.grad_h = views.out("grad_h", handed_on.grad_h);
  args.scaled_a = views.out("scaled_a", handed_on.scaled_a);
  args.row_lists = views.out("row_lists", handed_on.row_lists);
  args.grad_routing_weights = views.out("grad_routing_weights", ds);
  run_step(views, call, x, shape, args, sonicmoe::BackwardStep::kHidden);
  return {handed_on.grad_h, handed_on.scaled_a, handed_on.row_lists, ds};
}

constexpr const char* kDownSchema =
    "moe_layer_backward_down(Tensor grad_out, Tensor x, Tensor router_weight, Tensor w1, "
    "Tensor? b1, Tensor w2, Tensor? b2, Tensor[] saved, int[] options, float[] reals, "
    "bool[] needs, Tensor(a!)[] main_grads) -> (Tensor grad_w2, Tensor grad_b2)";

// saved: scaled_a and row_lists as well.
std::tuple<Tensor, Tensor> moe_layer_backward_down(const Tensor& grad_out, const Tensor& x,
                                                   const Tensor& router_weight, const Tensor& w1,
                                                   const OptionalTensor& b1, const Tensor& w2,
                                                   const OptionalTensor& b2, const Tensors& saved,
                                                   const Integers& options, const Reals& reals,
                                                   const Needs& needs, const Tensors& main_grads) {
  const Views views("moe_layer_backward_down");
  const Call call(x);
  const LayerCall layer = unpack(views, options, reals);
  const auto [logits, topk_ids, token_ids, expert_ids, routing_weights, metadata, scaled_a,
              row_lists] = exactly<8>(views, "saved", saved);
  sonicmoe::MoELayerBackwardArgs args =
      backward_args(views, layer, x, router_weight, w1, b1, w2, b2,
                    {logits, topk_ids, token_ids, expert_ids, routing_weights, metadata});
  args.grad_out = views.rows("grad_out", grad_out);
  args.scaled_a = views.out("scaled_a", scaled_a);
  args.row_lists = views.out("row_lists", row_lists);
  const auto shape = shape_of(views, args);
  Gradients gradients(views, x, needs, 2, main_grads, 0);
  const Gradient grad_w2 = gradients.of_weight("grad_w2", w2);
  const Gradient grad_b2 = gradients.of_bias("grad_b2", b2);
  args.grad_w2 = grad_w2.view;
  args.grad_b2 = grad_b2.view;
  args.accumulate = gradients.accumulate();
  run_step(views, call, x, shape, args, sonicmoe::BackwardStep::kDown);
  return {grad_w2.tensor, grad_b2.tensor};
}

constexpr const char* kUpSchema =
    "moe_layer_backward_up(Tensor x, Tensor? grad_logits, Tensor router_weight, "
    "Tensor? router_bias, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor[] saved, "
    "int[] options, float[] reals, bool[] needs, Tensor(a!)[] main_grads) -> "
    "(Tensor grad_x, Tensor grad_router_weight, Tensor grad_router_bias, Tensor grad_w1, "
    "Tensor grad_b1)";

// saved: grad_h, row_lists and grad_routing_weights as well.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> moe_layer_backward_up(
    const Tensor& x, const OptionalTensor& grad_logits, const Tensor& router_weight,
    const OptionalTensor& router_bias, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
    const OptionalTensor& b2, const Tensors& saved, const Integers& options, const Reals& reals,
    const Needs& needs, const Tensors& main_grads) {
  const Views views("moe_layer_backward_up");
  const Call call(x);
  const LayerCall layer = unpack(views, options, reals);
  const auto [logits, topk_ids, token_ids, expert_ids, routing_weights, metadata, grad_h, row_lists,
              ds] = exactly<9>(views, "saved", saved);
  sonicmoe::MoELayerBackwardArgs given =
      backward_args(views, layer, x, router_weight, w1, b1, w2, b2,
                    {logits, topk_ids, token_ids, expert_ids, routing_weights, metadata});
  given.grad_h = views.out("grad_h", grad_h);
  given.row_lists = views.out("row_lists", row_lists);
  const auto shape = shape_of(views, given);
  Gradients gradients(views, x, needs, 5, main_grads);
  given.accumulate = gradients.accumulate();
  const Gradient grad_x = gradients.of_input("grad_x", x);
  const Gradient grad_router_weight = gradients.of_weight("grad_router_weight", router_weight);
  const Gradient grad_router_bias = gradients.of_bias("grad_router_bias", router_bias);
  {
    sonicmoe::MoELayerBackwardArgs args = given;
    args.grad_logits = views.rows("grad_logits", grad_logits);
    args.grad_routing_weights = views.out("grad_routing_weights", ds);
    args.grad_x = grad_x.view;
    args.grad_router_weight = grad_router_weight.view;
    args.grad_router_bias = grad_router_bias.view;
    run_step(views, call, x, shape, args, sonicmoe::BackwardStep::kInput);
  }
  const auto [grad_w1, grad_b1] = run_up(views, call, x, shape, given, gradients, w1, b1);
  return {grad_x.tensor, grad_router_weight.tensor, grad_router_bias.tensor, grad_w1, grad_b1};
}

}  // namespace

void define_moe_layer_ops(Library& library) {
  library.def(kForwardSchema);
  library.def(kBackwardSchema);
  library.def(kHiddenSchema);
  library.def(kDownSchema);
  library.def(kUpSchema);
}

void implement_moe_layer_ops(Library& library) {
  library.impl("moe_layer_forward", TORCH_BOX(&moe_layer_forward));
  library.impl("moe_layer_backward", TORCH_BOX(&moe_layer_backward));
  library.impl("moe_layer_backward_hidden", TORCH_BOX(&moe_layer_backward_hidden));
  library.impl("moe_layer_backward_down", TORCH_BOX(&moe_layer_backward_down));
  library.impl("moe_layer_backward_up", TORCH_BOX(&moe_layer_backward_up));
}

}  // namespace sonicmoe_torch
