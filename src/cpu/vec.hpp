// Loops over contiguous elements, compiled for several instruction sets and chosen when the library
// is loaded. None of them allocates; source and destination do not overlap unless they are equal.
#pragma once

#include <cstdint>

#include "sonicmoe/activation.hpp"
#include "sonicmoe/dtype.hpp"

namespace sonicmoe::cpu {

/// to[i] = from[i], exact (widening) or rounded to nearest even (narrowing).
void convert(const float* from, float* to, std::int64_t count);
void convert(const bfloat16* from, float* to, std::int64_t count);
void convert(const float* from, bfloat16* to, std::int64_t count);
void convert(const bfloat16* from, bfloat16* to, std::int64_t count);

/// x[i] rounded to T and back: what a stored tensor of dtype T holds.
template <class T>
void round_to(float* x, std::int64_t count);
template <>
inline void round_to<float>(float*, std::int64_t) {}
template <>
void round_to<bfloat16>(float* x, std::int64_t count);

/// sum[i] += scale * x[i].
void axpy(float scale, const float* x, float* sum, std::int64_t count);
void axpy(float scale, const bfloat16* x, float* sum, std::int64_t count);

/// x[i] *= factor.
void scale(float factor, float* x, std::int64_t count);

/// sum of x[i] * y[i] in a fixed order: 16 interleaved partial sums, added pairwise.
float dot(const float* x, const float* y, std::int64_t count);
float dot(const bfloat16* x, const bfloat16* y, std::int64_t count);

/// even[i] = x[2i], odd[i] = x[2i+1], and back.
void deinterleave(const float* x, float* even, float* odd, std::int64_t count);
void interleave(const float* even, const float* odd, float* x, std::int64_t count);

/// out[i] = act(gate[i], up[i]); `up` is unused (may be null) for an ungated activation.
void activate(Activation activation, float limit, const float* gate, const float* up, float* out,
              std::int64_t count);

/// d_gate[i], d_up[i]: gradients of act at (gate, up) times d_out[i]. `up`, `d_up` are unused for
/// an ungated activation.
void activate_backward(Activation activation, float limit, const float* gate, const float* up,
                       const float* d_out, float* d_gate, float* d_up, std::int64_t count);

}  // namespace sonicmoe::cpu
