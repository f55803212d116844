// logits = X Wr^T + bias on the grouped GEMM: one group of T rows, dense, float32 sums stored as
// they are.
#include <array>

#include "cuda/hopper/launch.cuh"
#include "cuda/router/bias.cuh"
#include "cuda/router/logits_gemm.hpp"

namespace sonicmoe::cuda {
namespace hopper {
namespace {

template <int kBlockN>
struct StoreLogits {
  struct Params {
    float* logits;  // [T, E]
    int num_experts;
    router::RouterBias bias;
  };

  // By the math warps: the sums are not rounded, so the dump tile has no use for them.
  template <int kCount>
  static __device__ void finish(const Params& p, const Item& t, float (&acc)[kCount], int warp,
                                int lane) {
    // Rows start at multiples of 8 bytes.
    const bool pairs =
        p.num_experts % 2 == 0 && reinterpret_cast<std::uintptr_t>(p.logits) % 8 == 0;
#pragma unroll
    for (int i = 0; i < kCount; i += 2) {
      const int row = warp * 16 + lane / 4 + i / 2 % 2 * 8;
      const int e = t.n * kBlockN + 2 * (lane % 4) + i / 4 * 8;
      if (row >= t.rows || e >= p.num_experts) continue;
      float* at = p.logits + int64_t{t.row0 + row} * p.num_experts + e;
      const float first = acc[i] + p.bias[e];
      if (pairs) {
        *reinterpret_cast<float2*>(at) = {first, acc[i + 1] + p.bias[e + 1]};
      } else {
        at[0] = first;
        if (e + 1 < p.num_experts) at[1] = acc[i + 1] + p.bias[e + 1];
      }
    }
  }
};

template <int kBlockN>
struct LogitsSpec {
  static constexpr const char* name = "logits";
  static constexpr GemmShape shape = {.block_n = kBlockN, .gather = false, .dump = Dump::kDirect};
  using Epilogue = StoreLogits<kBlockN>;
};

template <int kBlockN>
void launch_logits(const ExpertCall& call, const ConstTensorView& x, const ConstTensorView& weight,
                   const ConstTensorView& bias, const TensorView& logits) {
  const std::int64_t num_tokens = x.size(0), d = x.size(1), num_experts = weight.size(0);
  const std::array<std::int64_t, 3> sizes{1, num_experts, d};
  const std::array<std::int64_t, 3> strides{num_experts * weight.stride(0), weight.stride(0), 1};
  Params<LogitsSpec<kBlockN>> p{};
  OperandParams& o = p.operands;
  o.a = make_tensor_map(x.data(), {d, num_tokens}, {x.stride(0)}, {64, 64});
  set_weight(o, {weight.data(), DType::kBFloat16, sizes, strides}, 1, 1, kBlockN, Major::kK);
  o.num_rows = static_cast<int>(num_tokens);
  o.max_entries = static_cast<int>(ceil_div(num_tokens, kBlockM));
  o.m_tiles = 1;
  o.n_tiles = static_cast<int>(ceil_div(num_experts, kBlockN));
  o.depth = static_cast<int>(d);
  p.epilogue = {logits.as<float>(), static_cast<int>(num_experts), router::RouterBias(bias)};
  launch<LogitsSpec<kBlockN>>(call, p, max_items(o));
}

}  // namespace
}  // namespace hopper

namespace router {
namespace {

bool rows_are_aligned(const ConstTensorView& view) {
  return view.dtype() == DType::kBFloat16 &&
         reinterpret_cast<std::uintptr_t>(view.data()) % 16 == 0 && view.stride(1) == 1 &&
         view.stride(0) % 8 == 0;
}

}  // namespace

bool tensor_core_logits_fit(const ConstTensorView& x, const ConstTensorView& weight) {
  return rows_are_aligned(x) && rows_are_aligned(weight);
}

void launch_tensor_core_logits(cudaStream_t stream, int device, const ConstTensorView& x,
                               const ConstTensorView& weight, const ConstTensorView& bias,
                               const TensorView& logits) {
  ExpertCall call;
  call.shape.num_tokens = x.size(0);
  call.shape.num_experts = weight.size(0);
  call.shape.hidden_size = x.size(1);
  call.stream = stream;
  call.device = device;
  if (hopper::choose_block_n(weight.size(0)) == 256) {
    hopper::launch_logits<256>(call, x, weight, bias, logits);
  } else {
    hopper::launch_logits<128>(call, x, weight, bias, logits);
  }
}

}  // namespace router
}  // namespace sonicmoe::cuda
