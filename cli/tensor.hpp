// Tensors that own their memory on a device, with guard bytes on both sides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cli/device_buffer.hpp"
#include "cli/random.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe::cli {

/// A contiguous tensor (or its transposed view) in 64-byte aligned memory. Elements start as NaN
/// (floats) or -1 (integers), so that a forgotten write is seen. Copies share the memory.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::vector<std::int64_t> shape, Device device = {});
  /// The shape as seen by the operation; the last two dimensions are stored exchanged.
  static Tensor stored_transposed(DType dtype, std::vector<std::int64_t> shape, Device device = {});

  bool defined() const noexcept { return view_.defined(); }
  const TensorView& view() const noexcept { return view_; }
  DType dtype() const noexcept { return view_.dtype(); }
  std::size_t count() const noexcept { return static_cast<std::size_t>(view_.numel()); }
  Device device() const noexcept { return buffer_ ? buffer_->device() : Device{}; }

  /// This tensor where it lies on the device already (or is absent), else a copy, guards included.
  Tensor to(Device device) const;
  Tensor to_host() const { return to(Device{}); }
  /// A host copy of element `i` of the first dimension: a row of a matrix, a matrix of a cube.
  /// Contiguous tensors only.
  Tensor block(std::int64_t i) const;
  /// The values of a tensor of the same count and order of storage. Of another dtype only on the
  /// host.
  void copy_from(const Tensor& from);

  /// Uniform values with mean 0 and standard deviation `deviation`. Beyond 2^24 elements they
  /// repeat, with a prime period: no two rows or experts start at the same place of it.
  void fill_random(Random& random, double deviation = 1.0);

  // ------------------------------------------------------------------------ tensors on the host

  template <class T>
  T* as() const noexcept {
    return view_.as<T>();
  }
  void fill(float value);
  /// Element `i` in storage order, as float.
  float at(std::size_t i) const;
  void set(std::size_t i, float value);
  /// The same values, shape and strides in float32.
  Tensor to_float32() const;

  /// The guard bytes on both sides are as they were. On any device.
  bool guards_intact() const;

 private:
  std::vector<std::int64_t> shape() const { return {view_.shape().begin(), view_.shape().end()}; }

  std::shared_ptr<DeviceBuffer> buffer_;
  bool transposed_ = false;
  TensorView view_;
};

}  // namespace sonicmoe::cli
