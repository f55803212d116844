// Tensors that own their memory, with guard bytes on both sides.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "cli/random.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe::cli {

/// A contiguous tensor (or its transposed view) in 64-byte aligned host memory. Elements start as
/// NaN (floats) or -1 (integers), so that a forgotten write is seen.
class Tensor {
 public:
  Tensor() = default;
  Tensor(DType dtype, std::vector<std::int64_t> shape);
  /// The shape as seen by the operation; the last two dimensions are stored exchanged.
  static Tensor stored_transposed(DType dtype, std::vector<std::int64_t> shape);

  bool defined() const noexcept { return view_.defined(); }
  const TensorView& view() const noexcept { return view_; }
  DType dtype() const noexcept { return view_.dtype(); }
  std::size_t count() const noexcept { return static_cast<std::size_t>(view_.numel()); }
  template <class T>
  T* as() const noexcept {
    return view_.as<T>();
  }

  /// Uniform values with mean 0 and standard deviation `deviation`.
  void fill_random(Random& random, double deviation = 1.0);
  void fill(float value);
  /// Element `i` in storage order, as float.
  float at(std::size_t i) const;
  void set(std::size_t i, float value);

  /// The same values, shape and strides in float32.
  Tensor to_float32() const;
  /// The guard bytes on both sides are as they were.
  bool guards_intact() const;

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };

  std::unique_ptr<std::byte[], Free> memory_;
  bool transposed_ = false;
  TensorView view_;
};

}  // namespace sonicmoe::cli
