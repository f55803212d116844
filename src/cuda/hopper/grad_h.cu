// dH, A' and the partial sums of dS.
#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/specs.cuh"

namespace sonicmoe::cuda::hopper {
namespace {

template <class Spec>
void launch_hidden_gradient(const ExpertCall& call, const HiddenGradientArgs& args) {
  constexpr int kBlockN = Spec::shape.block_n;
  const MoEShape& s = call.shape;
  Params<Spec> p{};
  p.operands = row_operands(call, s.hidden_size, s.intermediate_size, kBlockN);
  set_weight(p.operands, args.w2, 2, 1, kBlockN, Spec::shape.b);
  set_gather(p.operands, args.grad_out);
  const HiddenLayout layout = hidden_layout(call);
  p.epilogue = {.h_map = map_of_hidden(args.h, s.num_pairs, s.intermediate_size, layout, kBlockN),
                .h = static_cast<const bf16*>(args.h),
                .grad_h = static_cast<bf16*>(args.grad_h),
                .scaled_a = static_cast<bf16*>(args.scaled_a),
                .row_weight = args.row_weight,
                .partial = args.partial,
                .n = static_cast<int>(s.intermediate_size),
                .parts = p.operands.n_tiles,
                .layout = layout,
                .activation = {call.options.activation, call.options.limit}};
  launch<Spec>(call, p, max_items(p.operands));
}

template <class F>
void visit_gated(bool gated, F f) {
  gated ? f(std::true_type{}) : f(std::false_type{});
}

template <class F>
void visit_storers(HiddenStorers storers, F f) {
  using enum HiddenStorers;
  switch (storers) {
    case kThreeAndMath:
      return f(std::integral_constant<HiddenStorers, kThreeAndMath>{});
    case kThree:
      return f(std::integral_constant<HiddenStorers, kThree>{});
    case kTwo:
      return f(std::integral_constant<HiddenStorers, kTwo>{});
  }
}

}  // namespace

void hidden_gradient(const ExpertCall& call, const HiddenGradientArgs& args) {
  if (call.shape.num_pairs == 0) return;
  const Major major = depth_has_unit_stride(args.w2, 1) ? Major::kK : Major::kMn;
  visit_tile(partial_columns(call.shape), major, [&]<int kBlockN, Major kMajor>() {
    visit_gated(is_gated(call.shape.activation), [&](auto gated) {
      visit_storers(choose_hidden_storers(call.shape.hidden_size), [&](auto storers) {
        launch_hidden_gradient<HiddenGradientSpec<kBlockN, kMajor, gated.value, storers.value>>(
            call, args);
      });
    });
  });
}

}  // namespace sonicmoe::cuda::hopper
