// Token rounding: token choice, ranking scores as columns, selection.
#include "core/workspace.hpp"
#include "cuda/dependent_launch.hpp"
#include "cuda/ptx/pdl.cuh"
#include "cuda/router/launch.hpp"
#include "cuda/router/rounding.hpp"
#include "cuda/router/route.hpp"
#include "cuda/router/router.hpp"

namespace sonicmoe::cuda::router {
namespace {

std::size_t carve(void* base, std::int64_t num_tokens, std::int64_t num_experts,
                  RoundingBuffers& b) {
  WorkspaceCarver carver(base);
  const auto tokens = static_cast<std::size_t>(num_tokens);
  const auto experts = static_cast<std::size_t>(num_experts);
  const auto words = static_cast<std::size_t>(ceil_div(num_tokens, 32));
  b.num_tokens = num_tokens;
  b.num_experts = static_cast<int>(num_experts);
  b.words = static_cast<int>(words);
  b.normalizers = carver.take<TokenNormalizer>(tokens);
  b.keys = carver.take<std::uint32_t>(experts * words * 32);
  b.chosen = carver.take<std::uint32_t>(experts * words);
  b.starts = carver.take<std::int64_t>(experts + 1);
  b.rows_before = carver.take<std::int32_t>(experts);
  b.rows_after = carver.take<std::int32_t>(experts);
  b.up_changes_less = carver.take<std::uint8_t>(experts);
  return carver.used();
}

// Ranking scores in two steps, so that an exponential is computed once: raw(t, e) and, given their
// sum over E where kSums, score().

// As they are given to round_select.
struct GivenScores {
  static constexpr bool kSums = false;
  const float* values;  // [T, E]

  __device__ double shift(std::int64_t) const { return 0.0; }
  __device__ double raw(float value, double) const { return value; }
  __device__ float score(double raw, double, int) const { return static_cast<float>(raw); }
};

// Of a router's logits. A relative score: its share of the sum, rounded to float32 once; else the
// score rounded to float32, + bias.
template <class Score>
struct RouterScores {
  static constexpr bool kSums = Score::kIsRelative;
  const float* values;                 // [T, E] logits
  const TokenNormalizer* normalizers;  // [T]
  const float* bias;                   // [E] or null

