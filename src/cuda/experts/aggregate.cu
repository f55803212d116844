#include <algorithm>

#include "core/integers.hpp"
#include "cuda/element.hpp"
#include "cuda/experts/aggregate.hpp"
#include "cuda/experts/metadata.hpp"
#include "cuda/launch_check.hpp"
#include "cuda/ptx/memory.cuh"
#include "cuda/vector8.cuh"

namespace sonicmoe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = kVectorElements;
constexpr int kSpan = 32 * kVector;  // columns of a warp's load

// CTAs for `count` items, `per_block` each.
unsigned grid_of(std::int64_t count, std::int64_t per_block) {
  return static_cast<unsigned>(ceil_div(count, per_block));
}

struct Sources {
  const bf16* rows;
  std::int64_t rows_ld;
  const void* weights;  // by pair, or null
  bool weights_are_bf16;
  bf16* out;
  std::int64_t out_ld;
  bool add_to_out;
  int num_tokens, columns, top_k;  // top_k 0: pair list
  int chunks;                      // warps that share a token's columns
  bool vector_out;                 // out rows start at multiples of 16 bytes
  TokenOrder order;

  __device__ float weight(std::int64_t pair) const {
    if (weights == nullptr) return 1.0f;
    return weights_are_bf16 ? __bfloat162float(static_cast<const bf16*>(weights)[pair])
                            : static_cast<const float*>(weights)[pair];
  }
};

// 32 slots of a token, one per lane: where its rows lie in `rows` (-1: nowhere) and their weights.
struct Slots {
  int count;  // of the token, all of them
  int at;
  float weight;
};
template <bool kLists>
__device__ Slots slots_of_token(const Sources& s, const Metadata& m, int t, int first, int lane) {
  const int i = first + lane;
  if constexpr (kLists) {
    const int start = m.token_start[t], count = m.token_start[t + 1] - start;
    if (i >= count) return {count, -1, 0.0f};
    const int row = m.token_rows[start + i];
    return {count, row, row < 0 ? 0.0f : s.weight(m.row_pair[row])};
  } else {
    if (i >= s.top_k) return {s.top_k, -1, 0.0f};
    const std::int64_t pair = std::int64_t{t} * s.top_k + i;
    return {s.top_k, m.pair_row[pair], s.weight(pair)};
  }
}

__device__ void add_vector(float (&sum)[8], const uint4& value, float weight) {
  float v[8];
  unpack(value, v);
#pragma unroll
  for (int i = 0; i < 8; ++i) sum[i] += weight * v[i];
}

// What one lane sums: in each of kVectors spans of columns, eight that lie side by side.
template <int kVectors>
struct Columns {
  int first;  // column of the first span's eight
  float sum[kVectors][kVector];

  Columns() = default;
  __device__ Columns(int chunk, int lane) : first(chunk * kVectors * kSpan + lane * kVector) {
#pragma unroll
    for (int i = 0; i < kVectors * kVector; ++i) sum[i / kVector][i % kVector] = 0.0f;
  }
  __device__ int column(int v) const { return first + v * kSpan; }
  __device__ bool inside(const Sources& s, int v) const { return column(v) < s.columns; }
  // To read from, past the last column too.
  __device__ int readable(const Sources& s, int v) const { return inside(s, v) ? column(v) : 0; }
};

// Adds the rows of slots first to first + kRows - 1; bits of `present`: slots that have one. The
// loads are in flight together. They have no predicates, with which the compiler would make each
// wait for the one whose registers it shares: a slot without a row has the place of one that has.
template <int kRows, int kVectors>
__device__ void add_rows(const Sources& s, const Slots& slots, unsigned present, int first,
                         Columns<kVectors>& columns) {
  uint4 values[kRows][kVectors];
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const int at = __shfl_sync(~0u, slots.at, (first + j) & 31);
    const bf16* row = s.rows + std::int64_t{at} * s.rows_ld;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      values[j][v] = ptx::load_global_nc_v4(row + columns.readable(s, v));
    }
  }
#pragma unroll
  for (int j = 0; j < kRows; ++j) {
    const float weight = __shfl_sync(~0u, slots.weight, (first + j) & 31);
    if (first + j >= 32 || ((present >> (first + j)) & 1u) == 0) continue;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) add_vector(columns.sum[v], values[j][v], weight);
  }
}

