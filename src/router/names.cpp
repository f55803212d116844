#include "core/names.hpp"

#include "sonicmoe/router.hpp"

namespace sonicmoe {
namespace {

constexpr Name<RoundingPolicy> kPolicies[] = {
    {RoundingPolicy::kNearest, "nearest"},   {RoundingPolicy::kUp, "up"},
    {RoundingPolicy::kDown, "down"},         {RoundingPolicy::kStochastic, "stochastic"},
    {RoundingPolicy::kBalanced, "balanced"}, {RoundingPolicy::kNearestScore, "nearest_score"},
};

constexpr auto kAllScorings = values_of(kScorings);
constexpr auto kAllPolicies = values_of(kPolicies);

}  // namespace

std::string_view name_of(Scoring scoring) noexcept { return find_name(kScorings, scoring); }

std::string_view name_of(RoundingPolicy policy) noexcept { return find_name(kPolicies, policy); }

Scoring scoring_from_name(std::string_view name) { return find_value(kScorings, "scoring", name); }

RoundingPolicy rounding_policy_from_name(std::string_view name) {
  return find_value(kPolicies, "policy", name);
}

std::span<const Scoring> all_scorings() noexcept { return kAllScorings; }

std::span<const RoundingPolicy> all_rounding_policies() noexcept { return kAllPolicies; }

}  // namespace sonicmoe
