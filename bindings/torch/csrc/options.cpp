#include "options.hpp"

#include <span>
#include <string_view>

#include "sonicmoe/version.hpp"

namespace sonicmoe_torch {
namespace {

// "name integer word word ...", one for each enumerator, commas between.
template <class Enum>
std::string describe(std::span<const Enum> all, std::string (*words)(Enum)) {
  std::string text;
  for (const Enum value : all) {
    if (!text.empty()) text += ',';
    text += std::string(name_of(value)) + ' ' + std::to_string(static_cast<int>(value));
    text += words(value);
  }
  return text;
}

template <class Enum>
std::string nothing(Enum) {
  return "";
}

std::string words_of(sonicmoe::Activation activation) {
  return is_gated(activation) ? " gated" : "";
}

std::string words_of(sonicmoe::Scoring scoring) {
  const sonicmoe::ScoringTraits& traits = sonicmoe::traits_of(scoring);
  const bool always = traits.renormalization == sonicmoe::Renormalization::kAlways;
  return std::string(always ? " renormalizes" : "") + (traits.biased ? " biased" : "");
}

}  // namespace

std::int64_t PackedOptions::integer() {
  if (next_integer_ == integers_.size()) {
    throw sonicmoe::Error(operation_, "options", "more integers (options.py of this library)",
                          std::to_string(integers_.size()));
  }
  return integers_[next_integer_++];
}

float PackedOptions::real() {
  if (next_real_ == reals_.size()) {
    throw sonicmoe::Error(operation_, "reals", "more numbers (options.py of this library)",
                          std::to_string(reals_.size()));
  }
  return static_cast<float>(reals_[next_real_++]);
}

std::optional<bool> PackedOptions::optional_flag() {
  const std::int64_t value = integer();
  return value < 0 ? std::nullopt : std::optional(value != 0);
}

std::optional<std::size_t> PackedOptions::optional_size() {
  const std::int64_t value = integer();
  return value < 0 ? std::nullopt : std::optional(static_cast<std::size_t>(value));
}

std::optional<std::int64_t> PackedOptions::optional_integer() {
  const std::int64_t value = integer();
  return value < 0 ? std::nullopt : std::optional(value);
}

std::uint8_t PackedOptions::code() {
  const std::int64_t value = integer();
  if (value < 0 || value > 255) {
    throw sonicmoe::Error(operation_, "options", "an enumerator", std::to_string(value));
  }
  return static_cast<std::uint8_t>(value);
}

void PackedOptions::finish() const {
  if (next_integer_ != integers_.size() || next_real_ != reals_.size()) {
    const auto count = [](std::size_t integers, std::size_t reals) {
      return std::to_string(integers) + " integers and " + std::to_string(reals) + " reals";
    };
    throw sonicmoe::Error(operation_, "options", count(next_integer_, next_real_),
                          count(integers_.size(), reals_.size()));
  }
}

// Initialisers are evaluated from left to right: fields are read in the order of options.py.

ExpertCall unpack_experts(PackedOptions& packed) {
  ExpertCall call;
  call.options = {.activation = packed.enumerator<sonicmoe::Activation>(),
                  .gate_up_layout = packed.enumerator<sonicmoe::GateUpLayout>(),
                  .limit = packed.real(),
                  .deterministic = packed.flag(),
                  .max_rows = packed.optional_integer(),
                  .zero_absent_tokens = packed.flag()};
  call.workspace_limit = packed.optional_size();
  return call;
}

ExpertCall unpack_routed_experts(PackedOptions packed) {
  ExpertCall call = unpack_experts(packed);
  call.first_expert = packed.integer();
  packed.finish();
  return call;
}

sonicmoe::RouterOptions unpack_router(PackedOptions& packed, const Views& views,
                                      const OptionalTensor& selection_bias) {
  return {.top_k = packed.integer(),
          .scoring = packed.enumerator<sonicmoe::Scoring>(),
          .renormalize = packed.optional_flag(),
          .selection_bias = views.in("selection_bias", selection_bias),
          .num_groups = packed.integer(),
          .top_groups = packed.integer(),
          .scale = packed.real()};
}

sonicmoe::RoundingOptions unpack_rounding(PackedOptions& packed, const Views& views,
                                          const OptionalTensor& seed_tensor) {
  return {.tile = packed.integer(),
          .policy = packed.enumerator<sonicmoe::RoundingPolicy>(),
          .seed = static_cast<std::uint64_t>(packed.integer()),
          .seed_tensor = views.in("seed_tensor", seed_tensor)};
}

LayerCall unpack_layer(PackedOptions packed, const Views& views,
                       const OptionalTensor& selection_bias, const OptionalTensor& seed_tensor) {
  const ExpertCall experts = unpack_experts(packed);
  LayerCall call{.options = {.experts = experts.options,
                             .router = unpack_router(packed, views, selection_bias),
                             .rounding = {}},
                 .workspace_limit = experts.workspace_limit};
  if (packed.flag()) call.options.rounding = unpack_rounding(packed, views, seed_tensor);
  packed.finish();
  return call;
}

std::string version() { return std::string(sonicmoe::version()); }

std::string enum_names(std::int64_t kind) {
  switch (kind) {
    case 0:
      return describe(sonicmoe::all_activations(), words_of);
    case 1:
      return describe(sonicmoe::all_gate_up_layouts(), nothing);
    case 2:
      return describe(sonicmoe::all_scorings(), words_of);
    case 3:
      return describe(sonicmoe::all_rounding_policies(), nothing);
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
