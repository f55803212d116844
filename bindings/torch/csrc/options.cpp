#include "options.hpp"

#include <string_view>

namespace sonicmoe_torch {
namespace {

constexpr int kNumGateUpLayouts = 2;
constexpr int kNumScorings = 3;
constexpr int kNumPolicies = 6;

template <class Enum>
std::string join_names(int count) {
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (i > 0) names += ',';
    names += sonicmoe::name_of(static_cast<Enum>(i));
  }
  return names;
}

}  // namespace

sonicmoe::ExpertOptions expert_options(std::int64_t activation, std::int64_t gate_up_layout,
                                       double limit, bool deterministic) {
  return {.activation = static_cast<sonicmoe::Activation>(activation),
          .gate_up_layout = static_cast<sonicmoe::GateUpLayout>(gate_up_layout),
          .limit = static_cast<float>(limit),
          .deterministic = deterministic};
}

sonicmoe::RouterOptions router_options(const Views& views, std::int64_t top_k, std::int64_t scoring,
                                       std::optional<bool> renormalize,
                                       const OptionalTensor& selection_bias,
                                       std::int64_t num_groups, std::int64_t top_groups,
                                       double scale) {
  return {.top_k = top_k,
          .scoring = static_cast<sonicmoe::Scoring>(scoring),
          .renormalize = renormalize,
          .selection_bias = views.in("selection_bias", selection_bias),
          .num_groups = num_groups,
          .top_groups = top_groups,
          .scale = static_cast<float>(scale)};
}

sonicmoe::RoundingOptions rounding_options(const Views& views, std::int64_t tile,
                                           std::int64_t policy, std::int64_t seed,
                                           const OptionalTensor& seed_tensor) {
  return {.tile = tile,
          .policy = static_cast<sonicmoe::RoundingPolicy>(policy),
          .seed = static_cast<std::uint64_t>(seed),
          .seed_tensor = views.in("seed_tensor", seed_tensor)};
}

std::string enum_names(std::int64_t kind) {
  switch (kind) {
    case 0:
      return join_names<sonicmoe::Activation>(static_cast<int>(sonicmoe::all_activations().size()));
    case 1:
      return join_names<sonicmoe::GateUpLayout>(kNumGateUpLayouts);
    case 2:
      return join_names<sonicmoe::Scoring>(kNumScorings);
    case 3:
      return join_names<sonicmoe::RoundingPolicy>(kNumPolicies);
    default:
      throw sonicmoe::Error("enum_names", "kind", "0 to 3", std::to_string(kind));
  }
}

std::string backend_list() {
  std::string list;
  for (const sonicmoe::BackendInfo& backend : sonicmoe::backends()) {
    if (!list.empty()) list += '\n';
    list += backend.name + '\t' + (backend.available ? '1' : '0') + '\t' + backend.reason;
  }
  return list;
}

}  // namespace sonicmoe_torch
