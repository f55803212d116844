// Strided views over memory the caller owns. A view never allocates, frees or copies elements.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>
#include <type_traits>

#include "sonicmoe/device.hpp"
#include "sonicmoe/dtype.hpp"
#include "sonicmoe/export.hpp"

namespace sonicmoe {

/// Most dimensions of a view.
inline constexpr int kMaxRank = 4;

/// A read-only strided tensor: pointer, dtype, shape, strides (in elements, not bytes) and the
/// device that the memory belongs to.
/// A default-constructed view is *absent* (`defined() == false`): the way to leave out an optional
/// argument. A tensor with a zero extent may have a null pointer and is still defined.
class SONICMOE_API ConstTensorView {
 public:
  ConstTensorView() = default;

  /// Row-major contiguous. Throws Error when the rank is not 1..kMaxRank, an extent is negative,
  /// the pointer is null although there are elements, `dtype` is no enumerator, or the bytes from
  /// the first to the last element do not fit 2^63.
  ConstTensorView(const void* data, DType dtype, std::initializer_list<std::int64_t> shape,
                  Device device = {})
      : ConstTensorView(data, dtype, std::span(shape.begin(), shape.size()), device) {}
  ConstTensorView(const void* data, DType dtype, std::span<const std::int64_t> shape,
                  Device device = {});

  /// With explicit strides in elements, each >= 0; `strides.size() == shape.size()`. 0 repeats an
  /// element, which an operation's outputs must not do.
  ConstTensorView(const void* data, DType dtype, std::span<const std::int64_t> shape,
                  std::span<const std::int64_t> strides, Device device = {});

  bool defined() const noexcept { return rank_ > 0; }
  int rank() const noexcept { return rank_; }
  DType dtype() const noexcept { return dtype_; }
  /// Given by whoever made the view; every operation compares it with its context's.
  Device device() const noexcept { return device_; }
  std::int64_t size(int dim) const noexcept { return shape_[static_cast<std::size_t>(dim)]; }
  std::int64_t stride(int dim) const noexcept { return strides_[static_cast<std::size_t>(dim)]; }
  std::span<const std::int64_t> shape() const noexcept {
    return {shape_.data(), static_cast<std::size_t>(rank_)};
  }

  /// Product of the extents; 0 for an absent view.
  std::int64_t numel() const noexcept;
  /// numel() * size_of(dtype()).
  std::size_t nbytes() const noexcept;
  /// Bytes from the first element to behind the last, gaps included; 0 without elements.
  std::size_t span_bytes() const noexcept;
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
  Device device_;
  DType dtype_ = DType::kFloat32;
  int rank_ = 0;
  std::array<std::int64_t, kMaxRank> shape_{};
  std::array<std::int64_t, kMaxRank> strides_{};
};

/// A writable strided tensor. Converts to ConstTensorView.
class SONICMOE_API TensorView : public ConstTensorView {
 public:
  TensorView() = default;
  TensorView(void* data, DType dtype, std::initializer_list<std::int64_t> shape, Device device = {})
      : ConstTensorView(data, dtype, shape, device) {}
  TensorView(void* data, DType dtype, std::span<const std::int64_t> shape, Device device = {})
      : ConstTensorView(data, dtype, shape, device) {}
  TensorView(void* data, DType dtype, std::span<const std::int64_t> shape,
             std::span<const std::int64_t> strides, Device device = {})
      : ConstTensorView(data, dtype, shape, strides, device) {}

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
              std::span<const std::int64_t>(strides.data(), rank), view.device());
}

}  // namespace sonicmoe
