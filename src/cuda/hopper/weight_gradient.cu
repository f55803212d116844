// dW1, dW2 and the parts of dWr. The gathered side (X or dO, d columns) is the tile's M, the sorted
// side (dH or A') its N, so dW2 [d, n] leaves as it is and dW1 [g*n, d] transposed.
#include <algorithm>
#include <type_traits>

#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/products.hpp"
#include "cuda/hopper/specs.cuh"
#include "cuda/sorted_rows.hpp"

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
  o.b = map_of_sorted(call, g, kBlockN);
  o.row_token = call.rows.row_token;
  o.b_rows = static_cast<const bf16*>(g.rows);
  o.b_rows_ld = g.columns();
  o.entries = call.rows.groups;
  o.max_entries = static_cast<int>(g.grad.size(0));
  o.m_tiles = static_cast<int>(ceil_div(g.width(), kBlockM));
  o.depth = static_cast<int>(g.width());
  o.b_columns = static_cast<int>(g.columns());
  set_gather(o, g.gathered);
  auto& e = p.epilogue;
  e.out = g.grad.data();
  e.expert_stride = g.grad.stride(0);
  e.row_stride = g.grad.stride(g.gathered_dim);
  e.column_stride = g.grad.stride(columns_dim);
  e.rows = static_cast<int>(g.width());
  e.columns = static_cast<int>(g.columns());
  e.accumulate = g.accumulate;
  if constexpr (kDump == Dump::kRows) e.map = map_of_gradient(g.grad, columns_dim, 64);
  if constexpr (kDump == Dump::kTransposed) {
    e.map = map_of_gradient(g.grad, g.gathered_dim, kBlockN);
  }
  if constexpr (!std::is_same_v<Spec, WeightGradientSpec<Spec::shape.block_n, kDump>>) {
    e.evict_first = tries('e');
  }
  if constexpr (!Spec::shape.gather) {
    static_assert(sorted_row(0, 1) == kBlockK);
    const std::int64_t rows = sorted_capacity(call.num_rows, g.grad.size(0)), d = g.width();
    o.a = make_tensor_map(g.sorted, {64, rows, d / 64}, {d, 64}, {64, kBlockK, kBlockM / 64});
  }
  launch<Spec>(call, choice, p);
}

template <Dump kDump>
void launch_experiment(const ProductCall& call, const WeightGradientArgs& g, const Choice& choice) {
  if (g.sorted != nullptr) {
    launch_weight_gradient<SortedWeightGradientSpec<256, kDump>>(call, g, choice);
  } else {
    launch_weight_gradient<LateWeightGradientSpec<256, kDump>>(call, g, choice);
  }
}

template <int kBlockN>
void visit_dump(const ProductCall& call, const WeightGradientArgs& g, const Choice& choice) {
  if (g.grad.dtype() == DType::kFloat32) {
    launch_weight_gradient<WeightGradientSpec<kBlockN, Dump::kDirect>>(call, g, choice);
  } else if (depth_has_unit_stride(g.grad, 3 - g.gathered_dim)) {  // of the columns' index
    launch_weight_gradient<WeightGradientSpec<kBlockN, Dump::kRows>>(call, g, choice);
  } else {
    launch_weight_gradient<WeightGradientSpec<kBlockN, Dump::kTransposed>>(call, g, choice);
  }
}

}  // namespace

void HopperProducts::run(const ProductCall& call, const WeightGradientArgs& args) const {
  const std::int64_t num_groups = args.grad.size(0);
  const Choice choice =
      choose(call, "weight_gradient",
             {.product = Product::kWeightGradient,
              .depth = ceil_div(call.num_rows, std::max<std::int64_t>(num_groups, 1)),
              .columns = args.columns(),
              .row_tiles = num_groups * ceil_div(args.width(), kBlockM)});
  const bool bf16_256 = choice.block_n == 256 && args.grad.dtype() != DType::kFloat32;
  if (bf16_256 && (args.sorted != nullptr || tries('l'))) {
    if (depth_has_unit_stride(args.grad, 3 - args.gathered_dim)) {
      launch_experiment<Dump::kRows>(call, args, choice);
    } else {
      launch_experiment<Dump::kTransposed>(call, args, choice);
    }
  } else if (choice.block_n == 256) {
    visit_dump<256>(call, args, choice);
  } else {
    visit_dump<128>(call, args, choice);
  }
}

}  // namespace sonicmoe::cuda::hopper
