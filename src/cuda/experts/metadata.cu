// Row lists by counting: pairs are counted per block of kBlockPairs and expert, the counts are
// scanned over blocks and experts, and every pair finds its row from its block's start and its rank
// among the block's earlier pairs of the same expert. Integer work in a fixed order: the same bits
// as the host's metadata.
#include <cuda_bf16.h>

#include "core/integers.hpp"
#include "cuda/experts/metadata.hpp"
#include "cuda/launch_check.hpp"

namespace sonicmoe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kPairsPerWarp = 128;
constexpr int kBlockPairs = kWarps * kPairsPerWarp;
constexpr int kScanThreads = 1024;

unsigned block_count(std::int64_t num_pairs) {
  return static_cast<unsigned>(ceil_div(num_pairs, kBlockPairs));
}

// Position of a pair in the caller's routing -> expert and token; expert -1 for a dropped pair.
struct PairSource {
  const void* expert_ids;
  const void* token_ids;  // null: top-K, token = position / K
  bool wide;              // int64 ids
  int top_k;
  std::int64_t num_tokens;
  int num_experts;

  __device__ static std::int64_t id_at(const void* ids, bool wide, std::int64_t i) {
    return wide ? static_cast<const std::int64_t*>(ids)[i]
                : std::int64_t{static_cast<const std::int32_t*>(ids)[i]};
  }
  __device__ std::int64_t token(std::int64_t pair) const {
    return token_ids == nullptr ? pair / top_k : id_at(token_ids, wide, pair);
  }
  __device__ int expert(std::int64_t pair) const {
    const std::int64_t e = id_at(expert_ids, wide, pair), t = token(pair);
    return e >= 0 && e < num_experts && t >= 0 && t < num_tokens ? static_cast<int>(e) : -1;
  }
};

// counts[block, e] = kept pairs of the block with expert e.
__global__ void count_experts(PairSource source, std::int64_t num_pairs, std::int32_t* counts) {
  extern __shared__ std::int32_t histogram[];  // [E]
  for (int e = threadIdx.x; e < source.num_experts; e += kThreads) histogram[e] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < kBlockPairs; i += kThreads) {
    const std::int64_t pair = std::int64_t{blockIdx.x} * kBlockPairs + i;
    const int e = pair < num_pairs ? source.expert(pair) : -1;
    if (e >= 0) atomicAdd(histogram + e, 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < source.num_experts; e += kThreads) {
    counts[std::int64_t{blockIdx.x} * source.num_experts + e] = histogram[e];
  }
}

__device__ std::int32_t warp_inclusive_sum(std::int32_t value, int lane) {
  for (int d = 1; d < 32; d *= 2) {
    const std::int32_t other = __shfl_up_sync(~0u, value, d);
    if (lane >= d) value += other;
  }
  return value;
}

// One warp per expert: counts[:, e] -> exclusive sums over the blocks, totals[e] = their sum.
__global__ void scan_blocks(std::int32_t* counts, int num_blocks, int num_experts,
                            std::int32_t* totals) {
  const int e = blockIdx.x * kWarps + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (e >= num_experts) return;
  std::int32_t carry = 0;
  for (int first = 0; first < num_blocks; first += 32) {
    const int block = first + lane;
    std::int32_t* at = counts + std::int64_t{block} * num_experts + e;
    const std::int32_t count = block < num_blocks ? *at : 0;
    const std::int32_t sum = warp_inclusive_sum(count, lane);
    if (block < num_blocks) *at = carry + sum - count;
    carry += __shfl_sync(~0u, sum, 31);
  }
  if (lane == 0) totals[e] = carry;
}

// Inclusive scan over the CTA of kScanThreads threads with an associative `combine`.
template <class Combine>
__device__ std::int32_t block_scan(std::int32_t value, Combine combine) {
  __shared__ std::int32_t warp_values[32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int d = 1; d < 32; d *= 2) {
    const std::int32_t other = __shfl_up_sync(~0u, value, d);
    if (lane >= d) value = combine(other, value);
  }
  if (lane == 31) warp_values[warp] = value;
  __syncthreads();
  std::int32_t before = 0;
  for (int w = 0; w < warp; ++w) before = w == 0 ? warp_values[0] : combine(before, warp_values[w]);
  __syncthreads();
  return warp == 0 ? value : combine(before, value);
}

// In place: values[i] -> inclusive scan from `start`. One CTA.
template <class Combine>
__device__ void scan_in_place(std::int32_t* values, std::int64_t count, std::int32_t start,
                              Combine combine) {
  __shared__ std::int32_t carry;
  if (threadIdx.x == 0) carry = start;
  __syncthreads();
  for (std::int64_t first = 0; first < count; first += kScanThreads) {
    const std::int64_t i = first + threadIdx.x;
    const std::int32_t mine = i < count ? values[i] : 0;
    const std::int32_t scanned = combine(carry, block_scan(mine, combine));
    if (i < count) values[i] = scanned;
    __syncthreads();
    if (threadIdx.x == kScanThreads - 1) carry = scanned;
    __syncthreads();
  }
}

