// Y of the down projection and dX~ of the input gradient: sorted rows in, rows out, or added to the
// rows of their tokens.
#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/specs.cuh"

namespace sonicmoe::cuda::hopper {
namespace {

void set_add_group(OperandParams& o, std::int64_t num_tokens, int block_n) {
  o.n_group = choose_add_group(num_tokens, o.depth, o.n_tiles, block_n);
}

template <int kBlockN, Major kMajor>
void launch_down(const ExpertCall& call, const DownArgs& args) {
  using Spec = RowsSpec<kBlockN, kMajor>;
  const MoEShape& s = call.shape;
  Params<Spec> p{};
  p.operands = row_operands(call, s.intermediate_size, args.num_columns, kBlockN);
  p.operands.a = map_of_rows(args.a, s.num_pairs, s.intermediate_size);
  set_weight(p.operands, args.w2, 1, 1, kBlockN, kMajor, args.first_column);
  if (args.add_rows) set_add_group(p.operands, s.num_tokens, kBlockN);
  p.epilogue = {.out = static_cast<bf16*>(args.out.data),
                .ld = args.out.ld,
                .row_weight = args.row_weight,
                .row_token = args.add_rows ? call.rows.row_token : nullptr,
                .bias = args.b2.defined() ? args.b2.as<bf16>() + args.first_column : nullptr,
                .bias_ld = args.b2.defined() ? args.b2.stride(0) : 0,
                .columns = static_cast<int>(args.num_columns)};
  launch<Spec>(call, p, max_items(p.operands));
}

template <int kBlockN, Major kMajor>
void launch_input_gradient(const ExpertCall& call, const InputGradientArgs& args) {
  using Spec = RowsSpec<kBlockN, kMajor>;
  const MoEShape& s = call.shape;
  Params<Spec> p{};
  p.operands = row_operands(call, s.h_columns(), args.num_columns, kBlockN);
  p.operands.a = map_of_rows(args.grad_h, s.num_pairs, s.h_columns());
  set_weight(p.operands, args.w1, 2, 1, kBlockN, kMajor, args.first_column);
  if (args.add_rows) set_add_group(p.operands, s.num_tokens, kBlockN);
  p.epilogue = {.out = static_cast<bf16*>(args.out.data),
                .ld = args.out.ld,
                .row_weight = nullptr,
                .row_token = args.add_rows ? call.rows.row_token : nullptr,
                .bias = nullptr,
                .bias_ld = 0,
                .columns = static_cast<int>(args.num_columns)};
  launch<Spec>(call, p, max_items(p.operands));
}

}  // namespace

void down(const ExpertCall& call, const DownArgs& args) {
  if (call.shape.num_pairs == 0) return;
  const Major major = depth_has_unit_stride(args.w2, 2) ? Major::kK : Major::kMn;
  visit_tile(choose_block_n(args.num_columns), major,
             [&]<int kBlockN, Major kMajor>() { launch_down<kBlockN, kMajor>(call, args); });
}

void input_gradient(const ExpertCall& call, const InputGradientArgs& args) {
  if (call.shape.num_pairs == 0) return;
  const Major major = depth_has_unit_stride(args.w1, 1) ? Major::kK : Major::kMn;
  visit_tile(choose_block_n(args.num_columns), major, [&]<int kBlockN, Major kMajor>() {
    launch_input_gradient<kBlockN, kMajor>(call, args);
  });
}

}  // namespace sonicmoe::cuda::hopper
