// The router's matrix products.
//   logits [T, E] = x Wrᵀ + bias          tensor cores for bf16, else float32
//   dWr [E, d] = dlogitsᵀ x, db = sums    split over T, the parts added in order
//   router's dX [T, d] = dlogits Wr
// dlogits is float32, or split into two bf16 terms already. With a bf16 operand beside it the
// products run on the grouped GEMMs (gradient_gemm.hpp) where those fit, else on the tensor cores
// in two or three terms (split_gemm.cuh); with a float32 one, in float32.
#include <type_traits>

#include "core/log.hpp"
#include "core/workspace.hpp"
#include "cuda/device.hpp"
#include "cuda/element.hpp"
#include "cuda/router/bias.cuh"
#include "cuda/router/gradient_gemm.hpp"
#include "cuda/router/launch.hpp"
#include "cuda/router/router.hpp"
#include "cuda/router/simt_gemm.cuh"
#include "cuda/router/split_gemm.cuh"

namespace sonicmoe::cuda::router {
namespace {

constexpr int kBiasSplits = 64;

// Calls function(pointer) with the elements' type.
template <class Function>
void visit_float_dtype(const ConstTensorView& view, Function&& function) {
  if (view.dtype() == DType::kFloat32) {
    function(static_cast<const float*>(view.data()));
  } else {
    function(static_cast<const bf16*>(view.data()));
  }
}

template <class A, class B, class Store>
void launch_simt(cudaStream_t stream, const A& a, const B& b, const SimtShape& shape,
                 std::int64_t splits, const Store& store, const char* operation) {
  const dim3 grid(static_cast<unsigned>(ceil_div(shape.m, kSimtTile)),
                  static_cast<unsigned>(ceil_div(shape.n, kSimtTile)),
                  static_cast<unsigned>(splits));
  simt_gemm_kernel<<<grid, kSimtThreads, 0, stream>>>(a, b, shape, store);
  check_launch(operation);
}

// A [M, K] float32 times the rows of a matrix B [K, N], on the tensor cores where B allows. A C
// that is stored as bf16 needs no third term.
template <Unit kUnit, class W, class Store>
void launch_product(cudaStream_t stream, const SimtOperand<float, kUnit>& a,
                    const SimtOperand<W, Unit::kWidth>& b, const SimtShape& shape,
                    std::int64_t splits, const Store& store, const char* operation) {
  if constexpr (std::is_same_v<W, bf16>) {
    if (reinterpret_cast<std::uintptr_t>(b.data) % 16 == 0 && (shape.k <= 1 || b.stride % 8 == 0)) {
      constexpr int kTerms = Store::kVectors ? 2 : 3;
      constexpr int kSharedBytes = kSplitSharedBytes<kUnit, kTerms>;
      const auto kernel = split_gemm_kernel<kUnit, kTerms, Store>;
      check_cuda(
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
          operation);
      const dim3 grid(static_cast<unsigned>(ceil_div(shape.m, kSplitTile)),
                      static_cast<unsigned>(ceil_div(shape.n, kSplitTile)),
                      static_cast<unsigned>(splits));
      kernel<<<grid, kSplitThreads, kSharedBytes, stream>>>(a, b, shape, store);
      return check_launch(operation);
    }
  }
  launch_simt(stream, a, b, shape, splits, store, operation);
}

struct LogitsOut {
  float* logits;  // [T, E]
  std::int64_t num_experts;
  RouterBias bias;

  __device__ void operator()(int, std::int64_t t, std::int64_t e, float sum) const {
    logits[t * num_experts + e] = sum + bias[e];
  }
};

struct MatrixOut {
  static constexpr bool kVectors = false;
  float* out;  // [splits, M, N]
  std::int64_t rows, columns;

  __device__ void operator()(int split, std::int64_t m, std::int64_t n, float sum) const {
    out[(split * rows + m) * columns + n] = sum;
  }
};

struct RowsOut {
  static constexpr bool kVectors = true;
  bf16* out;  // [M, N]; N is a multiple of 8
  std::int64_t ld;
  bool aligned;  // rows start at multiples of 16 bytes

