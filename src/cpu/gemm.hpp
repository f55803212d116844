// Matrix products on oneDNN with float32 accumulation, one thread a call: parallelism is across
// experts and row blocks (core/parallel.hpp), which keeps every result independent of the thread
// count.
#pragma once

#include <cstdint>
#include <string>

#include "sonicmoe/dtype.hpp"

namespace sonicmoe::cpu {

/// A matrix inside a GEMM: element (i, j) at data[i * ld + j], or data[j * ld + i] when
/// column-major.
template <class T>
struct Operand {
  const T* data;
  std::int64_t ld;
  bool row_major = true;

  Operand transposed() const { return {data, ld, !row_major}; }
};

/// Makes oneDNN write its float32 kernels, once a process. To be called before threads multiply:
/// oneDNN does not survive running out of memory there, so this throws std::bad_alloc unless there
/// is plenty.
void prepare_gemm();

/// C [m, n] row-major float32 = A [m, k] B [k, n] (+ C when `add`). k = 0 gives zeros (or C).
/// bfloat16 operands need native_bfloat16().
void gemm(std::int64_t m, std::int64_t n, std::int64_t k, Operand<float> a, Operand<float> b,
          float* c, std::int64_t ldc, bool add = false);
void gemm(std::int64_t m, std::int64_t n, std::int64_t k, Operand<bfloat16> a, Operand<bfloat16> b,
          float* c, std::int64_t ldc, bool add = false);

/// Whether this CPU multiplies bfloat16 in hardware and oneDNN uses it. If not, bfloat16 tensors
/// are converted panel by panel and multiplied in float32, which costs a few percent more than
/// float32 storage and the same precision.
bool native_bfloat16();

/// "oneDNN 2.6.3, AVX2".
std::string gemm_description();

}  // namespace sonicmoe::cpu
