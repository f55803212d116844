// The oracle against closed forms and against central differences of its own forward: what every
// other test rests on.
#include <gtest/gtest.h>

#include <cmath>
#include <functional>

#include "oracle/activation.hpp"
#include "oracle/experts.hpp"
#include "oracle/router.hpp"
#include "rig/compare.hpp"
#include "rig/moe_case.hpp"

namespace sonicmoe::rig {
namespace {

using oracle::Problem;

TEST(OracleClosedForm, IdentityWeightsGiveTheActivationOfX) {
  // E = K = 1, W1 = W2 = identity, weight 1: O = relu(X).
  const std::int64_t T = 3, d = 4;
  const std::vector<float> x = {1, -2, 3, -4, 0.5f, 0, -0.25f, 8, -1, -1, 2, 2};
  std::vector<float> identity(16, 0.0f);
  for (std::size_t i = 0; i < 4; ++i) identity[5 * i] = 1.0f;
  const std::vector<std::int32_t> ids(3, 0);
  const std::vector<float> ones(3, 1.0f);
  ExpertOptions options;
  options.activation = Activation::kReLU;
  const Problem problem{options,
                        ConstTensorView(x.data(), DType::kFloat32, {T, d}),
                        {ConstTensorView(identity.data(), DType::kFloat32, {1, d, d}),
                         {},
                         ConstTensorView(identity.data(), DType::kFloat32, {1, d, d}),
                         {}},
                        TopKRouting{ConstTensorView(ids.data(), DType::kInt32, {T, 1}),
                                    ConstTensorView(ones.data(), DType::kFloat32, {T, 1})}};
  const auto result = oracle::forward(problem);
  for (std::size_t i = 0; i < x.size(); ++i) EXPECT_EQ(result.out[i], std::max(x[i], 0.0f));

  // dO = 1: dX = relu'(X), dW2[k, j] = sum_t relu(x[t, j]), dS[t] = sum_k relu(x[t, k]).
  const std::vector<float> d_out(12, 1.0f);
  const auto gradient = oracle::backward(problem, result.rows, result.h,
                                         ConstTensorView(d_out.data(), DType::kFloat32, {T, d}));
  for (std::size_t i = 0; i < x.size(); ++i) EXPECT_EQ(gradient.grad_x[i], x[i] > 0 ? 1.0 : 0.0);
  for (std::size_t k = 0; k < 4; ++k) {
    for (std::size_t j = 0; j < 4; ++j) {
      double sum = 0;
      for (std::size_t t = 0; t < 3; ++t) sum += std::max(x[4 * t + j], 0.0f);
      EXPECT_EQ(gradient.grad_w2[4 * k + j], sum);
    }
  }
  EXPECT_EQ(gradient.grad_routing_weights, (std::vector<double>{4.0, 8.5, 4.0}));
}

TEST(OracleClosedForm, EqualExpertsWithWeightsThatSumToOneAreADenseMlp) {
  MoECase c;
  c.num_experts = 3;
  c.top_k = 3;
  const MoEInputs inputs(host_target(), c);
  // Every expert gets the parameters of expert 0; weights 0.5, 0.25, 0.25.
  Tensor w1 = Tensor(host_target(), c.dtype, {3, c.h_columns(), c.hidden_size});
  Tensor w2 = Tensor(host_target(), c.dtype, {3, c.hidden_size, c.intermediate_size});
  const auto repeat = [](const Tensor& from, Tensor& to) {
    std::vector<double> values = from.values();
    const std::size_t one = values.size() / 3;
    for (std::size_t i = one; i < values.size(); ++i) values[i] = values[i - one];
    to.fill(values);
  };
  repeat(inputs.w1, w1);
  repeat(inputs.w2, w2);
  Problem problem = inputs.problem();
  problem.weights = {w1.view(), {}, w2.view(), {}};
  Tensor weights(host_target(), DType::kFloat32, {c.num_tokens, 3});
  std::vector<double> thirds;
  for (std::int64_t t = 0; t < c.num_tokens; ++t) thirds.insert(thirds.end(), {0.5, 0.25, 0.25});
  weights.fill(thirds);
  std::get<TopKRouting>(problem.routing).topk_weights = weights.view();
  const auto result = oracle::forward(problem);

  const std::vector<double> x = inputs.x.values(), m1 = w1.values(), m2 = w2.values();
  const auto d = static_cast<std::size_t>(c.hidden_size),
             n = static_cast<std::size_t>(c.intermediate_size);
  for (std::size_t t = 0; t < static_cast<std::size_t>(c.num_tokens); ++t) {
    std::vector<double> hidden(n);
    for (std::size_t j = 0; j < n; ++j) {
      double gate = 0, up = 0;
      for (std::size_t k = 0; k < d; ++k) {
        gate += x[t * d + k] * m1[j * d + k];
        up += x[t * d + k] * m1[(n + j) * d + k];
      }
      hidden[j] = gate / (1.0 + std::exp(-gate)) * up;
    }
    for (std::size_t k = 0; k < d; ++k) {
      double y = 0;
      for (std::size_t j = 0; j < n; ++j) y += hidden[j] * m2[k * n + j];
      EXPECT_NEAR(result.out[t * d + k], y, 1e-13);
    }
  }
}

TEST(OracleClosedForm, SumsPairsOfATokenAndSkipsDroppedOnes) {
  // d = n = 1, relu, W1 = 1, W2[e] = 10^e, b2[e] = e + 1: Y = relu(x) 10^e + e + 1.
  const std::vector<float> x = {2, 3}, w1 = {1, 1, 1}, w2 = {1, 10, 100}, b2 = {1, 2, 3};
  const std::vector<std::int64_t> tokens = {1, 0, 0, 2, 0, 1, -1, 0};
  const std::vector<std::int64_t> experts = {2, 0, 2, 1, 3, 2, 0, -1};
  const std::vector<float> weights = {1, 0.5f, 2, 7, 7, 4, 7, 7};
  ExpertOptions options;
  options.activation = Activation::kReLU;
  const Problem problem{options,
                        ConstTensorView(x.data(), DType::kFloat32, {2, 1}),
                        {ConstTensorView(w1.data(), DType::kFloat32, {3, 1, 1}),
                         {},
                         ConstTensorView(w2.data(), DType::kFloat32, {3, 1, 1}),
                         ConstTensorView(b2.data(), DType::kFloat32, {3, 1})},
                        PairRouting{ConstTensorView(tokens.data(), DType::kInt64, {8}),
                                    ConstTensorView(experts.data(), DType::kInt64, {8}),
                                    ConstTensorView(weights.data(), DType::kFloat32, {8})}};
  const auto result = oracle::forward(problem);
  ASSERT_EQ(result.rows.size(), 4u);
  EXPECT_EQ(result.rows[0].position, 1);  // expert 0
  EXPECT_EQ(result.rows[1].position, 0);  // expert 2, in input order
  EXPECT_EQ(result.rows[2].position, 2);
  EXPECT_EQ(result.rows[3].position, 5);
  EXPECT_EQ(result.out, (std::vector<double>{0.5 * 3 + 2 * 203, (1 + 4) * 303.0}));
  const std::vector<float> d_out = {1, 10};
  const auto gradient = oracle::backward(problem, result.rows, result.h,
                                         ConstTensorView(d_out.data(), DType::kFloat32, {2, 1}));
  EXPECT_EQ(gradient.grad_routing_weights, (std::vector<double>{3030, 3, 203, 0, 0, 3030, 0, 0}));
  EXPECT_EQ(gradient.grad_b2, (std::vector<double>{0.5, 0, 2 + 50}));
  EXPECT_EQ(gradient.grad_w2, (std::vector<double>{0.5 * 2, 0, 2 * 2 + 50 * 3}));
  EXPECT_EQ(gradient.grad_x, (std::vector<double>{0.5 + 200, 10 * 5 * 100}));
}

TEST(OracleClosedForm, SortedRowsGiveOneOutputRowEachAndZeroPastTheEnd) {
  const float nan = std::nanf("");
  const std::vector<float> x = {1, 2, 3, nan}, w1 = {1, 2}, w2 = {3, 5};
  const std::vector<std::int32_t> ends = {1, 3};
  const std::vector<float> weights = {1, 2, 0.5f, nan};
  ExpertOptions options;
  options.activation = Activation::kReLUSquared;
  const Problem problem{options,
                        ConstTensorView(x.data(), DType::kFloat32, {4, 1}),
                        {ConstTensorView(w1.data(), DType::kFloat32, {2, 1, 1}),
                         {},
                         ConstTensorView(w2.data(), DType::kFloat32, {2, 1, 1}),
                         {}},
                        SortedRouting{ConstTensorView(ends.data(), DType::kInt32, {2}),
                                      ConstTensorView(weights.data(), DType::kFloat32, {4})}};
  const auto result = oracle::forward(problem);
  EXPECT_EQ(result.out, (std::vector<double>{3, 2 * 5 * 16, 0.5 * 5 * 36, 0}));
}

TEST(OracleActivation, ValuesAtKnownPoints) {
  const auto value = [](Activation a, double gate, double up) {
    return oracle::activate({a, GateUpLayout::kConcatenated, 7.0f}, gate, up).value;
  };
  EXPECT_NEAR(value(Activation::kSiLU, 1.0, 0), 0.7310585786300049, 1e-15);
  EXPECT_NEAR(value(Activation::kSwiGLU, 1.0, -2.0), -2 * 0.7310585786300049, 1e-15);
  EXPECT_NEAR(value(Activation::kGELU, 1.0, 0), 0.8413447460685429, 1e-15);
  EXPECT_NEAR(value(Activation::kGeGLU, -1.0, 3.0), -3 * 0.15865525393145707, 1e-15);
  EXPECT_NEAR(value(Activation::kGELUTanh, 1.0, 0), 0.8411919906082768, 1e-15);
  EXPECT_NEAR(value(Activation::kGeGLUTanh, 1.0, 2.0), 2 * 0.8411919906082768, 1e-15);
  EXPECT_EQ(value(Activation::kReGLU, 2.0, 3.0), 6.0);
  EXPECT_EQ(value(Activation::kReGLU, -2.0, 3.0), 0.0);
  EXPECT_EQ(value(Activation::kReLU, -2.0, 0), 0.0);
  EXPECT_EQ(value(Activation::kReLUSquared, 3.0, 0), 9.0);
  // gpt-oss: both clamped at 7, (7 + 1) * 7 * sigmoid(1.702 * 7).
  EXPECT_NEAR(value(Activation::kSwiGLUClamped, 100.0, 100.0), 56.0 / (1.0 + std::exp(-11.914)),
              1e-12);
  // The gate is clamped from above only: gate -8, up clamped to -7 -> (-7 + 1) * -8 * sigmoid.
  EXPECT_NEAR(value(Activation::kSwiGLUClamped, -8.0, -50.0), 48.0 / (1.0 + std::exp(1.702 * 8)),
              1e-12);
}

TEST(OracleActivation, GradientsAtKinksFollowTorch) {
  const ExpertOptions clamped{Activation::kSwiGLUClamped, GateUpLayout::kConcatenated, 1.0f};
  EXPECT_NE(oracle::activate(clamped, 1.0, 0.5).d_gate, 0.0);  // closed interval
  EXPECT_EQ(oracle::activate(clamped, 1.0001, 0.5).d_gate, 0.0);
  EXPECT_NE(oracle::activate(clamped, 0.5, -1.0).d_up, 0.0);
  EXPECT_NE(oracle::activate(clamped, 0.5, 1.0).d_up, 0.0);
  EXPECT_EQ(oracle::activate(clamped, 0.5, 1.0001).d_up, 0.0);
  EXPECT_EQ(oracle::activate({Activation::kReLU}, 0.0, 0.0).d_gate, 0.0);
  EXPECT_EQ(oracle::activate({Activation::kReGLU}, 0.0, 2.0).d_gate, 0.0);
}

// ------------------------------------------------------------------------- finite differences

// sum(out * grad_out) of the case with element `index` of one input moved by `step`. Inputs are
// float32, so the moved input is replaced by a float64-exact pair: the step is a power of two and
// the value has few bits (see coarse()).
double loss(const MoEInputs& inputs) {
  const auto out = oracle::forward(inputs.problem()).out;
  const std::vector<double> weight = inputs.grad_out.values();
  double sum = 0;
  for (std::size_t i = 0; i < out.size(); ++i) {
    if (!std::isnan(weight[i])) sum += out[i] * weight[i];
  }
  return sum;
}

// Rounds to multiples of 2^-8, so that moving an element by 2^-12 is exact in float32.
void coarsen(Tensor& tensor) {
  if (!tensor.defined()) return;
  std::vector<double> values = tensor.values();
  for (double& value : values) {
    if (!std::isnan(value)) value = (std::round(value * 256.0) + 0.25) / 256.0;
  }
  tensor.fill(values);
}

void check_gradient(const char* name, MoEInputs& inputs, Tensor& input,
                    const std::vector<double>& gradient) {
  if (!input.defined()) return;
  constexpr double kStep = 0x1p-12;
  const std::vector<double> values = input.values();
  ASSERT_EQ(values.size(), gradient.size()) << name;
  const double scale = max_abs(gradient);
  ASSERT_GT(scale, 0.0) << name;
  const std::size_t stride = std::max<std::size_t>(1, values.size() / 40);
  for (std::size_t i = 0; i < values.size(); i += stride) {
    if (std::isnan(values[i])) continue;
    std::vector<double> moved = values;
    moved[i] = values[i] + kStep;
    input.fill(moved);
    const double above = loss(inputs);
    moved[i] = values[i] - kStep;
    input.fill(moved);
    const double below = loss(inputs);
    // O(step^2) with third derivatives of order one, times the sums over d and n.
    EXPECT_NEAR((above - below) / (2 * kStep), gradient[i], 2e-5 * scale)
        << name << "[" << i << "]";
  }
  input.fill(values);
}

struct DifferenceCase {
  Activation activation;
  MoEShape::Form form;
  GateUpLayout layout;
  bool biases;
};

class OracleGradient : public ::testing::TestWithParam<DifferenceCase> {};

TEST_P(OracleGradient, MatchesCentralDifferences) {
  MoECase c;
  c.num_tokens = 5;
  c.hidden_size = 4;
  c.intermediate_size = 3;
  c.num_experts = 3;
  c.num_pairs = 9;
  c.tail_rows = 2;
  c.drop_probability = 0.2;
  c.activation = GetParam().activation;
  c.form = GetParam().form;
  c.gate_up_layout = GetParam().layout;
  c.biases = GetParam().biases;
  c.seed = 7;
  MoEInputs inputs(host_target(), c);
  for (Tensor* tensor :
       {&inputs.x, &inputs.w1, &inputs.b1, &inputs.w2, &inputs.b2, &inputs.routing_weights}) {
    coarsen(*tensor);
  }
  const auto forward = oracle::forward(inputs.problem());
  // A central difference across a kink means nothing: stay away from 0 and from +-limit.
  for (const double h : forward.h) {
    ASSERT_GT(std::abs(h), 0.004);
    ASSERT_GT(std::abs(std::abs(h) - static_cast<double>(c.limit)), 0.004);
  }
  const auto gradient =
      oracle::backward(inputs.problem(), forward.rows, forward.h, inputs.grad_out.view());
  check_gradient("x", inputs, inputs.x, gradient.grad_x);
  check_gradient("w1", inputs, inputs.w1, gradient.grad_w1);
  check_gradient("w2", inputs, inputs.w2, gradient.grad_w2);
  check_gradient("b1", inputs, inputs.b1, gradient.grad_b1);
  check_gradient("b2", inputs, inputs.b2, gradient.grad_b2);
  check_gradient("routing_weights", inputs, inputs.routing_weights, gradient.grad_routing_weights);
}

std::vector<DifferenceCase> difference_cases() {
  std::vector<DifferenceCase> cases;
  using Form = MoEShape::Form;
  for (const Activation activation : all_activations()) {
    for (const Form form : {Form::kTopK, Form::kSorted, Form::kPairs}) {
      for (const bool biases : {true, false}) {
        cases.push_back({activation, form, GateUpLayout::kConcatenated, biases});
        if (is_gated(activation) && form == Form::kTopK) {
          cases.push_back({activation, form, GateUpLayout::kInterleaved, biases});
        }
      }
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(All, OracleGradient, ::testing::ValuesIn(difference_cases()),
                         [](const auto& parameter) {
                           const DifferenceCase& c = parameter.param;
                           return std::string(name_of(c.activation)) + "_" +
                                  "ABC"[static_cast<int>(c.form)] + "_" +
                                  std::string(name_of(c.layout)) +
                                  (c.biases ? "_biases" : "_plain");
                         });

// ------------------------------------------------------------------------------- router logits

TEST(OracleRouter, LogitsAndGradientsOfATwoByTwoExample) {
  const std::vector<float> x = {1, 2, 3, 4}, w = {5, 6, 7, 8}, b = {0.5f, -0.5f};
  const ConstTensorView xv(x.data(), DType::kFloat32, {2, 2}),
      wv(w.data(), DType::kFloat32, {2, 2});
  EXPECT_EQ(oracle::router_logits(xv, wv, ConstTensorView(b.data(), DType::kFloat32, {2})),
            (std::vector<double>{17.5, 22.5, 39.5, 52.5}));
  EXPECT_EQ(oracle::router_logits(xv, wv, {}), (std::vector<double>{17, 23, 39, 53}));
  const std::vector<double> g = {1, 10, 100, 1000};
  EXPECT_EQ(oracle::router_grad_x(g, wv), (std::vector<double>{75, 86, 7500, 8600}));
  const auto gradients = oracle::router_gradients(g, 2, xv);
  EXPECT_EQ(gradients.weight, (std::vector<double>{301, 402, 3010, 4020}));
  EXPECT_EQ(gradients.bias, (std::vector<double>{101, 1010}));
}

TEST(OracleStorage, RoundsOnlyWhatItSays) {
  MoECase c;
  c.dtype = DType::kBFloat16;
  const MoEInputs inputs(host_target(), c);
  const auto exact = oracle::forward(inputs.problem());
  const auto hidden = oracle::forward(inputs.problem(), oracle::Storage::kHidden);
  const auto all = oracle::forward(inputs.problem(), oracle::Storage::kAll);
  EXPECT_EQ(hidden.h, all.h);
  EXPECT_NE(exact.h, hidden.h);
  EXPECT_NE(hidden.a, all.a);
  for (std::size_t i = 0; i < exact.h.size(); ++i) {
    EXPECT_EQ(hidden.h[i], oracle::rounded_to(DType::kBFloat16, exact.h[i]));
  }
}

}  // namespace
}  // namespace sonicmoe::rig
