// The bytes under a strided view: whether elements of one view, or of two, share any.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>

#include "sonicmoe/tensor.hpp"

namespace sonicmoe {

/// Pieces of consecutive bytes, repeated at strides. Dimensions of one element and of stride 0 add
/// no bytes and are left out.
class Layout {
 public:
  explicit Layout(const ConstTensorView& view);

  /// No two elements share a byte. Each dimension has to step over all that lies within it: layouts
  /// that interleave otherwise, as 3 x 2 elements at strides (2, 3) do, count as shared.
  bool distinct() const { return !repeats_ && nested(); }

  /// Whether two layouts share a byte when `b` begins `offset` bytes behind `a`. Exact where both
  /// are nested and of two strides that meet one divides the other, as in blocks of rows or columns
  /// of one tensor; otherwise true as soon as their ranges of addresses meet.
  friend bool share_bytes(const Layout& a, const Layout& b, std::int64_t offset);

 private:
  struct Dimension {
    std::int64_t size, stride;  // stride in bytes
  };
  static constexpr std::size_t kMostDimensions = 2 * kMaxRank;

  bool nested() const;
  std::int64_t reach() const;    // bytes from the first to behind the last
  std::int64_t step() const;     // of the outermost dimension; 0 for a single piece
  Layout inner() const;          // one slice of the outermost dimension
  Layout with(Dimension) const;  // repeated as another, outermost dimension
  static bool meet(const Layout& a, const Layout& b, std::int64_t offset);
  static bool meet_at_one_step(const Layout& a, const Layout& b, std::int64_t offset);
  static bool meet_regrouped(const Layout& a, const Layout& b, std::int64_t offset);

  std::int64_t piece_;                                   // bytes
  std::array<Dimension, kMostDimensions> dimensions_{};  // by ascending stride
  std::size_t rank_ = 0;
  bool repeats_ = false;  // a stride of 0 over several elements
};

}  // namespace sonicmoe
