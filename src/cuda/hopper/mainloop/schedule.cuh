// Which tile a CTA computes next.
//
// Tiles are numbered expert by expert, in one of three orders:
//   columns fastest  all columns of a tile row, then the next row: neighbours share the rows
//   row_block > 1    blocks of tile rows, rows fastest (tile_order.hpp): CTAs that run together
//                    cover a square of the product, and the weights pass once per block (lab M18)
//   n_group          groups of column tiles: all rows of all experts before the next group
// What a tile computes does not depend on its number or on who computes it.
// Two ways to hand them out (choice.hpp: in_order):
//   in order   whoever is free claims the next tile: the CTAs work on neighbouring tiles at any
//              time, whose operands are then in L2. With strides the faster CTAs run ahead, and
//              the slower ones load again what has left L2 (lab M7).
//   strided    every gridDim-th tile: the CTAs drift apart, which spares them asking for the same
//              lines of L2 at the same time. Faster where the operands stay in L2 anyway.
//
// Together (choice.hpp: start_together): a CTA begins its next tile when nearly all CTAs have come
// to theirs. CTAs of neighbouring tiles then walk a long reduction side by side, so that L2 keeps
// what they share; by themselves they drift until each is somewhere else in it (lab M23).
//
// The first loader warp claims tiles with an atomic counter, two ahead, so that neither the atomic
// nor the table entry is waited for, and passes them to the other warps through a small ring.
#pragma once

#include "cuda/hopper/mainloop/tile_order.hpp"
#include "cuda/hopper/shape.hpp"
#include "cuda/hopper/tile/pipeline.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/ptx/memory.cuh"

namespace sonicmoe::cuda::hopper {

using tile::Role;
using tile::Slot;

// Not lane 0: its arrivals on the pipeline's barriers are releases, which would wait for an atomic
// under way.
inline constexpr int kClaimLane = 31;

// {first row, rows (-1: no more tiles), expert, tile within the entry}
template <class Spec>
__device__ Item make_item(const OperandParams& p, const uint4& v) {
  Item t;
  t.row0 = static_cast<int>(v.x);
  t.rows = static_cast<int>(v.y);
  t.expert = static_cast<int>(v.z);
  t.m = static_cast<int>(v.w) / p.n_tiles;
  t.n = static_cast<int>(v.w) % p.n_tiles;
  const int depth = Spec::shape.grouping == Grouping::kRows ? p.depth : t.rows;
  t.k_tiles = (depth + kBlockK - 1) / kBlockK;
  return t;
}

// The first loader warp's side, called by all its lanes.
template <class Spec>
class ItemSource {
 public:
  __device__ ItemSource(const OperandParams& p, const SharedLayout& l, int lane)
      : p_(p), l_(l), lane_(lane), index_(blockIdx.x) {
    const int entries = p.num_entries == nullptr ? p.max_entries : __ldg(p.num_entries);
    per_group_ = entries * p.m_tiles * p.n_group;
    items_ = entries * p.m_tiles * p.n_tiles;
    fetch();
    claim();
  }

  // Before a tile is loaded. Cannot hang, whatever the other CTAs do, nor if some of the grid do
  // not run yet: no CTA waits longer than its patience, and none holds a lock or a claim that
  // another one needs for its tile. Only time depends on what the counter says.
  __device__ void await_others() {
    if (p_.start_patience == 0) return;
    if (lane_ == kClaimLane) {
      started_by_all_ += gridDim.x;
      atomicAdd(p_.claims + kStarts, 1u);
      const uint32_t begin = clock(), slack = gridDim.x / 16;
      const volatile uint32_t* const started = p_.claims + kStarts;
      while (*started + slack < started_by_all_ &&
             static_cast<uint32_t>(clock()) - begin < static_cast<uint32_t>(p_.start_patience)) {
        __nanosleep(100);
      }
    }
    __syncwarp();
    tile::pause(Role::kLoader, Slot::kStart, 0);
  }

  __device__ bool next(Item& t) {
    const bool more = index_ < items_;
    if (more && p_.row_block > 1) reorder();
    const int rows = kByRows ? min(entry_.y, kBlockM) : entry_.y;
    const uint4 v = {static_cast<uint32_t>(entry_.x),
                     more ? static_cast<uint32_t>(rows) : 0xffffffffu,
                     static_cast<uint32_t>(entry_.z), static_cast<uint32_t>(tile_)};
    tile::wait(l_.item_empty + 8 * ring_.stage, ring_.parity ^ 1, Role::kLoader, Slot::kItemEmpty,
               ring_.stage);
    if (lane_ == 0) {
      ptx::store_shared_v4(l_.items + 16 * ring_.stage, v);
      ptx::mbarrier_arrive(l_.item_full + 8 * ring_.stage);
    }
    __syncwarp();
    ring_.advance();
    if (!more) {
      retire();
      return false;
    }
    t = make_item<Spec>(p_, v);
    index_ = __shfl_sync(~0u, claimed_, kClaimLane);
    fetch();
    claim();
    return true;
  }

