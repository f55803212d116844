#include <cuda_bf16.h>

#include "core/integers.hpp"
#include "cuda/exchange/copy.cuh"
#include "cuda/exchange/kernels.hpp"

namespace sonicmoe::cuda {
namespace {

__device__ std::int64_t id_at(const PublishArgs& args, std::int64_t slot) {
  return args.wide_ids ? static_cast<const std::int64_t*>(args.ids)[slot]
                       : static_cast<const std::int32_t*>(args.ids)[slot];
}

__device__ float weight_at(const PublishArgs& args, std::int64_t slot) {
  return args.bf16_weights ? __bfloat162float(static_cast<const __nv_bfloat16*>(args.weights)[slot])
                           : static_cast<const float*>(args.weights)[slot];
}

// A warp per token of T_max, so that those that are not there get ids of -1.
__global__ void __launch_bounds__(kExchangeThreads)
    publish_kernel(const __grid_constant__ ExchangePeers peers,
                   const __grid_constant__ PublishArgs args) {
  const int lane = threadIdx.x % 32;
  const std::int64_t t = std::int64_t{blockIdx.x} * kExchangeWarps + threadIdx.x / 32;
  if (blockIdx.x == 0 && threadIdx.x == 0) ++peers.own.header->call;
  if (t >= peers.max_tokens) return;
  const std::int64_t first = t * peers.top_k;
  for (int k = lane; k < peers.top_k; k += 32) {
    const std::int64_t id = t < args.num_tokens ? id_at(args, first + k) : -1;
    const bool valid = id >= 0 && id < peers.num_experts;
    peers.own.ids[first + k] = valid ? static_cast<std::int32_t>(id) : -1;
    peers.own.weights[first + k] = valid ? weight_at(args, first + k) : 0.0f;
  }
  if (t >= args.num_tokens) return;
  const std::int64_t place = peers.places.of(peers.rank, t);
  const auto copy = [&](void* rows, const StridedRows& from) {
    if (from.data == nullptr) return;
    copy_row(peers.row(rows, place), static_cast<std::byte*>(from.data) + t * from.stride,
             peers.row_bytes, lane);
  };
  copy(peers.own.rows_x, args.x);
  copy(peers.own.rows_g, args.grad_out);
}

}  // namespace

cudaError_t publish(cudaStream_t stream, const ExchangePeers& peers, const PublishArgs& args) {
  const auto grid = static_cast<unsigned>(ceil_div(peers.max_tokens, kExchangeWarps));
  publish_kernel<<<grid, kExchangeThreads, 0, stream>>>(peers, args);
  return cudaGetLastError();
}

}  // namespace sonicmoe::cuda