// Adds the slots of `present` alone, kRows at a time.
template <int kRows, int kVectors>
__device__ void add_present(const Sources& s, const Slots& slots, unsigned present,
                            Columns<kVectors>& columns) {
  int last = 0;
#pragma unroll 1
  while (present != 0) {
    uint4 values[kRows][kVectors];
    float weights[kRows];
    int valid = 0;
#pragma unroll
    for (int j = 0; j < kRows; ++j) {  // past the last slot it is fetched again
      if (present != 0) last = __ffs(present) - 1, valid = j + 1;
      present &= present - 1;
      const bf16* row = s.rows + std::int64_t{__shfl_sync(~0u, slots.at, last)} * s.rows_ld;
      weights[j] = __shfl_sync(~0u, slots.weight, last);
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        values[j][v] = ptx::load_global_nc_v4(row + columns.readable(s, v));
      }
    }
#pragma unroll
    for (int j = 0; j < kRows; ++j) {
      if (j >= valid) continue;
#pragma unroll
      for (int v = 0; v < kVectors; ++v) add_vector(columns.sum[v], values[j][v], weights[j]);
    }
  }
}

// Adds 32 slots, of which `count` are the token's.
template <int kRows, int kVectors>
__device__ void add_slots(const Sources& s, Slots slots, int count, Columns<kVectors>& columns) {
  const unsigned present = __ballot_sync(~0u, slots.at >= 0);
  if (present == 0) return;
  if constexpr (kRows > 2) {  // few of many: what is absent would cost loads
    if (2 * __popc(present) <= count) return add_present<2>(s, slots, present, columns);
  }
  const int any = __shfl_sync(~0u, slots.at, __ffs(present) - 1);
  if (slots.at < 0) slots.at = any;
#pragma unroll 1
  for (int first = 0; first < count; first += kRows) {
    add_rows<kRows>(s, slots, present, first, columns);
  }
}

// Eight values of out, which need not start at a multiple of 16 bytes.
__device__ uint4 load_eight(const Sources& s, const bf16* out) {
  if (s.vector_out) return ptx::load_global_v4(out);
  const auto* half = reinterpret_cast<const unsigned short*>(out);
  const auto word = [half](int i) { return half[2 * i] | unsigned{half[2 * i + 1]} << 16; };
  return {word(0), word(1), word(2), word(3)};
}
__device__ void store_eight(const Sources& s, bf16* out, const uint4& values) {
  if (s.vector_out) return ptx::store_global_streaming_v4(out, values);
  auto* half = reinterpret_cast<unsigned short*>(out);
#pragma unroll
  for (int i = 0; i < kVector; ++i) {
    half[i] = static_cast<unsigned short>(word_of(values, i / 2) >> 16 * (i % 2));
  }
}

// CTAs on a multiprocessor. DRAM is far away: how many bytes are in flight sets the pace, so what a
// warp's loads and sums do not need goes to more warps.
constexpr int resident_blocks(int rows, int vectors) {
  if (vectors == 1) return rows <= 4 ? 5 : 4;
  return rows * vectors <= 4 ? 4 : 3;
}

// One warp per token and kVectors spans of columns, those of a token side by side: a row is fetched
// from DRAM in one piece (one after the other in one warp measured 1.4 times slower).
template <int kRows, int kVectors, bool kLists>
__global__ void __launch_bounds__(kThreads, resident_blocks(kRows, kVectors))
    aggregate_kernel(Sources s, Metadata m) {
  const int lane = threadIdx.x % 32;
  const unsigned warp = blockIdx.x * kWarps + threadIdx.x / 32;
  const int t = static_cast<int>(warp / s.chunks);
  if (t >= s.num_tokens) return;
  Columns<kVectors> columns(static_cast<int>(warp % s.chunks), lane);
  bf16* out = s.out + t * s.out_ld;
  if (s.add_to_out) {  // one more row, the last
#pragma unroll
    for (int v = 0; v < kVectors; ++v) ptx::prefetch_l2(out + columns.readable(s, v));
  }
  int count = 1;
#pragma unroll 1
  for (int first = 0; first < count; first += 32) {
    const Slots slots = slots_of_token<kLists>(s, m, t, first, lane);
    count = slots.count;
    add_slots<kRows>(s, slots, min(count - first, 32), columns);
  }
  if (s.add_to_out) {
    uint4 before[kVectors]{};
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (columns.inside(s, v)) before[v] = load_eight(s, out + columns.column(v));
    }
#pragma unroll
    for (int v = 0; v < kVectors; ++v) add_vector(columns.sum[v], before[v], 1.0f);
  }
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    if (columns.inside(s, v)) store_eight(s, out + columns.column(v), pack(columns.sum[v]));
  }
}