  __device__ void operator()(int, std::int64_t m, std::int64_t n, float sum) const {
    out[m * ld + n] = __float2bfloat16(sum);
  }
  __device__ void vector(std::int64_t m, std::int64_t n, const uint4& value) const {
    bf16* to = out + m * ld + n;
    if (aligned) {
      *reinterpret_cast<uint4*>(to) = value;
    } else {
      for (int i = 0; i < 8; ++i) to[i] = reinterpret_cast<const bf16*>(&value)[i];
    }
  }
};

// --------------------------------------------------------------------------------- weight gradient

// Scratch of backward.
struct GradientParts {
  float* weight;  // [num_weight_parts, E, d]
  double* bias;   // [kBiasSplits, E]
  GradientTerms terms;
  std::int64_t num_weight_parts;
  GradientTerms grad_x;  // of the router's dX
};

GradientParts carve(WorkspaceCarver& carver, int device, std::int64_t num_tokens,
                    std::int64_t num_experts, std::int64_t d) {
  GradientParts parts;
  parts.terms = carve_weight_terms(carver, products_of(device), num_tokens, num_experts, d);
  parts.num_weight_parts = parts.terms.num_slices * kWeightTerms;
  parts.weight =
      carver.take<float>(static_cast<std::size_t>(parts.num_weight_parts * num_experts * d));
  parts.bias = carver.take<double>(static_cast<std::size_t>(kBiasSplits * num_experts));
  parts.grad_x = carve_grad_x_terms(carver, num_tokens, num_experts);
  return parts;
}

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth) Vector {
  T at[kWidth];
};

// A gradient of rows x columns in its own dtype and row stride; the columns have unit stride.
struct GradientOut {
  void* data;
  std::int64_t stride, rows, columns;
  bool is_bf16, accumulate;

  // Whether vectors of `width` elements stay inside a row and are aligned.
  bool takes_vectors(int width) const {
    const std::size_t bytes = static_cast<std::size_t>(width) * (is_bf16 ? 2 : 4);
    return columns % width == 0 && (stride % width == 0 || rows == 1) &&
           reinterpret_cast<std::uintptr_t>(data) % bytes == 0;
  }

  template <int kWidth>
  __device__ void put(std::int64_t row, std::int64_t column, Vector<float, kWidth> sum) const {
    const std::int64_t at = row * stride + column;
    if (is_bf16) {
      put_as<kWidth>(static_cast<bf16*>(data) + at, sum);
    } else {
      put_as<kWidth>(static_cast<float*>(data) + at, sum);
    }
  }

 private:
  template <int kWidth, class T>
  __device__ void put_as(T* at, Vector<float, kWidth> sum) const {
    auto* out = reinterpret_cast<Vector<T, kWidth>*>(at);
    Vector<T, kWidth> value{};
    if (accumulate) value = *out;
    for (int j = 0; j < kWidth; ++j) {
      value.at[j] = T(accumulate ? static_cast<float>(value.at[j]) + sum.at[j] : sum.at[j]);
    }
    *out = value;
  }
};

constexpr int kAddThreads = 128;

// Adds the parts from `first` on in order while kBatch are left: as many loads are in flight.
template <int kBatch, class Part, int kWidth>
__device__ void add_batches(const Vector<Part, kWidth>* parts, std::int64_t stride,
                            std::int64_t num_parts, std::int64_t& first,
                            Vector<Part, kWidth>& sum) {
  for (; first + kBatch <= num_parts; first += kBatch) {
    Vector<Part, kWidth> batch[kBatch];
#pragma unroll
    for (int s = 0; s < kBatch; ++s) batch[s] = parts[(first + s) * stride];
#pragma unroll
    for (int s = 0; s < kBatch; ++s) {
#pragma unroll
      for (int j = 0; j < kWidth; ++j) sum.at[j] += batch[s].at[j];
    }
  }
}

// parts [num_parts, rows, columns]. The outputs alone are too few to hide the loads' latency.
template <int kWidth, class Part>
__global__ void __launch_bounds__(kAddThreads)
    add_parts_kernel(const Part* parts, std::int64_t num_parts, GradientOut out) {
  const std::int64_t count = out.rows * out.columns / kWidth;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kAddThreads + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * kAddThreads) {
    const auto* vectors = reinterpret_cast<const Vector<Part, kWidth>*>(parts) + i;
    Vector<Part, kWidth> sum{};
    std::int64_t first = 0;
    add_batches<8>(vectors, count, num_parts, first, sum);
    add_batches<4>(vectors, count, num_parts, first, sum);
    add_batches<2>(vectors, count, num_parts, first, sum);
    add_batches<1>(vectors, count, num_parts, first, sum);
    Vector<float, kWidth> rounded;
    for (int j = 0; j < kWidth; ++j) rounded.at[j] = static_cast<float>(sum.at[j]);
    out.put<kWidth>(i * kWidth / out.columns, i * kWidth % out.columns, rounded);
  }
}

