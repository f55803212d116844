// Token choice: scores, groups, top-K, weights.
//   logits [T, E] fp32 -> topk_ids [T, K], topk_weights [T, K], rows_per_expert [E]
// One warp per token. Lane l holds the ordering keys of the experts l, l + 32, ...: in registers up
// to 1024 experts, in shared memory beyond. The lanes' largest keys bound the K-th key of the warp
// from below; the few experts that reach the bound are put in order, the lowest of equals first.
// Where more than 32 reach it, or K > 20, K rounds take the largest key of all: of random keys that
// is one token in a thousand at 512 experts and K = 16, one in five at K = 20, nearly all above.
// Cost: 3 K + E / 8 instructions beside the loads and keys, K * E / 8 in rounds, and E exponentials
// per token where a sum over E or a sigmoid is asked for.
#include "cuda/router/launch.hpp"
#include "cuda/router/route.hpp"
#include "cuda/router/router.hpp"

namespace sonicmoe::cuda::router {
namespace {

constexpr int kMaxWarps = 8;
constexpr int kCandidates = 32;                      // put in order: one per lane
constexpr int kMostOrdered = 20;                     // K for which they usually suffice
constexpr std::size_t kSharedBytes = 48 * 1024;      // without asking for more
constexpr std::size_t kMaxSharedBytes = 227 * 1024;  // a CTA's limit on Hopper

// The keys of one lane. kSlots is the number of its experts, 0 for any number.
template <int kSlots>
struct KeyRow {
  std::uint32_t keys[kSlots];
  __device__ explicit KeyRow(std::uint32_t*) {}
  __device__ std::uint32_t& operator[](int i) { return keys[i]; }
};
template <>
struct KeyRow<0> {
  std::uint32_t* keys;  // of this lane, in shared memory
  __device__ explicit KeyRow(std::uint32_t* lane_keys) : keys(lane_keys) {}
  __device__ std::uint32_t& operator[](int i) { return keys[32 * i]; }
};

// Calls visit(i) for every slot of the lane.
template <int kSlots, class Visit>
__device__ __forceinline__ void for_each_slot(int slots, Visit&& visit) {
  if constexpr (kSlots > 0) {
#pragma unroll
    for (int i = 0; i < kSlots; ++i) visit(i);
  } else {
    for (int i = 0; i < slots; ++i) visit(i);
  }
}

// Whether the lane's slot i holds an expert. kSlots is the least power of two that holds all
// (launch_for_experts), so the first half always does. Loops over exponentials do not use this:
// without a branch around each, several would be under way at once and their registers spill.
template <int kSlots>
__device__ __forceinline__ bool holds_expert(int i, int lane, int num_experts) {
  return i < kSlots / 2 || lane + 32 * i < num_experts;
}

// Shared memory of one warp, after its candidates [kCandidates]; then of the CTA.
struct WarpMemory {
  int slots;         // experts per lane
  bool uses_keys;    // keys [slots * 32]: beyond 1024 experts, and for groups
  bool uses_groups;  // group keys [num_groups]
  std::size_t warp_bytes;

