// The selection of token rounding on given keys: comparison and integer work only, bit for bit the
// host's (router/token_rounding.cpp).
//   count_rows   CTA per expert: f, and for nearest_score whether up changes the score less
//   round_rows   one CTA: f -> f' by the policy, prefix sums of f'
//   write_rows   CTA per expert: radix selection, then the kept tokens in ascending order with
//                their weights, and a share of the unused places
// write_rows passes over its column five times, in shared memory up to T = 53600.
#include "cuda/dependent_launch.hpp"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/pdl.cuh"
#include "cuda/router/exact_sum.cuh"
#include "cuda/router/launch.hpp"
#include "cuda/router/rounding.hpp"
#include "cuda/router/selection.cuh"

namespace sonicmoe::cuda::router {
namespace {

struct PolicyParams {
  const std::int64_t* seed_tensor;  // [1] or null
  std::uint64_t seed;
  std::int64_t tile;
  RoundingPolicy policy;
};

__device__ Column column_of(const RoundingBuffers& b, std::int64_t expert) {
  return {b.keys + expert * b.words * 32, b.chosen + expert * b.words, b.words, b.num_tokens};
}

// -------------------------------------------------------------------------------------- counting

struct CountShared {
  SelectShared select;
  ExactSum dropped, added;
  unsigned rows;
};

// Adds the members below (or above) the cut and the ties that belong with them.
__device__ void add_side(const Column& c, Class wanted, const Cut& cut, bool below,
                         std::int64_t ties, ExactSum& sum) {
  const int lane = threadIdx.x % 32;
  for_each_word(c, wanted, threadIdx.x / 32, c.words, kSelectWarps, lane,
                [&](std::uint32_t members, std::uint32_t key, int) {
                  if (((members >> lane) & 1u) == 0) return;
                  if (below ? key < cut.threshold : key > cut.threshold) sum.add(key_value(key), 1);
                });
  if (threadIdx.x == 0 && ties > 0) sum.add(key_value(cut.threshold), ties);
}

// Whether adding the strongest others changes the expert's summed score by less than dropping its
// weakest rows does. Ties have equal scores, so which of them is meant does not matter here.
__device__ bool up_changes_less(const Column& c, std::int64_t rows, std::int64_t tile,
                                CountShared& s) {
  const std::int64_t floor = rows - rows % tile;
  if (threadIdx.x == 0) {
    s.dropped.clear();
    s.added.clear();
  }
  const Cut kept = find_cut(c, Class::kChosen, static_cast<int>(floor), s.select);
  __syncthreads();  // find_cut returns at once for floor == 0
  add_side(c, Class::kChosen, kept, true, kept.equal - kept.ties, s.dropped);
  const Cut strongest = find_cut(c, Class::kOther, static_cast<int>(floor + tile - rows), s.select);
  add_side(c, Class::kOther, strongest, false, strongest.ties, s.added);
  __syncthreads();
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
                     rows - remainder + policy.tile <= c.num_tokens;
  const bool up = asked && up_changes_less(c, rows, policy.tile, s);
  if (threadIdx.x == 0) {
    b.rows_before[blockIdx.x] = static_cast<std::int32_t>(rows);
    b.up_changes_less[blockIdx.x] = up ? 1 : 0;
  }
}

// -------------------------------------------------------------------------------------- rounding

// Word 0 of Philox4x32-10 for counter (expert, 0, 0, 0): router/philox.hpp's rounding_bits.
__device__ std::uint32_t rounding_bits(std::uint64_t seed, std::uint32_t expert) {
  std::uint32_t counter[4] = {expert, 0, 0, 0};
  std::uint32_t key[2] = {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)};
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = std::uint64_t{0xD2511F53u} * counter[0];
    const std::uint64_t product1 = std::uint64_t{0xCD9E8D57u} * counter[2];
    counter[0] = static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0];
    counter[1] = static_cast<std::uint32_t>(product1);
    counter[2] = static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1];
    counter[3] = static_cast<std::uint32_t>(product0);
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
  return counter[0];
}

__device__ bool nearest_is_up(std::int64_t rows, std::int64_t tile) {
  const std::int64_t remainder = rows % tile;
  if (remainder * 2 != tile) return remainder * 2 > tile;
  return (rows / tile) % 2 != 0;  // a tie goes to the even multiple
}

