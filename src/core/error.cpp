#include "sonicmoe/error.hpp"

namespace sonicmoe {
namespace {

// ": argument: ..." of a message.
std::string after_operation(const std::string& message) {
  const std::size_t colon = message.find(": ");
  return colon == std::string::npos ? ": " + message : message.substr(colon);
}

}  // namespace

Error::Error(const std::string& operation, const std::string& argument, const std::string& expected,
             const std::string& actual)
    : std::runtime_error(operation + ": " + argument + ": expected " + expected + ", got " +
                         actual),
      argument_(argument) {}

Error::Error(const std::string& operation, const Error& part)
    : std::runtime_error(operation + after_operation(part.what())), argument_(part.argument_) {}

Error::Error(const std::string& message) : std::runtime_error(message) {}

OutOfMemory::OutOfMemory(const std::string& operation) : Error(operation + ": out of memory") {}

}  // namespace sonicmoe
