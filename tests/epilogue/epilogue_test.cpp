// The epilogues of the Hopper kernels on the host: which lane reads and stores what, for every
// layout of H, tile width and division of the rows, against plain loops. Their sources are compiled
// as they are, with the headers of host/ in place of PTX and of the kernel. What needs other lanes
// (row weights, dS) is not computed here, and approximate functions are exact.
#include <gtest/gtest.h>

#include <random>
#include <string>

#include "cuda/epilogue/glu.cuh"

namespace sonicmoe::cuda::hopper {
namespace {

constexpr int kNumRows = 110;
constexpr Item kItem{.row0 = 3, .rows = 101, .expert = 0, .m = 0, .n = 0, .k_tiles = 1};
constexpr bf16 kPoison{0xfff5}, kNaN{0x7fc0};

bool in_item(int row) { return row >= kItem.row0 && row < kItem.row0 + kItem.rows; }

// [kNumRows, columns], 16-byte aligned.
class Matrix {
 public:
  Matrix(int columns, bf16 fill) : columns_(columns), values_(kNumRows * columns / 8, Eight{}) {
    std::fill_n(data(), kNumRows * columns, fill);
  }
  static Matrix random(int columns, unsigned seed) {
    Matrix m(columns, {});
    std::mt19937 bits(seed);
    std::normal_distribution<float> normal;
    for (int i = 0; i < kNumRows * columns; ++i) {
      m.data()[i].bits = static_cast<uint16_t>(ptx::round_to_bf16(normal(bits)));
    }
    return m;
  }
  bf16* data() { return values_[0].v; }
  bf16& at(int row, int column) { return data()[row * columns_ + column]; }
  float value(int row, int column) { return __bfloat162float(at(row, column)); }

