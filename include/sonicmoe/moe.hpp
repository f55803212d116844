// The expert layer: forward and backward of a Mixture-of-Experts MLP with ready-made routing.
//
// Symbols (docs/design/algorithm.md): T tokens, d hidden_size, n intermediate_size, E num_experts,
// K top_k, P routed pairs handed over, R <= P rows left after dropped pairs, C rows that buffers
// have room for (P, or max_rows where that is less), g = 2 for a gated activation, else 1. Source:
// SonicMoE, arXiv 2512.14080.
//
// For every routed row r = (token t, expert e) with weight s:
//   H[r] = X[t] W1[e]^T + b1[e]      [g*n]  kept for backward (skipped in inference)
//   A[r] = act(H[r])                 [n]    transient
//   Y[r] = A[r] W2[e]^T + b2[e]      [d]    transient
//   O[t] = sum over the rows r of token t, in input order, of s * Y[r]
// (On CUDA, where Y is not summed from memory, A is stored as s * A, and O gets (s A) W2^T + s b2.)
// Backward keeps nothing of size R*d and recomputes no GEMM: dS[r] = <dO[t] W2[e], A[r]>.
//
// Every argument of a call is checked before anything is written. What only contents can show (NaN,
// ids and offsets out of range, metadata of something else) is refused on the CPU; outputs may then
// be written in part, but nothing has been added to gradients that accumulate.
//
// All operations allocate nothing on behalf of the caller, synchronise nothing, and are
// deterministic unless ExpertOptions::deterministic is off: the same inputs give the same bits for
// every run and every thread count.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <variant>

#include "sonicmoe/activation.hpp"
#include "sonicmoe/context.hpp"
#include "sonicmoe/export.hpp"
#include "sonicmoe/numerics.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe {

// ---------------------------------------------------------------------------------------- routing

/// Form A, K slots per token. `topk_ids` [T, K] int32|int64; `topk_weights` [T, K]
/// float32|bfloat16. An id outside first_expert .. first_expert + E - 1 is a dropped slot: no row
/// is computed, it contributes exactly 0 and its weight gradient is exactly 0. A token may name an
/// expert twice; both slots count.
struct TopKRouting {
  ConstTensorView topk_ids;
  ConstTensorView topk_weights;
  std::int64_t first_expert = 0;  ///< id of the first of the E experts, >= 0
};

/// Form B, rows already sorted by expert. `offsets` [E] int32: cumulative ends, non-decreasing, the
/// last at most P = x.size(0). `row_weights` [P] float32|bfloat16, or absent for 1. No gather, no
/// sum over tokens: out[r] = s[r] * Y[r]. Rows at or past offsets[E-1] are never read (they may
/// hold NaN); they are zero in the output and in every gradient.
struct SortedRouting {
  ConstTensorView offsets;
  ConstTensorView row_weights;
};

/// Form C, any list of pairs in any order. `token_ids`, `expert_ids` [P] int32|int64 (equal
/// dtypes), `pair_weights` [P] float32|bfloat16. A pair whose expert is not among the E, or whose
/// token is outside 0..T-1, is dropped as in form A. Duplicates count each time.
struct PairRouting {
  ConstTensorView token_ids;
  ConstTensorView expert_ids;
  ConstTensorView pair_weights;
  std::int64_t first_expert = 0;  ///< as in form A
};

/// Which expert computes which token, with which weight: one of the three forms.
using Routing = std::variant<TopKRouting, SortedRouting, PairRouting>;

// ---------------------------------------------------------------------------------------- experts

/// What all experts of a layer compute, and how.
struct ExpertOptions {
  Activation activation = Activation::kSwiGLU;
  GateUpLayout gate_up_layout = GateUpLayout::kConcatenated;
  float limit = 7.0f;  ///< of swiglu_clamped, > 0; unused otherwise
  /// false: a token's rows may be added to O and to dX atomically, in any order, each sum rounded
  /// to the dtype of x. The CUDA backend then never stores Y or dX~ [P, d]: faster, with less
  /// scratch, but the last bits differ from run to run and K roundings take the place of one; rows
  /// of out and of grad_x must start at multiples of 16 bytes, else it throws. Other backends and
  /// sorted rows, which have no such sum, ignore it.
  bool deterministic = true;
  /// Rows that H and all scratch have room for, >= 0; absent: P. Rows are numbered by expert; the
  /// pair of a row max_rows or beyond is a dropped slot, so that the last experts lose theirs
  /// first. MoEForwardArgs::rows_dropped counts them. Not with sorted rows, which are the output
  /// themselves.
  std::optional<std::int64_t> max_rows = {};
  /// false: rows of O and of dX of a token without rows hold anything, for callers that read those
  /// of the others alone. A layer's dX holds the router's part all the same.
  bool zero_absent_tokens = true;
};

