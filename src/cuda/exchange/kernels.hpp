// The kernels of an exchange. Only meet() waits for other ranks, and is one CTA of one warp (R1 of
// docs/design/exchange.md); the others wait for nothing (R2).
#pragma once

#include <cuda_runtime_api.h>

#include "core/exchange.hpp"

namespace sonicmoe::cuda {

/// The buffers of all ranks, as this one addresses them.
struct ExchangePeers {
  std::byte* buffers[kMostRanks];
  ExchangeParts own;
  ExchangePlaces places;
  std::int64_t max_tokens, row_bytes;  ///< row_bytes: a multiple of 16
  int rank, num_ranks, top_k, num_experts, experts_per_rank;

#if defined(__CUDACC__)
  /// What `own`, a pointer into the own buffer, points to in that of rank s.
  template <class T>
  __device__ T* at(int s, T* own_pointer) const {
    auto* bytes = reinterpret_cast<std::byte*>(own_pointer);
    return reinterpret_cast<T*>(buffers[s] + (bytes - buffers[rank]));
  }
  /// The row of a place, of the own buffer or like rows elsewhere.
  __device__ std::byte* row(void* rows, std::int64_t place) const {
    return static_cast<std::byte*>(rows) + place * row_bytes;
  }
  __device__ bool failed() const { return own.header->failed != 0; }
#endif
};

/// Rows whose starts lie `stride` bytes apart; both are multiples of 16. Null: none.
struct StridedRows {
  void* data = nullptr;
  std::int64_t stride = 0;
};

struct PublishArgs {
  std::int64_t num_tokens = 0;
  StridedRows x, grad_out;
  const void* ids = nullptr;      ///< [T, K] int32, or int64 where wide_ids
  const void* weights = nullptr;  ///< [T, K] float32, or bfloat16 where bf16_weights
  bool wide_ids = false, bf16_weights = false;
};
cudaError_t publish(cudaStream_t stream, const ExchangePeers& peers, const PublishArgs& args);

struct MeetArgs {
  ExchangeStage stage = ExchangeStage::kPublished;
  ExchangeOperation operation = ExchangeOperation::kForward;
  std::uint32_t num_tokens = 0;
  std::uint64_t digest = 0;
  std::uint64_t timeout_nanoseconds = 0;
  ExchangeFailure* record = nullptr;  ///< the host's, as the GPU addresses it
};
/// Writes the own flag to every rank and waits for theirs. Where one does not come, or is of
/// another call: fills the record, its `fault` last, and sets header->failed, after which no kernel
/// of this rank touches another's memory.
cudaError_t meet(cudaStream_t stream, const ExchangePeers& peers, const MeetArgs& args);

/// After a failure: no ids, weights NaN, no rows.
cudaError_t pull(cudaStream_t stream, const ExchangePeers& peers, const Collection& collection);

/// After a failure: NaN.
cudaError_t pull_sum(cudaStream_t stream, const ExchangePeers& peers, std::int64_t num_tokens,
                     StridedRows out, float* scores);

}  // namespace sonicmoe::cuda
