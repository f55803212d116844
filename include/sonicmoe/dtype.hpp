// Element types of tensors and the storage type bfloat16.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace sonicmoe {

/// Element types of tensors. Which of them an argument may have is said at the argument.
enum class DType : std::uint8_t {
  kFloat32,
  kBFloat16,
  kInt32,
  kInt64,
  kUInt8,
  // No argument of any operation takes these. They exist so that a view of such memory can be made
  // and the error can name what was given.
  kFloat16,
  kFloat64,
  kInt8,
  kInt16,
  kBool,
};

/// Bytes of one element; 0 for a value that is no enumerator.
constexpr std::size_t size_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
    case DType::kInt16:
      return 2;
    case DType::kInt64:
    case DType::kFloat64:
      return 8;
    case DType::kUInt8:
    case DType::kInt8:
    case DType::kBool:
      return 1;
  }
  return 0;
}

/// "float32", "bfloat16", ...; "?" for a value that is no enumerator.
constexpr std::string_view name_of(DType dtype) noexcept {
  switch (dtype) {
    case DType::kFloat32:
      return "float32";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kInt32:
      return "int32";
    case DType::kInt64:
      return "int64";
    case DType::kUInt8:
      return "uint8";
    case DType::kFloat16:
      return "float16";
    case DType::kFloat64:
      return "float64";
    case DType::kInt8:
      return "int8";
    case DType::kInt16:
      return "int16";
    case DType::kBool:
      return "bool";
  }
  return "?";
}

/// The upper half of an IEEE float32. Conversion from float rounds to nearest, ties to even; a NaN
/// stays a (quiet) NaN. Conversion to float is exact.
struct bfloat16 {
  std::uint16_t bits = 0;

  bfloat16() = default;
  explicit constexpr bfloat16(float value) noexcept : bits(round(value)) {}
  constexpr operator float() const noexcept {  // NOLINT(google-explicit-constructor): exact
    return std::bit_cast<float>(std::uint32_t{bits} << 16);
  }

 private:
  static constexpr std::uint16_t round(float value) noexcept {
    const auto u = std::bit_cast<std::uint32_t>(value);
    if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<std::uint16_t>((u >> 16) | 0x40u);
    return static_cast<std::uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
};
static_assert(sizeof(bfloat16) == 2);

/// The DType of a C++ type; a type that no argument takes does not compile.
template <class T>
inline constexpr DType dtype_of = [] {
  static_assert(sizeof(T) == 0, "not a tensor element type");
  return DType::kUInt8;
}();
template <>
inline constexpr DType dtype_of<float> = DType::kFloat32;
template <>
inline constexpr DType dtype_of<bfloat16> = DType::kBFloat16;
template <>
inline constexpr DType dtype_of<std::int32_t> = DType::kInt32;
template <>
inline constexpr DType dtype_of<std::int64_t> = DType::kInt64;
template <>
inline constexpr DType dtype_of<std::uint8_t> = DType::kUInt8;

}  // namespace sonicmoe
