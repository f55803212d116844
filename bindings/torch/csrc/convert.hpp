// Between torch tensors and the library's views, over memory that torch owns.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <span>

#include "sonicmoe/sonicmoe.hpp"

#ifndef STABLE_TORCH_ERROR_CODE_CHECK  // before torch 2.13
#define STABLE_TORCH_ERROR_CODE_CHECK TORCH_ERROR_CODE_CHECK
#endif

namespace sonicmoe_torch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// Makes views of the tensors of one operation, and asks the library for its sizes; all errors
/// carry the operation's name.
class Views {
 public:
  explicit Views(const char* operation) : operation_(operation) {}
  const char* operation() const noexcept { return operation_; }

  /// Strides pass through: nothing is copied. Throws sonicmoe::Error for an element type that the
  /// library has no name for (float16, float64, ...).
  sonicmoe::ConstTensorView in(const char* argument, const Tensor& tensor) const;
  /// None is an absent view.
  sonicmoe::ConstTensorView in(const char* argument, const OptionalTensor& tensor) const;
  /// [..., d] as [rows, d]. Throws where the leading dimensions are not one in memory.
  sonicmoe::ConstTensorView rows(const char* argument, const Tensor& tensor) const;
  sonicmoe::ConstTensorView rows(const char* argument, const OptionalTensor& tensor) const;
  sonicmoe::TensorView out(const char* argument, const Tensor& tensor) const;
  sonicmoe::TensorView out_rows(const char* argument, const Tensor& tensor) const;

  /// What `question` returns: a shape, or a plan.
  template <class Question>
  auto ask(Question question) const {
    try {
      return question();
    } catch (const sonicmoe::Error& error) {
      throw sonicmoe::Error(operation_, error);
    }
  }

 private:
  const char* operation_;
};

/// Device, current stream and thread count of a call, taken from torch at the time of the call, so
/// that no stream ever crosses the operator boundary.
class Call {
 public:
  explicit Call(const Tensor& tensor);
  const sonicmoe::Context& context() const noexcept { return context_; }

 private:
  sonicmoe::Context context_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

/// Context::shared_device of every call of this process from now on (_shared_device.py).
void set_shared_device(bool shared);
bool is_shared_device();

/// Uninitialised, on the device of `like`, from torch's allocator. These throw std::runtime_error,
/// "[CUDA ]out of memory. ...", where that has no room.
Tensor new_tensor(const Tensor& like, std::span<const std::int64_t> shape, ScalarType dtype);
Tensor new_tensor(const Tensor& like, std::initializer_list<std::int64_t> shape, ScalarType dtype);
/// Contiguous, of the shape of `like`.
Tensor new_like_contiguous(const Tensor& like, ScalarType dtype);
/// Contiguous, of the shape of `like` but for the last dimension.
Tensor new_rows(const Tensor& like, std::int64_t columns, ScalarType dtype);
/// Of the shape, strides and type of `like`.
Tensor new_like(const Tensor& like);
/// A buffer for sizes the library states in bytes (workspace, metadata).
Tensor new_bytes(const Tensor& like, std::size_t bytes);
/// The workspace of one call. Memory fresh from the system costs a page fault every 4 KB, a fifth
/// of a call on two CPU cores, so a CPU thread keeps its last workspace for the next call, of
/// whichever layer, up to kMostKept bytes. A call under a limit gets its own and drops the kept
/// one.
Tensor new_workspace(const Tensor& like, std::size_t bytes, bool limited);
inline constexpr std::size_t kMostKept = std::size_t{256} << 20;
/// What an operator returns for a result that was not asked for.
Tensor nothing(const Tensor& like);

}  // namespace sonicmoe_torch
