// A CUDA status as the error that the library throws.
#include "cuda/launch_check.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace sonicmoe::cuda {
namespace {

using ::testing::HasSubstr;

TEST(LaunchCheck, SuccessIsNoError) {
  EXPECT_NO_THROW(check_cuda(cudaSuccess, "up"));
  EXPECT_NO_THROW(check_launch(cudaSuccess, "up", {}));
}

TEST(LaunchCheck, LackOfMemoryIsOutOfMemory) {
  EXPECT_THROW(check_cuda(cudaErrorMemoryAllocation, "up"), OutOfMemory);
  EXPECT_THROW(check_launch(cudaErrorMemoryAllocation, "up", {}), OutOfMemory);
}

TEST(LaunchCheck, OtherFailuresNameTheCallAndItsShape) {
  MoEShape shape;
  shape.num_tokens = 17;
  try {
    check_launch(cudaErrorInvalidConfiguration, "grad_h", shape);
    FAIL() << "expected an Error";
  } catch (const OutOfMemory&) {
    FAIL() << "expected an Error of another kind";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("grad_h: "));
    EXPECT_THAT(error.what(), HasSubstr("T=17"));
  }
}

}  // namespace
}  // namespace sonicmoe::cuda
