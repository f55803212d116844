// The legal configurations of the grouped GEMM, by name. A config travels as a type: it reads well
// in a profiler, and a template argument of class type on a __global__ function does not compile
// inside a namespace.
#pragma once

#include <type_traits>

#include "cuda/hopper/epilogue/glu.cuh"
#include "cuda/hopper/epilogue/store.cuh"
#include "cuda/hopper/grouped_gemm.cuh"
#include "cuda/hopper/select.hpp"

namespace sonicmoe::cuda::hopper {

// [H; A] = act(X[token] W1^T): gathers X. Two loader warps: one cannot issue 1024 copies per k-tile
// and leave their latency covered (450-530 against 650 TFLOP/s at 120B-n2048).
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
template <int kBlockN, Major kMajor, bool kGated, HiddenStorers kStorers>
struct HiddenGradientSpec {
  static constexpr const char* name = "hidden_gradient";
  static constexpr int kWarps = kStorers == HiddenStorers::kTwo ? 2 : 3;
  static constexpr bool kOwn = kStorers == HiddenStorers::kThreeAndMath;
  using Epilogue =
      HiddenGradientEpilogue<kBlockN, kGated, HiddenInput<kBlockN, kGated, kWarps, kOwn>>;
  using OwnEpilogue = std::conditional_t<
      kOwn, HiddenGradientEpilogue<kBlockN, kGated, OwnHiddenInput<kBlockN, kGated>>, void>;
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
