// The gradient of one token's weights, for top-K routing and for token rounding.
//   softmax over E:      dl_i = scale p_i (g_i - sum_e g_e p_e)
//   renormalised:        dl_i = scale r_i (g_i - [i in top-K] sum_e g_e r_e), r = exp(l) / Z
//   sigmoid:             dl_i = scale s'(l_i) / Z (g_i - [i in top-K] sum_e g_e s_e / Z)
// with g = dL/d weight(t,e), 0 where no row uses it. One warp per token. Renormalised weights have
// nothing outside of the top-K and the token's rows: a lane per slot and per row. Otherwise
// grad_logits is read as g and overwritten, in three passes over the token's E values, the second
// and third from L1.
#include "cuda/router/gradient_terms.cuh"
#include "cuda/router/launch.hpp"
#include "cuda/router/route.hpp"
#include "cuda/router/router.hpp"

namespace sonicmoe::cuda::router {
namespace {

constexpr int kMaxWarps = 8;

struct BackwardParams {
  ScoringParams scoring;
  const float* logits;        // [T, E]
  const void* topk_ids;       // [T, K]
  const float* grad_weights;  // [T, K] or null
  float* grad_logits;         // [T, E]
  std::int64_t num_tokens;
};

// The quotients of the formulas above: raw(e) / denominator is p, r or s / Z.
struct Terms {
  double shift;
  double denominator;
  double dot;
};

template <class Id>
__device__ double largest_logit(const ScoringParams& p, const float* logits, const Id* ids,
                                int lane) {
  float largest = -INFINITY;
  if (p.renormalizes) {
    for (int k = lane; k < p.top_k; k += 32) {
      if (ids[k] >= 0 && ids[k] < p.num_experts) largest = fmaxf(largest, logits[ids[k]]);
    }
  } else {
    for (int e = lane; e < p.num_experts; e += 32) largest = fmaxf(largest, logits[e]);
  }
  return warp_max(largest);
}

template <class Id>
__device__ Terms terms_of(const ScoringParams& p, const float* logits, const float* gradient,
                          const Id* ids, int lane) {
  Terms terms{0.0, 1.0, 0.0};
  if (is_relative(p.score)) terms.shift = largest_logit(p, logits, ids, lane);
  double sum = 0.0, dot = 0.0;
  if (p.renormalizes) {
    for (int k = lane; k < p.top_k; k += 32) {
      if (ids[k] >= 0 && ids[k] < p.num_experts) sum += raw_score(p, logits[ids[k]], terms.shift);
    }
    for (int e = lane; e < p.num_experts; e += 32) {
      if (gradient[e] != 0.0f) dot += gradient[e] * raw_score(p, logits[e], terms.shift);
    }
  } else if (is_relative(p.score)) {
    for (int e = lane; e < p.num_experts; e += 32) {
      const double raw = raw_score(p, logits[e], terms.shift);
      sum += raw;
      dot += gradient[e] * raw;
    }
  } else {
    return terms;
  }
  terms.denominator = warp_sum(sum) + score_epsilon(p.score);
  terms.dot = warp_sum(dot) / terms.denominator;
  return terms;
}

// `chosen` [ceil(E/32)]: the token's top-K as bits, in shared memory.
template <class Id>
__device__ void backward_token(const BackwardParams& b, std::int64_t t, int lane,
                               unsigned* chosen) {
  const ScoringParams& p = b.scoring;
  const float* logits = b.logits + t * p.num_experts;
  float* gradient = b.grad_logits + t * p.num_experts;
  const Id* ids = static_cast<const Id*>(b.topk_ids) + t * p.top_k;
  for (int w = lane; w < (p.num_experts + 31) / 32; w += 32) chosen[w] = 0;
  if (b.grad_weights != nullptr) {
    for (int e = lane; e < p.num_experts; e += 32) gradient[e] = 0.0f;
  }
  __syncwarp();
  for (int k = lane; k < p.top_k; k += 32) {
    const Id e = ids[k];
    if (e < 0 || e >= p.num_experts) continue;
    atomicOr(chosen + e / 32, 1u << (e % 32));
    if (b.grad_weights != nullptr) gradient[e] = b.grad_weights[t * p.top_k + k];
  }
  __syncwarp();

  const Terms terms = terms_of(p, logits, gradient, ids, lane);
  const bool all_in_denominator = !p.renormalizes && is_relative(p.score);
  for (int e = lane; e < p.num_experts; e += 32) {
    const bool counts =
        all_in_denominator || (p.renormalizes && ((chosen[e / 32] >> (e % 32)) & 1u) != 0);
    const double difference = gradient[e] - (counts ? terms.dot : 0.0);
    double slope = 0.0;
    if (difference != 0.0) {  // saves the exponential, and 0 * inf far from the top-K
      slope = shifted_slope(p.score, logits[e], terms.shift);
    }
    gradient[e] = static_cast<float>(p.scale * (slope / terms.denominator) * difference);
  }
  __syncwarp();  // the next token clears `chosen`
}

// Renormalised weights with K <= 32: a token's slot, and its normalizer.
struct Slot {
  int expert;  // -1: none
  float logit;
  double raw;  // 0 where there is none
  double shift, denominator;
};

// The slot number `lane`.
template <class Id>
__device__ Slot slot_of(const BackwardParams& b, std::int64_t t, int lane) {
  const ScoringParams& p = b.scoring;
  const Id* ids = static_cast<const Id*>(b.topk_ids) + t * p.top_k;
  const Id e = lane < p.top_k ? ids[lane] : Id{-1};
  const bool legal = e >= 0 && e < p.num_experts;
  const float logit = legal ? b.logits[t * p.num_experts + e] : -INFINITY;
  const double shift = is_relative(p.score) ? warp_max(logit) : 0.0f;
  const double raw = legal ? raw_score(p, logit, shift) : 0.0;
  const double denominator = warp_sum(raw) + score_epsilon(p.score);
  return {legal ? static_cast<int>(e) : -1, logit, raw, shift, denominator};
}

// dl of an expert; `difference` is the parenthesis of the formulas.
__device__ float logit_gradient(const ScoringParams& p, float logit, double raw, double denominator,
                                double difference) {
  const double slope = score_slope(p.score, logit, raw);
  return static_cast<float>(p.scale * (slope / denominator) * difference);
}

// The gradients of top-K weights. Nothing outside of the slots has one.
template <class Id>
struct SlotGradients {
  // Writes those of the slots, in shared or global memory.
  __device__ void fill(const BackwardParams& b, std::int64_t t, int lane, float* row) const {
    const int top_k = b.scoring.top_k;
    const float loaded = lane < top_k ? b.grad_weights[t * top_k + lane] : 0.0f;
    const Slot slot = slot_of<Id>(b, t, lane);
    const double g = slot.expert >= 0 ? loaded : 0.0f;
    const double dot = warp_sum(g * slot.raw) / slot.denominator;
    if (slot.expert < 0) return;
    row[slot.expert] = logit_gradient(b.scoring, slot.logit, slot.raw, slot.denominator, g - dot);
  }
};

// The gradients of the weights that token rounding kept, found by token through the row lists. The
// pair list is sorted by expert, so a row is a place in it.
struct PairGradients {
  const std::int32_t* token_start;  // [T + 1]
  const std::int32_t* token_rows;   // [P]
  const std::int32_t* row_pair;     // [C]
  const std::int32_t* expert_ids;   // [P]

