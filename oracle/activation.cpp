#include "oracle/activation.hpp"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace sonicmoe::oracle {
namespace {

template <class Real>
Real sigmoid(Real v) {
  return 1 / (1 + std::exp(-v));
}

// f(g) and f'(g) of the scalar functions, before gating.
template <class Real>
struct Scalar {
  Real value, slope;
};

template <class Real>
Scalar<Real> silu(Real g) {
  const Real s = sigmoid(g);
  return {g * s, s + g * s * (1 - s)};
}

template <class Real>
Scalar<Real> gelu_erf(Real g) {
  const Real cdf = std::erfc(-g / std::numbers::sqrt2_v<Real>) / 2;
  const Real density = std::exp(-g * g / 2) / std::sqrt(2 * std::numbers::pi_v<Real>);
  return {g * cdf, cdf + g * density};
}

template <class Real>
Scalar<Real> gelu_tanh(Real g) {
  constexpr auto kCubic = static_cast<Real>(0.044715);
  const Real c = std::sqrt(2 / std::numbers::pi_v<Real>);
  const Real t = std::tanh(c * (g + kCubic * g * g * g));
  const Real inner_slope = c * (1 + 3 * kCubic * g * g);
  return {g * (1 + t) / 2, (1 + t) / 2 + g * (1 - t * t) * inner_slope / 2};
}

template <class Real>
Scalar<Real> relu(Real g) {
  return g > 0 ? Scalar<Real>{g, 1} : Scalar<Real>{0, 0};
}

template <class Real>
Scalar<Real> relu_squared(Real g) {
  const Real r = relu(g).value;
  return {r * r, 2 * r};
}

template <class Real>
ActivationOf<Real> ungated(Scalar<Real> f) {
  return {f.value, f.slope, 0};
}

template <class Real>
ActivationOf<Real> gate_with(Scalar<Real> f, Real up) {
  return {f.value * up, f.slope * up, f.value};
}

template <class Real>
ActivationOf<Real> swiglu_clamped(Real gate, Real up, Real limit) {
  constexpr auto kSlope = static_cast<Real>(1.702);
  const Real g = std::min(gate, limit);
  const Real u = std::clamp(up, -limit, limit);
  const Real s = sigmoid(kSlope * g);
  const Real swish = g * s;
  const Real swish_slope = s + kSlope * g * s * (1 - s);
  return {(u + 1) * swish, gate <= limit ? (u + 1) * swish_slope : 0,
          up >= -limit && up <= limit ? swish : 0};
}

template <class Real>
ActivationOf<Real> evaluate(const ExpertOptions& options, Real gate, Real up) {
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
      return swiglu_clamped(gate, up, static_cast<Real>(options.limit));
    case Activation::kSiLU:
      return ungated(silu(gate));
    case Activation::kGELU:
      return ungated(gelu_erf(gate));
    case Activation::kGELUTanh:
      return ungated(gelu_tanh(gate));
    case Activation::kReLU:
      return ungated(relu(gate));
    case Activation::kReLUSquared:
      return ungated(relu_squared(gate));
  }
  return {};
}

}  // namespace

ActivationValue activate(const ExpertOptions& options, double gate, double up) {
  return evaluate(options, gate, up);
}

ActivationOf<float> activate_in_float(const ExpertOptions& options, float gate, float up) {
  return evaluate(options, gate, up);
}

}  // namespace sonicmoe::oracle
