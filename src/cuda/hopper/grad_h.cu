// dH, A' and the partial sums of dS.
#include <type_traits>

#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/products.hpp"
#include "cuda/hopper/specs.cuh"

namespace sonicmoe::cuda::hopper {
namespace {

// H [P, g*n] for HiddenInput, in boxes of four rows x block_n / 2 hidden units, dense in shared
// memory: (unit, part, row), or (value, 1, row) where gate and up alternate. Concatenated, gate
// and up are parts, so that gates past the end arrive as zeros and not as up.
CUtensorMap map_of_hidden(const void* h, std::int64_t num_rows, std::int64_t n, HiddenLayout layout,
                          int block_n) {
  const std::int64_t parts = layout == HiddenLayout::kConcatenated ? 2 : 1;
  const std::int64_t values = layout == HiddenLayout::kInterleaved ? 2 : 1;  // of a unit, in a part
  return make_tensor_map(h, {values * n, parts, num_rows}, {values * n, parts * values * n},
                         {static_cast<int>(values) * block_n / 2, static_cast<int>(parts), 4},
                         CU_TENSOR_MAP_SWIZZLE_NONE);
}

template <class Spec>
void launch_grad_h(const ProductCall& call, const GradHArgs& args, const Choice& choice) {
  constexpr int kBlockN = Spec::shape.block_n;
  const std::int64_t d = args.w2.size(1), n = args.w2.size(2);
  const HiddenLayout layout = hidden_layout(args.function);
  Params<Spec> p{};
  p.operands = row_operands(call, args.w2.size(0), d);
  set_weight(p.operands, args.w2, 2, 1, kBlockN, Spec::shape.b);
  set_gather(p.operands, args.grad_out);
  p.epilogue = {.h_map = map_of_hidden(args.h, call.num_rows, n, layout, kBlockN),
                .h = static_cast<const bf16*>(args.h),
                .grad_h = static_cast<bf16*>(args.grad_h),
                .scaled_a = static_cast<bf16*>(args.scaled_a),
                .row_weight = args.row_weight,
                .partial = args.partial,
                .n = static_cast<int>(n),
                .parts = choice.n_tiles,
                .layout = layout,
                .activation = {args.function.activation, args.function.limit}};
  launch<Spec>(call, choice, p);
}

template <class F>
void visit_gated(bool gated, F f) {
  gated ? f(std::true_type{}) : f(std::false_type{});
}

template <class F>
void visit_stores(StoreRoles stores, F f) {
  using enum StoreRoles;
  switch (stores) {
    case kThreeAndMath:
      return f(std::integral_constant<StoreRoles, kThreeAndMath>{});
    case kThree:
      return f(std::integral_constant<StoreRoles, kThree>{});
    case kTwo:
      return f(std::integral_constant<StoreRoles, kTwo>{});
  }
}

}  // namespace

void HopperProducts::run(const ProductCall& call, const GradHArgs& args) const {
  if (call.num_rows == 0) return;
  const Choice choice = choose(call, "grad_h",
                               {.product = Product::kGradH,
                                .depth = args.w2.size(1),
                                .columns = args.w2.size(2),
                                .row_tiles = tile_capacity(call.num_rows, args.w2.size(0))});
  const Major major = depth_has_unit_stride(args.w2, 1) ? Major::kK : Major::kMn;
  visit_tile(choice.block_n, major, [&]<int kBlockN, Major kMajor>() {
    visit_gated(is_gated(args.function.activation), [&](auto gated) {
      visit_stores(choice.stores, [&](auto stores) {
        launch_grad_h<GradHSpec<kBlockN, kMajor, gated.value, stores.value>>(call, args, choice);
      });
    });
  });
}

}  // namespace sonicmoe::cuda::hopper
