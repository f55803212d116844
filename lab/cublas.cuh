// cuBLAS's strided batched product, loaded at run time from the library SONICMOE_CUBLAS names, so
// that it can be timed in turn with the experiments' kernels. Absent library: available() is false.
#pragma once

#include <dlfcn.h>

#include "bmm_problem.cuh"

namespace experiment {

class Cublas {
 public:
  Cublas() {
    const char* path = std::getenv("SONICMOE_CUBLAS");
    void* library = path == nullptr ? nullptr : dlopen(path, RTLD_NOW | RTLD_GLOBAL);
    if (library == nullptr) {
      std::printf("no cuBLAS: %s\n", path == nullptr ? "SONICMOE_CUBLAS is not set" : dlerror());
      return;
    }
    auto create = reinterpret_cast<int (*)(void**)>(dlsym(library, "cublasCreate_v2"));
    gemm_ = reinterpret_cast<Gemm>(dlsym(library, "cublasGemmStridedBatchedEx"));
    if (create == nullptr || gemm_ == nullptr || create(&handle_) != 0) gemm_ = nullptr;
  }
  bool available() const { return gemm_ != nullptr; }

  // The product of mainloop.cuh, D = A·Bᵀ per expert; needs a_experts == experts.
  void multiply(const BmmProblem& problem, Major a_major, Major b_major) const {
    const BmmSize& s = problem.size;
    const float one = 1, zero = 0;
    const bool a_k = a_major == Major::kK, b_k = b_major == Major::kK;
    // Row-major D is the column-major N x M matrix B·Aᵀ.
    const int status =
        gemm_(handle_, b_k ? 1 : 0, a_k ? 0 : 1, s.n, s.m, s.k, &one, problem.b.data(), CUDA_R_16BF,
              b_k ? s.k : s.n, int64_t{s.n} * s.k, problem.a.data(), CUDA_R_16BF, a_k ? s.k : s.m,
              int64_t{s.m} * s.k, &zero, problem.d.data(), CUDA_R_16BF, s.n, int64_t{s.m} * s.n,
              s.experts, kCompute32F, kDefaultAlgorithm);
    if (status != 0) {
      std::fprintf(stderr, "cublasGemmStridedBatchedEx: status %d\n", status);
      std::exit(1);
    }
  }

 private:
  static constexpr int kCompute32F = 68;        // CUBLAS_COMPUTE_32F
  static constexpr int kDefaultAlgorithm = -1;  // CUBLAS_GEMM_DEFAULT
  using Gemm = int (*)(void*, int, int, int, int, int, const void*, const void*, cudaDataType, int,
                       long long, const void*, cudaDataType, int, long long, const void*, void*,
                       cudaDataType, int, long long, int, int, int);
  void* handle_ = nullptr;
  Gemm gemm_ = nullptr;
};

}  // namespace experiment
