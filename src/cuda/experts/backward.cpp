// Backward without Y: dS = <dA', A>, so that only X, H and the row lists are kept.
//   1 dH, A', dS from dO, W2 and the stored H
//   2 the router's gradient (moe_layer only)
//   3 bias gradients
//   4 dW2, from A', whose place dX~ then takes
//   5 dX: the router's share, then dX~ = dH W1, summed per token slab by slab, or added at once
//   6 dW1
#include <algorithm>

#include "cuda/experts/buffers.hpp"
#include "cuda/experts/experts.hpp"
#include "cuda/router/router.hpp"

namespace sonicmoe::cuda {
namespace {

struct Buffers {
  RowTables tables;
  void* grad_h;    // [P, g*n]
  void* scaled_a;  // [P, n], needed until dW2 is done
  float* partial;  // [P, ceil(n / 128)]
  void* grad_x;    // [P, slab] dX~ in the place of A', where stores_rows()
  router::GradientTerms terms;
};

Buffers carve(WorkspaceCarver& carver, const MoEShape& shape, std::int64_t slab) {
  Buffers b{};
  const std::int64_t parts = ceil_div(shape.intermediate_size, kLeastPartialColumns);
  b.tables = carve_row_tables(carver, shape);
  b.grad_h = carver.take_bytes(elements(shape.num_pairs, shape.hidden_columns()) * kElementBytes);
  const std::int64_t stored = stores_rows(shape) ? slab : 0;
  b.scaled_a = carver.take_bytes(
      elements(shape.num_pairs, std::max(shape.intermediate_size, stored)) * kElementBytes);
  b.grad_x = b.scaled_a;
  b.partial = carver.take<float>(elements(shape.num_pairs, parts));
  if (shape.form != MoEShape::Form::kSorted) {
    b.terms = router::carve_share_terms(carver, shape.num_tokens, shape.num_experts);
  }
  return b;
}

void input_gradients(const ProductCall& call, const MoEShape& shape, const MoEBackwardArgs& args,
                     const Metadata& m, const Buffers& b, const RouterShare* router,
                     std::int64_t slab) {
  const bool sorted = shape.form == MoEShape::Form::kSorted;
  const bool stores = stores_rows(shape), adds = adds_rows(shape);
  if (adds && router == nullptr) zero_rows(call.stream, shape, matrix(args.grad_x));
  for (std::int64_t c = 0; c < shape.hidden_size; c += slab) {
    const std::int64_t columns = std::min(slab, shape.hidden_size - c);
    const Matrix out{args.grad_x.as<bfloat16>() + c, args.grad_x.stride(0)};
    if (router != nullptr) {
      router::logits_grad_input(call.stream, call.device, router->grad_logits,
                                router->router_weight, c, columns, out, b.terms);
    }
    run(call, "grad_x",
        RowsArgs{.a = b.grad_h,
                 .weight = args.weights.w1,
                 .depth_dim = 1,
                 .first_column = c,
                 .num_columns = columns,
                 .out = stores ? Matrix{b.grad_x, columns} : out,
                 .add_rows = adds});
    if (sorted) zero_tail(call.stream, shape, m, out, columns);
    if (stores) {
      aggregate(call.stream, shape, m,
                {.rows = b.grad_x,
                 .rows_ld = columns,
                 .weights = {},
                 .out = out,
                 .add_to_out = router != nullptr,
                 .columns = columns});
    }
  }
}

}  // namespace

WorkspacePlan backward_plan(const MoEShape& shape, std::optional<std::size_t> limit) {
  return plan_slabs("moe_backward", shape.hidden_size, kSlabStep, limit, [&](std::int64_t slab) {
    WorkspaceCarver carver;
    carve(carver, shape, slab);
    return carver.used();
  });
}

void check_backward(const Check& check, const MoEShape& shape, const MoEBackwardArgs& args) {
  const Products& products = products_of(check.device().index);
  const ProductCall call{.num_tokens = shape.num_tokens, .num_rows = shape.num_pairs};
  const Matrix grad_out = matrix(args.grad_out);
  const GradHArgs grad_h{.grad_out = grad_out,
                         .w2 = args.weights.w2,
                         .function = hidden_function(shape, args.options),
                         .h = args.h.data()};
  check.refuse(products.reason_against(call, grad_h));
  if (args.grad_w2.defined()) {
    const WeightGradientArgs product{.gathered = grad_out, .grad = args.grad_w2};
    const Reason reason = renamed(products.reason_against(call, product), "gathered", "grad_out");
    check.refuse(renamed(reason, "grad", "grad_w2"));
  }
  if (args.grad_x.defined()) {
    const RowsArgs product{
        .weight = args.weights.w1,
        .depth_dim = 1,
        .num_columns = shape.hidden_size,
        .out = stores_rows(shape) ? Matrix{nullptr, shape.hidden_size} : matrix(args.grad_x)};
    const Reason reason = renamed(products.reason_against(call, product), "weight", "w1");
    check.refuse(renamed(reason, "out", "grad_x"));
  }
  if (args.grad_w1.defined()) {
    const WeightGradientArgs product{
        .gathered = matrix(args.x), .grad = args.grad_w1, .gathered_dim = 2};
    const Reason reason = renamed(products.reason_against(call, product), "gathered", "x");
    check.refuse(renamed(reason, "grad", "grad_w1"));
  }
}

void backward(const Context& context, const MoEShape& shape, const MoEBackwardArgs& args,
              RouterShare* router) {
  const WorkspacePlan plan = backward_plan(shape, args.workspace_limit);
  WorkspaceCarver carver(args.workspace.data());
  Buffers b = carve(carver, shape, plan.slab_columns);
  // The metadata is only read here; the view type is shared with the forward that fills it.
  const Metadata m = metadata_view(shape, const_cast<void*>(args.metadata.data()));
  if (!routing_weights(args.routing).defined()) b.tables.row_weight = nullptr;
  const ProductCall call = product_call(context, shape, row_lists(m, b.tables));
  build_row_tables(call.stream, shape, args.routing, m, b.tables);

  const Matrix grad_out = matrix(args.grad_out), x = matrix(args.x);
  run(call, "grad_h",
      GradHArgs{grad_out, args.weights.w2, hidden_function(shape, args.options), args.h.data(),
                b.tables.row_weight, b.grad_h, b.scaled_a, b.partial});
  if (args.grad_routing_weights.defined()) {
    const std::int64_t width = products_of(call.device).partial_columns(shape.intermediate_size);
    finish_weight_gradient(call.stream, shape, m, b.partial,
                           static_cast<int>(ceil_div(shape.intermediate_size, width)), grad_out,
                           args.weights.b2, args.grad_routing_weights.as<float>());
  }
  if (router != nullptr) {
    const Matrix grad_x = args.grad_x.defined() ? matrix(args.grad_x) : Matrix{};
    router::layer_grad_logits(call.stream, m, args.x, plan.slab_columns, grad_x, b.terms, *router);
  }
  if (args.grad_b1.defined()) {
    bias_gradient(call.stream, shape, m, {b.grad_h, shape.hidden_columns()}, false, nullptr,
                  args.grad_b1, args.accumulate);
  }
  if (args.grad_b2.defined()) {
    bias_gradient(call.stream, shape, m, grad_out, true, b.tables.row_weight, args.grad_b2,
                  args.accumulate);
  }
  if (args.grad_w2.defined()) {
    run(call, "grad_w2",
        WeightGradientArgs{grad_out, b.scaled_a, args.grad_w2, 1, args.accumulate});
  }
  if (args.grad_x.defined()) input_gradients(call, shape, args, m, b, router, plan.slab_columns);
  if (args.grad_w1.defined()) {
    run(call, "grad_w1", WeightGradientArgs{x, b.grad_h, args.grad_w1, 2, args.accumulate});
  }
}

}  // namespace sonicmoe::cuda
