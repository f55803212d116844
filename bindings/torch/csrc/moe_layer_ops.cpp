// moe_layer_forward, moe_layer_backward and moe_layer_backward_accumulate: router GEMM, routing and
// experts as one operator each way.
#include <string>
#include <tuple>

#include "kept_memory.hpp"
#include "ops.hpp"
#include "options.hpp"

// String literals shared by the three schemas, in this order everywhere.
#define SONICMOE_LAYER_WEIGHTS                                                              \
  "Tensor x, Tensor router_weight, Tensor? router_bias, Tensor w1, Tensor? b1, Tensor w2, " \
  "Tensor? b2, Tensor? selection_bias, "
#define SONICMOE_LAYER_SAVED                                              \
  "Tensor logits, Tensor topk_ids, Tensor token_ids, Tensor expert_ids, " \
  "Tensor pair_weights, Tensor h, Tensor metadata, "
#define SONICMOE_LAYER_OPTIONS                                                       \
  "int activation, int gate_up_layout, float limit, bool deterministic, int top_k, " \
  "int scoring, bool? renormalize, int num_groups, int top_groups, float scale, "    \
  "bool rounding, int tile, int policy, int? workspace_limit"

namespace sonicmoe_torch {
namespace {

/// The parameters of the layer, borrowed from the arguments of an operator.
struct Parameters {
  const Tensor& router_weight;
  const OptionalTensor& router_bias;
  const Tensor& w1;
  const OptionalTensor& b1;
  const Tensor& w2;
  const OptionalTensor& b2;

  sonicmoe::ExpertWeights experts(const Views& views) const {
    return {views.in("w1", w1), views.in("b1", b1), views.in("w2", w2), views.in("b2", b2)};
  }
};

/// What forward keeps, borrowed likewise. token_ids and expert_ids are empty for plain top-K.
struct Saved {
  const Tensor& topk_ids;
  const Tensor& token_ids;
  const Tensor& expert_ids;
  const Tensor& pair_weights;
  const Tensor& h;
  const Tensor& metadata;

