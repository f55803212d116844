// Backward without Y: dS = <dA', A>, so that only X, H and the row lists are kept.
#include <algorithm>

#include "cuda/experts/experts.hpp"

namespace sonicmoe::cuda {

BackwardSteps::Buffers BackwardSteps::carve(WorkspaceCarver& carver, const MoEShape& shape,
                                            std::int64_t slab) {
  constexpr std::int64_t kLeastPartialColumns = 128;
  Buffers b{};
  const std::int64_t parts = ceil_div(shape.intermediate_size, kLeastPartialColumns);
  b.tables = carve_row_tables(carver, shape);
  b.grad_h = carver.take_bytes(elements(shape.num_pairs, shape.h_columns()) * kElementBytes);
  const std::int64_t stored = stores_rows(shape) ? slab : 0;
  b.scaled_a = carver.take_bytes(
      elements(shape.num_pairs, std::max(shape.intermediate_size, stored)) * kElementBytes);
  b.dx_rows = b.scaled_a;
  b.partial = carver.take<float>(elements(shape.num_pairs, parts));
  return b;
}

ExpertPlan plan_backward(const MoEShape& shape, std::optional<std::size_t> limit) {
  return plan_slabs(shape, kSlabStep, limit, [&](std::int64_t slab) {
    WorkspaceCarver carver;
    BackwardSteps::carve(carver, shape, slab);
    return carver.used();
  });
}

void check_backward(const Check& check, const MoEShape& shape, const MoEBackwardArgs& args) {
  const ExpertCall call{shape, args.options, {}};
  const Matrix grad_out = matrix(args.grad_out);
  check.refuse(hopper::reason_against(
      call, HiddenGradientArgs{.grad_out = grad_out, .w2 = args.weights.w2, .h = args.h.data()}));
  if (args.grad_w2.defined()) {
    check.refuse(hopper::reason_against(
        call, DownWeightGradientArgs{.grad_out = grad_out, .grad_w2 = args.grad_w2}));
  }
  if (args.grad_x.defined()) {
    const Matrix out =
        stores_rows(shape) ? Matrix{nullptr, shape.hidden_size} : matrix(args.grad_x);
    auto objection = hopper::reason_against(
        call,
        InputGradientArgs{.w1 = args.weights.w1, .num_columns = shape.hidden_size, .out = out});
    if (objection && objection->argument == "out") objection->argument = "grad_x";
    check.refuse(objection);
  }
  if (args.grad_w1.defined()) {
    check.refuse(hopper::reason_against(
        call, UpWeightGradientArgs{.x = matrix(args.x), .grad_w1 = args.grad_w1}));
  }
}

BackwardSteps::BackwardSteps(const Context& context, const ExpertPlan& plan,
                             const MoEBackwardArgs& args)
    : args_(args), slab_(plan.workspace.slab_columns) {
  WorkspaceCarver carver(args.workspace.data());
  buffers_ = carve(carver, plan.shape, slab_);
  if (!routing_weights(args.routing).defined()) buffers_.tables.row_weight = nullptr;
  // The metadata is only read here; the view type is shared with the forward that fills it.
  metadata_ = metadata_view(plan.shape, const_cast<void*>(args.metadata.data()));
  call_ = expert_call(context, plan.shape, args.options, metadata_, buffers_.tables);
}

void BackwardSteps::rows() {
  const MoEShape& shape = call_.shape;
  const Matrix grad_out = matrix(args_.grad_out);
  build_row_tables(call_.stream, shape, args_.routing, metadata_, buffers_.tables);
  SONICMOE_RUN_GEMM(
      call_, hidden_gradient,
      HiddenGradientArgs{grad_out, args_.weights.w2, args_.h.data(), buffers_.tables.row_weight,
                         buffers_.grad_h, buffers_.scaled_a, buffers_.partial});
  if (!args_.grad_routing_weights.defined()) return;
  const std::int64_t width = hopper::partial_columns(shape);
  finish_weight_gradient(call_.stream, shape, metadata_, buffers_.partial,
                         static_cast<int>(ceil_div(shape.intermediate_size, width)), grad_out,
                         args_.weights.b2, args_.grad_routing_weights.as<float>());
}

void BackwardSteps::bias_gradients() {
  const MoEShape& shape = call_.shape;
  if (args_.grad_b1.defined()) {
    bias_gradient(call_.stream, shape, metadata_, {buffers_.grad_h, shape.h_columns()}, false,
                  nullptr, args_.grad_b1, args_.accumulate);
  }
  if (args_.grad_b2.defined()) {
    bias_gradient(call_.stream, shape, metadata_, matrix(args_.grad_out), true,
                  buffers_.tables.row_weight, args_.grad_b2, args_.accumulate);
  }
}

void BackwardSteps::grad_w2() {
  if (!args_.grad_w2.defined()) return;
  SONICMOE_RUN_GEMM(call_, down_weight_gradient,
                    DownWeightGradientArgs{matrix(args_.grad_out), buffers_.scaled_a, args_.grad_w2,
                                           args_.accumulate});
}

Matrix BackwardSteps::grad_x_columns(std::int64_t first) const {
  if (!args_.grad_x.defined()) return {};
  return {args_.grad_x.as<bfloat16>() + first, args_.grad_x.stride(0)};
}

void BackwardSteps::grad_x(std::int64_t first, std::int64_t columns, bool add) {
  if (!args_.grad_x.defined()) return;
  const MoEShape& shape = call_.shape;
  const bool stores = stores_rows(shape), adds = adds_rows(shape);
  const Matrix out = grad_x_columns(first);
  if (adds && !add && first == 0) zero_rows(call_.stream, shape, matrix(args_.grad_x));
  SONICMOE_RUN_GEMM(call_, input_gradient,
                    InputGradientArgs{.grad_h = buffers_.grad_h,
                                      .w1 = args_.weights.w1,
                                      .first_column = first,
                                      .num_columns = columns,
                                      .out = stores ? Matrix{buffers_.dx_rows, columns} : out,
                                      .add_rows = adds});
  if (shape.form == MoEShape::Form::kSorted) {
    zero_tail(call_.stream, shape, metadata_, out, columns);
  }
  if (stores) {
    aggregate(call_.stream, shape, metadata_,
              {.rows = buffers_.dx_rows,
               .rows_ld = columns,
               .weights = {},
               .out = out,
               .add_to_out = add,
               .columns = columns});
  }
}

void BackwardSteps::grad_w1() {
  if (!args_.grad_w1.defined()) return;
  SONICMOE_RUN_GEMM(
      call_, up_weight_gradient,
      UpWeightGradientArgs{buffers_.grad_h, matrix(args_.x), args_.grad_w1, args_.accumulate});
}

void backward(const Context& context, const ExpertPlan& plan, const MoEBackwardArgs& args) {
  BackwardSteps steps(context, plan, args);
  steps.rows();
  steps.bias_gradients();
  steps.grad_w2();
  for_each_slab(plan, [&](std::int64_t first, std::int64_t columns) {
    steps.grad_x(first, columns, /*add=*/false);
  });
  steps.grad_w1();
}

}  // namespace sonicmoe::cuda