  // `row` [E] in shared memory, zeros.
  __device__ void fill(const BackwardParams& b, std::int64_t t, int lane, float* row) const {
    const ScoringParams& p = b.scoring;
    const int first = token_start[t], end = token_start[t + 1];
    const Slot slot = slot_of<std::int32_t>(b, t, lane);
    for (int i = first + lane; i < end; i += 32) {
      const std::int32_t place = token_rows[i];
      if (place < 0) continue;  // beyond max_rows
      const std::int32_t pair = row_pair[place];
      row[expert_ids[pair]] = b.grad_weights[pair];
    }
    __syncwarp();
    double g = 0.0;
    if (slot.expert >= 0) {
      g = row[slot.expert];
      row[slot.expert] = 0.0f;
    }
    __syncwarp();
    double dot = g * slot.raw;
    for (int e = lane; e < p.num_experts; e += 32) {
      const double added = row[e];  // of a row that the token did not choose
      if (added == 0.0) continue;
      const float logit = b.logits[t * p.num_experts + e];
      const double raw = raw_score(p, logit, slot.shift);
      dot += added * raw;
      row[e] = logit_gradient(p, logit, raw, slot.denominator, added);
    }
    dot = warp_sum(dot) / slot.denominator;
    __syncwarp();  // the slots' zeros have been read
    if (slot.expert < 0) return;
    row[slot.expert] = logit_gradient(p, slot.logit, slot.raw, slot.denominator, g - dot);
  }
};

template <class Id>
__global__ void __launch_bounds__(32 * kMaxWarps) topk_backward_kernel(BackwardParams b) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (std::int64_t t = std::int64_t{blockIdx.x} * warps + threadIdx.x / 32; t < b.num_tokens;
       t += std::int64_t{gridDim.x} * warps) {
    float* gradient = b.grad_logits + t * b.scoring.num_experts;
    for (int i = lane; i < b.scoring.num_experts; i += 32) gradient[i] = 0.0f;
    __syncwarp();  // the zeros are written
    SlotGradients<Id>{}.fill(b, t, lane, gradient);
  }
}

// dlogits as the terms of both products.
struct TermsParams {
  const float4* addend;    // [T, E] or null: added to dlogits
  FourTerms* grad_logits;  // [T, 2, E]: a token's high terms, then its low ones
  GradientTerms grad_x;    // [T, E] high terms, and the lists
};

// A token's row goes through shared memory: whole vectors of zeros and terms reach memory.
template <class Gradients>
__global__ void __launch_bounds__(32 * kMaxWarps)
    gradient_terms_kernel(BackwardParams b, Gradients gradients, TermsParams out) {
  extern __shared__ __align__(16) float rows[];  // [warps, E], zeros between tokens
  const int E = b.scoring.num_experts, per_row = E / FourTerms::kCount;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  float* row = rows + warp * E;
  auto* vectors = reinterpret_cast<float4*>(row);
  for (int i = lane; i < per_row; i += 32) vectors[i] = {};
  __syncwarp();
  for (std::int64_t t = std::int64_t{blockIdx.x} * warps + warp; t < b.num_tokens;
       t += std::int64_t{gridDim.x} * warps) {
    gradients.fill(b, t, lane, row);
    __syncwarp();
    for (int i = lane; i < per_row; i += 32) {
      float4 v = vectors[i];
      vectors[i] = {};
      if (out.addend != nullptr) {
        const float4 addend = out.addend[t * per_row + i];
        v = {v.x + addend.x, v.y + addend.y, v.z + addend.z, v.w + addend.w};
      }
      const FourTerms high = high_terms(v);
      out.grad_logits[t * 2 * per_row + i] = high;
      out.grad_logits[(t * 2 + 1) * per_row + i] = low_terms(v, high);
      static_cast<FourTerms*>(out.grad_x.values)[t * per_row + i] = high;
    }
    __syncwarp();
  }
  write_lists(out.grad_x, b.num_tokens, std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x,
              std::int64_t{gridDim.x} * blockDim.x);
}

template <class Id>
__global__ void __launch_bounds__(32 * kMaxWarps, 2) weight_backward_kernel(BackwardParams b) {
  extern __shared__ unsigned chosen[];  // [warps, ceil(E/32)]
  const int warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  for (std::int64_t t = std::int64_t{blockIdx.x} * warps + warp; t < b.num_tokens;
       t += std::int64_t{gridDim.x} * warps) {
    backward_token<Id>(b, t, threadIdx.x % 32, chosen + warp * ((b.scoring.num_experts + 31) / 32));
  }
}

bool has_slot_gradients(const ScoringParams& p) { return p.renormalizes && p.top_k <= 32; }

bool aligned(const void* data) {
  return reinterpret_cast<std::uintptr_t>(data) % alignof(float4) == 0;
}

// Enqueues dlogits + addend as terms, or returns false where the kernel does not fit. The products
// take terms: E is a multiple of eight.
template <class Args, class Gradients>
bool launch_terms(cudaStream_t stream, const Args& args, ConstTensorView grad_weights,
                  const Gradients& gradients, ConstTensorView addend, const GradientTerms& grad_x) {
  const std::int64_t num_tokens = args.logits.size(0), num_experts = args.logits.size(1);
  const ScoringParams scoring = scoring_params(args.options, num_experts);
  const std::size_t bytes = sizeof(float) * kMaxWarps * static_cast<std::size_t>(num_experts);
  constexpr std::size_t kSharedBytes = 48 * 1024;  // without asking for more
  if (num_tokens == 0 || bytes > kSharedBytes || !has_slot_gradients(scoring) ||
      !aligned(addend.data())) {
    return false;
  }
  const BackwardParams b{scoring,
                         args.logits.template as<float>(),
                         args.topk_ids.data(),
                         grad_weights.as<float>(),
                         nullptr,
                         num_tokens};
  const TermsParams out{static_cast<const float4*>(addend.data()),
                        static_cast<FourTerms*>(args.grad_logits.data()), grad_x};
  gradient_terms_kernel<<<grid_stride_blocks(num_tokens, kMaxWarps), 32 * kMaxWarps, bytes,
                          stream>>>(b, gradients, out);
  check_launch("router's gradient");
  return true;
}

// dL/d weight(t,e) as a matrix: the list is sorted by expert, the normalisation runs over tokens.
__global__ void scatter_pairs_kernel(const std::int32_t* token_ids, const std::int32_t* expert_ids,
                                     const float* grad_pair_weights, std::int64_t num_pairs,
                                     std::int64_t num_tokens, int num_experts, float* matrix) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < num_pairs;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    const std::int64_t t = token_ids[i];
    const std::int32_t e = expert_ids[i];
    if (t < 0 || t >= num_tokens || e < 0 || e >= num_experts) continue;  // unused place
    matrix[t * num_experts + e] = grad_pair_weights[i];
  }
}

}  // namespace

