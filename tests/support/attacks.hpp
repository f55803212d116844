// Wrong arguments: one tensor or option of a valid call at a time, and what has to come of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "support/call.hpp"

namespace sonicmoe::testing {

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

/// Every attack on every tensor and option of a call.
std::vector<Attack> attacks_on(const Call& call);
/// "x: dtype int32".
std::string describe(const Call& call, const Attack& attack);

/// Runs attacks on one call.
class Trial {
 public:
  /// Runs the valid call. Its results are what attacks that keep the values have to give.
  explicit Trial(Call call);

  /// What is wrong with the valid call: refused, all zeros, NaN, memory that it must not touch.
  const std::string& problem() const { return problem_; }
  const Call& call() const { return call_; }

  /// What is wrong with the outcome of an attack, or empty. It has to be refused with an Error that
  /// names the argument, nothing having changed, and the valid call has to work afterwards; or,
  /// where the operation may take it, the results have to be right.
  std::string attempt(const Attack& attack);

 private:
  struct Forgery;
  Forgery forge(const Attack& attack) const;
  Forgery forge_memory(const Attack& attack) const;
  Elements expected_results(const Forgery& forgery);
  std::string check_refusal(const Forgery& forgery, const Outcome& outcome);
  std::string check_results(const Forgery& forgery, const Elements& expected);
  std::string check_valid_call();

  Call call_;
  Elements results_;  // of the valid call
  std::string problem_;
};

}  // namespace sonicmoe::testing