struct Sum {
  __device__ std::int32_t operator()(std::int32_t a, std::int32_t b) const { return a + b; }
};
struct Max {
  __device__ std::int32_t operator()(std::int32_t a, std::int32_t b) const { return max(a, b); }
};

// Counts of the experts -> cumulative ends.
__global__ void __launch_bounds__(kScanThreads)
    scan_sums(std::int32_t* values, std::int64_t count) {
  scan_in_place(values, count, 0, Sum{});
}

// The caller's ends, made non-decreasing and at most `limit`.
__global__ void __launch_bounds__(kScanThreads)
    clamp_offsets(const std::int32_t* from, std::int32_t* to, int count, std::int32_t limit) {
  for (int e = threadIdx.x; e < count; e += kScanThreads) to[e] = min(max(from[e], 0), limit);
  __syncthreads();
  scan_in_place(to, count, 0, Max{});
}

// Gives every pair its row. Warp w of a block owns kPairsPerWarp consecutive pairs: the warps'
// counts are summed in order, then each warp ranks its pairs 32 at a time.
__global__ void place_pairs(PairSource source, std::int64_t num_pairs, const std::int32_t* starts,
                            Metadata m) {
  extern __shared__ std::int32_t next[];  // [kWarps, E]: the next rank of the warp's expert e
  const int E = source.num_experts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < kWarps * E; i += kThreads) next[i] = 0;
  __syncthreads();
  const std::int64_t first = std::int64_t{blockIdx.x} * kBlockPairs + warp * kPairsPerWarp;
  for (int i = lane; i < kPairsPerWarp; i += 32) {
    const int e = first + i < num_pairs ? source.expert(first + i) : -1;
    if (e >= 0) atomicAdd(next + warp * E + e, 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kThreads) {
    std::int32_t row = starts[std::int64_t{blockIdx.x} * E + e] + (e == 0 ? 0 : m.offsets[e - 1]);
    for (int w = 0; w < kWarps; ++w) {
      const std::int32_t count = next[w * E + e];
      next[w * E + e] = row;
      row += count;
    }
  }
  __syncthreads();
  const std::int32_t num_rows = m.offsets[E - 1];
  for (int i = 0; i < kPairsPerWarp; i += 32) {
    const std::int64_t pair = first + i + lane;
    const int e = pair < num_pairs ? source.expert(pair) : -1;
    const unsigned same = __match_any_sync(~0u, e);
    const int rank = __popc(same & ((1u << lane) - 1));
    std::int32_t row = -1;
    if (e >= 0) row = next[warp * E + e] + rank;
    __syncwarp();
    if (e >= 0 && rank == 0) next[warp * E + e] += __popc(same);
    __syncwarp();
    if (pair >= num_pairs) continue;
    m.pair_row[pair] = row;
    if (row >= 0) {
      m.row_token[row] = static_cast<std::int32_t>(source.token(pair));
      m.row_pair[row] = static_cast<std::int32_t>(pair);
    }
    if (pair >= num_rows) m.row_token[pair] = m.row_pair[pair] = -1;  // defined past the last row
  }
}

// ------------------------------------------------------------------- rows of a token (pair lists)

__global__ void count_tokens(PairSource source, std::int64_t num_pairs, Metadata m) {
  const std::int64_t pair = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pair < num_pairs && m.pair_row[pair] >= 0) {
    atomicAdd(m.token_start + source.token(pair) + 1, 1);
  }
}

// Pairs of each token in arrival order; sort_tokens() puts them in input order.
__global__ void collect_pairs(PairSource source, std::int64_t num_pairs, Metadata m,
                              std::int32_t* cursors) {
  const std::int64_t pair = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (pair >= num_pairs) return;
  if (m.pair_row[pair] >= 0) {
    const std::int64_t t = source.token(pair);
    m.token_rows[m.token_start[t] + atomicAdd(cursors + t, 1)] = static_cast<std::int32_t>(pair);
  }
  if (pair >= m.offsets[m.num_experts - 1]) m.token_rows[pair] = -1;
}

__device__ void sift_down(std::int32_t* heap, int root, int count) {
  for (int child = 2 * root + 1; child < count; child = 2 * root + 1) {
    if (child + 1 < count && heap[child + 1] > heap[child]) ++child;
    if (heap[root] >= heap[child]) return;
    const std::int32_t swap = heap[root];
    heap[root] = heap[child];
    heap[child] = swap;
    root = child;
  }
}