// Every policy but `balanced`, for which this is what breaks its ties.
__device__ bool rounds_up(const PolicyParams& p, std::int64_t expert, std::int64_t rows,
                          bool score_says_up) {
  switch (p.policy) {
    case RoundingPolicy::kUp:
      return true;
    case RoundingPolicy::kDown:
      return false;
    case RoundingPolicy::kNearest:
    case RoundingPolicy::kBalanced:
      return nearest_is_up(rows, p.tile);
    case RoundingPolicy::kStochastic: {
      const std::uint64_t seed =
          p.seed_tensor == nullptr ? p.seed : static_cast<std::uint64_t>(*p.seed_tensor);
      const std::uint64_t bits = rounding_bits(seed, static_cast<std::uint32_t>(expert));
      return bits * static_cast<std::uint64_t>(p.tile) < static_cast<std::uint64_t>(rows % p.tile)
                                                             << 32;
    }
    case RoundingPolicy::kNearestScore:
      return score_says_up;
  }
  return false;
}

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
    const std::int64_t after_down = llabs(carry - remainder);
    const std::int64_t after_up = llabs(carry - remainder + tile);
    if (after_up != after_down) s.up[i] = after_up < after_down;
    carry += (s.up[i] ? tile : 0) - remainder;
  }
  s.carry = carry;
}

// The sum of the values of all lower threads, and of all threads in `total`.
__device__ std::int64_t exclusive_sum(std::int64_t value, RoundShared& s, std::int64_t& total) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  std::int64_t inclusive = value;
  for (int distance = 1; distance < 32; distance *= 2) {
    const std::int64_t other = __shfl_up_sync(kAllLanes, inclusive, distance);
    if (lane >= distance) inclusive += other;
  }
  if (lane == 31) s.warp_sums[warp] = inclusive;
  __syncthreads();
  std::int64_t before = 0;
  total = 0;
  for (int w = 0; w < kSelectWarps; ++w) {
    if (w < warp) before += s.warp_sums[w];
    total += s.warp_sums[w];
  }
  __syncthreads();
  return before + inclusive - value;
}

