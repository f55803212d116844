// Epilogues that store the product as it is: rows of Y or dX~, and weight gradients.
//
// Interface of an epilogue, called by grouped_gemm.cuh:
//   finish(params, item, acc, warp, lane)   math warps, before rounding (bias, fp32 stores)
// and where a math thread stores the dump tile (GemmShape::bulk_stores())
//   store(params, item, w, half)            one thread, half w of the item
// else
//   State(params, layout, warp, lane)       what epilogue warp `warp` keeps over its items
//     .begin(item, w)                       announces each half in turn, ahead of its constructor
//   constructor(params, item, w, warp, lane, state)   half w of the item
//   store(half)                             reads the dumped half and stores it
// Eight lanes take 64 columns of a row in chunks of 16 bytes (but LaneUnits in hidden_input.cuh), a
// warp four rows: a half is sixteen groups of four rows, of which each math warp dumps four. Where
// reductions are short the tensor cores wait for the epilogue warps; there, a Spec has besides
// Epilogue a MathWarpEpilogue, by which each math warp stores the last of its four groups itself.
// It has Epilogue's Params and
//   State(params, item, w, warp, lane)      for one half, while its last products still run: math
//                                           warp `warp` of the half's four; no begin()
//   constructor, store(half)                as above
#pragma once

#include "cuda/hopper/shape.hpp"
#include "cuda/hopper/tile/swizzle.cuh"
#include "cuda/ptx/memory.cuh"
#include "cuda/ptx/tma.cuh"
#include "cuda/vector8.cuh"

namespace sonicmoe::cuda::hopper {

// Position of a lane in the half: the row of its i-th group of four, i < kGroups. kWarps epilogue
// warps take the groups in turn, with kMathWarpsStore without every fourth, which the math warps
// keep.
template <int kWarps, bool kMathWarpsStore = false>
struct HalfRows {
  static constexpr int kShared = kMathWarpsStore ? 3 : 4;  // of a math warp's groups
  static constexpr int kGroups = (4 * kShared + kWarps - 1) / kWarps;
  __device__ HalfRows(const Item& t, int w, int warp, int lane)
      : row0(t.row0 + 64 * w), rows(min(t.rows - 64 * w, 64)), warp(warp), lane(lane) {}
  // Epilogue warp `warp`'s i-th group.
  static __device__ int group(int warp, int i) {
    const int nth = warp + i * kWarps;
    return kMathWarpsStore ? nth + nth / kShared : nth;
  }
  __device__ int row(int i) const { return 4 * group(warp, i) + lane / 8; }
  __device__ bool valid(int i) const { return row(i) < rows; }
  // Groups of this warp with at least one row; the same for all lanes.
  __device__ int groups() const {
    const int all = (rows + 3) / 4, shared = kMathWarpsStore ? all - all / 4 : all;
    return max(shared - warp + kWarps - 1, 0) / kWarps;
  }
  int row0, rows, warp, lane;
};

// The same for the one group that math warp `warp` of the half's four keeps.
struct MathWarpRows {
  __device__ MathWarpRows(const Item& t, int w, int warp, int lane)
      : row0(t.row0 + 64 * w), rows(min(t.rows - 64 * w, 64)), warp(warp), lane(lane) {}
  __device__ int row(int) const { return first() + lane / 8; }
  __device__ bool valid(int i) const { return row(i) < rows; }
  __device__ int groups() const { return first() < rows ? 1 : 0; }
  int row0, rows, warp, lane;

 private:
  __device__ int first() const { return 4 * (4 * warp + 3); }
};

// One value per row out of global memory, loaded when a half is announced, a half ahead of its use:
// an epilogue that waited for its loads would hold up the math warps where reductions are short.
// Rows: a HalfRows.
template <class T, class Rows>
class RowValues {
 public:
  // by_row [P], or null: every row has `otherwise`.
  __device__ RowValues(const T* by_row, T otherwise, int warp, int lane)
      : by_row_(by_row), otherwise_(otherwise), warp_(warp), lane_(lane) {}

  // Lane l loads row l % 4 of row group l / 4.
  __device__ void begin(const Item& t, int w) {
    static_assert(Rows::kGroups <= 8);
    const Rows rows(t, w, warp_, lane_);
    const int row = 4 * Rows::group(warp_, lane_ / 4) + lane_ % 4;
    T& value = w == 0 ? values_[0] : values_[1];
    value = by_row_ == nullptr || row >= rows.rows ? otherwise_ : __ldg(by_row_ + rows.row0 + row);
  }

