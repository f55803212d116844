// Which backend serves a call: by Context, by environment, and what SONICMOE_LOG=dispatch says.
// And the formulas of memory.hpp.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "core/backend.hpp"
#include "rig/environment.hpp"
#include "rig/target.hpp"
#include "rig/tensor.hpp"
#include "sonicmoe/sonicmoe.hpp"

namespace sonicmoe::rig {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string error_of(const Context& context) {
  try {
    choose_backend(context, "moe_forward");
  } catch (const Error& error) {
    return error.what();
  }
  return "";
}

TEST(Dispatch, TheReferenceIsLastAndAlwaysThere) {
  ASSERT_FALSE(backends().empty());
  EXPECT_EQ(backends().back().name, "reference");
  EXPECT_TRUE(backends().back().available);
  for (const BackendInfo& backend : backends()) EXPECT_FALSE(backend.reason.empty());
}

TEST(Dispatch, ContextNamesTheBackend) {
  for (const Target& target : targets()) {
    EXPECT_EQ(choose_backend(target.context(), "test").name(), target.backend);
  }
}

TEST(Dispatch, EnvironmentForcesABackendUnlessTheContextNamesOne) {
  const Environment environment("SONICMOE_BACKEND", "reference");
  EXPECT_EQ(choose_backend({}, "test").name(), "reference");
  EXPECT_EQ(choose_backend(targets().front().context(), "test").name(), targets().front().backend);
}

TEST(Dispatch, UnknownNamesAreErrors) {
  Context context;
  context.backend = "abacus";
  EXPECT_THAT(error_of(context), HasSubstr("abacus"));
  const Environment environment("SONICMOE_BACKEND", "slide_rule");
  EXPECT_THAT(error_of({}), HasSubstr("slide_rule"));
}

// What one call of an operation writes to stderr.
std::string report_of_a_call(const Context& context) {
  const Tensor bias(host_target(), DType::kFloat32, {3});
  const Tensor rows(host_target(), DType::kInt32, {3});
  ::testing::internal::CaptureStderr();
  update_expert_bias(context, bias.view(), rows.view(), 0.5f);
  return ::testing::internal::GetCapturedStderr();
}

TEST(Dispatch, LogSaysWhatWasChosenAndWhyOnlyWhenAsked) {
  Context context;
  context.backend = "reference";
  EXPECT_EQ(report_of_a_call(context), "");
  {
    const Environment other("SONICMOE_LOG", "no_dispatch,dispatches");
    EXPECT_EQ(report_of_a_call(context), "");
  }
  const Environment environment("SONICMOE_LOG", "others,dispatch");
  const std::string text = report_of_a_call(context);
  EXPECT_THAT(text, StartsWith("sonicmoe: dispatch: update_expert_bias -> reference ("));
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1);
  if (backend_list().size() > 1) {
    EXPECT_THAT(text, HasSubstr("passed over"));
  }
}

// T=10, d=6, n=4, E=3, K=2: P = 20 pairs.
MoEShape example(DType dtype) {
  MoEShape shape;
  shape.num_tokens = 10;
  shape.hidden_size = 6;
  shape.intermediate_size = 4;
  shape.num_experts = 3;
  shape.num_pairs = 20;
  shape.numerics = Numerics::of(dtype);
  return shape;
}

TEST(Memory, FormulasOfThePage) {
  const MoEShape shape = example(DType::kBFloat16);
  const MemoryEstimate estimate = estimate_memory(shape);
  EXPECT_EQ(estimate.kept_h, 2u * 20 * 2 * 4);
  EXPECT_LE(estimate.kept_metadata, 32u * 20 + 4u * 3);
  EXPECT_EQ(estimate.transient_forward, 2u * 20 * (4 + 6));
  const std::size_t dh = 2u * 20 * 2 * 4, a = 2u * 20 * 4;
  EXPECT_EQ(estimate.transient_backward, dh + a);  // more than dX~ in their place
  MoEShape wide = shape;
  wide.hidden_size = 30;  // dX~ with dH in the place of H
  EXPECT_EQ(estimate_memory(wide).transient_backward, 2u * 20 * 30);
  for (const std::size_t limit : {std::size_t{1}, dh + 2u * 20 * 17, std::size_t{10000}}) {
    const std::size_t slab = std::clamp(limit, dh, dh + 2u * 20 * 30) - dh;
    EXPECT_EQ(estimate_memory(wide, limit).transient_backward, std::max(dh + a, slab));
  }
  EXPECT_EQ(estimate_memory_scattermoe(shape).kept_h, 2u * 20 * (2 * 4 + 4 + 6));
  EXPECT_EQ(parameter_bytes(shape), 2u * 3 * (8 * 6 + 6 * 4));
  EXPECT_EQ(forward_flops(shape), 2.0 * 20 * 6 * 4 * 3);
  EXPECT_EQ(backward_flops(shape), 2 * forward_flops(shape));
}

TEST(Memory, MetadataBytesOfEachForm) {
  MoEShape shape = example(DType::kFloat32);
  EXPECT_EQ(moe_h_bytes(shape), 4u * 20 * 8);
  EXPECT_EQ(moe_metadata_bytes(shape), 4u * (3 + 3 * 20));
  shape.form = MoEShape::Form::kPairs;
  EXPECT_EQ(moe_metadata_bytes(shape), 4u * (3 + 4 * 20 + 10 + 1));
  shape.form = MoEShape::Form::kSorted;
  shape.num_tokens = shape.num_pairs;
  EXPECT_EQ(moe_metadata_bytes(shape), 4u * 3);
}

TEST(Memory, KeptDoesNotGrowWithGranularityAtConstantNK) {
  MoEShape coarse = example(DType::kBFloat16), fine = coarse;
  coarse.intermediate_size = 64, coarse.num_pairs = 20;
  fine.intermediate_size = 16, fine.num_pairs = 80;
  EXPECT_EQ(estimate_memory(coarse).kept_h, estimate_memory(fine).kept_h);
  EXPECT_LT(estimate_memory_scattermoe(coarse).kept_h, estimate_memory_scattermoe(fine).kept_h);
}

}  // namespace
}  // namespace sonicmoe::rig
