// Balancing losses and the bias update on every target, against the oracle and cases by hand.
#include "ops/router_fixture.hpp"

namespace sonicmoe::rig {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

constexpr double kSums = 2.5e-7;  // relative: a float32 rounding and a sum in another order

class Balancing : public RouterTest {
 protected:
  RouterResult balancing(const RouterProblem& p, const Values& rows, double grad = 1.0,
                         int threads = 0) const {
    return run_load_balancing_loss(target(), p, rows, grad, threads);
  }
  RouterResult z_loss(const RouterProblem& p, double grad = 1.0, int threads = 0) const {
    return run_router_z_loss(target(), p, grad, threads);
  }
};
INSTANTIATE_TEST_SUITE_P(Targets, Balancing, ::testing::ValuesIn(targets()), target_name);

RouterProblem shifted(std::int64_t num_tokens, std::int64_t num_experts, Scoring scoring,
                      double shift, std::uint64_t seed = 21) {
  RouterProblem p =
      Config{num_tokens, num_experts, std::min<std::int64_t>(3, num_experts), scoring}.problem(
          seed);
  for (double& logit : p.logits) logit = static_cast<float>(logit + shift);
  return p;
}

Values some_rows(std::int64_t num_experts) {
  Values rows;
  for (std::int64_t e = 0; e < num_experts; ++e) {
    rows.push_back(static_cast<double>((e * 37) % 19 + 1));
  }
  return rows;
}

TEST_P(Balancing, LossesMatchTheDefinition) {
  struct Shape {
    std::int64_t num_tokens, num_experts;
  };
  for (const auto& [T, E] : {Shape{1, 2}, Shape{1, 12}, Shape{63, 12}, Shape{64, 12}, Shape{65, 12},
                             Shape{77, 5}, Shape{1000, 32}, Shape{333, 129}, Shape{4100, 256}}) {
    for (const Scoring scoring : kScorings) {
      for (const double shift : {0.0, -60.0, 30.0, -1000.0}) {
        const RouterProblem p = shifted(T, E, scoring, shift);
        SCOPED_TRACE(p.describe() + " shift " + std::to_string(shift));
        EXPECT_THAT(differences(z_loss(p, 0.5), expected_router_z_loss(p, 0.5), kSums), IsEmpty());
        RouterResult actual = balancing(p, some_rows(E), 3.0);
        RouterResult expected = expected_load_balancing_loss(p, some_rows(E), 3.0);
        EXPECT_GT(expected.loss[0], 0.0);
        if (scoring == Scoring::kSigmoidTopK && shift > 0) {  // the gradient vanishes
          actual.grad_logits = expected.grad_logits = {};
        }
        EXPECT_THAT(differences(actual, expected, kSums), IsEmpty());
      }
    }
  }
}

TEST_P(Balancing, UniformRoutingGivesOne) {
  for (const Scoring scoring : kScorings) {
    const RouterProblem p = shifted(40, 8, scoring, 0.0);
    const RouterResult result = balancing(p, Values(8, 40 * 3 / 8));
    EXPECT_FLOAT_EQ(static_cast<float>(result.loss[0]), 1.0f);
    for (const double value : result.grad_logits) EXPECT_NEAR(value, 0.0, 1e-9);
  }
}

TEST_P(Balancing, OneExpertTakingAllGivesE) {
  for (const Scoring scoring : kScorings) {
    RouterProblem p = shifted(10, 4, scoring, 0.0);
    for (std::size_t i = 0; i < p.logits.size(); ++i) p.logits[i] = i % 4 == 1 ? 60.0 : -60.0;
    EXPECT_NEAR(balancing(p, {0, 10 * 3, 0, 0}).loss[0], 4.0, 1e-5);
  }
}

TEST_P(Balancing, SameBitsForEveryThreadCount) {
  for (const Scoring scoring : kScorings) {
    const RouterProblem p = shifted(1000, 10, scoring, 0.0);
    const RouterResult loss = balancing(p, some_rows(10), 0.5, 1), z = z_loss(p, 0.5, 1);
    for (const int threads : {1, 2, 3}) {
      EXPECT_EQ(balancing(p, some_rows(10), 0.5, threads).loss, loss.loss);
      EXPECT_EQ(balancing(p, some_rows(10), 0.5, threads).grad_logits, loss.grad_logits);
      EXPECT_EQ(z_loss(p, 0.5, threads).loss, z.loss);
      EXPECT_EQ(z_loss(p, 0.5, threads).grad_logits, z.grad_logits);
    }
  }
}

TEST_P(Balancing, NoTokens) {
  for (const Scoring scoring : kScorings) {
    const RouterProblem p = shifted(0, 5, scoring, 0.0);
    EXPECT_EQ(balancing(p, some_rows(5)).loss, Values{0.0});
    EXPECT_EQ(z_loss(p).loss, Values{0.0});
  }
}

TEST_P(Balancing, LargeLogitsStayFinite) {
  for (const Scoring scoring : kScorings) {
    for (const double shift : {-3000.0, -650.0, 650.0, 3000.0}) {
      const RouterProblem p = shifted(6, 4, scoring, shift);
      const RouterResult result = balancing(p, some_rows(4));
      EXPECT_TRUE(std::isfinite(result.loss[0]));
      EXPECT_GT(result.loss[0], 0.0);
      for (const double value : result.grad_logits) EXPECT_TRUE(std::isfinite(value));
      EXPECT_NEAR(z_loss(p).loss[0], shift * shift, 0.01 * shift * shift);
    }
  }
}

// Far below zero sigmoid is exp, so both shares are the same.
TEST_P(Balancing, SigmoidIsTheSoftmaxWhereEverySigmoidIsTiny) {
  const RouterProblem sigmoid = shifted(6, 4, Scoring::kSigmoidTopK, -700.0);
  RouterProblem softmax = sigmoid;
  softmax.options.scoring = Scoring::kSoftmaxTopK;
  const RouterResult a = balancing(sigmoid, some_rows(4)), b = balancing(softmax, some_rows(4));
  EXPECT_EQ(a.loss, b.loss);
  EXPECT_EQ(a.grad_logits, b.grad_logits);
  EXPECT_GT(std::abs(a.grad_logits[0]), 0.0);
}

TEST_P(Balancing, ZLossByHand) {
  RouterProblem p = shifted(2, 4, Scoring::kSoftmaxTopK, 0.0);
  p.logits = {0, 0, 0, 0, 1, 1, 1, 1};
  const double log4 = std::log(4.0);
  EXPECT_FLOAT_EQ(static_cast<float>(z_loss(p).loss[0]),
                  static_cast<float>((log4 * log4 + (1 + log4) * (1 + log4)) / 2));
}

TEST_P(Balancing, TheBiasMovesAgainstTheSignOfTheExcess) {
  const auto updated = [&](const Values& bias, const Values& rows, float rate) {
    return run_update_expert_bias(target(), bias, rows, rate);
  };
  // The mean is 3: below, at, above.
  EXPECT_THAT(updated({1.0, -2.0, 0.5}, {0, 3, 6}, 0.25f), ElementsAre(1.25, -2.0, 0.25));
  // A mean of 4/3 equals no count.
  EXPECT_THAT(updated({0.0, 0.0, 0.0}, {1, 1, 2}, 0.5f), ElementsAre(0.5, 0.5, -0.5));
  EXPECT_THAT(updated({0.25}, {9}, 0.5f), ElementsAre(0.25));
  // Counts whose sum exceeds int32.
  EXPECT_THAT(updated({0, 0, 0}, {2e9, 2e9, 1999999997}, 1.0f), ElementsAre(-1.0, -1.0, 1.0));
}

}  // namespace
}  // namespace sonicmoe::rig
