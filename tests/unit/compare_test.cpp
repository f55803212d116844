// The comparators reject what they exist to reject: zeros, a swapped row, a dropped expert, NaN.
#include "rig/compare.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "rig/layer_run.hpp"
#include "rig/router_run.hpp"
#include "rig/spot_check.hpp"

namespace sonicmoe::rig {
namespace {

const Target& reference_target() { return targets().back(); }

MoECase example(DType dtype) {
  MoECase c;
  c.num_tokens = 37;
  c.hidden_size = 48;
  c.intermediate_size = 32;
  c.dtype = dtype;
  return c;
}

class Comparators : public ::testing::TestWithParam<DType> {
 protected:
  // Whether both comparators that backends are held to object to the spoiled run.
  template <class Spoil>
  void expect_rejected(Spoil spoil) {
    const MoECase c = example(GetParam());
    RunResult run = run_moe(reference_target(), c);
    ASSERT_TRUE(check_run(c, {}, run).empty());
    ASSERT_TRUE(check_run(c, {}, run, Strictness::kTiny).empty());
    spoil(c, run);
    EXPECT_FALSE(check_run(c, {}, run).empty());
    EXPECT_FALSE(check_run(c, {}, run, Strictness::kTiny).empty());
  }
};

using Tensors = std::vector<double> RunResult::*;
constexpr Tensors kTensors[] = {&RunResult::out,
                                &RunResult::grad_x,
                                &RunResult::grad_w1,
                                &RunResult::grad_b1,
                                &RunResult::grad_w2,
                                &RunResult::grad_b2,
                                &RunResult::grad_routing_weights};

TEST_P(Comparators, RejectZerosInAnyTensor) {
  for (const Tensors tensor : kTensors) {
    expect_rejected([&](const MoECase&, RunResult& run) {
      std::fill((run.*tensor).begin(), (run.*tensor).end(), 0.0);
    });
  }
}

TEST_P(Comparators, RejectASwappedRow) {
  for (const Tensors tensor : {&RunResult::out, &RunResult::grad_x}) {
    expect_rejected([&](const MoECase& c, RunResult& run) {
      std::swap_ranges((run.*tensor).begin(), (run.*tensor).begin() + c.hidden_size,
                       (run.*tensor).begin() + c.hidden_size);
    });
  }
}

TEST_P(Comparators, RejectADroppedExpert) {
  for (const Tensors tensor :
       {&RunResult::grad_w1, &RunResult::grad_b1, &RunResult::grad_w2, &RunResult::grad_b2}) {
    expect_rejected([&](const MoECase& c, RunResult& run) {
      auto& values = run.*tensor;
      std::fill_n(values.begin(), values.size() / static_cast<std::size_t>(c.num_experts), 0.0);
    });
  }
}

TEST_P(Comparators, RejectTheOutputWithoutOneExpert) {
  expect_rejected([](const MoECase& c, RunResult& run) {
    // The same layer where expert 0 adds nothing: its pairs get weight 0.
    MoEInputs host(host_target(), c);
    const std::vector<double> ids = host.topk_ids.values();
    std::vector<double> weights = host.routing_weights.values();
    for (std::size_t i = 0; i < ids.size(); ++i) weights[i] = ids[i] == 0 ? 0.0 : weights[i];
    host.routing_weights.fill(weights);
    run.out = oracle::forward(host.problem()).out;
  });
}

TEST_P(Comparators, RejectANaNAMissingElementAndAViolation) {
  expect_rejected([](const MoECase&, RunResult& run) { run.out[5] = std::nan(""); });
  expect_rejected([](const MoECase&, RunResult& run) { run.grad_w1.pop_back(); });
  expect_rejected([](const MoECase&, RunResult& run) { run.violations.push_back("out: test"); });
}

INSTANTIATE_TEST_SUITE_P(Dtypes, Comparators, ::testing::Values(DType::kFloat32, DType::kBFloat16),
                         [](const auto& test) { return std::string(name_of(test.param)); });

TEST_P(Comparators, RejectZerosInAnyTensorOfALayer) {
  LayerCase c;
  c.experts = example(GetParam());
  c.auxiliary = c.router_bias = true;
  LayerRun layer(reference_target(), c);
  layer.forward();
  layer.backward();
  ASSERT_TRUE(check_layer(layer).empty());
  for (Tensor* tensor :
       {&layer.logits, &layer.topk_ids, &layer.rows_per_expert, &layer.routing_weights, &layer.out,
        &layer.grad_x, &layer.grad_router_weight, &layer.grad_router_bias, &layer.grad_w1,
        &layer.grad_b1, &layer.grad_w2, &layer.grad_b2}) {
    const Values values = tensor->values();
    const auto put = [&](const Values& elements) {
      tensor->dtype() == DType::kInt32 ? tensor->fill_ids(Ids(elements.begin(), elements.end()))
                                       : tensor->fill(elements);
    };
    put(Values(values.size(), 0.0));
    EXPECT_FALSE(check_layer(layer).empty()) << tensor->view().describe();
    EXPECT_FALSE(check_layer(layer, Strictness::kTiny).empty()) << tensor->view().describe();
    put(values);
  }
}

TEST(SpotCheckTest, RejectsZerosInAnyTensor) {
  LayerCase c;
  c.experts = example(DType::kFloat32);
  c.experts.biases = false;
  c.experts.values = Numbers::kLarge;
  c.router.scoring = Scoring::kTopKSoftmax;
  LayerRun layer(reference_target(), c);
  layer.forward();
  layer.backward();
  Tensor grad_weights = layer.grad_routing_weights();
  const auto check = [&] {
    return spot_check({layer.inputs, layer.topk_ids, layer.routing_weights, layer.h, layer.out,
                       layer.grad_x, layer.grad_w1, layer.grad_w2, grad_weights,
                       &layer.router_weight, &layer.grad_router_weight});
  };
  ASSERT_TRUE(check().empty()) << check()[0];
  for (Tensor* tensor :
       {&layer.h, &layer.routing_weights, &layer.out, &layer.grad_x, &layer.grad_w1, &layer.grad_w2,
        &grad_weights, &layer.grad_router_weight}) {
    const Values values = tensor->values();
    tensor->fill_constant(0.0);
    EXPECT_FALSE(check().empty()) << tensor->view().describe();
    tensor->fill(values);
  }
}

// Layers of a token or two have results that nearly cancel in about one case of thirty.
TEST(SpotCheckTest, RaisesNoAlarmOfTinyLayersAndRejectsTheirZeros) {
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    MoECase c;
    c.biases = false;
    c.values = Numbers::kLarge;
    c.dtype = seed % 2 == 0 ? DType::kBFloat16 : DType::kFloat32;
    c.num_tokens = 1 + static_cast<std::int64_t>(seed % 3);
    c.hidden_size = c.intermediate_size = 5 + static_cast<std::int64_t>(seed % 29);
    c.num_experts = c.top_k = 1;
    c.seed = seed;
    const Target& target = targets()[seed / 3 % targets().size()];
    const MoEInputs inputs(target, fitted(target, c));
    ExpertsRun run(target, inputs);
    run.forward();
    run.backward();
    const auto check = [&] {
      return spot_check({inputs, inputs.topk_ids, inputs.routing_weights, run.h, run.out,
                         run.grad_x, run.grad_w1, run.grad_w2, run.grad_routing_weights});
    };
    const std::vector<std::string> alarms = check();
    EXPECT_TRUE(alarms.empty()) << "seed " << seed << ": " << alarms.front();
    run.grad_routing_weights.fill_constant(0.0);
    EXPECT_FALSE(check().empty()) << "seed " << seed;
  }
}

TEST(RouterComparator, RejectsZerosNaNsAndSwappedElements) {
  const auto differs = [](const Values& actual, const Values& expected) {
    RouterResult a, e;
    a.weights = actual, e.weights = expected;
    return !differences(a, e).empty();
  };
  const Values expected{0.5, 0.25, 1e-3};
  EXPECT_FALSE(differs({0.5f, 0.25f, 1e-3f}, expected));
  EXPECT_TRUE(differs({0, 0, 0}, expected));
  EXPECT_TRUE(differs({0.5, 0.25, std::nan("")}, expected));
  EXPECT_TRUE(differs({0.25, 0.5, 1e-3}, expected));
  EXPECT_TRUE(differs({0.5, 0.25, 0}, expected));
  EXPECT_TRUE(differs({0.5, 0.25}, expected));
}

TEST(ExactComparator, RejectsOneBit) {
  MoECase c;
  c.values = Numbers::kIntegers;
  c.activation = Activation::kReLU;
  c.hidden_size = 12;
  c.intermediate_size = 6;
  RunResult run = run_moe(reference_target(), c);
  ASSERT_TRUE(check_run_exactly(c, {}, run).empty());
  run.grad_w1[0] += 0x1p-20;
  EXPECT_FALSE(check_run_exactly(c, {}, run).empty());
}

TEST(ExactComparator, RejectsACaseThatIsNotExact) {
  const MoECase c;  // real numbers
  EXPECT_FALSE(check_run_exactly(c, {}, run_moe(reference_target(), c)).empty());
}

TEST(GuardedBuffers, FindWritesBetweenElementsAndIntoInputs) {
  Tensor tensor(host_target(), DType::kFloat32, {3, 5}, Strides::kPadded);
  tensor.fill_constant(1.0);
  EXPECT_EQ(tensor.violation_as_output(), "");
  EXPECT_EQ(tensor.violation_as_input(), "");
  tensor.view().as<float>()[0] = 2.0f;
  EXPECT_EQ(tensor.violation_as_output(), "");
  EXPECT_NE(tensor.violation_as_input(), "");
  tensor.view().as<float>()[5] = 2.0f;  // the gap after the first row
  EXPECT_NE(tensor.violation_as_output(), "");
}

#if !defined(__SANITIZE_ADDRESS__)  // where the write itself already stops the program
TEST(GuardedBuffers, FindWritesOutside) {
  for (const std::ptrdiff_t place : {-1, 10, -256, 265}) {
    const GuardedBuffer buffer(host_target(), 10);
    EXPECT_TRUE(buffer.guards_intact());
    static_cast<std::byte*>(buffer.data())[place] = std::byte{1};
    EXPECT_FALSE(buffer.guards_intact()) << place;
  }
}
#endif

}  // namespace
}  // namespace sonicmoe::rig