  // Of this lane's row in row group i of half w. All lanes.
  __device__ T of(int w, int i) const {
    return __shfl_sync(~0u, w == 0 ? values_[0] : values_[1], 4 * i + lane_ / 8);
  }

 private:
  const T* by_row_;
  T otherwise_;
  int warp_, lane_;
  T values_[2];
};

// acc += weight of the row * bias of the column, for one 64 x block_n half in the wgmma layout, of
// which a lane has two rows.
template <int kCount, class BiasAt>
__device__ void add_bias(float (&acc)[kCount], int lane, const float (&weights)[2],
                         BiasAt bias_at) {
#pragma unroll
  for (int b = 0; b < kCount / 4; ++b) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float bias = bias_at(8 * b + 2 * (lane % 4) + i);
      acc[4 * b + i] += weights[0] * bias;
      acc[4 * b + 2 + i] += weights[1] * bias;
    }
  }
}

// out[r, c] = round(acc + row_weight[r] bias[e, c]), or out[row_token[r], c] += that.
template <int kBlockN, int kWarps>
class StoreRows {
 public:
  using Rows = HalfRows<kWarps>;
  struct Params {
    bf16* out;  // [*, ld]
    int64_t ld;
    const float* row_weight;        // [P] or null: 1
    const std::int32_t* row_token;  // [P]: rows are added to their tokens' rows of out; or null
    const bf16* bias;               // [E, bias_ld], already at the first column, or null
    int64_t bias_ld;
    int columns;
  };

  // The rows' tokens.
  struct State : RowValues<std::int32_t, Rows> {
    __device__ State(const Params& p, const SharedLayout&, int warp, int lane)
        : RowValues<std::int32_t, Rows>(p.row_token, 0, warp, lane) {}
  };

  template <int kCount>
  static __device__ void finish(const Params& p, const Item& t, float (&acc)[kCount], int warp,
                                int lane) {
    if (p.bias == nullptr) return;
    const bf16* bias = p.bias + t.expert * p.bias_ld;
    const int row = warp * 16 + lane / 4;
    const float weights[2] = {weight_of(p, t, row), weight_of(p, t, row + 8)};
    add_bias(acc, lane, weights, [&](int c) {
      const int column = t.n * kBlockN + c;
      return column < p.columns ? __bfloat162float(bias[column]) : 0.0f;
    });
  }

  __device__ StoreRows(const Params& p, const Item& t, int w, int warp, int lane, State& tokens)
      : p_(p),
        rows_(t, w, warp, lane),
        column0_(t.n * kBlockN + (lane & 7) * 8),
        w_(w),
        tokens_(tokens) {}

  __device__ void store(uint32_t half) {
    if (p_.row_token == nullptr) {
      for_each_chunk(
          half, [this](int i) { return rows_.row0 + rows_.row(i); },
          [](bf16* out, const uint4& v) { ptx::store_global_v4(out, v); });
    } else {
      for_each_chunk(
          half, [this](int i) { return tokens_.of(w_, i); },
          [](bf16* out, const uint4& v) { ptx::reduce_add_bf16x2_v4(out, v); });
    }
  }

 private:
  // Calls visit(address, eight values); out_row(i): row of out for row group i, by all lanes.
  template <class OutRow, class Visit>
  __device__ void for_each_chunk(uint32_t half, OutRow out_row, Visit visit) {
    constexpr int kBlocks = kBlockN / 64;
    const int groups = rows_.groups();
#pragma unroll
    for (int i = 0; i < Rows::kGroups; ++i) {
      if (i >= groups) break;
      const int row = rows_.row(i), left = rows_.valid(i) ? p_.columns - column0_ : 0;
      bf16* out = p_.out + int64_t{out_row(i)} * p_.ld + column0_;
      const uint32_t from = half + tile::dump_offset(row, rows_.lane & 7);
      uint4 v[kBlocks];
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        v[block] = ptx::load_shared_v4(from + block * tile::kBlockBytes);
      }
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        if (block * 64 < left) visit(out + block * 64, v[block]);
      }
    }
  }
  // Weight of row `row` of the tile; any value past its end.
  static __device__ float weight_of(const Params& p, const Item& t, int row) {
    return p.row_weight == nullptr || row >= t.rows ? 1.0f : __ldg(p.row_weight + t.row0 + row);
  }
  const Params& p_;
  Rows rows_;
  int column0_, w_;
  const State& tokens_;
};