// Of tokens with few rows each: one warp sums one span of columns of kListedTokens tokens of the
// list, each of which has 16 lanes for its slots, then of as many further down.
constexpr int kListedTokens = 2, kListedSlots = 32 / kListedTokens;
constexpr int kListedBlocks = 4;  // on a multiprocessor
static_assert(kMostListedSlots <= kListedSlots);

// This lane's token of those from place `first` of the list on; -1 past the list's end and in lanes
// past the token's last slot.
__device__ int listed_token(const Sources& s, unsigned first, unsigned count, int lane) {
  const unsigned i = first + lane / kListedSlots;
  return i < count && lane % kListedSlots < s.top_k ? __ldg(s.order.tokens + i) : -1;
}
__device__ Slots listed_slots(const Sources& s, const Metadata& m, int token, int lane) {
  if (token < 0) return {s.top_k, -1, 0.0f};
  const std::int64_t pair = std::int64_t{token} * s.top_k + lane % kListedSlots;
  return {s.top_k, __ldg(m.pair_row + pair), s.weight(pair)};
}

// A token of the list leads to its slots, these to its rows: one way to DRAM after another. So
// while the rows of some tokens arrive, a warp fetches the slots of its next ones, and which come
// then.
__global__ void __launch_bounds__(kThreads, kListedBlocks)
    aggregate_listed_kernel(Sources s, Metadata m) {
  constexpr int kFirst = 2;  // rows of each token that are in flight at once
  constexpr unsigned kMask = (1u << kListedSlots) - 1;
  const int lane = threadIdx.x % 32;
  const unsigned warp = blockIdx.x * kWarps + threadIdx.x / 32, chunks = s.chunks;
  const unsigned groups = gridDim.x * kWarps / chunks;  // of warps that share their tokens
  if (warp >= groups * chunks) return;
  const int chunk = static_cast<int>(warp % chunks);
  const unsigned stride = groups * kListedTokens;
  const unsigned count = s.order.zero_absent && !s.add_to_out ? s.num_tokens : *s.order.num_tokens;
  unsigned first = warp / chunks * kListedTokens;
  int token = listed_token(s, first, count, lane);
  int following = listed_token(s, first + stride, count, lane);
  Slots slots = listed_slots(s, m, token, lane);
#pragma unroll 1
  for (; first < count; first += stride) {
    const unsigned all = __ballot_sync(~0u, slots.at >= 0);
    uint4 values[kListedTokens][kFirst];
    if (all != 0) {
      const Columns<1> columns(chunk, lane);
#pragma unroll
      for (int j = 0; j < kListedTokens; ++j) {
        unsigned left = all & (kMask << (j * kListedSlots));
#pragma unroll
        for (int i = 0; i < kFirst; ++i) {  // a token that has no more fetches any row
          const int slot = __ffs(static_cast<int>(left != 0 ? left : all)) - 1;
          left &= left - 1;
          const bf16* row = s.rows + std::int64_t{__shfl_sync(~0u, slots.at, slot)} * s.rows_ld;
          values[j][i] = ptx::load_global_nc_v4(row + columns.readable(s, 0));
        }
      }
    }
    const Slots next = listed_slots(s, m, following, lane);
    const int after = listed_token(s, first + 2 * stride, count, lane);
#pragma unroll
    for (int j = 0; j < kListedTokens; ++j) {
      Columns<1> columns(chunk, lane);
      unsigned left = all & (kMask << (j * kListedSlots));
#pragma unroll
      for (int i = 0; i < kFirst; ++i) {
        if (left == 0) continue;
        const int slot = __ffs(static_cast<int>(left)) - 1;
        add_vector(columns.sum[0], values[j][i], __shfl_sync(~0u, slots.weight, slot));
        left &= left - 1;
      }
      add_present<kFirst>(s, slots, left, columns);
      const std::int64_t t = __shfl_sync(~0u, token, j * kListedSlots);
      if (t < 0 || !columns.inside(s, 0)) continue;
      bf16* out = s.out + t * s.out_ld + columns.column(0);
      if (s.add_to_out) add_vector(columns.sum[0], load_eight(s, out), 1.0f);
      store_eight(s, out, pack(columns.sum[0]));
    }
    token = following;
    following = after;
    slots = next;
  }
}

