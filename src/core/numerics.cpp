#include "sonicmoe/numerics.hpp"

namespace sonicmoe {

std::string to_string(const Numerics& numerics) {
  std::string text(name_of(numerics.storage));
  if (numerics.operand != numerics.storage) {
    text += " storage, " + std::string(name_of(numerics.operand)) + " operands";
  }
  switch (numerics.scaling) {
    case Scaling::kNone:
      return text;
  }
  return text + ", scaling " + std::to_string(static_cast<int>(numerics.scaling));
}

}  // namespace sonicmoe
