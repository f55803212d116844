// Strided views over memory the caller owns. A view never allocates, frees or copies elements.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <type_traits>

#include "sonicmoe/dtype.hpp"
#include "sonicmoe/export.hpp"

namespace sonicmoe {

inline constexpr int kMaxRank = 4;

/// A read-only strided tensor: pointer, dtype, shape and strides (in elements, not bytes).
/// A default-constructed view is *absent* (`defined() == false`): the way to leave out an optional
/// argument. A tensor with a zero extent may have a null pointer and is still defined.
class SONICMOE_API ConstTensorView {
 public:
  ConstTensorView() = default;

  /// Row-major contiguous. Throws Error when the rank is not 1..kMaxRank or an extent is negative.
  ConstTensorView(const void* data, DType dtype, std::initializer_list<std::int64_t> shape)
      : ConstTensorView(data, dtype, std::span(shape.begin(), shape.size())) {}
  ConstTensorView(const void* data, DType dtype, std::span<const std::int64_t> shape);

  /// With explicit strides in elements; `strides.size() == shape.size()`.
  ConstTensorView(const void* data, DType dtype, std::span<const std::int64_t> shape,
                  std::span<const std::int64_t> strides);

  bool defined() const noexcept { return rank_ > 0; }
  int rank() const noexcept { return rank_; }
  DType dtype() const noexcept { return dtype_; }
  std::int64_t size(int dim) const noexcept { return shape_[static_cast<std::size_t>(dim)]; }
  std::int64_t stride(int dim) const noexcept { return strides_[static_cast<std::size_t>(dim)]; }
  std::span<const std::int64_t> shape() const noexcept {
    return {shape_.data(), static_cast<std::size_t>(rank_)};
  }

  /// Product of the extents; 0 for an absent view.
  std::int64_t numel() const noexcept;
  /// numel() * size_of(dtype()).
  std::size_t nbytes() const noexcept;
  /// Row-major without gaps. Extents of 1 put no condition on their stride; a tensor without
  /// elements is contiguous.
  bool is_contiguous() const noexcept;
  /// "bfloat16[8, 256, 64]", for messages.
  std::string describe() const;

  const void* data() const noexcept { return data_; }
  /// The elements as T. The caller has checked the dtype.
  template <class T>
  const T* as() const noexcept {
    return static_cast<const T*>(data_);
  }

 protected:
  const void* data_ = nullptr;
  DType dtype_ = DType::kFloat32;
  int rank_ = 0;
  std::array<std::int64_t, kMaxRank> shape_{};
  std::array<std::int64_t, kMaxRank> strides_{};
};

/// A writable strided tensor. Converts to ConstTensorView.
class SONICMOE_API TensorView : public ConstTensorView {
 public:
  TensorView() = default;
  TensorView(void* data, DType dtype, std::initializer_list<std::int64_t> shape)
      : ConstTensorView(data, dtype, shape) {}
  TensorView(void* data, DType dtype, std::span<const std::int64_t> shape)
      : ConstTensorView(data, dtype, shape) {}
  TensorView(void* data, DType dtype, std::span<const std::int64_t> shape,
             std::span<const std::int64_t> strides)
      : ConstTensorView(data, dtype, shape, strides) {}

  void* data() const noexcept { return const_cast<void*>(data_); }
  template <class T>
  T* as() const noexcept {
    return static_cast<T*>(const_cast<void*>(data_));
  }
};

/// The same memory with dimensions `a` and `b` exchanged: how a transposed weight is handed over.
template <class View>
  requires std::is_base_of_v<ConstTensorView, View>
View transposed(const View& view, int a, int b) {
  std::array<std::int64_t, kMaxRank> shape{};
  std::array<std::int64_t, kMaxRank> strides{};
  for (int i = 0; i < view.rank(); ++i) {
    const int from = i == a ? b : i == b ? a : i;
    shape[static_cast<std::size_t>(i)] = view.size(from);
    strides[static_cast<std::size_t>(i)] = view.stride(from);
  }
  const auto rank = static_cast<std::size_t>(view.rank());
  return View(view.data(), view.dtype(), std::span<const std::int64_t>(shape.data(), rank),
              std::span<const std::int64_t>(strides.data(), rank));
}

}  // namespace sonicmoe