/// Parameters of the experts, all of the dtype of x. One of the last two strides of w1 and of w2
/// must be 1, so that a transposed view is accepted without a copy; other strides are free.
struct ExpertWeights {
  ConstTensorView w1;  ///< [E, g*n, d]
  ConstTensorView b1;  ///< [E, g*n] or absent
  ConstTensorView w2;  ///< [E, d, n]
  ConstTensorView b2;  ///< [E, d] or absent
};

/// Sizes that decide every buffer; see moe_shape().
struct MoEShape {
  enum class Form : std::uint8_t { kTopK, kSorted, kPairs };
  std::int64_t num_tokens = 0;         ///< T (= P for Form::kSorted)
  std::int64_t hidden_size = 0;        ///< d
  std::int64_t intermediate_size = 0;  ///< n
  std::int64_t num_experts = 0;        ///< E
  std::int64_t num_pairs = 0;          ///< P = T*K, rows of x, or length of the pair list
  Form form = Form::kTopK;  ///< decides the metadata; sorted rows are not summed by token
  Activation activation = Activation::kSwiGLU;
  Numerics numerics;                          ///< of the dtype of x
  bool deterministic = true;                  ///< ExpertOptions::deterministic
  std::optional<std::int64_t> max_rows = {};  ///< ExpertOptions::max_rows

  /// C: rows of H, A, Y, dH and A'.
  std::int64_t row_capacity() const noexcept {
    return max_rows && *max_rows < num_pairs ? *max_rows : num_pairs;
  }
  /// g*n.
  std::int64_t h_columns() const noexcept { return gate_factor(activation) * intermediate_size; }
};

/// The shape of a call, after checking x, the weights and the routing against each other.
/// Errors: any shape, dtype or stride that the structs above rule out.
SONICMOE_API MoEShape moe_shape(const ExpertOptions& options, ConstTensorView x,
                                const ExpertWeights& weights, const Routing& routing);

/// Bytes of H: C * g*n * size_of(numerics.storage).
SONICMOE_API std::size_t moe_h_bytes(const MoEShape& shape);

/// Bytes of the routing metadata kept for backward: with int32 entries, 4 E for sorted rows,
/// 4 (E + P + 2 C) for top-K, 4 (E + 2 P + 2 C + T + 1) for pair lists. At most 16 bytes a pair
/// beside the caller's own ids and weights, plus 4 E (+ 4 T).
SONICMOE_API std::size_t moe_metadata_bytes(const MoEShape& shape);

/// How the scratch of one call is laid out.
struct WorkspacePlan {
  std::size_t bytes = 0;          ///< to be handed over as `workspace`
  std::size_t minimum_bytes = 0;  ///< the least `workspace_limit` that is accepted
  std::int64_t slab_columns = 0;  ///< columns of d per slab of Y (forward) or dX~ (backward)
  int num_slabs = 0;              ///< 1 without a limit
};

/// What one call of a backward does. Four calls in this order, one for each step after kAll, give
/// the bits of one call with kAll, and let every buffer go after the last step that reads it: the
/// most memory in use is then less by H, and by A' while dX~ lives (docs/ops/memory.md). Each step
/// takes the tensors that it reads or writes, MoEBackwardArgs tells which; others are absent.
enum class BackwardStep : std::uint8_t {
  kAll,     ///< the whole backward; dH, A' and the row lists lie in the workspace
  kHidden,  ///< dH, A', dS and the row lists from dO and H: the only step that reads H
  kDown,    ///< dW2 and db2 from dO and A': the last step that reads dO and A'
  kInput,   ///< dX from dH; of a layer dWr and dbr as well
  kUp,      ///< dW1 and db1 from dH
};

/// Scratch of moe_forward (`inference`: called without h and metadata) and of moe_backward, of one
/// `step` of it. With `workspace_limit`, `bytes <= *workspace_limit`: A, dH and A' stay whole, Y
/// and dX~ are produced and summed in slabs of columns, which changes no bit of any result. The
/// slabs of a step are those of kAll: what it is handed and its scratch keep the limit together.
/// Errors: a limit below minimum_bytes, that of kAll (the message names the minimum).
SONICMOE_API WorkspacePlan moe_forward_workspace(const Context& context, const MoEShape& shape,
                                                 bool inference = false,
                                                 std::optional<std::size_t> workspace_limit = {});
