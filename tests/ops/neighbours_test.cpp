// Tensors of one call that lie between each other's elements, as blocks of one buffer do: accepted
// where they share no byte, with the results of tensors that lie apart.
#include <gtest/gtest.h>

#include "rig/moe_run.hpp"
#include "rig/operations.hpp"

namespace sonicmoe::rig {
namespace {

class Neighbours : public ::testing::TestWithParam<Target> {
 protected:
  Call make(const char* name) const {
    for (const Operation& entry : all_operations()) {
      if (std::string(entry.name) == name) return entry.make(GetParam(), 51, Optionals::kAll);
    }
    throw std::runtime_error(name);
  }
  Tensor buffer(DType dtype, std::vector<std::int64_t> shape) const {
    return Tensor(GetParam(), dtype, std::move(shape));
  }
};

INSTANTIATE_TEST_SUITE_P(Backends, Neighbours, ::testing::ValuesIn(targets()),
                         [](const auto& test) { return test.param.backend; });

// Ranges of the dimensions of a buffer: first and count each.
TensorView block(const Tensor& buffer,
                 const std::vector<std::pair<std::int64_t, std::int64_t>>& r) {
  const TensorView& whole = buffer.view();
  std::vector<std::int64_t> shape, strides;
  std::int64_t first = 0;
  for (std::size_t i = 0; i < r.size(); ++i) {
    const std::int64_t stride = whole.stride(static_cast<int>(i));
    shape.push_back(r[i].second);
    strides.push_back(stride);
    first += r[i].first * stride;
  }
  const auto bytes = static_cast<std::int64_t>(size_of(whole.dtype())) * first;
  return TensorView(static_cast<std::byte*>(whole.data()) + bytes, whole.dtype(),
                    std::span<const std::int64_t>(shape), std::span<const std::int64_t>(strides),
                    whole.device());
}

// Elements of a [rows, columns] matrix within columns [first, first + count).
std::vector<double> columns(const std::vector<double>& matrix, std::int64_t width,
                            std::int64_t first, std::int64_t count) {
  std::vector<double> result;
  for (std::size_t i = 0; i < matrix.size(); ++i) {
    const auto column = static_cast<std::int64_t>(i) % width;
    if (column >= first && column < first + count) result.push_back(matrix[i]);
  }
  return result;
}

TEST_P(Neighbours, InputAndOutputAsColumnsOfOneMatrix) {
  for (const char* name : {"moe_forward_topk", "moe_forward_sorted", "moe_layer_forward_topk"}) {
    Call call = make(name);
    const Operand& x = *call.find("x");
    const Operand& out = *call.find("out");
    const std::int64_t T = x.memory->view().size(0), d = x.memory->view().size(1);
    ASSERT_FALSE(call.run().refused) << name;
    const std::vector<double> expected = out.memory->values(), given = x.memory->values();

    Tensor both = buffer(x.memory->dtype(), {T, 2 * d});
    std::vector<double> values;
    for (std::int64_t t = 0; t < T; ++t) {
      values.insert(values.end(), given.begin() + t * d, given.begin() + (t + 1) * d);
      values.insert(values.end(), static_cast<std::size_t>(d), -1.0);
    }
    both.fill(values);
    x.give(block(both, {{0, T}, {0, d}}));
    out.give(block(both, {{0, T}, {d, d}}));
    const Outcome outcome = call.run();
    ASSERT_FALSE(outcome.refused) << outcome.message;
    EXPECT_EQ(bitwise_difference(columns(both.values(), 2 * d, d, d), expected), "") << name;
    EXPECT_EQ(bitwise_difference(columns(both.values(), 2 * d, 0, d), given), "") << name;
    // One column further to the left.
    out.give(block(both, {{0, T}, {d - 1, d}}));
    EXPECT_EQ(call.run().argument, "out") << name;
  }
}

TEST_P(Neighbours, GradientsAsBlocksOfOneBuffer) {
  for (const char* name : {"moe_backward_topk", "moe_backward_pairs", "moe_layer_backward_topk"}) {
    Call call = make(name);
    const Operand& w1 = *call.find("grad_w1");
    const Operand& w2 = *call.find("grad_w2");
    const TensorView of_w1 = w1.memory->view(), of_w2 = w2.memory->view();
    const std::int64_t E = of_w1.size(0), m = of_w1.size(1), d = of_w1.size(2), n = of_w2.size(2);
    // grad_w2 transposed, as [E, n, d] lies in memory.
    const auto results = [&](const TensorView& first, const TensorView& second) {
      w1.give(first);
      w2.give(transposed(second, 1, 2));
      return call.run();
    };
    Tensor apart1 = buffer(DType::kFloat32, {E, m, d}), apart2 = buffer(DType::kFloat32, {E, n, d});
    ASSERT_FALSE(results(apart1.view(), apart2.view()).refused) << name;

    // Rows of one [E, m + n, d], whose own rows may have a gap; then row beside row.
    for (const std::int64_t gap : {0, 4}) {
      Tensor rows = buffer(DType::kFloat32, {E, m + n, d + gap});
      const auto part = [&](std::int64_t first, std::int64_t count) {
        return block(rows, {{0, E}, {first, count}, {0, d}});
      };
      const Outcome outcome = results(part(0, m), part(m, n));
      ASSERT_FALSE(outcome.refused) << name << ": " << outcome.message;
      std::vector<double> first, second;
      const std::vector<double> all = columns(rows.values(), d + gap, 0, d);
      for (std::size_t i = 0; i < all.size(); ++i) {
        const auto row = static_cast<std::int64_t>(i) / d % (m + n);
        (row < m ? first : second).push_back(all[i]);
      }
      EXPECT_EQ(bitwise_difference(first, apart1.values()), "") << name;
      EXPECT_EQ(bitwise_difference(second, apart2.values()), "") << name;
      EXPECT_EQ(results(part(0, m), part(m - 1, n)).argument, "grad_w2") << name;
    }
  }
}

}  // namespace
}  // namespace sonicmoe::rig
