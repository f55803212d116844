// Choices of cuda/hopper/select.cpp that no result shows.
#include "cuda/hopper/select.hpp"

#include <gtest/gtest.h>

#include "rig/environment.hpp"

namespace sonicmoe::cuda::hopper {
namespace {

using sonicmoe::rig::Environment;

struct Shape {
  std::int64_t tokens, d, n, experts, top_k;
  std::int64_t mean_rows() const { return tokens * top_k / experts; }
};

// Whether each product passes its tile rows in blocks.
struct Blocked {
  bool up, down, hidden_gradient, input_gradient, up_weights, down_weights;
  bool operator==(const Blocked&) const = default;
};

Blocked blocked(const Shape& s) {
  const auto in_blocks = [](std::int64_t depth, std::int64_t columns) {
    const int rows = choose_row_block(depth, columns);
    EXPECT_TRUE(rows == 1 || rows == 16);
    return rows > 1;
  };
  return {.up = in_blocks(s.d, 2 * s.n),
          .down = in_blocks(s.n, s.d),
          .hidden_gradient = in_blocks(s.d, s.n),
          .input_gradient = in_blocks(2 * s.n, s.d),
          .up_weights = in_blocks(s.mean_rows(), 2 * s.n),
          .down_weights = in_blocks(s.mean_rows(), s.n)};
}

constexpr Blocked kNone = {false, false, false, false, false, false};
constexpr Blocked kAll = {true, true, true, true, true, true};

TEST(RowBlock, WhereTheWeightsOfAnExpertOutgrowL2) {
  EXPECT_EQ(blocked({8192, 4096, 14336, 8, 2}), kAll);     // Mixtral-8x7B
  EXPECT_EQ(blocked({8192, 6144, 16384, 8, 2}), kAll);     // Mixtral-8x22B
  EXPECT_EQ(blocked({32768, 4096, 2048, 64, 4}), kNone);   // 120B-n2048
  EXPECT_EQ(blocked({32768, 2880, 2880, 32, 4}), kNone);   // gpt-oss-20b
  EXPECT_EQ(blocked({32768, 4096, 1536, 128, 8}), kNone);  // Qwen3-235B
  EXPECT_EQ(blocked({40960, 768, 256, 128, 8}), kNone);    // 1.4B-n256
}

TEST(RowBlock, WeightGradientsByTheRowsOfAnExpert) {
  Blocked expected = kAll;  // Llama-4-Scout: 512 rows
  expected.up_weights = expected.down_weights = false;
  EXPECT_EQ(blocked({8192, 5120, 8192, 16, 1}), expected);
  expected.up_weights = true;  // DBRX: 2048 rows
  EXPECT_EQ(blocked({8192, 6144, 10752, 16, 4}), expected);
  expected = kNone;  // DeepSeek-V3.2
  expected.up = expected.input_gradient = true;
  EXPECT_EQ(blocked({32768, 7168, 2048, 256, 8}), expected);
}

TEST(RowBlock, Forced) {
  for (const char* rows : {"1", "2", "16"}) {
    const Environment environment("SONICMOE_CUDA_ROW_BLOCK", rows);
    EXPECT_EQ(choose_row_block(64, 64), std::atoi(rows));
    EXPECT_EQ(choose_row_block(4096, 28672), std::atoi(rows));
  }
  const Environment environment("SONICMOE_CUDA_ROW_BLOCK", "2147483647");
  EXPECT_LE(choose_row_block(64, 64), 1 << 16);
}

}  // namespace
}  // namespace sonicmoe::cuda::hopper
