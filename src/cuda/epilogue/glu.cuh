// Epilogues that apply the activation: H and A of the up projection, dH, A' and dS of the backward.
// Interface and lane layout: store.cuh.
#pragma once

#include <type_traits>

#include "cuda/epilogue/activation.cuh"
#include "cuda/epilogue/hidden_input.cuh"
#include "cuda/epilogue/store.cuh"

namespace sonicmoe::cuda::hopper {

// Calls f with the activation as a compile-time constant: one branch for eight values.
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

// Gate and up of eight hidden units from two vectors of H: one each, or eight pairs.
SONICMOE_DEVICE void unpack_gate_up(bool halves, const uint4& first, const uint4& second,
                                    float (&g)[8], float (&u)[8]) {
  if (halves) {
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
  static constexpr int kGroups = HalfRows<kWarps>::kGroups;
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
  struct State : RowValues<float, kWarps> {
    __device__ State(const Params& p, const SharedLayout&, int warp, int lane)
        : RowValues<float, kWarps>(p.row_weight, 1.0f, warp, lane) {}
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
    visit_activation<kGated>(p_.activation.kind, [&](auto kind) {
      const ActivationParams activation{kind.value, p_.activation.limit};
      for (int i = 0; i < kGroups; ++i) {
        const int row = rows_.row(i);
        const float weight = weights_.of(w_, i);
        if (!rows_.valid(i)) continue;
#pragma unroll
        for (int block = 0; block < kUnits / 64; ++block) {
          const int chunk = block * 8 + (rows_.lane & 7), unit = n_tile_ * kUnits + chunk * 8;
          if (unit < p_.n) store_chunk(half, activation, row, weight, chunk, unit);
        }
      }
    });
  }

 private:
  __device__ void store_chunk(uint32_t half, const ActivationParams& activation, int row,
                              float weight, int chunk, int unit) const {
    const int64_t r = rows_.row0 + row;
    float g[8], a[8];
    if constexpr (!kGated) {
      const uint4 v = ptx::load_shared_v4(half + tile::dump_offset(row, chunk));
      if (p_.h != nullptr) ptx::store_global_streaming_v4(p_.h + r * p_.n + unit, v);
      unpack(v, g);
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i] = weight * plain(activation, g[i]);
    } else {
      const bool halves = p_.layout == HiddenLayout::kConcatenated;
      const int first = halves ? chunk : 2 * chunk,
                second = halves ? chunk + kUnits / 8 : first + 1;
      const uint4 v0 = ptx::load_shared_v4(half + tile::dump_offset(row, first));
      const uint4 v1 = ptx::load_shared_v4(half + tile::dump_offset(row, second));
      if (p_.h != nullptr) {
        bf16* h = p_.h + r * (2 * p_.n);
        ptx::store_global_streaming_v4(h + (halves ? unit : 2 * unit), v0);
        ptx::store_global_streaming_v4(h + (halves ? p_.n + unit : 2 * unit + 8), v1);
      }
      float u[8];
      unpack_gate_up(halves, v0, v1, g, u);
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i] = weight * gated(activation, g[i], u[i]);
    }
    ptx::store_global_v4(p_.a + r * p_.n + unit, pack(a));
  }

  const Params& p_;
  HalfRows<kWarps> rows_;
  int n_tile_, w_;
  const State& weights_;
};

// acc is dA' of kBlockN hidden units. With s = row_weight[r] and H read back:
//   dH = act'(H) (s dA'), A' = s act(H), partial[r, n tile] = sum over the tile of dA' act(H)
template <int kBlockN, bool kGated, int kWarps>
class HiddenGradientEpilogue {
 public:
  using State = HiddenInput<kBlockN, kGated, kWarps>;
  struct Params {
    CUtensorMap h;            // of [P, g*n], by map_of_hidden()
    bf16* grad_h;             // [P, g*n]
    bf16* scaled_a;           // [P, n]
    const float* row_weight;  // [P] or null
    float* partial;           // [P, parts]
    int n, parts;
    HiddenLayout layout;
    ActivationParams activation;
  };

