#include "sonicmoe/version.hpp"

#define SONICMOE_STRING(x) #x
#define SONICMOE_VERSION_STRING(a, b, c) \
  SONICMOE_STRING(a) "." SONICMOE_STRING(b) "." SONICMOE_STRING(c)

namespace sonicmoe {

std::string_view version() noexcept {
  return SONICMOE_VERSION_STRING(SONICMOE_VERSION_MAJOR, SONICMOE_VERSION_MINOR,
                                 SONICMOE_VERSION_PATCH);
}

}  // namespace sonicmoe
