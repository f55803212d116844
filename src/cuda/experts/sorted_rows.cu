#include "cuda/element.hpp"
#include "cuda/experts/sorted_rows.hpp"
#include "cuda/launch_check.hpp"
#include "cuda/ptx/memory.cuh"

namespace sonicmoe::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSlice = 16;  // rows of a CTA
constexpr int kSlices = (kTileRows + kSortedStep) / kSlice;

// Row i of those that the CTAs of a tile write: rows of the group, from < 0 for zeros. The 64 past
// a tile's own are the copy of its group's last step. False: nothing to write.
struct Copied {
  int from, to;
  __device__ bool find(const int4& entry, int i) {
    const int before = entry.w * kTileRows, rows = before + entry.y;  // of the group
    if (i < kTileRows) {
      from = to = before + i;
      return i < entry.y;
    }
    const int rest = rows % kSortedStep, j = i - kTileRows;
    to = rows + j;
    if (rows < kSortedStep) {
      from = j < rows ? j : -1;
    } else {
      from = j < kSortedStep - rest ? -1 : rows - kSortedStep + j;
    }
    return entry.y <= kTileRows && rest > 0;
  }
};

// Lanes [0, 32) of a warp: `vectors` vectors, eight loads of a lane under way.
__device__ void copy_row(const uint4* in, uint4* out, int vectors, int lane) {
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

// CTA (i, slice): a slice of the rows of tile i. A warp copies a row.
__global__ void __launch_bounds__(kThreads)
    sort_rows_kernel(const uint4* gathered, std::int64_t ld, int vectors, RowLists lists,
                     uint4* sorted) {
  if (blockIdx.x >= static_cast<unsigned>(__ldg(lists.num_tiles))) return;
  const int4 entry = __ldg(lists.tiles + blockIdx.x);
  const int row0 = entry.x - entry.w * kTileRows;  // of the group
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = blockIdx.y * kSlice;
  for (int i = begin + warp; i < begin + kSlice; i += kWarps) {
    Copied row;
    if (!row.find(entry, i)) continue;
    uint4* const out = sorted + (std::int64_t{sorted_row(row0, entry.z)} + row.to) * vectors;
    if (row.from < 0) {
      for (int v = lane; v < vectors; v += 32) out[v] = uint4{};
      continue;
    }
    const int at = row0 + row.from;
    const std::int64_t token = lists.row_token == nullptr ? at : __ldg(lists.row_token + at);
    copy_row(gathered + token * ld, out, vectors, lane);
  }
}

}  // namespace

void sort_rows(const ProductCall& call, const Matrix& gathered, std::int64_t width,
               std::int64_t num_groups, void* sorted) {
  const dim3 grid(static_cast<unsigned>(tile_capacity(call.num_rows, num_groups)), kSlices);
  sort_rows_kernel<<<grid, kThreads, 0, call.stream>>>(
      static_cast<const uint4*>(gathered.data), gathered.ld / kVectorElements,
      static_cast<int>(width / kVectorElements), call.rows, static_cast<uint4*>(sorted));
  check_cuda(cudaGetLastError(), "sort_rows");
}

}  // namespace sonicmoe::cuda
