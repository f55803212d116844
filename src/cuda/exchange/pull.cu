#include "core/integers.hpp"
#include "cuda/exchange/copy.cuh"
#include "cuda/exchange/kernels.hpp"

namespace sonicmoe::cuda {
namespace {

// A warp per place: its token's ids and weights, then its rows where an expert of this rank is
// among them. Every rank begins with the places of the rank behind it, so that they do not all read
// from one at a time.
__global__ void __launch_bounds__(kExchangeThreads)
    pull_kernel(const __grid_constant__ ExchangePeers peers,
                const __grid_constant__ Collection to) {
  const int lane = threadIdx.x % 32;
  const std::int64_t num_places = peers.num_ranks * peers.max_tokens;
  const std::int64_t warp = std::int64_t{blockIdx.x} * kExchangeWarps + threadIdx.x / 32;
  if (warp >= num_places) return;
  const std::int64_t turned = warp + (peers.rank + 1) % peers.num_ranks * peers.places.chunk;
  const std::int64_t place = turned < num_places ? turned : turned - num_places;
  const auto s = static_cast<int>(peers.places.rank(place));
  const std::int64_t from = peers.places.token(place) * peers.top_k, slots = place * peers.top_k;
  const bool failed = peers.failed();
  const int first = peers.rank * peers.experts_per_rank;
  bool is_needed = false;
  for (int k = lane; k < peers.top_k; k += 32) {
    const std::int32_t id = failed ? -1 : peers.at(s, peers.own.ids)[from + k];
    to.ids[slots + k] = id;
    to.weights[slots + k] =
        failed ? __int_as_float(0x7fffffff) : peers.at(s, peers.own.weights)[from + k];
    is_needed |= id >= first && id < first + peers.experts_per_rank;
  }
  if (!__any_sync(~0u, is_needed)) return;
  const auto copy = [&](void* rows, void* own) {
    if (rows == nullptr || (rows == own && s == peers.rank)) return;
    copy_row(peers.row(rows, place), peers.row(peers.at(s, static_cast<std::byte*>(own)), place),
             peers.row_bytes, lane);
  };
  copy(to.grad_out, peers.own.rows_g);
  copy(to.x, peers.own.rows_x);
}

}  // namespace

cudaError_t pull(cudaStream_t stream, const ExchangePeers& peers, const Collection& collection) {
  const std::int64_t num_places = peers.num_ranks * peers.max_tokens;
  const auto grid = static_cast<unsigned>(ceil_div(num_places, kExchangeWarps));
  pull_kernel<<<grid, kExchangeThreads, 0, stream>>>(peers, collection);
  return cudaGetLastError();
}

}  // namespace sonicmoe::cuda