  sonicmoe::MoELayerSaved views(const Views& views, bool rounding, bool with_h) const {
    sonicmoe::MoELayerSaved saved{.topk_ids = views.out("topk_ids", topk_ids),
                                  .token_ids = {},
                                  .expert_ids = {},
                                  .pair_weights = views.out("pair_weights", pair_weights),
                                  .h = {},
                                  .metadata = {}};
    if (rounding) {
      saved.token_ids = views.out("token_ids", token_ids);
      saved.expert_ids = views.out("expert_ids", expert_ids);
    }
    if (with_h) {
      saved.h = views.out("h", h);
      saved.metadata = views.out("metadata", metadata);
    }
    return saved;
  }
};

constexpr const char* kForwardSchema =
    "moe_layer_forward(" SONICMOE_LAYER_WEIGHTS "Tensor? seed_tensor, " SONICMOE_LAYER_OPTIONS
    ", int seed, bool save_for_backward) -> (Tensor y, Tensor logits, Tensor rows_per_expert, "
    "Tensor topk_ids, Tensor token_ids, Tensor expert_ids, Tensor pair_weights, Tensor h, "
    "Tensor metadata)";

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
moe_layer_forward(const Tensor& x, const Tensor& router_weight, const OptionalTensor& router_bias,
                  const Tensor& w1, const OptionalTensor& b1, const Tensor& w2,
                  const OptionalTensor& b2, const OptionalTensor& selection_bias,
                  const OptionalTensor& seed_tensor, std::int64_t activation,
                  std::int64_t gate_up_layout, double limit, bool deterministic, std::int64_t top_k,
                  std::int64_t scoring, std::optional<bool> renormalize, std::int64_t num_groups,
                  std::int64_t top_groups, double scale, bool rounding, std::int64_t tile,
                  std::int64_t policy, std::optional<std::int64_t> workspace_limit,
                  std::int64_t seed, bool save_for_backward) {
  const Views views("moe_layer_forward");
  const Call call(x);
  const Parameters parameters{router_weight, router_bias, w1, b1, w2, b2};
  sonicmoe::MoELayerForwardArgs args{
      .options = {.experts = expert_options(activation, gate_up_layout, limit, deterministic),
                  .router = router_options(views, top_k, scoring, renormalize, selection_bias,
                                           num_groups, top_groups, scale),
                  .rounding = {}},
      .x = views.in("x", x),
      .router_weight = views.in("router_weight", router_weight),
      .router_bias = views.in("router_bias", router_bias),
      .weights = parameters.experts(views),
      .workspace_limit = byte_limit(workspace_limit)};
  if (rounding) args.options.rounding = rounding_options(views, tile, policy, seed, seed_tensor);
  const auto shape = sonicmoe::moe_layer_shape(args.options, args.x, args.weights);
  const auto plan = sonicmoe::moe_layer_forward_workspace(call.context(), args.options, shape,
                                                          !save_for_backward, args.workspace_limit);

  const Tensor y = new_tensor(x, {shape.num_tokens, shape.hidden_size}, x.scalar_type());
  const Tensor logits = new_tensor(x, {shape.num_tokens, shape.num_experts}, ScalarType::Float);
  const Tensor rows = new_tensor(x, {shape.num_experts}, ScalarType::Int);
  const Tensor topk_ids = new_tensor(x, {shape.num_tokens, top_k}, ScalarType::Int);
  const std::int64_t listed = rounding ? shape.num_pairs : 0;
  const Tensor token_ids = new_tensor(x, {listed}, ScalarType::Int);
  const Tensor expert_ids = new_tensor(x, {listed}, ScalarType::Int);
  const Tensor pair_weights = rounding ? new_tensor(x, {listed}, ScalarType::Float)
                                       : new_like_contiguous(topk_ids, ScalarType::Float);
  const Tensor h = save_for_backward
                       ? new_kept(x, {shape.num_pairs, shape.h_columns()}, x.scalar_type())
                       : nothing(x);
  const Tensor metadata = new_bytes(x, save_for_backward ? sonicmoe::moe_metadata_bytes(shape) : 0);
  const Tensor workspace = new_workspace(x, plan.bytes, args.workspace_limit.has_value());

  args.out = views.out("out", y);
  args.logits = views.out("logits", logits);
  args.rows_per_expert = views.out("rows_per_expert", rows);
  args.saved = Saved{topk_ids, token_ids, expert_ids, pair_weights, h, metadata}.views(
      views, rounding, save_for_backward);
  args.workspace = views.out("workspace", workspace);
  sonicmoe::moe_layer_forward(call.context(), args);
  return {y, logits, rows, topk_ids, token_ids, expert_ids, pair_weights, h, metadata};
}

/// Runs the backward with whatever gradients `args` already names.
void run_backward(const Call& call, const Views& views, const Tensor& x,
                  sonicmoe::MoELayerBackwardArgs& args) {
  const auto shape = sonicmoe::moe_layer_shape(args.options, args.x, args.weights);
  const auto plan = sonicmoe::moe_layer_backward_workspace(call.context(), args.options, shape,
                                                           args.workspace_limit);
  const Tensor workspace = new_workspace(x, plan.bytes, args.workspace_limit.has_value());
  args.workspace = views.out("workspace", workspace);
  sonicmoe::moe_layer_backward(call.context(), args);
}

constexpr const char* kBackwardSchema =
    "moe_layer_backward(Tensor grad_out, Tensor? grad_logits, " SONICMOE_LAYER_WEIGHTS
        SONICMOE_LAYER_SAVED SONICMOE_LAYER_OPTIONS
    ", bool need_x, bool need_router_weight, bool need_router_bias, bool need_w1, bool need_b1, "
    "bool need_w2, bool need_b2) -> (Tensor grad_x, Tensor grad_router_weight, "
    "Tensor grad_router_bias, Tensor grad_w1, Tensor grad_b1, Tensor grad_w2, Tensor grad_b2)";

// Gradients that are not needed come back empty. Weight gradients keep the layout of the weights.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> moe_layer_backward(
    const Tensor& grad_out, const OptionalTensor& grad_logits, const Tensor& x,
    const Tensor& router_weight, const OptionalTensor& router_bias, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
    const OptionalTensor& selection_bias, const Tensor& logits, const Tensor& topk_ids,
    const Tensor& token_ids, const Tensor& expert_ids, const Tensor& pair_weights, const Tensor& h,
    const Tensor& metadata, std::int64_t activation, std::int64_t gate_up_layout, double limit,
    bool deterministic, std::int64_t top_k, std::int64_t scoring, std::optional<bool> renormalize,
    std::int64_t num_groups, std::int64_t top_groups, double scale, bool rounding,
    std::int64_t tile, std::int64_t policy, std::optional<std::int64_t> workspace_limit,
    bool need_x, bool need_router_weight, bool need_router_bias, bool need_w1, bool need_b1,
    bool need_w2, bool need_b2) {
  const Views views("moe_layer_backward");
  const Call call(x);
  const Parameters parameters{router_weight, router_bias, w1, b1, w2, b2};
  const Saved saved{topk_ids, token_ids, expert_ids, pair_weights, h, metadata};
  sonicmoe::MoELayerBackwardArgs args{
      .options = {.experts = expert_options(activation, gate_up_layout, limit, deterministic),
                  .router = router_options(views, top_k, scoring, renormalize, selection_bias,
                                           num_groups, top_groups, scale),
                  .rounding = {}},
      .grad_out = views.in("grad_out", grad_out),
      .grad_logits = views.in("grad_logits", grad_logits),
      .x = views.in("x", x),
      .router_weight = views.in("router_weight", router_weight),
      .weights = parameters.experts(views),
      .logits = views.in("logits", logits),
      .saved = saved.views(views, rounding, true),
      .workspace_limit = byte_limit(workspace_limit)};
  if (rounding) args.options.rounding = rounding_options(views, tile, policy, 0, std::nullopt);

  require_present("moe_layer_backward", "need_router_bias", need_router_bias, router_bias);
  require_present("moe_layer_backward", "need_b1", need_b1, b1);
  require_present("moe_layer_backward", "need_b2", need_b2, b2);
  (void)sonicmoe::moe_layer_shape(args.options, args.x, args.weights);  // before allocating
  const auto gradient = [&](bool need, const Tensor& of) {
    return need ? new_kept_like(of) : nothing(of);
  };
  const auto optional_gradient = [&](bool need, const OptionalTensor& of) {
    return need ? new_like_contiguous(*of, of->scalar_type()) : nothing(x);
  };
  const Tensor grad_x =
      need_x ? new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type()) : nothing(x);
  const Tensor grad_router_weight = gradient(need_router_weight, router_weight);
  const Tensor grad_router_bias = optional_gradient(need_router_bias, router_bias);
  const Tensor grad_w1 = gradient(need_w1, w1);
  const Tensor grad_b1 = optional_gradient(need_b1, b1);
  const Tensor grad_w2 = gradient(need_w2, w2);
  const Tensor grad_b2 = optional_gradient(need_b2, b2);
  if (need_x) args.grad_x = views.out("grad_x", grad_x);
  if (need_router_weight) {
    args.grad_router_weight = views.out("grad_router_weight", grad_router_weight);
  }
  if (need_router_bias) args.grad_router_bias = views.out("grad_router_bias", grad_router_bias);
  if (need_w1) args.grad_w1 = views.out("grad_w1", grad_w1);
  if (need_b1) args.grad_b1 = views.out("grad_b1", grad_b1);
  if (need_w2) args.grad_w2 = views.out("grad_w2", grad_w2);
  if (need_b2) args.grad_b2 = views.out("grad_b2", grad_b2);
  run_backward(call, views, x, args);
  return {grad_x, grad_router_weight, grad_router_bias, grad_w1, grad_b1, grad_w2, grad_b2};
}

