// Wrong arguments: one tensor or option of a valid call at a time.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "rig/call.hpp"

namespace sonicmoe::rig {

struct Attack {
  enum class Kind : std::uint8_t {
    kOption,       ///< settings[index]
    kDevice,       ///< said to lie on device `detail`
    kAbsent,       ///< left out
    kDType,        ///< elements of DType `detail`, values kept where it can hold them
    kRank,         ///< `detail` dimensions more or less, elements kept
    kExtent,       ///< dimension `detail` has `amount` elements
    kHuge,         ///< the same with a stride of 0, so that no memory is needed
    kSwapped,      ///< last two dimensions exchanged
    kShifted,      ///< the first element `amount` bytes behind an aligned address
    kInnerStride,  ///< a gap behind every element
    kRowGaps,      ///< a gap behind every row
    kRepeated,     ///< stride 0 in dimension `detail`
    kOverlap,      ///< laid over the tensor `other`, one of the two being written
  };
  Kind kind;
  std::size_t index = 0;  ///< of the operand or setting
  int detail = 0;
  std::int64_t amount = 0;
  std::size_t other = 0;
};

/// Where the tensors of a call on this target do not lie; Attack::detail of kDevice counts them.
std::vector<Device> other_devices(const Target& target);
/// Every attack on every tensor and option of a call.
std::vector<Attack> attacks_on(const Call& call);
/// "x: dtype int32".
std::string describe(const Call& call, const Attack& attack);

}  // namespace sonicmoe::rig
