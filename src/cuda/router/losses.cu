// Balancing losses and their gradients, the bias update, and the sum of logit gradients.
//
// A loss is one number and its interface has no scratch, so its forward is one cluster of 8 CTAs:
// every CTA sums its tokens, and the first adds the 8 sums in rank order through distributed shared
// memory. Cost: T * E float64 exponentials on 8 of the GPU's SMs, in the order of 0.2 ms at
// T = 32768, E = 256. The gradients use the whole GPU. One warp per token; everything in float64.
#include <cooperative_groups.h>

#include "cuda/router/launch.hpp"
#include "cuda/router/router.hpp"
#include "cuda/router/scoring.cuh"

namespace sonicmoe::cuda::router {
namespace {

namespace cg = cooperative_groups;

constexpr int kClusterSize = 8;
constexpr int kLossThreads = 512;
constexpr int kLossWarps = kLossThreads / 32;
constexpr int kGradientWarps = 8;

struct LossParams {
  const float* logits;       // [T, E]
  const std::int32_t* rows;  // [E]; balancing only
  std::int64_t num_tokens;
  int num_experts;
  ScoreFunction score;
};

__device__ float largest_logit(const float* logits, int num_experts, int lane) {
  float largest = -INFINITY;
  for (int e = lane; e < num_experts; e += 32) largest = fmaxf(largest, logits[e]);
  return warp_max(largest);
}

// One token's shares p(e) = raw(e) / sum of raw.
struct TokenShares {
  double largest, sum;
  double mean;  // sum_e rows[e] p(e)
  ScoreFunction score;

  __device__ TokenShares(const LossParams& p, const float* logits, int lane) {
    const float largest_of_token = largest_logit(logits, p.num_experts, lane);
    largest = largest_of_token;
    score = share_score(p.score, largest_of_token);
    double my_sum = 0.0, my_dot = 0.0;
    for (int e = lane; e < p.num_experts; e += 32) {
      const double raw = raw_score(score, logits[e], largest);
      my_sum += raw;
      my_dot += raw * p.rows[e];
    }
    sum = warp_sum(my_sum);
    mean = warp_sum(my_dot) / sum;
  }
  /// d p(j) / d logit(e) = slope(e) * ([j = e] - p(j)).
  __device__ double slope(float logit) const { return shifted_slope(score, logit, largest) / sum; }
};

__device__ double log_sum_exp(const LossParams& p, const float* logits, int lane) {
  const double largest = largest_logit(logits, p.num_experts, lane);
  double sum = 0.0;
  for (int e = lane; e < p.num_experts; e += 32) sum += exp(double{logits[e]} - largest);
  return largest + log(warp_sum(sum));
}

// sum_e rows[e] p(t,e).
struct BalancingTerm {
  __device__ static double of(const LossParams& p, const float* logits, int lane) {
    return TokenShares(p, logits, lane).mean;
  }
};

// logsumexp(logits_t)^2.
struct ZTerm {
  __device__ static double of(const LossParams& p, const float* logits, int lane) {
    const double value = log_sum_exp(p, logits, lane);
    return value * value;
  }
};

// loss = scale * sum over the tokens of Term.
template <class Term>
__global__ void __cluster_dims__(kClusterSize, 1, 1) __launch_bounds__(kLossThreads)
    loss_kernel(LossParams p, double scale, float* loss) {
  __shared__ double warp_sums[kLossWarps];
  __shared__ double cta_sum;
  const cg::cluster_group cluster = cg::this_cluster();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  double sum = 0.0;  // the same in all lanes
  for (std::int64_t t = std::int64_t{blockIdx.x} * kLossWarps + warp; t < p.num_tokens;
       t += kClusterSize * kLossWarps) {
    sum += Term::of(p, p.logits + t * p.num_experts, lane);
  }
  if (lane == 0) warp_sums[warp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0.0;
    for (const double part : warp_sums) total += part;
    cta_sum = total;
  }
  cluster.sync();
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    double total = 0.0;
    for (int rank = 0; rank < kClusterSize; ++rank) {
      total += *cluster.map_shared_rank(&cta_sum, rank);
    }
    *loss = static_cast<float>(scale * total);
  }
  cluster.sync();  // no CTA exits while its sum may be read
}

template <class Term>
void launch_loss(cudaStream_t stream, const LossParams& p, double scale, TensorView loss,
                 const char* operation) {
  if (p.num_tokens == 0) {
    check_cuda(cudaMemsetAsync(loss.data(), 0, sizeof(float), stream), operation);
    return;
  }
  loss_kernel<Term><<<kClusterSize, kLossThreads, 0, stream>>>(p, scale, loss.as<float>());
  check_launch(operation);
}

// ------------------------------------------------------------------------------------- gradients

// d/d logit(e) of sum_j rows[j] p(j) = slope(e) * (rows[e] - sum_j rows[j] p(j)).
struct BalancingGradient {
  __device__ static void write(const LossParams& p, const float* logits, double scale, float* out,
                               int lane) {
    const TokenShares shares(p, logits, lane);
    for (int e = lane; e < p.num_experts; e += 32) {
      out[e] = static_cast<float>(scale * shares.slope(logits[e]) * (p.rows[e] - shares.mean));
    }
  }
};

// d/d logit(e) of logsumexp^2 / 2 = logsumexp * softmax(e).
struct ZGradient {
  __device__ static void write(const LossParams& p, const float* logits, double scale, float* out,
                               int lane) {
    const double value = log_sum_exp(p, logits, lane);
    for (int e = lane; e < p.num_experts; e += 32) {
      out[e] = static_cast<float>(scale * value * exp(double{logits[e]} - value));
    }
  }
};

// grad_logits = grad_loss[0] * scale * Gradient. One warp per token.
template <class Gradient>
__global__ void __launch_bounds__(32 * kGradientWarps, 2)
    loss_gradient_kernel(LossParams p, double scale, const float* grad_loss, float* grad_logits) {
  const double factor = *grad_loss * scale;
  for (std::int64_t t = std::int64_t{blockIdx.x} * kGradientWarps + threadIdx.x / 32;
       t < p.num_tokens; t += std::int64_t{gridDim.x} * kGradientWarps) {
    Gradient::write(p, p.logits + t * p.num_experts, factor, grad_logits + t * p.num_experts,
                    threadIdx.x % 32);
  }
}

template <class Gradient>
void launch_gradient(cudaStream_t stream, const LossParams& p, double scale,
                     ConstTensorView grad_loss, TensorView grad_logits, const char* operation) {
  if (p.num_tokens == 0) return;
  loss_gradient_kernel<Gradient>
      <<<grid_stride_blocks(p.num_tokens, kGradientWarps), 32 * kGradientWarps, 0, stream>>>(
          p, scale, grad_loss.as<float>(), grad_logits.as<float>());
  check_launch(operation);
}

LossParams loss_params(ConstTensorView logits, ConstTensorView rows, ScoreFunction score) {
  return {logits.as<float>(), rows.as<std::int32_t>(), logits.size(0),
          static_cast<int>(logits.size(1)), score};
}

double balancing_scale(ConstTensorView logits, std::int64_t top_k) {
  return sonicmoe::balancing_scale(logits.size(0), logits.size(1), top_k);
}

// ------------------------------------------------------------------------------------ elementwise

// bias[e] += rate * sign(mean(rows) - rows[e]), without the division. One CTA.
__global__ void __launch_bounds__(1024)
    update_expert_bias_kernel(float* bias, const std::int32_t* rows, std::int64_t num_experts,
                              float rate) {
  __shared__ unsigned long long total;  // modulo 2^64, as two's complement
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  std::int64_t mine = 0;
  for (std::int64_t e = threadIdx.x; e < num_experts; e += blockDim.x) mine += rows[e];
  atomicAdd(&total, static_cast<unsigned long long>(mine));
  __syncthreads();
  for (std::int64_t e = threadIdx.x; e < num_experts; e += blockDim.x) {
    const std::int64_t difference = static_cast<std::int64_t>(total) - num_experts * rows[e];
    if (difference != 0) bias[e] += difference > 0 ? rate : -rate;
  }
}

__global__ void add_kernel(float* sum, const float* addend, std::int64_t count) {
  for (std::int64_t i = std::int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count;
       i += std::int64_t{gridDim.x} * blockDim.x) {
    sum[i] += addend[i];
  }
}

}  // namespace

