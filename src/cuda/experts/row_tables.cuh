// The tables that the GEMMs take their tiles from, written by some of a kernel's CTAs. Each scans
// the experts' row counts for itself, which is cheaper than a launch.
#pragma once

#include <climits>

#include "cuda/experts/block_scan.cuh"
#include "cuda/experts/metadata.hpp"
#include "cuda/launch_check.hpp"

namespace sonicmoe::cuda {

inline constexpr int kTableThreads = 256;
inline constexpr int kRankLanes = 8;                              // threads that rank one expert
inline constexpr int kTableExperts = kTableThreads / kRankLanes;  // of one CTA
// Padding behind scan_experts()'s starts: unrolled loops may load past the end.
inline constexpr std::size_t kReadAhead = 256;

__host__ __device__ constexpr int table_blocks(int num_experts) {
  return (num_experts + kTableExperts - 1) / kTableExperts;
}

// starts [E + 1] in shared memory: exclusive sums of count(e), and their total, none above `most`.
// All threads of a CTA of kTableThreads; the last of them returns the total as it is.
template <class Count>
__device__ std::int32_t scan_experts(int num_experts, Count count, std::int32_t most,
                                     std::int32_t* starts) {
  const int per_thread = (num_experts + kTableThreads - 1) / kTableThreads;
  const int first = min(static_cast<int>(threadIdx.x) * per_thread, num_experts);
  const int last = min(first + per_thread, num_experts);
  std::int32_t sum = 0;
  for (int e = first; e < last; ++e) sum += count(e);
  std::int32_t start = block_scan(sum, Sum{}) - sum;
  for (int e = first; e < last; ++e) {
    starts[e] = min(start, most);
    start += count(e);
  }
  if (threadIdx.x == kTableThreads - 1) starts[num_experts] = min(start, most);
  __syncthreads();
  return start;
}

// The tables of kTableExperts experts from `first_expert` on, by one CTA; of rows beyond `capacity`
// nothing but their number, into rows_dropped where that is not null. Shared: starts [E + 1] of the
// rows and of the tiles.
template <class Count>
__device__ void write_tables(int first_expert, int num_experts, Count count, std::int32_t capacity,
                             std::int32_t* shared, const RowTables& tables,
                             std::int32_t* rows_dropped) {
  std::int32_t *starts = shared, *tile_starts = shared + num_experts + 1;
  const std::int32_t total = scan_experts(num_experts, count, capacity, starts);
  const auto rows_of = [&](int e) { return starts[e + 1] - starts[e]; };
  scan_experts(
      num_experts, [&](int e) { return (rows_of(e) + kTileRows - 1) / kTileRows; }, INT_MAX,
      tile_starts);
  if (first_expert == 0) {
    if (threadIdx.x == 0) *tables.num_tiles = tile_starts[num_experts];
    if (threadIdx.x < RowLists::kCounters) tables.claims[threadIdx.x] = 0;
    if (threadIdx.x < 2 && tables.tokens != nullptr) tables.num_tokens[threadIdx.x] = 0;
    if (threadIdx.x == kTableThreads - 1 && rows_dropped != nullptr) {
      *rows_dropped = total - starts[num_experts];
    }
  }
  const int lane = threadIdx.x % kRankLanes, e = first_expert + threadIdx.x / kRankLanes;
  const bool exists = e < num_experts;
  const int rows = exists ? rows_of(e) : 0;
  int rank = 0;  // experts with more rows, or as many and a lower index
  for (int other = lane; other < num_experts; other += kRankLanes) {
    const int others = rows_of(other);
    rank += others > rows || (others == rows && other < e) ? 1 : 0;
  }
#pragma unroll
  for (int d = kRankLanes / 2; d > 0; d /= 2) rank += __shfl_xor_sync(~0u, rank, d);
  if (!exists) return;
  if (lane == 0) tables.experts[rank] = {starts[e], rows, e, 0};
  for (int first = lane * kTileRows; first < rows; first += kRankLanes * kTileRows) {
    const int tile = first / kTileRows;
    tables.tiles[tile_starts[e] + tile] = {starts[e] + first, rows - first, e, tile};
  }
}

/// Fills tables.tokens and num_tokens, whose counts write_tables() has cleared.
void list_tokens(cudaStream_t stream, const MoEShape& shape, const Metadata& metadata,
                 const RowTables& tables);

// Dynamic shared memory beyond 48 KB needs the kernel's limit raised.
template <class Kernel>
void allow_shared(Kernel kernel, std::size_t bytes, const MoEShape& shape) {
  if (bytes <= 48 * 1024) return;
  check_launch(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "metadata: shared memory for this many experts", shape);
}

}  // namespace sonicmoe::cuda
