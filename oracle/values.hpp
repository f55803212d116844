// Tensors as float64 values, and back through a storage dtype.
#pragma once

#include <cstdint>
#include <vector>

#include "sonicmoe/tensor.hpp"

namespace sonicmoe::oracle {

using Values = std::vector<double>;
using Ids = std::vector<std::int64_t>;

/// The elements of a float32, bfloat16, int32, int64 or uint8 view in host memory, row-major.
Values to_double(const ConstTensorView& view);

/// The elements of an int32 or int64 view, row-major. Not through double: INT64_MAX has no double.
Ids to_ids(const ConstTensorView& view);

/// `value` after a round trip through a float32 or bfloat16 element.
double rounded_to(DType dtype, double value);

inline std::size_t at(std::int64_t i) { return static_cast<std::size_t>(i); }
inline Values zeros(std::int64_t count) { return Values(at(count), 0.0); }

/// Row `i` of a row-major matrix.
template <class T>
std::vector<T> row_of(const std::vector<T>& matrix, std::int64_t columns, std::int64_t i) {
  const auto begin = matrix.begin() + i * columns;
  return {begin, begin + columns};
}

/// Row-major [rows, columns] or [batch, rows, columns] over a vector: indices as in the formulas.
struct Matrix {
  Values* data;
  std::int64_t columns;
  double& operator()(std::int64_t i, std::int64_t j) const { return (*data)[at(i * columns + j)]; }
};
struct Cube {
  Values* data;
  std::int64_t rows, columns;
  double& operator()(std::int64_t b, std::int64_t i, std::int64_t j) const {
    return (*data)[at((b * rows + i) * columns + j)];
  }
};

}  // namespace sonicmoe::oracle
