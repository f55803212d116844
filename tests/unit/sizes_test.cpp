// Every function of sizes, asked about shapes that cannot be and shapes that overflow: the number
// of 128-bit arithmetic, or an Error.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "rig/random.hpp"
#include "rig/target.hpp"
#include "sonicmoe/sonicmoe.hpp"

namespace sonicmoe::rig {
namespace {

using Wide = __int128;
using Form = MoEShape::Form;

constexpr std::int64_t kTwo31 = std::int64_t{1} << 31, kTwo62 = std::int64_t{1} << 62;
constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
const std::vector<std::int64_t> kExtremes = {
    -kMost - 1, -1,   0, 1, 2, 3, kTwo31 - 2, kTwo31 - 1, kTwo31, std::int64_t{1} << 40,
    kTwo62,     kMost};

// The result, or nothing where an Error is thrown. Anything else fails the test.
template <class Function>
auto ask(Function function) -> std::optional<decltype(function())> {
  try {
    return function();
  } catch (const Error& error) {
    EXPECT_FALSE(error.argument().empty()) << error.what();
    return std::nullopt;
  }
}

std::int64_t pick(Random& random) {
  return random.chance(0.7) ? random.integer(1, 40) << random.integer(0, 24)
                            : random.pick(kExtremes);
}

// Mostly shapes that agree with themselves.
MoEShape random_shape(Random& random) {
  MoEShape s;
  s.num_tokens = pick(random);
  s.hidden_size = pick(random);
  s.intermediate_size = pick(random);
  s.num_experts = pick(random);
  s.form = static_cast<Form>(random.integer(0, 2));
  s.num_pairs = s.form == Form::kSorted                     ? s.num_tokens
                : s.form == Form::kPairs                    ? pick(random)
                : s.num_tokens < 0 || s.num_tokens > kTwo31 ? s.num_tokens
                                                            : s.num_tokens * random.integer(0, 3);
  if (random.chance(0.1)) s.num_pairs = pick(random);
  s.activation = random.chance(0.5) ? Activation::kSwiGLU : Activation::kReLU;
  s.numerics = Numerics::of(random.chance(0.5) ? DType::kFloat32 : DType::kBFloat16);
  s.deterministic = random.chance(0.5);
  if (s.form != Form::kSorted ? random.chance(0.4) : random.chance(0.05)) s.max_rows = pick(random);
  if (random.chance(0.03)) s.form = static_cast<Form>(random.integer(3, 255));
  if (random.chance(0.03)) {  // none
    const auto count = static_cast<std::int64_t>(all_activations().size());
    s.activation = static_cast<Activation>(random.integer(count, 255));
  }
  if (random.chance(0.03)) {
    s.numerics = Numerics::of(static_cast<DType>(random.integer(2, 255)));
  }
  if (random.chance(0.02)) {  // the other of the two
    s.numerics.operand = static_cast<DType>(1 - static_cast<int>(s.numerics.operand));
  }
  if (random.chance(0.02)) s.numerics.scaling = static_cast<Scaling>(random.integer(1, 255));
  return s;
}

// What cannot be a shape, by the words of moe.hpp.
bool contradictory(const MoEShape& s) {
  const bool sizes = s.num_tokens >= 0 && s.hidden_size > 0 && s.intermediate_size > 0 &&
                     s.num_experts > 0 && s.num_pairs >= 0;
  const bool enumerators = s.form <= Form::kPairs && name_of(s.activation) != "?" &&
                           s.numerics.storage <= DType::kBFloat16 &&
                           s.numerics == Numerics::of(s.numerics.storage);
  if (!sizes || !enumerators || s.max_rows.value_or(0) < 0) return true;
  if (s.form == Form::kSorted) return s.num_pairs != s.num_tokens || s.max_rows;
  return s.form == Form::kTopK &&
         (s.num_tokens == 0 ? s.num_pairs != 0 : s.num_pairs % s.num_tokens != 0);
}

// What no operation takes, also because row numbers are int32.
bool impossible(const MoEShape& s) {
  return contradictory(s) || std::max(s.num_tokens, s.num_pairs) > kTwo31 - 2 ||
         std::max({s.hidden_size, s.intermediate_size, s.num_experts}) > kTwo31 - 1;
}

constexpr std::int64_t kMostMultiplied = std::int64_t{1} << 41;  // three of them fit Wide

bool is_cut(const MoEShape& s) {
  return std::max({s.num_tokens, s.hidden_size, s.intermediate_size, s.num_experts, s.num_pairs}) >
         kMostMultiplied;
}

std::string text(const MoEShape& s) {
  std::string result = "T, d, n, E, P =";
  for (const std::int64_t size :
       {s.num_tokens, s.hidden_size, s.intermediate_size, s.num_experts, s.num_pairs}) {
    result += ' ' + std::to_string(size);
  }
  if (s.max_rows) result += ", max_rows " + std::to_string(*s.max_rows);
  return result + ", form " + std::to_string(static_cast<int>(s.form));
}

// `expected` is meaningless for a contradictory shape, and a lower bound where sizes are cut.
template <class Function>
void expect_bytes(const MoEShape& s, Wide expected, Function function) {
  const auto given = ask(function);
  if (contradictory(s)) {
    EXPECT_FALSE(given) << text(s);
  } else if (given) {
    const auto bytes = static_cast<Wide>(*given);
    EXPECT_TRUE(is_cut(s) ? bytes >= expected : bytes == expected) << *given << " for " << text(s);
  } else {  // refused: something is large
    EXPECT_TRUE(std::max({s.num_tokens, s.hidden_size, s.intermediate_size, s.num_experts,
                          s.num_pairs}) > 1 << 14)
        << text(s);
  }
}

// What the formulas of memory.hpp are made of, cut so that their products fit.
struct Terms {
  Wide T, d, n, E, P, C, columns, width;
  explicit Terms(const MoEShape& s)
      : T(cut(s.num_tokens)),
        d(cut(s.hidden_size)),
        n(cut(s.intermediate_size)),
        E(cut(s.num_experts)),
        P(cut(s.num_pairs)),
        C(std::min(P, Wide{cut(s.max_rows.value_or(kMost))})),
        columns(gate_factor(s.activation) * n),
        width(static_cast<Wide>(size_of(s.numerics.storage))) {}

