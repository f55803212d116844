// Activations over contiguous float32 values. Everything a loop body calls is inlined, so that the
// loop vectorises in each of the instruction sets it is compiled for.
#include <bit>
#include <cmath>

#include "cpu/clones.hpp"
#include "cpu/vec.hpp"

namespace sonicmoe::cpu {
namespace {

#define SONICMOE_INLINE __attribute__((always_inline)) inline

// e^x, relative error below 3e-7; saturates to 1.7e-38 and 2.4e38 outside [-87.3, 88.3]; NaN stays
// NaN. Cody-Waite reduction to |r| <= ln(2)/2 and the Taylor series to r^7.
SONICMOE_INLINE float exp_inline(float x) {
  x = x < -87.3f ? -87.3f : x;
  x = x > 88.3f ? 88.3f : x;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = x * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const std::uint32_t exponent = (std::bit_cast<std::uint32_t>(shifted) + 127u) << 23;
  return p * std::bit_cast<float>(exponent);
}

// sigmoid(x) and 1 - sigmoid(x), the latter without cancellation.
struct Sigmoid {
  float value;
  float complement;
};

SONICMOE_INLINE Sigmoid sigmoid_pair(float x) {
  const float e = exp_inline(-x);
  const float s = 1.0f / (1.0f + e);
  return {s, e * s};
}

SONICMOE_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_inline(-x)); }

constexpr float kInvSqrt2 = 0.707106781f;
constexpr float kInvSqrt2Pi = 0.398942280f;
constexpr float kSqrt2OverPi = 0.797884561f;
constexpr float kTanhCubic = 0.044715f;
constexpr float kClampedSlope = 1.702f;

// f(x) and f'(x) of the ungated functions; gated ones are f(gate) * up.
struct SiLU {
  static SONICMOE_INLINE float value(float x) { return x * sigmoid(x); }
  static SONICMOE_INLINE float slope(float x) {
    const Sigmoid s = sigmoid_pair(x);
    return s.value * (1.0f + x * s.complement);
  }
};

struct GELU {
  static SONICMOE_INLINE float value(float x) {
    return 0.5f * x * (1.0f + std::erf(x * kInvSqrt2));
  }
  static SONICMOE_INLINE float slope(float x) {
    return 0.5f * (1.0f + std::erf(x * kInvSqrt2)) + x * kInvSqrt2Pi * exp_inline(-0.5f * x * x);
  }
};

// 0.5 (1 + tanh(z)) = sigmoid(2 z).
struct GELUTanh {
  static SONICMOE_INLINE float inner(float x) {
    return 2.0f * kSqrt2OverPi * (x + kTanhCubic * x * x * x);
  }
  static SONICMOE_INLINE float value(float x) { return x * sigmoid(inner(x)); }
  static SONICMOE_INLINE float slope(float x) {
    const Sigmoid s = sigmoid_pair(inner(x));
    const float inner_slope = 2.0f * kSqrt2OverPi * (1.0f + 3.0f * kTanhCubic * x * x);
    return s.value + x * s.value * s.complement * inner_slope;
  }
};

// Written so that a NaN stays a NaN.
struct ReLU {
  static SONICMOE_INLINE float value(float x) { return x <= 0.0f ? 0.0f : x; }
  static SONICMOE_INLINE float slope(float x) { return x <= 0.0f ? 0.0f : 1.0f; }
};

struct ReLUSquared {
  static SONICMOE_INLINE float value(float x) { return ReLU::value(x) * ReLU::value(x); }
  static SONICMOE_INLINE float slope(float x) { return 2.0f * ReLU::value(x); }
};

template <class F>
SONICMOE_INLINE void gated(const float* gate, const float* up, float* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = F::value(gate[i]) * up[i];
}

template <class F>
SONICMOE_INLINE void gated_backward(const float* gate, const float* up, const float* d_out,
                                    float* d_gate, float* d_up, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = gate[i];
    const float u = up[i];
    d_gate[i] = d_out[i] * u * F::slope(g);
    d_up[i] = d_out[i] * F::value(g);
  }
}

