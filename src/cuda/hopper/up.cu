// H and A of the up projection.
#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/products.hpp"
#include "cuda/hopper/specs.cuh"

namespace sonicmoe::cuda::hopper {
namespace {

template <int kBlockN, Major kMajor, bool kGated>
void launch_up(const ProductCall& call, const UpArgs& args, const Choice& choice) {
  using Spec = UpSpec<kBlockN, kMajor, kGated>;
  const HiddenLayout layout = hidden_layout(args.function);
  const bool halves = layout == HiddenLayout::kConcatenated;
  Params<Spec> p{};
  p.operands = row_operands(call, args.w1.size(0), args.w1.size(2));
  set_weight(p.operands, args.w1, 1, halves ? 2 : 1, kBlockN, kMajor);
  set_gather(p.operands, args.x);
  p.epilogue = {.h = static_cast<bf16*>(args.h),
                .a = static_cast<bf16*>(args.a),
                .row_weight = args.row_weight,
                .n = static_cast<int>(args.w1.size(1) / (kGated ? 2 : 1)),
                .layout = layout,
                .activation = {args.function.activation, args.function.limit},
                .bias = args.b1.as<bf16>(),
                .bias_ld = args.b1.defined() ? args.b1.stride(0) : 0};
  launch<Spec>(call, choice, p);
}

}  // namespace

void HopperProducts::run(const ProductCall& call, const UpArgs& args) const {
  if (call.num_rows == 0) return;
  const Choice choice = choose(call, "up",
                               {.product = Product::kUp,
                                .depth = args.w1.size(2),
                                .columns = args.w1.size(1),
                                .row_tiles = tile_capacity(call.num_rows, args.w1.size(0))});
  const Major major = depth_has_unit_stride(args.w1, 2) ? Major::kK : Major::kMn;
  visit_tile(choice.block_n, major, [&]<int kBlockN, Major kMajor>() {
    if (is_gated(args.function.activation)) {
      launch_up<kBlockN, kMajor, true>(call, args, choice);
    } else {
      launch_up<kBlockN, kMajor, false>(call, args, choice);
    }
  });
}

}  // namespace sonicmoe::cuda::hopper
