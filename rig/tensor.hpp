// Tensors of a test: strided views over guarded, poisoned device memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "oracle/values.hpp"
#include "rig/random.hpp"
#include "rig/target.hpp"
#include "sonicmoe/tensor.hpp"

namespace sonicmoe::rig {

using oracle::Ids;
using oracle::Values;

/// Device memory of exactly `bytes` bytes, 64-byte aligned, between two guards. Payload and guards
/// start out as poison, a pattern that reads as NaN in float32 and bfloat16 and as a negative
/// integer: reading what was not written, or past the ends, spoils results; writing past the ends
/// is found by guards_intact().
class GuardedBuffer {
 public:
  static constexpr std::size_t kGuardBytes = 256;

  GuardedBuffer() = default;
  GuardedBuffer(const Target& target, std::size_t bytes);
  ~GuardedBuffer();
  GuardedBuffer(GuardedBuffer&& other) noexcept;
  GuardedBuffer& operator=(GuardedBuffer&& other) noexcept;

  void* data() const { return base_ == nullptr ? nullptr : base_ + kGuardBytes; }
  std::size_t size() const { return bytes_; }
  /// To the front of it.
  void upload(std::span<const std::byte> payload);
  std::vector<std::byte> download() const;
  void read(void* to, std::size_t first, std::size_t bytes) const;
  bool holds(const std::vector<std::byte>& payload) const;
  /// Repeats the first `period` bytes up to the end.
  void repeat(std::size_t period);
  bool guards_intact() const;
  /// As a uint8 tensor: a workspace or metadata.
  TensorView view() const;

 private:
  void forbid_guards() const;
  void permit_guards() const;

  DeviceMemory* memory_ = nullptr;
  Device device_;
  std::byte* base_ = nullptr;
  std::size_t bytes_ = 0;
};

/// `bytes` bytes of the poison pattern.
std::vector<std::byte> poison(std::size_t bytes);
/// Whether an element of the values of a tensor of `dtype` is poison.
bool is_poison(double value, DType dtype);

/// How the elements of a tensor lie in memory.
enum class Strides : std::uint8_t {
  kContiguous,
  kPadded,            ///< rows and matrices with gaps, base not aligned beyond the element
  kTransposed,        ///< last two dimensions exchanged in memory
  kTransposedPadded,  ///< both
};
const char* name_of(Strides strides);

/// A strided tensor on a target. Gaps between the elements are poison too.
class Tensor {
 public:
  Tensor() = default;  ///< absent
  Tensor(const Target& target, DType dtype, std::vector<std::int64_t> shape,
         Strides strides = Strides::kContiguous);
  /// With any strides >= 0, the first element `start` bytes behind an address aligned to 64.
  Tensor(const Target& target, DType dtype, std::vector<std::int64_t> shape,
         std::vector<std::int64_t> strides, std::size_t start = 0);

  bool defined() const { return view_.defined(); }
  const TensorView& view() const { return view_; }
  std::int64_t numel() const { return view_.numel(); }
  DType dtype() const { return view_.dtype(); }

  /// Row-major values, rounded to the dtype.
  void fill(const Values& values);
  /// Of int32, int64 or uint8.
  void fill_ids(const Ids& ids);
  void fill_constant(double value);
  /// Uniform values with mean 0 and the given standard deviation, made on the host and repeated on
  /// the device beyond 2^24 elements, with a prime period: no two rows or experts start at the same
  /// place of it. For contiguous tensors of any size; no copy is kept, so violation_as_input() sees
  /// the guards alone.
  void fill_random(Random& random, double deviation);
  /// The elements of a contiguous float32 tensor of any size; no copy is kept.
  void fill_floats(const std::vector<float>& values);
  /// Puts back what the host wrote last, or takes what is there now for that.
  void restore() { buffer_.upload(image()); }
  void remember() { image_ = buffer_.download(); }

  /// Row-major elements as they are now.
  Values values() const;
  /// Those of element `i` of the first dimension of a contiguous tensor, the only ones that are
  /// copied.
  Values block(std::int64_t i) const;
  /// The elements of a contiguous tensor of T as they lie in memory.
  template <class T>
  std::vector<T> elements() const {
    std::vector<T> result(static_cast<std::size_t>(numel()));
    buffer_.read(result.data(), start_, result.size() * sizeof(T));
    return result;
  }
  /// A copy with the same layout.
  Tensor to(const Target& target) const;

  /// What was touched that must not be: guards, gaps or (for inputs) elements. Empty when nothing.
  std::string violation_as_output() const;
  std::string violation_as_input() const;

 private:
  std::size_t byte_offset(std::int64_t index) const;
  template <class Write>
  void rewrite(Write write);
  const std::vector<std::byte>& image();
  Values values_of(const std::vector<std::byte>& payload, std::size_t start,
                   std::span<const std::int64_t> shape, int first_dim) const;

  TensorView view_;
  GuardedBuffer buffer_;
  std::size_t start_ = 0;         // bytes from the buffer's start to the first element
  std::vector<std::byte> image_;  // the payload as last written by the host; empty: poison
  bool forgets_ = false;          // fill_random() wrote it
};

}  // namespace sonicmoe::rig
