// The order of an expert's tiles on the GPU (cuda/hopper/mainloop/tile_order.hpp).
#include "cuda/hopper/mainloop/tile_order.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

namespace sonicmoe::cuda::hopper {
namespace {

std::vector<TilePosition> order_of(int m_tiles, int n_tiles, int row_block) {
  std::vector<TilePosition> order;
  for (int i = 0; i < m_tiles * n_tiles; ++i) {
    order.push_back(tile_position(i, m_tiles, n_tiles, row_block));
  }
  return order;
}

// Tile rows of each block, from the order alone: a block ends where the first column comes again.
std::vector<int> block_sizes(const std::vector<TilePosition>& order, int n_tiles) {
  std::vector<int> sizes;
  for (std::size_t i = 0; i < order.size();) {
    std::size_t end = i;
    while (end < order.size() && order[end].n == 0) ++end;
    sizes.push_back(static_cast<int>(end - i));
    i += (end - i) * static_cast<std::size_t>(n_tiles);
  }
  return sizes;
}

TEST(TileOrder, EveryTileOnce) {
  for (const int m_tiles : {1, 2, 3, 15, 16, 17, 23, 24, 25, 35, 64, 65, 200}) {
    for (const int n_tiles : {1, 2, 7, 112}) {
      for (const int row_block : {1, 2, 3, 16, 1 << 16}) {
        std::vector<int> times(static_cast<std::size_t>(m_tiles * n_tiles));
        for (const TilePosition& at : order_of(m_tiles, n_tiles, row_block)) {
          ASSERT_TRUE(at.m >= 0 && at.m < m_tiles && at.n >= 0 && at.n < n_tiles);
          ++times[static_cast<std::size_t>(at.m * n_tiles + at.n)];
        }
        EXPECT_EQ(std::count(times.begin(), times.end(), 1), m_tiles * n_tiles)
            << m_tiles << " x " << n_tiles << " in blocks of " << row_block;
      }
    }
  }
}

TEST(TileOrder, ColumnsAreFastestWithoutBlocks) {
  const std::vector<TilePosition> order = order_of(5, 7, 1);
  for (int i = 0; i < 35; ++i) {
    EXPECT_EQ(order[static_cast<std::size_t>(i)].m, i / 7);
    EXPECT_EQ(order[static_cast<std::size_t>(i)].n, i % 7);
  }
}

TEST(TileOrder, BlocksPassColumnByColumn) {
  const std::vector<TilePosition> order = order_of(5, 3, 2);  // blocks of 2, 2 and 1
  const std::vector<std::vector<int>> expected = {{0, 0}, {1, 0}, {0, 1}, {1, 1}, {0, 2},
                                                  {1, 2}, {2, 0}, {3, 0}, {2, 1}, {3, 1},
                                                  {2, 2}, {3, 2}, {4, 0}, {4, 1}, {4, 2}};
  for (std::size_t i = 0; i < expected.size(); ++i) {
    EXPECT_EQ(order[i].m, expected[i][0]) << i;
    EXPECT_EQ(order[i].n, expected[i][1]) << i;
  }
}

// A tile row or two more than a block do not become a block of their own, which would read the
// weights once more.
TEST(TileOrder, BlocksAreOfOneSize) {
  const auto sizes = [](int m_tiles) { return block_sizes(order_of(m_tiles, 3, 16), 3); };
  EXPECT_EQ(sizes(4), (std::vector<int>{4}));
  EXPECT_EQ(sizes(17), (std::vector<int>{17}));
  EXPECT_EQ(sizes(23), (std::vector<int>{23}));
  EXPECT_EQ(sizes(24), (std::vector<int>{12, 12}));
  EXPECT_EQ(sizes(65), (std::vector<int>{17, 17, 17, 14}));
  for (int m_tiles = 1; m_tiles <= 400; ++m_tiles) {
    const std::vector<int> all = sizes(m_tiles);
    EXPECT_LE(all.front(), 23);
    for (const int size : all) EXPECT_LE(size, all.front());
    if (all.size() > 1) {
      EXPECT_GE(all.front(), 12);
      EXPECT_EQ(std::count(all.begin(), all.end() - 1, all.front()),
                static_cast<int>(all.size()) - 1);
    }
  }
}

}  // namespace
}  // namespace sonicmoe::cuda::hopper
