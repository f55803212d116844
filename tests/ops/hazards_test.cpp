// The hazards of grouped GEMMs, each under a name of its own: tails, short reductions, experts
// without rows, skew, poisoned neighbours, repeatability. Every backend runs them; they were chosen
// for the Hopper kernels (tiles of 128 rows in halves of 64, k-tiles of 64, three to six stages).
//
// All inputs and buffers are poisoned as support/moe_run.hpp says: NaN in outputs, workspaces and
// in rows of x that no pair uses, guards around each.
#include <gtest/gtest.h>

#include <cstdlib>

#include "support/compare.hpp"
#include "support/moe_run.hpp"

namespace sonicmoe::testing {
namespace {

using Form = MoEShape::Form;

class Hazards : public ::testing::TestWithParam<Target> {
 protected:
  void expect_correct(const MoECase& wanted) const {
    const MoECase c = fitted(GetParam(), wanted);
    SCOPED_TRACE(c.describe());
    const RunOptions options;
    for (const std::string& problem :
         check_run(c, options, run_moe(GetParam(), c, options), Strictness::kRealistic)) {
      ADD_FAILURE() << problem;
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, Hazards, ::testing::ValuesIn(targets()),
                         [](const auto& test) { return test.param.backend; });

MoECase small_case() {
  MoECase c;
  c.dtype = DType::kBFloat16;
  c.hidden_size = 72;
  c.intermediate_size = 40;
  return c;
}

// `rows` rows of one expert.
MoECase one_expert(std::int64_t rows) {
  MoECase c = small_case();
  c.form = Form::kSorted;
  c.num_experts = 1;
  c.num_pairs = rows;
  c.seed = static_cast<std::uint64_t>(600 + rows);
  return c;
}

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

TEST_P(Hazards, PoisonedNeighboursOfTheReduction) {  // rows past the last hold NaN
  for (const std::int64_t tail : {1, 63, 100}) {
    MoECase c = one_expert(150 + tail);
    c.tail_rows = tail;
    c.num_experts = 2;
    expect_correct(c);
  }
}

// SONICMOE_REPEATS=10000 for the long run.
TEST_P(Hazards, RepeatedCallsGiveTheSameBits) {
  const char* text = std::getenv("SONICMOE_REPEATS");
  const int repeats = text == nullptr ? 20 : std::atoi(text);
  MoECase c = small_case();
  c.num_tokens = 150;
  c = fitted(GetParam(), c);
  const RunResult first = run_moe(GetParam(), c);
  ASSERT_FALSE(first.grad_w1.empty());
  for (int i = 0; i < repeats; ++i) {
    ASSERT_EQ(bitwise_difference(first, run_moe(GetParam(), c)), "") << "call " << i;
  }
}

}  // namespace
}  // namespace sonicmoe::testing
