// A block of hidden units: the columns of H that hold gate and up of units [first, first + units).
#pragma once

#include "cpu/panels.hpp"
#include "sonicmoe/moe.hpp"

namespace sonicmoe::cpu {

/// Where the g*n columns of H (and rows of W1) keep gate and up.
class HiddenLayout {
 public:
  HiddenLayout(const MoEShape& shape, GateUpLayout layout)
      : units_(shape.intermediate_size),
        gated_(is_gated(shape.activation)),
        interleaved_(gated_ && layout == GateUpLayout::kInterleaved) {}

  bool gated() const { return gated_; }
  bool interleaved() const { return interleaved_; }
  std::int64_t columns() const { return gated_ ? 2 * units_ : units_; }

  /// Calls visit(column of H, column of the panel, count) for each run of consecutive columns that
  /// belongs to units [first, first + units). A panel has gate in its first `units` columns and up
  /// in the next, or both interleaved.
  template <class Visit>
  void for_runs(std::int64_t first, std::int64_t units, Visit visit) const {
    if (interleaved_) {
      visit(2 * first, std::int64_t{0}, 2 * units);
      return;
    }
    visit(first, std::int64_t{0}, units);
    if (gated_) visit(units_ + first, units, units);
  }

 private:
  std::int64_t units_;
  bool gated_;
  bool interleaved_;
};

/// gate and up of one panel row as separate arrays; `temp` holds 2 * units floats.
struct GateUp {
  float* gate;
  float* up;  // null when ungated
};

inline GateUp split(const HiddenLayout& layout, float* row, std::int64_t units, float* temp) {
  if (!layout.gated()) return {row, nullptr};
  if (!layout.interleaved()) return {row, row + units};
  deinterleave(row, temp, temp + units, units);
  return {temp, temp + units};
}

}  // namespace sonicmoe::cpu
