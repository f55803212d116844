// The hazards of grouped GEMMs, each under a name of its own: tails, short reductions, experts
// without rows, skew, poisoned neighbours, repeatability. Every backend runs them; they were chosen
// for the Hopper kernels (tiles of 128 rows in halves of 64, k-tiles of 64, three to six stages).
// Forced tiles and grids are in specs_test.cpp, sizes beyond 2^31 elements in large_test.cpp.
//
// All inputs and buffers are poisoned as rig/moe_run.hpp says: NaN in outputs, workspaces and
// in rows of x that no pair uses, guards around each. In a build with SONICMOE_CUDA_STRESS the
// kernels pause at random, role by role, and start from shared memory full of NaN: run all tests
// of this binary with it.
#include "ops/hazards.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "oracle/activation.hpp"

namespace sonicmoe::rig {
namespace {

INSTANTIATE_TEST_SUITE_P(Backends, Hazards, ::testing::ValuesIn(targets()),
                         [](const auto& test) { return test.param.backend; });

TEST_P(Hazards, TailOfEveryLength) {
  for (const std::int64_t rows : {1, 7, 8, 63, 64, 65, 127, 128, 129, 191, 192, 193, 257}) {
    expect_correct(one_expert(rows));
  }
}

TEST_P(Hazards, TailsSideBySide) {  // the rows past a tail are the next expert's
  for (const std::uint64_t seed : {1, 2, 3}) {
    MoECase c = small_case();
    c.num_tokens = 190;
    c.num_experts = 6;
    c.seed = 700 + seed;
    expect_correct(c);
  }
}

TEST_P(Hazards, ReductionOfEveryLength) {  // 1 to 7 k-tiles, whole and partial
  for (const std::int64_t width : {8, 56, 64, 72, 128, 192, 200, 256, 320, 384, 448}) {
    MoECase c = small_case();
    c.num_tokens = 70;
    c.hidden_size = width;
    c.seed = static_cast<std::uint64_t>(800 + width);
    expect_correct(c);
    c.hidden_size = 72;
    c.intermediate_size = width;
    expect_correct(c);
  }
}

TEST_P(Hazards, ReductionOverRowsOfEveryLength) {  // weight gradients: 0 rows to several k-tiles
  for (const std::int64_t rows : {1, 63, 64, 65, 128, 129, 200, 256, 321}) {
    MoECase c = one_expert(rows);
    c.num_experts = 3;
    c.load = Load::kOneExpert;
    expect_correct(c);
  }
}

TEST_P(Hazards, MoreExpertsThanRows) {
  for (const std::int64_t experts : {40, 257}) {
    MoECase c = small_case();
    c.num_tokens = 9;
    c.num_experts = experts;
    expect_correct(c);
  }
}

TEST_P(Hazards, OneExpertChosenByEveryToken) {
  for (const std::int64_t top_k : {1, 2}) {
    MoECase c = small_case();
    c.num_tokens = 300;
    c.num_experts = 9;
    c.top_k = top_k;
    c.load = Load::kOneExpert;
    expect_correct(c);
  }
}

TEST_P(Hazards, PartialTilesOfColumns) {  // widths on both sides of 128 and 256 columns
  for (const std::int64_t width : {120, 136, 248, 264, 520}) {
    MoECase c = small_case();
    c.num_tokens = 40;
    c.hidden_size = width;
    c.intermediate_size = width / 16 * 8;
    c.seed = static_cast<std::uint64_t>(900 + width);
    expect_correct(c);
  }
}

// The sum of a token's rows: numbers of them around those loaded together and around the 32 that a
// warp looks up at a time, widths around those of a warp.
TEST_P(Hazards, AnyNumberOfRowsOfAToken) {
  struct Sum {
    std::int64_t top_k, width;
  };
  for (const Sum& sum :
       {Sum{1, 264}, Sum{2, 760}, Sum{2, 1544}, Sum{3, 520}, Sum{4, 264}, Sum{4, 520}, Sum{5, 72},
        Sum{7, 264}, Sum{9, 520}, Sum{10, 264}, Sum{17, 72}, Sum{33, 264}, Sum{40, 72}}) {
    MoECase c = small_case();
    c.num_tokens = 9;
    c.num_experts = sum.top_k + 2;
    c.top_k = sum.top_k;
    c.hidden_size = sum.width;
    c.drop_probability = 0.3;
    expect_correct(c);
    c.form = Form::kPairs;  // as many rows in all, not the same number for every token
    c.num_pairs = c.num_tokens * sum.top_k;
    expect_correct(c);
  }
}

TEST_P(Hazards, PoisonedNeighboursOfTheReduction) {  // rows past the last hold NaN
  for (const std::int64_t tail : {1, 63, 100}) {
    MoECase c = one_expert(150 + tail);
    c.tail_rows = tail;
    c.num_experts = 2;
    expect_correct(c);
  }
}

// Weight gradients of experts without rows have no k-tile at all, and are exactly zero.
TEST_P(Hazards, NoRowsNoGradient) {
  MoECase c = small_case();
  c.num_tokens = 9;
  c.num_experts = 40;
  c = fitted(GetParam(), c);
  const MoEInputs host(host_target(), c);
  std::vector<bool> used(static_cast<std::size_t>(c.num_experts), false);
  for (const oracle::Row& row : oracle::sorted_rows(host.routing(), c.tokens(), c.num_experts)) {
    used[static_cast<std::size_t>(row.expert)] = true;
  }
  ASSERT_TRUE(std::find(used.begin(), used.end(), false) != used.end());
  const RunResult result = run_moe(GetParam(), c);
  for (const auto* gradient : {&result.grad_w1, &result.grad_w2, &result.grad_b1}) {
    const std::size_t block = gradient->size() / used.size();
    for (std::size_t i = 0; i < gradient->size(); ++i) {
      if (used[i / block]) continue;
      ASSERT_EQ((*gradient)[i], 0.0) << "expert " << i / block;
    }
  }
}

TEST_P(Hazards, KTilesThatDifferByExpert) {  // the ring's phases go on from expert to expert
  for (const std::uint64_t seed : {1, 2, 3}) {
    MoECase c = small_case();
    c.form = Form::kSorted;
    c.num_experts = 7;
    c.num_pairs = 640;
    c.load = Load::kSomeEmpty;
    c.seed = 1000 + seed;
    expect_correct(c);
  }
}

// What a kernel leaves unwritten in shared memory (tails of rows, columns and the reduction) holds
// NaN then. The first kernels of a call overwrite some of it; SONICMOE_CUDA_STRESS poisons in every
// launch.
TEST_P(Hazards, PoisonedSharedMemory) {
  for (const std::int64_t rows : {1, 63, 65, 129}) {
    MoECase c = one_expert(rows);
    c.hidden_size = 72;
    const MoECase fit = fitted(GetParam(), c);
    GetParam().memory->poison_shared();
    expect_correct(fit);
  }
  GetParam().memory->poison_shared();
  expect_correct(many_tiles());
}

// Calls queued back to back share workspace, metadata and tile counters; each must find them as if
// it had waited for the one before.
TEST_P(Hazards, BackToBackCallsShareTheirScratch) {
  std::vector<MoECase> cases{many_tiles(), one_expert(129), many_tiles(), small_case()};
  cases[2].load = Load::kOneExpert;
  std::vector<RunResult> expected;
  std::vector<MoEInputs> inputs;
  std::size_t bytes = 0;
  for (MoECase& c : cases) {
    c = fitted(GetParam(), c);
    expected.push_back(run_moe(GetParam(), c));
    inputs.emplace_back(GetParam(), c);
    bytes = std::max(
        bytes, moe_forward_workspace(GetParam().context(), inputs.back().shape(), true).bytes);
  }
  const GuardedBuffer workspace(GetParam(), bytes);
  std::vector<Tensor> outputs;
  for (int round = 0; round < 5; ++round) {
    for (const MoECase& c : cases)
      outputs.emplace_back(GetParam(), c.dtype, std::vector{c.tokens(), c.hidden_size});
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    MoEForwardArgs args;
    const MoEInputs& in = inputs[i % cases.size()];
    args.options = cases[i % cases.size()].options();
    args.x = in.x.view();
    args.weights = in.weights();
    args.routing = in.routing();
    args.out = outputs[i].view();
    args.workspace = workspace.view();
    moe_forward(GetParam().context(), args);
  }
  for (std::size_t i = 0; i < outputs.size(); ++i) {
    EXPECT_EQ(bitwise_difference(expected[i % cases.size()].out, outputs[i].values()), "")
        << "call " << i << ": " << cases[i % cases.size()].describe();
  }
}

// One gate per row and its up 1: out = act(gate), dX = (act'(gate), act(gate)). Up to 2^32: kernels
// bound exp near 2^126, and the slope of tanh-GELU multiplies the rest with the gate's cube.
TEST_P(Hazards, EveryBfloat16Gate) {
  std::vector<double> gates;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    bfloat16 value;
    value.bits = static_cast<std::uint16_t>(bits);
    const float gate = static_cast<float>(value);
    // The dot products of AVX512_BF16 and AMX take subnormal factors as zero, where the slope of
    // ReLU is another.
    if (GetParam().backend == "cpu" && std::fpclassify(gate) == FP_SUBNORMAL) continue;
    if (std::abs(gate) <= 0x1p32f) gates.push_back(gate);
  }
  MoECase c;
  c.dtype = DType::kBFloat16;
  c.num_tokens = static_cast<std::int64_t>(gates.size());
  c.hidden_size = c.intermediate_size = 8;
  c.num_experts = c.top_k = 1;
  c.biases = false;
  c.limit = 7.0f;
  c.fill = [&](MoEInputs& inputs) {
    const MoECase& filled = inputs.description;
    std::vector<double> x(gates.size() * 8, 0.0), grad_out(x.size(), 0.0);
    for (std::size_t t = 0; t < gates.size(); ++t) {
      x[t * 8] = gates[t];
      x[t * 8 + 1] = grad_out[t * 8] = 1.0;
    }
    std::vector<double> w1(static_cast<std::size_t>(filled.h_columns()) * 8, 0.0), w2(64, 0.0);
    w1[0] = w2[0] = 1.0;
    if (is_gated(filled.activation)) w1[8 * 8 + 1] = 1.0;
    inputs.x.fill(x);
    inputs.grad_out.fill(grad_out);
    inputs.w1.fill(w1);
    inputs.w2.fill(w2);
    inputs.routing_weights.fill_constant(1.0);
  };
  for (const Activation activation : all_activations()) {
    c.activation = activation;
    const bool gated = is_gated(activation);
    const RunResult actual = run_moe(GetParam(), c);
    ASSERT_TRUE(actual.violations.empty()) << actual.violations.front();
    for (std::size_t t = 0; t < gates.size(); ++t) {
      const auto expected = oracle::activate(c.options(), gates[t], 1.0);
      const double floor = 1e-5 * std::max(1.0, std::abs(expected.value));
      const auto close = [&](double got, double want) {
        return std::abs(got - want) <= 0x1p-7 * std::abs(want) + floor;
      };
      ASSERT_TRUE(close(actual.out[t * 8], expected.value))
          << name_of(activation) << "(" << gates[t] << ") = " << actual.out[t * 8] << ", expected "
          << expected.value;
      ASSERT_TRUE(close(actual.grad_x[t * 8], expected.d_gate))
          << name_of(activation) << "'(" << gates[t] << ") = " << actual.grad_x[t * 8]
          << ", expected " << expected.d_gate;
      if (!gated) continue;
      ASSERT_TRUE(close(actual.grad_x[t * 8 + 1], expected.d_up))
          << name_of(activation) << " d/d up at gate " << gates[t] << " = "
          << actual.grad_x[t * 8 + 1] << ", expected " << expected.d_up;
    }
  }
}

// SONICMOE_REPEATS=10000 for the long run.
TEST_P(Hazards, RepeatedCallsGiveTheSameBits) {
  MoECase c = small_case();
  c.num_tokens = 150;
  c = fitted(GetParam(), c);
  const RunResult first = run_moe(GetParam(), c);
  ASSERT_FALSE(first.grad_w1.empty());
  for (int i = 0; i < repeats(); ++i) {
    ASSERT_EQ(bitwise_difference(first, run_moe(GetParam(), c)), "") << "call " << i;
  }
}

}  // namespace
}  // namespace sonicmoe::rig
