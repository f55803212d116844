#include "cuda/hopper/select.hpp"

#include <algorithm>

#include "core/integers.hpp"
#include "cuda/device.hpp"
#include "cuda/hopper/shape.hpp"
#include "cuda/products.hpp"
#include "cuda/sorted_rows.hpp"

namespace sonicmoe::cuda::hopper {
namespace {

constexpr std::int64_t kMiB = 1 << 20;

// A weight gradient of one k-tile an expert: nearly all it does is to store (lab M25).
bool only_stores(const ProductSizes& s) {
  constexpr std::int64_t kFewRows = 64;
  return s.product == Product::kWeightGradient && s.stores_bf16 && s.depth <= kFewRows;
}

bool gathers(Product p) { return p == Product::kUp || p == Product::kGradH; }

// Whether tiles are handed out in order or strided (mainloop/schedule.cuh).
//   product                        in order because                                     gain
//   up, dH                         neighbours share the rows they gather                 up to 20%
//   rows that are added to out     CTAs add to one part of out at a time                 up to 1.5x
//   weights beyond 6 MiB           CTAs at different experts fetch them again and again  1-4%
//   few k-tiles and many tiles     the CTAs would drift far apart                        (lab M7)
//   weight gradients of few rows   they store all the time: CTAs write side by side       2-4%
//   all on a shared device         CTAs that start late would come with a whole share    (lab M19)
// Else strided: in order costs 1-2% where weights are small, 8-13% in weight gradients.
bool in_order(const ProductSizes& s, const Choice& c) {
  if (s.product == Product::kLogits) return false;  // has no row list, and with it no counters
  if (s.shared_device) return true;
  if (s.product == Product::kWeightGradient) return only_stores(s);
  constexpr std::int64_t kMostWeight = 6 * kMiB, kShort = 256, kManyTiles = 256;
  const std::int64_t weight = kElementBytes * s.depth * c.n_tiles * c.block_n;
  const bool together = s.product == Product::kRows && tuning.start_together.value_or(false);
  return gathers(s.product) || s.add_rows || weight > kMostWeight || together ||
         (s.depth <= kShort && s.row_tiles * c.n_tiles > kManyTiles * c.grid);
}

// Whether stages are handed back early when data is short: 2-6% faster where reductions are short
// and the ring runs dry at every tile, 2-5% slower where the loaders nearly keep up. Never in
// weight gradients, 1-3% slower (lab M8, M12).
bool early_release(const ProductSizes& s) {
  if (s.product == Product::kWeightGradient) return false;
  return s.depth <= (gathers(s.product) ? 2048 : 512);
}

}  // namespace

Choice choose(const ProductSizes& s) {
  Choice c;
  c.block_n = choose_block_n(s.columns);
  if (s.product == Product::kGradH) c.stores = choose_stores(s.depth);
  c.n_tiles = static_cast<int>(ceil_div(s.columns, c.block_n));
  const std::int64_t most = tuning.grid > 0 ? tuning.grid : s.processors;
  c.grid = static_cast<int>(std::min(most, s.row_tiles * c.n_tiles));
  c.n_group =
      s.add_rows ? choose_add_group(s.num_tokens, s.depth, c.n_tiles, c.block_n) : c.n_tiles;
  // Groups of columns are an order of their own.
  if (c.n_group == c.n_tiles) {
    c.row_block = choose_row_block(s.depth, std::int64_t{c.n_tiles} * c.block_n);
  }
  c.in_order = in_order(s, c);
  c.early_release = early_release(s);
  c.evict_first = only_stores(s);
  c.start_together = choose_start_together(s, c);
  return c;
}

std::string describe(const Choice& c) {
  std::string text = std::to_string(c.block_n) + " columns, ";
  text += c.in_order ? "in order" : "strided";
  if (c.n_group != c.n_tiles) text += ", groups of " + std::to_string(c.n_group) + " column tiles";
  if (c.row_block > 1) text += ", blocks of " + std::to_string(c.row_block) + " tile rows";
  if (c.early_release) text += ", early release";
  if (c.evict_first) text += ", evict first";
  if (c.start_together) text += ", together";
  return text + ", " + std::to_string(c.grid) + " CTAs";
}

int choose_block_n(std::int64_t columns) {
  if (tuning.block_n != 0) return tuning.block_n;
  const std::int64_t wide = round_up(columns, 256), narrow = round_up(columns, 128);
  return narrow * 108 < wide * 100 ? 128 : 256;
}

StoreRoles choose_stores(std::int64_t hidden_size) {
  if (tuning.stores) return *tuning.stores;
  if (hidden_size >= 3072) return StoreRoles::kTwo;
  return hidden_size < 2048 ? StoreRoles::kThreeAndMath : StoreRoles::kThree;
}

int choose_add_group(std::int64_t num_tokens, std::int64_t depth, int n_tiles, int block_n) {
  constexpr std::int64_t kMostDepth = 256, kFits = 64 * kMiB, kWindow = 34 * kMiB;
  const std::int64_t tile = std::max<std::int64_t>(num_tokens * block_n * kElementBytes, 1);
  const std::int64_t forced = tuning.add_window;
  if (forced <= 0 && (depth > kMostDepth || tile * n_tiles <= kFits)) return n_tiles;
  const std::int64_t window = forced > 0 ? forced : kWindow;
  return static_cast<int>(std::clamp<std::int64_t>(window / tile, 1, n_tiles));
}

int choose_row_block(std::int64_t depth, std::int64_t columns) {
  constexpr std::int64_t kCached = 48 * kMiB;  // L2 has 50 MB on an H100, 60 on an H200
  constexpr int kSquare = 16, kMost = 1 << 16;
  if (tuning.row_block > 0) return std::min(tuning.row_block, kMost);
  return kElementBytes * depth * columns > kCached ? kSquare : 1;
}

bool choose_start_together(const ProductSizes& s, const Choice& c) {
  if (s.product != Product::kRows || !c.in_order) return false;
  if (tuning.start_together) return *tuning.start_together;
  constexpr std::int64_t kLeastDepth = 8192;  // over 4096 values waiting costs more than it saves
  return c.row_block > 1 && s.depth >= kLeastDepth && !s.add_rows && !s.shared_device;
}

bool choose_sorted(std::int64_t num_rows, std::int64_t num_groups, std::int64_t width,
                   std::int64_t columns) {
  constexpr std::int64_t kLeastColumns = 8192, kLeastRows = 256;
  // What the kernels need: whole blocks of 64 columns in a box, their tile, a row to load.
  if (num_rows == 0 || width % 64 != 0 || choose_block_n(columns) != kSortedBlockN) return false;
  if (tuning.sort_rows) return *tuning.sort_rows;
  const std::int64_t copy = saturating_mul(sorted_capacity(num_rows, num_groups), width);
  return columns >= kLeastColumns && num_rows >= saturating_mul(kLeastRows, num_groups) &&
         copy <= saturating_mul(num_rows, columns);
}

std::int64_t choose_slices(std::int64_t num_rows, std::int64_t width, std::int64_t columns) {
  constexpr std::int64_t kMaxWaves = 3, kMinRows = 256;
  constexpr std::int64_t kTileCost =
      512;  // rows that storing a tile and summing it later counts as
  const std::int64_t tiles = std::max<std::int64_t>(
      ceil_div(columns, choose_block_n(columns)) * ceil_div(width, kBlockM), 1);
  const std::int64_t most = std::min(kMaxWaves * kPlannedProcessors / tiles, num_rows / kMinRows);
  const auto cost = [&](std::int64_t slices) {
    return ceil_div(slices * tiles, std::int64_t{kPlannedProcessors}) *
           (slice_rows(num_rows, slices) + kTileCost);
  };
  std::int64_t best = 1;
  for (std::int64_t slices = 2; slices <= most; ++slices) {
    if (cost(slices) < cost(best)) best = slices;
  }
  return best;
}

bool depth_has_unit_stride(const ConstTensorView& w, int depth_dim) {
  const int other = 3 - depth_dim;
  if (w.stride(depth_dim) == 1 && w.size(depth_dim) > 1) return true;
  return w.stride(other) != 1 || w.size(other) == 1;
}

}  // namespace sonicmoe::cuda::hopper