 private:
  static Wide cut(std::int64_t size) { return std::clamp<std::int64_t>(size, 0, kMostMultiplied); }
};

TEST(Sizes, OfBuffersAndParameters) {
  Random random(11);
  int possible = 0;
  for (int i = 0; i < 30000; ++i) {
    const MoEShape s = random_shape(random);
    const Terms t(s);
    expect_bytes(s, t.C * t.columns * t.width, [&] { return moe_h_bytes(s); });
    const Wide entries = s.form == Form::kTopK    ? t.E + t.P + 2 * t.C
                         : s.form == Form::kPairs ? t.E + 2 * t.P + 2 * t.C + t.T + 1
                                                  : t.E;
    expect_bytes(s, 4 * entries, [&] { return moe_metadata_bytes(s); });
    expect_bytes(s, t.E * (t.columns + t.n) * t.d * t.width, [&] { return parameter_bytes(s); });
    expect_bytes(s, t.C * t.columns * t.width, [&] { return estimate_memory(s).kept_h; });
    const Wide a = t.C * t.n * t.width, dh = t.C * t.columns * t.width;
    const Wide wide = s.deterministic || s.form == Form::kSorted ? t.C * t.d * t.width : 0;
    expect_bytes(s, a + wide, [&] { return estimate_memory(s).transient_forward; });
    expect_bytes(s, std::max(dh + a, wide), [&] { return estimate_memory(s).transient_backward; });
    expect_bytes(s, (t.columns + t.n + t.d) * t.P * t.width,
                 [&] { return estimate_memory_scattermoe(s).kept_h; });
    const auto flops = ask([&] { return forward_flops(s); });
    if (flops && !is_cut(s)) {
      const auto exact = static_cast<double>(t.P) * static_cast<double>(t.d) *
                         static_cast<double>(t.n) * 2 * (gate_factor(s.activation) + 1);
      EXPECT_NEAR(*flops, exact, 1e-12 * exact) << text(s);
      EXPECT_EQ(backward_flops(s), 2 * *flops);
    }
    possible += !impossible(s) && ask([&] { return moe_h_bytes(s); });
  }
  EXPECT_GT(possible, 3000);
}

TEST(Sizes, OfWorkspaces) {
  Random random(12);
  int answered = 0;
  for (int i = 0; i < 6000; ++i) {
    const MoEShape s = random_shape(random);
    const Terms t(s);
    const Target& target = random.pick(targets());
    const Context context = target.context(random.pick<int>({1, 2, 1 << 16}));
    const bool backward = random.chance(0.5), inference = random.chance(0.5);
    const auto plan = [&](std::optional<std::size_t> limit) {
      return ask([&] {
        return backward ? moe_backward_workspace(context, s, limit)
                        : moe_forward_workspace(context, s, inference, limit);
      });
    };
    const auto whole = plan({});
    if (impossible(s)) {
      EXPECT_FALSE(whole) << text(s);
      continue;
    }
    if (!whole) continue;
    ++answered;
    EXPECT_LT(whole->bytes, std::size_t{1} << 63) << text(s);
    EXPECT_LE(whole->minimum_bytes, whole->bytes) << text(s);
    EXPECT_EQ(whole->num_slabs, 1);
    if (target.backend == "cpu") {  // a sum that wrapped would be below its terms
      const Wide a = t.C * t.n * t.width, wide = t.C * t.d * t.width;
      const Wide least = backward ? t.C * t.columns * t.width + std::max(a, wide) : a + wide;
      EXPECT_TRUE(static_cast<Wide>(whole->bytes) >= least) << text(s);
    }
    EXPECT_FALSE(plan(whole->minimum_bytes - 1)) << text(s);
    const std::size_t limit = whole->minimum_bytes + (whole->bytes - whole->minimum_bytes) / 2;
    for (const std::size_t given : {whole->minimum_bytes, limit, whole->bytes}) {
      const auto limited = plan(given);
      ASSERT_TRUE(limited) << text(s);
      EXPECT_LE(limited->bytes, given) << text(s);
      if (limited->bytes == whole->bytes) {
        EXPECT_EQ(limited->num_slabs, 1) << text(s);
      } else if (target.backend != "cuda") {  // which first gives up a copy of sorted rows
        EXPECT_GT(limited->num_slabs, 1) << text(s);
      }
      const Wide covered = static_cast<Wide>(limited->num_slabs) * limited->slab_columns;
      EXPECT_TRUE(covered >= t.d && covered - limited->slab_columns < t.d) << text(s);
    }
  }
  EXPECT_GT(answered, 800);
}

TEST(Sizes, OfRoundedPairs) {
  Random random(13);
  int answered = 0;
  for (int i = 0; i < 30000; ++i) {
    const std::int64_t T = pick(random), E = pick(random), K = pick(random);
    RoundingOptions rounding;
    rounding.tile = pick(random);
    rounding.policy = static_cast<RoundingPolicy>(random.integer(0, 6));
    const bool valid = T >= 0 && E >= 1 && K >= 1 && K <= E && rounding.tile >= 1 &&
                       rounding.tile <= T && rounding.policy <= RoundingPolicy::kNearestScore;
    const auto pairs = ask([&] { return rounded_capacity(T, E, K, rounding); });
    EXPECT_TRUE(valid || !pairs) << T << ' ' << E << ' ' << K << ' ' << rounding.tile;
    if (!valid || !pairs) continue;
    ++answered;
    const Wide tile = rounding.tile;
    const Wide more = rounding.policy == RoundingPolicy::kDown       ? 0
                      : rounding.policy == RoundingPolicy::kBalanced ? tile / 2
                      : rounding.policy == RoundingPolicy::kNearest  ? E * (tile / 2)
                                                                     : E * (tile - 1);
    EXPECT_TRUE(static_cast<Wide>(*pairs) == static_cast<Wide>(T) * K + more)
        << T << ' ' << E << ' ' << K << ' ' << rounding.tile;
    const Target& target = random.pick(targets());
    const auto bytes = ask([&] { return round_tokens_workspace_bytes(target.context(), T, E, K); });
    ASSERT_TRUE(bytes);
    EXPECT_LT(*bytes, std::size_t{1} << 63);
    if (target.backend == "cpu") {
      EXPECT_TRUE(static_cast<Wide>(*bytes) >= static_cast<Wide>(T) * E * 4);  // the keys
    }
  }
  EXPECT_GT(answered, 1000);
}

TEST(Sizes, OfALayersPlan) {
  const Context context;
  MoELayerOptions options;
  options.router.top_k = 2;
  MoEShape s;
  s.num_tokens = 20, s.hidden_size = 12, s.intermediate_size = 8, s.num_experts = 5;
  s.num_pairs = 40;
  EXPECT_TRUE(ask([&] { return moe_layer_forward_workspace(context, options, s); }));
  EXPECT_TRUE(ask([&] { return moe_layer_backward_workspace(context, options, s); }));
  // A plan of other options than the shape's would be too small.
  s.num_pairs = 60;
  EXPECT_FALSE(ask([&] { return moe_layer_forward_workspace(context, options, s); }));
  s.num_pairs = 40;
  options.rounding = RoundingOptions{};
  EXPECT_FALSE(ask([&] { return moe_layer_forward_workspace(context, options, s); }));
  options.rounding->tile = 4;
  s.form = Form::kPairs;
  s.num_pairs = rounded_capacity(20, 5, 2, *options.rounding);
  EXPECT_TRUE(ask([&] { return moe_layer_backward_workspace(context, options, s); }));
  s.num_pairs -= 1;
  EXPECT_FALSE(ask([&] { return moe_layer_backward_workspace(context, options, s); }));
  Random random(14);
  for (int i = 0; i < 3000; ++i) {
    const MoEShape any = random_shape(random);
    options.rounding.reset();
    if (random.chance(0.5)) options.rounding = RoundingOptions{pick(random), {}, 0, {}};
    options.router.top_k = pick(random);
    const auto plan = ask([&] { return moe_layer_backward_workspace(context, options, any); });
    if (!plan) continue;
    EXPECT_FALSE(impossible(any)) << text(any);
    EXPECT_LT(plan->bytes, std::size_t{1} << 63) << text(any);
  }
}

// Shapes of views whose strides are 0, so that they need no memory.
TEST(Sizes, OfExpandedTensors) {
  const float element = 0.0f;
  const std::int32_t id = 0;
  const auto expanded = [](const void* data, DType dtype, std::vector<std::int64_t> shape) {
    std::vector<std::int64_t> strides(shape.size(), 0);
    return ConstTensorView(data, dtype, std::span<const std::int64_t>(shape),
                           std::span<const std::int64_t>(strides));
  };
  Random random(15);
  for (int i = 0; i < 5000; ++i) {
    const DType dtype = static_cast<DType>(random.integer(0, 9));
    const std::int64_t T = pick(random), d = random.chance(0.5) ? 1 : pick(random);
    const std::int64_t n = pick(random), E = random.chance(0.5) ? 1 : pick(random);
    (void)ask([&] {
      const ExpertWeights weights{
          expanded(&element, dtype, {E, n, d}), {}, expanded(&element, dtype, {E, d, n}), {}};
      const ConstTensorView x =
          expanded(&element, random.chance(0.5) ? dtype : DType::kBFloat16, {T, d});
      MoELayerOptions options;
      options.experts.activation = Activation::kReLU;
      (void)ask([&] { return moe_layer_shape(options, x, weights); });
      return moe_shape(options.experts, x, weights,
                       TopKRouting{expanded(&id, DType::kInt32, {T, 1}),
                                   expanded(&element, DType::kFloat32, {T, 1})});
    });
    // g * n passes 63 bits.
    (void)ask([&] {
      return moe_shape({}, expanded(&element, DType::kBFloat16, {1, 1}),
                       {expanded(&element, dtype, {1, kMost - 1, 1}),
                        {},
                        expanded(&element, DType::kUInt8, {1, 1, kTwo62 + random.integer(0, 9)}),
                        {}},
                       TopKRouting{});
    });
  }
}

}  // namespace
}  // namespace sonicmoe::rig
