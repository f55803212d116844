// cuBLAS's strided batched product, loaded at run time so that it can be timed in turn with ours:
// the library that SONICMOE_CUBLAS names, else the loader's. Absent library: available() is false.
#pragma once

#include <dlfcn.h>

#include "harness.cuh"

namespace experiment {

// D [M, N] = A [M, K] B [N, K]^T for each of E groups. Operands may lie transposed.
struct BatchedProduct {
  std::string name;
  int E, M, N, K;
  bool a_transposed = false;  // A lies as [K, M]
  bool b_transposed = false;  // B lies as [K, N]
  double flops() const { return 2.0 * E * M * N * K; }
};

class Cublas {
 public:
  Cublas() {
    const char* path = std::getenv("SONICMOE_CUBLAS");
    void* library = nullptr;
    for (const char* name : {path, "libcublas.so.13", "libcublas.so.12"}) {
      if (library == nullptr && name != nullptr) library = dlopen(name, RTLD_NOW | RTLD_GLOBAL);
    }
    if (library == nullptr) {
      std::printf("no cuBLAS: %s\n", dlerror());
      return;
    }
    auto create = reinterpret_cast<int (*)(void**)>(dlsym(library, "cublasCreate_v2"));
    gemm_ = reinterpret_cast<Gemm>(dlsym(library, "cublasGemmStridedBatchedEx"));
    if (create == nullptr || gemm_ == nullptr || create(&handle_) != 0) gemm_ = nullptr;
  }
  bool available() const { return gemm_ != nullptr; }

  void multiply(const BatchedProduct& p, const bf16* a, const bf16* b, bf16* d) const {
    const float one = 1, zero = 0;
    // Row-major D is the column-major N x M matrix B A^T.
    const int status = gemm_(handle_, p.b_transposed ? 0 : 1, p.a_transposed ? 1 : 0, p.N, p.M, p.K,
                             &one, b, CUDA_R_16BF, p.b_transposed ? p.N : p.K, int64_t{p.N} * p.K,
                             a, CUDA_R_16BF, p.a_transposed ? p.M : p.K, int64_t{p.M} * p.K, &zero,
                             d, CUDA_R_16BF, p.N, int64_t{p.M} * p.N, p.E, kCompute32F, kDefault);
    if (status != 0) {
      std::fprintf(stderr, "cublasGemmStridedBatchedEx: status %d\n", status);
      std::exit(1);
    }
  }

 private:
  static constexpr int kCompute32F = 68;  // CUBLAS_COMPUTE_32F
  static constexpr int kDefault = -1;     // CUBLAS_GEMM_DEFAULT
  using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, cudaDataType, int,
                       long long, const void*, cudaDataType, int, long long, const void*, void*,
                       cudaDataType, int, long long, int, int, int);
  void* handle_ = nullptr;
  Gemm gemm_ = nullptr;
};

}  // namespace experiment
