// Argument checks of one operation, with messages that give expected and actual values.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>

#include "core/objection.hpp"
#include "sonicmoe/context.hpp"
#include "sonicmoe/error.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe {

class Check {
 public:
  /// Every view that is checked has to lie on `device`.
  Check(std::string_view operation, const Device& device)
      : operation_(operation), device_(device) {}
  /// Also checks what of a context can be wrong by itself.
  Check(std::string_view operation, const Context& context);

  [[noreturn]] void fail(const char* argument, const std::string& expected,
                         const std::string& actual) const {
    throw Error(operation_, argument, expected, actual);
  }
  void that(bool condition, const char* argument, const std::string& expected,
            const std::string& actual) const {
    if (!condition) fail(argument, expected, actual);
  }

  void refuse(const std::optional<Objection>& objection) const {
    if (objection)
      throw Error(operation_, objection->argument, objection->expected, objection->actual);
  }

  /// Present, and on the operation's device.
  void defined(const char* argument, const ConstTensorView& view) const;
  void device(const char* argument, const ConstTensorView& view) const;
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

  /// least <= value <= most.
  void between(const char* argument, std::int64_t value, std::int64_t least,
               std::int64_t most) const;
  /// The product of sizes that were found >= 0, or an error where it passes 2^59: bytes and sums of
  /// several such products then fit 2^63.
  std::int64_t product(const char* argument, std::initializer_list<std::int64_t> factors) const;
  void finite(const char* argument, double value) const {
    that(std::isfinite(value), argument, "a finite number", std::to_string(value));
  }
  /// An enumerator that has a name.
  template <class Enum>
  void enumerator(const char* argument, Enum value) const {
    that(name_of(value) != "?", argument, "an enumerator",
         std::to_string(static_cast<std::int64_t>(value)));
  }

  const std::string& operation() const noexcept { return operation_; }
  const Device& device() const noexcept { return device_; }

 private:
  std::string operation_;
  Device device_;
};

/// What an operation does with a tensor. Scratch counts as written.
enum class Access : std::uint8_t { kRead, kWrite };

/// The tensors of one call taken together: each on the operation's device and aligned to its
/// element; what is written has distinct elements and shares none with any other tensor.
class CallMemory {
 public:
  explicit CallMemory(const Check& check) : check_(check) {}
  /// Absent views and views without elements are passed over. `argument` is a literal.
  void add(const char* argument, const ConstTensorView& view, Access access);
  void check_overlaps() const;

 private:
  struct Tensor {
    const char* argument;
    const ConstTensorView* view;
    std::uintptr_t first, end;  // bytes
    bool written;
  };
  static constexpr std::size_t kMostTensors = 40;

  const Check& check_;
  std::array<Tensor, kMostTensors> tensors_;
  std::size_t count_ = 0;
};

}  // namespace sonicmoe
