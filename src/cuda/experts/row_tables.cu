// Tables and row weights of a call whose metadata exists: of sorted rows, and of every backward
// pass.
#include <cuda_bf16.h>

#include "core/integers.hpp"
#include "cuda/dependent_launch.hpp"
#include "cuda/experts/row_tables.cuh"
#include "cuda/ptx/pdl.cuh"

namespace sonicmoe::cuda {
namespace {

// The first CTAs write the tables; the others, kTableThreads rows each, gather the rows' weights
// where tables.row_weight is wanted.
__global__ void __launch_bounds__(kTableThreads)
    make_tables(Metadata m, std::int64_t capacity, const void* weights, bool weights_are_bf16,
                RowTables tables) {
  extern __shared__ std::int32_t shared[];
  const int E = static_cast<int>(m.num_experts);
  const int block = static_cast<int>(blockIdx.x) - table_blocks(E);
  if (block < 0) {
    const std::int32_t* offsets = m.offsets;
    const auto count = [offsets](int e) { return offsets[e] - (e == 0 ? 0 : offsets[e - 1]); };
    return write_tables(blockIdx.x * kTableExperts, E, count, INT_MAX, shared, tables, nullptr);
  }
  const std::int64_t row = std::int64_t{block} * kTableThreads + threadIdx.x;
  if (row >= capacity || row >= m.offsets[E - 1]) return;
  const std::int64_t pair = m.row_pair == nullptr ? row : m.row_pair[row];
  tables.row_weight[row] = weights_are_bf16
                               ? __bfloat162float(static_cast<const __nv_bfloat16*>(weights)[pair])
                               : static_cast<const float*>(weights)[pair];
}

// One thread per token. Warps take their places in the list as they come.
__global__ void __launch_bounds__(kTableThreads)
    list_tokens_kernel(Metadata m, std::int64_t num_tokens, int top_k, RowTables tables) {
  ptx::grid_dependency_wait();
  const std::int64_t t = std::int64_t{blockIdx.x} * kTableThreads + threadIdx.x;
  const int lane = threadIdx.x % 32;
  const bool exists = t < num_tokens;
  bool has_row = false;
  if (exists) {
    for (int k = 0; k < top_k; ++k) has_row |= m.pair_row[t * top_k + k] >= 0;
  }
  const unsigned with = __ballot_sync(~0u, exists && has_row);
  const unsigned without = __ballot_sync(~0u, exists && !has_row);
  std::int32_t place = 0;
  if (lane < 2) place = atomicAdd(tables.num_tokens + lane, __popc(lane == 0 ? with : without));
  const unsigned before = (1u << lane) - 1;
  const std::int32_t front = __shfl_sync(~0u, place, 0) + __popc(with & before);
  const std::int32_t back = __shfl_sync(~0u, place, 1) + __popc(without & before);
  if (exists) tables.tokens[has_row ? front : num_tokens - 1 - back] = static_cast<std::int32_t>(t);
}

}  // namespace

void list_tokens(cudaStream_t stream, const MoEShape& shape, const Metadata& m,
                 const RowTables& tables) {
  if (tables.tokens == nullptr || shape.num_tokens == 0) return;
  const int top_k = static_cast<int>(shape.num_pairs / shape.num_tokens);
  const auto grid = static_cast<unsigned>(ceil_div(shape.num_tokens, kTableThreads));
  check_launch(launch_dependent(list_tokens_kernel, grid, kTableThreads, 0, stream, m,
                                shape.num_tokens, top_k, tables),
               "list of tokens", shape);
}

RowTables carve_row_tables(WorkspaceCarver& carver, const MoEShape& shape) {
  RowTables t;
  t.tiles = carver.take<int4>(
      static_cast<std::size_t>(tile_capacity(shape.row_capacity(), shape.num_experts)));
  t.experts = carver.take<int4>(static_cast<std::size_t>(shape.num_experts));
  t.num_tiles = carver.take<std::int32_t>(1);
  t.claims = carver.take<std::uint32_t>(RowLists::kCounters);
  t.row_weight = carver.take<float>(static_cast<std::size_t>(shape.row_capacity()));
  if (lists_tokens(shape)) {
    t.tokens = carver.take<std::int32_t>(static_cast<std::size_t>(shape.num_tokens));
    t.num_tokens = carver.take<std::int32_t>(2);
  }
  return t;
}

void build_row_tables(cudaStream_t stream, const MoEShape& shape, const Routing& routing,
                      const Metadata& m, const RowTables& tables) {
  const int E = static_cast<int>(shape.num_experts);
  const std::size_t shared =
      2 * sizeof(std::int32_t) * (static_cast<std::size_t>(E) + 1) + kReadAhead;
  const ConstTensorView& weights = routing_weights(routing);
  const unsigned gathers =
      tables.row_weight == nullptr
          ? 0
          : static_cast<unsigned>(ceil_div(shape.row_capacity(), kTableThreads));
  allow_shared(make_tables, shared, shape);
  make_tables<<<static_cast<unsigned>(table_blocks(E)) + gathers, kTableThreads, shared, stream>>>(
      m, shape.row_capacity(), weights.data(),
      weights.defined() && weights.dtype() == DType::kBFloat16, tables);
  check_launch(cudaGetLastError(), "row tables", shape);
  list_tokens(stream, shape, m, tables);
}

RowLists row_lists(const Metadata& metadata, const RowTables& tables) {
  return {metadata.row_token, tables.tiles, tables.num_tiles, tables.experts, tables.claims};
}

}  // namespace sonicmoe::cuda
