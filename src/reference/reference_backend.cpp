// The backend of last resort: the float64 oracle, rounded once into the caller's tensors. It serves
// the CPU everywhere, allocates float64 copies of its inputs and is orders of magnitude slower than
// the cpu backend; its use is to be compared with.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "core/metadata.hpp"
#include "layer/composed_backend.hpp"
#include "oracle/balancing.hpp"
#include "oracle/experts.hpp"
#include "oracle/rounding.hpp"
#include "oracle/router.hpp"
#include "router/scoring.hpp"
#include "router/token_ids.hpp"
#include "router/token_rounding.hpp"
#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

using oracle::Ids;
using oracle::to_double;
using oracle::to_ids;
using oracle::Values;

void write_element(const TensorView& view, std::int64_t offset, double value, bool add) {
  if (view.dtype() == DType::kFloat32) {
    float& element = view.as<float>()[offset];
    element = static_cast<float>(add ? static_cast<double>(element) + value : value);
  } else {
    bfloat16& element = view.as<bfloat16>()[offset];
    element = bfloat16(static_cast<float>(add ? static_cast<float>(element) + value : value));
  }
}

// Rounds row-major `values` into a strided float32 or bfloat16 view, or adds them to it. An absent
// view takes nothing.
void write(const TensorView& view, const Values& values, bool add = false) {
  if (!view.defined()) return;
  for (std::size_t i = 0; i < values.size(); ++i) {
    auto rest = static_cast<std::int64_t>(i);
    std::int64_t offset = 0;
    for (int dim = view.rank() - 1; dim >= 0; --dim) {
      offset += rest % view.size(dim) * view.stride(dim);
      rest /= view.size(dim);
    }
    write_element(view, offset, values[i], add);
  }
}

// Into a contiguous int32 or int64 view; places past the ids become -1.
void write_ids(const TensorView& view, Ids ids) {
  if (!view.defined()) return;
  ids.resize(static_cast<std::size_t>(view.numel()), -1);
  visit_id_dtype(view.dtype(), [&]<class Id>(IdTag<Id>) {
    std::transform(ids.begin(), ids.end(), view.as<Id>(),
                   [](std::int64_t id) { return static_cast<Id>(id); });
  });
}

std::vector<oracle::Row> rows_of(const MoEShape& shape, const Metadata& metadata) {
  std::vector<oracle::Row> rows;
  for (std::int64_t e = 0; e < shape.num_experts; ++e) {
    for (std::int64_t r = metadata.first_row(e); r < metadata.offsets[e]; ++r) {
      rows.push_back({metadata.pair_of(r), metadata.token_of(r), e});
    }
  }
  return rows;
}

// What only contents can show is refused in the words of the other CPU backend.
void check_logits(const char* operation, const RouterOptions& options,
                  const ConstTensorView& logits) {
  const std::int64_t E = logits.size(1);
  check_selection_bias(operation, options, E);
  for (std::int64_t t = 0; t < logits.size(0); ++t) {
    const float* row = logits.as<float>() + t * E;
    const bool has_nan = std::any_of(row, row + E, [](float x) { return std::isnan(x); });
    const bool has_scores = !is_relative(score_function(options.scoring)) ||
                            std::isfinite(*std::max_element(row, row + E));
    if (has_nan || !has_scores) fail_unscorable(operation, logits.as<float>(), E, t);
  }
}

Ids targets_of(const ConstTensorView& targets) {
  return targets.defined() ? to_ids(targets) : Ids();
}

// [T, K], each token's K distinct and in 0..E-1.
Ids checked_ids(const char* operation, const ConstTensorView& topk_ids, std::int64_t num_experts) {
  Ids ids(static_cast<std::size_t>(topk_ids.size(1)));
  for (std::int64_t t = 0; t < topk_ids.size(0); ++t) {
    if (!load_ids(topk_ids, t, num_experts, ids.data())) {
      fail_token_ids(operation, topk_ids, num_experts, t);
    }
  }
  return to_ids(topk_ids);
}

Ids tokens_of_slots(std::size_t slots, std::int64_t top_k) {
  Ids tokens;
  for (std::size_t p = 0; p < slots; ++p) tokens.push_back(static_cast<std::int64_t>(p) / top_k);
  return tokens;
}

