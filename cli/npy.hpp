// Reading NumPy's .npy files: as much of the format as a matrix of logits needs.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace sonicmoe::cli {

struct Matrix {
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::vector<float> values;  ///< [rows, columns] row-major, all finite
};

/// A two-dimensional little-endian float32 or float64 array in C or Fortran order, format versions
/// 1 to 3, and nothing else in the file. Reads no more than the file's sizes allow, whatever its
/// header says. Errors: no regular file (a pipe would wait for its writer, a device has no end);
/// anything missing, left over, malformed or larger than memory; values that are not finite in
/// float32. The message names the option, the file, what was expected and what it holds.
Matrix read_npy(const std::string& option, const std::string& path);

/// What the header of a .npy file says.
struct NpyHeader {
  std::size_t element_bytes = 0;  ///< 4 or 8
  bool fortran_order = false;
  std::int64_t rows = 0;  ///< 1 to 2^31-1, as are the columns
  std::int64_t columns = 0;
};

/// Parses {'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), } with the keys in any order.
/// Errors: std::invalid_argument, "expected ..., got ...".
NpyHeader parse_npy_header(std::string_view text);

}  // namespace sonicmoe::cli
