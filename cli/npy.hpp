// Reading NumPy's .npy files: as much of the format as a matrix of logits needs.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace sonicmoe::cli {

struct Matrix {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::vector<float> values;  ///< [rows, columns] row-major
};

/// A two-dimensional little-endian float32 or float64 array in C or Fortran order, format versions
/// 1 to 3. Errors: a missing, truncated or other file; the message names the file and the reason.
Matrix read_npy(const std::string& path);

}  // namespace sonicmoe::cli
