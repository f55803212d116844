// Argument checks of one operation, with messages that give expected and actual values.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>

#include "sonicmoe/error.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe {

class Check {
 public:
  explicit Check(std::string_view operation) : operation_(operation) {}

  [[noreturn]] void fail(const char* argument, const std::string& expected,
                         const std::string& actual) const {
    throw Error(operation_, argument, expected, actual);
  }
  void that(bool condition, const char* argument, const std::string& expected,
            const std::string& actual) const {
    if (!condition) fail(argument, expected, actual);
  }

  void defined(const char* argument, const ConstTensorView& view) const;
  void rank(const char* argument, const ConstTensorView& view, int rank) const;
  void shape(const char* argument, const ConstTensorView& view,
             std::initializer_list<std::int64_t> shape) const;
  void shape_like(const char* argument, const ConstTensorView& view,
                  const ConstTensorView& other) const;
  void dtype(const char* argument, const ConstTensorView& view,
             std::initializer_list<DType> allowed) const;
  void contiguous(const char* argument, const ConstTensorView& view) const;
  void unit_stride(const char* argument, const ConstTensorView& view, int dim) const;
  /// One of the last two strides is 1 (an extent of 1 counts as such).
  void unit_stride_in_a_matrix_dim(const char* argument, const ConstTensorView& view) const;
  /// A uint8 buffer of at least `bytes`, aligned to `alignment`.
  void buffer(const char* argument, const ConstTensorView& view, std::size_t bytes,
              std::size_t alignment) const;

  const std::string& operation() const noexcept { return operation_; }

 private:
  std::string operation_;
};

}  // namespace sonicmoe