// The elements of a [T, E] matrix at the listed pairs.
Values elements(const Values& matrix, std::int64_t num_experts, const Ids& tokens,
                const Ids& experts) {
  Values result;
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    result.push_back(matrix[static_cast<std::size_t>(tokens[i] * num_experts + experts[i])]);
  }
  return result;
}

// The pairs' gradients as a matrix [T, E]; places that name no token and expert are unused.
Values as_matrix(const Ids& tokens, const Ids& experts, const Values& grad, std::int64_t num_tokens,
                 std::int64_t num_experts) {
  Values matrix(static_cast<std::size_t>(num_tokens * num_experts), 0.0);
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    const std::int64_t t = tokens[i], e = experts[i];
    if (t < 0 || t >= num_tokens || e < 0 || e >= num_experts) continue;
    matrix[static_cast<std::size_t>(t * num_experts + e)] += grad[i];
  }
  return matrix;
}

class ReferenceBackend final : public ComposedBackend {
 public:
  std::string_view name() const override { return "reference"; }
  std::string description() const override { return "float64 loops, 1 thread"; }
  bool serves(DeviceType type) const override { return type == DeviceType::kCpu; }

  // ------------------------------------------------------------------------------------ experts

  // The oracle brings its own memory, so there is nothing a limit could bound: one slab, no bytes
  // beyond a token amount.
  ExpertPlan plan_moe_forward(const Context&, const MoEShape& shape, bool,
                              std::optional<std::size_t>) const override {
    return fixed_plan(shape);
  }
  ExpertPlan plan_moe_backward(const Context&, const MoEShape& shape, std::optional<std::size_t>,
                               BackwardStep) const override {
    return fixed_plan(shape);
  }

  void moe_forward(const Context&, const ExpertPlan& plan,
                   const MoEForwardArgs& args) const override {
    const MoEShape& shape = plan.shape;
    std::vector<std::int32_t> own(moe_metadata_bytes(shape) / sizeof(std::int32_t) + 1);
    void* metadata = args.metadata.defined() ? args.metadata.data() : own.data();
    // Checks offsets, too.
    store_rows_dropped(args.rows_dropped,
                       build_metadata(shape, args.routing, metadata_view(shape, metadata)));
    // H is rounded as if stored in inference too: the same bits with and without it.
    const oracle::ForwardResult result = oracle::forward(
        {args.options, args.x, args.weights, args.routing}, oracle::Storage::kHidden);
    write(args.out, result.out);
    write(args.h, result.h);
  }

  void moe_backward(const Context&, const ExpertPlan& plan,
                    const MoEBackwardArgs& args) const override {
    write_gradients(args, backward_step(plan, args));
  }

  void moe_layer_backward(const Context& context, const LayerPlan& plan,
                          const MoELayerBackwardArgs& args) const override {
    const LayerBackwardScratch scratch = layer_scratch(plan, args);
    const MoEBackwardArgs experts = expert_args(args, scratch);
    oracle::BackwardResult result = backward_step(plan.experts, experts);
    if (!does(args.step, BackwardStep::kInput)) return write_gradients(experts, result);
    write(experts.grad_routing_weights, result.grad_routing_weights);
    // The router may still refuse the ids: before anything is added to the caller's gradients.
    host_grad_logits(context, args, scratch);
    const Values from_router =
        oracle::router_grad_x(to_double(scratch.grad_logits), args.router_weight);
    for (std::size_t i = 0; i < from_router.size(); ++i) result.grad_x[i] += from_router[i];
    write_gradients(experts, result);
    router_logits_backward(context, args.x, scratch.grad_logits, args.grad_router_weight,
                           args.grad_router_bias, args.accumulate, scratch.router);
  }

  // ------------------------------------------------------------------------------------- router

  void route_forward(const Context&, const RouteForwardArgs& args) const override {
    check_logits("route_forward", args.options, args.logits);
    const std::int64_t E = args.logits.size(1), K = args.options.top_k;
    const Values logits = to_double(args.logits);
    const Ids ids = oracle::token_choice(args.options, logits, E);
    write_ids(args.topk_ids, ids);
    write(args.topk_weights, elements(oracle::weight_matrix(args.options, logits, E, ids), E,
                                      tokens_of_slots(ids.size(), K), ids));
    Ids rows(static_cast<std::size_t>(E), 0);
    for (const std::int64_t id : ids) ++rows[static_cast<std::size_t>(id)];
    write_ids(args.rows_per_expert, rows);
  }

