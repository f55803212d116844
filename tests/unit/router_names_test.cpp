// Names of the router's enumerators.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "sonicmoe/error.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {
namespace {

TEST(RouterNames, RoundTripAndListTheLegalOnes) {
  using enum Scoring;
  for (const Scoring scoring : {kTopKSoftmax, kSoftmaxTopK, kSigmoidTopK}) {
    EXPECT_EQ(scoring_from_name(name_of(scoring)), scoring);
  }
  EXPECT_EQ(name_of(kSoftmaxTopK), "softmax_topk");
  using enum RoundingPolicy;
  for (const RoundingPolicy policy :
       {kNearest, kUp, kDown, kStochastic, kBalanced, kNearestScore}) {
    EXPECT_EQ(rounding_policy_from_name(name_of(policy)), policy);
  }
  EXPECT_EQ(name_of(kNearestScore), "nearest_score");
  const auto message = [](auto parse, const char* name) -> std::string {
    try {
      parse(name);
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  EXPECT_THAT(message(scoring_from_name, "softmax"),
              ::testing::HasSubstr("topk_softmax, softmax_topk, sigmoid_topk"));
  EXPECT_THAT(message(rounding_policy_from_name, "Nearest"),
              ::testing::HasSubstr("nearest, up, down, stochastic, balanced, nearest_score"));
}

}  // namespace
}  // namespace sonicmoe
