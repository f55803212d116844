// How a product is run where several ways give the same results. Plain data: tests without CUDA
// read it too.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

namespace sonicmoe::cuda::hopper {

/// Who stores dH. kTwo, kThree: that many of the four helper warps, the rest load. kThreeAndMath:
/// three helper warps store 3/4, the math warps 1/4.
enum class StoreRoles { kThreeAndMath, kThree, kTwo };

/// Everything that is chosen for one launch; by choose() in select.cpp.
struct Choice {
  int block_n = 256;                     ///< columns of a tile
  StoreRoles stores = StoreRoles::kTwo;  ///< of dH alone
  int grid = 0;                          ///< CTAs; 0: nothing to launch
  int n_tiles = 0;                       ///< column tiles
  int n_group = 0;                       ///< column tiles that all rows pass before the next ones
  int row_block = 1;                     ///< tile rows of an expert that pass its columns together
  bool in_order = false;                 ///< whoever is free claims the next tile; else strided
  bool early_release = false;   ///< stages are handed back when their own products are done
  bool evict_first = false;     ///< a weight gradient leaves L2 before what is read
  bool start_together = false;  ///< CTAs wait for each other before a tile (mainloop/schedule.cuh)
};

/// "256 columns, in order, blocks of 16 tile rows, 132 CTAs", for SONICMOE_LOG=dispatch.
std::string describe(const Choice& choice);

/// What tests force in place of what choose() would take. Nothing else writes it.
struct Tuning {
  int block_n = 0;  ///< 128 or 256; 0: chosen
  std::optional<StoreRoles> stores = {};
  int grid = 0;                        ///< CTAs at most; 0: one a multiprocessor
  std::int64_t add_window = 0;         ///< bytes of `out` that a group of columns covers; 0: chosen
  int row_block = 0;                   ///< 0: chosen
  std::optional<bool> sort_rows = {};  ///< where the kernels could read sorted rows at all
  std::optional<bool> start_together = {};  ///< products over rows; then in order
};
inline Tuning tuning;

/// Columns of a tile of the weight gradients that read sorted rows.
inline constexpr int kSortedBlockN = 256;

}  // namespace sonicmoe::cuda::hopper