template <class Part>
void launch_add_parts(cudaStream_t stream, const Part* parts, std::int64_t num_parts,
                      const GradientOut& out) {
  constexpr int kWidth = 16 / sizeof(Part);
  const std::int64_t count = out.rows * out.columns;
  if (out.takes_vectors(kWidth)) {
    add_parts_kernel<kWidth>
        <<<grid_stride_blocks(count / kWidth, kAddThreads), kAddThreads, 0, stream>>>(
            parts, num_parts, out);
  } else {
    add_parts_kernel<1>
        <<<grid_stride_blocks(count, kAddThreads), kAddThreads, 0, stream>>>(parts, num_parts, out);
  }
  check_launch("router_logits_backward");
}

// dlogits(t, e) from either form (gradient_gemm.hpp).
struct FloatGradient {
  const float* values;  // [T, E]
  std::int64_t num_experts;

  __device__ float operator()(std::int64_t t, std::int64_t e) const {
    return values[t * num_experts + e];
  }
};
struct SplitGradient {
  const bf16* terms;  // [T, 2, E]
  std::int64_t num_experts;

  __device__ float operator()(std::int64_t t, std::int64_t e) const {
    const bf16* high = terms + kWeightTerms * t * num_experts + e;
    return __bfloat162float(high[0]) + __bfloat162float(high[num_experts]);
  }
};

// Column sums over the tokens of split blockIdx.y; 32 experts times 8 tokens per CTA.
template <class Gradient>
__global__ void __launch_bounds__(256)
    column_sums_kernel(Gradient gradient, std::int64_t num_tokens, double* parts) {
  const std::int64_t num_experts = gradient.num_experts;
  __shared__ double sums[8][32];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const std::int64_t e = std::int64_t{blockIdx.x} * 32 + lane;
  const std::int64_t begin = num_tokens * blockIdx.y / kBiasSplits;
  const std::int64_t end = num_tokens * (blockIdx.y + 1) / kBiasSplits;
  double sum = 0.0;
  if (e < num_experts) {
#pragma unroll 8
    for (std::int64_t t = begin + warp; t < end; t += 8) sum += gradient(t, e);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && e < num_experts) {
    double total = 0.0;
    for (int w = 0; w < 8; ++w) total += sums[w][lane];
    parts[blockIdx.y * num_experts + e] = total;
  }
}

// parts [kBiasSplits, E] of the bias's gradient.
template <class Gradient>
void launch_column_sums(cudaStream_t stream, const Gradient& gradient, std::int64_t num_tokens,
                        double* parts) {
  const dim3 grid(static_cast<unsigned>(ceil_div(gradient.num_experts, 32)), kBiasSplits);
  column_sums_kernel<<<grid, 256, 0, stream>>>(gradient, num_tokens, parts);
  check_launch("router_logits_backward");
}

}  // namespace

void router_logits(const Context& context, ConstTensorView x, ConstTensorView weight,
                   ConstTensorView bias, TensorView logits) {
  const std::int64_t num_tokens = x.size(0);
  const std::int64_t num_experts = weight.size(0);
  const cudaStream_t stream = stream_of(context);
  if (num_tokens == 0) return;
  const Products& products = products_of(context.device.index);
  const ProductCall call{
      .num_tokens = num_tokens, .stream = stream, .device = context.device.index};
  const LogitsArgs args{.x = x, .weight = weight, .bias = bias, .logits = logits.as<float>()};
  if (!products.reason_against(call, args)) return products.run(call, args);
  log_choice("logits", [] { return "float32 units"; });
  const SimtShape shape{num_tokens, num_experts, x.size(1), x.size(1)};
  const LogitsOut store{logits.as<float>(), num_experts, RouterBias(bias)};
  visit_float_dtype(x, [&]<class X>(const X* x_data) {
    visit_float_dtype(weight, [&]<class W>(const W* weight_data) {
      launch_simt(stream, SimtOperand<X, Unit::kDepth>{x_data, x.stride(0)},
                  SimtOperand<W, Unit::kDepth>{weight_data, weight.stride(0)}, shape, 1, store,
                  "router_logits");
    });
  });
}

