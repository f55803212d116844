// Y of the down projection, dX~ and the router's share of dX: sorted rows in, rows out, or added to
// the rows of their tokens.
#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/products.hpp"
#include "cuda/hopper/specs.cuh"

namespace sonicmoe::cuda::hopper {
namespace {

template <int kBlockN, Major kMajor>
void launch_rows(const ProductCall& call, const RowsArgs& args, const Choice& choice) {
  using Spec = RowsSpec<kBlockN, kMajor>;
  Params<Spec> p{};
  p.operands = row_operands(call, args.weight.size(0), args.depth());
  p.operands.a = map_of_rows(args.a, call.num_rows, args.depth());
  set_weight(p.operands, args.weight, 3 - args.depth_dim, 1, kBlockN, kMajor, args.first_column);
  const bool has_bias = args.bias.defined();
  p.epilogue = {.out = static_cast<bf16*>(args.out.data),
                .ld = args.out.ld,
                .row_weight = args.row_weight,
                .row_token = args.add_rows ? call.rows.row_token : nullptr,
                .bias = has_bias ? args.bias.as<bf16>() + args.first_column : nullptr,
                .bias_ld = has_bias ? args.bias.stride(0) : 0,
                .columns = static_cast<int>(args.num_columns)};
  launch<Spec>(call, choice, p);
}

}  // namespace

void HopperProducts::run(const ProductCall& call, const RowsArgs& args) const {
  if (call.num_rows == 0) return;
  const Choice choice = choose(call, "rows",
                               {.product = Product::kRows,
                                .depth = args.depth(),
                                .columns = args.num_columns,
                                .row_tiles = tile_capacity(call.num_rows, args.weight.size(0)),
                                .num_tokens = call.num_tokens,
                                .add_rows = args.add_rows});
  const Major major = depth_has_unit_stride(args.weight, args.depth_dim) ? Major::kK : Major::kMn;
  visit_tile(choice.block_n, major, [&]<int kBlockN, Major kMajor>() {
    launch_rows<kBlockN, kMajor>(call, args, choice);
  });
}

}  // namespace sonicmoe::cuda::hopper