  void route_backward(const Context&, const RouteBackwardArgs& args) const override {
    const std::int64_t T = args.logits.size(0), E = args.logits.size(1), K = args.options.top_k;
    const Ids ids = checked_ids("route_backward", args.topk_ids, E);
    const Values grad =
        as_matrix(tokens_of_slots(ids.size(), K), ids, to_double(args.grad_topk_weights), T, E);
    write(args.grad_logits,
          oracle::weight_matrix_gradient(args.options, to_double(args.logits), E, ids, grad));
  }

  std::size_t round_tokens_workspace_bytes(const Context&, std::int64_t, std::int64_t,
                                           std::int64_t) const override {
    return kWorkspaceBytes;
  }

  void round_tokens_forward(const Context&, const RoundTokensForwardArgs& args) const override {
    check_logits("round_tokens_forward", args.options, args.logits);
    const std::int64_t T = args.logits.size(0), E = args.logits.size(1);
    const Values logits = to_double(args.logits);
    const Ids ids = oracle::token_choice(args.options, logits, E);
    check_targets("round_tokens_forward", args.targets, T, args.token_ids.numel());
    const oracle::RoundedRows rounded =
        oracle::round_rows(args.rounding, oracle::ranking_matrix(args.options, logits, E), ids, T,
                           targets_of(args.targets));
    Values weights = elements(oracle::weight_matrix(args.options, logits, E, ids), E,
                              rounded.token_ids, rounded.expert_ids);
    weights.resize(static_cast<std::size_t>(args.pair_weights.numel()), 0.0);
    write(args.pair_weights, weights);
    write_ids(args.topk_ids, ids);
    write_rounded(args, rounded);
  }

  void round_select(const Context&, const RoundSelectArgs& args) const override {
    const std::int64_t T = args.scores.size(0), E = args.scores.size(1);
    const auto* scores = args.scores.as<float>();
    for (std::int64_t i = 0; i < T * E; ++i) {
      if (!std::isnan(scores[i])) continue;
      throw Error("round_select", "scores", "numbers", "NaN for token " + std::to_string(i / E));
    }
    const Ids ids = checked_ids("round_select", args.topk_ids, E);
    check_targets("round_select", args.targets, T, args.token_ids.numel());
    write_rounded(args, oracle::round_rows(args.rounding, {scores, scores + T * E}, ids, T,
                                           targets_of(args.targets)));
  }

  void round_tokens_backward(const Context&, const RoundTokensBackwardArgs& args) const override {
    const std::int64_t T = args.logits.size(0), E = args.logits.size(1);
    const Ids ids = checked_ids("round_tokens_backward", args.topk_ids, E);
    const Values grad = as_matrix(to_ids(args.token_ids), to_ids(args.expert_ids),
                                  to_double(args.grad_pair_weights), T, E);
    write(args.grad_logits,
          oracle::weight_matrix_gradient(args.options, to_double(args.logits), E, ids, grad));
  }

  // ---------------------------------------------------------------------------------- balancing

  void load_balancing_loss_forward(const Context&, Scoring scoring, std::int64_t top_k,
                                   ConstTensorView logits, ConstTensorView rows_per_expert,
                                   TensorView loss) const override {
    const oracle::Balance balance{scoring, top_k, to_ids(rows_per_expert)};
    write(loss, {oracle::load_balancing_loss(balance, to_double(logits))});
  }
  void load_balancing_loss_backward(const Context&, Scoring scoring, std::int64_t top_k,
                                    ConstTensorView logits, ConstTensorView rows_per_expert,
                                    ConstTensorView grad_loss,
                                    TensorView grad_logits) const override {
    const oracle::Balance balance{scoring, top_k, to_ids(rows_per_expert)};
    write_scaled(grad_logits, grad_loss,
                 oracle::load_balancing_loss_gradient(balance, to_double(logits)));
  }
  void router_z_loss_forward(const Context&, ConstTensorView logits,
                             TensorView loss) const override {
    write(loss, {oracle::router_z_loss(to_double(logits), logits.size(1))});
  }
  void router_z_loss_backward(const Context&, ConstTensorView logits, ConstTensorView grad_loss,
                              TensorView grad_logits) const override {
    write_scaled(grad_logits, grad_loss,
                 oracle::router_z_loss_gradient(to_double(logits), logits.size(1)));
  }
  void update_expert_bias(const Context&, TensorView bias, ConstTensorView rows_per_expert,
                          float rate) const override {
    write(bias, oracle::updated_expert_bias(to_double(bias), to_ids(rows_per_expert), rate));
  }

