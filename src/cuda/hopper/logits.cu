// logits = X Wr^T + bias: one group of T rows, dense, float32 sums stored as they are.
#include <array>

#include "cuda/hopper/launch.cuh"
#include "cuda/hopper/products.hpp"
#include "cuda/hopper/specs.cuh"

namespace sonicmoe::cuda::hopper {
namespace {

template <int kBlockN>
void launch_logits(const ProductCall& call, const LogitsArgs& args, const Choice& choice) {
  using Spec = LogitsSpec<kBlockN>;
  const std::int64_t num_tokens = args.x.size(0), d = args.x.size(1);
  const std::int64_t num_experts = args.weight.size(0), row_stride = args.weight.stride(0);
  const std::array<std::int64_t, 3> sizes{1, num_experts, d};
  const std::array<std::int64_t, 3> strides{num_experts * row_stride, row_stride, 1};
  Params<Spec> p{};
  OperandParams& o = p.operands;
  o.a = make_tensor_map(args.x.data(), {d, num_tokens}, {args.x.stride(0)}, {64, 64});
  set_weight(o, {args.weight.data(), DType::kBFloat16, sizes, strides}, 1, 1, kBlockN, Major::kK);
  o.num_rows = static_cast<int>(num_tokens);
  o.max_entries = static_cast<int>(ceil_div(num_tokens, kBlockM));
  o.m_tiles = 1;
  o.depth = static_cast<int>(d);
  p.epilogue = {.logits = args.logits,
                .num_experts = static_cast<int>(num_experts),
                .bias = args.bias.data(),
                .bias_is_bf16 = args.bias.defined() && args.bias.dtype() == DType::kBFloat16};
  launch<Spec>(call, choice, p);
}

}  // namespace

void HopperProducts::run(const ProductCall& call, const LogitsArgs& args) const {
  const Choice choice = choose(call, "logits",
                               {.product = Product::kLogits,
                                .depth = args.x.size(1),
                                .columns = args.weight.size(0),
                                .row_tiles = ceil_div(args.x.size(0), kBlockM)});
  if (choice.block_n == 256) {
    launch_logits<256>(call, args, choice);
  } else {
    launch_logits<128>(call, args, choice);
  }
}

}  // namespace sonicmoe::cuda::hopper
