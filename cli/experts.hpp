// One expert layer with all its buffers: what `check` and `bench` run.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "cli/random.hpp"
#include "cli/tensor.hpp"
#include "sonicmoe/moe.hpp"

namespace sonicmoe::cli {

struct ExpertsConfig {
  std::int64_t num_tokens = 0;  ///< T; rows of x for sorted routing
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int64_t num_experts = 1;
  std::int64_t top_k = 1;      ///< form top-K only
  std::int64_t num_pairs = 0;  ///< form pairs only
  MoEShape::Form form = MoEShape::Form::kTopK;
  ExpertOptions options;
  DType dtype = DType::kFloat32;
  DType index_dtype = DType::kInt32;
  DType weight_dtype = DType::kFloat32;  ///< of the routing weights
  bool biases = false;
  bool transposed = false;       ///< w1 and w2 stored as [E, d, g*n] and [E, n, d]
  double dropped_share = 0.0;    ///< of slots or pairs
  bool without_weights = false;  ///< form sorted: no row weights
  bool float32_gradients = false;
  bool accumulate = false;  ///< onto random float32 gradients

  std::string to_string() const;
  /// Changed as little as the device's backend needs: CUDA takes bfloat16 and multiples of 8.
  void fit(Device device);
};

/// Inputs of a layer. Values have the magnitudes of a trained layer: H, A, Y and O of order 1.
struct ExpertsInputs {
  ExpertsConfig config;
  Tensor x, w1, b1, w2, b2;
  Tensor topk_ids, topk_weights;                          // form top-K
  Tensor offsets;                                         // form sorted
  Tensor token_ids, expert_ids;                           // form pairs
  Tensor pair_weights;                                    // forms sorted and pairs
  Tensor grad_out;                                        // dO
  Tensor initial_w1, initial_b1, initial_w2, initial_b2;  // what gradients are added to

  ExpertsInputs(const ExpertsConfig& configuration, Random& random, Device device = {});
  /// The same inputs on a device; tensors that are there already are shared.
  ExpertsInputs to(Device device) const;
  /// The same values in float32 on the host, for the reference.
  ExpertsInputs to_float32() const;

  ExpertWeights weights() const;
  Routing routing() const;
  MoEShape shape() const;
  /// Rows that are really computed.
  std::int64_t num_rows() const;

 private:
  void make_routing(Random& random);
};

/// Outputs, what is kept, gradients and workspaces of one run over `inputs` (which must outlive
/// it), on the device of the context and of the inputs.
class ExpertsRun {
 public:
  /// Errors: those of the workspace queries (a backend that does not exist, for one).
  ExpertsRun(const Context& context, const ExpertsInputs& inputs,
             std::optional<std::size_t> workspace_limit = {});

  void forward(const Context& context);
  /// Needs forward, or `h` and `metadata` written by someone else.
  void backward(const Context& context);
  /// Gradients back to what they are added to (accumulate) or to NaN.
  void reset_gradients();

  const WorkspacePlan& forward_plan() const noexcept { return forward_plan_; }
  const WorkspacePlan& backward_plan() const noexcept { return backward_plan_; }

  Tensor out, h, metadata;
  Tensor grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_routing_weights;
  Tensor forward_workspace, backward_workspace;

 private:
  const ExpertsInputs* inputs_;
  std::optional<std::size_t> limit_;
  WorkspacePlan forward_plan_;
  WorkspacePlan backward_plan_;
};

/// [T, K] distinct random experts per token; slots become -1, E or beyond with `dropped_share`.
Tensor random_topk_ids(Random& random, std::int64_t num_tokens, std::int64_t num_experts,
                       std::int64_t top_k, DType dtype, double dropped_share);

}  // namespace sonicmoe::cli
