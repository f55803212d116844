#include <cuda_bf16.h>

#include <array>

#include "cuda/router/gradient_gemm.hpp"
#include "cuda/router/launch.hpp"

namespace sonicmoe::cuda::router {
namespace {

using bf16 = __nv_bfloat16;

// The terms of dlogits, and the tables of rows. Null pointers are left out.
__global__ void split_terms_kernel(const float* grad_logits, std::int64_t num_tokens,
                                   std::int64_t num_experts, GradientTerms terms) {
  const std::int64_t first = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  const std::int64_t pairs = num_tokens * num_experts / 2;  // E is even
  for (std::int64_t i = first; i < pairs; i += step) {
    const float2 value = reinterpret_cast<const float2*>(grad_logits)[i];
    const __nv_bfloat162 high = __floats2bfloat162_rn(value.x, value.y);
    static_cast<__nv_bfloat162*>(terms.high)[i] = high;
    if (terms.low != nullptr) {
      static_cast<__nv_bfloat162*>(terms.low)[i] =
          __floats2bfloat162_rn(value.x - __low2float(high), value.y - __high2float(high));
    }
  }
  const std::int64_t num_tiles = (num_tokens + kTileRows - 1) / kTileRows;
  if (terms.tiles != nullptr) {
    for (std::int64_t i = first; i < num_tiles; i += step) {
      const std::int64_t row = i * kTileRows;
      terms.tiles[i] = {static_cast<int>(row),
                        static_cast<int>(min(std::int64_t{kTileRows}, num_tokens - row)), 0, 0};
    }
    if (first == 0) *terms.num_tiles = static_cast<int>(num_tiles);
  }
  if (first < 2) terms.claims[first] = 0;
  for (std::int64_t i = first; i < terms.num_slices; i += step) {
    const std::int64_t row = min(i * terms.rows_per_slice, num_tokens);
    terms.slices[i] = {static_cast<int>(row),
                       static_cast<int>(min(terms.rows_per_slice, num_tokens - row)),
                       static_cast<int>(i), 0};
  }
}

void split_terms(cudaStream_t stream, ConstTensorView grad_logits, const GradientTerms& terms,
                 const char* operation) {
  const std::int64_t pairs = grad_logits.numel() / 2;
  split_terms_kernel<<<grid_stride_blocks(pairs, 256), 256, 0, stream>>>(
      grad_logits.as<float>(), grad_logits.size(0), grad_logits.size(1), terms);
  check_launch(operation);
}

// A call of the grouped GEMMs over rows of E columns: dlogits is what dH is to an ungated expert.
ExpertCall gemm_call(cudaStream_t stream, int device, std::int64_t num_tokens,
                     std::int64_t num_experts, std::int64_t d, std::int64_t groups,
                     const GradientTerms& terms) {
  ExpertCall call;
  call.shape.num_tokens = num_tokens;
  call.shape.num_pairs = num_tokens;
  call.shape.num_experts = groups;
  call.shape.hidden_size = d;
  call.shape.intermediate_size = num_experts;
  call.shape.form = MoEShape::Form::kSorted;
  call.shape.activation = Activation::kReLU;
  call.shape.dtype = DType::kBFloat16;
  call.rows.tiles = terms.tiles;
  call.rows.num_tiles = terms.num_tiles;
  call.rows.experts = terms.slices;
  call.rows.claims = terms.claims;
  call.stream = stream;
  call.device = device;
  return call;
}

}  // namespace

GradientTerms carve_share_terms(WorkspaceCarver& carver, std::int64_t num_tokens,
                                std::int64_t num_experts) {
  GradientTerms terms;
  terms.high = carver.take<bf16>(static_cast<std::size_t>(num_tokens * num_experts));
  terms.tiles = carver.take<int4>(static_cast<std::size_t>(tile_capacity(num_tokens, 1)));
  terms.num_tiles = carver.take<std::int32_t>(1);
  terms.claims = carver.take<std::uint32_t>(2);
  return terms;
}

GradientTerms carve_weight_terms(WorkspaceCarver& carver, std::int64_t num_tokens,
                                 std::int64_t num_experts, std::int64_t num_slices,
                                 std::int64_t rows_per_slice) {
  GradientTerms terms;
  terms.high = carver.take<bf16>(static_cast<std::size_t>(num_tokens * num_experts));
  terms.low = carver.take<bf16>(static_cast<std::size_t>(num_tokens * num_experts));
  terms.slices = carver.take<int4>(static_cast<std::size_t>(num_slices));
  terms.claims = carver.take<std::uint32_t>(2);
  terms.num_slices = num_slices;
  terms.rows_per_slice = rows_per_slice;
  return terms;
}

bool share_on_grouped_gemm(cudaStream_t stream, int device, ConstTensorView grad_logits,
                           ConstTensorView router_weight, std::int64_t first_column,
                           std::int64_t num_columns, void* out, const GradientTerms& terms) {
  if (router_weight.dtype() != DType::kBFloat16) return false;
  const std::int64_t num_tokens = grad_logits.size(0), num_experts = grad_logits.size(1);
  const std::int64_t d = router_weight.size(1), row_stride = router_weight.stride(0);
  const ExpertCall call = gemm_call(stream, device, num_tokens, num_experts, d, 1, terms);
  const std::array<std::int64_t, 3> shape{1, num_experts, d};
  const std::array<std::int64_t, 3> strides{num_experts * row_stride, row_stride, 1};
  const InputGradientArgs args{.grad_h = terms.high,
                               .w1 = {router_weight.data(), DType::kBFloat16, shape, strides},
                               .first_column = first_column,
                               .num_columns = num_columns,
                               .out = {out, num_columns}};
  if (!hopper::reason_against(call, args).empty()) return false;
  split_terms(stream, grad_logits, terms, "router's share of dX");
  hopper::input_gradient(call, args);
  return true;
}

bool weight_parts_on_grouped_gemm(cudaStream_t stream, int device, ConstTensorView x,
                                  ConstTensorView grad_logits, float* parts,
                                  const GradientTerms& terms) {
  if (x.dtype() != DType::kBFloat16) return false;
  const std::int64_t num_tokens = x.size(0), num_experts = grad_logits.size(1), d = x.size(1);
  const ExpertCall call =
      gemm_call(stream, device, num_tokens, num_experts, d, terms.num_slices, terms);
  UpWeightGradientArgs args{
      .grad_h = terms.high,
      .x = {const_cast<void*>(x.data()), x.stride(0)},
      .grad_w1 = TensorView(parts, DType::kFloat32, {terms.num_slices, num_experts, d})};
  if (!hopper::reason_against(call, args).empty()) return false;
  split_terms(stream, grad_logits, terms, "router_logits_backward");
  hopper::up_weight_gradient(call, args);
  args.grad_h = terms.low;
  args.accumulate = true;
  hopper::up_weight_gradient(call, args);
  return true;
}

}  // namespace sonicmoe::cuda::router
