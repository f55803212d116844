// dW1 and dW2. The gathered side (X or dO, d columns) is the tile's M, the sorted side (dH or A')
// its N, so dW2 [d, n] leaves as it is and dW1 [g*n, d] transposed.
#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/specs.cuh"

namespace sonicmoe::cuda::hopper {
namespace {

struct WeightGradient {
  Matrix gathered;             // [T, d]
  const void* rows = nullptr;  // [P, columns] contiguous
  std::int64_t columns = 0;
  TensorView out;  // [E, ...], d along d_dim
  int d_dim = 1;
  bool accumulate = false;
};

// Map of the gradient [E, ...] with unit stride along dimension `inner`, in boxes of 64 x box_rows.
CUtensorMap map_of_gradient(const TensorView& out, int inner, int box_rows) {
  constexpr std::int64_t kUnused = 64;  // stride of a dimension of one element; must still be legal
  const int outer = 3 - inner;
  const auto stride = [&](int i) { return out.size(i) == 1 ? kUnused : out.stride(i); };
  return make_tensor_map(out.data(), {out.size(inner), out.size(outer), out.size(0)},
                         {stride(outer), stride(0)}, {64, box_rows, 1});
}

template <int kBlockN, Dump kDump>
void launch_weight_gradient(const ExpertCall& call, const WeightGradient& g) {
  using Spec = WeightGradientSpec<kBlockN, kDump>;
  const MoEShape& s = call.shape;
  Params<Spec> p{};
  OperandParams& o = p.operands;
  o.whole_boxes = whole_blocks(g.columns);
  if (s.num_pairs == 0) {
    // The gradient is still written (zeros) and nothing is loaded; a tensor map needs at least one
    // row and an address.
    o.b = map_of_rows(g.out.data(), 1, g.columns);
  } else if (o.whole_boxes) {
    o.b = make_tensor_map(g.rows, {64, s.num_pairs, g.columns / 64}, {g.columns, 64},
                          {64, kBlockK, kBlockN / 64});
  } else {
    o.b = map_of_rows(g.rows, s.num_pairs, g.columns);
  }
  o.row_token = call.rows.row_token;
  o.b_rows = static_cast<const bf16*>(g.rows);
  o.b_rows_ld = g.columns;
  o.entries = call.rows.experts;
  o.max_entries = static_cast<int>(s.num_experts);
  o.m_tiles = static_cast<int>(ceil_div(s.hidden_size, kBlockM));
  o.n_tiles = static_cast<int>(ceil_div(g.columns, kBlockN));
  o.depth = static_cast<int>(s.hidden_size);
  o.b_columns = static_cast<int>(g.columns);
  set_gather(o, g.gathered);
  p.epilogue = {.out = g.out.data(),
                .expert_stride = g.out.stride(0),
                .row_stride = g.out.stride(g.d_dim),
                .column_stride = g.out.stride(3 - g.d_dim),
                .rows = static_cast<int>(s.hidden_size),
                .columns = static_cast<int>(g.columns),
                .accumulate = g.accumulate,
                .map = {}};
  if constexpr (kDump == Dump::kRows) p.epilogue.map = map_of_gradient(g.out, 3 - g.d_dim, 64);
  if constexpr (kDump == Dump::kTransposed)
    p.epilogue.map = map_of_gradient(g.out, g.d_dim, kBlockN);
  launch<Spec>(call, p, max_items(o));
}

template <int kBlockN>
void visit_dump(const ExpertCall& call, const WeightGradient& g) {
  if (g.out.dtype() == DType::kFloat32) {
    launch_weight_gradient<kBlockN, Dump::kDirect>(call, g);
  } else if (depth_has_unit_stride(g.out, 3 - g.d_dim)) {  // the columns' index is contiguous
    launch_weight_gradient<kBlockN, Dump::kRows>(call, g);
  } else {
    launch_weight_gradient<kBlockN, Dump::kTransposed>(call, g);
  }
}

void weight_gradient(const ExpertCall& call, const WeightGradient& g) {
  if (choose_block_n(g.columns) == 256) {
    visit_dump<256>(call, g);
  } else {
    visit_dump<128>(call, g);
  }
}

}  // namespace

void down_weight_gradient(const ExpertCall& call, const DownWeightGradientArgs& args) {
  weight_gradient(call, {.gathered = args.grad_out,
                         .rows = args.scaled_a,
                         .columns = call.shape.intermediate_size,
                         .out = args.grad_w2,
                         .d_dim = 1,
                         .accumulate = args.accumulate});
}

void up_weight_gradient(const ExpertCall& call, const UpWeightGradientArgs& args) {
  weight_gradient(call, {.gathered = args.x,
                         .rows = args.grad_h,
                         .columns = call.shape.h_columns(),
                         .out = args.grad_w1,
                         .d_dim = 2,
                         .accumulate = args.accumulate});
}

}  // namespace sonicmoe::cuda::hopper