  WarpMemory(const ScoringParams& p, bool keys_in_registers)
      : slots((p.num_experts + 31) / 32),
        uses_keys(!keys_in_registers || p.top_groups < p.num_groups),
        uses_groups(p.top_groups < p.num_groups) {
    warp_bytes = sizeof(std::uint64_t) * (kCandidates + (uses_groups ? p.num_groups : 0)) +
                 (uses_keys ? sizeof(std::uint32_t) * 32 * slots : 0);
    warp_bytes = (warp_bytes + 7) / 8 * 8;
  }
};

// Marks the experts of all but the best groups as excluded.
template <int kSlots>
__device__ void exclude_groups(KeyRow<kSlots>& row, const ScoringParams& p, int slots, int lane,
                               std::uint64_t* group_keys, std::uint32_t* shared_keys) {
  const int group_size = p.num_experts / p.num_groups;
  for_each_slot<kSlots>(slots, [&](int i) {
    if (holds_expert<kSlots>(i, lane, p.num_experts)) shared_keys[lane + 32 * i] = row[i];
  });
  __syncwarp();
  for (int g = lane; g < p.num_groups; g += 32) {
    std::uint32_t first = 0, second = 0;
    for (int i = g * group_size; i < (g + 1) * group_size; ++i) {
      const std::uint32_t key = shared_keys[i];
      second = max(second, min(first, key));
      first = max(first, key);
    }
    const float score = group_size == 1 ? key_value(first) : key_value(first) + key_value(second);
    group_keys[g] = ranking_key(ordered_key(score), g);
  }
  __syncwarp();
  std::uint64_t threshold = ~std::uint64_t{0};  // keys are distinct
  for (int n = 0; n < p.top_groups; ++n) {
    std::uint64_t best = 0;
    for (int g = lane; g < p.num_groups; g += 32) {
      const std::uint64_t key = group_keys[g];
      if (key < threshold && key > best) best = key;
    }
    threshold = warp_max(best);
  }
  for_each_slot<kSlots>(slots, [&](int i) {
    const int e = lane + 32 * i;
    if (holds_expert<kSlots>(i, lane, p.num_experts) && group_keys[e / group_size] < threshold) {
      row[i] = kExcluded;
    }
  });
  __syncwarp();  // the next token overwrites both arrays
}

// A key that K keys of the warp reach, given each lane's largest: lanes leave from the top, equals
// together, until at least K have left. There are at least K keys that are not excluded.
__device__ std::uint32_t selection_bound(std::uint32_t lane_best, int top_k) {
  std::uint32_t bound = kExcluded;
  for (int k = 0; k < top_k; ++k) {
    bound = __reduce_max_sync(kAllLanes, lane_best);
    if (lane_best == bound) lane_best = kExcluded;
  }
  return max(bound, kExcluded + 1);
}

// Writes the ranking keys of the experts that reach `bound`, in any order, and returns their
// number; nothing is written where they are more than kCandidates.
template <int kSlots>
__device__ int collect_candidates(KeyRow<kSlots>& row, int slots, int lane, std::uint32_t bound,
                                  std::uint64_t* candidates) {
  int mine = 0;
  for_each_slot<kSlots>(slots, [&](int i) { mine += row[i] >= bound ? 1 : 0; });
  int end = mine;  // inclusive sum over the lanes
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, end, distance);
    if (lane >= distance) end += other;
  }
  const int count = __shfl_sync(kAllLanes, end, 31);
  if (count > kCandidates) return count;
  __syncwarp();  // the candidates of the token before have been read
  std::uint64_t* next = candidates + end - mine;
  for_each_slot<kSlots>(slots, [&](int i) {
    if (row[i] >= bound) *next++ = ranking_key(row[i], lane + 32 * i);
  });
  __syncwarp();
  return count;
}

// Best first. Every lane places one candidate: the keys are distinct.
__device__ void order_candidates(std::uint64_t* candidates, int count, int lane) {
  const std::uint64_t mine = lane < count ? candidates[lane] : 0;
  int before = 0;
#pragma unroll 4
  for (int i = 0; i < count; ++i) before += candidates[i] > mine ? 1 : 0;
  __syncwarp();
  if (lane < count) candidates[before] = mine;
  __syncwarp();
}

// Takes the K best experts out of the row, best first. Slot k belongs to lane k % 32, which writes
// its id; returns the expert of slot `lane`.
template <int kSlots, class Id>
__device__ int select_in_rounds(KeyRow<kSlots>& row, int top_k, int slots, int lane, Id* ids) {
  int taken = -1, mine = -1;
  for (int k = 0; k < top_k; ++k) {
    std::uint32_t best = kExcluded;
    unsigned best_expert = 0xffffffffu;
    for_each_slot<kSlots>(slots, [&](int i) {
      const int e = lane + 32 * i;
      if (e == taken) row[i] = kExcluded;
      if (row[i] > best) {
        best = row[i];
        best_expert = static_cast<unsigned>(e);
      }
    });
    const std::uint32_t top = __reduce_max_sync(kAllLanes, best);
    const unsigned expert = __reduce_min_sync(kAllLanes, best == top ? best_expert : 0xffffffffu);
    taken = static_cast<int>(expert);
    if (lane == k % 32) ids[k] = static_cast<Id>(taken);
    if (lane == k) mine = taken;
  }
  return mine;
}

