// The activations of section 2 of the algorithm page, with their derivatives.
#pragma once

#include "sonicmoe/moe.hpp"

namespace sonicmoe::oracle {

/// act(gate, up) and its partial derivatives. `up` is ignored, and d_up 0, when ungated.
template <class Real>
struct ActivationOf {
  Real value = 0;
  Real d_gate = 0;
  Real d_up = 0;
};
using ActivationValue = ActivationOf<double>;

ActivationValue activate(const ExpertOptions& options, double gate, double up);
/// The same formulas evaluated in float, as a naive program of that precision would.
ActivationOf<float> activate_in_float(const ExpertOptions& options, float gate, float up);

}  // namespace sonicmoe::oracle
