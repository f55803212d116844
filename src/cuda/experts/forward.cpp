// Forward: row lists, H and A, then Y and its sum over each token's rows, slab by slab; or, where
// the order of the sum is free, Y added to O at once.
#include <algorithm>

#include "cuda/experts/experts.hpp"

namespace sonicmoe::cuda {
namespace {

struct Buffers {
  MetadataScratch scratch;
  RowTables tables;
  void* metadata;  // inference only; otherwise the caller keeps it
  void* a;         // [C, n]
  void* y;         // [C, slab], where stores_rows()
};

Buffers carve(WorkspaceCarver& carver, const MoEShape& shape, bool inference, std::int64_t slab) {
  Buffers b{};
  b.scratch = carve_metadata_scratch(carver, shape);
  b.tables = carve_row_tables(carver, shape);
  b.metadata = inference ? carver.take_bytes(moe_metadata_bytes(shape)) : nullptr;
  b.a = carver.take_bytes(elements(shape.row_capacity(), shape.intermediate_size) * kElementBytes);
  if (stores_rows(shape)) {
    b.y = carver.take_bytes(elements(shape.row_capacity(), slab) * kElementBytes);
  }
  return b;
}

}  // namespace

ExpertPlan plan_forward(const MoEShape& shape, bool inference, std::optional<std::size_t> limit) {
  return plan_slabs(shape, kSlabStep, limit, [&](std::int64_t slab) {
    WorkspaceCarver carver;
    carve(carver, shape, inference, slab);
    return carver.used();
  });
}

void check_forward(const Check& check, const MoEShape& shape, const MoEForwardArgs& args) {
  const Products& products = products_of(check.device().index);
  const ProductCall call{.num_tokens = shape.num_tokens, .num_rows = shape.row_capacity()};
  const Matrix out = stores_rows(shape) ? Matrix{nullptr, shape.hidden_size} : matrix(args.out);
  const ExpertWeights& w = args.weights;
  const UpArgs up{.x = matrix(args.x),
                  .w1 = w.w1,
                  .b1 = w.b1,
                  .function = hidden_function(shape, args.options),
                  .h = args.h.data()};
  const RowsArgs down{.weight = w.w2, .bias = w.b2, .num_columns = shape.hidden_size, .out = out};
  check.refuse(products.reason_against(call, up));
  check.refuse(renamed(products.reason_against(call, down), "weight", "w2"));
}

void forward(const Context& context, const ExpertPlan& plan, const MoEForwardArgs& args) {
  const MoEShape& shape = plan.shape;
  const bool inference = !args.h.defined(), sorted = shape.form == MoEShape::Form::kSorted;
  const bool stores = stores_rows(shape), adds = adds_rows(shape);
  WorkspaceCarver carver(args.workspace.data());
  Buffers b = carve(carver, shape, inference, plan.workspace.slab_columns);
  const Metadata m = metadata_view(shape, inference ? b.metadata : args.metadata.data());
  const ConstTensorView& weights = routing_weights(args.routing);
  // The sum over stored rows takes `weights`.
  if (stores || !weights.defined()) b.tables.row_weight = nullptr;
  const ProductCall call = product_call(context, shape, row_lists(m, b.tables));
  {
    const Range range("row_lists");
    build_metadata(call.stream, shape, args.routing, m, b.scratch, b.tables,
                   args.rows_dropped.as<std::int32_t>());
  }
  run(call, "up",
      UpArgs{matrix(args.x), args.weights.w1, args.weights.b1, hidden_function(shape, args.options),
             inference ? nullptr : args.h.data(), b.a, b.tables.row_weight});
  if (adds) zero_rows(call.stream, shape, matrix(args.out));
  for_each_slab(plan, [&](std::int64_t c, std::int64_t columns) {
    const Matrix out{args.out.as<bfloat16>() + c, args.out.stride(0)};
    run(call, "down",
        RowsArgs{.a = b.a,
                 .weight = args.weights.w2,
                 .bias = args.weights.b2,
                 .first_column = c,
                 .num_columns = columns,
                 .out = stores ? Matrix{b.y, columns} : out,
                 .row_weight = b.tables.row_weight,
                 .add_rows = adds});
    if (sorted) zero_tail(call.stream, shape, m, out, columns);
    if (stores) {
      const Range range("aggregate");
      aggregate(call.stream, shape, m,
                {.rows = b.y,
                 .rows_ld = columns,
                 .weights = weights,
                 .out = out,
                 .columns = columns,
                 .tokens = token_order(b.tables, args.options)});
    }
  });
}

}  // namespace sonicmoe::cuda