std::size_t router_logits_backward_workspace_bytes(int device, const MoEShape& shape) {
  WorkspaceCarver carver;
  carve(carver, device, shape.num_tokens, shape.num_experts, shape.hidden_size);
  return carver.used();
}

GradientTerms router_grad_x_terms(void* workspace, int device, const MoEShape& shape) {
  WorkspaceCarver carver(workspace);
  return carve(carver, device, shape.num_tokens, shape.num_experts, shape.hidden_size).grad_x;
}

void router_logits_backward(const Context& context, ConstTensorView x,
                            const LogitsGradient& grad_logits, TensorView grad_weight,
                            TensorView grad_bias, bool accumulate, void* workspace) {
  const char* operation = "router_logits_backward";
  const cudaStream_t stream = stream_of(context);
  const std::int64_t num_tokens = x.size(0);
  const std::int64_t d = x.size(1);
  const std::int64_t num_experts = grad_logits.num_experts;
  WorkspaceCarver carver(workspace);
  const GradientParts parts = carve(carver, context.device.index, num_tokens, num_experts, d);
  if (grad_weight.defined()) {
    std::int64_t num_parts = parts.num_weight_parts;
    if (!weight_parts_on_grouped_gemm(context, x, grad_logits, parts.weight, parts.terms)) {
      // No terms here: every part has tokens of its own.
      const std::int64_t tokens = slice_rows(num_tokens, num_parts);
      num_parts = std::max<std::int64_t>(ceil_div(num_tokens, tokens), 1);
      visit_float_dtype(x, [&]<class X>(const X* x_data) {
        launch_product(stream,
                       SimtOperand<float, Unit::kWidth>{static_cast<const float*>(grad_logits.data),
                                                        num_experts},
                       SimtOperand<X, Unit::kWidth>{x_data, x.stride(0)},
                       {num_experts, d, num_tokens, tokens}, num_parts,
                       MatrixOut{parts.weight, num_experts, d}, operation);
      });
    }
    launch_add_parts(stream, parts.weight, num_parts,
                     {grad_weight.data(), grad_weight.stride(0), num_experts, d,
                      grad_weight.dtype() == DType::kBFloat16, accumulate});
  }
  if (grad_bias.defined()) {
    if (grad_logits.split) {
      const SplitGradient gradient{static_cast<const bf16*>(grad_logits.data), num_experts};
      launch_column_sums(stream, gradient, num_tokens, parts.bias);
    } else {
      const FloatGradient gradient{static_cast<const float*>(grad_logits.data), num_experts};
      launch_column_sums(stream, gradient, num_tokens, parts.bias);
    }
    launch_add_parts(stream, parts.bias, kBiasSplits,
                     {grad_bias.data(), num_experts, 1, num_experts,
                      grad_bias.dtype() == DType::kBFloat16, accumulate});
  }
}

void router_grad_x(const Context& context, const LogitsGradient& grad_logits,
                   ConstTensorView router_weight, std::int64_t first_column,
                   std::int64_t num_columns, Matrix out, const GradientTerms& terms) {
  const std::int64_t num_tokens = grad_logits.num_tokens, num_experts = grad_logits.num_experts;
  if (num_tokens == 0 || num_columns == 0) return;
  if (grad_x_on_grouped_gemm(context, grad_logits, router_weight, first_column, num_columns, out,
                             terms)) {
    return;
  }
  const auto* values = static_cast<const float*>(grad_logits.data);
  visit_float_dtype(router_weight, [&]<class W>(const W* weight) {
    launch_product(stream_of(context), SimtOperand<float, Unit::kDepth>{values, num_experts},
                   SimtOperand<W, Unit::kWidth>{weight + first_column, router_weight.stride(0)},
                   {num_tokens, num_columns, num_experts, num_experts}, 1,
                   RowsOut{static_cast<bf16*>(out.data), out.ld, out.has_aligned_rows()},
                   "router_grad_x");
  });
}

}  // namespace sonicmoe::cuda::router