void load_balancing_loss_forward(const Context& context, Scoring scoring, std::int64_t top_k,
                                 ConstTensorView logits, ConstTensorView rows_per_expert,
                                 TensorView loss) {
  launch_loss<BalancingTerm>(stream_of(context),
                             loss_params(logits, rows_per_expert, score_function(scoring)),
                             balancing_scale(logits, top_k), loss, "load_balancing_loss_forward");
}

void load_balancing_loss_backward(const Context& context, Scoring scoring, std::int64_t top_k,
                                  ConstTensorView logits, ConstTensorView rows_per_expert,
                                  ConstTensorView grad_loss, TensorView grad_logits) {
  launch_gradient<BalancingGradient>(
      stream_of(context), loss_params(logits, rows_per_expert, score_function(scoring)),
      balancing_scale(logits, top_k), grad_loss, grad_logits, "load_balancing_loss_backward");
}

void router_z_loss_forward(const Context& context, ConstTensorView logits, TensorView loss) {
  launch_loss<ZTerm>(stream_of(context), loss_params(logits, {}, {}),
                     1.0 / static_cast<double>(logits.size(0)), loss, "router_z_loss_forward");
}

void router_z_loss_backward(const Context& context, ConstTensorView logits,
                            ConstTensorView grad_loss, TensorView grad_logits) {
  launch_gradient<ZGradient>(stream_of(context), loss_params(logits, {}, {}),
                             2.0 / static_cast<double>(logits.size(0)), grad_loss, grad_logits,
                             "router_z_loss_backward");
}

void update_expert_bias(const Context& context, TensorView bias, ConstTensorView rows_per_expert,
                        float rate) {
  update_expert_bias_kernel<<<1, 1024, 0, stream_of(context)>>>(
      bias.as<float>(), rows_per_expert.as<std::int32_t>(), bias.numel(), rate);
  check_launch("update_expert_bias");
}

void add_logits_gradient(const Context& context, TensorView grad_logits, ConstTensorView addend) {
  const std::int64_t count = grad_logits.numel();
  if (count == 0) return;
  add_kernel<<<grid_stride_blocks(count, 1024), 256, 0, stream_of(context)>>>(
      grad_logits.as<float>(), addend.as<float>(), count);
  check_launch("add_logits_gradient");
}

}  // namespace sonicmoe::cuda::router