// Weight gradients: out[e, r, c] with strides (expert, row, column), r of d, one of the last two
// strides 1. bf16 through the dump by TMA (kRows: unit column stride, kTransposed: unit row
// stride). float32 straight from the accumulators, added to what is there with `accumulate`.
template <int kBlockN, Dump kDump>
struct StoreWeightGradient {
  struct Params {
    void* out;
    int64_t expert_stride, row_stride, column_stride;
    int rows, columns;
    bool accumulate;   // kDirect only
    bool evict_first;  // else
    CUtensorMap map;   // boxes of 64 columns x 64 rows, transposed 64 rows x kBlockN columns
  };

  template <int kCount>
  static __device__ void finish(const Params& p, const Item& t, float (&acc)[kCount], int warp,
                                int lane) {
    if constexpr (kDump == Dump::kDirect) {
      float* out = static_cast<float*>(p.out) + t.expert * p.expert_stride;
      const int row0 = t.m * kBlockM + warp * 16 + lane / 4;
      const int column0 = t.n * kBlockN + 2 * (lane % 4);
#pragma unroll
      for (int i = 0; i < kCount; i += 2) {
        const int row = row0 + i / 2 % 2 * 8, column = column0 + i / 4 * 8;
        if (row >= p.rows || column >= p.columns) continue;  // columns is even
        float* at = out + row * p.row_stride + column * p.column_stride;
        if (p.column_stride == 1) {
          float2 v = {acc[i], acc[i + 1]};
          if (p.accumulate) {
            const float2 old = *reinterpret_cast<const float2*>(at);
            v = {old.x + v.x, old.y + v.y};
          }
          *reinterpret_cast<float2*>(at) = v;
        } else {
          at[0] = acc[i] + (p.accumulate ? at[0] : 0.0f);
          at[p.column_stride] = acc[i + 1] + (p.accumulate ? at[p.column_stride] : 0.0f);
        }
      }
    }
  }

  // One thread: half w of the item by TMA, in boxes clipped to the expert's gradient, in the
  // thread's open bulk group.
  static __device__ void store(const Params& p, const Item& t, int w, uint32_t half) {
    const int row = t.m * kBlockM + 64 * w, column = t.n * kBlockN;
    const auto store_box = [&](uint32_t source, int inner, int outer) {
      if (p.evict_first) {
        ptx::tma_store_evict_first(&p.map, source, inner, outer, t.expert);
      } else {
        ptx::tma_store(&p.map, source, inner, outer, t.expert);
      }
    };
    if constexpr (kDump == Dump::kRows) {
#pragma unroll
      for (int block = 0; block < kBlockN / 64; ++block) {
        if (column + 64 * block >= p.columns) break;
        store_box(half + block * tile::kBlockBytes, column + 64 * block, row);
      }
    } else {
      static_assert(kDump == Dump::kTransposed);
      store_box(half, row, column);
    }
  }
};

// The same by epilogue warps: the first two issue the store of one half each, so that the math
// warps, whose products a TMA store would hold up for some 400 clocks (lab M15), go on.
template <int kBlockN, Dump kDump>
class WarpStoreWeightGradient {
 public:
  using Stores = StoreWeightGradient<kBlockN, kDump>;
  using Params = Stores::Params;
  struct State {
    __device__ State(const Params&, const SharedLayout&, int, int) {}
    __device__ void begin(const Item&, int) {}
  };

  template <int kCount>
  static __device__ void finish(const Params&, const Item&, float (&)[kCount], int, int) {}

  __device__ WarpStoreWeightGradient(const Params& p, const Item& t, int w, int warp, int lane,
                                     State&)
      : p_(p), t_(t), w_(w), issues_(warp == w && lane == 0) {}

  // Returns when the half has been read: the math warps may then overwrite it.
  __device__ void store(uint32_t half) {
    if (!issues_) return;
    Stores::store(p_, t_, w_, half);
    ptx::bulk_commit_group();
    ptx::bulk_wait_group_read<0>();
  }

 private:
  const Params& p_;
  const Item& t_;
  int w_;
  bool issues_;
};

}  // namespace sonicmoe::cuda::hopper
