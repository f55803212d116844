// The legal configurations of the grouped GEMM, by name. A config travels as a type: it reads well
// in a profiler, and a template argument of class type on a __global__ function does not compile
// inside a namespace.
#pragma once

#include <type_traits>

#include "cuda/hopper/choice.hpp"
#include "cuda/hopper/epilogue/glu.cuh"
#include "cuda/hopper/epilogue/logits.cuh"
#include "cuda/hopper/epilogue/store.cuh"
#include "cuda/hopper/shape.hpp"

namespace sonicmoe::cuda::hopper {

// [H; A] = act(X[token] W1^T): gathers X. Two loader warps: one cannot issue 1024 copies per k-tile
// and leave their latency covered (lab M5).
template <int kBlockN, Major kMajor, bool kGated>
struct UpSpec {
  static constexpr const char* name = "up";
  static constexpr GemmShape shape = {.block_n = kBlockN, .b = kMajor, .loader_warps = 2};
  using Epilogue = UpEpilogue<kBlockN, kGated, shape.epilogue_warps()>;
};

// Y = A W2^T and dX~ = dH W1: plain rows in, rows out.
template <int kBlockN, Major kMajor>
struct RowsSpec {
  static constexpr const char* name = "rows";
  static constexpr GemmShape shape = {.block_n = kBlockN, .b = kMajor, .gather = false};
  using Epilogue = StoreRows<kBlockN, shape.epilogue_warps()>;
};

// dA' = dO[token] W2, with dH, A' and dS in the epilogue: gathers dO. Gather and epilogue both want
// a third warp: the epilogue's time is that of a tile, the gather's grows with the reduction.
template <int kBlockN, Major kMajor, bool kGated, StoreRoles kStores>
struct GradHSpec {
  static constexpr const char* name = "grad_h";
  static constexpr int kWarps = kStores == StoreRoles::kTwo ? 2 : 3;
  static constexpr bool kMathWarpsStore = kStores == StoreRoles::kThreeAndMath;
  using Epilogue =
      GradHEpilogue<kBlockN, kGated, HiddenInput<kBlockN, kGated, kWarps, kMathWarpsStore>>;
  using MathWarpEpilogue = std::conditional_t<
      kMathWarpsStore, GradHEpilogue<kBlockN, kGated, MathWarpHiddenInput<kBlockN, kGated>>, void>;
  static constexpr GemmShape shape = {.block_n = kBlockN,
                                      .b = kMajor,
                                      .loader_warps = 4 - kWarps,
                                      .extra_bytes = kWarps * Epilogue::State::kBytes};
  static_assert(kBlockN != 256 || stage_count(shape) == 3, "the ring of H costs a stage");
};

// dW2 = dO[token]^T A' and dW1 = X[token]^T dH: gathers along the reduction. The gather is the
// bottleneck: three warps copy, a fourth issues TMA, the math warps store by themselves.
template <int kBlockN, Dump kDump>
struct WeightGradientSpec {
  static constexpr const char* name = "weight_gradient";
  static constexpr GemmShape shape = {.grouping = Grouping::kDepth,
                                      .block_n = kBlockN,
                                      .a = Major::kMn,
                                      .b = Major::kMn,
                                      .dump = kDump,
                                      .loader_warps = 4};
  using Epilogue = StoreWeightGradient<kBlockN, kDump>;
};

// The same from rows that lie in order (cuda/sorted_rows.hpp): one warp loads both operands by TMA,
// and the warps that it leaves store. float32 still leaves the math warps.
template <int kBlockN, Dump kDump>
struct SortedWeightGradientSpec {
  static constexpr const char* name = "sorted_weight_gradient";
  static constexpr GemmShape shape = {.grouping = Grouping::kDepth,
                                      .block_n = kBlockN,
                                      .a = Major::kMn,
                                      .b = Major::kMn,
                                      .gather = false,
                                      .dump = kDump};
  using Epilogue = std::conditional_t<kDump == Dump::kDirect, StoreWeightGradient<kBlockN, kDump>,
                                      WarpStoreWeightGradient<kBlockN, kDump>>;
};

// logits = X Wr^T: one dense group, float32 sums stored by the math warps.
template <int kBlockN>
struct LogitsSpec {
  static constexpr const char* name = "logits";
  static constexpr GemmShape shape = {.block_n = kBlockN, .gather = false, .dump = Dump::kDirect};
  using Epilogue = StoreLogits<kBlockN>;
};

// Calls f.operator()<block_n, major>() for a runtime choice.
template <class F>
void visit_tile(int block_n, Major major, F f) {
  if (block_n == 256) {
    return major == Major::kK ? f.template operator()<256, Major::kK>()
                              : f.template operator()<256, Major::kMn>();
  }
  return major == Major::kK ? f.template operator()<128, Major::kK>()
                            : f.template operator()<128, Major::kMn>();
}

}  // namespace sonicmoe::cuda::hopper
