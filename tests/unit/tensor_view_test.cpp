// What a view may be: every limit of the constructor, and sizes that need all 63 bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "rig/random.hpp"
#include "sonicmoe/error.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe::rig {
namespace {

using Extents = std::vector<std::int64_t>;

constexpr std::int64_t kMost = std::numeric_limits<std::int64_t>::max();
constexpr std::int64_t kTwo62 = std::int64_t{1} << 62;

// The argument that is refused, or "".
std::string refused(const void* data, DType dtype, const Extents& shape,
                    const std::optional<Extents>& strides = {}) {
  const std::span<const std::int64_t> extents(shape);
  try {
    if (strides) {
      (void)ConstTensorView(data, dtype, extents, std::span<const std::int64_t>(*strides));
    } else {
      (void)ConstTensorView(data, dtype, extents);
    }
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).rfind("tensor: " + error.argument() + ": expected ", 0), 0u)
        << error.what();
    return error.argument();
  }
  return "";
}

const float element = 0.0f;

TEST(TensorView, Rank) {
  EXPECT_EQ(refused(&element, DType::kFloat32, {}), "shape");
  EXPECT_EQ(refused(&element, DType::kFloat32, {1, 1, 1, 1}), "");
  EXPECT_EQ(refused(&element, DType::kFloat32, {1, 1, 1, 1, 1}), "shape");
  EXPECT_EQ(refused(&element, DType::kFloat32, Extents(1000, 1)), "shape");
  EXPECT_EQ(refused(&element, DType::kFloat32, {}, Extents{}), "shape");
  EXPECT_EQ(refused(&element, DType::kFloat32, {1, 1}, Extents{1}), "strides");
  EXPECT_EQ(refused(&element, DType::kFloat32, {1, 1}, Extents{1, 1, 1}), "strides");
}

TEST(TensorView, DTypes) {
  for (int value = 0; value < 256; ++value) {
    const auto dtype = static_cast<DType>(value);
    EXPECT_EQ(refused(&element, dtype, {1}), value < 10 ? "" : "dtype") << value;
    EXPECT_EQ(size_of(dtype) == 0, value >= 10);
    EXPECT_EQ(name_of(dtype) == "?", value >= 10);
  }
}

TEST(TensorView, NegativeExtentsAndStrides) {
  for (const std::int64_t negative : {std::int64_t{-1}, -kTwo62, std::int64_t{-kMost - 1}}) {
    EXPECT_EQ(refused(&element, DType::kFloat32, {negative}), "shape");
    EXPECT_EQ(refused(&element, DType::kFloat32, {0, negative}), "shape");
    EXPECT_EQ(refused(&element, DType::kFloat32, {negative, negative}), "shape");
    EXPECT_EQ(refused(&element, DType::kFloat32, {1, 1}, Extents{negative, 1}), "strides");
    EXPECT_EQ(refused(&element, DType::kFloat32, {0, 1}, Extents{1, negative}), "strides");
  }
}

TEST(TensorView, NullOnlyWithoutElements) {
  EXPECT_EQ(refused(nullptr, DType::kFloat32, {1}), "data");
  EXPECT_EQ(refused(nullptr, DType::kFloat32, {2, 3}, Extents{0, 0}), "data");
  EXPECT_EQ(refused(nullptr, DType::kFloat32, {2, 0}), "");
  EXPECT_EQ(refused(nullptr, DType::kFloat32, {kMost, 0, kMost}, Extents{kMost, kMost, kMost}), "");
}

TEST(TensorView, AnAbsentViewHasNothing) {
  const TensorView absent;
  EXPECT_FALSE(absent.defined());
  EXPECT_EQ(absent.numel(), 0);
  EXPECT_EQ(absent.nbytes(), 0u);
  EXPECT_EQ(absent.span_bytes(), 0u);
  EXPECT_EQ(absent.describe(), "no tensor");
}

// Every combination of extreme extents and strides against 128-bit arithmetic.
TEST(TensorView, SizesAreRightOrRefused) {
  const std::vector<std::int64_t> extents = {
      0, 1, 2, 3, (std::int64_t{1} << 31) - 1, kTwo62 / 2, kTwo62 - 1, kTwo62, kMost};
  Random random(3);
  int accepted = 0, too_large = 0;
  for (int i = 0; i < 20000; ++i) {
    const auto rank = static_cast<std::size_t>(random.integer(1, 4));
    const auto dtype = static_cast<DType>(random.integer(0, 9));
    const auto width = static_cast<__int128>(size_of(dtype));
    Extents shape(rank), strides(rank);
    for (std::size_t k = 0; k < rank; ++k) {
      shape[k] = random.chance(0.6) ? random.integer(1, 5) : random.pick(extents);
      strides[k] = random.chance(0.6) ? random.integer(0, 5) : random.pick(extents);
    }
    // Products of four 63-bit numbers pass 128 bits: stop at what is too large anyway.
    constexpr __int128 kEnough = __int128{1} << 64;
    __int128 elements = 1, last = 0;
    bool empty = false;
    for (std::size_t k = 0; k < rank; ++k) {
      empty = empty || shape[k] == 0;
      elements = std::min(kEnough, elements * shape[k]);
      last += static_cast<__int128>(std::max<std::int64_t>(shape[k] - 1, 0)) * strides[k];
      last = std::min(kEnough, last);
    }
    const bool fits = empty || (elements * width < kMost && (last + 1) * width < kMost);
    ASSERT_EQ(refused(&element, dtype, shape, strides), fits ? "" : "shape");
    ++(fits ? accepted : too_large);
    if (!fits) continue;
    const ConstTensorView view(&element, dtype, std::span<const std::int64_t>(shape),
                               std::span<const std::int64_t>(strides));
    const __int128 bytes = empty ? 0 : elements * width, span = empty ? 0 : (last + 1) * width;
    EXPECT_EQ(static_cast<__int128>(view.numel()) * width, bytes);
    EXPECT_EQ(static_cast<__int128>(view.nbytes()), bytes);
    EXPECT_EQ(static_cast<__int128>(view.span_bytes()), span);
    EXPECT_TRUE(view.is_contiguous() ? bytes == span : !empty) << view.describe();
  }
  EXPECT_GT(accepted, 2000);
  EXPECT_GT(too_large, 2000);
}

TEST(TensorView, ContiguousStridesOfHugeShapes) {
  EXPECT_EQ(refused(&element, DType::kUInt8, {kMost}), "shape");
  EXPECT_EQ(refused(&element, DType::kUInt8, {kMost - 1}), "");
  EXPECT_EQ(refused(&element, DType::kFloat32, {kTwo62}), "shape");
  EXPECT_EQ(refused(&element, DType::kFloat32, {std::int64_t{1} << 32, std::int64_t{1} << 31}),
            "shape");
  EXPECT_EQ(refused(&element, DType::kFloat32, {kMost, kMost, kMost, kMost}), "shape");
  EXPECT_EQ(refused(&element, DType::kFloat32, {kMost, kMost, 0, kMost}), "");
}

}  // namespace
}  // namespace sonicmoe::rig
