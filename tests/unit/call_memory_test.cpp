// Which tensors of a call may lie where: Layout against sets of bytes, CallMemory on what callers
// do.
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>
#include <string>
#include <vector>

#include "core/check.hpp"
#include "core/layout.hpp"
#include "rig/random.hpp"

namespace sonicmoe::rig {
namespace {

using Extents = std::vector<std::int64_t>;

// Bytes of a view, relative to its first; `repeated` when an element shares one with another.
std::set<std::int64_t> bytes_of(const ConstTensorView& view, bool* repeated = nullptr) {
  std::set<std::int64_t> bytes;
  const auto width = static_cast<std::int64_t>(size_of(view.dtype()));
  for (std::int64_t i = 0; i < view.numel(); ++i) {
    std::int64_t rest = i, offset = 0;
    for (int dim = view.rank() - 1; dim >= 0; --dim) {
      offset += rest % view.size(dim) * view.stride(dim);
      rest /= view.size(dim);
    }
    for (std::int64_t b = 0; b < width; ++b) {
      const bool is_new = bytes.insert(offset * width + b).second;
      if (!is_new && repeated != nullptr) *repeated = true;
    }
  }
  return bytes;
}

bool meet(const ConstTensorView& a, const ConstTensorView& b, std::int64_t offset) {
  const std::set<std::int64_t> first = bytes_of(a), second = bytes_of(b);
  return std::any_of(second.begin(), second.end(),
                     [&](std::int64_t byte) { return first.count(byte + offset) != 0; });
}

// Memory that views refer to and nobody reads.
alignas(64) std::byte storage[1 << 16];

ConstTensorView view_of(DType dtype, const Extents& shape, const Extents& strides,
                        std::int64_t first_byte = 0) {
  return ConstTensorView(storage + first_byte, dtype, std::span<const std::int64_t>(shape),
                         std::span<const std::int64_t>(strides));
}

ConstTensorView random_view(Random& random) {
  const auto rank = static_cast<std::size_t>(random.integer(1, 4));
  Extents shape(rank), strides(rank);
  std::int64_t step = random.integer(1, 2);
  for (std::size_t i = 0; i < rank; ++i) {
    shape[i] = random.integer(1, 4);
    strides[i] = random.chance(0.8) ? step : random.integer(0, 12);
    step = step * shape[i] * random.integer(1, 2) + (random.chance(0.3) ? 1 : 0);
  }
  for (std::size_t i = rank; i-- > 1;) {  // any order of the dimensions
    const auto j = static_cast<std::size_t>(random.integer(0, static_cast<std::int64_t>(i)));
    std::swap(shape[i], shape[j]);
    std::swap(strides[i], strides[j]);
  }
  return view_of(random.pick<DType>({DType::kUInt8, DType::kBFloat16, DType::kFloat32}), shape,
                 strides);
}

TEST(Layout, NeverOverlooksASharedByte) {
  Random random(1);
  int distinct = 0, apart = 0;
  for (int i = 0; i < 20000; ++i) {
    const ConstTensorView a = random_view(random), b = random_view(random);
    bool repeated = false;
    bytes_of(a, &repeated);
    if (Layout(a).distinct()) {
      ASSERT_FALSE(repeated) << a.describe();
      ++distinct;
    }
    const std::int64_t offset = random.integer(-60, 60);
    if (!share_bytes(Layout(a), Layout(b), offset)) {
      ASSERT_FALSE(meet(a, b, offset)) << a.describe() << ' ' << b.describe() << ' ' << offset;
      ++apart;
    }
    ASSERT_EQ(share_bytes(Layout(a), Layout(b), offset),
              share_bytes(Layout(b), Layout(a), -offset));
  }
  EXPECT_GT(distinct, 5000);
  EXPECT_GT(apart, 5000);
}

// A block of a row-major tensor: a range of each dimension.
ConstTensorView random_block(Random& random, const Extents& parent) {
  Extents shape, strides(parent.size());
  std::int64_t step = 1, first = 0;
  for (std::size_t i = parent.size(); i-- > 0; step *= parent[i]) strides[i] = step;
  for (std::size_t i = 0; i < parent.size(); ++i) {
    const std::int64_t begin = random.integer(0, parent[i] - 1);
    shape.push_back(random.integer(1, parent[i] - begin));
    first += begin * strides[i];
  }
  return view_of(DType::kBFloat16, shape, strides, 2 * first);
}

TEST(Layout, IsExactForBlocksOfOneTensor) {
  Random random(2);
  int met = 0, apart = 0;
  for (int i = 0; i < 20000; ++i) {
    Extents parent;
    for (std::int64_t r = random.integer(1, 4); r > 0; --r) parent.push_back(random.integer(1, 6));
    const ConstTensorView a = random_block(random, parent);
    // The other one may see the first two dimensions as one.
    if (parent.size() > 1 && random.chance(0.5)) {
      parent[1] *= parent[0];
      parent.erase(parent.begin());
    }
    const ConstTensorView b = random_block(random, parent);
    const auto offset =
        static_cast<const std::byte*>(b.data()) - static_cast<const std::byte*>(a.data());
    const bool expected = meet(a, b, offset);
    ASSERT_EQ(share_bytes(Layout(a), Layout(b), offset), expected)
        << a.describe() << ' ' << b.describe() << ' ' << offset;
    ++(expected ? met : apart);
  }
  EXPECT_GT(met, 3000);
  EXPECT_GT(apart, 3000);
}

TEST(Layout, LargeTensorsTakeNoLonger) {
  // 2^40 interleaved rows: a count of rows would not end.
  const std::int64_t rows = std::int64_t{1} << 40, width = 64;
  const ConstTensorView a = view_of(DType::kUInt8, {rows, width}, {2 * width, 1});
  const ConstTensorView b =
      view_of(DType::kUInt8, {rows / 8, 8, width}, {16 * width, 2 * width, 1});
  EXPECT_FALSE(share_bytes(Layout(a), Layout(b), width));
  EXPECT_TRUE(share_bytes(Layout(a), Layout(b), width - 1));
  EXPECT_TRUE(share_bytes(Layout(a), Layout(b), 0));
}

// ------------------------------------------------------------------------------------ CallMemory

struct Tensor {
  const char* name;
  ConstTensorView view;
  Access access;
};

// The argument that is refused, or "".
std::string refused(const std::vector<Tensor>& tensors) {
  const Check check("test", Device{});
  CallMemory memory(check);
  try {
    for (const Tensor& tensor : tensors) memory.add(tensor.name, tensor.view, tensor.access);
    memory.check_overlaps();
  } catch (const Error& error) {
    return error.argument();
  }
  return "";
}

constexpr auto kF32 = DType::kFloat32;
constexpr auto kRead = Access::kRead, kWrite = Access::kWrite;

TEST(CallMemory, InputsMayShareAndOutputsMayNot) {
  const ConstTensorView a = view_of(kF32, {4, 8}, {8, 1});
  EXPECT_EQ(refused({{"x", a, kRead}, {"y", a, kRead}}), "");
  EXPECT_EQ(refused({{"x", a, kRead}, {"out", a, kWrite}}), "out");
  EXPECT_EQ(refused({{"out", a, kWrite}, {"x", a, kRead}}), "out");
  EXPECT_EQ(refused({{"one", a, kWrite}, {"two", a, kWrite}}), "two");
  // The last element alone, and just none.
  EXPECT_EQ(refused({{"x", a, kRead}, {"out", view_of(kF32, {4}, {1}, 4 * 31), kWrite}}), "out");
  EXPECT_EQ(refused({{"x", a, kRead}, {"out", view_of(kF32, {4}, {1}, 4 * 32), kWrite}}), "");
}

TEST(CallMemory, ColumnBlocksOfOneMatrix) {
  const ConstTensorView left = view_of(kF32, {5, 3}, {8, 1});
  EXPECT_EQ(refused({{"a", left, kWrite}, {"b", view_of(kF32, {5, 5}, {8, 1}, 4 * 3), kWrite}}),
            "");
  EXPECT_EQ(refused({{"a", left, kWrite}, {"b", view_of(kF32, {5, 5}, {8, 1}, 4 * 2), kWrite}}),
            "b");
  // Another number of rows, and the block that begins in the row before.
  EXPECT_EQ(refused({{"a", left, kWrite}, {"b", view_of(kF32, {2, 5}, {8, 1}, 4 * 19), kWrite}}),
            "");
  EXPECT_EQ(refused({{"a", left, kWrite}, {"b", view_of(kF32, {2, 6}, {8, 1}, 4 * 19), kWrite}}),
            "b");
  // A vector down a column between them.
  EXPECT_EQ(refused({{"a", left, kWrite}, {"b", view_of(kF32, {5}, {8}, 4 * 4), kWrite}}), "");
  EXPECT_EQ(refused({{"a", left, kWrite}, {"b", view_of(kF32, {5}, {8}, 4 * 2), kWrite}}), "b");
}

TEST(CallMemory, HalvesOfAFusedBuffer) {
  // [E, 2, n, d] with rows of pitch p: gate and up, each [E, n, d].
  const std::int64_t E = 3, n = 4, d = 5;
  for (const std::int64_t pitch : {d, d + 3}) {
    const std::int64_t half = n * pitch;
    const Extents shape = {E, n, d}, strides = {2 * half, pitch, 1};
    const ConstTensorView gate = view_of(kF32, shape, strides);
    const ConstTensorView up = view_of(kF32, shape, strides, 4 * half);
    EXPECT_EQ(refused({{"gate", gate, kWrite}, {"up", up, kWrite}}), "");
    // One row too many.
    const ConstTensorView more = view_of(kF32, {E, n + 1, d}, strides);
    EXPECT_EQ(refused({{"gate", more, kWrite}, {"up", up, kWrite}}), "up");
    // Transposed views of the same halves.
    EXPECT_EQ(refused({{"gate", transposed(gate, 1, 2), kWrite}, {"up", up, kWrite}}), "");
    EXPECT_EQ(refused({{"gate", transposed(more, 1, 2), kWrite}, {"up", up, kWrite}}), "up");
  }
  // Row by row instead: [E, n, 2, d].
  const ConstTensorView even = view_of(kF32, {E, n, d}, {2 * n * d, 2 * d, 1});
  const ConstTensorView odd = view_of(kF32, {E, n, d}, {2 * n * d, 2 * d, 1}, 4 * d);
  EXPECT_EQ(refused({{"even", even, kWrite}, {"odd", odd, kWrite}}), "");
}

TEST(CallMemory, OutputsHaveDistinctElements) {
  EXPECT_EQ(refused({{"x", view_of(kF32, {4, 8}, {0, 1}), kRead}}), "");
  EXPECT_EQ(refused({{"out", view_of(kF32, {4, 8}, {0, 1}), kWrite}}), "out");
  EXPECT_EQ(refused({{"out", view_of(kF32, {4, 8}, {7, 1}), kWrite}}), "out");
  EXPECT_EQ(refused({{"out", view_of(kF32, {4, 8}, {1, 1}), kWrite}}), "out");
  EXPECT_EQ(refused({{"out", view_of(kF32, {1, 8}, {0, 1}), kWrite}}), "");  // one row
  EXPECT_EQ(refused({{"out", view_of(kF32, {4, 8}, {1, 4}), kWrite}}), "");  // transposed
}

TEST(CallMemory, DevicesAndAlignment) {
  const ConstTensorView elsewhere(storage, kF32, {4}, Device{DeviceType::kCuda, 0});
  EXPECT_EQ(refused({{"x", elsewhere, kRead}}), "x");
  for (const DType dtype : {DType::kBFloat16, DType::kInt32, DType::kInt64}) {
    EXPECT_EQ(refused({{"x", ConstTensorView(storage + 1, dtype, {4}), kRead}}), "x");
    EXPECT_EQ(refused({{"x", ConstTensorView(storage + 8, dtype, {4}), kRead}}), "");
  }
  EXPECT_EQ(refused({{"x", ConstTensorView(storage + 1, DType::kUInt8, {4}), kRead}}), "");
  // Without elements there is no address; the device still counts.
  EXPECT_EQ(refused({{"x", ConstTensorView(storage + 1, kF32, {0}), kWrite}}), "");
  EXPECT_EQ(
      refused({{"x", ConstTensorView(nullptr, kF32, {0}, Device{DeviceType::kCuda, 0}), kWrite}}),
      "x");
  EXPECT_EQ(refused({{"x", {}, kWrite}}), "");
}

}  // namespace
}  // namespace sonicmoe::rig
