// SONICMOE_API marks the public symbols; everything else is hidden (-fvisibility=hidden).
#pragma once

#if defined(_WIN32)
#define SONICMOE_API
#else
#define SONICMOE_API __attribute__((visibility("default")))
#endif
