// Activations and their gradients for one hidden unit, float32. The switch over the kind folds away
// where the kind is a constant and is uniform over the GPU otherwise.
#pragma once

#include "cuda/ptx/math.cuh"
#include "sonicmoe/activation.hpp"

namespace sonicmoe::cuda {

struct ActivationParams {
  Activation kind;
  float limit;  // of kSwiGLUClamped
};

namespace detail {

inline constexpr float kLog2E = 1.44269504f;
inline constexpr float kInvSqrt2 = 0.707106781f;
inline constexpr float kInvSqrt2Pi = 0.398942280f;
inline constexpr float kTwoSqrt2OverPi = 1.595769122f;
inline constexpr float kTanhCubic = 0.044715f;
inline constexpr float kClampedSlope = 1.702f;

// f(x) and f'(x).
struct ValueAndSlope {
  float value, slope;
};

// sigmoid(x) and 1 - sigmoid(x). The error of the latter is at most 2^-23, and zero for x >= 17,
// where the sigmoid is 1. So the error of a slope, which multiplies it by x, is at most 4e-6.
struct Sigmoid {
  float value, complement;
};
SONICMOE_DEVICE Sigmoid sigmoid_pair(float x) {
  const float s = ptx::reciprocal_approx(1.0f + ptx::exp2_approx(-x * kLog2E));
  return {s, 1.0f - s};
}
SONICMOE_DEVICE float sigmoid(float x) {
  return ptx::reciprocal_approx(1.0f + ptx::exp2_approx(-x * kLog2E));
}

SONICMOE_DEVICE float silu(float x) { return x * sigmoid(x); }
SONICMOE_DEVICE ValueAndSlope silu_pair(float x) {
  const Sigmoid s = sigmoid_pair(x);
  const float value = x * s.value;
  return {value, s.value + value * s.complement};
}

SONICMOE_DEVICE float gelu(float x) { return 0.5f * x * (1.0f + erff(x * kInvSqrt2)); }
SONICMOE_DEVICE ValueAndSlope gelu_pair(float x) {
  const float cdf = 0.5f * (1.0f + erff(x * kInvSqrt2));
  return {x * cdf, cdf + x * kInvSqrt2Pi * ptx::exp2_approx(-0.5f * kLog2E * x * x)};
}

// 0.5 (1 + tanh(z)) = sigmoid(2 z).
SONICMOE_DEVICE float gelu_tanh(float x) {
  return x * sigmoid(kTwoSqrt2OverPi * (x + kTanhCubic * x * x * x));
}
SONICMOE_DEVICE ValueAndSlope gelu_tanh_pair(float x) {
  const Sigmoid s = sigmoid_pair(kTwoSqrt2OverPi * (x + kTanhCubic * x * x * x));
  const float inner_slope = kTwoSqrt2OverPi * (1.0f + 3.0f * kTanhCubic * x * x);
  return {x * s.value, s.value + x * s.value * s.complement * inner_slope};
}

// Written so that a NaN stays a NaN.
SONICMOE_DEVICE float relu(float x) { return x <= 0.0f ? 0.0f : x; }
SONICMOE_DEVICE ValueAndSlope relu_pair(float x) { return {relu(x), x <= 0.0f ? 0.0f : 1.0f}; }

SONICMOE_DEVICE float clamp_gate(float gate, float limit) { return gate > limit ? limit : gate; }
SONICMOE_DEVICE float clamp_up(float up, float limit) {
  up = up > limit ? limit : up;
  return up < -limit ? -limit : up;
}

SONICMOE_DEVICE ValueAndSlope gate_pair(Activation kind, float gate) {
  switch (kind) {
    case Activation::kGeGLU:
      return gelu_pair(gate);
    case Activation::kGeGLUTanh:
      return gelu_tanh_pair(gate);
    case Activation::kReGLU:
      return relu_pair(gate);
    default:
      return silu_pair(gate);
  }
}

}  // namespace detail

// A of a gated activation.
SONICMOE_DEVICE float gated(const ActivationParams& p, float gate, float up) {
  using namespace detail;
  switch (p.kind) {
    case Activation::kGeGLU:
      return gelu(gate) * up;
    case Activation::kGeGLUTanh:
      return gelu_tanh(gate) * up;
    case Activation::kReGLU:
      return relu(gate) * up;
    case Activation::kSwiGLUClamped: {
      const float g = clamp_gate(gate, p.limit);
      return (clamp_up(up, p.limit) + 1.0f) * g * sigmoid(kClampedSlope * g);
    }
    default:
      return silu(gate) * up;
  }
}

// A and the gradients of gate and up for dA = `d_out`. A clamp passes its gradient on the closed
// interval.
SONICMOE_DEVICE void gated_gradient(const ActivationParams& p, float gate, float up, float d_out,
                                    float& d_gate, float& d_up, float& a) {
  using namespace detail;
  if (p.kind == Activation::kSwiGLUClamped) {
    const float g = clamp_gate(gate, p.limit), u = clamp_up(up, p.limit);
    const Sigmoid s = sigmoid_pair(kClampedSlope * g);
    const bool gate_inside = !(gate > p.limit);
    const bool up_inside = !(up > p.limit) && !(up < -p.limit);
    const float value = g * s.value;
    const float slope = s.value + kClampedSlope * value * s.complement;
    d_gate = gate_inside ? d_out * (u + 1.0f) * slope : 0.0f;
    d_up = up_inside ? d_out * value : 0.0f;
    a = (u + 1.0f) * value;
    return;
  }
  const ValueAndSlope f = gate_pair(p.kind, gate);
  d_gate = d_out * up * f.slope;
  d_up = d_out * f.value;
  a = f.value * up;
}

// A of an ungated activation.
SONICMOE_DEVICE float plain(const ActivationParams& p, float x) {
  using namespace detail;
  switch (p.kind) {
    case Activation::kGELU:
      return gelu(x);
    case Activation::kGELUTanh:
      return gelu_tanh(x);
    case Activation::kReLU:
      return relu(x);
    case Activation::kReLUSquared:
      return relu(x) * relu(x);
    default:
      return silu(x);
  }
}

// A and the gradient of its input for dA = `d_out`.
SONICMOE_DEVICE void plain_gradient(const ActivationParams& p, float x, float d_out, float& d_x,
                                    float& a) {
  using namespace detail;
  ValueAndSlope f;
  switch (p.kind) {
    case Activation::kGELU:
      f = gelu_pair(x);
      break;
    case Activation::kGELUTanh:
      f = gelu_tanh_pair(x);
      break;
    case Activation::kReLU:
      f = relu_pair(x);
      break;
    case Activation::kReLUSquared:
      f = {relu(x) * relu(x), 2.0f * relu(x)};
      break;
    default:
      f = silu_pair(x);
      break;
  }
  d_x = d_out * f.slope;
  a = f.value;
}

}  // namespace sonicmoe::cuda
