#include <cuda_bf16.h>

#include <algorithm>

#include "core/integers.hpp"
#include "cuda/epilogue/vector8.cuh"
#include "cuda/experts/aggregate.hpp"
#include "cuda/launch_check.hpp"
#include "cuda/ptx/memory.cuh"

namespace sonicmoe::cuda {
namespace {

using bf16 = __nv_bfloat16;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kChunk = 256;  // columns of one warp

struct Sources {
  const bf16* rows;
  std::int64_t rows_ld;
  const void* weights;  // by pair, or null
  bool weights_are_bf16;
  bf16* out;
  std::int64_t out_ld;
  bool add_to_out;
  std::int64_t num_tokens;
  int columns, chunks, top_k;  // top_k 0: pair list
  bool vector_out;             // out rows start at multiples of 16 bytes

  __device__ float weight(std::int64_t pair) const {
    if (weights == nullptr) return 1.0f;
    return weights_are_bf16 ? __bfloat162float(static_cast<const bf16*>(weights)[pair])
                            : static_cast<const float*>(weights)[pair];
  }
};

// The rows of one token: where they lie in `rows` and their weights, for up to 32 at a time, one
// per lane; at -1: nothing there.
struct TokenRows {
  int at;
  float weight;
};
__device__ TokenRows rows_of_token(const Sources& s, const Metadata& m, std::int64_t t, int first,
                                   int count, int lane) {
  const int i = first + lane;
  if (i >= count) return {-1, 0.0f};
  if (s.top_k > 0) {
    const std::int64_t pair = t * s.top_k + i;
    const int row = m.pair_row[pair];
    return row < 0 ? TokenRows{-1, 0.0f} : TokenRows{row, s.weight(pair)};
  }
  const int row = m.token_rows[m.token_start[t] + i];
  return {row, s.weight(m.row_pair[row])};
}

__device__ void add_vector(float (&sum)[8], const uint4& value, float weight) {
  float v[8];
  unpack(value, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] += weight * v[i];
}

// Adds the rows of kRows slots of the token, from `first` on; bits of `present`: slots that have
// one. The loads are in flight together. They have no predicates, with which the compiler would
// make each wait for the one whose registers it shares: a slot without a row has the place of one
// that has.
template <int kRows>
__device__ void add_rows(const Sources& s, const TokenRows& mine, unsigned present, int first,
                         int column, float (&sum)[8]) {
  uint4 values[kRows];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const int at = __shfl_sync(~0u, mine.at, (first + j) & 31);
    values[j] = ptx::load_global_nc_v4(s.rows + std::int64_t{at} * s.rows_ld + column);
  }
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const float weight = __shfl_sync(~0u, mine.weight, (first + j) & 31);
    if (((present >> ((first + j) & 31)) & 1u) != 0) add_vector(sum, values[j], weight);
  }
}

// One warp per token and kChunk columns, the chunks of a token side by side: a row is fetched from
// DRAM in one piece (chunk after chunk in one warp measured 1.4 times slower).
__global__ void __launch_bounds__(kThreads) aggregate_kernel(Sources s, Metadata m) {
  const int lane = threadIdx.x % 32;
  const std::int64_t warp = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const std::int64_t t = warp / s.chunks;
  if (t >= s.num_tokens) return;
  const int wanted = static_cast<int>(warp % s.chunks) * kChunk + lane * 8;
  const bool inside = wanted < s.columns;
  const int column = inside ? wanted : 0;
  const int count = s.top_k > 0 ? s.top_k : m.token_start[t + 1] - m.token_start[t];
  bf16* out = s.out + t * s.out_ld + column;
  uint4 before{};
  if (s.add_to_out && s.vector_out && inside) before = ptx::load_global_v4(out);
  float sum[8] = {};
  TokenRows mine{-1, 0.0f};
  unsigned present = 0;
  for (int first = 0; first < count;) {
    if (first % 32 == 0) {
      mine = rows_of_token(s, m, t, first, count, lane);
      present = __ballot_sync(~0u, mine.at >= 0);
      const int any = __shfl_sync(~0u, mine.at, max(__ffs(present) - 1, 0));
      if (mine.at < 0) mine.at = any;
    }
    const int left = count - first;
    if (present == 0) {
      first += 32;
    } else if (left >= 8) {
      add_rows<8>(s, mine, present, first, column, sum);
      first += 8;
    } else if (left >= 4) {
      add_rows<4>(s, mine, present, first, column, sum);
      first += 4;
    } else if (left >= 2) {
      add_rows<2>(s, mine, present, first, column, sum);
      first += 2;
    } else {
      add_rows<1>(s, mine, present, first, column, sum);
      first += 1;
    }
  }
  if (!inside) return;
  if (s.vector_out) {
    if (s.add_to_out) add_vector(sum, before, 1.0f);
    ptx::store_global_streaming_v4(out, pack(sum));
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      out[i] = __float2bfloat16(sum[i] + (s.add_to_out ? __bfloat162float(out[i]) : 0.0f));
    }
  }
}