 private:
  // The counters: claims beyond the first of each CTA, CTAs that are done, tiles begun.
  static constexpr int kClaimed = 0, kRetired = 1, kStarts = 2;
  static constexpr bool kByRows = Spec::shape.grouping == Grouping::kRows;

  // The entry and the tile within it that index_ begins with, columns fastest.
  __device__ void fetch() {
    if (index_ >= items_) return;
    const int group = index_ / per_group_, first = group * p_.n_group;
    const int tiles = p_.m_tiles * min(p_.n_group, p_.n_tiles - first);  // of an entry
    const int within = index_ - group * per_group_, i = within / tiles;
    tile_ = first + within % tiles;
    if (p_.entries != nullptr) {
      entry_ = __ldg(p_.entries + i);
    } else {
      entry_ = {i * kBlockM, min(kBlockM, p_.num_rows - i * kBlockM), 0, 0};
    }
  }
  // The same tile number in blocks of tile rows. It belongs to the same expert in either order, so
  // what is needed follows from the entry that was fetched, at the time it is used.
  __device__ void reorder() {
    if constexpr (kByRows) {
      const int row = entry_.w, m_tiles = row + (entry_.y + kBlockM - 1) / kBlockM;
      const TilePosition at =
          tile_position(row * p_.n_tiles + tile_, m_tiles, p_.n_tiles, p_.row_block);
      entry_.x += (at.m - row) * kBlockM;
      entry_.y -= (at.m - row) * kBlockM;
      tile_ = at.n;
    } else {
      const TilePosition at = tile_position(tile_, p_.m_tiles, p_.n_tiles, p_.row_block);
      tile_ = at.m * p_.n_tiles + at.n;
    }
  }
  __device__ void claim() {
    if (p_.claims == nullptr) {
      claimed_ = index_ + static_cast<int>(gridDim.x);
    } else if (lane_ == kClaimLane) {
      claimed_ = static_cast<int>(gridDim.x + atomicAdd(p_.claims + kClaimed, 1u));
    }
  }
  // The last CTA clears the counters for the next launch. Those that still wait for this one's next
  // tile count it as begun.
  __device__ void retire() {
    if (p_.claims == nullptr || lane_ != kClaimLane) return;
    if (p_.start_patience > 0) {
      atomicAdd(p_.claims + kStarts, 1u);
      __threadfence();  // before this CTA counts as retired: nothing comes after the clearing
    }
    if (atomicAdd(p_.claims + kRetired, 1u) == gridDim.x - 1) {
      if (p_.start_patience > 0) {
        __threadfence();
        p_.claims[kStarts] = 0;
      }
      p_.claims[kClaimed] = 0;
      p_.claims[kRetired] = 0;
    }
  }

  const OperandParams& p_;
  const SharedLayout& l_;
  int lane_, index_, items_, per_group_, tile_ = 0, claimed_ = 0;
  int4 entry_{};
  uint32_t started_by_all_ = 0;  // kStarts when all CTAs have begun as many tiles as this one
  tile::RingState<kItemSlots> ring_;
};

// Every other warp's side.
template <class Spec>
class ItemSink {
 public:
  __device__ ItemSink(const OperandParams& p, const SharedLayout& l, int lane, Role role)
      : p_(p), l_(l), lane_(lane), role_(role) {}

  __device__ bool next(Item& t) {
    tile::wait(l_.item_full + 8 * ring_.stage, ring_.parity, role_, Slot::kItemFull, ring_.stage);
    const uint4 v = ptx::load_shared_v4(l_.items + 16 * ring_.stage);
    __syncwarp();
    if (lane_ == 0) ptx::mbarrier_arrive(l_.item_empty + 8 * ring_.stage);
    ring_.advance();
    if (static_cast<int>(v.y) < 0) return false;
    t = make_item<Spec>(p_, v);
    return true;
  }

 private:
  const OperandParams& p_;
  const SharedLayout& l_;
  int lane_;
  Role role_;
  tile::RingState<kItemSlots> ring_;
};

}  // namespace sonicmoe::cuda::hopper