  // ------------------------------------------------------------------------------- router GEMMs

  std::size_t router_logits_workspace_bytes(const Context&, const MoEShape&) const override {
    return 0;
  }
  std::size_t router_logits_backward_workspace_bytes(const Context&,
                                                     const MoEShape&) const override {
    return 0;
  }
  void router_logits(const Context&, ConstTensorView x, ConstTensorView weight,
                     ConstTensorView bias, TensorView logits, TensorView) const override {
    write(logits, oracle::router_logits(x, weight, bias));
  }
  void router_grad_x(const Context&, ConstTensorView grad_logits, ConstTensorView weight,
                     TensorView grad_x, TensorView) const override {
    write(grad_x, oracle::router_grad_x(to_double(grad_logits), weight));
  }
  void router_logits_backward(const Context&, ConstTensorView x, ConstTensorView grad_logits,
                              TensorView grad_weight, TensorView grad_bias, bool accumulate,
                              TensorView) const override {
    const oracle::RouterGradients result =
        oracle::router_gradients(to_double(grad_logits), grad_logits.size(1), x);
    write(grad_weight, result.weight, accumulate);
    write(grad_bias, result.bias, accumulate);
  }

 private:
  static constexpr std::size_t kWorkspaceBytes = 64;

  static ExpertPlan fixed_plan(const MoEShape& shape) {
    return {shape, {kWorkspaceBytes, kWorkspaceBytes, shape.hidden_size, 1}};
  }

  // The gradients that args.step asks for; kHidden writes what it hands on.
  static oracle::BackwardResult backward_step(const ExpertPlan& plan, const MoEBackwardArgs& args) {
    using enum BackwardStep;
    const Metadata metadata = metadata_view(plan.shape, const_cast<void*>(args.metadata.data()));
    check_metadata(plan.shape, metadata);
    const oracle::Problem problem{args.options, args.x, args.weights, args.routing};
    const std::vector<oracle::Row> rows = rows_of(plan.shape, metadata);
    if (args.step == kAll) {
      return oracle::backward(problem, rows, to_double(args.h), args.grad_out);
    }
    if (args.step == kDown) {
      return oracle::backward_down(problem, rows, to_double(args.scaled_a), args.grad_out);
    }
    if (args.step != kHidden) return oracle::backward_up(problem, rows, to_double(args.grad_h));
    const oracle::HiddenGradients hidden =
        oracle::backward_hidden(problem, rows, to_double(args.h), args.grad_out);
    write(args.grad_h, hidden.grad_h);
    write(args.scaled_a, hidden.scaled_a);
    oracle::BackwardResult result;
    result.grad_routing_weights = hidden.grad_routing_weights;
    return result;
  }

  static void write_gradients(const MoEBackwardArgs& args, const oracle::BackwardResult& result) {
    write(args.grad_routing_weights, result.grad_routing_weights);
    write(args.grad_x, result.grad_x);
    write(args.grad_w1, result.grad_w1, args.accumulate);
    write(args.grad_b1, result.grad_b1, args.accumulate);
    write(args.grad_w2, result.grad_w2, args.accumulate);
    write(args.grad_b2, result.grad_b2, args.accumulate);
  }

  // What round_tokens_forward and round_select have in common.
  template <class Args>
  static void write_rounded(const Args& args, const oracle::RoundedRows& rounded) {
    write_ids(args.token_ids, rounded.token_ids);
    write_ids(args.expert_ids, rounded.expert_ids);
    write_ids(args.rows_per_expert, rounded.rows_per_expert);
    write_ids(args.rows_per_expert_before, rounded.rows_per_expert_before);
  }
  static void write_scaled(const TensorView& view, const ConstTensorView& factor, Values values) {
    for (double& value : values) value *= to_double(factor)[0];
    write(view, values);
  }
};

}  // namespace

std::unique_ptr<Backend> make_reference_backend() { return std::make_unique<ReferenceBackend>(); }

}  // namespace sonicmoe
