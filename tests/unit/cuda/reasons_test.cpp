// What the Hopper kernels decline, as it is told. Pure host code: no GPU is needed.
#include <gtest/gtest.h>

#include <array>
#include <cstddef>
#include <string>

#include "cuda/hopper/products.hpp"

namespace sonicmoe::cuda::hopper {
namespace {

constexpr std::int64_t kGroups = 2, kWidth = 16, kColumns = 8;

alignas(16) std::array<std::byte, 32> memory;
void* const whole = memory.data();
void* const shifted = memory.data() + 2;  // where a bfloat16 may begin, but no vector

// The argument that a reason names; empty where there is none.
std::string named(const Reason& reason) { return reason ? std::string(reason->argument) : ""; }

ConstTensorView weight() { return {whole, DType::kBFloat16, {kGroups, kWidth, kColumns}}; }

TEST(Reasons, EveryTensorOfGradHBeginsAtSixteenBytes) {
  const HopperProducts products;
  const GradHArgs good{
      .grad_out = {whole, kWidth}, .w2 = weight(), .h = whole, .grad_h = whole, .scaled_a = whole};
  EXPECT_EQ(named(products.reason_against({}, good)), "");
  GradHArgs args = good;
  args.h = shifted;
  EXPECT_EQ(named(products.reason_against({}, args)), "h");
  args = good;
  args.grad_h = shifted;
  EXPECT_EQ(named(products.reason_against({}, args)), "grad_h");
  args = good;
  args.scaled_a = shifted;
  EXPECT_EQ(named(products.reason_against({}, args)), "scaled_a");
  args = good;
  args.grad_h = args.scaled_a = nullptr;  // scratch that does not exist yet
  EXPECT_EQ(named(products.reason_against({}, args)), "");
}

TEST(Reasons, RowsBeginAtSixteenBytes) {
  const HopperProducts products;
  RowsArgs rows{.a = whole, .weight = weight(), .num_columns = kColumns, .out = {whole, kColumns}};
  EXPECT_EQ(named(products.reason_against({}, rows)), "");
  rows.a = shifted;
  EXPECT_EQ(named(products.reason_against({}, rows)), "a");

  WeightGradientArgs gradient{
      .gathered = {whole, kWidth},
      .rows = whole,
      .grad = TensorView(whole, DType::kFloat32, {kGroups, kWidth, kColumns})};
  EXPECT_EQ(named(products.reason_against({}, gradient)), "");
  gradient.rows = shifted;
  EXPECT_EQ(named(products.reason_against({}, gradient)), "rows");
}

}  // namespace
}  // namespace sonicmoe::cuda::hopper
