// Activations and their gradients for one hidden unit of a lane.
#pragma once

#include "cuda/ptx/math.cuh"
#include "math/activation.hpp"

namespace sonicmoe::cuda {

// By the special-function unit, in approximations.
struct GpuMath {
  static constexpr float kLog2E = 1.44269504f;

  static SONICMOE_DEVICE float sigmoid(float x) {
    return ptx::reciprocal_approx(1.0f + ptx::exp2_approx(-x * kLog2E));
  }
  // The error of the complement is at most 2^-23, and zero for x >= 17, where the sigmoid is 1. So
  // the error of a slope, which multiplies it by x, is at most 4e-6.
  static SONICMOE_DEVICE math::SigmoidPair sigmoid_pair(float x) {
    const float s = sigmoid(x);
    return {s, 1.0f - s};
  }
  static SONICMOE_DEVICE math::ValueAndSlope swish(float x, float k) {
    const math::SigmoidPair s = sigmoid_pair(k * x);
    const float value = x * s.value;
    return {value, s.value + k * value * s.complement};
  }
  static SONICMOE_DEVICE float erf(float x) { return erff(x); }
  static SONICMOE_DEVICE float gaussian(float x) {
    return ptx::exp2_approx(-0.5f * kLog2E * x * x);
  }
};

using Activations = math::Activations<GpuMath>;

struct ActivationParams {
  Activation kind;
  float limit;  // of kSwiGLUClamped
};

// A gated function F of the list, with its limit.
template <class F>
struct GatedUnit {
  float limit;

  SONICMOE_DEVICE float value(float gate, float up) const {
    return F::value(F::gate(gate, limit), F::factor(up, limit));
  }
  // A and the gradients of gate and up for dA = `d_out`.
  SONICMOE_DEVICE void gradient(float gate, float up, float d_out, float& d_gate, float& d_up,
                                float& a) const {
    const float factor = F::factor(up, limit);
    const math::ValueAndSlope f = F::pair(F::gate(gate, limit));
    d_gate = F::gate_passes(gate, limit) ? d_out * factor * f.slope : 0.0f;
    d_up = F::up_passes(up, limit) ? d_out * f.value : 0.0f;
    a = f.value * factor;
  }
};

// An ungated one.
template <class F>
struct PlainUnit {
  float limit;

  SONICMOE_DEVICE float value(float x) const { return F::value(x); }
  // A and the gradient of its input for dA = `d_out`.
  SONICMOE_DEVICE void gradient(float x, float d_out, float& d_x, float& a) const {
    const math::ValueAndSlope f = F::pair(x);
    d_x = d_out * f.slope;
    a = f.value;
  }
};

// Calls f(GatedUnit) or f(PlainUnit): the branch over the kinds is outside of f.
template <bool kGated, class F>
SONICMOE_DEVICE void visit_activation(const ActivationParams& params, F f) {
  Activations::visit<kGated>(params.kind, [&]<class E>(E) {
    using Function = typename E::Function;
    if constexpr (kGated) {
      f(GatedUnit<Function>{params.limit});
    } else {
      f(PlainUnit<Function>{params.limit});
    }
  });
}

}  // namespace sonicmoe::cuda
