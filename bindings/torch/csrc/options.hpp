// From operator arguments to the library's option structs.
//
// Options are packed by sonicmoe_cpp/options.py: the fields of its dataclasses in their order,
// integers (enumerators, flags, sizes) in one list and reals in another. This is the one place that
// unpacks them: a new option is one field there and one line here. Enumerators travel as the
// integers of the public headers; the package reads their names from the library (enum_names).
#pragma once

#include <string>
#include <vector>

#include "convert.hpp"

namespace sonicmoe_torch {

using Integers = std::vector<std::int64_t>;
using Reals = std::vector<double>;

/// How the routing tensors are read: topk_ids [T, K] / offsets [E] / expert_ids [P] + token_ids.
enum class Form : std::int64_t { kTopK = 0, kSorted = 1, kPairs = 2 };

/// Hands out packed values in order. Throws sonicmoe::Error where one is missing, or left over when
/// finish() is called, or is no value of its type.
class PackedOptions {
 public:
  PackedOptions(const char* operation, const Integers& integers, const Reals& reals)
      : operation_(operation), integers_(integers), reals_(reals) {}

  std::int64_t integer();
  float real();
  bool flag() { return integer() != 0; }
  /// -1 is unset.
  std::optional<bool> optional_flag();
  std::optional<std::size_t> optional_size();
  std::optional<std::int64_t> optional_integer();
  template <class Enum>
  Enum enumerator() {
    return static_cast<Enum>(code());
  }
  void finish() const;

 private:
  std::uint8_t code();

  const char* operation_;
  const Integers& integers_;
  const Reals& reals_;
  std::size_t next_integer_ = 0, next_real_ = 0;
};

/// ExpertOptions of options.py: those of the library, and the limit of this call's scratch.
struct ExpertCall {
  sonicmoe::ExpertOptions options;
  std::optional<std::size_t> workspace_limit;
  std::int64_t first_expert = 0;  ///< RoutedExpertOptions
};
ExpertCall unpack_experts(PackedOptions& packed);
ExpertCall unpack_routed_experts(PackedOptions packed);

/// RouterOptions of options.py, with its tensor.
sonicmoe::RouterOptions unpack_router(PackedOptions& packed, const Views& views,
                                      const OptionalTensor& selection_bias);

/// RoundingOptions of options.py, with its tensor.
sonicmoe::RoundingOptions unpack_rounding(PackedOptions& packed, const Views& views,
                                          const OptionalTensor& seed_tensor);

/// LayerOptions of options.py.
struct LayerCall {
  sonicmoe::MoELayerOptions options;
  std::optional<std::size_t> workspace_limit;
};
LayerCall unpack_layer(PackedOptions packed, const Views& views,
                       const OptionalTensor& selection_bias, const OptionalTensor& seed_tensor);

/// The version of the library, "major.minor.patch".
std::string version();

/// The enumerators of "activation", "gate_up_layout", "scoring" and "policy" (kind 0 to 3): names,
/// integers and traits, "swiglu 0 gated,geglu 1 gated,...". Traits of a scoring: "renormalizes"
/// (always), "biased" (takes a selection bias and groups).
std::string enum_names(std::int64_t kind);

/// sonicmoe::backends(), one line each: name, "1" or "0" for available, reason; tabs between.
std::string backend_list();

}  // namespace sonicmoe_torch
