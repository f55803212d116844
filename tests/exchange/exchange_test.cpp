// moe_exchange_forward and moe_exchange_backward: all ranks in one process against the definition,
// bit for bit, and against one process with all experts. On every backend.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <numeric>

#include "rig/exchange_group.hpp"

namespace sonicmoe::rig {
namespace {

// The ranks of a GPU's tests wait for each other's kernels: none may be loaded meanwhile, which
// waits for those that run. Before CUDA starts.
[[maybe_unused]] const bool loads_at_once = setenv("CUDA_MODULE_LOADING", "EAGER", 1) == 0;

// More by SONICMOE_EXCHANGE_CALLS.
int many_calls() {
  const char* text = std::getenv("SONICMOE_EXCHANGE_CALLS");
  return text == nullptr ? 20 : std::atoi(text);
}

ExchangeCase case_of(const Target& target, int num_ranks, DType dtype,
                     Numbers values = Numbers::kRealistic) {
  const bool integers = values == Numbers::kIntegers;
  const bool large = target.device.type == DeviceType::kCuda && !integers;  // sums stay small
  ExchangeCase c;
  c.layer.dtype = dtype;
  c.layer.num_tokens = large ? 403 : 53;
  c.layer.num_experts = 8;
  c.layer.top_k = 3;
  c.layer.hidden_size = large ? 264 : 24;
  c.layer.intermediate_size = large ? 72 : 20;
  c.layer.drop_probability = 0.1;
  c.layer.values = values;
  if (integers) c.layer.activation = Activation::kReGLU;
  c.layer.seed = 70 + static_cast<std::uint64_t>(num_ranks);
  c.layer = fitted(target, c.layer);
  c.tokens = spread_tokens(c.layer.num_tokens, num_ranks);
  return c;
}

// The layer's ids, written by the test.
void set_ids(ExchangeCase& c, const std::function<std::int64_t(std::int64_t, std::int64_t)>& id) {
  c.layer.drop_probability = 0.0;  // no row of x holds NaN
  c.layer.fill = [id](MoEInputs& inputs) {
    std::vector<std::int64_t> ids;
    for (std::int64_t t = 0; t < inputs.description.num_tokens; ++t) {
      for (std::int64_t k = 0; k < inputs.description.top_k; ++k) ids.push_back(id(t, k));
    }
    inputs.topk_ids.fill_ids(ids);
  };
}

void expect_within(const Values& actual, const Values& expected, const Values& bound) {
  ASSERT_EQ(actual.size(), expected.size());
  for (std::size_t i = 0; i < actual.size(); ++i) {
    ASSERT_LE(std::abs(actual[i] - expected[i]), bound[i]) << "element " << i;
  }
}

class ExchangeTest : public ::testing::TestWithParam<Target> {
 protected:
  const Target& target() const { return GetParam(); }

  RunResult run(const ExchangeCase& c, int calls = 1) const {
    ExchangeGroup group(target(), c);
    for (int i = 0; i < calls; ++i) {
      group.forward();
      group.backward();
    }
    EXPECT_THAT(group.violations(), ::testing::IsEmpty());
    return group.result();
  }

  // Everything bit for bit as exchange.hpp defines it.
  RunResult expect_definition(const ExchangeCase& c) const {
    return expect_definition(c, exchange_definition(target(), c));
  }
  RunResult expect_definition(const ExchangeCase& c, const Definition& definition) const {
    SCOPED_TRACE(c.describe());
    const RunResult result = run(c);
    EXPECT_EQ(bitwise_difference(result, definition.result), "");
    EXPECT_EQ(result.rows_dropped, definition.result.rows_dropped);
    return result;
  }

