// Runs a case on a backend, with poisoned outputs and exactly sized, guarded buffers.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "rig/moe_case.hpp"

namespace sonicmoe::rig {

/// Gradients that moe_backward can leave out, as bits of RunOptions::gradients.
enum Gradient : unsigned {
  kGradX = 1,
  kGradW1 = 2,
  kGradB1 = 4,
  kGradW2 = 8,
  kGradB2 = 16,
  kGradRoutingWeights = 32,
  kAllGradients = 63,
};

struct RunOptions {
  int num_threads = 0;
  bool inference = false;  ///< forward alone, without h and metadata
  std::optional<std::size_t> forward_limit, backward_limit;
  unsigned gradients = kAllGradients;
  /// Of the gradients of weights and biases; unset: the dtype of the weights.
  std::optional<DType> gradient_dtype;
  bool accumulate = false;
  double accumulate_onto = 0.0;  ///< what the buffers hold before
  bool in_steps = false;         ///< backward by four calls
};

struct RunResult {
  WorkspacePlan forward_plan, backward_plan;
  // Row-major elements of what was asked for; h holds the R rows that exist. Rows of out and grad_x
  // that may hold anything are zeros.
  Values out, h;
  std::vector<std::byte> metadata;
  std::int64_t rows_dropped = 0;
  Values grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_routing_weights;
  /// Guards, gaps, inputs or rows of h past R that were written: "NAME: what happened".
  std::vector<std::string> violations;
};

/// The outputs, gradients and scratch of a case, all poison, and its calls, which may be repeated.
/// `inputs` lies on `target`; both outlive the run.
class ExpertsRun {
 public:
  ExpertsRun(const Target& target, const MoEInputs& inputs, const RunOptions& options = {});

  void forward();
  void backward();
  /// "NAME: what happened" for what a call wrote where it must not.
  std::vector<std::string> violations() const;

  Tensor grad_h, scaled_a;  // in steps
  GuardedBuffer row_lists;
  Tensor rows_dropped;
  Tensor out, h, grad_x, grad_w1, grad_b1, grad_w2, grad_b2, grad_routing_weights;
  GuardedBuffer metadata, forward_workspace, backward_workspace;
  WorkspacePlan forward_plan, backward_plan;

 private:
  Tensor gradient(unsigned bit, const Tensor& like, Strides strides) const;
  MoEBackwardArgs backward_args() const;
  void backward_in_steps();

  const Target& target_;
  const MoEInputs& inputs_;
  RunOptions options_;
  std::vector<std::string> step_violations_;
};

/// moe_forward and, unless options.inference, moe_backward, of fitted(target, test_case).
RunResult run_moe(const Target& target, const MoECase& test_case, const RunOptions& options = {});

/// The tensors of two results that differ in any bit, as a readable list; empty when none do.
std::string bitwise_difference(const RunResult& a, const RunResult& b);

/// Index of the first element that differs in a bit, as text; empty when none does.
std::string bitwise_difference(const Values& a, const Values& b);

}  // namespace sonicmoe::rig