void launch_weight_backward(cudaStream_t stream, const ScoringParams& scoring, const float* logits,
                            ConstTensorView topk_ids, const float* grad_weights, float* grad_logits,
                            const char* operation) {
  const BackwardParams b{scoring,      logits,      topk_ids.data(),
                         grad_weights, grad_logits, topk_ids.size(0)};
  if (b.num_tokens == 0) return;
  const std::size_t bytes = sizeof(unsigned) * kMaxWarps * ((scoring.num_experts + 31) / 32);
  const unsigned blocks = grid_stride_blocks(b.num_tokens, kMaxWarps);
  const bool wide_ids = topk_ids.dtype() == DType::kInt64;
  if (grad_weights != nullptr && has_slot_gradients(scoring)) {
    const auto kernel =
        wide_ids ? topk_backward_kernel<std::int64_t> : topk_backward_kernel<std::int32_t>;
    kernel<<<blocks, 32 * kMaxWarps, 0, stream>>>(b);
  } else {
    const auto kernel =
        wide_ids ? weight_backward_kernel<std::int64_t> : weight_backward_kernel<std::int32_t>;
    kernel<<<blocks, 32 * kMaxWarps, bytes, stream>>>(b);
  }
  check_launch(operation);
}

void route_backward(const Context& context, const RouteBackwardArgs& args) {
  launch_weight_backward(stream_of(context), scoring_params(args.options, args.logits.size(1)),
                         args.logits.as<float>(), args.topk_ids, args.grad_topk_weights.as<float>(),
                         args.grad_logits.as<float>(), "route_backward");
}

