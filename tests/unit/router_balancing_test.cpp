// Balancing losses and the bias update against naive float64 formulas and finite differences.
#include "router_test_support.hpp"

namespace sonicmoe::router_test {
namespace {

constexpr std::int64_t kTopK = 3;

struct Losses {
  std::int64_t num_tokens, num_experts;
  Scoring scoring = Scoring::kSoftmaxTopK;
  std::vector<float> logits;
  std::vector<std::int32_t> rows;

  Losses(std::int64_t tokens, std::int64_t experts, Scoring chosen, std::uint64_t seed = 1)
      : num_tokens(tokens),
        num_experts(experts),
        scoring(chosen),
        logits(random_floats(tokens * experts, seed, 1.5)),
        rows(at(experts)) {
    for (std::int64_t e = 0; e < experts; ++e) rows[at(e)] = static_cast<std::int32_t>(e * 7 % 11);
  }
  float balancing(int threads = 2) const {
    const Buffer<float> in(logits, {num_tokens, num_experts});
    const Buffer<std::int32_t> counts(rows, {num_experts});
    const Buffer<float> loss({1});
    load_balancing_loss_forward(context(threads), scoring, kTopK, in.view(), counts.view(),
                                loss.view());
    return loss.values()[0];
  }
  std::vector<float> balancing_grad(float grad_loss, int threads = 2) const {
    const Buffer<float> in(logits, {num_tokens, num_experts});
    const Buffer<std::int32_t> counts(rows, {num_experts});
    const Buffer<float> grad({grad_loss}, {1});
    const Buffer<float> out({num_tokens, num_experts});
    load_balancing_loss_backward(context(threads), scoring, kTopK, in.view(), counts.view(),
                                 grad.view(), out.view());
    return out.values();
  }
  float z_loss(int threads = 2) const {
    const Buffer<float> in(logits, {num_tokens, num_experts});
    const Buffer<float> loss({1});
    router_z_loss_forward(context(threads), in.view(), loss.view());
    return loss.values()[0];
  }
  std::vector<float> z_loss_grad(float grad_loss, int threads = 2) const {
    const Buffer<float> in(logits, {num_tokens, num_experts});
    const Buffer<float> grad({grad_loss}, {1});
    const Buffer<float> out({num_tokens, num_experts});
    router_z_loss_backward(context(threads), in.view(), grad.view(), out.view());
    return out.values();
  }
  std::vector<double> doubles() const { return {logits.begin(), logits.end()}; }

