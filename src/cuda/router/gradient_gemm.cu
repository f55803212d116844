#include <array>

#include "cuda/device.hpp"
#include "cuda/element.hpp"
#include "cuda/router/gradient_gemm.hpp"
#include "cuda/router/gradient_terms.cuh"
#include "cuda/router/launch.hpp"

namespace sonicmoe::cuda::router {
namespace {

// dlogits is read as vectors that stay inside a row.
bool can_split(const LogitsGradient& grad_logits) {
  return reinterpret_cast<std::uintptr_t>(grad_logits.data) % sizeof(float4) == 0 &&
         grad_logits.num_experts % FourTerms::kCount == 0;
}

// The terms of float32 dlogits, and the lists.
__global__ void split_terms_kernel(const float4* grad_logits, std::int64_t num_tokens,
                                   std::int64_t num_experts, GradientTerms terms) {
  const std::int64_t first = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const std::int64_t step = std::int64_t{gridDim.x} * blockDim.x;
  const std::int64_t per_row = num_experts / FourTerms::kCount;
  auto* out = static_cast<FourTerms*>(terms.values);
  for (std::int64_t i = first; i < num_tokens * per_row; i += step) {
    const float4 v = grad_logits[i];
    const FourTerms high = high_terms(v);
    if (terms.count == 1) {
      out[i] = high;
      continue;
    }
    FourTerms* at = out + i + i / per_row * per_row;
    at[0] = high;
    at[per_row] = low_terms(v, high);
  }
  write_lists(terms, num_tokens, first, step);
}

__global__ void write_lists_kernel(GradientTerms terms, std::int64_t num_tokens) {
  write_lists(terms, num_tokens, threadIdx.x, blockDim.x);
}

void split_terms(cudaStream_t stream, const LogitsGradient& grad_logits, const GradientTerms& terms,
                 const char* operation) {
  const std::int64_t T = grad_logits.num_tokens, E = grad_logits.num_experts;
  split_terms_kernel<<<grid_stride_blocks(T * E / FourTerms::kCount, 256), 256, 0, stream>>>(
      static_cast<const float4*>(grad_logits.data), T, E, terms);
  check_launch(operation);
}

ProductCall product_call(const Context& context, std::int64_t num_tokens,
                         const GradientTerms& terms) {
  return {.num_tokens = num_tokens,
          .num_rows = num_tokens,
          .rows = {.tiles = terms.tiles,
                   .num_tiles = terms.num_tiles,
                   .groups = terms.slices,
                   .claims = terms.claims},
          .stream = stream_of(context),
          .device = context.device.index,
          .shared_device = context.shared_device};
}

RowsArgs grad_x_args(ConstTensorView router_weight, std::int64_t first_column,
                     std::int64_t num_columns, Matrix out, const void* terms) {
  const std::int64_t num_experts = router_weight.size(0), row_stride = router_weight.stride(0);
  const std::array<std::int64_t, 3> shape{1, num_experts, router_weight.size(1)};
  const std::array<std::int64_t, 3> strides{num_experts * row_stride, row_stride, 1};
  return {.a = terms,
          .weight = {router_weight.data(), router_weight.dtype(), shape, strides},
          .depth_dim = 1,
          .first_column = first_column,
          .num_columns = num_columns,
          .out = out};
}

// The rows, which are the terms, are left for the caller to set.
WeightGradientArgs weight_args(ConstTensorView x, std::int64_t num_experts, std::int64_t num_slices,
                               float* parts) {
  return {.gathered = {const_cast<void*>(x.data()), x.stride(0)},
          .grad = TensorView(parts, DType::kFloat32,
                             {num_slices, kWeightTerms * num_experts, x.size(1)}),
          .gathered_dim = 2};
}

}  // namespace

GradientTerms carve_grad_x_terms(WorkspaceCarver& carver, std::int64_t num_tokens,
                                 std::int64_t num_experts) {
  GradientTerms terms;
  terms.count = 1;
  terms.values = carver.take<bf16>(static_cast<std::size_t>(num_tokens * num_experts));
  terms.tiles = carver.take<int4>(static_cast<std::size_t>(tile_capacity(num_tokens, 1)));
  terms.num_tiles = carver.take<std::int32_t>(1);
  terms.claims = carver.take<std::uint32_t>(RowLists::kCounters);
  return terms;
}

GradientTerms carve_weight_terms(WorkspaceCarver& carver, const Products& products,
                                 std::int64_t num_tokens, std::int64_t num_experts,
                                 std::int64_t d) {
  GradientTerms terms;
  terms.count = kWeightTerms;
  terms.rows_per_slice =
      slice_rows(num_tokens, products.row_slices(num_tokens, d, kWeightTerms * num_experts));
  terms.num_slices = std::max<std::int64_t>(ceil_div(num_tokens, terms.rows_per_slice), 1);
  terms.values =
      carver.take<bf16>(static_cast<std::size_t>(num_tokens * kWeightTerms * num_experts));
  terms.slices = carver.take<int4>(static_cast<std::size_t>(terms.num_slices));
  terms.claims = carver.take<std::uint32_t>(RowLists::kCounters);
  return terms;
}

bool grad_x_on_grouped_gemm(const Context& context, const LogitsGradient& grad_logits,
                            ConstTensorView router_weight, std::int64_t first_column,
                            std::int64_t num_columns, Matrix out, const GradientTerms& terms) {
  const Products& products = products_of(context.device.index);
  const ProductCall call = product_call(context, grad_logits.num_tokens, terms);
  const RowsArgs args = grad_x_args(router_weight, first_column, num_columns, out, terms.values);
  if (!grad_logits.split) {
    if (!can_split(grad_logits) || products.reason_against(call, args)) return false;
    if (first_column == 0) split_terms(call.stream, grad_logits, terms, "router's dX");
  }
  products.run(call, args);
  return true;
}

bool weight_parts_on_grouped_gemm(const Context& context, ConstTensorView x,
                                  const LogitsGradient& grad_logits, float* parts,
                                  const GradientTerms& terms) {
  const char* operation = "router_logits_backward";
  const std::int64_t num_tokens = x.size(0), num_experts = grad_logits.num_experts;
  const Products& products = products_of(context.device.index);
  const ProductCall call = product_call(context, num_tokens, terms);
  WeightGradientArgs args = weight_args(x, num_experts, terms.num_slices, parts);
  if (grad_logits.split) {
    args.rows = grad_logits.data;
    write_lists_kernel<<<1, 256, 0, call.stream>>>(terms, num_tokens);
    check_launch(operation);
  } else {
    if (x.dtype() != DType::kBFloat16 || !can_split(grad_logits)) return false;
    if (products.reason_against(call, args)) return false;
    args.rows = terms.values;
    split_terms(call.stream, grad_logits, terms, operation);
  }
  products.run(call, args);
  return true;
}

bool products_take_terms(ConstTensorView x, ConstTensorView router_weight, std::int64_t num_columns,
                         Matrix grad_x) {
  if (x.dtype() != DType::kBFloat16) return false;
  const Products& products = products_of(x.device().index);
  const ProductCall call = product_call({.device = x.device()}, x.size(0), {});
  // Stands for the parts, of which only the alignment is known here, that of any workspace.
  alignas(WorkspaceCarver::kAlignment) float parts[1];
  return !products.reason_against(call,
                                  grad_x_args(router_weight, 0, num_columns, grad_x, nullptr)) &&
         !products.reason_against(call, weight_args(x, router_weight.size(0), 1, parts));
}

}  // namespace sonicmoe::cuda::router
