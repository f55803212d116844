// Row lists by counting, in three launches: pairs are counted per block of kBlockPairs and expert;
// the counts are scanned over the blocks; every pair finds its row from its expert's and its
// block's start and its rank among the block's earlier pairs of the same expert, while other CTAs
// of the same launch write the tables. Each CTA scans the experts' totals for itself, which is
// cheaper than a launch. Integer work in a fixed order: the same bits as the host's metadata.
// Of a pair list the same launches count the pairs of each token, scan those counts and collect a
// token's pairs in order of arrival, which is any; a fourth puts them in input order.
#include "core/integers.hpp"
#include "cuda/dependent_launch.hpp"
#include "cuda/experts/metadata.hpp"
#include "cuda/experts/pair_source.cuh"
#include "cuda/experts/row_tables.cuh"
#include "cuda/launch_check.hpp"
#include "cuda/ptx/pdl.cuh"

namespace sonicmoe::cuda {
namespace {

constexpr int kThreads = kTableThreads;
constexpr int kWarps = kThreads / 32;
constexpr int kPairsPerWarp = 128;
constexpr int kBlockPairs = kWarps * kPairsPerWarp;
constexpr int kScanThreads = 1024;
constexpr int kScanWarps = kScanThreads / 32;
constexpr int kScanTokens = 4 * kScanThreads;

unsigned block_count(std::int64_t num_pairs) {
  return static_cast<unsigned>(ceil_div(num_pairs, kBlockPairs));
}

// counts[block, e] = kept pairs of the block with expert e.
__global__ void __launch_bounds__(kThreads) count_experts(PairSource source, std::int64_t num_pairs,
                                                          std::int32_t* counts, TokenLists lists) {
  extern __shared__ std::int32_t histogram[];  // [E]
  ptx::grid_launch_dependents();
  for (int e = threadIdx.x; e < source.num_experts; e += kThreads) histogram[e] = 0;
  constexpr int kSteps = kBlockPairs / kThreads;  // loads and atomics in flight
  const std::int64_t first = std::int64_t{blockIdx.x} * kBlockPairs + threadIdx.x;
  int experts[kSteps];
  std::int32_t tokens[kSteps], arrivals[kSteps];
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const std::int64_t pair = first + i * kThreads;
    experts[i] = pair < num_pairs ? source.expert(pair) : -1;
    tokens[i] = experts[i] >= 0 ? static_cast<std::int32_t>(source.token(pair)) : -1;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (experts[i] < 0) continue;
    atomicAdd(histogram + experts[i], 1);
    if (lists.counts != nullptr) arrivals[i] = atomicAdd(lists.counts + tokens[i], 1);
  }
  if (lists.counts != nullptr) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if (experts[i] >= 0) lists.arrival[first + i * kThreads] = arrivals[i];
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < source.num_experts; e += kThreads) {
    counts[std::int64_t{blockIdx.x} * source.num_experts + e] = histogram[e];
  }
}

// The caller's ends, made non-decreasing and at most `limit`. One CTA.
__global__ void __launch_bounds__(kScanThreads)
    clamp_offsets(const std::int32_t* from, std::int32_t* to, int count, std::int32_t limit) {
  __shared__ std::int32_t carry;
  if (threadIdx.x == 0) carry = 0;
  __syncthreads();
  for (int first = 0; first < count; first += kScanThreads) {
    const int e = first + static_cast<int>(threadIdx.x);
    const std::int32_t mine = e < count ? min(from[e], limit) : 0;
    const std::int32_t end = max(carry, block_scan(mine, Max{}));
    if (e < count) to[e] = end;
    __syncthreads();
    if (threadIdx.x == kScanThreads - 1) carry = end;
    __syncthreads();
  }
}

