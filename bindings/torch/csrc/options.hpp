// Operator arguments to the library's option structs. Enumerations travel as the integers of the
// public headers: a string argument would leak one allocation per call in the 2.10 ABI, and the
// package reads the names from the library itself (see enum_names).
#pragma once

#include <string>

#include "convert.hpp"

namespace sonicmoe_torch {

/// How the routing tensors are read: topk_ids [T, K] / offsets [E] / expert_ids [P] + token_ids.
enum class Form : std::int64_t { kTopK = 0, kSorted = 1, kPairs = 2 };

sonicmoe::ExpertOptions expert_options(std::int64_t activation, std::int64_t gate_up_layout,
                                       double limit, bool deterministic);
sonicmoe::RouterOptions router_options(const Views& views, std::int64_t top_k, std::int64_t scoring,
                                       std::optional<bool> renormalize,
                                       const OptionalTensor& selection_bias,
                                       std::int64_t num_groups, std::int64_t top_groups,
                                       double scale);
sonicmoe::RoundingOptions rounding_options(const Views& views, std::int64_t tile,
                                           std::int64_t policy, std::int64_t seed,
                                           const OptionalTensor& seed_tensor);

/// "swiglu,geglu,..." in the order of the integers, for "activation", "gate_up_layout", "scoring"
/// and "policy" (kind 0 to 3).
std::string enum_names(std::int64_t kind);

/// sonicmoe::backends(), one line each: name, "1" or "0" for available, reason; tabs between.
std::string backend_list();

}  // namespace sonicmoe_torch
