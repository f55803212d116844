// Tables and row weights of a call whose metadata exists: of sorted rows, and of every backward
// pass.
#include <cuda_bf16.h>

#include "core/integers.hpp"
#include "cuda/experts/row_tables.cuh"

namespace sonicmoe::cuda {
namespace {

// The first CTAs write the tables; the others, kTableThreads rows each, gather the rows' weights
// where tables.row_weight is wanted.
__global__ void __launch_bounds__(kTableThreads)
    make_tables(Metadata m, std::int64_t num_pairs, const void* weights, bool weights_are_bf16,
                RowTables tables) {
  extern __shared__ std::int32_t shared[];
  const int E = static_cast<int>(m.num_experts);
  const int block = static_cast<int>(blockIdx.x) - table_blocks(E);
  if (block < 0) {
    const std::int32_t* offsets = m.offsets;
    const auto count = [offsets](int e) { return offsets[e] - (e == 0 ? 0 : offsets[e - 1]); };
    return write_tables(blockIdx.x * kTableExperts, E, count, shared, tables);
  }
  const std::int64_t row = std::int64_t{block} * kTableThreads + threadIdx.x;
  if (row >= num_pairs || row >= m.offsets[E - 1]) return;
  const std::int64_t pair = m.row_pair == nullptr ? row : m.row_pair[row];
  tables.row_weight[row] = weights_are_bf16
                               ? __bfloat162float(static_cast<const __nv_bfloat16*>(weights)[pair])
                               : static_cast<const float*>(weights)[pair];
}

}  // namespace

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

void build_row_tables(cudaStream_t stream, const MoEShape& shape, const Routing& routing,
                      const Metadata& m, const RowTables& tables) {
  const int E = static_cast<int>(shape.num_experts);
  const std::size_t shared =
      2 * sizeof(std::int32_t) * (static_cast<std::size_t>(E) + 1) + kReadAhead;
  const ConstTensorView& weights = routing_weights(routing);
  const unsigned gathers = tables.row_weight == nullptr
                               ? 0
                               : static_cast<unsigned>(ceil_div(shape.num_pairs, kTableThreads));
  allow_shared(make_tables, shared, shape);
  make_tables<<<static_cast<unsigned>(table_blocks(E)) + gathers, kTableThreads, shared, stream>>>(
      m, shape.num_pairs, weights.data(), weights.defined() && weights.dtype() == DType::kBFloat16,
      tables);
  check_launch(cudaGetLastError(), "row tables", shape);
}

RowLists row_lists(const Metadata& metadata, const RowTables& tables) {
  return {metadata.row_token, tables.tiles, tables.num_tiles, tables.experts, tables.claims};
}

}  // namespace sonicmoe::cuda
