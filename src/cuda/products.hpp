// The matrix products that experts/ and router/ are made of, described by what they are: rows in
// groups, operands, widths. A family of kernels (hopper/) implements Products for GPUs of some
// compute capability; what it cannot take it declines with a reason. Which family serves a device
// is decided in device.cpp alone.
//
// Letters: T tokens, G groups of rows (experts), P capacity of the row list, R <= P rows, known to
// the device alone. d, n and g as in docs/design/algorithm.md. Rows are sorted by group.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string_view>

#include "core/integers.hpp"
#include "core/objection.hpp"
#include "cuda/element.hpp"
#include "sonicmoe/activation.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe::cuda {

inline constexpr int kTileRows = 128;

/// Which rows exist, in device memory. Either lists of rows, built by build_row_tables()
/// (experts/metadata.hpp) or write_lists() (router/gradient_terms.cuh), or nothing.
struct RowLists {
  static constexpr int kCounters = 3;
  const std::int32_t* row_token = nullptr;  ///< [P] token of a row; null: row r is token r
  /// Tiles of at most kTileRows rows of one group, in row order: {first row, rows from there to the
  /// group's end, group, tile of the group}. A group of m rows has ceil(m / kTileRows) tiles, all
  /// full but its last. [tile_capacity()] int4.
  const int4* tiles = nullptr;
  const std::int32_t* num_tiles = nullptr;  ///< [1]
  /// All groups, those with most rows first: {first row, rows, group, 0}. [G] int4.
  const int4* groups = nullptr;
  /// [kCounters] zeros: the launches' tile counters. Zero again after each launch.
  std::uint32_t* claims = nullptr;
};

/// Entries to allocate for RowLists::tiles.
inline std::int64_t tile_capacity(std::int64_t num_rows, std::int64_t num_groups) {
  return ceil_div(num_rows, kTileRows) + num_groups;
}

/// What all products share.
struct ProductCall {
  std::int64_t num_tokens = 0;  ///< T, rows of what is gathered from or added to
  std::int64_t num_rows = 0;    ///< P
  RowLists rows = {};
  cudaStream_t stream = nullptr;
  int device = 0;              ///< ordinal of the current device
  bool shared_device = false;  ///< Context::shared_device
};

/// Rows of a matrix with unit column stride. `ld` in elements.
struct Matrix {
  void* data = nullptr;
  std::int64_t ld = 0;

  /// Whether rows of bfloat16 start at multiples of 16 bytes.
  bool has_aligned_rows() const {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && ld % kVectorElements == 0;
  }
};

/// How a row of H [g*n] becomes a row of A [n].
struct HiddenFunction {
  Activation activation = Activation::kSwiGLU;
  GateUpLayout layout = GateUpLayout::kConcatenated;
  float limit = 0.0f;  ///< of swiglu_clamped
};

/// H[r] = X[token(r)] W1[e]^T + b1[e]; A[r] = s act(H[r]), from the rounded H, s = row_weight[r].
struct UpArgs {
  Matrix x;                 ///< [T, d]
  ConstTensorView w1;       ///< [G, g*n, d]
  ConstTensorView b1 = {};  ///< [G, g*n] or absent
  HiddenFunction function = {};
  void* h = nullptr;                  ///< [P, g*n] contiguous, or null (inference)
  void* a = nullptr;                  ///< [P, n] contiguous
  const float* row_weight = nullptr;  ///< [P] or null: 1
};

/// dA' = dO[token(r)] W2[e], rounded to the dtype; with A = act(H[r]) and s = row_weight[r]:
///   dH[r] = act'(H[r])^T (s dA');  A'[r] = s A;  partial[r * parts + j] = <dA', A> over the j-th
///   group of Products::partial_columns() columns, parts = ceil(n / partial_columns).
struct GradHArgs {
  Matrix grad_out;     ///< [T, d]
  ConstTensorView w2;  ///< [G, d, n]
  HiddenFunction function = {};
  const void* h = nullptr;            ///< [P, g*n] contiguous
  const float* row_weight = nullptr;  ///< [P] or null: 1
  void* grad_h = nullptr;             ///< [P, g*n] contiguous
  void* scaled_a = nullptr;           ///< [P, n] contiguous
  float* partial = nullptr;           ///< [P, parts]
};

