// In which order the tiles of an expert are numbered. Plain arithmetic, for device and host.
#pragma once

#include "math/host_device.hpp"

namespace sonicmoe::cuda::hopper {

struct TilePosition {
  int m, n;  // tile row and column
};

/// Where tile `index` of an expert's m_tiles x n_tiles lies. Tile rows are passed in blocks, each
/// through all columns before the next one begins: rows are fastest, then columns, then blocks. A
/// block has about `row_block` tile rows: as many blocks as that divides best, all of one size but
/// the last, which may be smaller. With row_block = 1 columns are fastest.
SONICMOE_HD constexpr TilePosition tile_position(int index, int m_tiles, int n_tiles,
                                                 int row_block) {
  const int nearest = (m_tiles + row_block / 2) / row_block, blocks = nearest > 1 ? nearest : 1;
  const int size = (m_tiles + blocks - 1) / blocks, first = index / (size * n_tiles) * size;
  const int rows = size < m_tiles - first ? size : m_tiles - first;
  const int within = index - first * n_tiles;
  return {first + within % rows, within / rows};
}

}  // namespace sonicmoe::cuda::hopper
