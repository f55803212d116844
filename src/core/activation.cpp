#include "sonicmoe/activation.hpp"

#include <array>

#include "core/names.hpp"

namespace sonicmoe {
namespace {

constexpr std::array<std::pair<Activation, std::string_view>, 10> kActivations{{
    {Activation::kSwiGLU, "swiglu"},
    {Activation::kGeGLU, "geglu"},
    {Activation::kGeGLUTanh, "geglu_tanh"},
    {Activation::kReGLU, "reglu"},
    {Activation::kSwiGLUClamped, "swiglu_clamped"},
    {Activation::kSiLU, "silu"},
    {Activation::kGELU, "gelu"},
    {Activation::kGELUTanh, "gelu_tanh"},
    {Activation::kReLU, "relu"},
    {Activation::kReLUSquared, "relu_squared"},
}};

constexpr std::array<std::pair<GateUpLayout, std::string_view>, 2> kLayouts{{
    {GateUpLayout::kConcatenated, "concatenated"},
    {GateUpLayout::kInterleaved, "interleaved"},
}};

constexpr auto kAllActivations = [] {
  std::array<Activation, kActivations.size()> all{};
  for (std::size_t i = 0; i < all.size(); ++i) all[i] = kActivations[i].first;
  return all;
}();

}  // namespace

std::string_view name_of(Activation activation) noexcept {
  return find_name<Activation>(kActivations, activation);
}

std::string_view name_of(GateUpLayout layout) noexcept {
  return find_name<GateUpLayout>(kLayouts, layout);
}

Activation activation_from_name(std::string_view name) {
  return find_value<Activation>(kActivations, "activation", name);
}

GateUpLayout gate_up_layout_from_name(std::string_view name) {
  return find_value<GateUpLayout>(kLayouts, "gate_up_layout", name);
}

std::span<const Activation> all_activations() noexcept { return kAllActivations; }

}  // namespace sonicmoe