template <class F>
SONICMOE_INLINE void ungated(const float* x, float* out, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) out[i] = F::value(x[i]);
}

template <class F>
SONICMOE_INLINE void ungated_backward(const float* x, const float* d_out, float* d_x,
                                      std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) d_x[i] = d_out[i] * F::slope(x[i]);
}

SONICMOE_INLINE float clamp_gate(float gate, float limit) { return gate > limit ? limit : gate; }

SONICMOE_INLINE float clamp_up(float up, float limit) {
  up = up > limit ? limit : up;
  return up < -limit ? -limit : up;
}

SONICMOE_INLINE void clamped(float limit, const float* gate, const float* up, float* out,
                             std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = clamp_gate(gate[i], limit);
    out[i] = (clamp_up(up[i], limit) + 1.0f) * g * sigmoid(kClampedSlope * g);
  }
}

SONICMOE_INLINE void clamped_backward(float limit, const float* gate, const float* up,
                                      const float* d_out, float* d_gate, float* d_up,
                                      std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    const float g = clamp_gate(gate[i], limit);
    const float u = clamp_up(up[i], limit);
    const Sigmoid s = sigmoid_pair(kClampedSlope * g);
    const float slope = s.value * (1.0f + kClampedSlope * g * s.complement);
    const bool gate_inside = !(gate[i] > limit);
    const bool up_inside = !(up[i] > limit) && !(up[i] < -limit);
    d_gate[i] = gate_inside ? d_out[i] * (u + 1.0f) * slope : 0.0f;
    d_up[i] = up_inside ? d_out[i] * g * s.value : 0.0f;
  }
}

}  // namespace

SONICMOE_CLONES void activate(Activation activation, float limit, const float* gate,
                              const float* up, float* out, std::int64_t count) {
  switch (activation) {
    case Activation::kSwiGLU:
      return gated<SiLU>(gate, up, out, count);
    case Activation::kGeGLU:
      return gated<GELU>(gate, up, out, count);
    case Activation::kGeGLUTanh:
      return gated<GELUTanh>(gate, up, out, count);
    case Activation::kReGLU:
      return gated<ReLU>(gate, up, out, count);
    case Activation::kSwiGLUClamped:
      return clamped(limit, gate, up, out, count);
    case Activation::kSiLU:
      return ungated<SiLU>(gate, out, count);
    case Activation::kGELU:
      return ungated<GELU>(gate, out, count);
    case Activation::kGELUTanh:
      return ungated<GELUTanh>(gate, out, count);
    case Activation::kReLU:
      return ungated<ReLU>(gate, out, count);
    case Activation::kReLUSquared:
      return ungated<ReLUSquared>(gate, out, count);
  }
}

SONICMOE_CLONES void activate_backward(Activation activation, float limit, const float* gate,
                                       const float* up, const float* d_out, float* d_gate,
                                       float* d_up, std::int64_t count) {
  switch (activation) {
    case Activation::kSwiGLU:
      return gated_backward<SiLU>(gate, up, d_out, d_gate, d_up, count);
    case Activation::kGeGLU:
      return gated_backward<GELU>(gate, up, d_out, d_gate, d_up, count);
    case Activation::kGeGLUTanh:
      return gated_backward<GELUTanh>(gate, up, d_out, d_gate, d_up, count);
    case Activation::kReGLU:
      return gated_backward<ReLU>(gate, up, d_out, d_gate, d_up, count);
    case Activation::kSwiGLUClamped:
      return clamped_backward(limit, gate, up, d_out, d_gate, d_up, count);
    case Activation::kSiLU:
      return ungated_backward<SiLU>(gate, d_out, d_gate, count);
    case Activation::kGELU:
      return ungated_backward<GELU>(gate, d_out, d_gate, count);
    case Activation::kGELUTanh:
      return ungated_backward<GELUTanh>(gate, d_out, d_gate, count);
    case Activation::kReLU:
      return ungated_backward<ReLU>(gate, d_out, d_gate, count);
    case Activation::kReLUSquared:
      return ungated_backward<ReLUSquared>(gate, d_out, d_gate, count);
  }
}

}  // namespace sonicmoe::cpu
