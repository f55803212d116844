#include "cli/npy.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <limits>
#include <stdexcept>
#include <system_error>

#include "cli/options.hpp"
#include "rig/host_memory.hpp"

namespace sonicmoe::cli {
namespace {

static_assert(std::endian::native == std::endian::little,
              "values are read as they lie in the file");

namespace fs = std::filesystem;

constexpr std::string_view kMagic = "\x93NUMPY";
constexpr std::uint64_t kMostHeaderBytes = 1 << 20;  // NumPy writes 128, and reads 10000

// Completes the message with the file's name.
[[noreturn]] void fail(const std::string& reason) { throw std::invalid_argument(reason); }

const char* describe(fs::file_type type) {
  switch (type) {
    case fs::file_type::directory:
      return "a folder";
    case fs::file_type::fifo:
      return "a pipe";
    case fs::file_type::socket:
      return "a socket";
    case fs::file_type::character:
    case fs::file_type::block:
      return "a device";
    default:
      return "something else";
  }
}

// A regular file whose size is known. Every read is checked against what is left.
class File {
 public:
  explicit File(const std::string& path) {
    std::error_code error;
    const fs::file_status status = fs::status(path, error);
    if (status.type() == fs::file_type::none) fail(error.message());
    if (status.type() == fs::file_type::not_found) fail("no such file");
    if (!fs::is_regular_file(status)) {
      fail(std::string("expected a regular file, got ") + describe(status.type()));
    }
    left_ = fs::file_size(path, error);
    if (error) fail(error.message());
    stream_.open(path, std::ios::binary);
    if (!stream_) fail(std::strerror(errno));
  }

  std::uint64_t left() const noexcept { return left_; }

  void read(void* to, std::uint64_t count, const char* what) {
    if (count > left_) {
      fail("expected " + std::to_string(count) + " bytes of " + what + ", got " +
           std::to_string(left_) + ": the file is truncated");
    }
    if (!stream_.read(static_cast<char*>(to), static_cast<std::streamsize>(count))) {
      fail(std::string("cannot read all of its ") + what);
    }
    left_ -= count;
  }

 private:
  std::ifstream stream_;
  std::uint64_t left_ = 0;
};

std::uint64_t little_endian(const unsigned char* bytes, std::size_t count) {
  std::uint64_t value = 0;
  for (std::size_t i = count; i-- > 0;) value = value << 8 | bytes[i];
  return value;
}

NpyHeader read_header(File& file) {
  std::array<char, 6> magic;
  std::array<unsigned char, 2> version;
  std::array<unsigned char, 4> length{};
  file.read(magic.data(), magic.size(), "a .npy header");
  if (std::string_view(magic.data(), magic.size()) != kMagic) {
    fail("expected a .npy file, got other first bytes");
  }
  file.read(version.data(), version.size(), "a .npy header");
  if (version[0] < 1 || version[0] > 3 || version[1] != 0) {
    fail("expected version 1.0, 2.0 or 3.0 of the format, got " + std::to_string(version[0]) + "." +
         std::to_string(version[1]));
  }
  const std::size_t length_bytes = version[0] == 1 ? 2 : 4;
  file.read(length.data(), length_bytes, "a .npy header");
  const std::uint64_t header_bytes = little_endian(length.data(), length_bytes);
  if (header_bytes > kMostHeaderBytes) {
    fail("expected a header of at most " + std::to_string(kMostHeaderBytes) + " bytes, got " +
         std::to_string(header_bytes));
  }
  std::string text(static_cast<std::size_t>(std::min(header_bytes, file.left())), '\0');
  file.read(text.data(), header_bytes, "a .npy header");
  return parse_npy_header(text);
}

// The elements of a header's shape that the file holds; no product overflows before it is checked.
std::size_t element_count(const NpyHeader& header, const File& file) {
  const auto count = static_cast<std::uint64_t>(header.rows) *
                     static_cast<std::uint64_t>(header.columns);  // below 2^62
  const std::uint64_t held = file.left() / header.element_bytes;
  if (count != held || file.left() % header.element_bytes != 0) {
    fail("expected " + std::to_string(header.element_bytes) + " bytes for each of the " +
         std::to_string(count) + " elements of shape (" + std::to_string(header.rows) + ", " +
         std::to_string(header.columns) + "), got " + std::to_string(file.left()) + " in all");
  }
  const std::uint64_t memory = rig::usable_host_memory();
  if (memory > 0 && count > memory / (2 * sizeof(float))) {  // here and as a tensor
    fail("expected an array that fits the memory, got " +
         format_bytes(static_cast<double>(file.left())));
  }
  return static_cast<std::size_t>(count);
}

[[noreturn]] void fail_not_finite(double value, std::size_t row, std::size_t column) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", value);
  fail(std::string("expected logits that are finite in float32, got ") + text + " at [" +
       std::to_string(row) + ", " + std::to_string(column) + "]");
}

template <class T>
void read_values(File& file, const NpyHeader& header, std::vector<float>& values) {
  const auto rows = static_cast<std::size_t>(header.rows);
  const auto columns = static_cast<std::size_t>(header.columns);
  std::vector<T> part(std::min<std::size_t>(values.size(), 1 << 16));
  for (std::size_t done = 0; done < values.size(); done += part.size()) {
    part.resize(std::min(part.size(), values.size() - done));
    file.read(part.data(), part.size() * sizeof(T), "data");
    for (std::size_t i = 0; i < part.size(); ++i) {
      const std::size_t stored = done + i;
      const std::size_t row = header.fortran_order ? stored % rows : stored / columns;
      const std::size_t column = header.fortran_order ? stored / rows : stored % columns;
      if (!(std::abs(part[i]) <= static_cast<T>(std::numeric_limits<float>::max()))) {
        fail_not_finite(static_cast<double>(part[i]), row, column);
      }
      values[row * columns + column] = static_cast<float>(part[i]);
    }
  }
}

Matrix read_matrix(const std::string& path) {
  File file(path);
  const NpyHeader header = read_header(file);
  Matrix matrix{header.rows, header.columns, {}};
  matrix.values.resize(element_count(header, file));
  if (header.element_bytes == 4) {
    read_values<float>(file, header, matrix.values);
  } else {
    read_values<double>(file, header, matrix.values);
  }
  return matrix;
}

}  // namespace

Matrix read_npy(const std::string& option, const std::string& path) {
  try {
    return read_matrix(path);
  } catch (const std::invalid_argument& error) {
    throw Error(option + ": cannot read \"" + path + "\": " + error.what());
  }
}

}  // namespace sonicmoe::cli
