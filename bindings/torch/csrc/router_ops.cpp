// The router's logits, top-K routing, token rounding and the balancing losses.
#include <algorithm>
#include <numeric>
#include <tuple>

#include "gradients.hpp"
#include "ops.hpp"
#include "options.hpp"

namespace sonicmoe_torch {
namespace {

struct LogitsShape {
  std::int64_t num_tokens, num_experts;
  /// An allocatable extent for a top_k that the library has yet to refuse.
  std::int64_t columns(std::int64_t top_k) const {
    return std::clamp<std::int64_t>(top_k, 0, num_experts);
  }
};

/// Sizes for the outputs, which are made before the library sees the logits.
LogitsShape shape_of(const char* operation, const sonicmoe::ConstTensorView& logits) {
  if (logits.rank() != 2)
    throw sonicmoe::Error(operation, "logits", "2 dimensions", logits.describe());
  return {logits.size(0), logits.size(1)};
}

sonicmoe::RouterOptions unpack(PackedOptions packed, const Views& views,
                               const OptionalTensor& selection_bias) {
  const auto router = unpack_router(packed, views, selection_bias);
  packed.finish();
  return router;
}

/// [T, d] and [E, d], before anything is made of their sizes.
struct RouterShape {
  std::int64_t num_tokens, num_experts, hidden_size;
};
RouterShape shape_of(const Views& views, const sonicmoe::ConstTensorView& x,
                     const sonicmoe::ConstTensorView& weight) {
  if (x.rank() != 2) throw sonicmoe::Error(views.operation(), "x", "2 dimensions", x.describe());
  if (weight.rank() != 2) {
    throw sonicmoe::Error(views.operation(), "router_weight", "2 dimensions", weight.describe());
  }
  return {x.size(0), weight.size(0), x.size(1)};
}

constexpr const char* kRouterLogitsForwardSchema =
    "router_logits_forward(Tensor x, Tensor router_weight, Tensor? router_bias) -> Tensor logits";

// logits [T, E] float32.
Tensor router_logits_forward(const Tensor& x, const Tensor& router_weight,
                             const OptionalTensor& router_bias) {
  const Views views("router_logits_forward");
  const Call call(x);
  sonicmoe::RouterLogitsForwardArgs args{.x = views.in("x", x),
                                         .router_weight = views.in("router_weight", router_weight),
                                         .router_bias = views.in("router_bias", router_bias),
                                         .logits = {},
                                         .workspace = {}};
  const RouterShape shape = shape_of(views, args.x, args.router_weight);
  const std::size_t bytes = views.ask([&] {
    return sonicmoe::router_logits_forward_workspace_bytes(call.context(), shape.num_tokens,
                                                           shape.num_experts, shape.hidden_size);
  });
  const Tensor logits = new_tensor(x, {shape.num_tokens, shape.num_experts}, ScalarType::Float);
  const Tensor workspace = new_workspace(x, bytes, /*limited=*/false);
  args.logits = views.out("logits", logits);
  args.workspace = views.out("workspace", workspace);
  sonicmoe::router_logits_forward(call.context(), args);
  return logits;
}

constexpr const char* kRouterLogitsBackwardSchema =
    "router_logits_backward(Tensor grad_logits, Tensor x, Tensor router_weight, "
    "Tensor? router_bias, bool[] needs) -> "
    "(Tensor grad_x, Tensor grad_router_weight, Tensor grad_router_bias)";

// Those that `needs` does not name come back empty.
std::tuple<Tensor, Tensor, Tensor> router_logits_backward(const Tensor& grad_logits,
                                                          const Tensor& x,
                                                          const Tensor& router_weight,
                                                          const OptionalTensor& router_bias,
                                                          const Needs& needs) {
  const Views views("router_logits_backward");
  const Call call(x);
  sonicmoe::RouterLogitsBackwardArgs args{.x = views.in("x", x),
                                          .router_weight = views.in("router_weight", router_weight),
                                          .grad_logits = views.in("grad_logits", grad_logits),
                                          .grad_x = {},
                                          .grad_router_weight = {},
                                          .grad_router_bias = {},
                                          .workspace = {}};
  const RouterShape shape = shape_of(views, args.x, args.router_weight);
  const std::size_t bytes = views.ask([&] {
    return sonicmoe::router_logits_backward_workspace_bytes(call.context(), shape.num_tokens,
                                                            shape.num_experts, shape.hidden_size);
  });
  Gradients gradients(views, x, needs, 3);
  const Gradient of_x = gradients.of_input("grad_x", x);
  const Gradient of_weight = gradients.of_weight("grad_router_weight", router_weight);
  const Gradient of_bias = gradients.of_bias("grad_router_bias", router_bias);
  const Tensor workspace = new_workspace(x, bytes, /*limited=*/false);
  args.grad_x = of_x.view;
  args.grad_router_weight = of_weight.view;
  args.grad_router_bias = of_bias.view;
  args.workspace = views.out("workspace", workspace);
  sonicmoe::router_logits_backward(call.context(), args);
  return {of_x.tensor, of_weight.tensor, of_bias.tensor};
}

constexpr const char* kRouteForwardSchema =
    "route_forward(Tensor logits, Tensor? selection_bias, int[] options, float[] reals) -> "
    "(Tensor topk_ids, Tensor topk_weights)";

// topk_ids [T, K] int64 (as torch.topk gives them), topk_weights [T, K] float32.
std::tuple<Tensor, Tensor> route_forward(const Tensor& logits, const OptionalTensor& selection_bias,
                                         const Integers& options, const Reals& reals) {
  const Views views("route_forward");
  const Call call(logits);
  const auto router =
      unpack(PackedOptions(views.operation(), options, reals), views, selection_bias);
  const auto logits_view = views.in("logits", logits);
  const LogitsShape shape = shape_of("route_forward", logits_view);
  const Tensor ids =
      new_tensor(logits, {shape.num_tokens, shape.columns(router.top_k)}, ScalarType::Long);
  const Tensor weights = new_like_contiguous(ids, ScalarType::Float);
  sonicmoe::route_forward(call.context(), {.options = router,
                                           .logits = logits_view,
                                           .topk_ids = views.out("topk_ids", ids),
                                           .topk_weights = views.out("topk_weights", weights),
                                           .rows_per_expert = {}});
  return {ids, weights};
}

constexpr const char* kRouteBackwardSchema =
    "route_backward(Tensor grad_topk_weights, Tensor logits, Tensor topk_ids, int[] options, "
    "float[] reals) -> Tensor grad_logits";

Tensor route_backward(const Tensor& grad_topk_weights, const Tensor& logits, const Tensor& topk_ids,
                      const Integers& options, const Reals& reals) {
  const Views views("route_backward");
  const Call call(logits);
  const auto router = unpack(PackedOptions(views.operation(), options, reals), views, std::nullopt);
  const Tensor grad_logits = new_like_contiguous(logits, ScalarType::Float);
  sonicmoe::route_backward(call.context(),
                           {.options = router,
                            .logits = views.in("logits", logits),
                            .topk_ids = views.in("topk_ids", topk_ids),
                            .grad_topk_weights = views.in("grad_topk_weights", grad_topk_weights),
                            .grad_logits = views.out("grad_logits", grad_logits)});
  return grad_logits;
}

constexpr const char* kRoundTokensForwardSchema =
    "round_tokens_forward(Tensor logits, Tensor? selection_bias, Tensor? seed_tensor, "
    "int[] options, float[] reals) -> (Tensor token_ids, Tensor expert_ids, Tensor pair_weights, "
    "Tensor topk_ids, Tensor rows_per_expert, Tensor rows_per_expert_before)";

struct RoundingCall {
  sonicmoe::RouterOptions router;
  sonicmoe::RoundingOptions rounding;
};

/// Of both operators: the options of the router, then those of the rounding.
RoundingCall unpack(PackedOptions packed, const Views& views, const OptionalTensor& selection_bias,
                    const OptionalTensor& seed_tensor) {
  const RoundingCall call{.router = unpack_router(packed, views, selection_bias),
                          .rounding = unpack_rounding(packed, views, seed_tensor)};
  packed.finish();
  return call;
}

using RoundedTokens = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

RoundedTokens round_tokens(const Views& views, const Tensor& logits,
                           const OptionalTensor& selection_bias, const OptionalTensor& seed_tensor,
                           const OptionalTensor& targets, const Integers& options,
                           const Reals& reals) {
  const Call call(logits);
  const auto [router, rounding] =
      unpack(PackedOptions(views.operation(), options, reals), views, selection_bias, seed_tensor);
  const auto logits_view = views.in("logits", logits);
  const LogitsShape shape = shape_of(views.operation(), logits_view);
  const std::int64_t capacity = views.ask([&] {
    return sonicmoe::rounded_capacity(shape.num_tokens, shape.num_experts, router.top_k, rounding);
  });

  const Tensor token_ids = new_tensor(logits, {capacity}, ScalarType::Int);
  const Tensor expert_ids = new_tensor(logits, {capacity}, ScalarType::Int);
  const Tensor pair_weights = new_tensor(logits, {capacity}, ScalarType::Float);
  const Tensor topk_ids = new_tensor(logits, {shape.num_tokens, router.top_k}, ScalarType::Int);
  const Tensor rows = new_tensor(logits, {shape.num_experts}, ScalarType::Int);
  const Tensor rows_before = new_tensor(logits, {shape.num_experts}, ScalarType::Int);
  const Tensor workspace =
      new_bytes(logits, sonicmoe::round_tokens_workspace_bytes(call.context(), shape.num_tokens,
                                                               shape.num_experts, router.top_k));
  sonicmoe::round_tokens_forward(
      call.context(), {.options = router,
                       .rounding = rounding,
                       .logits = logits_view,
                       .targets = views.in("targets", targets),
                       .token_ids = views.out("token_ids", token_ids),
                       .expert_ids = views.out("expert_ids", expert_ids),
                       .pair_weights = views.out("pair_weights", pair_weights),
                       .topk_ids = views.out("topk_ids", topk_ids),
                       .rows_per_expert = views.out("rows_per_expert", rows),
                       .rows_per_expert_before = views.out("rows_per_expert_before", rows_before),
                       .workspace = views.out("workspace", workspace)});
  return {token_ids, expert_ids, pair_weights, topk_ids, rows, rows_before};
}

RoundedTokens round_tokens_forward(const Tensor& logits, const OptionalTensor& selection_bias,
                                   const OptionalTensor& seed_tensor, const Integers& options,
                                   const Reals& reals) {
  return round_tokens(Views("round_tokens_forward"), logits, selection_bias, seed_tensor,
                      std::nullopt, options, reals);
}

constexpr const char* kRoundTokensToForwardSchema =
    "round_tokens_to_forward(Tensor logits, Tensor? selection_bias, Tensor targets, "
    "int[] options, float[] reals) -> (Tensor token_ids, Tensor expert_ids, Tensor pair_weights, "
    "Tensor topk_ids, Tensor rows_per_expert, Tensor rows_per_expert_before)";

// targets [E] int32: the row counts themselves. round_tokens_backward is its backward.
RoundedTokens round_tokens_to_forward(const Tensor& logits, const OptionalTensor& selection_bias,
                                      const Tensor& targets, const Integers& options,
                                      const Reals& reals) {
  return round_tokens(Views("round_tokens_to_forward"), logits, selection_bias, std::nullopt,
                      targets, options, reals);
}

constexpr const char* kRoundTokensBackwardSchema =
    "round_tokens_backward(Tensor grad_pair_weights, Tensor logits, Tensor topk_ids, "
    "Tensor token_ids, Tensor expert_ids, int[] options, float[] reals) -> Tensor grad_logits";

Tensor round_tokens_backward(const Tensor& grad_pair_weights, const Tensor& logits,
                             const Tensor& topk_ids, const Tensor& token_ids,
                             const Tensor& expert_ids, const Integers& options,
                             const Reals& reals) {
  const Views views("round_tokens_backward");
  const Call call(logits);
  const auto layer =
      unpack(PackedOptions(views.operation(), options, reals), views, std::nullopt, std::nullopt);
  const Tensor grad_logits = new_like_contiguous(logits, ScalarType::Float);
  sonicmoe::round_tokens_backward(
      call.context(), {.options = layer.router,
                       .logits = views.in("logits", logits),
                       .topk_ids = views.in("topk_ids", topk_ids),
                       .token_ids = views.in("token_ids", token_ids),
                       .expert_ids = views.in("expert_ids", expert_ids),
                       .grad_pair_weights = views.in("grad_pair_weights", grad_pair_weights),
                       .grad_logits = views.out("grad_logits", grad_logits)});
  return grad_logits;
}

constexpr const char* kLoadBalancingLossForwardSchema =
    "load_balancing_loss_forward(Tensor logits, Tensor rows_per_expert, int top_k, int scoring) "
    "-> Tensor loss";

/// Counts taken after token rounding hide what the router chose: where every expert is rounded to
/// zero rows the loss would be 0. Looked at where that costs no synchronisation.
void check_token_choice(const Tensor& logits, const Tensor& rows_per_expert, std::int64_t top_k) {
  if (rows_per_expert.is_cuda()) return;
  const auto* rows = static_cast<const std::int32_t*>(rows_per_expert.const_data_ptr());
  const std::int64_t sum = std::accumulate(rows, rows + rows_per_expert.numel(), std::int64_t{0});
  const std::int64_t choices = logits.size(0) * top_k;
  if (sum != choices) {
    throw sonicmoe::Error("load_balancing_loss_forward", "rows_per_expert",
                          "counts of token choice, " + std::to_string(choices) + " in sum",
                          "a sum of " + std::to_string(sum));
  }
}

Tensor load_balancing_loss_forward(const Tensor& logits, const Tensor& rows_per_expert,
                                   std::int64_t top_k, std::int64_t scoring) {
  const Views views("load_balancing_loss_forward");
  const Call call(logits);
  const Tensor loss = new_tensor(logits, {1}, ScalarType::Float);
  sonicmoe::load_balancing_loss_forward(
      call.context(), static_cast<sonicmoe::Scoring>(scoring), top_k, views.in("logits", logits),
      views.in("rows_per_expert", rows_per_expert), views.out("loss", loss));
  check_token_choice(logits, rows_per_expert, top_k);  // after all else is known to fit
  return loss;
}

constexpr const char* kLoadBalancingLossBackwardSchema =
    "load_balancing_loss_backward(Tensor grad_loss, Tensor logits, Tensor rows_per_expert, "
    "int top_k, int scoring) -> Tensor grad_logits";

Tensor load_balancing_loss_backward(const Tensor& grad_loss, const Tensor& logits,
                                    const Tensor& rows_per_expert, std::int64_t top_k,
                                    std::int64_t scoring) {
  const Views views("load_balancing_loss_backward");
  const Call call(logits);
  const Tensor grad_logits = new_like_contiguous(logits, ScalarType::Float);
  sonicmoe::load_balancing_loss_backward(
      call.context(), static_cast<sonicmoe::Scoring>(scoring), top_k, views.in("logits", logits),
      views.in("rows_per_expert", rows_per_expert), views.in("grad_loss", grad_loss),
      views.out("grad_logits", grad_logits));
  return grad_logits;
}

constexpr const char* kRouterZLossForwardSchema =
    "router_z_loss_forward(Tensor logits) -> Tensor loss";

Tensor router_z_loss_forward(const Tensor& logits) {
  const Views views("router_z_loss_forward");
  const Call call(logits);
  const Tensor loss = new_tensor(logits, {1}, ScalarType::Float);
  sonicmoe::router_z_loss_forward(call.context(), views.in("logits", logits),
                                  views.out("loss", loss));
  return loss;
}

constexpr const char* kRouterZLossBackwardSchema =
    "router_z_loss_backward(Tensor grad_loss, Tensor logits) -> Tensor grad_logits";

Tensor router_z_loss_backward(const Tensor& grad_loss, const Tensor& logits) {
  const Views views("router_z_loss_backward");
  const Call call(logits);
  const Tensor grad_logits = new_like_contiguous(logits, ScalarType::Float);
  sonicmoe::router_z_loss_backward(call.context(), views.in("logits", logits),
                                   views.in("grad_loss", grad_loss),
                                   views.out("grad_logits", grad_logits));
  return grad_logits;
}

constexpr const char* kUpdateExpertBiasSchema =
    "update_expert_bias_(Tensor(a!) selection_bias, Tensor rows_per_expert, float rate) -> ()";

void update_expert_bias(const Tensor& selection_bias, const Tensor& rows_per_expert, double rate) {
  const Views views("update_expert_bias");
  const Call call(selection_bias);
  sonicmoe::update_expert_bias(call.context(), views.out("selection_bias", selection_bias),
                               views.in("rows_per_expert", rows_per_expert),
                               static_cast<float>(rate));
}

}  // namespace

void define_router_ops(Library& library) {
  for (const char* schema :
       {kRouterLogitsForwardSchema, kRouterLogitsBackwardSchema, kRouteForwardSchema,
        kRouteBackwardSchema, kRoundTokensForwardSchema, kRoundTokensToForwardSchema,
        kRoundTokensBackwardSchema, kLoadBalancingLossForwardSchema,
        kLoadBalancingLossBackwardSchema, kRouterZLossForwardSchema, kRouterZLossBackwardSchema,
        kUpdateExpertBiasSchema}) {
    library.def(schema);
  }
}

void implement_router_ops(Library& library) {
  library.impl("router_logits_forward", TORCH_BOX(&router_logits_forward));
  library.impl("router_logits_backward", TORCH_BOX(&router_logits_backward));
  library.impl("route_forward", TORCH_BOX(&route_forward));
  library.impl("route_backward", TORCH_BOX(&route_backward));
  library.impl("round_tokens_forward", TORCH_BOX(&round_tokens_forward));
  library.impl("round_tokens_to_forward", TORCH_BOX(&round_tokens_to_forward));
  library.impl("round_tokens_backward", TORCH_BOX(&round_tokens_backward));
  library.impl("load_balancing_loss_forward", TORCH_BOX(&load_balancing_loss_forward));
  library.impl("load_balancing_loss_backward", TORCH_BOX(&load_balancing_loss_backward));
  library.impl("router_z_loss_forward", TORCH_BOX(&router_z_loss_forward));
  library.impl("router_z_loss_backward", TORCH_BOX(&router_z_loss_backward));
  library.impl("update_expert_bias_", TORCH_BOX(&update_expert_bias));
}

}  // namespace sonicmoe_torch
