#include <cuda_bf16.h>

#include <array>

#include "cuda/hopper/select.hpp"
#include "cuda/router/gradient_gemm.hpp"
#include "cuda/router/launch.hpp"

namespace sonicmoe::cuda::router {
namespace {

using bf16 = __nv_bfloat16;

constexpr std::int64_t kVector = 4;  // values of dlogits per load

// dlogits is read as vectors that stay inside a row.
bool can_split(ConstTensorView grad_logits) {
  return reinterpret_cast<std::uintptr_t>(grad_logits.data()) % sizeof(float4) == 0 &&
         grad_logits.size(1) % kVector == 0;
}

struct alignas(8) FourTerms {
  __nv_bfloat162 xy, zw;
};

// The terms of dlogits, and the tables of rows. Null pointers are left out.
__global__ void split_terms_kernel(const float4* grad_logits, std::int64_t num_tokens,
                                   std::int64_t num_experts, GradientTerms terms) {
  const std::int64_t first = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  const std::int64_t per_row = num_experts / kVector;
  auto* out = static_cast<FourTerms*>(terms.values);
  for (std::int64_t i = first; i < num_tokens * per_row; i += step) {
    const float4 v = grad_logits[i];
    const FourTerms high{__floats2bfloat162_rn(v.x, v.y), __floats2bfloat162_rn(v.z, v.w)};
    if (terms.count == 1) {
      out[i] = high;
      continue;
    }
    FourTerms* at = out + i + i / per_row * per_row;
    at[0] = high;
    at[per_row] = {__floats2bfloat162_rn(v.x - __low2float(high.xy), v.y - __high2float(high.xy)),
                   __floats2bfloat162_rn(v.z - __low2float(high.zw), v.w - __high2float(high.zw))};
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
  const std::int64_t vectors = grad_logits.numel() / kVector;
  split_terms_kernel<<<grid_stride_blocks(vectors, 256), 256, 0, stream>>>(
      static_cast<const float4*>(grad_logits.data()), grad_logits.size(0), grad_logits.size(1),
      terms);
  check_launch(operation);
}

// A call of the grouped GEMMs: a token's terms are what its row of dH is to an ungated expert.
ExpertCall gemm_call(cudaStream_t stream, int device, std::int64_t num_tokens,
                     std::int64_t num_experts, std::int64_t d, std::int64_t groups,
                     const GradientTerms& terms) {
  ExpertCall call;
  call.shape.num_tokens = num_tokens;
  call.shape.num_pairs = num_tokens;
  call.shape.num_experts = groups;
  call.shape.hidden_size = d;
  call.shape.intermediate_size = terms.count * num_experts;
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

// The slices that cost least: waves of tiles on the 132 SMs times a tile's length, where storing a
// tile and summing it later counts as 512 tokens. At least 256 tokens each, and at most three
// waves, which bound the parts to 49.5 MiB (they are summed from L2) unless a single slice has
// more.
std::int64_t choose_slices(std::int64_t num_tokens, std::int64_t columns, std::int64_t d) {
  constexpr std::int64_t kProcessors = 132, kMaxWaves = 3, kMinTokens = 256, kTileCost = 512;
  const std::int64_t tiles = std::max<std::int64_t>(
      ceil_div(columns, hopper::choose_block_n(columns)) * ceil_div(d, kTileRows), 1);
  const std::int64_t most = std::min(kMaxWaves * kProcessors / tiles, num_tokens / kMinTokens);
  const auto cost = [&](std::int64_t slices) {
    return ceil_div(slices * tiles, kProcessors) * (slice_rows(num_tokens, slices) + kTileCost);
  };
  std::int64_t best = 1;
  for (std::int64_t slices = 2; slices <= most; ++slices) {
    if (cost(slices) < cost(best)) best = slices;
  }
  return best;
}

}  // namespace

GradientTerms carve_share_terms(WorkspaceCarver& carver, std::int64_t num_tokens,
                                std::int64_t num_experts) {
  GradientTerms terms;
  terms.count = 1;
  terms.values = carver.take<bf16>(static_cast<std::size_t>(num_tokens * num_experts));
  terms.tiles = carver.take<int4>(static_cast<std::size_t>(tile_capacity(num_tokens, 1)));
  terms.num_tiles = carver.take<std::int32_t>(1);
  terms.claims = carver.take<std::uint32_t>(2);
  return terms;
}

GradientTerms carve_weight_terms(WorkspaceCarver& carver, std::int64_t num_tokens,
                                 std::int64_t num_experts, std::int64_t d) {
  GradientTerms terms;
  terms.count = kWeightTerms;
  terms.rows_per_slice =
      slice_rows(num_tokens, choose_slices(num_tokens, kWeightTerms * num_experts, d));
  terms.num_slices = std::max<std::int64_t>(ceil_div(num_tokens, terms.rows_per_slice), 1);
  terms.values =
      carver.take<bf16>(static_cast<std::size_t>(num_tokens * kWeightTerms * num_experts));
  terms.slices = carver.take<int4>(static_cast<std::size_t>(terms.num_slices));
  terms.claims = carver.take<std::uint32_t>(2);
  return terms;
}

bool share_on_grouped_gemm(cudaStream_t stream, int device, ConstTensorView grad_logits,
                           ConstTensorView router_weight, std::int64_t first_column,
                           std::int64_t num_columns, void* out, const GradientTerms& terms) {
  if (router_weight.dtype() != DType::kBFloat16 || !can_split(grad_logits)) return false;
  const std::int64_t num_tokens = grad_logits.size(0), num_experts = grad_logits.size(1);
  const std::int64_t d = router_weight.size(1), row_stride = router_weight.stride(0);
  const ExpertCall call = gemm_call(stream, device, num_tokens, num_experts, d, 1, terms);
  const std::array<std::int64_t, 3> shape{1, num_experts, d};
  const std::array<std::int64_t, 3> strides{num_experts * row_stride, row_stride, 1};
  const InputGradientArgs args{.grad_h = terms.values,
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
  if (x.dtype() != DType::kBFloat16 || !can_split(grad_logits)) return false;
  const std::int64_t num_tokens = x.size(0), num_experts = grad_logits.size(1), d = x.size(1);
  const ExpertCall call =
      gemm_call(stream, device, num_tokens, num_experts, d, terms.num_slices, terms);
  const UpWeightGradientArgs args{
      .grad_h = terms.values,
      .x = {const_cast<void*>(x.data()), x.stride(0)},
      .grad_w1 =
          TensorView(parts, DType::kFloat32, {terms.num_slices, kWeightTerms * num_experts, d})};
  if (!hopper::reason_against(call, args).empty()) return false;
  split_terms(stream, grad_logits, terms, "router_logits_backward");
  hopper::up_weight_gradient(call, args);
  return true;
}

}  // namespace sonicmoe::cuda::router