  __device__ double shift(std::int64_t t) const { return kSums ? normalizers[t].shift : 0.0; }
  __device__ double raw(float logit, double shift) const { return Score::raw(logit, shift); }
  __device__ float score(double raw, double sum, int e) const {
    if (kSums) return static_cast<float>(raw / sum);
    return static_cast<float>(raw) + (bias == nullptr ? 0.0f : bias[e]);
  }
};

constexpr int kRankThreads = 512;
constexpr int kRankWarps = kRankThreads / 32;
constexpr int kRankSlots = 8;  // experts of a lane
constexpr int kRankExperts = 32 * kRankSlots;

// raws[i] = raw(t, first_expert + lane + 32 i), 0 past E. All loads are in flight together.
template <class Scores>
__device__ void load_raws(const Scores& scores, std::int64_t t, int first_expert, int num_experts,
                          int lane, double (&raws)[kRankSlots]) {
  const float* values = scores.values + t * num_experts;
  const double shift = scores.shift(t);
  float loaded[kRankSlots];
#pragma unroll
  for (int i = 0; i < kRankSlots; ++i) {
    const int e = first_expert + lane + 32 * i;
    loaded[i] = e < num_experts ? values[e] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < kRankSlots; ++i) {
    const int e = first_expert + lane + 32 * i;
    raws[i] = 0.0;
    if (e < num_experts) raws[i] = scores.raw(loaded[i], shift);
  }
}

// Keys and chosen bits as columns: 32 tokens per CTA, kRankExperts experts at a time through shared
// memory, so that the writes of keys are whole lines. Ids outside 0..E-1 are skipped.
template <class Scores>
__global__ void __launch_bounds__(kRankThreads, 2)
    rank_kernel(Scores scores, const std::int32_t* topk_ids, std::int64_t top_k,
                RoundingBuffers b) {
  __shared__ std::uint32_t tile[kRankExperts][33];  // [expert, token]
  __shared__ std::uint32_t chosen[kRankExperts];
  __shared__ double sums[32];  // of the tokens' raws
  ptx::grid_dependency_wait();
  ptx::grid_launch_dependents();
  const int E = b.num_experts, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const std::int64_t first_token = std::int64_t{blockIdx.x} * 32;
  const std::int64_t num_slots = min(b.num_tokens - first_token, std::int64_t{32}) * top_k;
  for (int first = 0; first < E; first += kRankExperts) {
    const int experts = min(E - first, kRankExperts);
    for (int i = threadIdx.x; i < experts; i += kRankThreads) chosen[i] = 0;
    __syncthreads();
    for (std::int64_t i = threadIdx.x; i < num_slots; i += kRankThreads) {
      const std::int64_t e = std::int64_t{topk_ids[first_token * top_k + i]} - first;
      if (e >= 0 && e < experts) atomicOr(chosen + e, 1u << (i / top_k));
    }
    for (int token = warp; token < 32; token += kRankWarps) {
      const std::int64_t t = first_token + token;
      if (t >= b.num_tokens) {
        for (int i = lane; i < experts; i += 32) tile[i][token] = 0;
        continue;
      }
      double raws[kRankSlots];
      load_raws(scores, t, first, E, lane, raws);
      if (Scores::kSums && first == 0) {
        double sum = 0.0;
        for (const double raw : raws) sum += raw;
        for (int next = kRankExperts; next < E; next += kRankExperts) {
          double others[kRankSlots];
          load_raws(scores, t, next, E, lane, others);
          for (const double raw : others) sum += raw;
        }
        sums[token] = warp_sum(sum);  // the warp's own
      }
      const double sum = Scores::kSums ? sums[token] : 0.0;
#pragma unroll
      for (int i = 0; i < kRankSlots; ++i) {
        const int e = lane + 32 * i;
        if (e < experts) tile[e][token] = ordered_key(scores.score(raws[i], sum, first + e));
      }
    }
    __syncthreads();
    for (int i = warp; i < experts; i += kRankWarps) {
      b.keys[std::int64_t{first + i} * b.words * 32 + first_token + lane] = tile[i][lane];
    }
    for (int i = threadIdx.x; i < experts; i += kRankThreads) {
      b.chosen[std::int64_t{first + i} * b.words + blockIdx.x] = chosen[i];
    }
    __syncthreads();
  }
}

template <class Scores>
void launch_rank(cudaStream_t stream, const Scores& scores, ConstTensorView topk_ids,
                 const RoundingBuffers& b, const char* operation) {
  check_cuda(launch_dependent(rank_kernel<Scores>, static_cast<unsigned>(b.words), kRankThreads, 0,
                              stream, scores, topk_ids.as<std::int32_t>(), topk_ids.size(1), b),
             operation);
}

template <class Args>
RoundingOutputs outputs_of(const Args& args) {
  return {args.token_ids.template as<std::int32_t>(), args.expert_ids.template as<std::int32_t>(),
          args.token_ids.numel(), args.rows_per_expert.template as<std::int32_t>(),
          args.rows_per_expert_before.template as<std::int32_t>()};
}

}  // namespace

std::size_t round_tokens_workspace_bytes(const Context&, std::int64_t num_tokens,
                                         std::int64_t num_experts, std::int64_t) {
  RoundingBuffers b;
  return carve(nullptr, num_tokens, num_experts, b);
}

// T >= M >= 1 here and in round_select, so no grid is empty.
void round_tokens_forward(const Context& context, const RoundTokensForwardArgs& args) {
  const char* operation = "round_tokens_forward";
  const cudaStream_t stream = stream_of(context);
  RoundingBuffers b;
  carve(args.workspace.data(), args.logits.size(0), args.logits.size(1), b);
  RouteParams r{};
  r.scoring = scoring_params(args.options, args.logits.size(1));
  r.logits = args.logits.as<float>();
  r.topk_ids = args.topk_ids.data();
  r.normalizers = b.normalizers;
  r.num_tokens = b.num_tokens;
  launch_route(stream, r, operation);
  visit_score(r.scoring.score, [&]<class Score>(Score) {
    const RouterScores<Score> scores{r.logits, b.normalizers, r.scoring.selection_bias};
    launch_rank(stream, scores, args.topk_ids, b, operation);
  });
  launch_selection(stream, args.rounding, b, {r.scoring, r.logits, args.pair_weights.as<float>()},
                   outputs_of(args), operation);
}

void round_select(const Context& context, const RoundSelectArgs& args) {
  const char* operation = "round_select";
  const cudaStream_t stream = stream_of(context);
  RoundingBuffers b;
  carve(args.workspace.data(), args.scores.size(0), args.scores.size(1), b);
  launch_rank(stream, GivenScores{args.scores.as<float>()}, args.topk_ids, b, operation);
  launch_selection(stream, args.rounding, b, {}, outputs_of(args), operation);
}

}  // namespace sonicmoe::cuda::router
