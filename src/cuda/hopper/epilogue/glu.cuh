// Epilogues that apply the activation: H and A of the up projection, dH, A' and dS of the backward.
// Interface and lane layout: store.cuh.
#pragma once

#include <type_traits>

#include "cuda/hopper/epilogue/activation.cuh"
#include "cuda/hopper/epilogue/hidden_input.cuh"
#include "cuda/hopper/epilogue/store.cuh"

namespace sonicmoe::cuda::hopper {

// Calls f with the activation as a compile-time constant.
template <bool kGated, class F>
SONICMOE_DEVICE void visit_activation(Activation kind, F f) {
#define SONICMOE_CASE(name) \
  case Activation::name:    \
    return f(std::integral_constant<Activation, Activation::name>{})
  if constexpr (kGated) {
    switch (kind) {
      SONICMOE_CASE(kSwiGLU);
      SONICMOE_CASE(kGeGLU);
      SONICMOE_CASE(kGeGLUTanh);
      SONICMOE_CASE(kReGLU);
      SONICMOE_CASE(kSwiGLUClamped);
      default:
        return;
    }
  } else {
    switch (kind) {
      SONICMOE_CASE(kSiLU);
      SONICMOE_CASE(kGELU);
      SONICMOE_CASE(kGELUTanh);
      SONICMOE_CASE(kReLU);
      SONICMOE_CASE(kReLUSquared);
      default:
        return;
    }
  }
#undef SONICMOE_CASE
}

// Calls f with whether gate and up are halves of a row of H, at compile time. Else they alternate,
// or there is no gate.
template <bool kGated, class F>
SONICMOE_DEVICE void visit_halves(HiddenLayout layout, F f) {
  if constexpr (kGated) {
    if (layout == HiddenLayout::kConcatenated) return f(std::true_type{});
  }
  f(std::false_type{});
}

// Calls f(halves, activation, i) for every row group i of `rows`: one branch for all of them.
template <bool kGated, class Rows, class F>
SONICMOE_DEVICE void visit_groups(const ActivationParams& params, HiddenLayout layout,
                                  const Rows& rows, F f) {
  visit_activation<kGated>(params.kind, [&](auto kind) {
    visit_halves<kGated>(layout, [&](auto halves) {
      const ActivationParams activation{kind.value, params.limit};
      const int groups = rows.groups();
      for (int i = 0; i < groups; ++i) f(halves, activation, i);
    });
  });
}

// Gate and up of a lane's eight hidden units from two vectors of H: one each, or four pairs each.
template <bool kHalves>
SONICMOE_DEVICE void unpack_gate_up(const uint4& first, const uint4& second, float (&g)[8],
                                    float (&u)[8]) {
  if constexpr (kHalves) {
    unpack(first, g);
    unpack(second, u);
  } else {
    unpack_pairs(first, second, g, u);
  }
}

// H = round(acc + b1), A = round(row_weight * act(H)). Gated tiles hold block_n / 2 hidden units.
template <int kBlockN, bool kGated, int kWarps>
class UpEpilogue {
 public:
  using Rows = HalfRows<kWarps>;
  static constexpr int kUnits = kGated ? kBlockN / 2 : kBlockN;
  struct Params {
    bf16* h;                  // [P, g*n] or null
    bf16* a;                  // [P, n]
    const float* row_weight;  // [P] or null: 1
    int n;
    HiddenLayout layout;
    ActivationParams activation;
    const bf16* bias;  // [E, g*n] or null
    int64_t bias_ld;
  };

  // The rows' weights.
  struct State : RowValues<float, Rows> {
    __device__ State(const Params& p, const SharedLayout&, int warp, int lane)
        : RowValues<float, Rows>(p.row_weight, 1.0f, warp, lane) {}
  };

  template <int kCount>
  static __device__ void finish(const Params& p, const Item& t, float (&acc)[kCount], int,
                                int lane) {
    if (p.bias == nullptr) return;
    const bf16* bias = p.bias + t.expert * p.bias_ld;
    const bool halves = p.layout == HiddenLayout::kConcatenated;
    const int total = kGated ? 2 * p.n : p.n;
    add_bias(acc, lane, {1.0f, 1.0f}, [&](int c) {
      int column = t.n * kBlockN + c, end = total;
      if (halves) {
        const int unit = t.n * kUnits + c % kUnits;
        column = c / kUnits * p.n + unit;
        if (unit >= p.n) end = 0;
      }
      return column < end ? __bfloat162float(bias[column]) : 0.0f;
    });
  }

