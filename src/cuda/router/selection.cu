// The selection of token rounding on given keys: comparison and integer work only, bit for bit the
// host's (router/token_rounding.cpp).
//   count_rows   CTA per expert: f, and for nearest_score whether up changes the score less
//   round_rows   one CTA: f -> f' by the policy, prefix sums of f'
//   write_rows   CTA per expert: the cut, the kept tokens in ascending order and their weights, and
//                a share of the unused places
#include "cuda/dependent_launch.hpp"
#include "cuda/ptx/pdl.cuh"
#include "cuda/router/launch.hpp"
#include "cuda/router/rounding.hpp"
#include "cuda/router/selection.cuh"
#include "math/exact_sum.hpp"
#include "math/rounding.hpp"

namespace sonicmoe::cuda::router {
namespace {

struct PolicyParams {
  const std::int64_t* seed_tensor;  // [1] or null
  std::uint64_t seed;
  std::int64_t tile;
  RoundingPolicy policy;
};

__device__ Column column_of(const RoundingBuffers& b, std::int64_t expert) {
  return {b.keys + expert * b.words * 32, b.chosen + expert * b.words, b.words};
}

// -------------------------------------------------------------------------------------- counting

constexpr int kCountHeld = 24;  // the exact sums need registers too

struct CountShared {
  SelectShared select;
  ExactSum dropped, added;
  unsigned rows;
};

// Adds the `count` strongest of a class of `size`, or the rest. Ties have equal scores, so which of
// them is meant does not matter.
__device__ void add_side(const Column& c, Class wanted, int size, int count, bool kept,
                         SelectShared& s, ExactSum& sum) {
  const Members<kCountHeld> members(c, wanted);
  const Cut cut = find_cut(members, size, count, s);
  members.for_each([&](std::uint32_t key, int) {
    if (key != 0 && key != cut.tied && (key >= cut.sure) == kept) sum.add(key_value(key), 1);
  });
  const int ties = kept ? cut.ties : cut.equal - cut.ties;
  if (threadIdx.x == 0 && ties > 0) sum.add(key_value(cut.tied), ties);
  __syncthreads();
}

// Whether adding the strongest others changes the expert's summed score by less than dropping its
// weakest rows does.
__device__ bool up_changes_less(const Column& c, int rows, int num_tokens, int tile,
                                CountShared& s) {
  const int floor = rows - rows % tile;
  if (threadIdx.x == 0) {
    s.dropped.clear();
    s.added.clear();
  }
  __syncthreads();
  add_side(c, Class::kChosen, rows, floor, false, s.select, s.dropped);
  add_side(c, Class::kOther, num_tokens - rows, floor + tile - rows, true, s.select, s.added);
  return threadIdx.x == 0 && ExactSum::magnitude_is_less(s.added, s.dropped);
}

__global__ void __launch_bounds__(kSelectThreads)
    count_rows_kernel(RoundingBuffers b, PolicyParams policy) {
  __shared__ CountShared s;
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  const Column c = column_of(b, blockIdx.x);
  if (threadIdx.x == 0) s.rows = 0;
  __syncthreads();
  unsigned mine = 0;
  for (int w = threadIdx.x; w < c.words; w += kSelectThreads) mine += __popc(c.chosen[w]);
  if (mine != 0) atomicAdd(&s.rows, mine);
  __syncthreads();
  const std::int64_t rows = s.rows;
  const std::int64_t remainder = rows % policy.tile;
  const bool asked = policy.policy == RoundingPolicy::kNearestScore && remainder != 0 &&
                     rows - remainder + policy.tile <= b.num_tokens;
  const bool up =
      asked && up_changes_less(c, static_cast<int>(rows), static_cast<int>(b.num_tokens),
                               static_cast<int>(policy.tile), s);
  if (threadIdx.x == 0) {
    b.rows_before[blockIdx.x] = static_cast<std::int32_t>(rows);
    b.up_changes_less[blockIdx.x] = up ? 1 : 0;
  }
}

// The sum of the values of all lower threads, and of all threads in `total`.
__device__ std::int64_t exclusive_sum(std::int64_t value, std::int64_t (&of_warps)[kSelectWarps],
                                      std::int64_t& total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const std::int64_t inclusive = inclusive_sum(value, lane);
  if (lane == 31) of_warps[warp] = inclusive;
  __syncthreads();
  std::int64_t before = 0;
  total = 0;
  for (int w = 0; w < kSelectWarps; ++w) {
    if (w < warp) before += of_warps[w];
    total += of_warps[w];
  }
  __syncthreads();
  return before + inclusive - value;
}

// -------------------------------------------------------------------------------------- rounding

struct RoundShared {
  std::int64_t remainder[kSelectThreads];  // -1: cannot round up
  bool up[kSelectThreads];
  std::int64_t warp_sums[kSelectWarps];
  std::int64_t carry;  // of `balanced`: sum of f' - f so far
};

// `balanced` goes through the experts in order: one thread, no divisions.
__device__ void balance(RoundShared& s, int count, std::int64_t tile) {
  std::int64_t carry = s.carry;
  for (int i = 0; i < count; ++i) {
    const std::int64_t remainder = s.remainder[i];
    if (remainder == 0) continue;
    if (remainder < 0) {  // rounds down by -remainder, there is no room above
      carry += remainder;
      s.up[i] = false;
      continue;
    }
    s.up[i] = balanced_is_up(carry, remainder, tile, s.up[i]);
    carry += (s.up[i] ? tile : 0) - remainder;
  }
  s.carry = carry;
}

__global__ void __launch_bounds__(kSelectThreads)
    round_rows_kernel(RoundingBuffers b, PolicyParams p, RoundingOutputs out) {
  __shared__ RoundShared s;
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  if (threadIdx.x == 0) s.carry = 0;
  const std::uint64_t seed =
      p.seed_tensor == nullptr ? p.seed : static_cast<std::uint64_t>(*p.seed_tensor);
  std::int64_t running = 0;
  for (int first = 0; first < b.num_experts; first += kSelectThreads) {
    const int e = first + static_cast<int>(threadIdx.x);
    const bool exists = e < b.num_experts;
    const std::int64_t rows = exists ? b.rows_before[e] : 0;
    const std::int64_t remainder = rows % p.tile;
    const bool fits = up_fits(rows, p.tile, b.num_tokens);
    s.up[threadIdx.x] = exists && remainder != 0 && fits &&
                        rounds_up(p.policy, rows, p.tile, seed, e, b.up_changes_less[e] != 0);
    s.remainder[threadIdx.x] = fits ? remainder : -remainder;
    __syncthreads();
    if (p.policy == RoundingPolicy::kBalanced && threadIdx.x == 0) {
      balance(s, min(kSelectThreads, b.num_experts - first), p.tile);
    }
    __syncthreads();
    const std::int64_t rounded = rows - remainder + (s.up[threadIdx.x] ? p.tile : 0);
    std::int64_t total;
    const std::int64_t before = exclusive_sum(rounded, s.warp_sums, total);
    if (exists) {
      b.rows_after[e] = static_cast<std::int32_t>(rounded);
      b.starts[e] = running + before;
      if (out.rows_per_expert != nullptr) {
        out.rows_per_expert[e] = static_cast<std::int32_t>(rounded);
      }
      if (out.rows_per_expert_before != nullptr) {
        out.rows_per_expert_before[e] = static_cast<std::int32_t>(rows);
      }
    }
    running += total;
  }
  if (threadIdx.x == 0) b.starts[b.num_experts] = running;
}

// --------------------------------------------------------------------------------------- writing

constexpr int kWriteHeld = 32;  // of 64 registers a thread

struct WriteShared {
  SelectShared select;
  std::int64_t warp_sums[kSelectWarps];
};

// Turns an expert's chosen bits, `before` of them, into those of its `after` rows: the strongest of
// the chosen, or the chosen and the strongest others.
__device__ void mark_rows(const RoundingBuffers& b, std::int64_t expert, int before, int after,
                          WriteShared& s) {
  const bool adds = after > before;
  const Members<kWriteHeld> members(column_of(b, expert), adds ? Class::kOther : Class::kChosen);
  const int num_tokens = static_cast<int>(b.num_tokens);
  const int size = adds ? num_tokens - before : before;
  const Cut cut = find_cut(members, size, adds ? after - before : after, s.select);
  const int lane = threadIdx.x % 32;
  int ties_before = 0;  // the warp's place among the equal keys
  if (cut.ties > 0) {
    int mine = 0;
    members.for_each([&](std::uint32_t key, int) { mine += key == cut.tied ? 1 : 0; });
    std::int64_t total;
    const auto before_lane = static_cast<int>(exclusive_sum(mine, s.warp_sums, total));
    ties_before = __shfl_sync(kAllLanes, before_lane, 0);
  }
  std::uint32_t* rows = b.chosen + expert * b.words;
  members.for_each([&](std::uint32_t key, int word) {
    // Who is not among the others has chosen the expert, or lies past the last token.
    bool kept = key >= cut.sure || (adds && key == 0 && word * 32 + lane < num_tokens);
    if (cut.ties > 0) {
      const std::uint32_t equal = __ballot_sync(kAllLanes, key == cut.tied);
      if (key == cut.tied) kept = ties_before + __popc(equal & ((1u << lane) - 1)) < cut.ties;
      ties_before += __popc(equal);
    }
    const std::uint32_t kept_of_word = __ballot_sync(kAllLanes, kept);
    if (lane == 0 && word < b.words) rows[word] = kept_of_word;
  });
}

// The tokens whose bits are set, in ascending order; every thread takes a word.
__device__ void write_tokens(const std::uint32_t* rows, int words, std::int32_t* token_ids,
                             WriteShared& s) {
  for (int first = 0; first < words; first += kSelectThreads) {
    const int word = first + static_cast<int>(threadIdx.x);
    std::uint32_t left = word < words ? rows[word] : 0;
    std::int64_t total;
    std::int32_t* place = token_ids + exclusive_sum(__popc(left), s.warp_sums, total);
    for (; left != 0; left &= left - 1) *place++ = word * 32 + __ffs(static_cast<int>(left)) - 1;
    token_ids += total;
  }
}

__global__ void __launch_bounds__(kSelectThreads)
    write_rows_kernel(RoundingBuffers b, PairWeights weights, RoundingOutputs out) {
  __shared__ WriteShared s;
  ptx::grid_dependency_wait();
  const int expert = static_cast<int>(blockIdx.x);
  const int after = b.rows_after[expert];
  if (after > 0) mark_rows(b, expert, b.rows_before[expert], after, s);
  __syncthreads();
  const std::int64_t start = b.starts[expert];
  if (after > 0) {
    write_tokens(b.chosen + std::int64_t{expert} * b.words, b.words, out.token_ids + start, s);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < after; i += kSelectThreads) {
    const std::int64_t t = out.token_ids[start + i];
    out.expert_ids[start + i] = expert;
    if (weights.out == nullptr) continue;
    const float logit = weights.logits[t * b.num_experts + expert];
    weights.out[start + i] = weight_of(weights.scoring, b.normalizers[t], logit);
  }
  const std::int64_t used = b.starts[b.num_experts];
  for (std::int64_t i = used + std::int64_t{blockIdx.x} * kSelectThreads + threadIdx.x;
       i < out.capacity; i += std::int64_t{gridDim.x} * kSelectThreads) {
    out.token_ids[i] = -1;
    out.expert_ids[i] = -1;
    if (weights.out != nullptr) weights.out[i] = 0.0f;
  }
}

}  // namespace

void launch_selection(cudaStream_t stream, const RoundingOptions& rounding,
                      const RoundingBuffers& buffers, const PairWeights& weights,
                      const RoundingOutputs& outputs, const char* operation) {
  const PolicyParams policy{rounding.seed_tensor.as<std::int64_t>(), rounding.seed, rounding.tile,
                            rounding.policy};
  const auto experts = static_cast<unsigned>(buffers.num_experts);
  check_cuda(
      launch_dependent(count_rows_kernel, experts, kSelectThreads, 0, stream, buffers, policy),
      operation);
  check_cuda(
      launch_dependent(round_rows_kernel, 1, kSelectThreads, 0, stream, buffers, policy, outputs),
      operation);
  check_cuda(launch_dependent(write_rows_kernel, experts, kSelectThreads, 0, stream, buffers,
                              weights, outputs),
             operation);
}

}  // namespace sonicmoe::cuda::router
