// Carving one caller-owned buffer into aligned pieces. The same function computes the size (null
// base) and the pieces (real base), so the two cannot disagree.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sonicmoe {

class WorkspaceCarver {
 public:
  static constexpr std::size_t kAlignment = 64;

  explicit WorkspaceCarver(void* base = nullptr) : base_(static_cast<std::byte*>(base)) {}

  /// The next `count` elements of T, 64-byte aligned; null while only counting.
  template <class T>
  T* take(std::size_t count) {
    return static_cast<T*>(take_bytes(count * sizeof(T)));
  }

  void* take_bytes(std::size_t bytes) {
    std::byte* piece = base_ == nullptr ? nullptr : base_ + used_;
    used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
    return piece;
  }

  /// Bytes taken so far: the size to ask of the caller.
  std::size_t used() const noexcept { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

}  // namespace sonicmoe
