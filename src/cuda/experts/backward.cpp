// Backward without Y: dS = <dA', A>, so that only X, H and the row lists are kept.
#include <algorithm>

#include "cuda/experts/experts.hpp"
#include "cuda/experts/sorted_rows.hpp"

namespace sonicmoe::cuda {
namespace {

bool sorts_rows(const Products& products, const MoEShape& shape, std::int64_t columns) {
  return shape.form != MoEShape::Form::kSorted &&
         products.sorts_rows(shape.row_capacity(), shape.num_experts, shape.hidden_size, columns);
}

}  // namespace

BackwardSteps::Buffers BackwardSteps::carve(WorkspaceCarver& carver, const MoEShape& shape,
                                            std::int64_t slab, BackwardStep step, bool sorts_rows) {
  Buffers b{};
  const bool all = step == BackwardStep::kAll;
  const std::int64_t parts = ceil_div(shape.intermediate_size, kLeastPartialColumns);
  if (all) {
    b.tables = carve_row_tables(carver, shape);
    b.grad_h = carver.take_bytes(elements(shape.row_capacity(), shape.h_columns()) * kElementBytes);
  }
  if (does(step, BackwardStep::kInput)) {
    const std::int64_t stored = stores_rows(shape) ? slab : 0;
    const std::int64_t columns = all ? std::max(shape.intermediate_size, stored) : stored;
    b.dx_rows = carver.take_bytes(elements(shape.row_capacity(), columns) * kElementBytes);
    b.scaled_a = b.dx_rows;
  }
  if (does(step, BackwardStep::kHidden)) {
    b.partial = carver.take<float>(elements(shape.row_capacity(), parts));
  }
  if (sorts_rows) {
    const std::int64_t rows = sorted_capacity(shape.row_capacity(), shape.num_experts);
    b.sorted = carver.take_bytes(elements(rows, shape.hidden_size) * kElementBytes);
  }
  return b;
}

// First the slabs, then the copy of sorted rows where the limit leaves room for it beside them: it
// saves less time than wider slabs. A step has the copy where the whole call would.
ExpertPlan plan_backward(const Products& products, const MoEShape& shape,
                         std::optional<std::size_t> limit, BackwardStep step) {
  const auto bytes = [&](std::int64_t slab, BackwardStep of, bool sorts) {
    WorkspaceCarver carver;
    BackwardSteps::carve(carver, shape, slab, of, sorts);
    return carver.used();
  };
  ExpertPlan plan = plan_backward_slabs(
      shape, kSlabStep, limit, step,
      [&](std::int64_t slab, BackwardStep of) { return bytes(slab, of, false); });
  const std::int64_t slab = plan.workspace.slab_columns;
  const bool down = sorts_rows(products, shape, shape.intermediate_size);
  const bool up = sorts_rows(products, shape, shape.h_columns());
  if (!down && !up) return plan;
  if (limit && bytes(slab, BackwardStep::kAll, true) > *limit) return plan;
  plan.sorts_rows =
      (down && does(step, BackwardStep::kDown)) || (up && does(step, BackwardStep::kUp));
  plan.workspace.bytes = bytes(slab, step, plan.sorts_rows);
  return plan;
}

std::size_t row_lists_bytes(const MoEShape& shape) {
  WorkspaceCarver carver;
  carve_row_tables(carver, shape);
  return carver.used();
}

namespace {

// What dH and dS take.
void check_hidden(const Check& check, const MoEShape& shape, const MoEBackwardArgs& args) {
  const GradHArgs grad_h{.grad_out = matrix(args.grad_out),
                         .w2 = args.weights.w2,
                         .function = hidden_function(shape, args.options),
                         .h = args.h.data(),
                         .grad_h = args.grad_h.data(),
                         .scaled_a = args.scaled_a.data()};
  const ProductCall call{.num_tokens = shape.num_tokens, .num_rows = shape.row_capacity()};
  check.refuse(products_of(check.device().index).reason_against(call, grad_h));
}

}  // namespace

void check_backward(const Check& check, const MoEShape& shape, const MoEBackwardArgs& args) {
  const Products& products = products_of(check.device().index);
  const ProductCall call{.num_tokens = shape.num_tokens, .num_rows = shape.row_capacity()};
  if (does(args.step, BackwardStep::kHidden)) check_hidden(check, shape, args);
  if (args.grad_w2.defined()) {
    const WeightGradientArgs product{
        .gathered = matrix(args.grad_out), .rows = args.scaled_a.data(), .grad = args.grad_w2};
    const Reason reason = renamed(products.reason_against(call, product), "gathered", "grad_out");
    check.refuse(renamed(renamed(reason, "rows", "scaled_a"), "grad", "grad_w2"));
  }
  if (args.grad_x.defined()) {
    const RowsArgs product{
        .a = args.grad_h.data(),
        .weight = args.weights.w1,
        .depth_dim = 1,
        .num_columns = shape.hidden_size,
        .out = stores_rows(shape) ? Matrix{nullptr, shape.hidden_size} : matrix(args.grad_x)};
    const Reason reason = renamed(products.reason_against(call, product), "weight", "w1");
    check.refuse(renamed(renamed(reason, "a", "grad_h"), "out", "grad_x"));
  }
  if (args.grad_w1.defined()) {
    const WeightGradientArgs product{.gathered = matrix(args.x),
                                     .rows = args.grad_h.data(),
                                     .grad = args.grad_w1,
                                     .gathered_dim = 2};
    const Reason reason = renamed(products.reason_against(call, product), "gathered", "x");
    check.refuse(renamed(renamed(reason, "rows", "grad_h"), "grad", "grad_w1"));
  }
}

BackwardSteps::BackwardSteps(const Context& context, const ExpertPlan& plan,
                             const MoEBackwardArgs& args)
    : shape_(plan.shape), args_(args), slab_(plan.workspace.slab_columns) {
  WorkspaceCarver carver(args.workspace.data());
  buffers_ = carve(carver, plan.shape, slab_, args.step, plan.sorts_rows);
  if (args.step != BackwardStep::kAll) {
    WorkspaceCarver lists(args.row_lists.data());
    buffers_.tables = carve_row_tables(lists, plan.shape);
    buffers_.grad_h = args.grad_h.data();
    buffers_.scaled_a = args.scaled_a.data();
  }
  if (!routing_weights(args.routing).defined()) buffers_.tables.row_weight = nullptr;
  // The metadata is only read here; the view type is shared with the forward that fills it.
  metadata_ = metadata_view(plan.shape, const_cast<void*>(args.metadata.data()));
  call_ = product_call(context, plan.shape, row_lists(metadata_, buffers_.tables));
}

void BackwardSteps::hidden() {
  if (!does(args_.step, BackwardStep::kHidden)) return;
  const Matrix grad_out = matrix(args_.grad_out);
  build_row_tables(call_.stream, shape_, args_.routing, metadata_, buffers_.tables);
  run(call_, "grad_h",
      GradHArgs{grad_out, args_.weights.w2, hidden_function(shape_, args_.options), args_.h.data(),
                buffers_.tables.row_weight, buffers_.grad_h, buffers_.scaled_a, buffers_.partial});
  if (!args_.grad_routing_weights.defined()) return;
  const std::int64_t width = products_of(call_.device).partial_columns(shape_.intermediate_size);
  finish_weight_gradient(call_.stream, shape_, metadata_, buffers_.partial,
                         static_cast<int>(ceil_div(shape_.intermediate_size, width)), grad_out,
                         args_.weights.b2, args_.grad_routing_weights.as<float>());
}

void BackwardSteps::down() {
  if (args_.grad_b2.defined()) {
    bias_gradient(call_.stream, shape_, metadata_, matrix(args_.grad_out), true,
                  buffers_.tables.row_weight, args_.grad_b2, args_.accumulate);
  }
  if (!args_.grad_w2.defined()) return;
  run(call_, "grad_w2",
      WeightGradientArgs{matrix(args_.grad_out), buffers_.scaled_a, args_.grad_w2, 1,
                         args_.accumulate, sorted(args_.grad_out, shape_.intermediate_size)});
}

const void* BackwardSteps::sorted(const ConstTensorView& gathered, std::int64_t columns) const {
  if (buffers_.sorted == nullptr) return nullptr;
  if (!sorts_rows(products_of(call_.device), shape_, columns)) return nullptr;
  const Range range("sort_rows");
  sort_rows(call_, matrix(gathered), shape_.hidden_size, shape_.num_experts, buffers_.sorted);
  return buffers_.sorted;
}

Matrix BackwardSteps::grad_x_columns(std::int64_t first) const {
  if (!args_.grad_x.defined()) return {};
  return {args_.grad_x.as<bfloat16>() + first, args_.grad_x.stride(0)};
}

void BackwardSteps::grad_x(std::int64_t first, std::int64_t columns, bool add) {
  if (!args_.grad_x.defined()) return;
  const bool stores = stores_rows(shape_), adds = adds_rows(shape_);
  const Matrix out = grad_x_columns(first);
  if (adds && !add && first == 0) zero_rows(call_.stream, shape_, matrix(args_.grad_x));
  run(call_, "grad_x",
      RowsArgs{.a = buffers_.grad_h,
               .weight = args_.weights.w1,
               .depth_dim = 1,
               .first_column = first,
               .num_columns = columns,
               .out = stores ? Matrix{buffers_.dx_rows, columns} : out,
               .add_rows = adds});
  if (shape_.form == MoEShape::Form::kSorted) {
    zero_tail(call_.stream, shape_, metadata_, out, columns);
  }
  if (stores) {
    aggregate(call_.stream, shape_, metadata_,
              {.rows = buffers_.dx_rows,
               .rows_ld = columns,
               .weights = {},
               .out = out,
               .add_to_out = add,
               .columns = columns,
               .tokens = token_order(buffers_.tables, args_.options)});
  }
}

void BackwardSteps::up() {
  if (args_.grad_b1.defined()) {
    bias_gradient(call_.stream, shape_, metadata_, {buffers_.grad_h, shape_.h_columns()}, false,
                  nullptr, args_.grad_b1, args_.accumulate);
  }
  if (!args_.grad_w1.defined()) return;
  run(call_, "grad_w1",
      WeightGradientArgs{matrix(args_.x), buffers_.grad_h, args_.grad_w1, 2, args_.accumulate,
                         sorted(args_.x, shape_.h_columns())});
}

void backward(const Context& context, const ExpertPlan& plan, const MoEBackwardArgs& args) {
  BackwardSteps steps(context, plan, args);
  steps.hidden();
  steps.down();
  for_each_slab(plan, [&](std::int64_t first, std::int64_t columns) {
    steps.grad_x(first, columns, /*add=*/false);
  });
  steps.up();
}

}  // namespace sonicmoe::cuda
