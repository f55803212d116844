// SONICMOE_CLONES compiles a function for AVX-512, AVX2 with FMA and the baseline and picks one
// when the library is loaded, by what the CPU can do (x86-64 levels: "arch=haswell" would ask for
// that very CPU and leave every AMD with the baseline). Sanitizers cannot run the loader's
// resolver, so their builds take one version.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SONICMOE_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define SONICMOE_CLONES
#endif
