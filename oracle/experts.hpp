// The definition of the expert layer in float64: plain loops over the formulas of moe.hpp, nothing
// blocked, fused or reordered. Tests and `sonicmoe check` compare every backend with it, and the
// reference backend is it. It allocates freely and is slow; being obviously right is its only aim.
#pragma once

#include <cstdint>
#include <vector>

#include "sonicmoe/moe.hpp"

namespace sonicmoe::oracle {

/// Which intermediate tensors are rounded to the storage dtype on their way.
enum class Storage {
  kExact,   ///< none: the mathematical function of the inputs
  kHidden,  ///< H only, so that backward, which starts from the stored H, sees what forward used
  kAll,     ///< H, A, Y, dA', dH, A' and dX~: what a device that stores them all would see
};

/// The elements of a float32, bfloat16, int32, int64 or uint8 view, row-major.
std::vector<double> to_double(const ConstTensorView& view);

/// `value` after a round trip through a float32 or bfloat16 element.
double rounded_to(DType dtype, double value);

/// A routed row that is left after dropped pairs are taken out.
struct Row {
  std::int64_t position = 0;  ///< index of the pair in the input: t*K + slot, row, or list index
  std::int64_t token = 0;     ///< row of x and of the output
  std::int64_t expert = 0;
};

/// The rows of a routing in the order of H: by expert, stably (inside an expert in input order).
std::vector<Row> sorted_rows(const Routing& routing, std::int64_t num_tokens,
                             std::int64_t num_experts);

/// The weight of every input position; ones for sorted rows without weights.
std::vector<double> routing_weights(const Routing& routing, std::int64_t num_pairs);

/// act(gate, up) and its partial derivatives. `up` is ignored, and d_up 0, when ungated.
struct ActivationValue {
  double value = 0;
  double d_gate = 0;
  double d_up = 0;
};
ActivationValue activate(const ExpertOptions& options, double gate, double up);

/// What a layer computes from; every tensor lies in host memory.
struct Problem {
  ExpertOptions options;
  ConstTensorView x;  ///< [T, d]
  ExpertWeights weights;
  Routing routing;
};

struct ForwardResult {
  std::vector<Row> rows;    ///< [R]
  std::vector<double> h;    ///< [R, g*n]
  std::vector<double> a;    ///< [R, n]
  std::vector<double> out;  ///< [T, d]
};
ForwardResult forward(const Problem& problem, Storage storage = Storage::kExact);

/// All gradients, row-major, in the shapes of MoEBackwardArgs.
struct BackwardResult {
  std::vector<double> grad_x;                ///< [T, d]
  std::vector<double> grad_w1;               ///< [E, g*n, d]
  std::vector<double> grad_b1;               ///< [E, g*n]
  std::vector<double> grad_w2;               ///< [E, d, n]
  std::vector<double> grad_b2;               ///< [E, d]
  std::vector<double> grad_routing_weights;  ///< [P], zero for dropped pairs
};
/// Starts from `rows` [R] and `h` [R, g*n], either of forward() or as a backend stored them
/// (gradients jump where H crosses a kink, so H itself is compared apart). b1 is not read.
BackwardResult backward(const Problem& problem, const std::vector<Row>& rows,
                        const std::vector<double>& h, const ConstTensorView& grad_out,
                        Storage storage = Storage::kExact);

/// logits [T, E] = x weight^T + bias (absent: none).
std::vector<double> router_logits(const ConstTensorView& x, const ConstTensorView& weight,
                                  const ConstTensorView& bias);

/// The router's share of dX: grad_logits [T, E] times weight [E, d].
std::vector<double> router_grad_x(const std::vector<double>& grad_logits,
                                  const ConstTensorView& weight);

struct RouterGradients {
  std::vector<double> weight;  ///< [E, d] = grad_logits^T x
  std::vector<double> bias;    ///< [E], sums over the tokens
};
RouterGradients router_gradients(const std::vector<double>& grad_logits, std::int64_t num_experts,
                                 const ConstTensorView& x);

}  // namespace sonicmoe::oracle
