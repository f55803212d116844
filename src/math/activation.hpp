// The activations and their gradients, float32: one list for the CPU's loops and the GPU's
// epilogues. A formula is written once, over a Math that has its special functions as the processor
// computes them:
//   sigmoid(x)       1 / (1 + e^-x)
//   sigmoid_pair(x)  SigmoidPair
//   swish(x, k)      value and slope of x sigmoid(k x)
//   erf(x), gaussian(x) = e^(-x^2 / 2)
//
// A function f has f.value(x), and f.pair(x): value and slope, for backward. The value of pair()
// may be rounded otherwise than value().
#pragma once

#include <type_traits>

#include "math/host_device.hpp"
#include "sonicmoe/activation.hpp"

namespace sonicmoe::math {

struct ValueAndSlope {
  float value, slope;
};

/// sigmoid(x) and 1 - sigmoid(x).
struct SigmoidPair {
  float value, complement;
};

inline constexpr float kInvSqrt2 = 0.707106781f;
inline constexpr float kInvSqrt2Pi = 0.398942280f;
inline constexpr float kTwoSqrt2OverPi = 1.595769122f;
inline constexpr float kTanhCubic = 0.044715f;
inline constexpr float kClampedSlope = 1.702f;

// ------------------------------------------------------------------------ functions of one value

template <class Math>
struct SiLU {
  static SONICMOE_HD float value(float x) { return x * Math::sigmoid(x); }
  static SONICMOE_HD ValueAndSlope pair(float x) { return Math::swish(x, 1.0f); }
};

template <class Math>
struct GELU {
  static SONICMOE_HD float value(float x) { return 0.5f * x * (1.0f + Math::erf(x * kInvSqrt2)); }
  static SONICMOE_HD ValueAndSlope pair(float x) {
    const float cdf = 0.5f * (1.0f + Math::erf(x * kInvSqrt2));
    return {x * cdf, cdf + x * kInvSqrt2Pi * Math::gaussian(x)};
  }
};

// 0.5 (1 + tanh(z)) = sigmoid(2 z).
template <class Math>
struct GELUTanh {
  static SONICMOE_HD float inner(float x) { return kTwoSqrt2OverPi * (x + kTanhCubic * x * x * x); }
  static SONICMOE_HD float value(float x) { return x * Math::sigmoid(inner(x)); }
  static SONICMOE_HD ValueAndSlope pair(float x) {
    const SigmoidPair s = Math::sigmoid_pair(inner(x));
    const float inner_slope = kTwoSqrt2OverPi * (1.0f + 3.0f * kTanhCubic * x * x);
    return {x * s.value, s.value + x * s.value * s.complement * inner_slope};
  }
};

// Written so that a NaN stays a NaN.
template <class Math>
struct ReLU {
  static SONICMOE_HD float value(float x) { return x <= 0.0f ? 0.0f : x; }
  static SONICMOE_HD ValueAndSlope pair(float x) { return {value(x), x <= 0.0f ? 0.0f : 1.0f}; }
};

template <class Math>
struct ReLUSquared {
  static SONICMOE_HD float relu(float x) { return ReLU<Math>::value(x); }
  static SONICMOE_HD float value(float x) { return relu(x) * relu(x); }
  static SONICMOE_HD ValueAndSlope pair(float x) { return {value(x), 2.0f * relu(x)}; }
};

// ------------------------------------------------------------------------------------- activations

// A gated activation is A = f(g) factor with g = gate(gate), factor = factor(up); a gradient passes
// to an input where it was not clamped.

/// A = f(gate) * up.
template <class F>
struct Gated {
  static constexpr bool kGated = true;
  static SONICMOE_HD float gate(float gate, float /*limit*/) { return gate; }
  static SONICMOE_HD float factor(float up, float /*limit*/) { return up; }
  static SONICMOE_HD bool gate_passes(float, float) { return true; }
  static SONICMOE_HD bool up_passes(float, float) { return true; }
  static SONICMOE_HD float value(float g, float factor) { return F::value(g) * factor; }
  static SONICMOE_HD ValueAndSlope pair(float g) { return F::pair(g); }
};

template <class Math>
struct SwiGLUClamped {
  static constexpr bool kGated = true;
  static SONICMOE_HD float gate(float gate, float limit) { return gate > limit ? limit : gate; }
  static SONICMOE_HD float factor(float up, float limit) {
    up = up > limit ? limit : up;
    return (up < -limit ? -limit : up) + 1.0f;
  }
  static SONICMOE_HD bool gate_passes(float gate, float limit) { return !(gate > limit); }
  static SONICMOE_HD bool up_passes(float up, float limit) {
    return !(up > limit) && !(up < -limit);
  }
  static SONICMOE_HD float value(float g, float factor) {
    return factor * g * Math::sigmoid(kClampedSlope * g);
  }
  static SONICMOE_HD ValueAndSlope pair(float g) { return Math::swish(g, kClampedSlope); }
};

/// A = f(h).
template <class F>
struct Ungated : F {
  static constexpr bool kGated = false;
};

// -------------------------------------------------------------------------------------------- list

template <Activation kKind, class F>
struct Entry {
  static constexpr Activation kind = kKind;
  using Function = F;
};

template <class... Entries>
struct ActivationList {
  /// Calls f(entry) with the entry of `kind`, among the gated or the ungated ones.
  SONICMOE_HD_CALLS
  template <bool kGated, class F>
  static SONICMOE_HD void visit(Activation kind, F&& f) {
    (visit_if<kGated, Entries>(kind, f) || ...);
  }

  /// Whether there is an entry, gated as the public table says, for every activation.
  static constexpr bool is_complete() {
    for (const ActivationTraits& traits : kActivations) {
      constexpr auto matches = [](bool is_same) { return is_same ? 1 : 0; };
      if ((matches(Entries::kind == traits.value && Entries::Function::kGated == traits.gated) +
           ...) != 1) {
        return false;
      }
    }
    return sizeof...(Entries) == sizeof(kActivations) / sizeof(*kActivations);
  }

 private:
  SONICMOE_HD_CALLS
  template <bool kGated, class E, class F>
  static SONICMOE_HD bool visit_if(Activation kind, F& f) {
    if constexpr (E::Function::kGated == kGated) {
      if (kind == E::kind) {
        f(E{});
        return true;
      }
    }
    return false;
  }
};

template <class M>
using Activations = ActivationList<
    Entry<Activation::kSwiGLU, Gated<SiLU<M>>>, Entry<Activation::kGeGLU, Gated<GELU<M>>>,
    Entry<Activation::kGeGLUTanh, Gated<GELUTanh<M>>>, Entry<Activation::kReGLU, Gated<ReLU<M>>>,
    Entry<Activation::kSwiGLUClamped, SwiGLUClamped<M>>, Entry<Activation::kSiLU, Ungated<SiLU<M>>>,
    Entry<Activation::kGELU, Ungated<GELU<M>>>, Entry<Activation::kGELUTanh, Ungated<GELUTanh<M>>>,
    Entry<Activation::kReLU, Ungated<ReLU<M>>>,
    Entry<Activation::kReLUSquared, Ungated<ReLUSquared<M>>>>;

static_assert(Activations<void>::is_complete());

}  // namespace sonicmoe::math
