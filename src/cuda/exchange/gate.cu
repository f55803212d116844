#include "cuda/exchange/kernels.hpp"
#include "cuda/ptx/system.cuh"

namespace sonicmoe::cuda {
namespace {

__device__ std::uint64_t* flags(ExchangeHeader* header, ExchangeStage stage) {
  return stage == ExchangeStage::kPublished ? header->published : header->ready;
}

// What is wrong with a flag that has come.
__device__ ExchangeFault fault_of(std::uint64_t seen, std::uint64_t own, const MeetArgs& args,
                                  const std::uint64_t* digest) {
  const ExchangeFlag flag = unpacked(seen), wanted = unpacked(own);
  if (flag.call != wanted.call || flag.operation != wanted.operation) return ExchangeFault::kOrder;
  // Past this stage the peer may have gone on to its next call, whose digest may be another.
  if (args.stage != ExchangeStage::kPublished) return ExchangeFault::kNone;
  return ptx::load_relaxed_system(digest) == args.digest ? ExchangeFault::kNone
                                                         : ExchangeFault::kConfiguration;
}

// SONICMOE_STRESS: up to 65 us, another time each call and rank.
__device__ void dawdle([[maybe_unused]] std::uint64_t own, [[maybe_unused]] int rank) {
#ifdef SONICMOE_STRESS
  const auto draw = static_cast<unsigned>(own >> 32) * 0x9e3779b9u + static_cast<unsigned>(rank);
  __nanosleep((draw ^ draw >> 15) * 0x85ebca6bu >> 16);
#endif
}

// Lane s deals with rank s.
__global__ void __launch_bounds__(32, 1) meet_kernel(const __grid_constant__ ExchangePeers peers,
                                                     const __grid_constant__ MeetArgs args) {
  ExchangeHeader* header = peers.own.header;
  if (peers.failed()) return;
  const int s = threadIdx.x;
  const bool is_rank = s < peers.num_ranks;
  const std::uint64_t own = packed({header->call, args.operation, args.num_tokens});
  ptx::fence_system();
  if (is_rank) {
    ExchangeHeader* peer = peers.at(s, header);
    if (args.stage == ExchangeStage::kPublished) {
      ptx::store_relaxed_system(&peer->digest[peers.rank], args.digest);
    }
    ptx::store_release_system(&flags(peer, args.stage)[peers.rank], own);
  }
  const std::uint64_t begin = ptx::global_nanoseconds();
  std::uint64_t seen = own;
  ExchangeFault fault = ExchangeFault::kNone;
  bool waits = is_rank;
  // Until all have come, or one of them will not.
  while (__any_sync(~0u, waits) && !__any_sync(~0u, fault != ExchangeFault::kNone)) {
    if (!waits) continue;
    seen = ptx::load_acquire_system(&flags(header, args.stage)[s]);
    if (reached(unpacked(seen).call, header->call)) {
      waits = false;
      fault = fault_of(seen, own, args, &header->digest[s]);
    } else if (ptx::global_nanoseconds() - begin > args.timeout_nanoseconds) {
      fault = ExchangeFault::kTimeout;
    } else {
      __nanosleep(100);
    }
  }
  const unsigned faults = __ballot_sync(~0u, fault != ExchangeFault::kNone);
  dawdle(own, peers.rank);
  if (faults == 0 || s != __ffs(static_cast<int>(faults)) - 1) return;
  header->failed = 1;
  args.record->rank = peers.rank;
  args.record->peer = s;
  args.record->stage = args.stage;
  args.record->wanted = own;
  args.record->seen = seen;
  ptx::store_release_system(reinterpret_cast<std::uint32_t*>(&args.record->fault),
                            static_cast<std::uint32_t>(fault));
}

}  // namespace

cudaError_t meet(cudaStream_t stream, const ExchangePeers& peers, const MeetArgs& args) {
  meet_kernel<<<1, 32, 0, stream>>>(peers, args);
  return cudaGetLastError();
}

}  // namespace sonicmoe::cuda
