// The activations of section 2 of the algorithm page, with their derivatives.
#pragma once

#include "sonicmoe/moe.hpp"

namespace sonicmoe::oracle {

/// act(gate, up) and its partial derivatives. `up` is ignored, and d_up 0, when ungated.
struct ActivationValue {
  double value = 0;
  double d_gate = 0;
  double d_up = 0;
};
ActivationValue activate(const ExpertOptions& options, double gate, double up);

}  // namespace sonicmoe::oracle