// Counts of kScanTokens tokens -> their starts. Every CTA sums what lies before its tokens by
// itself.
__device__ void scan_tokens(int block, const TokenLists& lists) {
  __shared__ std::int32_t before;
  const auto* counts = reinterpret_cast<const int4*>(lists.counts);
  const int own = block * kScanThreads + static_cast<int>(threadIdx.x);
  std::int32_t sum = 0;
#pragma unroll 8
  for (int i = threadIdx.x; i < block * kScanThreads; i += kScanThreads) {
    const int4 four = counts[i];
    sum += four.x + four.y + four.z + four.w;
  }
  sum = block_scan(sum, Sum{});
  if (threadIdx.x == kScanThreads - 1) before = sum;
  const std::int64_t first = std::int64_t{own} * 4;
  const int4 four = first <= lists.num_tokens ? counts[own] : int4{};
  const std::int32_t mine = four.x + four.y + four.z + four.w;
  const std::int32_t lower = block_scan(mine, Sum{}) - mine;  // and `before` is written
  std::int32_t start = before + lower;
  for (int j = 0; j < 4; ++j) {
    if (first + j <= lists.num_tokens) lists.start[first + j] = start;
    start += j == 0 ? four.x : j == 1 ? four.y : four.z;
  }
}

// counts[:, e] -> exclusive sums over the blocks, totals[e] = their sum. 32 experts per CTA, one
// per lane; every warp takes an equal stretch of the blocks. The CTAs after those scan tokens.
__global__ void __launch_bounds__(kScanThreads, 1)
    scan_blocks(std::int32_t* counts, int num_blocks, int num_experts, std::int32_t* totals,
                TokenLists lists) {
  __shared__ std::int32_t sums[kScanWarps][32];
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  const int expert_blocks = (num_experts + 31) / 32;
  if (static_cast<int>(blockIdx.x) >= expert_blocks) {
    return scan_tokens(static_cast<int>(blockIdx.x) - expert_blocks, lists);
  }
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, e = blockIdx.x * 32 + lane;
  const int stretch = (num_blocks + kScanWarps - 1) / kScanWarps;
  const int first = warp * stretch, last = e < num_experts ? min(first + stretch, num_blocks) : 0;
  std::int32_t sum = 0;
#pragma unroll 8
  for (int b = first; b < last; ++b) sum += counts[std::int64_t{b} * num_experts + e];
  sums[warp][lane] = sum;
  __syncthreads();
  std::int32_t start = 0;
  for (int w = 0; w < warp; ++w) start += sums[w][lane];
  constexpr int kBatch = 8;  // loads in flight, ahead of the stores to the same places
  for (int b = first; b < last; b += kBatch) {
    std::int32_t* at = counts + std::int64_t{b} * num_experts + e;
    std::int32_t batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      batch[i] = b + i < last ? at[std::int64_t{i} * num_experts] : 0;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (b + i < last) at[std::int64_t{i} * num_experts] = start;
      start += batch[i];
    }
  }
  if (warp == kScanWarps - 1 && e < num_experts) totals[e] = start;
}

// Gives every pair of a block its row. Warp w owns kPairsPerWarp consecutive pairs: the warps'
// counts are summed in order, then each warp ranks its pairs 32 at a time. `block_starts` [E]: the
// block's first row inside an expert. Rows from `capacity` on do not exist. Shared: starts [E + 1],
// then the next row of each warp's experts [kWarps, E].
__device__ void place_block(const PairSource& source, std::int64_t num_pairs, std::int32_t capacity,
                            std::int64_t block, const std::int32_t* block_starts,
                            const std::int32_t* starts, std::int32_t* next, const Metadata& m,
                            const TokenLists& lists, float* row_weight) {
  constexpr int kSteps = kPairsPerWarp / 32;
  const int E = source.num_experts, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < kWarps * E; i += kThreads) next[i] = 0;
  const std::int64_t first = block * kBlockPairs + warp * kPairsPerWarp + lane;
  int experts[kSteps];
  std::int32_t tokens[kSteps], places[kSteps];  // places in lists.arrived
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const std::int64_t pair = first + 32 * i;
    experts[i] = pair < num_pairs ? source.expert(pair) : -1;
    tokens[i] = experts[i] >= 0 ? static_cast<std::int32_t>(source.token(pair)) : -1;
    const bool listed = lists.arrived != nullptr && tokens[i] >= 0;
    places[i] = listed ? lists.start[tokens[i]] + lists.arrival[pair] : 0;
  }
  __syncthreads();
  std::int32_t* mine = next + warp * E;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (experts[i] >= 0) atomicAdd(mine + experts[i], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += kThreads) {
    std::int32_t row = starts[e] + block_starts[e];
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const std::int32_t count = next[w * E + e];
      next[w * E + e] = row;
      row += count;
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const std::int64_t pair = first + 32 * i;
    const int e = experts[i];
    const unsigned same = __match_any_sync(~0u, e);
    const int rank = __popc(same & ((1u << lane) - 1));
    std::int32_t row = e >= 0 ? mine[e] + rank : -1;
    if (row >= capacity) row = -1;
    __syncwarp();
    if (e >= 0 && rank == 0) mine[e] += __popc(same);
    __syncwarp();
    if (pair >= num_pairs) continue;
    m.pair_row[pair] = row;
    if (row >= 0) {
      m.row_token[row] = tokens[i];
      m.row_pair[row] = static_cast<std::int32_t>(pair);
      if (row_weight != nullptr) row_weight[row] = source.weight(pair);
    }
    if (pair >= starts[E] && pair < capacity) m.row_token[pair] = m.row_pair[pair] = -1;
    if (lists.arrived == nullptr) continue;
    if (e >= 0) lists.arrived[places[i]] = static_cast<std::int32_t>(pair);
    if (pair >= lists.start[lists.num_tokens]) m.token_rows[pair] = -1;
  }
}

