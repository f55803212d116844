#include "core/integers.hpp"
#include "cuda/exchange/copy.cuh"
#include "cuda/exchange/kernels.hpp"
#include "cuda/vector8.cuh"

namespace sonicmoe::cuda {
namespace {

constexpr int kLoads = 8;  // ranks whose rows are in flight together

// A bit for each rank that has an expert of the token.
__device__ unsigned ranks_of_token(const ExchangePeers& peers, std::int64_t t, int lane) {
  unsigned ranks = 0;
  for (int k = lane; k < peers.top_k; k += 32) {
    const std::int32_t id = peers.own.ids[t * peers.top_k + k];
    if (id >= 0) ranks |= 1u << id / peers.experts_per_rank;
  }
  return __reduce_or_sync(~0u, ranks);
}

// Eight columns of the partial rows of a place, in rank order.
__device__ uint4 summed(const ExchangePeers& peers, unsigned ranks, std::int64_t place,
                        std::int64_t column_bytes) {
  float sum[8] = {};
  while (ranks != 0) {
    uint4 values[kLoads];
    const int count = min(__popc(ranks), kLoads);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (i >= count) break;
      const int s = __ffs(static_cast<int>(ranks)) - 1;
      ranks &= ranks - 1;
      const std::byte* row =
          peers.row(peers.at(s, static_cast<std::byte*>(peers.own.partial)), place);
      values[i] = ptx::load_global_v4(row + column_bytes);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (i >= count) break;
      float value[8];
      unpack(values[i], value);
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j] += value[j];
    }
  }
  return pack(sum);
}

__device__ void pull_scores(const ExchangePeers& peers, std::int64_t t, std::int64_t place,
                            float* scores, int lane, bool failed) {
  for (int k = lane; k < peers.top_k; k += 32) {
    const std::int64_t slot = t * peers.top_k + k;
    const std::int32_t id = peers.own.ids[slot];
    float score = 0.0f;
    if (failed) {
      score = __int_as_float(0x7fffffff);
    } else if (id >= 0) {
      score = peers.at(id / peers.experts_per_rank, peers.own.scores)[place * peers.top_k + k];
    }
    scores[slot] = score;
  }
}

// A warp per own token and 256 columns.
__global__ void __launch_bounds__(kExchangeThreads)
    pull_sum_kernel(const __grid_constant__ ExchangePeers peers, std::int64_t num_warps, int spans,
                    const __grid_constant__ StridedRows out, float* scores) {
  const int lane = threadIdx.x % 32;
  const std::int64_t warp = std::int64_t{blockIdx.x} * kExchangeWarps + threadIdx.x / 32;
  if (warp >= num_warps) return;
  const std::int64_t t = warp / spans, column_bytes = (warp % spans * 32 + lane) * 16;
  const std::int64_t place = peers.places.of(peers.rank, t);
  const bool failed = peers.failed();
  if (scores != nullptr && warp % spans == 0) pull_scores(peers, t, place, scores, lane, failed);
  const unsigned ranks = ranks_of_token(peers, t, lane);
  if (column_bytes >= peers.row_bytes) return;
  const uint4 sum = failed ? uint4{~0u, ~0u, ~0u, ~0u} : summed(peers, ranks, place, column_bytes);
  ptx::store_global_v4(static_cast<std::byte*>(out.data) + t * out.stride + column_bytes, sum);
}

}  // namespace

cudaError_t pull_sum(cudaStream_t stream, const ExchangePeers& peers, std::int64_t num_tokens,
                     StridedRows out, float* scores) {
  if (num_tokens == 0) return cudaSuccess;
  const auto spans = static_cast<int>(ceil_div(peers.row_bytes, 32 * 16));
  const std::int64_t num_warps = num_tokens * spans;
  const auto grid = static_cast<unsigned>(ceil_div(num_warps, kExchangeWarps));
  pull_sum_kernel<<<grid, kExchangeThreads, 0, stream>>>(peers, num_warps, spans, out, scores);
  return cudaGetLastError();
}

}  // namespace sonicmoe::cuda