void launch_listed(cudaStream_t stream, const MoEShape& shape, Sources s, const Metadata& m) {
  s.chunks = static_cast<int>(ceil_div(s.columns, kSpan));
  const std::int64_t most = s.order.zero_absent && !s.add_to_out
                                ? shape.num_tokens
                                : std::min(shape.num_tokens, shape.row_capacity());
  if (most == 0) return;
  int device = 0, processors = 0;
  check_launch(cudaGetDevice(&device), "aggregate", shape);
  check_launch(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
               "aggregate", shape);
  // All resident at once, and at least one warp for each span of columns.
  const std::int64_t warps = ceil_div(most, kListedTokens) * s.chunks;
  const std::int64_t blocks =
      std::max<std::int64_t>(std::int64_t{kListedBlocks} * processors, ceil_div(s.chunks, kWarps));
  aggregate_listed_kernel<<<static_cast<unsigned>(std::min(ceil_div(warps, kWarps), blocks)),
                            kThreads, 0, stream>>>(s, m);
  check_launch(cudaGetLastError(), "aggregate", shape);
}

template <int kRows, int kVectors, bool kLists>
void launch_aggregate(cudaStream_t stream, const MoEShape& shape, Sources s, const Metadata& m) {
  s.chunks = static_cast<int>(ceil_div(s.columns, kSpan * kVectors));
  aggregate_kernel<kRows, kVectors, kLists>
      <<<grid_of(std::int64_t{s.num_tokens} * s.chunks, kWarps), kThreads, 0, stream>>>(s, m);
  check_launch(cudaGetLastError(), "aggregate", shape);
}

// Of few rows a warp sums several spans, as many as divide the columns.
template <int kRows>
void launch_top_k(cudaStream_t stream, const MoEShape& shape, const Sources& s, const Metadata& m) {
  constexpr int kLoads = 8;  // in flight
  const auto spans = ceil_div(s.columns, kSpan);
  if constexpr (3 * kRows <= kLoads) {
    if (spans % 3 == 0) return launch_aggregate<kRows, 3, false>(stream, shape, s, m);
  }
  if constexpr (2 * kRows <= kLoads) {
    if (spans % 2 == 0) return launch_aggregate<kRows, 2, false>(stream, shape, s, m);
  }
  launch_aggregate<kRows, 1, false>(stream, shape, s, m);
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
  s.num_tokens = static_cast<int>(shape.num_tokens);
  s.columns = static_cast<int>(args.columns);
  s.top_k = shape.form == MoEShape::Form::kTopK
                ? static_cast<int>(shape.num_pairs / shape.num_tokens)
                : 0;
  s.vector_out = args.out.has_aligned_rows();
  s.order = args.tokens;
  constexpr int kMostRows = 8;  // in flight: all up to 8, else equal parts
  if (s.top_k == 0) return launch_aggregate<4, 1, true>(stream, shape, s, metadata);
  if (s.order.tokens != nullptr) return launch_listed(stream, shape, s, metadata);
  switch (ceil_div(s.top_k, ceil_div(s.top_k, kMostRows))) {
    case 1:
      return launch_top_k<1>(stream, shape, s, metadata);
    case 2:
      return launch_top_k<2>(stream, shape, s, metadata);
    case 3:
      return launch_top_k<3>(stream, shape, s, metadata);
    case 4:
      return launch_top_k<4>(stream, shape, s, metadata);
    case 5:
      return launch_top_k<5>(stream, shape, s, metadata);
    case 6:
      return launch_top_k<6>(stream, shape, s, metadata);
    case 7:
      return launch_top_k<7>(stream, shape, s, metadata);
    default:
      return launch_top_k<8>(stream, shape, s, metadata);
  }
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
