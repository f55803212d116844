// Gradients of the weights: grad[e] (+)= sum over the rows r of e of left[r]^T right[r].
//   task   one expert, kLeftBlock x kRightBlock elements of its gradient, all of its rows
#pragma once

#include "core/metadata.hpp"
#include "core/parallel.hpp"
#include "core/workspace.hpp"
#include "cpu/panels.hpp"

namespace sonicmoe::cpu {

// Rows are packed before they are multiplied, which costs 1 / kLeft + 1 / kRight copies a
// multiplication; in float32, a task's panels and product (1.3 MB) should not outgrow the L2 by
// much.
template <class Compute>
struct WeightGradientScratch {
  static constexpr bool kBfloat16 = std::is_same_v<Compute, bfloat16>;
  static constexpr std::int64_t kLeft = kBfloat16 ? 512 : 256;
  static constexpr std::int64_t kRight = kBfloat16 ? 1024 : 512;
  static constexpr std::int64_t kRows = kBfloat16 ? 512 : 256;

  Compute* left;   // [kRows, kLeft] padded
  Compute* right;  // [kRows, kRight] padded
  float* product;  // [kLeft, kRight]
  float* line;     // [max(kLeft, kRight)] one row or column of the product

  static WeightGradientScratch carve(WorkspaceCarver& carver) {
    WeightGradientScratch s;
    s.left = carver.take<Compute>(panel_size(kRows, kLeft));
    s.right = carver.take<Compute>(panel_size(kRows, kRight));
    s.product = carver.take<float>(kLeft * kRight);
    s.line = carver.take<float>(std::max(kLeft, kRight));
    return s;
  }
};

/// Stores or adds `count` float32 values at `to`, unit stride.
template <class T>
void put(const float* from, T* to, std::int64_t count, bool add) {
  if (add) {
    for (std::int64_t i = 0; i < count; ++i) to[i] = T(static_cast<float>(to[i]) + from[i]);
  } else {
    convert(from, to, count);
  }
}

/// As put, for a gradient of dtype float32 or bfloat16 at `offset` elements.
inline void put(const float* from, const TensorView& grad, std::int64_t offset, std::int64_t count,
                bool add) {
  if (grad.dtype() == DType::kFloat32) {
    put(from, grad.as<float>() + offset, count, add);
  } else {
    put(from, grad.as<bfloat16>() + offset, count, add);
  }
}

/// Writes product [rows, columns] (row stride `ld`) to grad[e] at (row, column), along
/// whichever of grad's last two strides is 1.
inline void put_block(const float* product, std::int64_t ld, const TensorView& grad, std::int64_t e,
                      std::int64_t row, std::int64_t rows, std::int64_t column,
                      std::int64_t columns, bool add, float* line) {
  const std::int64_t base = e * grad.stride(0) + row * grad.stride(1) + column * grad.stride(2);
  if (grad.stride(2) == 1 || grad.size(2) == 1) {
    for (std::int64_t i = 0; i < rows; ++i) {
      put(product + i * ld, grad, base + i * grad.stride(1), columns, add);
    }
    return;
  }
  for (std::int64_t j = 0; j < columns; ++j) {
    for (std::int64_t i = 0; i < rows; ++i) line[i] = product[i * ld + j];
    put(line, grad, base + j * grad.stride(2), rows, add);
  }
}

/// Where a block of grad[e] can be computed in place: float32 rows, written and not added to.
inline float* block_in_place(const TensorView& grad, std::int64_t e, std::int64_t row,
                             std::int64_t column, bool accumulate) {
  if (accumulate || grad.dtype() != DType::kFloat32 || grad.stride(2) != 1 ||
      grad.stride(1) < grad.size(2)) {
    return nullptr;
  }
  return grad.as<float>() + e * grad.stride(0) + row * grad.stride(1) + column;
}

/// grad is [E, left columns, right columns]. `scratch(thread)` gives a thread's scratch.
template <class Storage, class Compute, class Scratch>
void weight_gradient(int threads, const Metadata& m, RowSource<Storage> left,
                     RowSource<Storage> right, const TensorView& grad, bool accumulate,
                     Scratch scratch) {
  using Blocks = WeightGradientScratch<Compute>;
  constexpr std::int64_t kLeft = Blocks::kLeft, kRight = Blocks::kRight;
  const std::int64_t left_blocks = ceil_div(grad.size(1), kLeft);
  const std::int64_t right_blocks = ceil_div(grad.size(2), kRight);
  // Neighbouring tasks take other rows of the gradient: two threads that write the same fresh page
  // at once both pay for its fault.
  parallel_for(threads, m.num_experts * left_blocks * right_blocks, [&](std::int64_t task, int t) {
    const WeightGradientScratch<Compute> s = scratch(t);
    const std::int64_t e = task / (left_blocks * right_blocks);
    const std::int64_t column = task / left_blocks % right_blocks * kRight;
    const std::int64_t row = task % left_blocks * kLeft;
    const std::int64_t rows = std::min(kLeft, grad.size(1) - row);
    const std::int64_t columns = std::min(kRight, grad.size(2) - column);
    const std::int64_t end = m.offsets[e];
    std::int64_t r = m.first_row(e);
    if (r == end) {
      if (accumulate) return;
      std::fill_n(s.product, kLeft * kRight, 0.0f);
    }
    float* const in_place = r == end ? nullptr : block_in_place(grad, e, row, column, accumulate);
    float* const product = in_place == nullptr ? s.product : in_place;
    const std::int64_t ld = in_place == nullptr ? kRight : grad.stride(1);
    for (bool add = false; r < end; r += Blocks::kRows, add = true) {
      const std::int64_t depth = std::min(Blocks::kRows, end - r);
      const auto a = pack_rows(left, r, depth, row, rows, s.left);
      const auto b = pack_rows(right, r, depth, column, columns, s.right);
      gemm(rows, columns, padded_rows<Compute>(depth), a.transposed(), b, product, ld, add);
    }
    if (in_place == nullptr) {
      put_block(product, ld, grad, e, row, rows, column, columns, accumulate, s.line);
    }
  });
}

}  // namespace sonicmoe::cpu
