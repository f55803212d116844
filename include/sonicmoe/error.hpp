// What the library throws.
#pragma once

#include <stdexcept>
#include <string>

#include "sonicmoe/export.hpp"

namespace sonicmoe {

/// Thrown by every public function on invalid input. `what()` is one line that names the operation,
/// the argument, what was expected and what was given, e.g.
///   moe_forward: w1: expected shape [8, 256, 64], got [8, 256, 60]
/// The library never calls exit() and prints nothing unless SONICMOE_LOG is set.
class SONICMOE_API Error : public std::runtime_error {
 public:
  /// A failure of one argument of one operation.
  Error(const std::string& operation, const std::string& argument, const std::string& expected,
        const std::string& actual);
  /// A failure of a part of an operation, in the name of the whole.
  Error(const std::string& operation, const Error& part);
  /// A failure that belongs to no single argument.
  explicit Error(const std::string& message);

  /// Name of the offending argument; empty when the error belongs to none.
  const std::string& argument() const noexcept { return argument_; }

 private:
  std::string argument_;
};

/// Memory that an operation could not have: the call may succeed later or with smaller sizes.
/// `what()` is "operation: out of memory".
class SONICMOE_API OutOfMemory : public Error {
 public:
  explicit OutOfMemory(const std::string& operation);
};

}  // namespace sonicmoe