// The first CTAs write offsets and tables, kTableExperts experts each; then one CTA per block of
// pairs places it. `block_starts` [blocks, E] from scan_blocks().
__global__ void __launch_bounds__(kThreads, 1)
    place_pairs(PairSource source, std::int64_t num_pairs, std::int32_t capacity,
                const std::int32_t* block_starts, const std::int32_t* totals, Metadata m,
                RowTables tables, TokenLists lists, std::int32_t* rows_dropped) {
  extern __shared__ std::int32_t shared[];
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  const int E = source.num_experts, block = static_cast<int>(blockIdx.x) - table_blocks(E);
  const auto count = [totals](int e) { return totals[e]; };
  if (block < 0) {
    const int first = blockIdx.x * kTableExperts;
    write_tables(first, E, count, capacity, shared, tables, rows_dropped);
    const int e = first + threadIdx.x;
    if (threadIdx.x < kTableExperts && e < E) m.offsets[e] = shared[e + 1];
    return;
  }
  scan_experts(E, count, capacity, shared);
  place_block(source, num_pairs, capacity, block, block_starts + std::int64_t{block} * E, shared,
              shared + E + 1, m, lists, tables.row_weight);
}

// lists.arrived -> token_rows: as many pairs of its token lie before a pair as have a lower number.
// A thread per pair, so that a token with most of the pairs does not wait for one thread.
__global__ void __launch_bounds__(kThreads)
    order_pairs(PairSource source, TokenLists lists, Metadata m) {
  ptx::grid_dependency_wait();
  const std::int64_t place = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (place >= lists.start[lists.num_tokens]) return;
  const std::int32_t pair = lists.arrived[place];
  const std::int64_t t = source.token(pair);
  const std::int32_t first = lists.start[t], end = lists.start[t + 1];
  const std::int32_t row = m.pair_row[pair];
  std::int32_t before = 0;
#pragma unroll 4
  for (std::int32_t i = first; i < end; ++i) before += lists.arrived[i] < pair ? 1 : 0;
  m.token_rows[first + before] = row;
}

PairSource pair_source(const MoEShape& shape, const Routing& routing) {
  PairSource s{};
  s.num_tokens = shape.num_tokens;
  s.num_experts = static_cast<int>(shape.num_experts);
  if (const auto* topk = std::get_if<TopKRouting>(&routing)) {
    s.expert_ids = topk->topk_ids.data();
    s.first_expert = topk->first_expert;
    s.wide = topk->topk_ids.dtype() == DType::kInt64;
    s.top_k = shape.num_tokens == 0 ? 1 : static_cast<int>(shape.num_pairs / shape.num_tokens);
  } else {
    const auto& pairs = std::get<PairRouting>(routing);
    s.expert_ids = pairs.expert_ids.data();
    s.first_expert = pairs.first_expert;
    s.token_ids = pairs.token_ids.data();
    s.wide = pairs.expert_ids.dtype() == DType::kInt64;
  }
  const ConstTensorView& weights = routing_weights(routing);
  s.weights = weights.data();
  s.weights_are_bf16 = weights.defined() && weights.dtype() == DType::kBFloat16;
  return s;
}