__global__ void zero_tail_kernel(Metadata m, std::int64_t num_rows, bf16* out, std::int64_t ld,
                                 std::int64_t columns) {
  const std::int64_t first = m.offsets[m.num_experts - 1];
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
       i < (num_rows - first) * columns; i += std::int64_t{gridDim.x} * kThreads) {
    out[(first + i / columns) * ld + i % columns] = __float2bfloat16(0.0f);
  }
}

__device__ int expert_of(const Metadata& m, std::int64_t row) {
  int low = 0, high = static_cast<int>(m.num_experts) - 1;  // first expert whose end is past row
  while (low < high) {
    const int middle = (low + high) / 2;
    if (m.offsets[middle] > row) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// One thread per pair, without <dO, b2>.
__global__ void sum_partials_kernel(Metadata m, std::int64_t num_pairs, const float* partial,
                                    int parts, float* grad) {
  const std::int64_t pair = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pair >= num_pairs) return;
  const std::int64_t row = m.pair_row == nullptr ? pair : m.pair_row[pair];
  float sum = 0.0f;
  if (row >= 0 && row < m.offsets[m.num_experts - 1]) {
    for (int j = 0; j < parts; ++j) sum += partial[row * parts + j];
  }
  grad[pair] = sum;
}

// One warp per pair.
__global__ void finish_weight_gradient_kernel(Metadata m, std::int64_t num_pairs,
                                              const float* partial, int parts, const bf16* grad_out,
                                              std::int64_t grad_out_ld, const bf16* b2,
                                              std::int64_t b2_ld, int d, float* grad) {
  const std::int64_t pair = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (pair >= num_pairs) return;
  std::int64_t row = m.pair_row == nullptr ? pair : m.pair_row[pair];
  if (row >= m.offsets[m.num_experts - 1]) row = -1;
  float sum = 0.0f;
  if (row >= 0) {
    for (int j = lane; j < parts; j += 32) sum += partial[row * parts + j];
    if (b2 != nullptr) {
      const std::int64_t token = m.row_token == nullptr ? row : m.row_token[row];
      const bf16* bias = b2 + expert_of(m, row) * b2_ld;
      for (int c = lane; c < d; c += 32) {
        sum += __bfloat162float(grad_out[token * grad_out_ld + c]) * __bfloat162float(bias[c]);
      }
    }
    for (int distance = 16; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(~0u, sum, distance);
    }
  }
  if (lane == 0) grad[pair] = sum;
}

// One CTA per expert and 32 columns; warp w sums rows w, w + 8, ..., then the warps are summed in
// order.
__global__ void bias_gradient_kernel(Metadata m, const bf16* values, std::int64_t ld, bool by_token,
                                     const float* row_weight, void* grad, bool grad_is_bf16,
                                     std::int64_t grad_ld, int columns, bool accumulate) {
  __shared__ float sums[kWarps][32];
  const int e = blockIdx.y, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int column = blockIdx.x * 32 + lane;
  const int first = e == 0 ? 0 : m.offsets[e - 1];
  float sum = 0.0f;
  for (int row = first + warp; row < m.offsets[e]; row += kWarps) {
    const std::int64_t source = by_token && m.row_token != nullptr ? m.row_token[row] : row;
    const float weight = row_weight == nullptr ? 1.0f : row_weight[row];
    if (column < columns) sum += weight * __bfloat162float(values[source * ld + column]);
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int w = 1; w < kWarps; ++w) sum += sums[w][lane];
  if (grad_is_bf16) {
    static_cast<bf16*>(grad)[e * grad_ld + column] = __float2bfloat16(sum);
  } else {
    float* at = static_cast<float*>(grad) + e * grad_ld + column;
    *at = accumulate ? *at + sum : sum;
  }
}

// CTAs for `count` items, `per_block` each.
unsigned grid_of(std::int64_t count, std::int64_t per_block) {
  return static_cast<unsigned>(ceil_div(count, per_block));
}

}  // namespace

