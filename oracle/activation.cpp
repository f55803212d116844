#include "oracle/activation.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace sonicmoe::oracle {
namespace {

double sigmoid(double v) { return 1.0 / (1.0 + std::exp(-v)); }

// f(g) and f'(g) of the scalar functions, before gating.
struct Scalar {
  double value, slope;
};

Scalar silu(double g) {
  const double s = sigmoid(g);
  return {g * s, s + g * s * (1.0 - s)};
}

Scalar gelu_erf(double g) {
  const double cdf = 0.5 * std::erfc(-g / std::numbers::sqrt2);
  const double density = std::exp(-0.5 * g * g) / std::sqrt(2.0 * std::numbers::pi);
  return {g * cdf, cdf + g * density};
}

Scalar gelu_tanh(double g) {
  const double c = std::sqrt(2.0 / std::numbers::pi);
  const double t = std::tanh(c * (g + 0.044715 * g * g * g));
  const double inner_slope = c * (1.0 + 3.0 * 0.044715 * g * g);
  return {0.5 * g * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * g * (1.0 - t * t) * inner_slope};
}

Scalar relu(double g) { return g > 0.0 ? Scalar{g, 1.0} : Scalar{0.0, 0.0}; }

ActivationValue ungated(Scalar f) { return {f.value, f.slope, 0.0}; }

ActivationValue gate_with(Scalar f, double up) { return {f.value * up, f.slope * up, f.value}; }

ActivationValue swiglu_clamped(double gate, double up, double limit) {
  const double g = std::min(gate, limit);
  const double u = std::clamp(up, -limit, limit);
  const double s = sigmoid(1.702 * g);
  const double swish = g * s;
  const double swish_slope = s + 1.702 * g * s * (1.0 - s);
  return {(u + 1.0) * swish, gate <= limit ? (u + 1.0) * swish_slope : 0.0,
          up >= -limit && up <= limit ? swish : 0.0};
}

}  // namespace

ActivationValue activate(const ExpertOptions& options, double gate, double up) {
  switch (options.activation) {
    case Activation::kSwiGLU:
      return gate_with(silu(gate), up);
    case Activation::kGeGLU:
      return gate_with(gelu_erf(gate), up);
    case Activation::kGeGLUTanh:
      return gate_with(gelu_tanh(gate), up);
    case Activation::kReGLU:
      return gate_with(relu(gate), up);
    case Activation::kSwiGLUClamped:
      return swiglu_clamped(gate, up, options.limit);
    case Activation::kSiLU:
      return ungated(silu(gate));
    case Activation::kGELU:
      return ungated(gelu_erf(gate));
    case Activation::kGELUTanh:
      return ungated(gelu_tanh(gate));
    case Activation::kReLU:
      return ungated(relu(gate));
    case Activation::kReLUSquared:
      return ungated({relu(gate).value * relu(gate).value, 2.0 * relu(gate).value});
  }
  return {};
}

}  // namespace sonicmoe::oracle