// One thread per token: a heap sort of its few pairs, then pairs -> rows.
__global__ void sort_tokens(std::int64_t num_tokens, Metadata m) {
  const std::int64_t t = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (t >= num_tokens) return;
  std::int32_t* list = m.token_rows + m.token_start[t];
  const int count = m.token_start[t + 1] - m.token_start[t];
  for (int i = count / 2 - 1; i >= 0; --i) sift_down(list, i, count);
  for (int end = count - 1; end > 0; --end) {
    const std::int32_t largest = list[0];
    list[0] = list[end];
    list[end] = largest;
    sift_down(list, 0, end);
  }
  for (int i = 0; i < count; ++i) list[i] = m.pair_row[list[i]];
}

// ----------------------------------------------------------------------------------------- tables

// One CTA. Shared: counts [E], first tile [E].
__global__ void __launch_bounds__(kScanThreads)
    make_tables(const std::int32_t* offsets, int num_experts, RowTables tables) {
  extern __shared__ std::int32_t shared[];
  std::int32_t *counts = shared, *tile_ends = shared + num_experts;
  for (int e = threadIdx.x; e < num_experts; e += kScanThreads) {
    counts[e] = offsets[e] - (e == 0 ? 0 : offsets[e - 1]);
    tile_ends[e] = (counts[e] + kTileRows - 1) / kTileRows;
  }
  __syncthreads();
  scan_in_place(tile_ends, num_experts, 0, Sum{});
  if (threadIdx.x == 0) *tables.num_tiles = tile_ends[num_experts - 1];
  if (threadIdx.x < 2) tables.claims[threadIdx.x] = 0;
  for (int e = threadIdx.x / 32; e < num_experts; e += kScanThreads / 32) {
    const int tiles = (counts[e] + kTileRows - 1) / kTileRows, first = tile_ends[e] - tiles;
    for (int i = threadIdx.x % 32; i < tiles; i += 32) {
      tables.tiles[first + i] = {offsets[e] - counts[e] + i * kTileRows,
                                 min(kTileRows, counts[e] - i * kTileRows), e, 0};
    }
  }
  for (int e = threadIdx.x; e < num_experts; e += kScanThreads) {
    int rank = 0;  // experts with more rows, or as many and a lower index
    for (int other = 0; other < num_experts; ++other) {
      rank += counts[other] > counts[e] || (counts[other] == counts[e] && other < e) ? 1 : 0;
    }
    tables.experts[rank] = {offsets[e] - counts[e], counts[e], e, 0};
  }
}

__global__ void gather_row_weights(const void* weights, bool is_bfloat16, Metadata m,
                                   std::int64_t num_pairs, float* out) {
  const std::int64_t row = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (row >= num_pairs || row >= m.offsets[m.num_experts - 1]) return;
  const std::int64_t pair = m.row_pair == nullptr ? row : m.row_pair[row];
  out[row] = is_bfloat16 ? __bfloat162float(static_cast<const __nv_bfloat16*>(weights)[pair])
                         : static_cast<const float*>(weights)[pair];
}

unsigned grid_of(std::int64_t threads) {
  return static_cast<unsigned>(ceil_div(threads, kThreads));
}

PairSource pair_source(const MoEShape& shape, const Routing& routing) {
  PairSource s{};
  s.num_tokens = shape.num_tokens;
  s.num_experts = static_cast<int>(shape.num_experts);
  if (const auto* topk = std::get_if<TopKRouting>(&routing)) {
    s.expert_ids = topk->topk_ids.data();
    s.wide = topk->topk_ids.dtype() == DType::kInt64;
    s.top_k = shape.num_tokens == 0 ? 1 : static_cast<int>(shape.num_pairs / shape.num_tokens);
  } else {
    const auto& pairs = std::get<PairRouting>(routing);
    s.expert_ids = pairs.expert_ids.data();
    s.token_ids = pairs.token_ids.data();
    s.wide = pairs.expert_ids.dtype() == DType::kInt64;
  }
  return s;
}

// Dynamic shared memory beyond 48 KB needs the kernel's limit raised.
template <class Kernel>
void allow_shared(Kernel kernel, std::size_t bytes, const MoEShape& shape) {
  if (bytes <= 48 * 1024) return;
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "metadata: shared memory for this many experts", shape);
}

}  // namespace

MetadataScratch carve_metadata_scratch(WorkspaceCarver& carver, const MoEShape& shape) {
  MetadataScratch s;
  if (shape.form == MoEShape::Form::kSorted) return s;
  s.expert_counts =
      carver.take<std::int32_t>(static_cast<std::size_t>(block_count(shape.num_pairs)) *
                                static_cast<std::size_t>(shape.num_experts));
  if (shape.form == MoEShape::Form::kPairs) {
    s.token_counts = carver.take<std::int32_t>(static_cast<std::size_t>(shape.num_tokens));
  }
  return s;
}

