// dW1, dW2 and the parts of dWr. The gathered side (X or dO, d columns) is the tile's M, the sorted
// side (dH or A') its N, so dW2 [d, n] leaves as it is and dW1 [g*n, d] transposed.
#include <algorithm>

#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/products.hpp"
#include "cuda/hopper/specs.cuh"

namespace sonicmoe::cuda::hopper {
namespace {

// Map of the gradient [G, ...] with unit stride along dimension `inner`, in boxes of 64 x box_rows.
CUtensorMap map_of_gradient(const TensorView& grad, int inner, int box_rows) {
  constexpr std::int64_t kUnused = 64;  // stride of a dimension of one element; must still be legal
  const int outer = 3 - inner;
  const auto stride = [&](int i) { return grad.size(i) == 1 ? kUnused : grad.stride(i); };
  return make_tensor_map(grad.data(), {grad.size(inner), grad.size(outer), grad.size(0)},
                         {stride(outer), stride(0)}, {64, box_rows, 1});
}

// The copy of the gathered rows, in boxes of a k-tile.
CUtensorMap map_of_copy(const ProductCall& call, const WeightGradientArgs& g) {
  const std::int64_t rows = sorted_capacity(call.num_rows, g.grad.size(0)), width = g.width();
  return make_tensor_map(g.sorted, {64, rows, width / 64}, {width, 64},
                         {64, kBlockK, kBlockM / 64});
}

// The sorted rows [P, columns].
CUtensorMap map_of_sorted(const ProductCall& call, const WeightGradientArgs& g, int block_n) {
  const std::int64_t columns = g.columns();
  if (call.num_rows == 0) {
    // The gradient is still written (zeros) and nothing is loaded; a tensor map needs at least one
    // row and an address.
    return map_of_rows(g.grad.data(), 1, columns);
  }
  if (!whole_blocks(columns)) return map_of_rows(g.rows, call.num_rows, columns);
  return make_tensor_map(g.rows, {64, call.num_rows, columns / 64}, {columns, 64},
                         {64, kBlockK, block_n / 64});
}

template <class Spec>
void launch_weight_gradient(const ProductCall& call, const WeightGradientArgs& g,
                            const Choice& choice) {
  constexpr int kBlockN = Spec::shape.block_n;
  constexpr Dump kDump = Spec::shape.dump;
  const int columns_dim = 3 - g.gathered_dim;
  Params<Spec> p{};
  OperandParams& o = p.operands;
  o.whole_boxes = whole_blocks(g.columns());
  if constexpr (!Spec::shape.gather) o.a = map_of_copy(call, g);
  o.b = map_of_sorted(call, g, kBlockN);
  o.row_token = call.rows.row_token;
  o.entries = call.rows.groups;
  o.max_entries = static_cast<int>(g.grad.size(0));
  o.m_tiles = static_cast<int>(ceil_div(g.width(), kBlockM));
  o.depth = static_cast<int>(g.width());
  set_gather(o, g.gathered);
  p.epilogue = {.out = g.grad.data(),
                .expert_stride = g.grad.stride(0),
                .row_stride = g.grad.stride(g.gathered_dim),
                .column_stride = g.grad.stride(columns_dim),
                .rows = static_cast<int>(g.width()),
                .columns = static_cast<int>(g.columns()),
                .accumulate = g.accumulate,
                .evict_first = choice.evict_first,
                .map = {}};
  if constexpr (kDump == Dump::kRows) p.epilogue.map = map_of_gradient(g.grad, columns_dim, 64);
  if constexpr (kDump == Dump::kTransposed) {
    p.epilogue.map = map_of_gradient(g.grad, g.gathered_dim, kBlockN);
  }
  launch<Spec>(call, choice, p);
}

template <Dump kDump>
void visit_operands(const ProductCall& call, const WeightGradientArgs& g, const Choice& choice) {
  if (g.sorted != nullptr) {
    launch_weight_gradient<SortedWeightGradientSpec<kSortedBlockN, kDump>>(call, g, choice);
  } else if (choice.block_n == 256) {
    launch_weight_gradient<WeightGradientSpec<256, kDump>>(call, g, choice);
  } else {
    launch_weight_gradient<WeightGradientSpec<128, kDump>>(call, g, choice);
  }
}

}  // namespace

void HopperProducts::run(const ProductCall& call, const WeightGradientArgs& args) const {
  const std::int64_t num_groups = args.grad.size(0);
  const Choice choice =
      choose(call, args.sorted == nullptr ? "weight_gradient" : "weight_gradient of sorted rows",
             {.product = Product::kWeightGradient,
              .depth = ceil_div(call.num_rows, std::max<std::int64_t>(num_groups, 1)),
              .columns = args.columns(),
              .row_tiles = num_groups * ceil_div(args.width(), kBlockM),
              .stores_bf16 = args.grad.dtype() != DType::kFloat32});
  if (args.grad.dtype() == DType::kFloat32) {
    visit_operands<Dump::kDirect>(call, args, choice);
  } else if (depth_has_unit_stride(args.grad, 3 - args.gathered_dim)) {  // of the columns' index
    visit_operands<Dump::kRows>(call, args, choice);
  } else {
    visit_operands<Dump::kTransposed>(call, args, choice);
  }
}

}  // namespace sonicmoe::cuda::hopper