// T + 1 counts are scanned as whole vectors.
std::size_t token_count_places(const MoEShape& shape) {
  return static_cast<std::size_t>(round_up(shape.num_tokens + 1, std::int64_t{4}));
}

}  // namespace

MetadataScratch carve_metadata_scratch(WorkspaceCarver& carver, const MoEShape& shape) {
  MetadataScratch s;
  if (shape.form == MoEShape::Form::kSorted) return s;
  s.expert_counts =
      carver.take<std::int32_t>(static_cast<std::size_t>(block_count(shape.num_pairs)) *
                                static_cast<std::size_t>(shape.num_experts));
  s.expert_totals = carver.take<std::int32_t>(static_cast<std::size_t>(shape.num_experts));
  if (shape.form == MoEShape::Form::kPairs) {
    s.token_counts = carver.take<std::int32_t>(token_count_places(shape));
    s.token_pairs = carver.take<std::int32_t>(static_cast<std::size_t>(shape.num_pairs));
  }
  return s;
}

void build_metadata(cudaStream_t stream, const MoEShape& shape, const Routing& routing,
                    const Metadata& m, const MetadataScratch& scratch, const RowTables& tables,
                    std::int32_t* rows_dropped) {
  const int E = static_cast<int>(shape.num_experts);
  if (shape.form == MoEShape::Form::kSorted) {
    clamp_offsets<<<1, kScanThreads, 0, stream>>>(
        std::get<SortedRouting>(routing).offsets.as<std::int32_t>(), m.offsets, E,
        static_cast<std::int32_t>(shape.num_pairs));
    check_launch(cudaGetLastError(), "metadata", shape);
    if (rows_dropped != nullptr) {
      check_launch(cudaMemsetAsync(rows_dropped, 0, sizeof(std::int32_t), stream), "metadata",
                   shape);
    }
    return build_row_tables(stream, shape, routing, m, tables);
  }
  const PairSource source = pair_source(shape, routing);
  const unsigned blocks = block_count(shape.num_pairs);
  const std::size_t counts = sizeof(std::int32_t) * static_cast<std::size_t>(E);
  const std::size_t shared = sizeof(std::int32_t) + (kWarps + 1) * counts + kReadAhead;
  allow_shared(count_experts, counts, shape);
  allow_shared(place_pairs, shared, shape);
  const bool is_list = shape.form == MoEShape::Form::kPairs;
  TokenLists lists{};
  unsigned token_blocks = 0;
  if (is_list) {
    // place_pairs() reads a pair's arrival before it writes its row.
    lists = {scratch.token_counts, m.token_start, scratch.token_pairs, m.pair_row,
             shape.num_tokens};
    token_blocks = static_cast<unsigned>(ceil_div(shape.num_tokens + 1, kScanTokens));
    check_launch(
        cudaMemsetAsync(lists.counts, 0, sizeof(std::int32_t) * token_count_places(shape), stream),
        "metadata", shape);
  }
  if (blocks > 0) {
    count_experts<<<blocks, kThreads, counts, stream>>>(source, shape.num_pairs,
                                                        scratch.expert_counts, lists);
  }
  check_launch(cudaGetLastError(), "metadata", shape);
  // Without blocks this waits for whatever ran before, which is as good.
  check_launch(launch_dependent(scan_blocks, static_cast<unsigned>(ceil_div(E, 32)) + token_blocks,
                                kScanThreads, 0, stream, scratch.expert_counts,
                                static_cast<int>(blocks), E, scratch.expert_totals, lists),
               "metadata", shape);
  check_launch(launch_dependent(
                   place_pairs, static_cast<unsigned>(table_blocks(E)) + blocks, kThreads, shared,
                   stream, source, shape.num_pairs, static_cast<std::int32_t>(shape.row_capacity()),
                   scratch.expert_counts, scratch.expert_totals, m, tables, lists, rows_dropped),
               "metadata", shape);
  if (is_list && shape.num_pairs > 0) {
    const auto grid = static_cast<unsigned>(ceil_div(shape.num_pairs, kThreads));
    check_launch(launch_dependent(order_pairs, grid, kThreads, 0, stream, source, lists, m),
                 "metadata", shape);
  }
  list_tokens(stream, shape, m, tables);
}

}  // namespace sonicmoe::cuda
