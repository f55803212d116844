// Choices of cuda/hopper/select.cpp that no result shows.
#include "cuda/hopper/select.hpp"

#include <gtest/gtest.h>

#include "ops/tuning.hpp"

namespace sonicmoe::cuda::hopper {
namespace {

using sonicmoe::rig::Forced;

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

// A small product, strided where it may be.
ProductSizes small_product(Product product) {
  return {.product = product, .depth = 512, .columns = 512, .row_tiles = 64, .processors = 132};
}

TEST(InOrder, OnASharedDeviceAllThatHaveCounters) {
  for (const Product product :
       {Product::kUp, Product::kGradH, Product::kRows, Product::kWeightGradient}) {
    ProductSizes sizes = small_product(product);
    const bool gathers = product == Product::kUp || product == Product::kGradH;
    EXPECT_EQ(choose(sizes).in_order, gathers) << describe(choose(sizes));
    sizes.shared_device = true;
    EXPECT_TRUE(choose(sizes).in_order) << describe(choose(sizes));
  }
  ProductSizes logits = small_product(Product::kLogits);
  logits.shared_device = true;
  EXPECT_FALSE(choose(logits).in_order);
}

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
  for (const int rows : {1, 2, 16}) {
    const Forced forced({.row_block = rows});
    EXPECT_EQ(choose_row_block(64, 64), rows);
    EXPECT_EQ(choose_row_block(4096, 28672), rows);
  }
  const Forced forced({.row_block = 2147483647});
  EXPECT_LE(choose_row_block(64, 64), 1 << 16);
}

// Of a layer on 132 multiprocessors, K-major weights, `tiles` tile rows at most.
Choice chosen(Product product, std::int64_t depth, std::int64_t columns, std::int64_t tiles,
              bool add_rows = false) {
  return choose({.product = product,
                 .depth = depth,
                 .columns = columns,
                 .row_tiles = tiles,
                 .num_tokens = 40960,
                 .add_rows = add_rows,
                 .processors = 132});
}

TEST(Choice, OfTheProductsOf7BN256) {
  constexpr std::int64_t kD = 1536, kN = 256, kTiles = 24576 * 8 / 128 + 128;
  const Choice up = chosen(Product::kUp, kD, 2 * kN, kTiles);
  EXPECT_EQ(describe(up), "256 columns, in order, early release, 132 CTAs");
  const Choice grad_h = chosen(Product::kGradH, kD, kN, kTiles);
  EXPECT_EQ(describe(grad_h), describe(up));
  EXPECT_EQ(grad_h.stores, StoreRoles::kThreeAndMath);
  EXPECT_EQ(grad_h.n_tiles, 1);
  // 10 k-tiles of six columns each are too few to drift apart.
  EXPECT_EQ(describe(chosen(Product::kRows, kN, kD, kTiles)),
            "256 columns, strided, early release, 132 CTAs");
  EXPECT_TRUE(chosen(Product::kRows, kN, kD, 100 * kTiles).in_order);
  EXPECT_EQ(describe(chosen(Product::kWeightGradient, kTiles, 2 * kN, 128 * 12)),
            "256 columns, strided, 132 CTAs");
}

TEST(Choice, RowsThatAreAddedPassInOrderAndInGroups) {
  const Choice added = chosen(Product::kRows, 256, 4096, 1000, true);
  EXPECT_TRUE(added.in_order);
  EXPECT_EQ(added.n_tiles, 16);
  EXPECT_EQ(added.n_group, 1);  // 20 MiB of out a column tile
  EXPECT_EQ(added.row_block, 1);
  EXPECT_EQ(chosen(Product::kRows, 512, 4096, 1000, true).n_group, 16);
}

TEST(Choice, LargeWeightsPassInOrder) {
  EXPECT_TRUE(chosen(Product::kRows, 4096, 1024, 1000).in_order);
  EXPECT_FALSE(chosen(Product::kRows, 4096, 512, 1000).in_order);
}

TEST(Choice, NothingToLaunch) {
  EXPECT_EQ(chosen(Product::kUp, 64, 0, 10).grid, 0);
  EXPECT_EQ(chosen(Product::kLogits, 64, 8, 0).grid, 0);
  EXPECT_EQ(chosen(Product::kLogits, 64, 8, 5).grid, 5);
}

// A slice more costs its sum, a wave more its time.
TEST(Slices, FillTheWaves) {
  EXPECT_EQ(choose_slices(0, 1536, 256), 1);
  EXPECT_EQ(choose_slices(255, 1536, 256), 1);
  for (const std::int64_t width : {1536, 4096}) {
    const std::int64_t slices = choose_slices(32768, width, 256), tiles = slices * width / 128;
    EXPECT_GE(tiles, 100);
    EXPECT_LE(tiles, 3 * 132);
  }
}

}  // namespace
}  // namespace sonicmoe::cuda::hopper