  // The formulas of docs/ops/balancing.md.
  double naive_balancing(const std::vector<double>& values) const {
    std::vector<double> p(at(num_experts));
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      const auto begin = values.begin() + t * num_experts;
      const std::vector<double> scores =
          naive_scores(scoring, std::vector<double>(begin, begin + num_experts));
      const double sum = std::accumulate(scores.begin(), scores.end(), 0.0);
      for (std::size_t e = 0; e < p.size(); ++e) {
        p[e] += scores[e] / sum / static_cast<double>(num_tokens);
      }
    }
    double loss = 0.0;
    for (std::size_t e = 0; e < p.size(); ++e) {
      loss += static_cast<double>(num_experts) * rows[e] / static_cast<double>(num_tokens * kTopK) *
              p[e];
    }
    return loss;
  }
  double naive_z_loss(const std::vector<double>& values) const {
    double loss = 0.0;
    for (std::int64_t t = 0; t < num_tokens; ++t) {
      double sum = 0.0;
      for (std::int64_t e = 0; e < num_experts; ++e)
        sum += std::exp(values[at(t * num_experts + e)]);
      loss += std::log(sum) * std::log(sum) / static_cast<double>(num_tokens);
    }
    return loss;
  }
};

class Balancing : public ::testing::TestWithParam<Scoring> {};
INSTANTIATE_TEST_SUITE_P(All, Balancing,
                         ::testing::Values(Scoring::kTopKSoftmax, Scoring::kSoftmaxTopK,
                                           Scoring::kSigmoidTopK),
                         [](const auto& tested) { return std::string(name_of(tested.param)); });

TEST_P(Balancing, LossMatchesTheFormula) {
  for (std::uint64_t seed = 1; seed <= 5; ++seed) {
    for (const std::int64_t tokens : {1, 2, 63, 64, 65, 300}) {
      const Losses losses(tokens, 12, GetParam(), seed);
      const double expected = losses.naive_balancing(losses.doubles());
      EXPECT_GT(expected, 0.0);
      EXPECT_NEAR(losses.balancing(), expected, kFloatTolerance * expected);
    }
  }
}

TEST_P(Balancing, GradientMatchesFiniteDifferences) {
  const Losses losses(17, 9, GetParam());
  const std::vector<double> expected = finite_differences(
      losses.doubles(), [&](const auto& values) { return 3 * losses.naive_balancing(values); });
  EXPECT_TRUE(close(losses.balancing_grad(3.0f), expected, 1e-6));
}

TEST_P(Balancing, UniformRoutingGivesOne) {
  Losses losses(40, 8, GetParam());
  losses.rows.assign(8, 40 * kTopK / 8);
  EXPECT_FLOAT_EQ(losses.balancing(), 1.0f);
  for (const float value : losses.balancing_grad(1.0f)) EXPECT_NEAR(value, 0.0f, 1e-9f);
}

TEST_P(Balancing, OneExpertTakingAllGivesE) {
  Losses losses(10, 4, GetParam());
  losses.rows = {0, 10 * kTopK, 0, 0};
  for (std::size_t i = 0; i < losses.logits.size(); ++i)
    losses.logits[i] = i % 4 == 1 ? 60.0f : -60.0f;
  EXPECT_NEAR(losses.balancing(), 4.0f, 1e-5f);
}

TEST_P(Balancing, SameBitsForEveryThreadCount) {
  const Losses losses(1000, 10, GetParam());
  for (const int threads : {2, 3}) {
    EXPECT_EQ(losses.balancing(threads), losses.balancing(1));
    EXPECT_EQ(losses.balancing_grad(0.5f, threads), losses.balancing_grad(0.5f, 1));
    EXPECT_EQ(losses.z_loss(threads), losses.z_loss(1));
    EXPECT_EQ(losses.z_loss_grad(0.5f, threads), losses.z_loss_grad(0.5f, 1));
  }
}

TEST_P(Balancing, NoTokens) {
  const Losses losses(0, 5, GetParam());
  EXPECT_EQ(losses.balancing(), 0.0f);
  EXPECT_EQ(losses.z_loss(), 0.0f);
  EXPECT_TRUE(losses.balancing_grad(1.0f).empty());
  EXPECT_TRUE(losses.z_loss_grad(1.0f).empty());
}

TEST_P(Balancing, LargeLogitsStayFinite) {
  for (const float shift : {-3000.0f, -650.0f, 650.0f, 3000.0f}) {
    Losses losses(6, 4, GetParam());
    for (float& logit : losses.logits) logit += shift;
    EXPECT_TRUE(std::isfinite(losses.balancing()));
    EXPECT_GT(losses.balancing(), 0.0f);
    for (const float value : losses.balancing_grad(1.0f)) EXPECT_TRUE(std::isfinite(value));
    EXPECT_NEAR(losses.z_loss(), shift * shift, 0.01f * shift * shift);
  }
}

// Far below zero sigmoid is exp, so both shares are the same.
TEST(BalancingSigmoid, IsTheSoftmaxWhereEverySigmoidIsTiny) {
  Losses sigmoid(6, 4, Scoring::kSigmoidTopK);
  for (float& logit : sigmoid.logits) logit -= 700.0f;
  Losses softmax = sigmoid;
  softmax.scoring = Scoring::kSoftmaxTopK;
  EXPECT_EQ(sigmoid.balancing(), softmax.balancing());
  EXPECT_EQ(sigmoid.balancing_grad(1.0f), softmax.balancing_grad(1.0f));
  EXPECT_GT(std::abs(sigmoid.balancing_grad(1.0f)[0]), 0.0f);
}

TEST(ZLoss, MatchesTheFormulaAndFiniteDifferences) {
  for (const std::int64_t tokens : {1, 64, 65, 129}) {
    const Losses losses(tokens, 7, Scoring::kSoftmaxTopK, 4);
    const double expected = losses.naive_z_loss(losses.doubles());
    EXPECT_NEAR(losses.z_loss(), expected, kFloatTolerance * expected);
    const std::vector<double> gradient = finite_differences(
        losses.doubles(), [&](const auto& values) { return -2 * losses.naive_z_loss(values); });
    EXPECT_TRUE(close(losses.z_loss_grad(-2.0f), gradient, 1e-6));
  }
}

TEST(ZLoss, ByHand) {
  Losses losses(2, 4, Scoring::kSoftmaxTopK);
  losses.logits = {0, 0, 0, 0, 1, 1, 1, 1};
  const double log4 = std::log(4.0);
  EXPECT_FLOAT_EQ(losses.z_loss(), static_cast<float>((log4 * log4 + (1 + log4) * (1 + log4)) / 2));
}

std::vector<float> updated(std::vector<float> bias, const std::vector<std::int32_t>& rows,
                           float rate) {
  const auto experts = static_cast<std::int64_t>(bias.size());
  const Buffer<float> values(bias, {experts});
  const Buffer<std::int32_t> counts(rows, {experts});
  update_expert_bias(context(), values.view(), counts.view(), rate);
  return values.values();
}

TEST(ExpertBias, MovesAgainstTheSignOfTheExcess) {
  // The mean is 3: below, at, above.
  EXPECT_THAT(updated({1.0f, -2.0f, 0.5f}, {0, 3, 6}, 0.25f),
              ::testing::ElementsAre(1.25f, -2.0f, 0.25f));
  // A mean of 4/3 equals no count.
  EXPECT_THAT(updated({0.0f, 0.0f, 0.0f}, {1, 1, 2}, 0.5f),
              ::testing::ElementsAre(0.5f, 0.5f, -0.5f));
  EXPECT_THAT(updated({0.25f}, {9}, 0.5f), ::testing::ElementsAre(0.25f));
  // Counts whose sum exceeds int32.
  EXPECT_THAT(updated({0, 0, 0}, {2000000000, 2000000000, 1999999997}, 1.0f),
              ::testing::ElementsAre(-1.0f, -1.0f, 1.0f));
}

TEST(BalancingErrors, ShapesAndDtypes) {
  const Buffer<float> logits(random_floats(12, 1), {3, 4});
  const Buffer<float> grad({3, 4});
  const Buffer<std::int32_t> rows({1, 2, 3, 0}, {4});
  const Buffer<float> one({1.0f}, {1});
  const Buffer<float> bias({0, 0, 0, 0}, {4});
  const Scoring scoring = Scoring::kSoftmaxTopK;
  const auto forward = [&](std::int64_t k, ConstTensorView in, ConstTensorView counts,
                           TensorView loss) {
    load_balancing_loss_forward(context(), scoring, k, in, counts, loss);
  };
  EXPECT_NO_THROW(forward(2, logits.view(), rows.view(), one.view()));
  error_of("top_k", [&] { forward(0, logits.view(), rows.view(), one.view()); });
  error_of("top_k", [&] { forward(5, logits.view(), rows.view(), one.view()); });
  error_of("logits", [&] { forward(2, {}, rows.view(), one.view()); });
  error_of("logits", [&] { forward(2, rows.view(), rows.view(), one.view()); });
  error_of("rows_per_expert", [&] { forward(2, logits.view(), bias.view(), one.view()); });
  error_of("rows_per_expert",
           [&] { forward(2, logits.view(), rows.reshaped({2, 2}), one.view()); });
  error_of("loss", [&] { forward(2, logits.view(), rows.view(), bias.view()); });
  const auto backward = [&](ConstTensorView grad_loss, TensorView grad_logits) {
    load_balancing_loss_backward(context(), scoring, 2, logits.view(), rows.view(), grad_loss,
                                 grad_logits);
  };
  EXPECT_NO_THROW(backward(one.view(), grad.view()));
  error_of("grad_loss", [&] { backward(bias.view(), grad.view()); });
  error_of("grad_logits", [&] { backward(one.view(), grad.reshaped({4, 3})); });
  error_of("logits", [&] { router_z_loss_forward(context(), bias.view(), one.view()); });
  error_of("loss", [&] { router_z_loss_forward(context(), logits.view(), bias.view()); });
  error_of("grad_loss",
           [&] { router_z_loss_backward(context(), logits.view(), bias.view(), grad.view()); });
  error_of("grad_logits",
           [&] { router_z_loss_backward(context(), logits.view(), one.view(), bias.view()); });
  error_of("bias", [&] { update_expert_bias(context(), grad.view(), rows.view(), 1.0f); });
  error_of("rows_per_expert",
           [&] { update_expert_bias(context(), bias.view(), bias.view(), 1.0f); });
}

}  // namespace
}  // namespace sonicmoe::router_test
