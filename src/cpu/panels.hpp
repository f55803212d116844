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

/// Leading dimension of a packed panel. Lines that lie a power of two apart share few sets of the
/// caches, so every line gets one cache line more.
inline constexpr std::int64_t kLinePadding = 16;
inline constexpr std::int64_t padded_line(std::int64_t length) { return length + kLinePadding; }

/// Elements of scratch for a panel of `lines` x `length`, whichever of the two is contiguous.
inline constexpr std::size_t panel_size(std::int64_t lines, std::int64_t length) {
  return static_cast<std::size_t>(padded_line(lines) * padded_line(length));
}

/// Rows [first, first + rows) x columns [column, column + columns) copied to a row-major operand.
/// `scratch` holds padded_rows(rows) x padded_line(columns); padding rows are zero.
template <class Storage, class Compute>
Operand<Compute> pack_rows(const RowSource<Storage>& source, std::int64_t first, std::int64_t rows,
                           std::int64_t column, std::int64_t columns, Compute* scratch) {
  const std::int64_t ld = padded_line(columns);
  for (std::int64_t r = 0; r < rows; ++r) {
    convert(source.row(first + r) + column, scratch + r * ld, columns);
  }
  for (std::int64_t r = rows; r < padded_rows<Compute>(rows); ++r) {
    std::fill_n(scratch + r * ld, columns, Compute{});
  }
  return {scratch, ld};
}

/// As pack_rows, but in place where the rows already are such an operand.
template <class Storage, class Compute>
Operand<Compute> load_rows(const RowSource<Storage>& source, std::int64_t first, std::int64_t rows,
                           std::int64_t column, std::int64_t columns, Compute* scratch) {
  if constexpr (std::is_same_v<Storage, float>) {
    if (source.index == nullptr && source.row_stride >= columns) {
      return {source.row(first) + column, source.row_stride};
    }
  }
  return pack_rows(source, first, rows, column, columns, scratch);
}

/// Where a GEMM may write rows `ld` apart that are stored as it computes them; null where they are
/// converted, or lie whole pages apart and so share few sets of the caches.
template <class Storage>
float* product_in_place(Storage* rows, std::int64_t ld) {
  constexpr std::int64_t kPage = 4096 / sizeof(float);
  if constexpr (std::is_same_v<Storage, float>) {
    if (ld % kPage != 0) return rows;
  }
  return nullptr;
}

/// Rows [row, row + rows) x columns [column, column + columns) of matrix e of a weight [E, *, *],
/// either of whose last two strides is 1. `scratch` holds panel_size(rows, columns).
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
  // A single line may carry any stride, and a GEMM wants ld >= length. Short pieces of long float32
  // lines are copied: a kernel that walks across them meets a new page every few lines.
  if constexpr (std::is_same_v<Storage, Compute>) {
    const bool short_pieces = std::is_same_v<Compute, float> && ld >= 4 * length;
    if (ld >= length && !short_pieces) return {data, ld, row_major};
  }
  const std::int64_t scratch_ld = padded_line(length);
  for (std::int64_t i = 0; i < lines; ++i) convert(data + i * ld, scratch + i * scratch_ld, length);
  return {scratch, scratch_ld, row_major};
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
