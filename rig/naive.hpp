// The layer as a straightforward program of the same dtype computes it: float accumulation, element
// by element in index order, every stored tensor rounded to the storage dtype. How far it is from
// the oracle is the yardstick for a backend (error <= 2 x naive).
#pragma once

#include "oracle/experts.hpp"

namespace sonicmoe::rig {

/// h, a and out rounded as stored.
oracle::ForwardResult naive_forward(const oracle::Problem& problem);

/// grad_x rounded to the dtype of x, weight and bias gradients to `gradient_dtype`.
oracle::BackwardResult naive_backward(const oracle::Problem& problem,
                                      const std::vector<oracle::Row>& rows,
                                      const std::vector<double>& h, const ConstTensorView& grad_out,
                                      DType gradient_dtype);

/// For each gradient and the output, the largest sum of |terms| behind one element, with H as
/// given: what half-ulp errors of the inputs of that sum are proportional to. Where results cancel,
/// or there are too few of them for the naive error to mean much, this is the fair scale.
struct Magnitudes {
  double h = 0, out = 0;
  double grad_x = 0, grad_w1 = 0, grad_b1 = 0, grad_w2 = 0, grad_b2 = 0, grad_routing_weights = 0;
};
Magnitudes magnitudes(const oracle::Problem& problem, const std::vector<oracle::Row>& rows,
                      const std::vector<double>& h, const ConstTensorView& grad_out);

}  // namespace sonicmoe::rig