  __device__ UpEpilogue(const Params& p, const Item& t, int w, int warp, int lane, State& weights)
      : p_(p), rows_(t, w, warp, lane), n_tile_(t.n), w_(w), weights_(weights) {}

  __device__ void store(uint32_t half) {
    visit_groups<kGated>(p_.activation, p_.layout, rows_,
                         [&](auto halves, const ActivationParams& activation, int i) {
                           store_group<halves.value>(half, activation, i);
                         });
  }

 private:
  // Of this lane's row, eight units of every 64.
  template <bool kHalves>
  __device__ void store_group(uint32_t half, const ActivationParams& activation, int i) const {
    constexpr bool kPairs = kGated && !kHalves;
    constexpr int kStep = kPairs ? 2 : 1;
    const float weight = weights_.of(w_, i);
    const int row = rows_.row(i), chunk = rows_.lane & 7, unit = n_tile_ * kUnits;
    const LaneUnits<kPairs> units(chunk, rows_.valid(i) ? p_.n - unit : 0);
    const int64_t at = int64_t{rows_.row0 + row} * p_.n + unit;
    // Gate and up, or the pairs of two runs: in the dump, and in H.
    const uint32_t first = half + tile::dump_offset(row, chunk);
    const uint32_t second = first + (kHalves ? kUnits / 64 : 1) * tile::kBlockBytes;
    bf16* h_row =
        p_.h == nullptr ? nullptr : p_.h + (kGated ? 2 : 1) * at - (kHalves ? unit : 0) + 8 * chunk;
    const int64_t to_second = kHalves ? p_.n : 64;
    bf16* a_row = p_.a + at + units.first;
#pragma unroll
    for (int block = 0; block < kUnits / 64; ++block) {
      const uint4 v0 = ptx::load_shared_v4(first + block * kStep * tile::kBlockBytes);
      uint4 v1{};
      if constexpr (kGated) v1 = ptx::load_shared_v4(second + block * kStep * tile::kBlockBytes);
      float a[8];
      activate<kHalves>(activation, v0, v1, weight, a);
      const auto store = [&]<int kRun>() {
        if (!units.inside(block, kRun)) return;
        if (h_row != nullptr) {
          bf16* h_block = h_row + block * kStep * 64;
          if constexpr (kRun == 0) ptx::store_global_streaming_v4(h_block, v0);
          if constexpr (kPairs ? kRun == 1 : kGated) {
            ptx::store_global_streaming_v4(h_block + to_second, v1);
          }
        }
        units.template store<kRun>(a_row + block * 64, pack(a));
      };
      store.template operator()<0>();
      if constexpr (kPairs) store.template operator()<1>();
    }
  }

  // weight * act of a lane's eight units; v0, v1: as unpack_gate_up() takes them, or v0 alone.
  template <bool kHalves>
  static __device__ void activate(const ActivationParams& activation, const uint4& v0,
                                  const uint4& v1, float weight, float (&a)[8]) {
    float g[8], u[8];
    if constexpr (kGated) {
      unpack_gate_up<kHalves>(v0, v1, g, u);
    } else {
      unpack(v0, g);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if constexpr (kGated) {
        a[j] = weight * gated(activation, g[j], u[j]);
      } else {
        a[j] = weight * plain(activation, g[j]);
      }
    }
  }

  const Params& p_;
  Rows rows_;
  int n_tile_, w_;
  const State& weights_;
};

struct GradHParams {
  CUtensorMap h_map;        // of H [P, g*n], by map_of_hidden()
  const bf16* h;            // the same
  bf16* grad_h;             // [P, g*n]
  bf16* scaled_a;           // [P, n]
  const float* row_weight;  // [P] or null
  float* partial;           // [P, parts]
  int n, parts;
  HiddenLayout layout;
  ActivationParams activation;
};

// acc is dA' of kBlockN hidden units. With s = row_weight[r] and H read back:
//   dH = act'(H) (s dA'), A' = s act(H), partial[r, n tile] = sum over the tile of dA' act(H)
// Input: HiddenInput or MathWarpHiddenInput.
template <int kBlockN, bool kGated, class Input>
class GradHEpilogue {
 public:
  using State = Input;
  using Params = GradHParams;

  template <int kCount>
  static __device__ void finish(const Params&, const Item&, float (&)[kCount], int, int) {}

