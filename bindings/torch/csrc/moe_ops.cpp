// moe_forward and moe_backward: the experts with ready-made routing.
#include <string>
#include <tuple>

#include "backward_steps.hpp"
#include "gradients.hpp"
#include "kept_memory.hpp"
#include "ops.hpp"
#include "options.hpp"

namespace sonicmoe_torch {
namespace {

sonicmoe::Routing make_routing(const Views& views, const ExpertCall& experts, std::int64_t form,
                               const Tensor& ids, const OptionalTensor& token_ids,
                               const OptionalTensor& weights) {
  switch (static_cast<Form>(form)) {
    case Form::kTopK:
      return sonicmoe::TopKRouting{views.in("topk_ids", ids), views.in("topk_weights", weights),
                                   experts.first_expert};
    case Form::kSorted:
      return sonicmoe::SortedRouting{views.in("offsets", ids), views.in("row_weights", weights)};
    case Form::kPairs:
      return sonicmoe::PairRouting{views.in("token_ids", token_ids), views.in("expert_ids", ids),
                                   views.in("pair_weights", weights), experts.first_expert};
  }
  throw sonicmoe::Error("moe", "form", "0 to 2", std::to_string(form));
}

ExpertCall unpack(const Views& views, const Integers& options, const Reals& reals) {
  return unpack_routed_experts(PackedOptions(views.operation(), options, reals));
}

constexpr const char* kForwardSchema =
    "moe_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int form, Tensor ids, "
    "Tensor? token_ids, Tensor? weights, int[] options, float[] reals, bool save_for_backward) -> "
    "(Tensor y, Tensor h, Tensor metadata, Tensor rows_dropped)";

// x and y [..., d]; h [C, g*n] and metadata bytes, empty without save_for_backward; rows_dropped
// [1] int32, empty without max_rows.
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_forward(
    const Tensor& x, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
    const OptionalTensor& b2, std::int64_t form, const Tensor& ids, const OptionalTensor& token_ids,
    const OptionalTensor& weights, const Integers& options, const Reals& reals,
    bool save_for_backward) {
  const Views views("moe_forward");
  const Call call(x);
  const ExpertCall experts = unpack(views, options, reals);
  sonicmoe::MoEForwardArgs args{
      .options = experts.options,
      .x = views.rows("x", x),
      .weights = {views.in("w1", w1), views.in("b1", b1), views.in("w2", w2), views.in("b2", b2)},
      .routing = make_routing(views, experts, form, ids, token_ids, weights),
      .workspace_limit = experts.workspace_limit};
  const auto shape = views.ask(
      [&] { return sonicmoe::moe_shape(args.options, args.x, args.weights, args.routing); });
  const auto plan = views.ask([&] {
    return sonicmoe::moe_forward_workspace(call.context(), shape, !save_for_backward,
                                           args.workspace_limit);
  });

  const Tensor y = new_like_contiguous(x, x.scalar_type());
  Tensor h = nothing(x);
  Tensor metadata = new_bytes(x, 0);
  if (save_for_backward) {
    h = new_kept(x, {shape.row_capacity(), shape.h_columns()}, x.scalar_type());
    metadata = new_bytes(x, sonicmoe::moe_metadata_bytes(shape));
    args.h = views.out("h", h);
    args.metadata = views.out("metadata", metadata);
  }
  const Tensor rows_dropped = new_tensor(x, {shape.max_rows ? 1 : 0}, ScalarType::Int);
  if (shape.max_rows) args.rows_dropped = views.out("rows_dropped", rows_dropped);
  const Tensor workspace = new_workspace(x, plan.bytes, args.workspace_limit.has_value());
  args.out = views.out_rows("out", y);
  args.workspace = views.out("workspace", workspace);
  sonicmoe::moe_forward(call.context(), args);
  return {y, h, metadata, rows_dropped};
}

constexpr const char* kBackwardSchema =
    "moe_backward(Tensor grad_out, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "int form, Tensor ids, Tensor? token_ids, Tensor? weights, Tensor[] saved, int[] options, "
    "float[] reals, bool[] needs) -> (Tensor grad_x, Tensor grad_w1, Tensor grad_b1, "
    "Tensor grad_w2, Tensor grad_b2, Tensor grad_weights)";

// The inputs of a backward, without h.
sonicmoe::MoEBackwardArgs backward_args(const Views& views, const ExpertCall& experts,
                                        const Tensor& x, const Tensor& w1, const OptionalTensor& b1,
                                        const Tensor& w2, const OptionalTensor& b2,
                                        std::int64_t form, const Tensor& ids,
                                        const OptionalTensor& token_ids,
                                        const OptionalTensor& weights, const Tensor& metadata) {
  return {
      .options = experts.options,
      .x = views.rows("x", x),
      .weights = {views.in("w1", w1), views.in("b1", b1), views.in("w2", w2), views.in("b2", b2)},
      .routing = make_routing(views, experts, form, ids, token_ids, weights),
      .metadata = views.in("metadata", metadata),
      .workspace_limit = experts.workspace_limit};
}

// The inputs of a backward that begins at h. saved: h and metadata of forward.
sonicmoe::MoEBackwardArgs backward_args_of_h(const Views& views, const ExpertCall& experts,
                                             const Tensor& grad_out, const Tensor& x,
                                             const Tensor& w1, const OptionalTensor& b1,
                                             const Tensor& w2, const OptionalTensor& b2,
                                             std::int64_t form, const Tensor& ids,
                                             const OptionalTensor& token_ids,
                                             const OptionalTensor& weights, const Tensors& saved) {
  const auto [h, metadata] = exactly<2>(views, "saved", saved);
  sonicmoe::MoEBackwardArgs args =
      backward_args(views, experts, x, w1, b1, w2, b2, form, ids, token_ids, weights, metadata);
  args.grad_out = views.rows("grad_out", grad_out);
  args.h = views.in("h", h);
  return args;
}

sonicmoe::MoEShape shape_of(const Views& views, const sonicmoe::MoEBackwardArgs& args) {
  return views.ask(
      [&] { return sonicmoe::moe_shape(args.options, args.x, args.weights, args.routing); });
}

// saved: h and metadata of forward. Of the results those that `needs` does not name come back
// empty.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& w1, const OptionalTensor& b1,
    const Tensor& w2, const OptionalTensor& b2, std::int64_t form, const Tensor& ids,
    const OptionalTensor& token_ids, const OptionalTensor& weights, const Tensors& saved,
    const Integers& options, const Reals& reals, const Needs& needs) {
  const Views views("moe_backward");
  const Call call(x);
  const ExpertCall experts = unpack(views, options, reals);
  sonicmoe::MoEBackwardArgs args = backward_args_of_h(views, experts, grad_out, x, w1, b1, w2, b2,
                                                      form, ids, token_ids, weights, saved);
  // Before anything is allocated.
  const auto shape = shape_of(views, args);

  Gradients gradients(views, x, needs, 6);
  const Gradient grad_x = gradients.of_input("grad_x", x);
  const Gradient grad_w1 = gradients.of_weight("grad_w1", w1);
  const Gradient grad_b1 = gradients.of_bias("grad_b1", b1);
  const Gradient grad_w2 = gradients.of_weight("grad_w2", w2);
  const Gradient grad_b2 = gradients.of_bias("grad_b2", b2);
  const Gradient grad_weights = gradients.of_routing_weights("grad_routing_weights", weights);
  args.grad_x = grad_x.view;
  args.grad_w1 = grad_w1.view;
  args.grad_b1 = grad_b1.view;
  args.grad_w2 = grad_w2.view;
  args.grad_b2 = grad_b2.view;
  args.grad_routing_weights = grad_weights.view;

  run_step(views, call, x, shape, args, sonicmoe::BackwardStep::kAll);
  return {grad_x.tensor,  grad_w1.tensor, grad_b1.tensor,
          grad_w2.tensor, grad_b2.tensor, grad_weights.tensor};
}

// Backward by three operators, so that the caller can let h go after the first and scaled_a after
// the second.
constexpr const char* kHiddenSchema =
    "moe_backward_hidden(Tensor grad_out, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "int form, Tensor ids, Tensor? token_ids, Tensor? weights, Tensor[] saved, int[] options, "
    "float[] reals, bool need_weights) -> (Tensor grad_h, Tensor scaled_a, Tensor row_lists, "
    "Tensor grad_weights)";

// saved: h and metadata of forward.
std::tuple<Tensor, Tensor, Tensor, Tensor> moe_backward_hidden(
    const Tensor& grad_out, const Tensor& x, const Tensor& w1, const OptionalTensor& b1,
    const Tensor& w2, const OptionalTensor& b2, std::int64_t form, const Tensor& ids,
    const OptionalTensor& token_ids, const OptionalTensor& weights, const Tensors& saved,
    const Integers& options, const Reals& reals, bool need_weights) {
  const Views views("moe_backward_hidden");
  const Call call(x);
  const ExpertCall experts = unpack(views, options, reals);
  sonicmoe::MoEBackwardArgs args = backward_args_of_h(views, experts, grad_out, x, w1, b1, w2, b2,
                                                      form, ids, token_ids, weights, saved);
  const auto shape = shape_of(views, args);
  const HandedOn handed_on = new_handed_on(views, call, x, shape);
  const Needs needs{need_weights};
  const Gradient grad_weights =
      Gradients(views, x, needs, 1).of_routing_weights("grad_routing_weights", weights);
  args.grad_h = views.out("grad_h", handed_on.grad_h);
  args.scaled_a = views.out("scaled_a", handed_on.scaled_a);
  args.row_lists = views.out("row_lists", handed_on.row_lists);
  args.grad_routing_weights = grad_weights.view;
  run_step(views, call, x, shape, args, sonicmoe::BackwardStep::kHidden);
  return {handed_on.grad_h, handed_on.scaled_a, handed_on.row_lists, grad_weights.tensor};
}

constexpr const char* kDownSchema =
    "moe_backward_down(Tensor grad_out, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "int form, Tensor ids, Tensor? token_ids, Tensor? weights, Tensor[] saved, int[] options, "
    "float[] reals, bool[] needs) -> (Tensor grad_w2, Tensor grad_b2)";

// saved: metadata of forward; scaled_a and row_lists of moe_backward_hidden.
std::tuple<Tensor, Tensor> moe_backward_down(
    const Tensor& grad_out, const Tensor& x, const Tensor& w1, const OptionalTensor& b1,
    const Tensor& w2, const OptionalTensor& b2, std::int64_t form, const Tensor& ids,
    const OptionalTensor& token_ids, const OptionalTensor& weights, const Tensors& saved,
    const Integers& options, const Reals& reals, const Needs& needs) {
  const Views views("moe_backward_down");
  const Call call(x);
  const ExpertCall experts = unpack(views, options, reals);
  const auto [metadata, scaled_a, row_lists] = exactly<3>(views, "saved", saved);
  sonicmoe::MoEBackwardArgs args =
      backward_args(views, experts, x, w1, b1, w2, b2, form, ids, token_ids, weights, metadata);
  args.grad_out = views.rows("grad_out", grad_out);
  args.scaled_a = views.out("scaled_a", scaled_a);
  args.row_lists = views.out("row_lists", row_lists);
  const auto shape = shape_of(views, args);
  Gradients gradients(views, x, needs, 2);
  const Gradient grad_w2 = gradients.of_weight("grad_w2", w2);
  const Gradient grad_b2 = gradients.of_bias("grad_b2", b2);
  args.grad_w2 = grad_w2.view;
  args.grad_b2 = grad_b2.view;
  run_step(views, call, x, shape, args, sonicmoe::BackwardStep::kDown);
  return {grad_w2.tensor, grad_b2.tensor};
}

constexpr const char* kUpSchema =
    "moe_backward_up(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int form, Tensor ids, "
    "Tensor? token_ids, Tensor? weights, Tensor[] saved, int[] options, float[] reals, "
    "bool[] needs) -> (Tensor grad_x, Tensor grad_w1, Tensor grad_b1)";

// saved: metadata of forward; grad_h and row_lists of moe_backward_hidden.
std::tuple<Tensor, Tensor, Tensor> moe_backward_up(
    const Tensor& x, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
    const OptionalTensor& b2, std::int64_t form, const Tensor& ids, const OptionalTensor& token_ids,
    const OptionalTensor& weights, const Tensors& saved, const Integers& options,
    const Reals& reals, const Needs& needs) {
  const Views views("moe_backward_up");
  const Call call(x);
  const ExpertCall experts = unpack(views, options, reals);
  const auto [metadata, grad_h, row_lists] = exactly<3>(views, "saved", saved);
  sonicmoe::MoEBackwardArgs given =
      backward_args(views, experts, x, w1, b1, w2, b2, form, ids, token_ids, weights, metadata);
  given.grad_h = views.out("grad_h", grad_h);
  given.row_lists = views.out("row_lists", row_lists);
  const auto shape = shape_of(views, given);
  Gradients gradients(views, x, needs, 3);
  const Gradient grad_x = gradients.of_input("grad_x", x);
  if (grad_x.view.defined()) {
    sonicmoe::MoEBackwardArgs args = given;
    args.grad_x = grad_x.view;
    run_step(views, call, x, shape, args, sonicmoe::BackwardStep::kInput);
  }
  const auto [grad_w1, grad_b1] = run_up(views, call, x, shape, given, gradients, w1, b1);
  return {grad_x.tensor, grad_w1, grad_b1};
}

}  // namespace

void define_moe_ops(Library& library) {
  library.def(kForwardSchema);
  library.def(kBackwardSchema);
  library.def(kHiddenSchema);
  library.def(kDownSchema);
  library.def(kUpSchema);
}

void implement_moe_ops(Library& library) {
  library.impl("moe_forward", TORCH_BOX(&moe_forward));
  library.impl("moe_backward", TORCH_BOX(&moe_backward));
  library.impl("moe_backward_hidden", TORCH_BOX(&moe_backward_hidden));
  library.impl("moe_backward_down", TORCH_BOX(&moe_backward_down));
  library.impl("moe_backward_up", TORCH_BOX(&moe_backward_up));
}

}  // namespace sonicmoe_torch
