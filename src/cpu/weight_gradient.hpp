// Gradients of the weights: grad[e] (+)= sum over the rows r of e of left[r]^T right[r].
//   task   one expert, kLeftBlock x kRightBlock elements of its gradient, all of its rows
#pragma once

#include "core/metadata.hpp"
#include "core/parallel.hpp"
#include "core/workspace.hpp"
#include "cpu/panels.hpp"

namespace sonicmoe::cpu {

// Rows are packed before they are multiplied, which costs 1 / kLeftBlock + 1 / kRightBlock copies a
// multiplication; a task's panels and product (1.3 MB of float32) should not outgrow the L2 by
// much.
inline constexpr std::int64_t kLeftBlock = 256;
inline constexpr std::int64_t kRightBlock = 512;

template <class Compute>
struct WeightGradientScratch {
  Compute* left;   // [kRowBlock, kLeftBlock] padded
  Compute* right;  // [kRowBlock, kRightBlock] padded
  float* product;  // [kLeftBlock, kRightBlock]
  float* line;     // [kRightBlock] one row or column of the product

  static WeightGradientScratch carve(WorkspaceCarver& carver) {
    WeightGradientScratch s;
    s.left = carver.take<Compute>(panel_size(kRowBlock, kLeftBlock));
    s.right = carver.take<Compute>(panel_size(kRowBlock, kRightBlock));
    s.product = carver.take<float>(kLeftBlock * kRightBlock);
    s.line = carver.take<float>(std::max(kLeftBlock, kRightBlock));
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

/// Writes product [rows, columns] (row stride kRightBlock) to grad[e] at (row, column), along
/// whichever of grad's last two strides is 1.
inline void put_block(const float* product, const TensorView& grad, std::int64_t e,
                      std::int64_t row, std::int64_t rows, std::int64_t column,
                      std::int64_t columns, bool add, float* line) {
  const std::int64_t base = e * grad.stride(0) + row * grad.stride(1) + column * grad.stride(2);
  if (grad.stride(2) == 1 || grad.size(2) == 1) {
    for (std::int64_t i = 0; i < rows; ++i) {
      put(product + i * kRightBlock, grad, base + i * grad.stride(1), columns, add);
    }
    return;
  }
  for (std::int64_t j = 0; j < columns; ++j) {
    for (std::int64_t i = 0; i < rows; ++i) line[i] = product[i * kRightBlock + j];
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
  const std::int64_t left_blocks = ceil_div(grad.size(1), kLeftBlock);
  const std::int64_t right_blocks = ceil_div(grad.size(2), kRightBlock);
  parallel_for(threads, m.num_experts * left_blocks * right_blocks, [&](std::int64_t task, int t) {
    const WeightGradientScratch<Compute> s = scratch(t);
    const std::int64_t e = task / (left_blocks * right_blocks);
    const std::int64_t row = task / right_blocks % left_blocks * kLeftBlock;
    const std::int64_t column = task % right_blocks * kRightBlock;
    const std::int64_t rows = std::min(kLeftBlock, grad.size(1) - row);
    const std::int64_t columns = std::min(kRightBlock, grad.size(2) - column);
    const std::int64_t end = m.offsets[e];
    std::int64_t r = m.first_row(e);
    if (r == end) {
      if (accumulate) return;
      std::fill_n(s.product, kLeftBlock * kRightBlock, 0.0f);
    }
    float* const in_place = r == end ? nullptr : block_in_place(grad, e, row, column, accumulate);
    float* const product = in_place == nullptr ? s.product : in_place;
    const std::int64_t ld = in_place == nullptr ? kRightBlock : grad.stride(1);
    for (bool add = false; r < end; r += kRowBlock, add = true) {
      const std::int64_t depth = std::min(kRowBlock, end - r);
      const auto a = pack_rows(left, r, depth, row, rows, s.left);
      const auto b = pack_rows(right, r, depth, column, columns, s.right);
      gemm(rows, columns, padded_rows<Compute>(depth), a.transposed(), b, product, ld, add);
    }
    if (in_place == nullptr) {
      put_block(product, grad, e, row, rows, column, columns, accumulate, s.line);
    }
  });
}

}  // namespace sonicmoe::cpu