/// out[r] = a[r] B[e] + row_weight[r] bias[e], B[e] = weight[e] as [depth, columns], for columns
/// first_column.. ; with `add_rows` out[token(r)] += that, by atomic additions that each round to
/// bfloat16. Serves Y = A W2^T, dX~ = dH W1 and the router's share of dX.
struct RowsArgs {
  const void* a = nullptr;    ///< [P, depth] contiguous
  ConstTensorView weight;     ///< [G, ., .], reduced over dimension `depth_dim`
  int depth_dim = 2;          ///< 1 or 2; the columns are the other
  ConstTensorView bias = {};  ///< [G, columns] or absent
  std::int64_t first_column = 0;
  std::int64_t num_columns = 0;
  Matrix out;                         ///< [P or T, num_columns], dtype of a
  const float* row_weight = nullptr;  ///< [P] or null: 1. Of the bias alone: a has it already
  bool add_rows = false;

  std::int64_t depth() const { return weight.size(depth_dim); }
};

/// grad[e] (+)= sum over rows r of e of gathered[token(r)]^T rows[r], zeros for a group without
/// rows. Serves dW1, dW2 and dWr.
struct WeightGradientArgs {
  Matrix gathered;             ///< [T, width]
  const void* rows = nullptr;  ///< [P, columns] contiguous
  TensorView grad;       ///< [G, ., .], dtype of the rows or float32, one of the last strides 1
  int gathered_dim = 1;  ///< 1 or 2: the dimension of grad that is `width`; the other is `columns`
  bool accumulate = false;  ///< float32 only: add to what is there
  /// The gathered rows as cuda/sorted_rows.hpp lays them, where sorts_rows() asks for them; or
  /// null.
  const void* sorted = nullptr;

  std::int64_t width() const { return grad.size(gathered_dim); }
  std::int64_t columns() const { return grad.size(3 - gathered_dim); }
};

/// logits [T, E] = x weight^T + bias, float32 sums, stored as they are. Takes no row list.
struct LogitsArgs {
  ConstTensorView x;          ///< [T, d]
  ConstTensorView weight;     ///< [E, d]
  ConstTensorView bias = {};  ///< [E] bf16 or float32, or absent
  float* logits = nullptr;    ///< [T, E] contiguous
};

using Reason = std::optional<Objection>;

/// A family of kernels. Every run() enqueues on call.stream and returns; nothing allocates or
/// synchronises. Reasons name the members of the arguments: see renamed().
class Products {
 public:
  virtual ~Products() = default;
  virtual std::string_view name() const = 0;
  virtual bool serves(int major, int minor) const = 0;  ///< of the compute capability

  /// Empty when run() takes the call. Pure host code: no CUDA call; scratch may be null.
  virtual Reason reason_against(const ProductCall& call, const UpArgs& args) const = 0;
  virtual Reason reason_against(const ProductCall& call, const GradHArgs& args) const = 0;
  virtual Reason reason_against(const ProductCall& call, const RowsArgs& args) const = 0;
  virtual Reason reason_against(const ProductCall& call, const WeightGradientArgs& args) const = 0;
  virtual Reason reason_against(const ProductCall& call, const LogitsArgs& args) const = 0;

  virtual void run(const ProductCall& call, const UpArgs& args) const = 0;
  virtual void run(const ProductCall& call, const GradHArgs& args) const = 0;
  virtual void run(const ProductCall& call, const RowsArgs& args) const = 0;
  virtual void run(const ProductCall& call, const WeightGradientArgs& args) const = 0;
  virtual void run(const ProductCall& call, const LogitsArgs& args) const = 0;

  /// Columns of dA' that one partial sum of dS covers, at least kLeastPartialColumns.
  virtual int partial_columns(std::int64_t n) const = 0;
  /// Whether a weight gradient [num_groups, width, columns] of `num_rows` rows reads its gathered
  /// rows from a copy in their order, where there is room for one. A function of these sizes alone.
  virtual bool sorts_rows(std::int64_t num_rows, std::int64_t num_groups, std::int64_t width,
                          std::int64_t columns) const = 0;
  /// Into how many groups of slice_rows() to cut the `num_rows` rows of one weight gradient [width,
  /// columns], so that it and the sum over the groups take least time. At least 1; a function of
  /// these sizes alone.
  virtual std::int64_t row_slices(std::int64_t num_rows, std::int64_t width,
                                  std::int64_t columns) const = 0;
};

inline constexpr std::int64_t kLeastPartialColumns = 128;

/// Rows of a slice where `num_rows` are cut into `slices`: whole steps of all kernels' reductions.
inline std::int64_t slice_rows(std::int64_t num_rows, std::int64_t slices) {
  constexpr std::int64_t kStep = 64;
  return std::max(round_up(ceil_div(num_rows, slices), kStep), kStep);
}

/// The reason with `from` called `to`, the caller's own name for that argument.
inline Reason renamed(Reason reason, std::string_view from, std::string_view to) {
  if (reason && reason->argument == from) reason->argument = to;
  return reason;
}

}  // namespace sonicmoe::cuda
