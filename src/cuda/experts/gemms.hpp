// The six grouped GEMMs of the expert layer, as the CUDA backend calls them: bf16 on wgmma and TMA;
// what they cannot take they decline with a reason. Every function enqueues on call.stream and
// returns; nothing allocates or synchronises.
//
// Letters: T tokens, d hidden_size, n intermediate_size, g = 2 when gated else 1, E experts, P
// capacity of the row list, R <= P rows (known to the device alone). Rows are sorted by expert.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <optional>

#include "core/integers.hpp"
#include "core/objection.hpp"
#include "sonicmoe/moe.hpp"

namespace sonicmoe::cuda {

/// Which rows exist, in device memory; built by build_row_tables() (metadata.hpp).
struct RowLists {
  const std::int32_t* offsets = nullptr;    ///< [E] cumulative ends; offsets[E-1] = R
  const std::int32_t* row_token = nullptr;  ///< [P] token of a row; null: row r is token r
  /// Tiles of at most 128 rows of one expert, in row order: {first row, rows from there to the
  /// expert's end, expert, tile of the expert}. An expert of m rows has ceil(m/128) tiles, all full
  /// but its last. [tile_capacity()] int4.
  const int4* tiles = nullptr;
  const std::int32_t* num_tiles = nullptr;  ///< [1]
  /// All experts by falling row count, ties by index: {first row, rows, expert, 0}. [E] int4.
  const int4* experts = nullptr;
  /// [2] zeros: the launches' tile counters. Zero again after each launch.
  std::uint32_t* claims = nullptr;
};

inline constexpr int kTileRows = 128;

/// Entries to allocate for RowLists::tiles.
inline std::int64_t tile_capacity(std::int64_t num_pairs, std::int64_t num_experts) {
  return ceil_div(num_pairs, kTileRows) + num_experts;
}

/// What all six share.
struct ExpertCall {
  MoEShape shape;
  ExpertOptions options;
  RowLists rows;
  cudaStream_t stream = nullptr;
  int device = 0;  ///< ordinal of the current device
};

/// Rows of a matrix with unit column stride. `ld` in elements.
struct Matrix {
  void* data = nullptr;
  std::int64_t ld = 0;

  /// Whether rows of bfloat16 start at multiples of 16 bytes.
  bool has_aligned_rows() const {
    return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && ld % 8 == 0;
  }
};

/// H[r] = X[token(r)] W1[e]^T + b1[e]; A[r] = s act(H[r]), from the rounded H, s = row_weight[r].
struct UpArgs {
  Matrix x;                           ///< [T, d]
  ConstTensorView w1;                 ///< [E, g*n, d]
  ConstTensorView b1;                 ///< [E, g*n] or absent
  void* h = nullptr;                  ///< [P, g*n] contiguous, or null (inference)
  void* a = nullptr;                  ///< [P, n] contiguous
  const float* row_weight = nullptr;  ///< [P] or null: 1
};

/// out[r] = A[r] W2[e]^T + row_weight[r] b2[e] for columns first_column.. of d; with `add_rows`
/// out[token(r)] += that, by atomic additions that each round to bfloat16.
struct DownArgs {
  const void* a = nullptr;  ///< [P, n] contiguous
  ConstTensorView w2;       ///< [E, d, n]
  ConstTensorView b2;       ///< [E, d] or absent
  std::int64_t first_column = 0;
  std::int64_t num_columns = 0;
  Matrix out;                         ///< [P or T, num_columns], dtype of x
  const float* row_weight = nullptr;  ///< [P] or null: 1. A has it already
  bool add_rows = false;
};

/// dA' = dO[token(r)] W2[e], rounded to the dtype; with A = act(H[r]) and s = row_weight[r]:
///   dH[r] = act'(H[r])^T (s dA');  A'[r] = s A;  partial[r * parts + j] = <dA', A> over the j-th
///   group of partial_columns columns, parts = ceil(n / partial_columns).
struct HiddenGradientArgs {
  Matrix grad_out;                    ///< [T, d]
  ConstTensorView w2;                 ///< [E, d, n]
  const void* h = nullptr;            ///< [P, g*n] contiguous
  const float* row_weight = nullptr;  ///< [P] or null: 1
  void* grad_h = nullptr;             ///< [P, g*n] contiguous
  void* scaled_a = nullptr;           ///< [P, n] contiguous
  float* partial = nullptr;           ///< [P, parts]; see hopper::partial_columns()
};

/// out[r] = dH[r] W1[e] for columns first_column.. of d; with `add_rows` as DownArgs.
struct InputGradientArgs {
  const void* grad_h = nullptr;  ///< [P, g*n] contiguous
  ConstTensorView w1;            ///< [E, g*n, d]
  std::int64_t first_column = 0;
  std::int64_t num_columns = 0;
  Matrix out;  ///< [P or T, num_columns], dtype of x
  bool add_rows = false;
};

/// grad_w2[e] (+)= sum over rows r of e of dO[token(r)]^T A'[r], zeros for an expert without rows.
struct DownWeightGradientArgs {
  Matrix grad_out;                 ///< [T, d]
  const void* scaled_a = nullptr;  ///< [P, n] contiguous
  TensorView grad_w2;              ///< [E, d, n], dtype of x or float32, one of the last strides 1
  bool accumulate = false;         ///< float32 only: add to what is there
};

/// grad_w1[e] (+)= sum over rows r of e of dH[r]^T X[token(r)], zeros for an expert without rows.
struct UpWeightGradientArgs {
  const void* grad_h = nullptr;  ///< [P, g*n] contiguous
  Matrix x;                      ///< [T, d]
  TensorView grad_w1;            ///< [E, g*n, d], as grad_w2
  bool accumulate = false;
};

namespace hopper {
/// Empty when the call can run here, else the argument that is in the way. Pure host code: no CUDA
/// call; buffers of the workspace may be null.
std::optional<Objection> reason_against(const ExpertCall& call, const UpArgs& args);
std::optional<Objection> reason_against(const ExpertCall& call, const DownArgs& args);
std::optional<Objection> reason_against(const ExpertCall& call, const HiddenGradientArgs& args);
std::optional<Objection> reason_against(const ExpertCall& call, const InputGradientArgs& args);
std::optional<Objection> reason_against(const ExpertCall& call, const DownWeightGradientArgs& args);
std::optional<Objection> reason_against(const ExpertCall& call, const UpWeightGradientArgs& args);

void up(const ExpertCall& call, const UpArgs& args);
void down(const ExpertCall& call, const DownArgs& args);
void hidden_gradient(const ExpertCall& call, const HiddenGradientArgs& args);
void input_gradient(const ExpertCall& call, const InputGradientArgs& args);
void down_weight_gradient(const ExpertCall& call, const DownWeightGradientArgs& args);
void up_weight_gradient(const ExpertCall& call, const UpWeightGradientArgs& args);
/// Columns of dA' that one partial sum of dS covers for this shape: 256 or 128.
int partial_columns(const MoEShape& shape);
}  // namespace hopper

}  // namespace sonicmoe::cuda
