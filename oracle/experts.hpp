// The experts of sections 2 and 3 of the algorithm page: plain loops over its formulas, nothing
// blocked, fused or reordered. They allocate freely and are slow; being obviously right is their
// only aim.
#pragma once

#include <cstdint>
#include <vector>

#include "oracle/values.hpp"
#include "sonicmoe/moe.hpp"

namespace sonicmoe::oracle {

/// Which intermediate tensors are rounded to the storage dtype on their way.
enum class Storage {
  kExact,   ///< none: the mathematical function of the inputs
  kHidden,  ///< H only, so that backward, which starts from the stored H, sees what forward used
  kAll,     ///< H, A, Y, dA', dH, A' and dX~: what a device that stores them all would see
};

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
Values routing_weights(const Routing& routing, std::int64_t num_pairs);

/// What a layer computes from; every tensor lies in host memory.
struct Problem {
  ExpertOptions options;
  ConstTensorView x;  ///< [T, d]
  ExpertWeights weights;
  Routing routing;
};

/// Those of sorted_rows() that options.max_rows has room for.
std::vector<Row> rows_of(const Problem& problem);

struct ForwardResult {
  std::vector<Row> rows;  ///< [R]
  Values h;               ///< [R, g*n]
  Values a;               ///< [R, n]
  Values out;             ///< [T, d]
};
ForwardResult forward(const Problem& problem, Storage storage = Storage::kExact);

/// What backward has of every row before any gradient but dS.
struct HiddenGradients {
  Values grad_h;                ///< dH [R, g*n]
  Values scaled_a;              ///< A' [R, n]
  Values grad_routing_weights;  ///< dS [P], zero for dropped pairs
};
/// Starts from `rows` [R] and `h` [R, g*n], either of forward() or as a backend stored them
/// (gradients jump where H crosses a kink, so H itself is compared apart). b1 is not read.
HiddenGradients backward_hidden(const Problem& problem, const std::vector<Row>& rows,
                                const Values& h, const ConstTensorView& grad_out,
                                Storage storage = Storage::kExact);

/// All gradients, row-major, in the shapes of MoEBackwardArgs.
struct BackwardResult {
  Values grad_x;                ///< [T, d]
  Values grad_w1;               ///< [E, g*n, d]
  Values grad_b1;               ///< [E, g*n]
  Values grad_w2;               ///< [E, d, n]
  Values grad_b2;               ///< [E, d]
  Values grad_routing_weights;  ///< [P], zero for dropped pairs
};
/// From dH: grad_x, grad_w1 and grad_b1; the others stay empty.
BackwardResult backward_up(const Problem& problem, const std::vector<Row>& rows,
                           const Values& grad_h, Storage storage = Storage::kExact);
/// From A' and dO: grad_w2 and grad_b2; the others stay empty.
BackwardResult backward_down(const Problem& problem, const std::vector<Row>& rows,
                             const Values& scaled_a, const ConstTensorView& grad_out);
/// All three.
BackwardResult backward(const Problem& problem, const std::vector<Row>& rows, const Values& h,
                        const ConstTensorView& grad_out, Storage storage = Storage::kExact);

}  // namespace sonicmoe::oracle