RowTables carve_row_tables(WorkspaceCarver& carver, const MoEShape& shape) {
  RowTables t;
  t.tiles = carver.take<int4>(
      static_cast<std::size_t>(tile_capacity(shape.num_pairs, shape.num_experts)));
  t.experts = carver.take<int4>(static_cast<std::size_t>(shape.num_experts));
  t.num_tiles = carver.take<std::int32_t>(1);
  t.claims = carver.take<std::uint32_t>(2);
  t.row_weight = carver.take<float>(static_cast<std::size_t>(shape.num_pairs));
  return t;
}

void build_metadata(cudaStream_t stream, const MoEShape& shape, const Routing& routing,
                    const Metadata& m, const MetadataScratch& scratch) {
  const int E = static_cast<int>(shape.num_experts);
  if (shape.form == MoEShape::Form::kSorted) {
    clamp_offsets<<<1, kScanThreads, 0, stream>>>(
        std::get<SortedRouting>(routing).offsets.as<std::int32_t>(), m.offsets, E,
        static_cast<std::int32_t>(shape.num_pairs));
    return check_launch(cudaGetLastError(), "metadata", shape);
  }
  const PairSource source = pair_source(shape, routing);
  const unsigned blocks = block_count(shape.num_pairs);
  const std::size_t shared = sizeof(std::int32_t) * static_cast<std::size_t>(E);
  allow_shared(count_experts, shared, shape);
  allow_shared(place_pairs, kWarps * shared, shape);
  if (blocks > 0) {
    count_experts<<<blocks, kThreads, shared, stream>>>(source, shape.num_pairs,
                                                        scratch.expert_counts);
  }
  scan_blocks<<<static_cast<unsigned>(ceil_div(E, kWarps)), kThreads, 0, stream>>>(
      scratch.expert_counts, static_cast<int>(blocks), E, m.offsets);
  scan_sums<<<1, kScanThreads, 0, stream>>>(m.offsets, E);
  if (blocks > 0) {
    place_pairs<<<blocks, kThreads, kWarps * shared, stream>>>(source, shape.num_pairs,
                                                               scratch.expert_counts, m);
  }
  if (shape.form == MoEShape::Form::kPairs) {
    const std::size_t tokens = static_cast<std::size_t>(shape.num_tokens);
    check_launch(cudaMemsetAsync(m.token_start, 0, (tokens + 1) * sizeof(std::int32_t), stream),
                 "metadata", shape);
    check_launch(cudaMemsetAsync(scratch.token_counts, 0, tokens * sizeof(std::int32_t), stream),
                 "metadata", shape);
    const unsigned grid = grid_of(shape.num_pairs);
    if (grid > 0) count_tokens<<<grid, kThreads, 0, stream>>>(source, shape.num_pairs, m);
    scan_sums<<<1, kScanThreads, 0, stream>>>(m.token_start, shape.num_tokens + 1);
    if (grid > 0) {
      collect_pairs<<<grid, kThreads, 0, stream>>>(source, shape.num_pairs, m,
                                                   scratch.token_counts);
    }
    if (tokens > 0) {
      sort_tokens<<<grid_of(shape.num_tokens), kThreads, 0, stream>>>(shape.num_tokens, m);
    }
  }
  check_launch(cudaGetLastError(), "metadata", shape);
}

void build_row_tables(cudaStream_t stream, const MoEShape& shape, const Routing& routing,
                      const Metadata& m, const RowTables& tables) {
  const int E = static_cast<int>(shape.num_experts);
  // Padded: the compiler reads counts ahead of its loop, past the end of the array.
  constexpr std::size_t kReadAhead = 256;
  const std::size_t shared = 2 * sizeof(std::int32_t) * static_cast<std::size_t>(E) + kReadAhead;
  allow_shared(make_tables, shared, shape);
  make_tables<<<1, kScanThreads, shared, stream>>>(m.offsets, E, tables);
  const ConstTensorView& weights = routing_weights(routing);
  if (tables.row_weight != nullptr && shape.num_pairs > 0) {
    gather_row_weights<<<grid_of(shape.num_pairs), kThreads, 0, stream>>>(
        weights.data(), weights.dtype() == DType::kBFloat16, m, shape.num_pairs, tables.row_weight);
  }
  check_launch(cudaGetLastError(), "row tables", shape);
}

RowLists row_lists(const Metadata& metadata, const RowTables& tables) {
  return {metadata.offsets, metadata.row_token, tables.tiles,
          tables.num_tiles, tables.experts,     tables.claims};
}

}  // namespace sonicmoe::cuda