  // And as one process with all experts: gradients of weights and dS bit for bit, out and dX by one
  // rounding of each rank's part.
  void expect_one_process(const ExchangeCase& c) const {
    const Definition definition = exchange_definition(target(), c);
    const RunResult result = expect_definition(c, definition);
    SCOPED_TRACE(c.describe());
    RunOptions options;
    options.num_threads = 1;
    RunResult one = run_moe(target(), c.layer, options);
    expect_within(result.out, one.out, definition.out_bound);
    expect_within(result.grad_x, one.grad_x, definition.grad_x_bound);
    if (c.layer.values != Numbers::kIntegers) {
      one.out = result.out;
      one.grad_x = result.grad_x;
    }
    one.h = result.h;
    one.metadata = result.metadata;
    EXPECT_EQ(bitwise_difference(result, one), "");
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, ExchangeTest, ::testing::ValuesIn(targets()),
                         [](const auto& test) { return test.param.backend; });

TEST_P(ExchangeTest, IsOneProcessOnAllTokens) {
  for (const int ranks : {1, 2, 4, 8}) {
    for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
      expect_one_process(case_of(target(), ranks, dtype));
    }
  }
}

TEST_P(ExchangeTest, SmallIntegersAreExact) {
  for (const int ranks : {2, 8}) {
    expect_one_process(case_of(target(), ranks, DType::kBFloat16, Numbers::kIntegers));
  }
}

TEST_P(ExchangeTest, AllTokensOnOneRank) {
  ExchangeCase c = case_of(target(), 4, DType::kBFloat16);
  set_ids(c, [](std::int64_t, std::int64_t k) { return k % 2; });  // experts 0 and 1, twice
  expect_one_process(c);
}

TEST_P(ExchangeTest, NoRowOnOneRankAndNoTokenOfAnother) {
  ExchangeCase c = case_of(target(), 4, DType::kBFloat16);
  set_ids(c, [](std::int64_t t, std::int64_t k) { return 2 + (t + 2 * k) % 6; });
  c.tokens = {c.layer.num_tokens - 20, 0, 13, 7};
  expect_one_process(c);
}

TEST_P(ExchangeTest, AllSlotsDropped) {
  ExchangeCase c = case_of(target(), 2, DType::kBFloat16);
  set_ids(c, [](std::int64_t t, std::int64_t k) { return (t + k) % 2 == 0 ? -1 : 8 + t; });
  const RunResult result = expect_definition(c);
  for (const double value : result.out) ASSERT_EQ(value, 0.0);
}

TEST_P(ExchangeTest, DuplicatesAndAllExperts) {
  ExchangeCase c = case_of(target(), 4, DType::kBFloat16);
  c.layer.top_k = 8;
  set_ids(c, [](std::int64_t t, std::int64_t k) { return t % 3 == 0 ? t % 8 : k; });
  expect_one_process(c);
}

TEST_P(ExchangeTest, FewerTokensThanPlacesAndOtherDtypesOfIdsAndWeights) {
  ExchangeCase c = case_of(target(), 2, DType::kBFloat16);
  c.layer.id_dtype = DType::kInt64;
  c.layer.routing_weight_dtype = DType::kBFloat16;
  c.tokens = {3, c.layer.num_tokens - 3};
  c.max_tokens = c.layer.num_tokens + 9;
  expect_one_process(c);
}

TEST_P(ExchangeTest, KeptRowsGiveTheSameBits) {
  ExchangeCase c = case_of(target(), 4, DType::kBFloat16);
  const RunResult fetched = run(c);
  c.keep_received = true;
  EXPECT_EQ(bitwise_difference(expect_definition(c), fetched), "");
}

TEST_P(ExchangeTest, MaxRowsNoneExactOneShortAndMore) {
  ExchangeCase c = case_of(target(), 2, DType::kBFloat16);
  const MoEInputs inputs(host_target(), c.layer);
  const auto rows = oracle::sorted_rows(inputs.routing(), c.layer.num_tokens, 8);
  const auto first = static_cast<std::int64_t>(std::count_if(
      rows.begin(), rows.end(), [](const oracle::Row& row) { return row.expert < 4; }));
  for (const std::int64_t most : {std::int64_t{0}, first - 1, first, first + 100}) {
    c.max_rows = most;
    const RunResult result = expect_definition(c);
    const auto other = static_cast<std::int64_t>(rows.size()) - first;
    EXPECT_EQ(result.rows_dropped,
              std::max<std::int64_t>(first - most, 0) + std::max<std::int64_t>(other - most, 0));
  }
}

TEST_P(ExchangeTest, InferenceKeepsNothing) {
  const ExchangeCase c = case_of(target(), 2, DType::kBFloat16);
  ExchangeGroup training(target(), c), inference(target(), c);
  training.forward();
  for (int r = 0; r < c.num_ranks(); ++r) {
    const MoEShape shape =
        moe_exchange_shape(inference.shape(), inference.options(), inference.rank(r).weights());
    inference.rank(r).forward_workspace = GuardedBuffer(
        target(),
        moe_exchange_forward_workspace(inference.context(r), inference.shape(), shape, true));
  }
  const auto forward = [&](int r) {
    MoEExchangeForwardArgs args = inference.forward_args(r);
    args.h = args.metadata = TensorView();
    moe_exchange_forward(inference.context(r), *inference.rank(r).exchange, args);
  };
  EXPECT_THAT(inference.run(forward), ::testing::Each(""));
  EXPECT_EQ(bitwise_difference(inference.result().out, training.result().out), "");
}

// Without a join between the calls: ranks run as far ahead of each other as the flags let them.
TEST_P(ExchangeTest, ManyCallsGiveTheSameBits) {
  for (const int ranks : {2, 8}) {
    const ExchangeCase c = case_of(target(), ranks, DType::kBFloat16);
    ExchangeGroup group(target(), c);
    const auto errors = group.run([&](int r) {
      for (int i = 0; i < 3; ++i) {
        group.forward(r);
        group.backward(r);
      }
    });
    EXPECT_THAT(errors, ::testing::Each(""));
    const RunResult first = run(c);
    EXPECT_EQ(bitwise_difference(group.result(), first), "");
    for (int i = 0; i < many_calls(); ++i) {
      group.forward();
      group.backward();
      ASSERT_EQ(bitwise_difference(group.result(), first), "") << "call " << i;
    }
  }
}

TEST_P(ExchangeTest, CallsAreCountedModulo2To32) {
  const ExchangeCase c = case_of(target(), 4, DType::kBFloat16);
  ExchangeGroup group(target(), c);
  group.start_at(0xfffffffdu);
  for (int i = 0; i < 3; ++i) {  // numbers 0xfffffffe to 3
    group.forward();
    group.backward();
  }
  EXPECT_EQ(bitwise_difference(group.result(), run(c)), "");
}

}  // namespace
}  // namespace sonicmoe::rig
