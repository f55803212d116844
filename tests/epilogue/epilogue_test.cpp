// The epilogues of up and dH on the host: which lane reads and stores what, for every layout of H,
// tile width and division of the rows, against plain loops. Their sources are compiled as they are,
// with the headers of host/ in place of ptx/ and of CUDA's own. A lane runs alone, so what needs
// others (row weights, dS) is not computed; approximate functions are exact; biases are the math
// warps' and not here.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "cuda/hopper/epilogue/glu.cuh"

namespace sonicmoe::cuda::hopper {
namespace {

// Rows of four experts, one tile each: few, a half, part of the second half, both halves.
constexpr int kRowsOfItems[] = {5, 64, 101, 128};
constexpr int kFirstRow = 3, kEndRow = kFirstRow + 5 + 64 + 101 + 128, kNumRows = kEndRow + 7;
constexpr bf16 kPoison{0xfff5}, kNaN{0x7fc0};

bool in_items(int row) { return row >= kFirstRow && row < kEndRow; }

// [kNumRows, columns], 16-byte aligned.
class Matrix {
 public:
  static_assert(__STDCPP_DEFAULT_NEW_ALIGNMENT__ >= 16);
  Matrix(int columns, bf16 fill)
      : columns_(columns), values_(static_cast<std::size_t>(kNumRows * columns), fill) {}
  static Matrix random(int columns, unsigned seed) {
    Matrix m(columns, {});
    std::mt19937 bits(seed);
    std::normal_distribution<float> normal;
    for (bf16& v : m.values_) v.bits = static_cast<uint16_t>(ptx::round_to_bf16(normal(bits)));
    return m;
  }
  bf16* data() { return values_.data(); }
  bf16& at(int row, int column) {
    return values_.at(static_cast<std::size_t>(row * columns_ + column));
  }
  float value(int row, int column) { return __bfloat162float(at(row, column)); }

 private:
  int columns_;
  std::vector<bf16> values_;
};

struct Shape {
  HiddenLayout layout;
  int n;
  bool gated() const { return layout != HiddenLayout::kPlain; }
  bool interleaved() const { return layout == HiddenLayout::kInterleaved; }
  int columns() const { return gated() ? 2 * n : n; }  // of H
  // Where gate (part 0) or up (1) of unit j stands in a row of H.
  int column(int j, int part) const { return interleaved() ? 2 * j + part : part * n + j; }
  ActivationParams activation() const {
    return {gated() ? Activation::kSwiGLU : Activation::kSiLU, 0.0f};
  }
};

constexpr uint32_t kDumps = 1 << 15;  // of shared memory, behind the rings of H

// A half of a tile, and where its dump lies.
struct Half {
  Item item;
  int w;
  uint32_t dump;
};

// All halves of n units in tiles of `units`, as they follow each other in one CTA. value(row, tile,
// c) is what the dump holds in column c of the tile; NaN stands past the end of an item.
template <class Value>
std::vector<Half> dump_halves(int n, int units, int block_n, Value value) {
  std::vector<Half> halves;
  Item item{.row0 = kFirstRow, .rows = 0, .expert = 0, .m = 0, .n = 0, .k_tiles = 1};
  for (const int rows : kRowsOfItems) {
    item.rows = rows;
    for (item.n = 0; item.n * units < n; ++item.n) {
      for (int w = 0; w < 2; ++w) {
        const auto dump = kDumps + static_cast<uint32_t>(halves.size()) * 64 * block_n * 2;
        halves.push_back({item, w, dump});
        for (int r = 0; r < 64; ++r) {
          for (int c = 0; c < block_n; ++c) {
            const bool inside = 64 * w + r < rows;
            const bf16 v = inside ? value(item.row0 + 64 * w + r, item.n, c) : kNaN;
            const uint32_t at = dump + tile::dump_offset(r, c / 8) + c % 8 * 2;
            std::memcpy(&host::shared.at(at), &v, 2);
          }
        }
      }
    }
    item.row0 += rows;
  }
  return halves;
}

// One lane of an epilogue warp over all halves, as epilogue_role() leads it.
template <class Epilogue>
void run_lane(const typename Epilogue::Params& p, const std::vector<Half>& halves, int warp,
              int lane) {
  host::waits = 0;
  typename Epilogue::State state(p, SharedLayout{}, warp, lane);
  state.begin(halves[0].item, halves[0].w);
  for (std::size_t i = 0; i < halves.size(); ++i) {
    if (i + 1 < halves.size()) state.begin(halves[i + 1].item, halves[i + 1].w);
    Epilogue(p, halves[i].item, halves[i].w, warp, lane, state).store(halves[i].dump);
  }
  EXPECT_EQ(host::waits, host::copies.size()) << "slots filled and not taken";
}

template <class Epilogue>
void run_warps(const typename Epilogue::Params& p, const std::vector<Half>& halves, int warps) {
  for (int warp = 0; warp < warps; ++warp) {
    host::copies.clear();
    for (int lane = 0; lane < 32; ++lane) run_lane<Epilogue>(p, halves, warp, lane);
  }
}

// Collects differences; the first ones make the message.
class Differences {
 public:
  void expect(bool equal, const char* what, int row, int unit) {
    if (!equal && ++count_ <= 5) {
      text_ += std::string(what) + " of row " + std::to_string(row) + ", unit " +
               std::to_string(unit) + "\n";
    }
  }
  void expect_close(float actual, double expected, const char* what, int row, int unit) {
    expect(std::abs(actual - expected) <= 0x1p-7 * std::abs(expected) + 1e-6, what, row, unit);
  }
  void expect_poison(bf16 actual, const char* what, int row, int unit) {
    expect(actual.bits == kPoison.bits, what, row, unit);
  }
  ~Differences() { EXPECT_EQ(count_, 0) << text_; }

