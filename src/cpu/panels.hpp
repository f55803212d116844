// Panels: pieces of tensors brought into the form a GEMM takes, in place where they already have
// it.
//
// Storage is the dtype of the tensors, Compute that of the GEMM: equal for float32 and for bfloat16
// on a CPU that multiplies it, otherwise bfloat16 is widened to float32 panel by panel.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/gemm.hpp"
#include "cpu/tiles.hpp"
#include "cpu/vec.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe::cpu {

/// Rows of a tensor [*, columns] picked by an index list, or consecutive (`index` null).
template <class Storage>
struct RowSource {
  const Storage* data;
  std::int64_t row_stride;
  const std::int32_t* index = nullptr;

  const Storage* row(std::int64_t r) const {
    return data + (index == nullptr ? r : std::int64_t{index[r]}) * row_stride;
  }
};

template <class Storage>
RowSource<Storage> row_source(const ConstTensorView& tensor, const std::int32_t* index) {
  return {tensor.as<Storage>(), tensor.stride(0), index};
}

/// Rows a GEMM computes for `rows` real ones: native bfloat16 GEMMs come in few fixed sizes.
template <class Compute>
std::int64_t padded_rows(std::int64_t rows) {
  return std::is_same_v<Compute, bfloat16> ? round_up(rows, kRowQuantum) : rows;
}

/// Rows [first, first + rows) x columns [column, column + columns) as a row-major operand.
/// `scratch` holds padded_rows(rows) x columns; padding rows are zero.
template <class Storage, class Compute>
Operand<Compute> load_rows(const RowSource<Storage>& source, std::int64_t first, std::int64_t rows,
                           std::int64_t column, std::int64_t columns, Compute* scratch) {
  if constexpr (std::is_same_v<Storage, float>) {
    if (source.index == nullptr && source.row_stride >= columns) {
      return {source.row(first) + column, source.row_stride};
    }
  }
  for (std::int64_t r = 0; r < rows; ++r) {
    convert(source.row(first + r) + column, scratch + r * columns, columns);
  }
  const std::int64_t padding = padded_rows<Compute>(rows) - rows;
  std::fill_n(scratch + rows * columns, padding * columns, Compute{});
  return {scratch, columns};
}

/// Rows [row, row + rows) x columns [column, column + columns) of matrix e of a weight [E, *, *],
/// either of whose last two strides is 1. `scratch` holds rows x columns.
template <class Storage, class Compute>
Operand<Compute> load_weight(const ConstTensorView& weight, std::int64_t e, std::int64_t row,
                             std::int64_t rows, std::int64_t column, std::int64_t columns,
                             Compute* scratch) {
  const Storage* data = weight.as<Storage>() + e * weight.stride(0) + row * weight.stride(1) +
                        column * weight.stride(2);
  const bool row_major = weight.stride(2) == 1 || weight.size(2) == 1;
  const std::int64_t ld = row_major ? weight.stride(1) : weight.stride(2);
  const std::int64_t lines = row_major ? rows : columns;
  const std::int64_t length = row_major ? columns : rows;
  // A single line may carry any stride, and a GEMM wants ld >= length.
  if constexpr (std::is_same_v<Storage, Compute>) {
    if (ld >= length) return {data, ld, row_major};
  }
  for (std::int64_t i = 0; i < lines; ++i) convert(data + i * ld, scratch + i * length, length);
  return {scratch, length, row_major};
}

/// Calls run(Storage{}, Compute{}) for the tensors' dtype on this machine.
template <class Run>
void visit_types(DType storage, Run run) {
  if (storage == DType::kFloat32) {
    run(float{}, float{});
  } else if (native_bfloat16()) {
    run(bfloat16{}, bfloat16{});
  } else {
    run(bfloat16{}, float{});
  }
}

}  // namespace sonicmoe::cpu
