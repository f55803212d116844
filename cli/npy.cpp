#include "cli/npy.hpp"

#include <bit>
#include <cstring>
#include <fstream>
#include <iterator>
#include <regex>

#include "sonicmoe/error.hpp"

namespace sonicmoe::cli {
namespace {

static_assert(std::endian::native == std::endian::little,
              "values are read as they lie in the file");

struct Header {
  std::size_t element_bytes = 0;
  bool fortran_order = false;
  std::int64_t rows = 0;
  std::int64_t columns = 0;
};

[[noreturn]] void fail(const std::string& path, const std::string& reason) {
  throw Error("cannot read \"" + path + "\": " + reason);
}

std::string read_file(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path, std::strerror(errno));
  std::string content{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) fail(path, "read error");
  return content;
}

std::size_t little_endian(const std::string& bytes, std::size_t begin, std::size_t count) {
  std::size_t value = 0;
  for (std::size_t i = count; i-- > 0;) {
    value = value << 8 | static_cast<unsigned char>(bytes[begin + i]);
  }
  return value;
}

// The header is a Python dictionary literal: {'descr': '<f4', 'fortran_order': False,
// 'shape': (3, 4), }
Header parse_header(const std::string& path, const std::string& text) {
  std::smatch descr;
  std::smatch order;
  std::smatch shape;
  if (!std::regex_search(text, descr, std::regex("'descr':\\s*'([^']*)'")) ||
      !std::regex_search(text, order, std::regex("'fortran_order':\\s*(True|False)")) ||
      !std::regex_search(text, shape, std::regex("'shape':\\s*\\(([^)]*)\\)"))) {
    fail(path, "no .npy header");
  }
  Header header;
  if (descr[1] == "<f4") header.element_bytes = 4;
  if (descr[1] == "<f8") header.element_bytes = 8;
  if (header.element_bytes == 0) {
    fail(path, "expected float32 or float64 (<f4, <f8), got " + descr[1].str());
  }
  header.fortran_order = order[1] == "True";
  const std::string extents = shape[1];
  std::smatch size;
  if (!std::regex_match(extents, size,
                        std::regex("\\s*(\\d{1,12})\\s*,\\s*(\\d{1,12})\\s*,?\\s*"))) {
    fail(path, "expected two dimensions [tokens, experts], got (" + extents + ")");
  }
  header.rows = std::stoll(size[1]);
  header.columns = std::stoll(size[2]);
  return header;
}

template <class T>
void convert(const char* bytes, const Header& header, std::vector<float>& values) {
  const auto rows = static_cast<std::size_t>(header.rows);
  const auto columns = static_cast<std::size_t>(header.columns);
  for (std::size_t i = 0; i < rows * columns; ++i) {
    const std::size_t from = header.fortran_order ? i % columns * rows + i / columns : i;
    T value;
    std::memcpy(&value, bytes + from * sizeof(T), sizeof(T));
    values[i] = static_cast<float>(value);
  }
}

}  // namespace

Matrix read_npy(const std::string& path) {
  const std::string file = read_file(path);
  static constexpr char kMagic[] = "\x93NUMPY";
  if (file.size() < 12 || file.compare(0, 6, kMagic) != 0) fail(path, "no .npy file");
  const std::size_t length_bytes = file[6] == 1 ? 2 : 4;  // format version 1, then 2 and 3
  const std::size_t header_begin = 8 + length_bytes;
  const std::size_t header_size = little_endian(file, 8, length_bytes);
  if (header_size > file.size() - header_begin) fail(path, "truncated header");
  const Header header = parse_header(path, file.substr(header_begin, header_size));

  const std::size_t begin = header_begin + header_size;
  const std::size_t count = static_cast<std::size_t>(header.rows * header.columns);
  if (static_cast<double>(header.rows) * static_cast<double>(header.columns) > 1e12 ||
      file.size() - begin < count * header.element_bytes) {
    fail(path, "truncated data");
  }
  Matrix matrix{header.rows, header.columns, std::vector<float>(count)};
  if (header.element_bytes == 4) {
    convert<float>(file.data() + begin, header, matrix.values);
  } else {
    convert<double>(file.data() + begin, header, matrix.values);
  }
  return matrix;
}

}  // namespace sonicmoe::cli