SONICMOE_API WorkspacePlan moe_backward_workspace(const Context& context, const MoEShape& shape,
                                                  std::optional<std::size_t> workspace_limit = {},
                                                  BackwardStep step = BackwardStep::kAll);

/// Bytes of the row lists that the steps of a backward hand on: 0 on the CPU; on CUDA, with each
/// term rounded up to 128, 4 C + 16 (ceil(C / 128) + E) + 16 E + 4 + 8, and where 2 C <= P 4 T + 8.
SONICMOE_API std::size_t moe_row_lists_bytes(const Context& context, const MoEShape& shape);

/// Arguments of moe_forward.
struct MoEForwardArgs {
  ExpertOptions options;
  ConstTensorView x;  ///< [T, d] (form B: [P, d]) float32|bfloat16, unit stride in d
  ExpertWeights weights;
  Routing routing;

  TensorView out;  ///< [T, d] (form B: [P, d]), dtype of x, unit stride in d; every element written
  TensorView h;    ///< [C, g*n] contiguous, dtype of x; absent in inference. Rows >= R untouched
  TensorView metadata;      ///< [moe_metadata_bytes()] uint8, 16-byte aligned; absent in inference
  TensorView rows_dropped;  ///< [1] int32 or absent: rows that max_rows left no room for
  TensorView workspace;     ///< [WorkspacePlan::bytes] uint8 (or more), 64-byte aligned
  std::optional<std::size_t> workspace_limit;  ///< the value given to moe_forward_workspace
};

/// O from X as at the top of this file.
/// Errors: mismatching shapes, dtypes, strides; only one of h and metadata; unaligned or too small
/// buffers; on the CPU, offsets that decrease or exceed P.
SONICMOE_API void moe_forward(const Context& context, const MoEForwardArgs& args);

/// Arguments of moe_backward. Steps in brackets: present in these alone.
struct MoEBackwardArgs {
  ExpertOptions options;
  ConstTensorView grad_out;  ///< dO, shape of out, dtype of x, unit stride in d (kHidden, kDown)
  ConstTensorView x;         ///< as in forward
  ExpertWeights weights;     ///< as in forward (b1 is not read)
  Routing routing;           ///< as in forward; only the weights are read again
  ConstTensorView h;         ///< from forward (kHidden)
  ConstTensorView metadata;  ///< from forward

  // Every gradient is optional; one that is present is written in full.
  TensorView grad_x;   ///< shape of x, dtype of x, unit stride in d (kInput)
  TensorView grad_w1;  ///< [E, g*n, d], unit stride in one of the last two dimensions; dtype of w1
                       ///< or float32 (kUp)
  TensorView grad_b1;  ///< [E, g*n] unit last stride; dtype of b1 or float32 (kUp)
  TensorView grad_w2;  ///< [E, d, n], as grad_w1 (kDown)
  TensorView grad_b2;  ///< [E, d] (kDown)
  TensorView grad_routing_weights;  ///< float32, shape of the routing weights, contiguous (kHidden)
  /// false: weight and bias gradients are overwritten (zeros for an expert without rows).
  /// true: they are added to what the (float32) buffers hold, as Megatron's main_grad wants it.
  bool accumulate = false;

  BackwardStep step = BackwardStep::kAll;
  // What the steps hand on: written by kHidden, read by the others, absent in kAll.
  TensorView grad_h;     ///< dH [C, g*n] contiguous, dtype of x; kDown takes none. Rows >= R
                         ///< untouched
  TensorView scaled_a;   ///< A' [C, n], likewise (kHidden, kDown)
  TensorView row_lists;  ///< [moe_row_lists_bytes()] uint8, 64-byte aligned; absent where that is 0

  TensorView workspace;  ///< [WorkspacePlan::bytes] uint8 (or more), 64-byte aligned
  std::optional<std::size_t> workspace_limit;
};

/// Gradients of the loss L with dO = dL/dO:
///   dA' = dO[t] W2[e];  A = act(H);  dS = <dA', A> (+ <dO[t], b2[e]>);  dH = act'(H)^T (s dA')
///   dW2[e] = sum dO[t]^T (s A);  db2[e] = sum s dO[t];  db1[e] = sum dH;  dW1[e] = sum dH^T X[t]
///   dX[t] = sum over the rows of t of dH[r] W1[e]
/// Errors: as moe_forward; accumulate with a gradient buffer that is not float32; a tensor that is
/// not of the step.
SONICMOE_API void moe_backward(const Context& context, const MoEBackwardArgs& args);

}  // namespace sonicmoe