// The same by the fastest way that the keys allow.
template <int kSlots, class Id>
__device__ int select(KeyRow<kSlots>& row, int top_k, int slots, int lane,
                      std::uint64_t* candidates, Id* ids) {
  if (top_k <= kMostOrdered) {
    std::uint32_t lane_best = kExcluded;
    for_each_slot<kSlots>(slots, [&](int i) { lane_best = max(lane_best, row[i]); });
    const std::uint32_t bound = selection_bound(lane_best, top_k);
    const int count = collect_candidates(row, slots, lane, bound, candidates);
    if (count <= kCandidates) {
      order_candidates(candidates, count, lane);
      const int expert = lane < top_k ? ranking_index(candidates[lane]) : -1;
      if (lane < top_k) ids[lane] = static_cast<Id>(expert);
      return expert;
    }
  }
  return select_in_rounds(row, top_k, slots, lane, ids);
}

// Fills the row with the token's ordering keys. All loads are in flight together.
template <int kSlots>
__device__ void load_keys(KeyRow<kSlots>& row, const ScoringParams& p, const float* logits,
                          int slots, int lane) {
  for_each_slot<kSlots>(slots, [&](int i) {
    const int e = lane + 32 * i;
    row[i] = holds_expert<kSlots>(i, lane, p.num_experts) ? __float_as_uint(logits[e]) : 0;
  });
  if (!p.biased) {
    for_each_slot<kSlots>(slots, [&](int i) {
      const std::uint32_t key = ordered_key(__uint_as_float(row[i]));
      row[i] = holds_expert<kSlots>(i, lane, p.num_experts) ? key : kExcluded;
    });
    return;
  }
  visit_score(p.score, [&]<class Score>(Score) {  // one branch for all of them
    if constexpr (!Score::kIsRelative) {          // as every biased scoring's
      for_each_slot<kSlots>(slots, [&](int i) {
        const int e = lane + 32 * i;
        if (e >= p.num_experts) return;  // 0 = kExcluded
        const float bias = p.selection_bias == nullptr ? 0.0f : p.selection_bias[e];
        const double score = Score::raw(__uint_as_float(row[i]), 0.0);
        row[i] = ordered_key(static_cast<float>(score) + bias);
      });
    }
  });
}

// The largest logit, and the sum over E of exp(logit - shift) where it is asked for.
template <int kSlots>
__device__ TokenNormalizer softmax_normalizer(KeyRow<kSlots>& row, int num_experts, bool sums,
                                              int slots, int lane) {
  std::uint32_t largest = kExcluded;
  for_each_slot<kSlots>(slots, [&](int i) { largest = max(largest, row[i]); });
  const double shift = key_value(__reduce_max_sync(kAllLanes, largest));
  if (!sums) return {shift, 0.0};
  double sum = 0.0;
  for_each_slot<kSlots>(slots, [&](int i) {
    if (lane + 32 * i < num_experts) sum += exp(double{key_value(row[i])} - shift);
  });
  return {shift, warp_sum(sum)};
}

template <int kSlots, class Id>
__device__ void route_token(const RouteParams& r, std::int64_t t, int slots, int lane,
                            std::uint64_t* candidates, std::uint64_t* group_keys,
                            std::uint32_t* shared_keys, int* histogram) {
  const ScoringParams& p = r.scoring;
  const float* logits = r.logits + t * p.num_experts;
  KeyRow<kSlots> row(shared_keys + lane);
  load_keys(row, p, logits, slots, lane);
  TokenNormalizer normalizer{0.0, 1.0};
  if (is_relative(p.score)) {
    normalizer = softmax_normalizer(row, p.num_experts, !p.renormalizes, slots, lane);
  }
  if (p.top_groups < p.num_groups) {
    exclude_groups(row, p, slots, lane, group_keys, shared_keys);
  }
  Id* ids = static_cast<Id*>(r.topk_ids) + t * p.top_k;
  const int expert = select(row, p.top_k, slots, lane, candidates, ids);

  // Slot `lane` stays in registers; of the slots beyond 32 a lane reads only ids that it wrote.
  const double raw = expert >= 0 ? raw_score(p, logits[expert], normalizer.shift) : 0.0;
  if (p.renormalizes) {
    double sum = raw;
    for (int k = lane + 32; k < p.top_k; k += 32) {
      sum += raw_score(p, logits[ids[k]], normalizer.shift);
    }
    normalizer.denominator = warp_sum(sum) + score_epsilon(p.score);
  }
  if (r.normalizers != nullptr && lane == 0) r.normalizers[t] = normalizer;
  for (int k = lane; k < p.top_k; k += 32) {
    const int e = k == lane ? expert : static_cast<int>(ids[k]);
    if (r.topk_weights != nullptr) {
      const double score = k == lane ? raw : raw_score(p, logits[e], normalizer.shift);
      r.topk_weights[t * p.top_k + k] = weight_of_score(p.scale, normalizer, score);
    }
    if (histogram != nullptr) atomicAdd(histogram + e, 1);
  }
}