  template <int kCount>
  static __device__ void finish(const Params&, const Item&, float (&)[kCount], int, int) {}

  __device__ HiddenGradientEpilogue(const Params& p, const Item& t, int w, int warp, int lane,
                                    State& input)
      : p_(p), rows_(t, w, warp, lane), w_(w), n_tile_(t.n), input_(input) {}

  __device__ void store(uint32_t half) {
    visit_activation<kGated>(p_.activation.kind, [&](auto kind) {
      const ActivationParams activation{kind.value, p_.activation.limit};
      for (int i = 0; i < rows_.groups(); ++i) {
        const float weight = input_.weight(w_, i);
        float sum = 0.0f;
#pragma unroll
        for (int batch = 0; batch < State::kBatches; ++batch) {
          typename State::Vectors h;
          input_.take(h);
          sum += store_batch(half, activation, i, batch, h, weight);
        }
#pragma unroll
        for (int distance = 4; distance > 0; distance /= 2) {
          sum += __shfl_xor_sync(~0u, sum, distance);
        }
        if (rows_.valid(i) && (rows_.lane & 7) == 0) {
          p_.partial[int64_t{rows_.row0 + rows_.row(i)} * p_.parts + n_tile_] = sum;
        }
      }
    });
  }

 private:
  __device__ int unit(int block) const {
    return n_tile_ * kBlockN + block * 64 + (rows_.lane & 7) * 8;
  }

  __device__ float store_batch(uint32_t half, const ActivationParams& activation, int i, int batch,
                               const typename State::Vectors& h, float weight) const {
    float sum = 0.0f;
#pragma unroll
    for (int b = 0; b < State::kBlocks; ++b) {
      const int block = batch * State::kBlocks + b;
      if (!rows_.valid(i) || unit(block) >= p_.n) continue;
      sum += store_chunk(half, activation, rows_.row(i), block, h.first[b],
                         h.second[kGated ? b : 0], weight);
    }
    return sum;
  }

  // Returns this chunk's share of dS.
  __device__ float store_chunk(uint32_t half, const ActivationParams& activation, int row,
                               int block, const uint4& first, const uint4& second, float s) const {
    const int j = unit(block);
    const int64_t r = rows_.row0 + row;
    float da[8], g[8], a[8], sum = 0.0f;
    unpack(ptx::load_shared_v4(half + tile::dump_offset(row, block * 8 + (rows_.lane & 7))), da);
    if constexpr (!kGated) {
      unpack(first, g);
#pragma unroll
      for (int v = 0; v < 8; ++v) {
        float dg;
        plain_gradient(activation, g[v], s * da[v], dg, a[v]);
        g[v] = dg;
      }
      ptx::store_global_v4(p_.grad_h + r * p_.n + j, pack(g));
    } else {
      const bool halves = p_.layout == HiddenLayout::kConcatenated;
      float u[8];
      unpack_gate_up(halves, first, second, g, u);
#pragma unroll
      for (int v = 0; v < 8; ++v) {
        float dg, du;
        gated_gradient(activation, g[v], u[v], s * da[v], dg, du, a[v]);
        g[v] = dg;
        u[v] = du;
      }
      bf16* grad_h = p_.grad_h + r * (2 * p_.n);
      uint4 low = pack(g), high = pack(u);
      if (!halves) pack_pairs(g, u, low, high);
      ptx::store_global_v4(grad_h + (halves ? j : 2 * j), low);
      ptx::store_global_v4(grad_h + (halves ? p_.n + j : 2 * j + 8), high);
    }
    // dS with A rounded as forward stored it, where the sum took the weight.
    float stored_a[8];
    unpack(pack(a), stored_a);
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      sum += da[v] * stored_a[v];
      a[v] *= s;
    }
    ptx::store_global_v4(p_.scaled_a + r * p_.n + j, pack(a));
    return sum;
  }

  const Params& p_;
  HalfRows<kWarps> rows_;
  int w_, n_tile_;
  State& input_;
};

}  // namespace sonicmoe::cuda::hopper
