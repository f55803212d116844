// Names and integers of the enumerations: both are stored, in configurations and exported graphs.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <optional>
#include <span>
#include <string>
#include <vector>

#include "sonicmoe/activation.hpp"
#include "sonicmoe/error.hpp"
#include "sonicmoe/router.hpp"

namespace sonicmoe {
namespace {

using Names = std::vector<std::string>;

template <class Enum>
Names names_of(std::span<const Enum> all) {
  Names names;
  for (const Enum value : all) {
    EXPECT_EQ(static_cast<std::size_t>(value), names.size());  // the integer is the place
    names.emplace_back(name_of(value));
  }
  EXPECT_EQ(name_of(static_cast<Enum>(names.size())), "?");
  EXPECT_EQ(name_of(static_cast<Enum>(255)), "?");
  return names;
}

// New ones are added at the end.
TEST(Names, KeepTheirIntegers) {
  EXPECT_EQ(names_of(all_activations()),
            (Names{"swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_clamped", "silu", "gelu",
                   "gelu_tanh", "relu", "relu_squared"}));
  EXPECT_EQ(names_of(all_gate_up_layouts()), (Names{"concatenated", "interleaved"}));
  EXPECT_EQ(names_of(all_scorings()), (Names{"topk_softmax", "softmax_topk", "sigmoid_topk"}));
  EXPECT_EQ(names_of(all_rounding_policies()),
            (Names{"nearest", "up", "down", "stochastic", "balanced", "nearest_score"}));
}

TEST(Names, LeadBackToTheirEnumerators) {
  for (const Activation a : all_activations()) EXPECT_EQ(activation_from_name(name_of(a)), a);
  for (const GateUpLayout l : all_gate_up_layouts()) {
    EXPECT_EQ(gate_up_layout_from_name(name_of(l)), l);
  }
  for (const Scoring s : all_scorings()) EXPECT_EQ(scoring_from_name(name_of(s)), s);
  for (const RoundingPolicy p : all_rounding_policies()) {
    EXPECT_EQ(rounding_policy_from_name(name_of(p)), p);
  }
}

TEST(Names, AreListedWhereOneIsWrong) {
  try {
    activation_from_name("swish");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), ::testing::HasSubstr("one of swiglu, geglu,"));
    EXPECT_THAT(error.what(), ::testing::HasSubstr("\"swish\""));
  }
}

TEST(Traits, SayWhichActivationsAreGated) {
  EXPECT_TRUE(is_gated(Activation::kSwiGLUClamped));
  EXPECT_FALSE(is_gated(Activation::kSiLU));
  EXPECT_EQ(gate_factor(Activation::kReGLU), 2);
  EXPECT_EQ(gate_factor(Activation::kReLU), 1);
}

TEST(Traits, SayWhichScoringsRenormalise) {
  const auto renormalizes = [](Scoring scoring, std::optional<bool> asked) {
    RouterOptions options;
    options.scoring = scoring;
    options.renormalize = asked;
    return options.renormalizes();
  };
  EXPECT_TRUE(renormalizes(Scoring::kTopKSoftmax, {}));
  EXPECT_FALSE(renormalizes(Scoring::kSoftmaxTopK, {}));
  EXPECT_TRUE(renormalizes(Scoring::kSoftmaxTopK, true));
  EXPECT_TRUE(renormalizes(Scoring::kSigmoidTopK, {}));
  EXPECT_FALSE(renormalizes(Scoring::kSigmoidTopK, false));
}

}  // namespace
}  // namespace sonicmoe