void aggregate(cudaStream_t stream, const MoEShape& shape, const Metadata& metadata,
               const AggregateArgs& args) {
  if (shape.num_tokens == 0) return;
  Sources s{};
  s.rows = static_cast<const bf16*>(args.rows);
  s.rows_ld = args.rows_ld;
  s.weights = args.weights.data();
  s.weights_are_bf16 = args.weights.defined() && args.weights.dtype() == DType::kBFloat16;
  s.out = static_cast<bf16*>(args.out.data);
  s.out_ld = args.out.ld;
  s.add_to_out = args.add_to_out;
  s.num_tokens = shape.num_tokens;
  s.columns = static_cast<int>(args.columns);
  s.chunks = ceil_div(s.columns, kChunk);
  s.top_k = shape.form == MoEShape::Form::kTopK
                ? static_cast<int>(shape.num_pairs / shape.num_tokens)
                : 0;
  s.vector_out = args.out.has_aligned_rows();
  aggregate_kernel<<<grid_of(shape.num_tokens * s.chunks, kWarps), kThreads, 0, stream>>>(s,
                                                                                          metadata);
  check_launch(cudaGetLastError(), "aggregate", shape);
}

void zero_rows(cudaStream_t stream, const MoEShape& shape, Matrix out) {
  if (shape.num_tokens == 0) return;
  const std::int64_t pitch = std::max(out.ld, shape.hidden_size);  // any, where there is one row
  const auto bytes = [](std::int64_t columns) { return static_cast<std::size_t>(columns) * 2; };
  check_launch(cudaMemset2DAsync(out.data, bytes(pitch), 0, bytes(shape.hidden_size),
                                 static_cast<std::size_t>(shape.num_tokens), stream),
               "zero rows", shape);
}

void zero_tail(cudaStream_t stream, const MoEShape& shape, const Metadata& metadata, Matrix out,
               std::int64_t columns) {
  if (shape.num_pairs == 0) return;
  zero_tail_kernel<<<264, kThreads, 0, stream>>>(metadata, shape.num_pairs,
                                                 static_cast<bf16*>(out.data), out.ld, columns);
  check_launch(cudaGetLastError(), "zero rows past the last", shape);
}

void finish_weight_gradient(cudaStream_t stream, const MoEShape& shape, const Metadata& metadata,
                            const float* partial, int parts, Matrix grad_out, ConstTensorView b2,
                            float* grad) {
  if (shape.num_pairs == 0) return;
  if (!b2.defined()) {
    sum_partials_kernel<<<grid_of(shape.num_pairs, kThreads), kThreads, 0, stream>>>(
        metadata, shape.num_pairs, partial, parts, grad);
    return check_launch(cudaGetLastError(), "gradient of the routing weights", shape);
  }
  finish_weight_gradient_kernel<<<grid_of(shape.num_pairs, kWarps), kThreads, 0, stream>>>(
      metadata, shape.num_pairs, partial, parts, static_cast<const bf16*>(grad_out.data),
      grad_out.ld, b2.as<bf16>(), b2.defined() ? b2.stride(0) : 0,
      static_cast<int>(shape.hidden_size), grad);
  check_launch(cudaGetLastError(), "gradient of the routing weights", shape);
}

void bias_gradient(cudaStream_t stream, const MoEShape& shape, const Metadata& metadata,
                   Matrix values, bool by_token, const float* row_weight, TensorView grad,
                   bool accumulate) {
  const dim3 grid(grid_of(grad.size(1), 32), static_cast<unsigned>(shape.num_experts));
  bias_gradient_kernel<<<grid, kThreads, 0, stream>>>(
      metadata, static_cast<const bf16*>(values.data), values.ld, by_token, row_weight, grad.data(),
      grad.dtype() == DType::kBFloat16, grad.stride(0), static_cast<int>(grad.size(1)), accumulate);
  check_launch(cudaGetLastError(), "bias gradient", shape);
}

}  // namespace sonicmoe::cuda
