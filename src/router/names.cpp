#include "core/names.hpp"

#include <array>

#include "sonicmoe/router.hpp"

namespace sonicmoe {
namespace {

constexpr std::array<std::pair<Scoring, std::string_view>, 3> kScorings{{
    {Scoring::kTopKSoftmax, "topk_softmax"},
    {Scoring::kSoftmaxTopK, "softmax_topk"},
    {Scoring::kSigmoidTopK, "sigmoid_topk"},
}};

constexpr std::array<std::pair<RoundingPolicy, std::string_view>, 6> kPolicies{{
    {RoundingPolicy::kNearest, "nearest"},
    {RoundingPolicy::kUp, "up"},
    {RoundingPolicy::kDown, "down"},
    {RoundingPolicy::kStochastic, "stochastic"},
    {RoundingPolicy::kBalanced, "balanced"},
    {RoundingPolicy::kNearestScore, "nearest_score"},
}};

}  // namespace

std::string_view name_of(Scoring scoring) noexcept {
  return find_name<Scoring>(kScorings, scoring);
}
std::string_view name_of(RoundingPolicy policy) noexcept {
  return find_name<RoundingPolicy>(kPolicies, policy);
}
Scoring scoring_from_name(std::string_view name) {
  return find_value<Scoring>(kScorings, "scoring", name);
}
RoundingPolicy rounding_policy_from_name(std::string_view name) {
  return find_value<RoundingPolicy>(kPolicies, "policy", name);
}

}  // namespace sonicmoe
