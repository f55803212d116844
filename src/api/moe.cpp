// Validation and dispatch of moe_forward and moe_backward.
#include "sonicmoe/moe.hpp"

#include "api/arguments.hpp"
#include "api/checks.hpp"
#include "core/backend.hpp"
#include "core/check.hpp"
#include "core/metadata.hpp"
#include "core/workspace.hpp"

namespace sonicmoe {
namespace {

constexpr std::size_t kMetadataAlignment = 16;

std::int64_t check_routing(const Check& check, const TopKRouting& r, std::int64_t num_tokens) {
  check.rank("topk_ids", r.topk_ids, 2);
  check.dtype("topk_ids", r.topk_ids, {DType::kInt32, DType::kInt64});
  check.shape("topk_ids", r.topk_ids, {num_tokens, r.topk_ids.size(1)});
  check.contiguous("topk_ids", r.topk_ids);
  check.shape_like("topk_weights", r.topk_weights, r.topk_ids);
  check.dtype("topk_weights", r.topk_weights, {DType::kFloat32, DType::kBFloat16});
  check.contiguous("topk_weights", r.topk_weights);
  check.that(r.first_expert >= 0, "first_expert", "at least 0", std::to_string(r.first_expert));
  return r.topk_ids.numel();
}

std::int64_t check_routing(const Check& check, const SortedRouting& r, std::int64_t num_rows) {
  check.rank("offsets", r.offsets, 1);
  check.dtype("offsets", r.offsets, {DType::kInt32});
  check.contiguous("offsets", r.offsets);
  if (r.row_weights.defined()) {
    check.shape("row_weights", r.row_weights, {num_rows});
    check.dtype("row_weights", r.row_weights, {DType::kFloat32, DType::kBFloat16});
    check.contiguous("row_weights", r.row_weights);
  }
  return num_rows;
}

std::int64_t check_routing(const Check& check, const PairRouting& r, std::int64_t) {
  check.rank("token_ids", r.token_ids, 1);
  check.dtype("token_ids", r.token_ids, {DType::kInt32, DType::kInt64});
  check.contiguous("token_ids", r.token_ids);
  check.shape_like("expert_ids", r.expert_ids, r.token_ids);
  check.dtype("expert_ids", r.expert_ids, {r.token_ids.dtype()});
  check.contiguous("expert_ids", r.expert_ids);
  check.shape_like("pair_weights", r.pair_weights, r.token_ids);
  check.dtype("pair_weights", r.pair_weights, {DType::kFloat32, DType::kBFloat16});
  check.contiguous("pair_weights", r.pair_weights);
  check.that(r.first_expert >= 0, "first_expert", "at least 0", std::to_string(r.first_expert));
  return r.token_ids.numel();
}

void check_weights(const Check& check, const MoEShape& shape, const ExpertWeights& w) {
  const std::int64_t e = shape.num_experts;
  check.rank("w1", w.w1, 3);
  // Which of two weights is the odd one cannot be known: the error shows both.
  const bool fits =
      w.w1.size(0) == e && w.w1.size(1) == shape.h_columns() && w.w1.size(2) == shape.hidden_size;
  check.that(fits, "w1",
             "shape [" + std::to_string(e) + ", " + std::to_string(shape.h_columns()) + ", " +
                 std::to_string(shape.hidden_size) + "] to go with w2 " + w.w2.describe(),
             w.w1.describe());
  check.dtype("w1", w.w1, {shape.numerics.storage});
  check.unit_stride_in_a_matrix_dim("w1", w.w1);
  check.unit_stride_in_a_matrix_dim("w2", w.w2);
  if (w.b1.defined()) {
    check.shape("b1", w.b1, {e, shape.h_columns()});
    check.dtype("b1", w.b1, {shape.numerics.storage});
    check.unit_stride("b1", w.b1, 1);
  }
  if (w.b2.defined()) {
    check.shape("b2", w.b2, {e, shape.hidden_size});
    check.dtype("b2", w.b2, {shape.numerics.storage});
    check.unit_stride("b2", w.b2, 1);
  }
}

MoEShape checked_shape(const Check& check, const ExpertOptions& options, const ConstTensorView& x,
                       const ExpertWeights& weights, const Routing& routing) {
  check.rank("x", x, 2);
  check.dtype("x", x, {DType::kFloat32, DType::kBFloat16});
  check.unit_stride("x", x, 1);
  check.rank("w2", weights.w2, 3);
  check.dtype("w2", weights.w2, {x.dtype()});  // its sizes times g then fit 63 bits
  check_expert_options(check, options);
  MoEShape shape;
  shape.num_tokens = x.size(0);
  shape.hidden_size = x.size(1);
  shape.num_experts = weights.w2.size(0);
  shape.intermediate_size = weights.w2.size(2);
  shape.form = static_cast<MoEShape::Form>(routing.index());
  shape.activation = options.activation;
  shape.numerics = Numerics::of(x.dtype());
  shape.deterministic = options.deterministic;
  shape.max_rows = options.max_rows;
  check.that(shape.num_experts > 0, "w2", "at least one expert", weights.w2.describe());
  check.that(shape.hidden_size > 0, "x", "hidden_size > 0", x.describe());
  check.that(shape.intermediate_size > 0, "w2", "intermediate_size > 0", weights.w2.describe());
  check.shape("w2", weights.w2, {shape.num_experts, shape.hidden_size, shape.intermediate_size});
  check_weights(check, shape, weights);
  shape.num_pairs = std::visit(
      [&](const auto& form) { return check_routing(check, form, shape.num_tokens); }, routing);
  if (const auto* sorted = std::get_if<SortedRouting>(&routing)) {
    check.shape("offsets", sorted->offsets, {shape.num_experts});
  }
  check_shape(check, shape);
  return shape;
}

void check_h(const Check& check, const MoEShape& shape, const ConstTensorView& h) {
  check.shape("h", h, {shape.row_capacity(), shape.h_columns()});
  check.dtype("h", h, {shape.numerics.storage});
  check.contiguous("h", h);
}

void check_metadata_buffer(const Check& check, const MoEShape& shape,
                           const ConstTensorView& metadata) {
  check.buffer("metadata", metadata, moe_metadata_bytes(shape), kMetadataAlignment);
}

void check_bias_gradient(const Check& check, const char* name, const ConstTensorView& grad,
                         const ConstTensorView& bias, bool accumulate) {
  if (!grad.defined()) return;
  check.that(bias.defined(), name, "no gradient, since the bias is absent", grad.describe());
  check_parameter_gradient(check, name, grad, bias, accumulate);
}

// The tensors that only some steps take, in whose calls alone they may be present.
void check_tensors_of_step(const Check& check, const MoEBackwardArgs& args) {
  using enum BackwardStep;
  const bool hidden = does(args.step, kHidden), down = does(args.step, kDown);
  const bool input = does(args.step, kInput), up = does(args.step, kUp);
  const bool steps = args.step != kAll;
  const auto only = [&](bool takes, const char* name, const ConstTensorView& view) {
    check.that(takes || !view.defined(), name, "no tensor in this step", view.describe());
  };
  only(hidden || down, "grad_out", args.grad_out);
  only(hidden, "h", args.h);
  only(hidden, "grad_routing_weights", args.grad_routing_weights);
  only(down, "grad_w2", args.grad_w2);
  only(down, "grad_b2", args.grad_b2);
  only(input, "grad_x", args.grad_x);
  only(up, "grad_w1", args.grad_w1);
  only(up, "grad_b1", args.grad_b1);
  only(steps && !down, "grad_h", args.grad_h);
  only(steps && (hidden || down), "scaled_a", args.scaled_a);
  only(steps, "row_lists", args.row_lists);
}

// dH and A' of one step.
void check_handed_on(const Check& check, const MoEShape& shape, const MoEBackwardArgs& args) {
  using enum BackwardStep;
  if (args.step == kAll) return;
  const auto rows = [&](const char* name, const ConstTensorView& view, std::int64_t columns) {
    check.shape(name, view, {shape.row_capacity(), columns});
    check.dtype(name, view, {shape.numerics.storage});
    check.contiguous(name, view);
  };
  if (args.step != kDown) rows("grad_h", args.grad_h, shape.h_columns());
  if (args.step == kHidden || args.step == kDown) {
    rows("scaled_a", args.scaled_a, shape.intermediate_size);
  }
}

void check_gradients(const Check& check, const MoEBackwardArgs& args) {
  if (args.grad_x.defined()) {
    check.shape_like("grad_x", args.grad_x, args.x);
    check.dtype("grad_x", args.grad_x, {args.x.dtype()});
    check.unit_stride("grad_x", args.grad_x, 1);
  }
  check_parameter_gradient(check, "grad_w1", args.grad_w1, args.weights.w1, args.accumulate);
  check_parameter_gradient(check, "grad_w2", args.grad_w2, args.weights.w2, args.accumulate);
  check_bias_gradient(check, "grad_b1", args.grad_b1, args.weights.b1, args.accumulate);
  check_bias_gradient(check, "grad_b2", args.grad_b2, args.weights.b2, args.accumulate);
  if (args.grad_routing_weights.defined()) {
    const ConstTensorView& weights = routing_weights(args.routing);
    check.that(weights.defined(), "grad_routing_weights",
               "no gradient, since row_weights is absent", args.grad_routing_weights.describe());
    check.shape_like("grad_routing_weights", args.grad_routing_weights, weights);
    check.dtype("grad_routing_weights", args.grad_routing_weights, {DType::kFloat32});
    check.contiguous("grad_routing_weights", args.grad_routing_weights);
  }
}

}  // namespace

void check_step(const Check& check, BackwardStep step) {
  check.that(step <= BackwardStep::kUp, "step", "an enumerator",
             std::to_string(static_cast<int>(step)));
}

void check_expert_options(const Check& check, const ExpertOptions& options) {
  check.enumerator("activation", options.activation);
  check.enumerator("gate_up_layout", options.gate_up_layout);
  check.that(options.activation != Activation::kSwiGLUClamped || options.limit > 0.0f, "limit",
             "a positive limit", std::to_string(options.limit));
  check_max_rows(check, options.max_rows);
}

void check_max_rows(const Check& check, std::optional<std::int64_t> max_rows) {
  if (!max_rows) return;
  check.that(*max_rows >= 0, "max_rows", "at least 0", std::to_string(*max_rows));
}

void check_shape(const Check& check, const MoEShape& s) {
  constexpr std::int64_t kMostColumns = (std::int64_t{1} << 31) - 1;
  check.between("num_tokens", s.num_tokens, 0, kMostRows);
  check.between("hidden_size", s.hidden_size, 1, kMostColumns);
  check.between("intermediate_size", s.intermediate_size, 1, kMostColumns);
  check.between("num_experts", s.num_experts, 1, kMostColumns);
  check.between("num_pairs", s.num_pairs, 0, kMostRows);
  check_countable(check, s);
}

void check_numerics(const Check& check, const Numerics& numerics) {
  const bool known =
      numerics == Numerics::of(DType::kFloat32) || numerics == Numerics::of(DType::kBFloat16);
  check.that(known, "numerics", "float32 or bfloat16", to_string(numerics));
}

void check_countable(const Check& check, const MoEShape& s) {
  constexpr std::int64_t kMost = std::int64_t{1} << 59;
  check.enumerator("activation", s.activation);
  check.that(s.form <= MoEShape::Form::kPairs, "form", "an enumerator",
             std::to_string(static_cast<int>(s.form)));
  check_numerics(check, s.numerics);
  check.between("num_tokens", s.num_tokens, 0, kMost);
  check.between("hidden_size", s.hidden_size, 1, kMost);
  check.between("intermediate_size", s.intermediate_size, 1, kMost);
  check.between("num_experts", s.num_experts, 1, kMost);
  check.between("num_pairs", s.num_pairs, 0, kMost);
  check_max_rows(check, s.max_rows);
  if (s.form == MoEShape::Form::kSorted) {
    check.that(!s.max_rows, "max_rows", "none with sorted rows", std::to_string(*s.max_rows));
    check.that(s.num_pairs == s.num_tokens, "num_pairs",
               std::to_string(s.num_tokens) + ", num_tokens of sorted rows",
               std::to_string(s.num_pairs));
  } else if (s.form == MoEShape::Form::kTopK) {
    check.that(s.num_tokens == 0 ? s.num_pairs == 0 : s.num_pairs % s.num_tokens == 0, "num_pairs",
               "a multiple of num_tokens, " + std::to_string(s.num_tokens),
               std::to_string(s.num_pairs));
  }
  check.product("num_pairs * hidden_size", {s.num_pairs, s.hidden_size});
  check.product("num_pairs * g * intermediate_size", {s.num_pairs, s.h_columns()});
  check.product("num_tokens * num_experts", {s.num_tokens, s.num_experts});
  check.product("num_experts * g * intermediate_size * hidden_size",
                {s.num_experts, s.h_columns(), s.hidden_size});
}

void check_limit(const Check& check, const WorkspacePlan& plan, std::optional<std::size_t> limit) {
  if (!limit || plan.minimum_bytes <= *limit) return;
  check.fail("workspace_limit", "at least " + std::to_string(plan.minimum_bytes) + " bytes",
             std::to_string(*limit));
}

void check_workspace(const Check& check, const WorkspacePlan& plan, const TensorView& workspace,
                     std::optional<std::size_t> limit) {
  check_limit(check, plan, limit);
  check.buffer("workspace", workspace, plan.bytes, WorkspaceCarver::kAlignment);
  log_choice("workspace", [&] {
    return std::to_string(plan.bytes) + " bytes, d in " + std::to_string(plan.num_slabs) +
           (plan.num_slabs == 1 ? " slab" : " slabs");
  });
}

void check_parameter_gradient(const Check& check, const char* name, const ConstTensorView& grad,
                              const ConstTensorView& parameter, bool accumulate) {
  if (!grad.defined()) return;
  check.shape_like(name, grad, parameter);
  if (accumulate) {
    check.dtype(name, grad, {DType::kFloat32});
  } else {
    check.dtype(name, grad, {parameter.dtype(), DType::kFloat32});
  }
  if (grad.rank() == 3) {
    check.unit_stride_in_a_matrix_dim(name, grad);
  } else {
    check.unit_stride(name, grad, grad.rank() - 1);
  }
}

MoEShape moe_shape(const ExpertOptions& options, ConstTensorView x, const ExpertWeights& weights,
                   const Routing& routing) {
  return checked_shape(Check("moe_shape", x.device()), options, x, weights, routing);
}

std::size_t moe_h_bytes(const MoEShape& shape) {
  check_countable(Check("moe_h_bytes", Device{}), shape);
  return static_cast<std::size_t>(shape.row_capacity() * shape.h_columns()) *
         size_of(shape.numerics.storage);
}

std::size_t moe_metadata_bytes(const MoEShape& shape) {
  check_countable(Check("moe_metadata_bytes", Device{}), shape);
  std::int64_t entries = shape.num_experts;
  if (shape.form != MoEShape::Form::kSorted) entries += shape.num_pairs + 2 * shape.row_capacity();
  if (shape.form == MoEShape::Form::kPairs) entries += shape.num_pairs + shape.num_tokens + 1;
  return static_cast<std::size_t>(entries) * sizeof(std::int32_t);
}

WorkspacePlan moe_forward_workspace(const Context& context, const MoEShape& shape, bool inference,
                                    std::optional<std::size_t> workspace_limit) {
  return answer("moe_forward_workspace", context, [&](const Check& check) {
    check_shape(check, shape);
    const ExpertPlan plan = choose_backend(context, check.operation())
                                .plan_moe_forward(context, shape, inference, workspace_limit);
    check_limit(check, plan.workspace, workspace_limit);
    return plan.workspace;
  });
}

WorkspacePlan moe_backward_workspace(const Context& context, const MoEShape& shape,
                                     std::optional<std::size_t> workspace_limit,
                                     BackwardStep step) {
  return answer("moe_backward_workspace", context, [&](const Check& check) {
    check_shape(check, shape);
    check_step(check, step);
    const ExpertPlan plan = choose_backend(context, check.operation())
                                .plan_moe_backward(context, shape, workspace_limit, step);
    check_limit(check, plan.workspace, workspace_limit);
    return plan.workspace;
  });
}

std::size_t moe_row_lists_bytes(const Context& context, const MoEShape& shape) {
  return answer("moe_row_lists_bytes", context, [&](const Check& check) {
    check_shape(check, shape);
    return choose_backend(context, check.operation()).row_lists_bytes(shape);
  });
}

void check_row_lists(const Check& check, const Backend& backend, const MoEShape& shape,
                     const MoEBackwardArgs& args) {
  if (args.step == BackwardStep::kAll) return;
  check.buffer("row_lists", args.row_lists, backend.row_lists_bytes(shape),
               WorkspaceCarver::kAlignment);
  log_choice("step", [&] {
    constexpr const char* kNames[] = {"all", "hidden", "down", "input", "up"};
    return kNames[static_cast<int>(args.step)];
  });
}

MoEShape check_moe_forward(const Check& check, const MoEForwardArgs& args) {
  const MoEShape shape = checked_shape(check, args.options, args.x, args.weights, args.routing);
  check.shape_like("out", args.out, args.x);
  check.dtype("out", args.out, {shape.numerics.storage});
  check.unit_stride("out", args.out, 1);
  if (args.rows_dropped.defined()) {
    check.shape("rows_dropped", args.rows_dropped, {1});
    check.dtype("rows_dropped", args.rows_dropped, {DType::kInt32});
  }
  const bool inference = !args.h.defined();
  check.that(inference == !args.metadata.defined(), inference ? "h" : "metadata",
             "h and metadata together, or neither", "only one of them");
  if (inference) return shape;
  check_h(check, shape, args.h);
  check_metadata_buffer(check, shape, args.metadata);
  return shape;
}

void moe_forward(const Context& context, const MoEForwardArgs& args) {
  run_operation("moe_forward", context, [&](const Check& check) {
    const MoEShape shape = check_moe_forward(check, args);
    const Backend& backend = choose_backend(context, check.operation());
    backend.check_moe_forward(check, shape, args);
    const ExpertPlan plan =
        backend.plan_moe_forward(context, shape, !args.h.defined(), args.workspace_limit);
    check_workspace(check, plan.workspace, args.workspace, args.workspace_limit);
    check_memory(check, args);
    backend.moe_forward(context, plan, args);
  });
}

MoEShape check_moe_backward(const Check& check, const MoEBackwardArgs& args) {
  const MoEShape shape = checked_shape(check, args.options, args.x, args.weights, args.routing);
  check_step(check, args.step);
  check_tensors_of_step(check, args);
  const bool reads_h = does(args.step, BackwardStep::kHidden);
  if (reads_h || args.step == BackwardStep::kDown) {
    check.shape_like("grad_out", args.grad_out, args.x);
    check.dtype("grad_out", args.grad_out, {shape.numerics.storage});
    check.unit_stride("grad_out", args.grad_out, 1);
  }
  if (reads_h) check_h(check, shape, args.h);
  check_metadata_buffer(check, shape, args.metadata);
  check_handed_on(check, shape, args);
  check_gradients(check, args);
  return shape;
}

void moe_backward(const Context& context, const MoEBackwardArgs& args) {
  run_operation("moe_backward", context, [&](const Check& check) {
    const MoEShape shape = check_moe_backward(check, args);
    const Backend& backend = choose_backend(context, check.operation());
    backend.check_moe_backward(check, shape, args);
    check_row_lists(check, backend, shape, args);
    const ExpertPlan plan =
        backend.plan_moe_backward(context, shape, args.workspace_limit, args.step);
    check_workspace(check, plan.workspace, args.workspace, args.workspace_limit);
    check_memory(check, args);
    backend.moe_backward(context, plan, args);
  });
}

}  // namespace sonicmoe
