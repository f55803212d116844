#include "sonicmoe/activation.hpp"

#include "core/names.hpp"

namespace sonicmoe {
namespace {

constexpr Name<GateUpLayout> kLayouts[] = {
    {GateUpLayout::kConcatenated, "concatenated"},
    {GateUpLayout::kInterleaved, "interleaved"},
};

constexpr auto kAllActivations = values_of(kActivations);
constexpr auto kAllLayouts = values_of(kLayouts);

}  // namespace

std::string_view name_of(Activation activation) noexcept {
  return find_name(kActivations, activation);
}

std::string_view name_of(GateUpLayout layout) noexcept { return find_name(kLayouts, layout); }

Activation activation_from_name(std::string_view name) {
  return find_value(kActivations, "activation", name);
}

GateUpLayout gate_up_layout_from_name(std::string_view name) {
  return find_value(kLayouts, "gate_up_layout", name);
}

std::span<const Activation> all_activations() noexcept { return kAllActivations; }

std::span<const GateUpLayout> all_gate_up_layouts() noexcept { return kAllLayouts; }

}  // namespace sonicmoe