  __device__ GradHEpilogue(const Params& p, const Item& t, int w, int warp, int lane, State& input)
      : p_(p), rows_(t, w, warp, lane), w_(w), n_tile_(t.n), input_(input) {}

  __device__ void store(uint32_t half) {
    visit_groups<kGated>(p_.activation, p_.layout, rows_,
                         [&](auto halves, const ActivationParams& activation, int i) {
                           store_group<halves.value>(half, activation, i);
                         });
  }

 private:
  // Of this lane's row, eight units of every 64.
  template <bool kHalves>
  __device__ void store_group(uint32_t half, const ActivationParams& activation, int i) const {
    constexpr bool kPairs = kGated && !kHalves;
    constexpr int kStep = kPairs ? 2 : 1;
    const float weight = input_.weight(w_, i);
    const int row = rows_.row(i), chunk = rows_.lane & 7, unit = n_tile_ * kBlockN;
    const LaneUnits<kPairs> units(chunk, rows_.valid(i) ? p_.n - unit : 0);
    const int64_t r = rows_.row0 + row, at = r * p_.n + unit;
    // Gate and up, or the pairs of two runs.
    bf16* h_row = p_.grad_h + (kGated ? 2 : 1) * at - (kHalves ? unit : 0) + 8 * chunk;
    const int64_t to_second = kHalves ? p_.n : 64;
    bf16* a_row = p_.scaled_a + at + units.first;
    float sum = 0.0f;
#pragma unroll
    for (int batch = 0; batch < State::kBatches; ++batch) {
      typename State::Vectors h;
      input_.take(h);
#pragma unroll
      for (int b = 0; b < State::kBlocks; ++b) {
        const int block = batch * State::kBlocks + b;
        float da[8], a[8];
        unpack(units.load(half, row, block), da);
        uint4 first, second;  // of dH
        if constexpr (kGated) {
          gated_chunk<kHalves>(activation, h.first[b], h.second[b], da, weight, first, second, a);
        } else {
          plain_chunk(activation, h.first[b], da, weight, first, a);
        }
        // dS with A rounded as forward stored it, where the sum took the weight.
        float stored_a[8], shares[2] = {};
        unpack(pack(a), stored_a);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          shares[kPairs ? j / 4 : 0] += da[j] * stored_a[j];
          a[j] *= weight;
        }
        sum += units.inside(block) ? shares[0] : 0.0f;
        if constexpr (kPairs) sum += units.inside(block, 1) ? shares[1] : 0.0f;
        const auto store = [&]<int kRun>() {
          if (!units.inside(block, kRun)) return;
          bf16* h_block = h_row + block * kStep * 64;
          if constexpr (kRun == 0) ptx::store_global_v4(h_block, first);
          if constexpr (kPairs ? kRun == 1 : kGated) {
            ptx::store_global_v4(h_block + to_second, second);
          }
          units.template store<kRun>(a_row + block * 64, pack(a));
        };
        store.template operator()<0>();
        if constexpr (kPairs) store.template operator()<1>();
      }
    }
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) {
      sum += __shfl_xor_sync(~0u, sum, distance);
    }
    if (rows_.valid(i) && chunk == 0) p_.partial[r * p_.parts + n_tile_] = sum;
  }

  // dH of a lane's eight units, as vectors of gate and up or of the pairs of two runs, and A.
  template <bool kHalves>
  static __device__ void gated_chunk(const ActivationParams& activation, const uint4& h_first,
                                     const uint4& h_second, const float (&da)[8], float weight,
                                     uint4& first, uint4& second, float (&a)[8]) {
    float g[8], u[8];
    unpack_gate_up<kHalves>(h_first, h_second, g, u);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float dg, du;
      gated_gradient(activation, g[j], u[j], weight * da[j], dg, du, a[j]);
      g[j] = dg;
      u[j] = du;
    }
    if constexpr (kHalves) {
      first = pack(g);
      second = pack(u);
    } else {
      pack_pairs(g, u, first, second);
    }
  }

  static __device__ void plain_chunk(const ActivationParams& activation, const uint4& h,
                                     const float (&da)[8], float weight, uint4& first,
                                     float (&a)[8]) {
    float x[8];
    unpack(h, x);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      float dx;
      plain_gradient(activation, x[j], weight * da[j], dx, a[j]);
      x[j] = dx;
    }
    first = pack(x);
  }

  const Params& p_;
  typename Input::Rows rows_;
  int w_, n_tile_;
  State& input_;
};

}  // namespace sonicmoe::cuda::hopper
