#include <cstdlib>
#include <cstring>

#include "cuda/launch_check.hpp"
#include "cuda/ptx/memory.cuh"
#include "cuda/sorted_rows.hpp"

namespace sonicmoe::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSlice = 16;  // rows of a CTA
constexpr int kSlices = (kTileRows + kSortedStep) / kSlice;

// CTA (i, slice): rows of tile i, in the last slices those of its group's last step.
__global__ void __launch_bounds__(kThreads)
    sort_rows_kernel(const uint4* gathered, int64_t ld, int vectors, RowLists lists,
                     uint4* sorted) {
  if (blockIdx.x >= static_cast<unsigned>(__ldg(lists.num_tiles))) return;
  const int4 entry = __ldg(lists.tiles + blockIdx.x);
  const int before = entry.w * kTileRows, row0 = entry.x - before, rows = before + entry.y;
  const int count = min(entry.y, kTileRows), rest = rows % kSortedStep;
  const bool last = entry.y <= kTileRows && rest > 0;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = blockIdx.y * kSlice + warp; i < (blockIdx.y + 1) * kSlice; i += kWarps) {
    int from, to;  // rows of the group; from < 0: zeros
    if (i < kTileRows) {
      if (i >= count) continue;
      from = to = before + i;
    } else {
      if (!last) continue;
      const int j = i - kTileRows;
      to = rows + j;
      if (rows < kSortedStep) {
        from = j < rows ? j : -1;
      } else {
        from = j < kSortedStep - rest ? -1 : rows - kSortedStep + j;
      }
    }
    uint4* const out = sorted + (int64_t{sorted_row(row0, entry.z)} + to) * vectors;
    if (from < 0) {
      for (int v = lane; v < vectors; v += 32) out[v] = uint4{};
      continue;
    }
    const int row = row0 + from;
    const int64_t token = lists.row_token == nullptr ? row : __ldg(lists.row_token + row);
    const uint4* const in = gathered + token * ld;
    constexpr int kBatch = 8;
    for (int first = lane; first < vectors; first += 32 * kBatch) {
      uint4 values[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        values[b] = ptx::load_global_nc_v4(in + min(first + 32 * b, vectors - 1));
      }
#pragma unroll
      for (int b = 0; b < kBatch; ++b) {
        if (first + 32 * b < vectors) out[first + 32 * b] = values[b];
      }
    }
  }
}

}  // namespace

bool sorts_rows(std::int64_t num_rows, std::int64_t num_groups, std::int64_t width) {
  const char* const wanted = std::getenv("SONICMOE_M23");
  return wanted != nullptr && std::strchr(wanted, 's') != nullptr && width % 64 == 0 &&
         num_rows > 0 && num_groups > 0;
}

void sort_rows(const ProductCall& call, const Matrix& gathered, std::int64_t width,
               std::int64_t num_groups, void* sorted) {
  const dim3 grid(static_cast<unsigned>(tile_capacity(call.num_rows, num_groups)), kSlices);
  sort_rows_kernel<<<grid, kThreads, 0, call.stream>>>(
      static_cast<const uint4*>(gathered.data), gathered.ld / kVectorElements,
      static_cast<int>(width / kVectorElements), call.rows, static_cast<uint4*>(sorted));
  check_cuda(cudaGetLastError(), "sort_rows");
}

}  // namespace sonicmoe::cuda
