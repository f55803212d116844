// SONICMOE_CLONES compiles a function for AVX-512, AVX2 and the baseline and picks one when the
// library is loaded. Sanitizers cannot run the loader's resolver, so their builds take one version.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define SONICMOE_CLONES \
  __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#else
#define SONICMOE_CLONES
#endif
