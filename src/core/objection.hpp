// What is wrong with an argument, said by who does not know the operation's name.
#pragma once

#include <string>

namespace sonicmoe {

struct Objection {
  std::string argument, expected, actual;
};

}  // namespace sonicmoe