template <int kSlots, class Id>
__global__ void __launch_bounds__(32 * kMaxWarps, kSlots <= 16 ? 4 : 2)
    route_kernel(RouteParams r, WarpMemory layout) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  auto* candidates = reinterpret_cast<std::uint64_t*>(shared + warp * layout.warp_bytes);
  std::uint64_t* group_keys = candidates + kCandidates;
  auto* keys = reinterpret_cast<std::uint32_t*>(group_keys +
                                                (layout.uses_groups ? r.scoring.num_groups : 0));
  int* histogram =
      r.rows == nullptr ? nullptr : reinterpret_cast<int*>(shared + warps * layout.warp_bytes);
  if (histogram != nullptr) {
    for (int e = threadIdx.x; e < r.scoring.num_experts; e += blockDim.x) histogram[e] = 0;
    __syncthreads();
  }
  for (std::int64_t t = std::int64_t{blockIdx.x} * warps + warp; t < r.num_tokens;
       t += std::int64_t{gridDim.x} * warps) {
    route_token<kSlots, Id>(r, t, layout.slots, lane, candidates, group_keys, keys, histogram);
  }
  if (histogram != nullptr) {
    __syncthreads();
    for (int e = threadIdx.x; e < r.scoring.num_experts; e += blockDim.x) {
      if (histogram[e] != 0) atomicAdd(r.rows + e, histogram[e]);
    }
  }
}

template <int kSlots, class Id>
void launch(cudaStream_t stream, const RouteParams& r, const char* operation) {
  const WarpMemory layout(r.scoring, kSlots > 0);
  const std::size_t histogram = r.rows == nullptr ? 0 : sizeof(int) * r.scoring.num_experts;
  int warps = kMaxWarps;
  while (warps > 1 && warps * layout.warp_bytes + histogram > kSharedBytes) warps /= 2;
  const std::size_t bytes = warps * layout.warp_bytes + histogram;
  if (bytes > kMaxSharedBytes) {
    throw Error(operation, "logits", "experts whose scores fit in shared memory",
                std::to_string(r.scoring.num_experts) + " experts");
  }
  if (bytes > kSharedBytes) {
    check_cuda(
        cudaFuncSetAttribute(route_kernel<kSlots, Id>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        operation);
  }
  route_kernel<kSlots, Id>
      <<<grid_stride_blocks(r.num_tokens, warps), 32 * warps, bytes, stream>>>(r, layout);
  check_launch(operation);
}

template <class Id>
void launch_for_experts(cudaStream_t stream, const RouteParams& r, const char* operation) {
  const int experts = r.scoring.num_experts;
  if (experts <= 32) return launch<1, Id>(stream, r, operation);
  if (experts <= 64) return launch<2, Id>(stream, r, operation);
  if (experts <= 128) return launch<4, Id>(stream, r, operation);
  if (experts <= 256) return launch<8, Id>(stream, r, operation);
  if (experts <= 512) return launch<16, Id>(stream, r, operation);
  if (experts <= 1024) return launch<32, Id>(stream, r, operation);
  launch<0, Id>(stream, r, operation);
}

}  // namespace

void launch_route(cudaStream_t stream, const RouteParams& r, const char* operation) {
  if (r.wide_ids) {
    launch_for_experts<std::int64_t>(stream, r, operation);
  } else {
    launch_for_experts<std::int32_t>(stream, r, operation);
  }
}

void route_forward(const Context& context, const RouteForwardArgs& args) {
  const cudaStream_t stream = stream_of(context);
  RouteParams r{};
  r.scoring = scoring_params(args.options, args.logits.size(1));
  r.logits = args.logits.as<float>();
  r.topk_ids = args.topk_ids.data();
  r.topk_weights = args.topk_weights.as<float>();
  r.rows = args.rows_per_expert.as<std::int32_t>();
  r.num_tokens = args.logits.size(0);
  r.wide_ids = args.topk_ids.dtype() == DType::kInt64;
  if (r.rows != nullptr) {
    check_cuda(cudaMemsetAsync(r.rows, 0, args.rows_per_expert.nbytes(), stream), "route_forward");
  }
  if (r.num_tokens > 0) launch_route(stream, r, "route_forward");
}

}  // namespace sonicmoe::cuda::router
