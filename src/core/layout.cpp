#include "core/layout.hpp"

#include <algorithm>

namespace sonicmoe {
namespace {

std::int64_t floor_div(std::int64_t a, std::int64_t b) { return a / b - (a % b < 0 ? 1 : 0); }

}  // namespace

Layout::Layout(const ConstTensorView& view)
    : piece_(static_cast<std::int64_t>(size_of(view.dtype()))) {
  const std::int64_t width = piece_;
  for (int i = 0; i < view.rank(); ++i) {
    if (view.size(i) <= 1) continue;
    if (view.stride(i) == 0) {
      repeats_ = true;
      continue;
    }
    dimensions_[rank_++] = {view.size(i), view.stride(i) * width};
  }
  const auto begin = dimensions_.begin(), end = begin + static_cast<std::ptrdiff_t>(rank_);
  std::sort(begin, end, [](Dimension a, Dimension b) { return a.stride < b.stride; });
  std::size_t whole = 0;  // dimensions without gaps make one piece
  while (whole < rank_ && dimensions_[whole].stride == piece_) piece_ *= dimensions_[whole++].size;
  std::rotate(begin, begin + static_cast<std::ptrdiff_t>(whole), end);
  rank_ -= whole;
}

bool Layout::nested() const {
  std::int64_t reach = piece_;
  for (std::size_t i = 0; i < rank_; ++i) {
    if (dimensions_[i].stride < reach) return false;
    reach += (dimensions_[i].size - 1) * dimensions_[i].stride;
  }
  return true;
}

std::int64_t Layout::reach() const {
  std::int64_t reach = piece_;
  for (std::size_t i = 0; i < rank_; ++i)
    reach += (dimensions_[i].size - 1) * dimensions_[i].stride;
  return reach;
}

std::int64_t Layout::step() const { return rank_ == 0 ? 0 : dimensions_[rank_ - 1].stride; }

Layout Layout::inner() const {
  Layout slice = *this;
  --slice.rank_;
  return slice;
}

Layout Layout::with(Dimension outermost) const {
  Layout layout = *this;
  if (outermost.size > 1) layout.dimensions_[layout.rank_++] = outermost;
  return layout;
}

// Two layouts whose outermost dimensions have one stride: only the distance of two slices matters.
bool Layout::meet_at_one_step(const Layout& a, const Layout& b, std::int64_t offset) {
  const Layout one = a.inner(), other = b.inner();
  const std::int64_t step = a.step();
  const std::int64_t first =
      std::max(1 - a.dimensions_[a.rank_ - 1].size, floor_div(-other.reach() - offset, step) + 1);
  const std::int64_t last =
      std::min(b.dimensions_[b.rank_ - 1].size - 1, floor_div(one.reach() - 1 - offset, step));
  for (std::int64_t k = first; k <= last; ++k) {  // at most two: no slice is longer than a step
    if (meet(one, other, offset + k * step)) return true;
  }
  return false;
}

// `b` steps along many slices of `a`: its outermost dimension is taken in groups of one slice.
bool Layout::meet_regrouped(const Layout& a, const Layout& b, std::int64_t offset) {
  const auto [size, stride] = b.dimensions_[b.rank_ - 1];
  if (a.step() % stride != 0 || b.rank_ == kMostDimensions) return true;
  const std::int64_t group = a.step() / stride, groups = size / group, rest = size % group;
  const Layout slice = b.inner();
  if (meet(a, slice.with({group, stride}).with({groups, a.step()}), offset)) return true;
  return rest > 0 && meet(a, slice.with({rest, stride}), offset + groups * a.step());
}

bool Layout::meet(const Layout& a, const Layout& b, std::int64_t offset) {
  if (offset >= a.reach() || -offset >= b.reach()) return false;
  if (a.rank_ == 0 && b.rank_ == 0) return true;
  if (a.step() < b.step()) return meet(b, a, -offset);
  if (a.step() == b.step()) return meet_at_one_step(a, b, offset);
  const Layout slice = a.inner();
  const std::int64_t first =
      std::max<std::int64_t>(0, floor_div(offset - slice.reach(), a.step()) + 1);
  const std::int64_t last =
      std::min(a.dimensions_[a.rank_ - 1].size - 1, floor_div(offset + b.reach() - 1, a.step()));
  if (last - first > 1 && b.rank_ > 0) return meet_regrouped(a, b, offset);
  // One piece over more than two steps covers a whole slice.
  if (last - first > 1) return true;
  for (std::int64_t i = first; i <= last; ++i) {
    if (meet(slice, b, offset - i * a.step())) return true;
  }
  return false;
}

bool share_bytes(const Layout& a, const Layout& b, std::int64_t offset) {
  constexpr std::int64_t kMost = std::int64_t{1} << 60;  // sums of a few then fit
  if (offset >= a.reach() || -offset >= b.reach()) return false;
  if (!a.nested() || !b.nested() || a.reach() > kMost || b.reach() > kMost) return true;
  return Layout::meet(a, b, offset);
}

}  // namespace sonicmoe