 private:
  struct alignas(16) Eight {
    bf16 v[8];
  };
  int columns_;
  std::vector<Eight> values_;
};

struct Shape {
  HiddenLayout layout;
  int n;
  bool gated() const { return layout != HiddenLayout::kPlain; }
  int columns() const { return gated() ? 2 * n : n; }  // of H
  // Where gate (part 0) or up (1) of unit j stands in a row of H.
  int column(int j, int part) const {
    return layout == HiddenLayout::kInterleaved ? 2 * j + part : part * n + j;
  }
  ActivationParams activation() const {
    return {gated() ? Activation::kSwiGLU : Activation::kSiLU, 0.0f};
  }
};

// Writes value(row, c) to column c of every row of half w in the dump; NaN past the end of the
// item.
template <class Value>
void fill_dump(int w, int block_n, Value value) {
  for (int r = 0; r < 64; ++r) {
    for (int c = 0; c < block_n; ++c) {
      const int row = kItem.row0 + 64 * w + r;
      const bf16 v = in_item(row) ? value(row, c) : kNaN;
      std::memcpy(&host::shared.at(tile::dump_offset(r, c / 8) + c % 8 * 2), &v, 2);
    }
  }
}

// Calls f(item, w) for every column tile of `units` units and both halves.
template <class F>
void for_halves(int n, int units, F f) {
  Item item = kItem;
  for (item.n = 0; item.n * units < n; ++item.n) {
    for (int w = 0; w < 2; ++w) f(item, w);
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
  ~Differences() { EXPECT_EQ(count_, 0) << text_; }

 private:
  int count_ = 0;
  std::string text_;
};

template <int kBlockN, bool kGated>
void check_up(const Shape& s) {
  using Epilogue = UpEpilogue<kBlockN, kGated, 2>;
  Matrix expected = Matrix::random(s.columns(), 1);
  Matrix h(s.columns(), kPoison), a(s.n, kPoison);
  const typename Epilogue::Params p{.h = h.data(),
                                    .a = a.data(),
                                    .row_weight = nullptr,
                                    .n = s.n,
                                    .layout = s.layout,
                                    .activation = s.activation(),
                                    .bias = nullptr,
                                    .bias_ld = 0};
  for_halves(s.n, Epilogue::kUnits, [&](const Item& t, int w) {
    fill_dump(w, kBlockN, [&](int row, int c) {
      const bool in_turn = s.layout == HiddenLayout::kInterleaved;
      const int part = !kGated ? 0 : in_turn ? c % 2 : c / Epilogue::kUnits;
      const int unit = t.n * Epilogue::kUnits + (in_turn ? c / 2 : c % Epilogue::kUnits);
      return unit < s.n ? expected.at(row, s.column(unit, part)) : kNaN;
    });
    for (int thread = 0; thread < 64; ++thread) {
      const int warp = thread / 32, lane = thread % 32;
      typename Epilogue::State state(p, SharedLayout{}, warp, lane);
      state.begin(t, w);
      Epilogue(p, t, w, warp, lane, state).store(0);
    }
  });
  Differences differences;
  for (int row = 0; row < kNumRows; ++row) {
    for (int c = 0; c < s.columns(); ++c) {
      const bf16 wanted = in_item(row) ? expected.at(row, c) : kPoison;
      differences.expect(h.at(row, c).bits == wanted.bits, "column of H", row, c);
    }
    for (int j = 0; j < s.n; ++j) {
      if (!in_item(row)) {
        differences.expect(a.at(row, j).bits == kPoison.bits, "A outside", row, j);
        continue;
      }
      const double gate = expected.value(row, s.column(j, 0));
      const double up = kGated ? expected.value(row, s.column(j, 1)) : 1.0;
      differences.expect_close(a.value(row, j), gate / (1 + std::exp(-gate)) * up, "A", row, j);
    }
  }
}

template <int kBlockN, bool kGated, int kWarps, bool kOwn>
void check_hidden_gradient(const Shape& s) {
  using Input = HiddenInput<kBlockN, kGated, kWarps, kOwn>;
  using Epilogue = HiddenGradientEpilogue<kBlockN, kGated, Input>;
  using OwnEpilogue = HiddenGradientEpilogue<kBlockN, kGated, OwnHiddenInput<kBlockN, kGated>>;
  const int parts = (s.n + kBlockN - 1) / kBlockN, values = s.gated() ? s.columns() / s.n : 1;
  const bool in_turn = s.layout == HiddenLayout::kInterleaved;
  Matrix h = Matrix::random(s.columns(), 2), grad_a = Matrix::random(s.n, 3);
  host::readable = {h.data(), &h.at(kItem.row0 + kItem.rows - 1, s.columns() - 1) + 1};
  Matrix grad_h(s.columns(), kPoison), scaled_a(s.n, kPoison);
  std::vector<float> partial(static_cast<std::size_t>(kNumRows * parts));
  HiddenGradientParams p{};
  p.h_map = {h.data(), kNumRows, in_turn ? 1 : values, in_turn ? values * s.n : s.n,
             (in_turn ? values : 1) * kBlockN / 2};  // as map_of_hidden() describes it
  p.h = h.data();
  p.grad_h = grad_h.data();
  p.scaled_a = scaled_a.data();
  p.partial = partial.data();
  p.n = s.n;
  p.parts = parts;
  p.layout = s.layout;
  p.activation = s.activation();
  for_halves(s.n, kBlockN, [&](const Item& t, int w) {
    fill_dump(w, kBlockN, [&](int row, int c) {
      const int unit = t.n * kBlockN + c;
      return unit < s.n ? grad_a.at(row, unit) : kNaN;
    });
    const auto run_lane = [&](int warp, int lane) {
      host::waits = 0;
      Input input(p, SharedLayout{}, warp, lane);
      input.begin(t, w);
      Epilogue(p, t, w, warp, lane, input).store(0);
      EXPECT_EQ(host::waits, host::copies.size()) << "slots filled and not taken";
    };
    for (int warp = 0; warp < kWarps; ++warp) {
      host::copies.clear();
      host::records_copies = true;  // lane 0 issues them for all
      run_lane(warp, 0);
      host::records_copies = false;
      for (int lane = 1; lane < 32; ++lane) run_lane(warp, lane);
    }
    for (int thread = 0; thread < (kOwn ? 128 : 0); ++thread) {
      const int warp = thread / 32, lane = thread % 32;
      typename OwnEpilogue::State state(p, t, w, warp, lane);
      OwnEpilogue(p, t, w, warp, lane, state).store(0);
    }
  });
  Differences differences;
  for (int row = 0; row < kNumRows; ++row) {
    for (int j = 0; j < s.n; ++j) {
      if (!in_item(row)) {
        for (int part = 0; part < values; ++part) {
          const bf16 left = grad_h.at(row, s.column(j, part));
          differences.expect(left.bits == kPoison.bits, "dH outside", row, j);
        }
        differences.expect(scaled_a.at(row, j).bits == kPoison.bits, "A' outside", row, j);
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
INSTANTIATE_TEST_SUITE_P(Widths, Epilogues, ::testing::Values(8, 40, 64, 72, 136, 168, 256, 328));

TEST_P(Epilogues, UpStoresHAndA) {
  for (const HiddenLayout layout : {HiddenLayout::kConcatenated, HiddenLayout::kInterleaved}) {
    SCOPED_TRACE(layout == HiddenLayout::kInterleaved ? "interleaved" : "concatenated");
    check_up<128, true>({layout, GetParam()});
    check_up<256, true>({layout, GetParam()});
  }
  check_up<128, false>({HiddenLayout::kPlain, GetParam()});
  check_up<256, false>({HiddenLayout::kPlain, GetParam()});
}

template <int kBlockN, bool kGated>
void check_every_division(const Shape& s) {
  check_hidden_gradient<kBlockN, kGated, 3, true>(s);
  check_hidden_gradient<kBlockN, kGated, 3, false>(s);
  check_hidden_gradient<kBlockN, kGated, 2, false>(s);
}

TEST_P(Epilogues, HiddenGradientStoresDHAndA) {
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
