// Every tensor and every option of every public operation, made wrong in every way that attacks.hpp
// knows: refused with the argument's name and nothing changed, or computed right.
#include <gtest/gtest.h>

#include <tuple>

#include "rig/operations.hpp"
#include "rig/trial.hpp"

namespace sonicmoe::rig {
namespace {

// ThreadSanitizer takes twenty times as long and looks for races, not for wrong arguments.
#if defined(__SANITIZE_THREAD__)
constexpr std::size_t kStep = 40;
#else
constexpr std::size_t kStep = 1;
#endif

using Parameters = std::tuple<Target, Operation>;

class Arguments : public ::testing::TestWithParam<Parameters> {
 protected:
  void attack_everything(std::uint64_t seed, Optionals optionals) const {
    const auto& [target, operation] = GetParam();
    Trial trial(operation.make(target, seed, optionals));
    ASSERT_EQ(trial.problem(), "");
    const std::vector<Attack> attacks = attacks_on(trial.call());
    ASSERT_GT(attacks.size(), 50u);
    for (std::size_t i = seed % kStep; i < attacks.size(); i += kStep) {
      const Attack& attack = attacks[i];
      EXPECT_EQ(trial.attempt(attack), "")
          << trial.call().operation << ": " << describe(trial.call(), attack);
    }
  }
};

TEST_P(Arguments, WithAllOptionalTensors) { attack_everything(7, Optionals::kAll); }
TEST_P(Arguments, WithoutOptionalTensors) { attack_everything(8, Optionals::kNone); }

INSTANTIATE_TEST_SUITE_P(Backends, Arguments,
                         ::testing::Combine(::testing::ValuesIn(targets()),
                                            ::testing::ValuesIn(all_operations())),
                         [](const auto& test) {
                           return std::get<0>(test.param).backend + "_" +
                                  std::get<1>(test.param).name;
                         });

}  // namespace
}  // namespace sonicmoe::rig
