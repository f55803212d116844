// Activations of an expert and the storage order of gate and up rows.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>

#include "sonicmoe/export.hpp"

namespace sonicmoe {

/// Gated (g = 2): A = f(gate, up). Ungated (g = 1): A = f(h).
enum class Activation : std::uint8_t {
  kSwiGLU,         ///< "swiglu"          silu(gate) * up
  kGeGLU,          ///< "geglu"           gelu(gate) * up, erf form
  kGeGLUTanh,      ///< "geglu_tanh"      gelu(gate) * up, tanh form
  kReGLU,          ///< "reglu"           max(gate, 0) * up
  kSwiGLUClamped,  ///< "swiglu_clamped"  gate' = min(gate, limit), up' = clamp(up, +-limit),
                   ///<                   (up' + 1) * gate' * sigmoid(1.702 gate')   (gpt-oss)
  kSiLU,           ///< "silu"            h * sigmoid(h)
  kGELU,           ///< "gelu"            erf form
  kGELUTanh,       ///< "gelu_tanh"       tanh form
  kReLU,           ///< "relu"            max(h, 0)
  kReLUSquared,    ///< "relu_squared"    max(h, 0)^2
};

/// Order of the g*n rows of W1 (and of the columns of H) for gated activations; ignored otherwise.
enum class GateUpLayout : std::uint8_t {
  kConcatenated,  ///< "concatenated"  rows 0..n-1 gate, rows n..2n-1 up (Hugging Face checkpoints)
  kInterleaved,   ///< "interleaved"   row 2j gate, row 2j+1 up (gpt-oss, tensor parallelism)
};

/// Gradients at kinks follow torch: relu'(0) = 0; a clamp passes its gradient on the closed
/// interval.
constexpr bool is_gated(Activation a) noexcept { return a <= Activation::kSwiGLUClamped; }
/// g of the formulas: 2 when gated, else 1.
constexpr int gate_factor(Activation a) noexcept { return is_gated(a) ? 2 : 1; }

SONICMOE_API std::string_view name_of(Activation activation) noexcept;
SONICMOE_API std::string_view name_of(GateUpLayout layout) noexcept;
/// The names above. Throw Error listing the legal names.
SONICMOE_API Activation activation_from_name(std::string_view name);
SONICMOE_API GateUpLayout gate_up_layout_from_name(std::string_view name);
SONICMOE_API std::span<const Activation> all_activations() noexcept;

}  // namespace sonicmoe
