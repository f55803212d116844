#include "sonicmoe/error.hpp"

namespace sonicmoe {

Error::Error(const std::string& operation, const std::string& argument, const std::string& expected,
             const std::string& actual)
    : std::runtime_error(operation + ": " + argument + ": expected " + expected + ", got " +
                         actual),
      argument_(argument) {}

Error::Error(const std::string& message) : std::runtime_error(message) {}

}  // namespace sonicmoe