constexpr const char* kBackwardAccumulateSchema =
    "moe_layer_backward_accumulate(Tensor grad_out, Tensor? grad_logits, " SONICMOE_LAYER_WEIGHTS
        SONICMOE_LAYER_SAVED SONICMOE_LAYER_OPTIONS
    ", bool need_x, Tensor(a!)? main_router_weight, Tensor(b!)? main_router_bias, "
    "Tensor(c!)? main_w1, Tensor(d!)? main_b1, Tensor(e!)? main_w2, Tensor(f!)? main_b2) -> "
    "Tensor grad_x";

// As moe_layer_backward, but parameter gradients are added to float32 buffers of the caller; a
// parameter without a buffer gets no gradient.
Tensor moe_layer_backward_accumulate(
    const Tensor& grad_out, const OptionalTensor& grad_logits, const Tensor& x,
    const Tensor& router_weight, const OptionalTensor& router_bias, const Tensor& w1,
    const OptionalTensor& b1, const Tensor& w2, const OptionalTensor& b2,
    const OptionalTensor& selection_bias, const Tensor& logits, const Tensor& topk_ids,
    const Tensor& token_ids, const Tensor& expert_ids, const Tensor& pair_weights, const Tensor& h,
    const Tensor& metadata, std::int64_t activation, std::int64_t gate_up_layout, double limit,
    bool deterministic, std::int64_t top_k, std::int64_t scoring, std::optional<bool> renormalize,
    std::int64_t num_groups, std::int64_t top_groups, double scale, bool rounding,
    std::int64_t tile, std::int64_t policy, std::optional<std::int64_t> workspace_limit,
    bool need_x, const OptionalTensor& main_router_weight, const OptionalTensor& main_router_bias,
    const OptionalTensor& main_w1, const OptionalTensor& main_b1, const OptionalTensor& main_w2,
    const OptionalTensor& main_b2) {
  const Views views("moe_layer_backward");
  const Call call(x);
  const Parameters parameters{router_weight, router_bias, w1, b1, w2, b2};
  const Saved saved{topk_ids, token_ids, expert_ids, pair_weights, h, metadata};
  sonicmoe::MoELayerBackwardArgs args{
      .options = {.experts = expert_options(activation, gate_up_layout, limit, deterministic),
                  .router = router_options(views, top_k, scoring, renormalize, selection_bias,
                                           num_groups, top_groups, scale),
                  .rounding = {}},
      .grad_out = views.in("grad_out", grad_out),
      .grad_logits = views.in("grad_logits", grad_logits),
      .x = views.in("x", x),
      .router_weight = views.in("router_weight", router_weight),
      .weights = parameters.experts(views),
      .logits = views.in("logits", logits),
      .saved = saved.views(views, rounding, true),
      .grad_router_weight = views.out("grad_router_weight", main_router_weight),
      .grad_router_bias = views.out("grad_router_bias", main_router_bias),
      .grad_w1 = views.out("grad_w1", main_w1),
      .grad_b1 = views.out("grad_b1", main_b1),
      .grad_w2 = views.out("grad_w2", main_w2),
      .grad_b2 = views.out("grad_b2", main_b2),
      .accumulate = true,
      .workspace_limit = byte_limit(workspace_limit)};
  if (rounding) args.options.rounding = rounding_options(views, tile, policy, 0, std::nullopt);
  (void)sonicmoe::moe_layer_shape(args.options, args.x, args.weights);  // before allocating
  const Tensor grad_x =
      need_x ? new_tensor(x, {x.size(0), x.size(1)}, x.scalar_type()) : nothing(x);
  if (need_x) args.grad_x = views.out("grad_x", grad_x);
  run_backward(call, views, x, args);
  return grad_x;
}

}  // namespace

void define_moe_layer_ops(Library& library) {
  library.def(kForwardSchema);
  library.def(kBackwardSchema);
  library.def(kBackwardAccumulateSchema);
}

void implement_moe_layer_ops(Library& library) {
  library.impl("moe_layer_forward", TORCH_BOX(&moe_layer_forward));
  library.impl("moe_layer_backward", TORCH_BOX(&moe_layer_backward));
  library.impl("moe_layer_backward_accumulate", TORCH_BOX(&moe_layer_backward_accumulate));
}

}  // namespace sonicmoe_torch
