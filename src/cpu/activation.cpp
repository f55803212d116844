// Activations over contiguous float32 values. Everything a loop body calls is inlined, so that the
// loop vectorises in each of the instruction sets it is compiled for.
#include "math/activation.hpp"

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

struct CpuMath {
  static SONICMOE_INLINE float sigmoid(float x) { return 1.0f / (1.0f + exp_inline(-x)); }
  // The complement without cancellation.
  static SONICMOE_INLINE math::SigmoidPair sigmoid_pair(float x) {
    const float e = exp_inline(-x);
    const float s = 1.0f / (1.0f + e);
    return {s, e * s};
  }
  static SONICMOE_INLINE math::ValueAndSlope swish(float x, float k) {
    const math::SigmoidPair s = sigmoid_pair(k * x);
    return {x * s.value, s.value * (1.0f + k * x * s.complement)};
  }
  static SONICMOE_INLINE float erf(float x) { return std::erf(x); }
  static SONICMOE_INLINE float gaussian(float x) { return exp_inline(-0.5f * x * x); }
};

using Activations = math::Activations<CpuMath>;

}  // namespace

SONICMOE_CLONES void activate(Activation activation, float limit, const float* gate,
                              const float* up, float* out, std::int64_t count) {
  Activations::visit<true>(activation, [&]<class E>(E) __attribute__((always_inline)) {
    using F = typename E::Function;
    for (std::int64_t i = 0; i < count; ++i) {
      out[i] = F::value(F::gate(gate[i], limit), F::factor(up[i], limit));
    }
  });
  Activations::visit<false>(activation, [&]<class E>(E) __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < count; ++i) out[i] = E::Function::value(gate[i]);
  });
}

// Where a gradient takes f's value, it is forward's, bit for bit.
SONICMOE_CLONES void activate_backward(Activation activation, float limit, const float* gate,
                                       const float* up, const float* d_out, float* d_gate,
                                       float* d_up, std::int64_t count) {
  Activations::visit<true>(activation, [&]<class E>(E) __attribute__((always_inline)) {
    using F = typename E::Function;
    for (std::int64_t i = 0; i < count; ++i) {
      const float g = F::gate(gate[i], limit);
      const float to_gate = d_out[i] * F::factor(up[i], limit) * F::pair(g).slope;
      const float to_up = F::value(g, d_out[i]);
      d_gate[i] = F::gate_passes(gate[i], limit) ? to_gate : 0.0f;
      d_up[i] = F::up_passes(up[i], limit) ? to_up : 0.0f;
    }
  });
  Activations::visit<false>(activation, [&]<class E>(E) __attribute__((always_inline)) {
    for (std::int64_t i = 0; i < count; ++i)
      d_gate[i] = d_out[i] * E::Function::pair(gate[i]).slope;
  });
}

}  // namespace sonicmoe::cpu
