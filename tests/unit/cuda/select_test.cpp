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

// What each rule picks at every shape of bench/problems.json: whether dW2 and dW1 read sorted rows,
// and whether the CTAs of down and dX~ start their tiles together.
struct Picked {
  bool sorted_w2, sorted_w1, together_down, together_dx;
  bool operator==(const Picked&) const = default;
};

constexpr Picked kNothing = {false, false, false, false};
constexpr Picked kEverything = {true, true, true, true};

struct Problem {
  const char* name;
  Shape shape;
  Picked picked;
};

constexpr Problem kProblems[] = {
    {"small", {2048, 256, 128, 32, 4}, kNothing},
    {"fine", {2048, 768, 256, 128, 8}, kNothing},
    {"coarse", {4096, 1024, 1024, 16, 2}, kNothing},
    {"1.4B-n256", {40960, 768, 256, 128, 8}, kNothing},
    {"1.4B-n512", {40960, 768, 512, 64, 4}, kNothing},
    {"1.4B-n1024", {40960, 768, 1024, 32, 2}, kNothing},
    {"7B-n256", {24576, 1536, 256, 128, 8}, kNothing},
    {"7B-n512", {24576, 1536, 512, 64, 4}, kNothing},
    {"7B-n1024", {24576, 1536, 1024, 32, 2}, kNothing},
    {"30B-n256", {32768, 4096, 256, 256, 16}, kNothing},
    {"30B-n512", {32768, 4096, 512, 128, 8}, kNothing},
    {"30B-n1024", {32768, 4096, 1024, 64, 4}, kNothing},
    {"120B-n512", {32768, 4096, 512, 256, 16}, kNothing},
    {"120B-n1024", {32768, 4096, 1024, 128, 8}, kNothing},
    {"120B-n2048", {32768, 4096, 2048, 64, 4}, kNothing},
    {"OLMoE", {32768, 2048, 1024, 64, 8}, kNothing},
    {"gpt-oss-20b", {32768, 2880, 2880, 32, 4}, kNothing},
    {"Kimi-Linear", {32768, 2304, 1024, 256, 8}, kNothing},
    {"Qwen3-Next", {32768, 2048, 512, 512, 10}, kNothing},
    {"Qwen3-235B", {32768, 4096, 1536, 128, 8}, kNothing},
    {"DeepSeek-V3.2", {32768, 7168, 2048, 256, 8}, kNothing},
    {"Mixtral-8x7B", {8192, 4096, 14336, 8, 2}, kEverything},
    {"Mixtral-8x7B-T32768", {32768, 4096, 14336, 8, 2}, kEverything},
    {"Mixtral-8x22B", {8192, 6144, 16384, 8, 2}, kEverything},
    {"DBRX", {8192, 6144, 10752, 16, 4}, kEverything},
    {"Llama-4-Scout", {8192, 5120, 8192, 16, 1}, kEverything},
    {"Qwen3-235B-T8192", {8192, 4096, 1536, 128, 8}, kNothing},
};

Choice of_rows(const Shape& s, std::int64_t depth, std::int64_t columns) {
  return choose({.product = Product::kRows,
                 .depth = depth,
                 .columns = columns,
                 .row_tiles = s.tokens * s.top_k / 128 + s.experts,
                 .num_tokens = s.tokens,
                 .processors = 132});
}

Picked picked(const Shape& s) {
  const std::int64_t rows = s.tokens * s.top_k;
  return {.sorted_w2 = choose_sorted(rows, s.experts, s.d, s.n),
          .sorted_w1 = choose_sorted(rows, s.experts, s.d, 2 * s.n),
          .together_down = of_rows(s, s.n, s.d).start_together,
          .together_dx = of_rows(s, 2 * s.n, s.d).start_together};
}

TEST(Rules, AtEveryShapeOfTheBenchmarks) {
  for (const Problem& problem : kProblems) {
    EXPECT_EQ(picked(problem.shape), problem.picked) << problem.name;
  }
}

TEST(SortedRows, WhereTheyAreReadOftenAndHaveRoom) {
  EXPECT_TRUE(choose_sorted(16384, 8, 4096, 8192));
  EXPECT_FALSE(choose_sorted(16384, 8, 4096, 8184));
  EXPECT_TRUE(choose_sorted(2048, 8, 4096, 14336));  // 256 rows of an expert
  EXPECT_FALSE(choose_sorted(2047, 8, 4096, 14336));
  EXPECT_FALSE(choose_sorted(16384, 8, 8192, 8192));  // a copy of more than A'
  EXPECT_FALSE(choose_sorted(16384, 8, 4104, 14336));
  EXPECT_FALSE(choose_sorted(0, 8, 4096, 14336));
}

TEST(SortedRows, Forced) {
  const Forced on({.sort_rows = true});
  EXPECT_TRUE(choose_sorted(3, 8, 64, 256));
  EXPECT_FALSE(choose_sorted(3, 8, 72, 256));
  EXPECT_FALSE(choose_sorted(3, 8, 64, 128));  // in narrow tiles
  EXPECT_FALSE(choose_sorted(0, 8, 64, 256));
  const Forced off({.sort_rows = false});
  EXPECT_FALSE(choose_sorted(16384, 8, 4096, 14336));
}

TEST(StartTogether, OnlyRowsInBlocksThatAreStoredOnAGpuOfTheirOwn) {
  ProductSizes sizes{.product = Product::kRows,
                     .depth = 14336,
                     .columns = 4096,
                     .row_tiles = 136,
                     .num_tokens = 8192,
                     .processors = 132};
  EXPECT_TRUE(choose(sizes).start_together);
  EXPECT_EQ(describe(choose(sizes)),
            "256 columns, in order, blocks of 16 tile rows, together, 132 CTAs");
  for (auto change : {+[](ProductSizes& s) { s.add_rows = true; },
                      +[](ProductSizes& s) { s.shared_device = true; },
                      +[](ProductSizes& s) { s.columns = 256; },  // a slab
                      +[](ProductSizes& s) { s.depth = 4096, s.columns = 7168; },
                      +[](ProductSizes& s) { s.product = Product::kUp; },
                      +[](ProductSizes& s) { s.product = Product::kWeightGradient; }}) {
    ProductSizes other = sizes;
    change(other);
    EXPECT_FALSE(choose(other).start_together);
  }
}

TEST(StartTogether, Forced) {
  const ProductSizes small = small_product(Product::kRows);
  const Forced on({.start_together = true});
  EXPECT_TRUE(choose(small).start_together);
  EXPECT_TRUE(choose(small).in_order);  // which has counters
  EXPECT_FALSE(choose(small_product(Product::kLogits)).start_together);
  EXPECT_FALSE(choose(small_product(Product::kWeightGradient)).start_together);
  const Forced off({.start_together = false});
  EXPECT_FALSE(choose(small).start_together);
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

TEST(Choice, WeightGradientsOfFewRowsPassInOrderAndLeaveL2First) {
  ProductSizes sizes{.product = Product::kWeightGradient,
                     .depth = 64,  // Qwen3-30B-A3B, T = 1024
                     .columns = 768,
                     .row_tiles = 128 * 16,
                     .stores_bf16 = true,
                     .processors = 132};
  EXPECT_EQ(describe(choose(sizes)), "256 columns, in order, evict first, 132 CTAs");
  for (auto change :
       {+[](ProductSizes& s) { s.depth = 65; }, +[](ProductSizes& s) { s.stores_bf16 = false; },
        +[](ProductSizes& s) { s.product = Product::kRows; }}) {
    ProductSizes other = sizes;
    change(other);
    EXPECT_FALSE(choose(other).evict_first);
  }
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