__global__ void __launch_bounds__(kSelectThreads)
    round_rows_kernel(RoundingBuffers b, PolicyParams p, RoundingOutputs out) {
  __shared__ RoundShared s;
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  if (threadIdx.x == 0) s.carry = 0;
  std::int64_t running = 0;
  for (int first = 0; first < b.num_experts; first += kSelectThreads) {
    const int e = first + static_cast<int>(threadIdx.x);
    const bool exists = e < b.num_experts;
    const std::int64_t rows = exists ? b.rows_before[e] : 0;
    const std::int64_t remainder = rows % p.tile;
    const bool up_fits = rows <= b.num_tokens - b.num_tokens % p.tile;  // ceil_M(f) <= T
    s.up[threadIdx.x] =
        exists && remainder != 0 && up_fits && rounds_up(p, e, rows, b.up_changes_less[e] != 0);
    s.remainder[threadIdx.x] = up_fits ? remainder : -remainder;
    __syncthreads();
    if (p.policy == RoundingPolicy::kBalanced && threadIdx.x == 0) {
      balance(s, min(kSelectThreads, b.num_experts - first), p.tile);
    }
    __syncthreads();
    const std::int64_t rounded = rows - remainder + (s.up[threadIdx.x] ? p.tile : 0);
    std::int64_t total;
    const std::int64_t before = exclusive_sum(rounded, s, total);
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

// What of a word is kept: `sure` without looking at other words, `equal` while ties last.
struct Kept {
  std::uint32_t sure, equal;
};
__device__ Kept classify(std::uint32_t members, std::uint32_t chosen_too, std::uint32_t key,
                         const Cut& cut) {
  const std::uint32_t above = __ballot_sync(kAllLanes, key > cut.threshold) & members;
  const std::uint32_t equal = __ballot_sync(kAllLanes, key == cut.threshold) & members;
  return {above | chosen_too, equal};
}

struct WriteShared {
  SelectShared select;
  int sure[kSelectWarps];
  int equal[kSelectWarps];
};

constexpr std::size_t kMaxCopyBytes = 216 * 1024;  // what WriteShared leaves of a CTA's 227 KB

std::size_t copy_bytes(const RoundingBuffers& b) {
  return sizeof(std::uint32_t) * 33 * static_cast<std::size_t>(b.words);
}

// Brings the column to shared memory [33 * words].
__device__ Column copy_of(const Column& c, std::uint32_t* copy) {
  std::uint32_t* chosen = copy + 32 * c.words;
  for (int i = threadIdx.x; i < 8 * c.words; i += kSelectThreads) {
    ptx::cp_async_16(ptx::shared_address(copy + 4 * i), c.keys + 4 * i);
  }
  for (int i = threadIdx.x; i < c.words; i += kSelectThreads) chosen[i] = c.chosen[i];
  ptx::cp_async_commit_group();
  ptx::cp_async_wait_group<0>();
  __syncthreads();
  return {copy, chosen, c.words, c.num_tokens};
}

// The `after` tokens that an expert keeps of `before` by token choice, or adds to them. Every warp
// owns a contiguous range of tokens: it counts, learns from the lower warps where its rows begin,
// and writes.
__device__ void write_tokens(const Column& c, int before, int after, std::int32_t* token_ids,
                             WriteShared& s) {
  const bool keeps_chosen = after > before;  // and adds others
  const Class wanted = keeps_chosen ? Class::kOther : Class::kChosen;
  const Cut cut = find_cut(c, wanted, keeps_chosen ? after - before : after, s.select);

  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int range = (c.words + kSelectWarps - 1) / kSelectWarps;
  const int first = min(warp * range, c.words);
  const int end = min(first + range, c.words);
  // In class kOther the members of a word are exactly the valid tokens that are not chosen.
  const auto kept_of = [&](std::uint32_t members, std::uint32_t key, int word) {
    return classify(members, keeps_chosen ? c.valid(word) & ~members : 0u, key, cut);
  };
  int sure = 0, equal = 0;
  for_each_word(c, wanted, first, end, 1, lane,
                [&](std::uint32_t members, std::uint32_t key, int word) {
                  const Kept kept = kept_of(members, key, word);
                  sure += __popc(kept.sure);
                  equal += __popc(kept.equal);
                });
  if (lane == 0) {
    s.sure[warp] = sure;
    s.equal[warp] = equal;
  }
  __syncthreads();
  int sure_before = 0, equal_before = 0;
  for (int w = 0; w < warp; ++w) {
    sure_before += s.sure[w];
    equal_before += s.equal[w];
  }
  const std::uint32_t lower = (1u << lane) - 1;
  for_each_word(c, wanted, first, end, 1, lane,
                [&](std::uint32_t members, std::uint32_t key, int word) {
                  const Kept kept = kept_of(members, key, word);
                  const bool tie_kept = ((kept.equal >> lane) & 1u) != 0 &&
                                        equal_before + __popc(kept.equal & lower) < cut.ties;
                  const std::uint32_t rows = kept.sure | __ballot_sync(kAllLanes, tie_kept);
                  if (((rows >> lane) & 1u) != 0) {
                    token_ids[sure_before + min(equal_before, cut.ties) + __popc(rows & lower)] =
                        word * 32 + lane;
                  }
                  sure_before += __popc(kept.sure);
                  equal_before += __popc(kept.equal);
                });
}

// `copies`: whether there is shared memory for copy_of().
__global__ void __launch_bounds__(kSelectThreads)
    write_rows_kernel(RoundingBuffers b, PairWeights weights, RoundingOutputs out, bool copies) {
  extern __shared__ __align__(16) std::uint32_t copy[];
  __shared__ WriteShared s;
  ptx::grid_dependency_wait();
  const int expert = static_cast<int>(blockIdx.x);
  const int after = b.rows_after[expert];
  const std::int64_t start = b.starts[expert];
  if (after > 0) {
    const Column c = column_of(b, expert);
    write_tokens(copies ? copy_of(c, copy) : c, b.rows_before[expert], after, out.token_ids + start,
                 s);
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
  const bool copies = copy_bytes(buffers) <= kMaxCopyBytes;
  const std::size_t shared = copies ? copy_bytes(buffers) : 0;
  check_cuda(cudaFuncSetAttribute(write_rows_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  static_cast<int>(kMaxCopyBytes)),
             operation);
  check_cuda(
      launch_dependent(count_rows_kernel, experts, kSelectThreads, 0, stream, buffers, policy),
      operation);
  check_cuda(
      launch_dependent(round_rows_kernel, 1, kSelectThreads, 0, stream, buffers, policy, outputs),
      operation);
  check_cuda(launch_dependent(write_rows_kernel, experts, kSelectThreads, shared, stream, buffers,
                              weights, outputs, copies),
             operation);
}

}  // namespace sonicmoe::cuda::router
