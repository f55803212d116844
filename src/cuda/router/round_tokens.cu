// Token rounding: token choice, ranking scores as columns, selection.
#include "core/workspace.hpp"
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
  b.row_sums = carver.take<double>(tokens);
  b.keys = carver.take<std::uint32_t>(experts * words * 32);
  b.chosen = carver.take<std::uint32_t>(experts * words);
  b.starts = carver.take<std::int64_t>(experts + 1);
  b.rows_before = carver.take<std::int32_t>(experts);
  b.rows_after = carver.take<std::int32_t>(experts);
  b.up_changes_less = carver.take<std::uint8_t>(experts);
  return carver.used();
}

// Ranking scores as they are given to round_select.
struct GivenScores {
  const float* scores;  // [T, E]
  int num_experts;

  __device__ float operator()(std::int64_t t, int e) const { return scores[t * num_experts + e]; }
};

// Softmax over E, or sigmoid + bias, rounded to float32 once.
struct RankingScores {
  ScoringParams scoring;
  const float* logits;                 // [T, E]
  const TokenNormalizer* normalizers;  // [T]
  const double* row_sums;              // [T]

  __device__ float operator()(std::int64_t t, int e) const {
    const float logit = logits[t * scoring.num_experts + e];
    if (scoring.is_softmax) {
      return static_cast<float>(exp(double{logit} - normalizers[t].shift) / row_sums[t]);
    }
    return static_cast<float>(sigmoid(logit)) +
           (scoring.selection_bias == nullptr ? 0.0f : scoring.selection_bias[e]);
  }
};

// Keys as columns, 32 tokens times 32 experts per CTA through shared memory, so that both the reads
// and the writes are whole lines. x: tokens, the grid dimension without a small limit.
template <class Scores>
__global__ void __launch_bounds__(256) rank_kernel(Scores scores, RoundingBuffers b) {
  __shared__ std::uint32_t tile[32][33];
  const std::int64_t first_token = std::int64_t{blockIdx.x} * 32;
  const int lane = threadIdx.x % 32;
  for (int first_expert = static_cast<int>(blockIdx.y) * 32; first_expert < b.num_experts;
       first_expert += static_cast<int>(gridDim.y) * 32) {
    for (int i = threadIdx.x / 32; i < 32; i += 8) {
      const std::int64_t t = first_token + i;
      const int e = first_expert + lane;
      tile[i][lane] = t < b.num_tokens && e < b.num_experts ? ordered_key(scores(t, e)) : 0;
    }
    __syncthreads();
    for (int i = threadIdx.x / 32; i < 32; i += 8) {
      const std::int64_t e = first_expert + i;
      if (e < b.num_experts) b.keys[e * b.words * 32 + first_token + lane] = tile[lane][i];
    }
    __syncthreads();
  }
}

// Bits or-ed in any order give the same words. Ids outside 0..E-1 are skipped.
__global__ void mark_chosen_kernel(const std::int32_t* topk_ids, std::int64_t top_k,
                                   RoundingBuffers b) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
       i < b.num_tokens * top_k; i += std::int64_t{gridDim.x} * blockDim.x) {
    const std::int64_t e = topk_ids[i];
    if (e < 0 || e >= b.num_experts) continue;
    const std::int64_t t = i / top_k;
    atomicOr(b.chosen + e * b.words + t / 32, 1u << (t % 32));
  }
}

template <class Scores>
void fill_columns(cudaStream_t stream, const Scores& scores, const std::int32_t* topk_ids,
                  std::int64_t top_k, const RoundingBuffers& b, const char* operation) {
  const auto experts =
      static_cast<unsigned>(std::min<std::int64_t>(ceil_div(b.num_experts, 32), 65535));
  rank_kernel<<<dim3(static_cast<unsigned>(b.words), experts), 256, 0, stream>>>(scores, b);
  check_launch(operation);
  check_cuda(cudaMemsetAsync(b.chosen, 0,
                             sizeof(std::uint32_t) * static_cast<std::size_t>(b.num_experts) *
                                 static_cast<std::size_t>(b.words),
                             stream),
             operation);
  mark_chosen_kernel<<<grid_stride_blocks(b.num_tokens * top_k, 256), 256, 0, stream>>>(topk_ids,
                                                                                        top_k, b);
  check_launch(operation);
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
  r.row_sums = b.row_sums;
  r.num_tokens = b.num_tokens;
  launch_route(stream, r, operation);
  fill_columns(stream, RankingScores{r.scoring, r.logits, b.normalizers, b.row_sums},
               args.topk_ids.as<std::int32_t>(), args.options.top_k, b, operation);
  launch_selection(stream, args.rounding, b, {r.scoring, r.logits, args.pair_weights.as<float>()},
                   outputs_of(args), operation);
}

void round_select(const Context& context, const RoundSelectArgs& args) {
  const char* operation = "round_select";
  const cudaStream_t stream = stream_of(context);
  RoundingBuffers b;
  carve(args.workspace.data(), args.scores.size(0), args.scores.size(1), b);
  fill_columns(stream, GivenScores{args.scores.as<float>(), b.num_experts},
               args.topk_ids.as<std::int32_t>(), args.topk_ids.size(1), b, operation);
  launch_selection(stream, args.rounding, b, {}, outputs_of(args), operation);
}

}  // namespace sonicmoe::cuda::router