bool split_route_backward(cudaStream_t stream, const RouteBackwardArgs& args,
                          ConstTensorView addend, const GradientTerms& terms) {
  return launch_terms(stream, args, args.grad_topk_weights, SlotGradients<std::int32_t>{}, addend,
                      terms);
}

bool split_round_tokens_backward(cudaStream_t stream, const RoundTokensBackwardArgs& args,
                                 const Metadata& m, ConstTensorView addend,
                                 const GradientTerms& terms) {
  const PairGradients gradients{m.token_start, m.token_rows, m.row_pair,
                                args.expert_ids.as<std::int32_t>()};
  return launch_terms(stream, args, args.grad_pair_weights, gradients, addend, terms);
}

void round_tokens_backward(const Context& context, const RoundTokensBackwardArgs& args) {
  const char* operation = "round_tokens_backward";
  const cudaStream_t stream = stream_of(context);
  const std::int64_t num_tokens = args.logits.size(0);
  const std::int64_t num_experts = args.logits.size(1);
  const std::int64_t num_pairs = args.token_ids.size(0);
  if (num_tokens == 0) return;
  check_cuda(cudaMemsetAsync(args.grad_logits.data(), 0, args.grad_logits.nbytes(), stream),
             operation);
  if (num_pairs > 0) {
    scatter_pairs_kernel<<<grid_stride_blocks(num_pairs, 256), 256, 0, stream>>>(
        args.token_ids.as<std::int32_t>(), args.expert_ids.as<std::int32_t>(),
        args.grad_pair_weights.as<float>(), num_pairs, num_tokens, static_cast<int>(num_experts),
        args.grad_logits.as<float>());
    check_launch(operation);
  }
  launch_weight_backward(stream, scoring_params(args.options, num_experts), args.logits.as<float>(),
                         args.topk_ids, nullptr, args.grad_logits.as<float>(), operation);
}

}  // namespace sonicmoe::cuda::router
