// Token choice: scores, groups, top-K, weights.
//   logits [T, E] fp32 -> topk_ids [T, K], topk_weights [T, K], rows_per_expert [E]
// One warp per token. Lane l holds the ordering keys of the experts l, l + 32, ...: in registers up
// to 1024 experts, in shared memory beyond. Every round of the selection takes the largest key of
// the warp, the lowest expert among equals. Cost: K * E / 32 compares per lane and E exponentials
// per token where a sum over E or a sigmoid is asked for.
#include "cuda/router/launch.hpp"
#include "cuda/router/route.hpp"
#include "cuda/router/router.hpp"

namespace sonicmoe::cuda::router {
namespace {

constexpr int kMaxWarps = 8;
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

// Shared memory of one warp, then of the CTA.
struct SharedLayout {
  int slots;         // experts per lane
  bool uses_keys;    // keys [slots * 32]: beyond 1024 experts, and for groups
  bool uses_groups;  // group keys [num_groups]
  std::size_t warp_bytes;

  SharedLayout(const ScoringParams& p, bool keys_in_registers)
      : slots((p.num_experts + 31) / 32),
        uses_keys(!keys_in_registers || p.top_groups < p.num_groups),
        uses_groups(p.top_groups < p.num_groups) {
    warp_bytes = (uses_groups ? sizeof(std::uint64_t) * p.num_groups : 0) +
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
    if (lane + 32 * i < p.num_experts) shared_keys[lane + 32 * i] = row[i];
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
    group_keys[g] = (std::uint64_t{ordered_key(score)} << 32) | (0xffffffffu - g);
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
    if (e < p.num_experts && group_keys[e / group_size] < threshold) row[i] = kExcluded;
  });
  __syncwarp();  // the next token overwrites both arrays
}

// Takes the K best experts out of the row, best first, and writes their ids; slot k is written by
// lane k % 32. There are at least K experts that are not excluded.
template <int kSlots, class Id>
__device__ void select(KeyRow<kSlots>& row, const ScoringParams& p, int slots, int lane, Id* ids) {
  int taken = -1;
  for (int k = 0; k < p.top_k; ++k) {
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
  }
}

template <int kSlots, class Id>
__device__ void route_token(const RouteParams& r, std::int64_t t, int slots, int lane,
                            std::uint64_t* group_keys, std::uint32_t* shared_keys, int* histogram) {
  const ScoringParams& p = r.scoring;
  const float* logits = r.logits + t * p.num_experts;
  KeyRow<kSlots> row(shared_keys + lane);
  std::uint32_t largest = 0;
  for_each_slot<kSlots>(slots, [&](int i) {
    const int e = lane + 32 * i;
    std::uint32_t key = kExcluded;
    if (e < p.num_experts) {
      const float logit = logits[e];
      const float bias = p.selection_bias == nullptr ? 0.0f : p.selection_bias[e];
      key = ordered_key(p.is_softmax ? logit : static_cast<float>(sigmoid(logit)) + bias);
    }
    row[i] = key;
    largest = max(largest, key);
  });

  double shift = 0.0, sum_over_experts = 0.0;
  if (p.is_softmax) {
    shift = key_value(__reduce_max_sync(kAllLanes, largest));
    if (!p.renormalizes || r.row_sums != nullptr) {
      for_each_slot<kSlots>(slots, [&](int i) {
        if (lane + 32 * i < p.num_experts) {
          sum_over_experts += exp(double{key_value(row[i])} - shift);
        }
      });
      sum_over_experts = warp_sum(sum_over_experts);
    }
  }
  if (p.top_groups < p.num_groups) {
    exclude_groups(row, p, slots, lane, group_keys, shared_keys);
  }
  Id* ids = static_cast<Id*>(r.topk_ids) + t * p.top_k;
  select(row, p, slots, lane, ids);

  // From here on every lane reads only ids that it wrote itself.
  double denominator = p.is_softmax ? sum_over_experts : 1.0;
  if (p.renormalizes) {
    double sum = 0.0;
    for (int k = lane; k < p.top_k; k += 32) sum += raw_score(p, logits[ids[k]], shift);
    denominator = warp_sum(sum) + (p.is_softmax ? 0.0 : kSigmoidEpsilon);
  }
  const TokenNormalizer normalizer{shift, denominator};
  for (int k = lane; k < p.top_k; k += 32) {
    const int e = static_cast<int>(ids[k]);
    if (r.topk_weights != nullptr) {
      r.topk_weights[t * p.top_k + k] = weight_of(p, normalizer, logits[e]);
    }
    if (histogram != nullptr) atomicAdd(histogram + e, 1);
  }
  if (lane == 0) {
    if (r.normalizers != nullptr) r.normalizers[t] = normalizer;
    if (r.row_sums != nullptr) r.row_sums[t] = sum_over_experts;
  }
}

template <int kSlots, class Id>
__global__ void __launch_bounds__(32 * kMaxWarps) route_kernel(RouteParams r, SharedLayout layout) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  auto* group_keys = reinterpret_cast<std::uint64_t*>(shared + warp * layout.warp_bytes);
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
    route_token<kSlots, Id>(r, t, layout.slots, lane, group_keys, keys, histogram);
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
  const SharedLayout layout(r.scoring, kSlots > 0);
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
