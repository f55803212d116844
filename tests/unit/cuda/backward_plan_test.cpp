// Scratch of backward on a GPU: what the copy of sorted rows adds, and where it is given up.
#include <gtest/gtest.h>

#include <algorithm>

#include "cuda/experts/experts.hpp"
#include "cuda/experts/metadata.hpp"
#include "cuda/hopper/products.hpp"
#include "ops/tuning.hpp"

namespace sonicmoe::cuda {
namespace {

using rig::Forced;
using enum BackwardStep;

MoEShape top_k(std::int64_t tokens, std::int64_t d, std::int64_t n, std::int64_t experts,
               std::int64_t k) {
  return {.num_tokens = tokens,
          .hidden_size = d,
          .intermediate_size = n,
          .num_experts = experts,
          .num_pairs = tokens * k,
          .numerics = Numerics::of(DType::kBFloat16)};
}

// Where the copy is made, where one of its conditions fails, and random ones between.
std::vector<MoEShape> shapes() {
  std::vector<MoEShape> list = {
      top_k(8192, 4096, 14336, 8, 2),  top_k(8192, 6144, 16384, 8, 2),
      top_k(8192, 6144, 10752, 16, 4), top_k(8192, 5120, 8192, 16, 1),
      top_k(4096, 6144, 8192, 16, 1),  top_k(8192, 4096, 4096, 16, 2),
      top_k(8192, 4096, 1536, 128, 8), top_k(64, 4096, 14336, 8, 2),
      top_k(0, 4096, 14336, 8, 2),     top_k(8192, 8192, 8192, 8, 2),
  };
  list.push_back(list.front());
  list.back().activation = Activation::kGELU;
  list.push_back(list.front());
  list.back().deterministic = false;
  list.push_back(list.front());
  list.back().max_rows = 6000;
  return list;
}

WorkspacePlan plan(const MoEShape& shape, BackwardStep step,
                   std::optional<std::size_t> limit = {}) {
  return plan_backward(hopper::products(), shape, limit, step).workspace;
}

WorkspacePlan plan_without(const MoEShape& shape, BackwardStep step) {
  const Forced gathered({.sort_rows = false});
  return plan(shape, step);
}

std::size_t rows_of(const MoEShape& shape, std::int64_t columns) {
  return elements(shape.row_capacity(), columns) * kElementBytes;
}

// H goes with the first step and A' with the second; gradients aside.
std::size_t most_in_steps(const MoEShape& shape,
                          WorkspacePlan (*scratch)(const MoEShape&, BackwardStep)) {
  const std::size_t h = rows_of(shape, shape.h_columns()), dh = h;
  const std::size_t a = rows_of(shape, shape.intermediate_size);
  return std::max({h + dh + a + scratch(shape, kHidden).bytes, dh + a + scratch(shape, kDown).bytes,
                   dh + scratch(shape, kInput).bytes, dh + scratch(shape, kUp).bytes});
}

TEST(SortedRowsScratch, DoesNotRaiseTheMostInSteps) {
  for (const MoEShape& shape : shapes()) {
    const auto with = [](const MoEShape& s, BackwardStep step) { return plan(s, step); };
    EXPECT_EQ(most_in_steps(shape, with), most_in_steps(shape, plan_without))
        << shape.num_tokens << ' ' << shape.hidden_size << ' ' << shape.intermediate_size;
  }
}

TEST(SortedRowsScratch, IsOneCopyOfTheStepsThatReadIt) {
  const MoEShape mixtral = shapes().front();
  const std::size_t copy = elements(mixtral.row_capacity() + 64 * 8, 4096) * kElementBytes;
  for (const BackwardStep step : {kAll, kDown, kUp}) {
    EXPECT_EQ(plan(mixtral, step).bytes - plan_without(mixtral, step).bytes, copy);
  }
  for (const BackwardStep step : {kHidden, kInput}) {
    EXPECT_EQ(plan(mixtral, step).bytes, plan_without(mixtral, step).bytes);
  }
  MoEShape narrow = top_k(8192, 4096, 4096, 16, 2);  // dW1 alone has 8192 columns
  EXPECT_EQ(plan(narrow, kDown).bytes, 0u);
  EXPECT_GT(plan(narrow, kUp).bytes, 0u);
  EXPECT_GT(plan(narrow, kAll).bytes, plan_without(narrow, kAll).bytes);
}

TEST(SortedRowsScratch, ALimitGivesItUpBeforeSlabs) {
  for (const MoEShape& shape : shapes()) {
    const WorkspacePlan with = plan(shape, kAll), without = plan_without(shape, kAll);
    EXPECT_EQ(with.minimum_bytes, without.minimum_bytes);
    EXPECT_EQ(plan(shape, kAll, with.bytes).bytes, with.bytes);
    if (with.bytes == without.bytes) continue;
    for (const std::size_t limit : {with.bytes - 1, without.bytes}) {
      EXPECT_EQ(plan(shape, kAll, limit).bytes, without.bytes);
      EXPECT_EQ(plan(shape, kAll, limit).num_slabs, 1);
      EXPECT_EQ(plan(shape, kDown, limit).bytes, 0u);
      EXPECT_EQ(plan(shape, kUp, limit).bytes, 0u);
    }
  }
}

TEST(SortedRowsScratch, IsOfTheRowsThatThereIsRoomFor) {
  MoEShape bounded = shapes().front();
  bounded.max_rows = 6000;
  EXPECT_EQ(plan(bounded, kDown).bytes, elements(6000 + 64 * 8, 4096) * kElementBytes);
  bounded.max_rows = 2000;  // too few an expert
  EXPECT_EQ(plan(bounded, kDown).bytes, 0u);
}

TEST(SortedRowsScratch, NoneForRowsThatLieInOrder) {
  MoEShape sorted = shapes().front();
  sorted.form = MoEShape::Form::kSorted;
  sorted.num_tokens = sorted.num_pairs;
  EXPECT_EQ(plan(sorted, kAll).bytes, plan_without(sorted, kAll).bytes);
}

TEST(RowLists, ListTheTokensOfTopKRoutingWithFewRows) {
  MoEShape shape = top_k(1024, 64, 64, 8, 4);
  const auto lists = [](const MoEShape& s) {
    MoEShape other = s;
    other.deterministic = false;  // whose sums need no list
    return row_lists_bytes(s) > row_lists_bytes(other);
  };
  EXPECT_FALSE(lists(shape));
  shape.max_rows = 2048;
  EXPECT_TRUE(lists_tokens(shape));
  EXPECT_EQ(lists(shape), lists_tokens(shape));
  for (auto change : {+[](MoEShape& s) { s.max_rows = 2049; },
                      +[](MoEShape& s) { s.form = MoEShape::Form::kPairs; },
                      +[](MoEShape& s) { s.num_pairs = 17 * s.num_tokens; },
                      +[](MoEShape& s) { s.num_tokens = s.num_pairs = 0; }}) {
    MoEShape other = shape;
    change(other);
    EXPECT_FALSE(lists_tokens(other));
    EXPECT_FALSE(lists(other));
  }
  shape.num_pairs = 16 * shape.num_tokens;
  EXPECT_TRUE(lists_tokens(shape));
}

}  // namespace
}  // namespace sonicmoe::cuda