 private:
  int count_ = 0;
  std::string text_;
};

// with_h: not inference, which stores A alone.
template <int kBlockN, bool kGated>
void check_up(const Shape& s, bool with_h) {
  using Epilogue = UpEpilogue<kBlockN, kGated, 2>;
  constexpr int kUnits = Epilogue::kUnits;
  Matrix expected = Matrix::random(s.columns(), 1);
  Matrix h(s.columns(), kPoison), a(s.n, kPoison);
  const typename Epilogue::Params p{.h = with_h ? h.data() : nullptr,
                                    .a = a.data(),
                                    .row_weight = nullptr,
                                    .n = s.n,
                                    .layout = s.layout,
                                    .activation = s.activation(),
                                    .bias = nullptr,
                                    .bias_ld = 0};
  const auto halves = dump_halves(s.n, kUnits, kBlockN, [&](int row, int tile, int c) {
    const int part = !kGated ? 0 : s.interleaved() ? c % 2 : c / kUnits;
    const int unit = tile * kUnits + (s.interleaved() ? c / 2 : c % kUnits);
    return unit < s.n ? expected.at(row, s.column(unit, part)) : kNaN;
  });
  run_warps<Epilogue>(p, halves, 2);
  Differences differences;
  for (int row = 0; row < kNumRows; ++row) {
    for (int c = 0; c < s.columns(); ++c) {
      const bf16 wanted = with_h && in_items(row) ? expected.at(row, c) : kPoison;
      differences.expect(h.at(row, c).bits == wanted.bits, "column of H", row, c);
    }
    for (int j = 0; j < s.n; ++j) {
      if (!in_items(row)) {
        differences.expect_poison(a.at(row, j), "A outside", row, j);
        continue;
      }
      const double gate = expected.value(row, s.column(j, 0));
      const double up = kGated ? expected.value(row, s.column(j, 1)) : 1.0;
      differences.expect_close(a.value(row, j), gate / (1 + std::exp(-gate)) * up, "A", row, j);
    }
  }
}

// kWarps epilogue warps store; with kMathWarpsStore the math warps, too.
template <int kBlockN, bool kGated, int kWarps, bool kMathWarpsStore>
void check_grad_h(const Shape& s) {
  using Input = HiddenInput<kBlockN, kGated, kWarps, kMathWarpsStore>;
  using Epilogue = GradHEpilogue<kBlockN, kGated, Input>;
  using MathWarpEpilogue = GradHEpilogue<kBlockN, kGated, MathWarpHiddenInput<kBlockN, kGated>>;
  const int parts = (s.n + kBlockN - 1) / kBlockN, values = kGated ? 2 : 1;
  Matrix h = Matrix::random(s.columns(), 2), grad_a = Matrix::random(s.n, 3);
  host::readable = {&h.at(kFirstRow, 0), &h.at(kEndRow - 1, s.columns() - 1) + 1};
  Matrix grad_h(s.columns(), kPoison), scaled_a(s.n, kPoison);
  std::vector<float> partial(static_cast<std::size_t>(kNumRows * parts));
  const int in_row = s.interleaved() ? values : 1;  // values of a unit side by side
  const GradHParams p{
      .h_map = {h.data(), kNumRows, values / in_row, in_row * s.n, in_row * kBlockN / 2},
      .h = h.data(),
      .grad_h = grad_h.data(),
      .scaled_a = scaled_a.data(),
      .row_weight = nullptr,
      .partial = partial.data(),
      .n = s.n,
      .parts = parts,
      .layout = s.layout,
      .activation = s.activation()};
  const auto halves = dump_halves(s.n, kBlockN, kBlockN, [&](int row, int tile, int c) {
    const int unit = tile * kBlockN + c;
    return unit < s.n ? grad_a.at(row, unit) : kNaN;
  });
  run_warps<Epilogue>(p, halves, kWarps);
  for (const Half& half : halves) {
    if (!kMathWarpsStore || half.item.rows <= 64 * half.w)
      continue;  // a dead warpgroup stores nothing
    for (int thread = 0; thread < 128; ++thread) {
      const int warp = thread / 32, lane = thread % 32;
      typename MathWarpEpilogue::State state(p, half.item, half.w, warp, lane);
      MathWarpEpilogue(p, half.item, half.w, warp, lane, state).store(half.dump);
    }
  }
  Differences differences;
  for (int row = 0; row < kNumRows; ++row) {
    for (int j = 0; j < s.n; ++j) {
      if (!in_items(row)) {
        for (int part = 0; part < values; ++part) {
          differences.expect_poison(grad_h.at(row, s.column(j, part)), "dH outside", row, j);
        }
        differences.expect_poison(scaled_a.at(row, j), "A' outside", row, j);
        continue;
      }
      const double gate = h.value(row, s.column(j, 0)), sigmoid = 1 / (1 + std::exp(-gate));
      const double up = kGated ? h.value(row, s.column(j, 1)) : 1.0, da = grad_a.value(row, j);
      const double slope = sigmoid * (1 + gate * (1 - sigmoid));
      differences.expect_close(grad_h.value(row, s.column(j, 0)), da * up * slope, "dH", row, j);
      if (kGated) {
        const float grad_up = grad_h.value(row, s.column(j, 1));
        differences.expect_close(grad_up, da * gate * sigmoid, "dH of up", row, j);
      }
      differences.expect_close(scaled_a.value(row, j), gate * sigmoid * up, "A'", row, j);
    }
  }
}

class Epilogues : public ::testing::TestWithParam<int> {};
// n: less than a block of 64, blocks and parts of them, several tiles.
INSTANTIATE_TEST_SUITE_P(Widths, Epilogues, ::testing::Values(8, 40, 72, 136, 168, 328));

TEST_P(Epilogues, UpStoresHAndA) {
  for (const bool with_h : {true, false}) {
    for (const HiddenLayout layout : {HiddenLayout::kConcatenated, HiddenLayout::kInterleaved}) {
      SCOPED_TRACE(layout == HiddenLayout::kInterleaved ? "interleaved" : "concatenated");
      check_up<128, true>({layout, GetParam()}, with_h);
      check_up<256, true>({layout, GetParam()}, with_h);
    }
    check_up<128, false>({HiddenLayout::kPlain, GetParam()}, with_h);
    check_up<256, false>({HiddenLayout::kPlain, GetParam()}, with_h);
  }
}

template <int kBlockN, bool kGated>
void check_every_division(const Shape& s) {
  check_grad_h<kBlockN, kGated, 3, true>(s);
  check_grad_h<kBlockN, kGated, 3, false>(s);
  check_grad_h<kBlockN, kGated, 2, false>(s);
}

TEST_P(Epilogues, GradHStoresDHAndA) {
  for (const HiddenLayout layout : {HiddenLayout::kConcatenated, HiddenLayout::kInterleaved}) {
    SCOPED_TRACE(layout == HiddenLayout::kInterleaved ? "interleaved" : "concatenated");
    check_every_division<128, true>({layout, GetParam()});
    check_every_division<256, true>({layout, GetParam()});
  }
  check_every_division<128, false>({HiddenLayout::kPlain, GetParam()});
  check_every_division<256, false>({HiddenLayout::kPlain, GetParam()});
}

}  // namespace
}  // namespace sonicmoe::cuda::hopper
