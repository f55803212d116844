// Activations of an expert and the storage order of gate and up rows.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "sonicmoe/export.hpp"

namespace sonicmoe {

/// Gated (g = 2): A = f(gate, up). Ungated (g = 1): A = f(h). Gradients at kinks follow torch:
/// relu'(0) = 0, and a clamp passes its gradient on the closed interval. The integers are stored in
/// exported graphs: they never change, and a new activation takes the next.
enum class Activation : std::uint8_t {
  kSwiGLU = 0,         ///< silu(gate) * up
  kGeGLU = 1,          ///< gelu(gate) * up, erf form
  kGeGLUTanh = 2,      ///< gelu(gate) * up, tanh form
  kReGLU = 3,          ///< max(gate, 0) * up
  kSwiGLUClamped = 4,  ///< (up' + 1) * gate' * sigmoid(1.702 gate') with gate' = min(gate, limit),
                       ///< up' = clamp(up, -limit, limit) (gpt-oss)
  kSiLU = 5,           ///< h * sigmoid(h)
  kGELU = 6,           ///< erf form
  kGELUTanh = 7,       ///< tanh form
  kReLU = 8,           ///< max(h, 0)
  kReLUSquared = 9,    ///< max(h, 0)^2
};

/// What a caller needs to know of an activation. Its arithmetic: src/math/activation.hpp.
struct ActivationTraits {
  Activation value;
  std::string_view name;
  bool gated;
};

/// All activations, in the order of their integers.
inline constexpr ActivationTraits kActivations[] = {
    {Activation::kSwiGLU, "swiglu", true},
    {Activation::kGeGLU, "geglu", true},
    {Activation::kGeGLUTanh, "geglu_tanh", true},
    {Activation::kReGLU, "reglu", true},
    {Activation::kSwiGLUClamped, "swiglu_clamped", true},
    {Activation::kSiLU, "silu", false},
    {Activation::kGELU, "gelu", false},
    {Activation::kGELUTanh, "gelu_tanh", false},
    {Activation::kReLU, "relu", false},
    {Activation::kReLUSquared, "relu_squared", false},
};

/// Order of the g*n rows of W1 (and of the columns of H) for gated activations; ignored otherwise.
/// The integers never change.
enum class GateUpLayout : std::uint8_t {
  kConcatenated = 0,  ///< "concatenated"  rows 0..n-1 gate, n..2n-1 up (Hugging Face checkpoints)
  kInterleaved = 1,   ///< "interleaved"   row 2j gate, row 2j+1 up (gpt-oss, tensor parallelism)
};

/// Whether an expert has gate and up rows; false of an integer that is no enumerator.
constexpr bool is_gated(Activation activation) noexcept {
  for (const ActivationTraits& traits : kActivations) {
    if (traits.value == activation) return traits.gated;
  }
  return false;
}
/// g of the formulas: 2 when gated, else 1.
constexpr int gate_factor(Activation activation) noexcept { return is_gated(activation) ? 2 : 1; }

/// The enumerator's name; "?" of an integer that is none.
SONICMOE_API std::string_view name_of(Activation activation) noexcept;
SONICMOE_API std::string_view name_of(GateUpLayout layout) noexcept;
/// The enumerator of a name. Throws Error listing the legal names.
SONICMOE_API Activation activation_from_name(std::string_view name);
SONICMOE_API GateUpLayout gate_up_layout_from_name(std::string_view name);
/// All enumerators, in the order of their integers.
SONICMOE_API std::span<const Activation> all_activations() noexcept;
SONICMOE_API std::span<const GateUpLayout> all_gate_up_layouts() noexcept;

}  // namespace sonicmoe
