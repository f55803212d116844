// H and A of the up projection.
#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/specs.cuh"

namespace sonicmoe::cuda::hopper {
namespace {

template <int kBlockN, Major kMajor, bool kGated>
void launch_up(const ExpertCall& call, const UpArgs& args) {
  using Spec = UpSpec<kBlockN, kMajor, kGated>;
  const MoEShape& s = call.shape;
  const HiddenLayout layout = hidden_layout(call);
  const bool halves = layout == HiddenLayout::kConcatenated;
  Params<Spec> p{};
  p.operands = row_operands(call, s.hidden_size, s.intermediate_size, Spec::Epilogue::kUnits);
  set_weight(p.operands, args.w1, 1, halves ? 2 : 1, kBlockN, kMajor);
  set_gather(p.operands, args.x);
  p.epilogue = {.h = static_cast<bf16*>(args.h),
                .a = static_cast<bf16*>(args.a),
                .row_weight = args.row_weight,
                .n = static_cast<int>(s.intermediate_size),
                .layout = layout,
                .activation = {call.options.activation, call.options.limit},
                .bias = args.b1.as<bf16>(),
                .bias_ld = args.b1.defined() ? args.b1.stride(0) : 0};
  launch<Spec>(call, p, max_items(p.operands));
}

}  // namespace

void up(const ExpertCall& call, const UpArgs& args) {
  if (call.shape.num_pairs == 0) return;
  const std::int64_t n = call.shape.intermediate_size;
  const Major major = depth_has_unit_stride(args.w1, 2) ? Major::kK : Major::kMn;
  const bool gated = is_gated(call.shape.activation);
  visit_tile(gated ? choose_gated_block_n(n) : choose_block_n(n), major,
             [&]<int kBlockN, Major kMajor>() {
               if (gated) {
                 launch_up<kBlockN, kMajor, true>(call, args);
               } else {
                 launch_up<kBlockN, kMajor, false>(call, args);
               }
             });
}

}  // namespace sonicmoe::cuda::hopper
