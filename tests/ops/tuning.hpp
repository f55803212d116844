// Forcing what the CUDA backend would choose. Other backends do not read it.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "cuda/hopper/choice.hpp"

namespace sonicmoe::rig {

using cuda::hopper::StoreRoles;
using cuda::hopper::Tuning;

inline std::string describe(const Tuning& t) {
  std::string text = "block_n " + std::to_string(t.block_n);
  if (t.stores) text += ", stores " + std::to_string(static_cast<int>(*t.stores));
  if (t.sort_rows) text += *t.sort_rows ? ", sorted rows" : ", gathered rows";
  if (t.start_together) text += *t.start_together ? ", together" : ", not together";
  return text + ", grid " + std::to_string(t.grid) + ", row_block " + std::to_string(t.row_block) +
         ", add_window " + std::to_string(t.add_window) + " (0: chosen)";
}

/// Forces `wanted` for one scope and names it in failures.
class Forced {
 public:
  explicit Forced(const Tuning& wanted)
      : before_(cuda::hopper::tuning), trace_(__FILE__, __LINE__, "forced: " + describe(wanted)) {
    cuda::hopper::tuning = wanted;
  }
  ~Forced() { cuda::hopper::tuning = before_; }
  Forced(const Forced&) = delete;
  Forced& operator=(const Forced&) = delete;

 private:
  Tuning before_;
  ::testing::ScopedTrace trace_;
};

}  // namespace sonicmoe::rig
