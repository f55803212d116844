// moe_forward and moe_backward: the experts with ready-made routing.
#include <string>
#include <tuple>

#include "kept_memory.hpp"
#include "ops.hpp"
#include "options.hpp"

namespace sonicmoe_torch {
namespace {

sonicmoe::Routing make_routing(const Views& views, std::int64_t form, const Tensor& ids,
                               const OptionalTensor& token_ids, const OptionalTensor& weights) {
  switch (static_cast<Form>(form)) {
    case Form::kTopK:
      return sonicmoe::TopKRouting{views.in("topk_ids", ids), views.in("topk_weights", weights)};
    case Form::kSorted:
      return sonicmoe::SortedRouting{views.in("offsets", ids), views.in("row_weights", weights)};
    case Form::kPairs:
      return sonicmoe::PairRouting{views.in("token_ids", token_ids), views.in("expert_ids", ids),
                                   views.in("pair_weights", weights)};
  }
  throw sonicmoe::Error("moe", "form", "0 to 2", std::to_string(form));
}

sonicmoe::ExpertWeights expert_weights(const Views& views, const Tensor& w1,
                                       const OptionalTensor& b1, const Tensor& w2,
                                       const OptionalTensor& b2) {
  return {views.in("w1", w1), views.in("b1", b1), views.in("w2", w2), views.in("b2", b2)};
}

constexpr const char* kForwardSchema =
    "moe_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, int form, Tensor ids, "
    "Tensor? token_ids, Tensor? weights, int activation, int gate_up_layout, float limit, "
    "bool deterministic, int? workspace_limit, bool save_for_backward) -> (Tensor y, Tensor h, "
    "Tensor metadata)";

// y [T, d], h [P, g*n], metadata bytes; the last two empty without save_for_backward.
std::tuple<Tensor, Tensor, Tensor> moe_forward(
    const Tensor& x, const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
    const OptionalTensor& b2, std::int64_t form, const Tensor& ids, const OptionalTensor& token_ids,
    const OptionalTensor& weights, std::int64_t activation, std::int64_t gate_up_layout,
    double limit, bool deterministic, std::optional<std::int64_t> workspace_limit,
    bool save_for_backward) {
  const Views views("moe_forward");
  const Call call(x);
  sonicmoe::MoEForwardArgs args{
      .options = expert_options(activation, gate_up_layout, limit, deterministic),
      .x = views.in("x", x),
      .weights = expert_weights(views, w1, b1, w2, b2),
      .routing = make_routing(views, form, ids, token_ids, weights),
      .workspace_limit = byte_limit(workspace_limit)};
  const auto shape = sonicmoe::moe_shape(args.options, args.x, args.weights, args.routing);
  const auto plan = sonicmoe::moe_forward_workspace(call.context(), shape, !save_for_backward,
                                                    args.workspace_limit);

  const Tensor y = new_tensor(x, {shape.num_tokens, shape.hidden_size}, x.scalar_type());
  Tensor h = nothing(x);
  Tensor metadata = new_bytes(x, 0);
  if (save_for_backward) {
    h = new_kept(x, {shape.num_pairs, shape.h_columns()}, x.scalar_type());
    metadata = new_bytes(x, sonicmoe::moe_metadata_bytes(shape));
    args.h = views.out("h", h);
    args.metadata = views.out("metadata", metadata);
  }
  const Tensor workspace = new_workspace(x, plan.bytes, args.workspace_limit.has_value());
  args.out = views.out("out", y);
  args.workspace = views.out("workspace", workspace);
  sonicmoe::moe_forward(call.context(), args);
  return {y, h, metadata};
}

/// Runs the backward with whatever gradients `args` already names.
void run_backward(const Call& call, const Views& views, const Tensor& x,
                  sonicmoe::MoEBackwardArgs& args) {
  const auto shape = sonicmoe::moe_shape(args.options, args.x, args.weights, args.routing);
  const auto plan = sonicmoe::moe_backward_workspace(call.context(), shape, args.workspace_limit);
  const Tensor workspace = new_workspace(x, plan.bytes, args.workspace_limit.has_value());
  args.workspace = views.out("workspace", workspace);
  sonicmoe::moe_backward(call.context(), args);
}

constexpr const char* kBackwardSchema =
    "moe_backward(Tensor grad_out, Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, "
    "int form, Tensor ids, Tensor? token_ids, Tensor? weights, Tensor h, Tensor metadata, "
    "int activation, int gate_up_layout, float limit, bool deterministic, int? workspace_limit, "
    "bool need_x, bool need_w1, bool need_b1, bool need_w2, bool need_b2, bool need_weights) -> "
    "(Tensor grad_x, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2, Tensor grad_b2, "
    "Tensor grad_weights)";

// Gradients that are not needed come back empty. Weight gradients keep the layout of the weights.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_backward(
    const Tensor& grad_out, const Tensor& x, const Tensor& w1, const OptionalTensor& b1,
    const Tensor& w2, const OptionalTensor& b2, std::int64_t form, const Tensor& ids,
    const OptionalTensor& token_ids, const OptionalTensor& weights, const Tensor& h,
    const Tensor& metadata, std::int64_t activation, std::int64_t gate_up_layout, double limit,
    bool deterministic, std::optional<std::int64_t> workspace_limit, bool need_x, bool need_w1,
    bool need_b1, bool need_w2, bool need_b2, bool need_weights) {
  const Views views("moe_backward");
  const Call call(x);
  sonicmoe::MoEBackwardArgs args{
      .options = expert_options(activation, gate_up_layout, limit, deterministic),
      .grad_out = views.in("grad_out", grad_out),
      .x = views.in("x", x),
      .weights = expert_weights(views, w1, b1, w2, b2),
      .routing = make_routing(views, form, ids, token_ids, weights),
      .h = views.in("h", h),
      .metadata = views.in("metadata", metadata),
      .workspace_limit = byte_limit(workspace_limit)};
  require_present("moe_backward", "need_b1", need_b1, b1);
  require_present("moe_backward", "need_b2", need_b2, b2);
  require_present("moe_backward", "need_weights", need_weights, weights);
  (void)sonicmoe::moe_shape(args.options, args.x, args.weights, args.routing);  // before allocating
  const Tensor grad_x =
      need_x ? new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type()) : nothing(x);
  const Tensor grad_w1 = need_w1 ? new_kept_like(w1) : nothing(w1);
  const Tensor grad_b1 = need_b1 ? new_like_contiguous(*b1, b1->scalar_type()) : nothing(w1);
  const Tensor grad_w2 = need_w2 ? new_kept_like(w2) : nothing(w2);
  const Tensor grad_b2 = need_b2 ? new_like_contiguous(*b2, b2->scalar_type()) : nothing(w2);
  const Tensor grad_weights = need_weights ? new_like_contiguous(*weights, ScalarType::Float)
                                           : new_tensor(x, {0}, ScalarType::Float);
  if (need_x) args.grad_x = views.out("grad_x", grad_x);
  if (need_w1) args.grad_w1 = views.out("grad_w1", grad_w1);
  if (need_b1) args.grad_b1 = views.out("grad_b1", grad_b1);
  if (need_w2) args.grad_w2 = views.out("grad_w2", grad_w2);
  if (need_b2) args.grad_b2 = views.out("grad_b2", grad_b2);
  if (need_weights) args.grad_routing_weights = views.out("grad_routing_weights", grad_weights);
  run_backward(call, views, x, args);
  return {grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_weights};
}

}  // namespace

void define_moe_ops(Library& library) {
  library.def(kForwardSchema);
  library.def(kBackwardSchema);
}

void implement_moe_ops(Library& library) {
  library.impl("moe_forward", TORCH_BOX(&moe_forward));
  library.impl("moe_backward", TORCH_BOX(&moe_backward));
}

}  // namespace sonicmoe_torch
