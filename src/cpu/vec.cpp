#include "cpu/vec.hpp"

#include <cstring>

#include "cpu/clones.hpp"

namespace sonicmoe::cpu {
namespace {

constexpr int kLanes = 16;

template <class T>
[[gnu::always_inline]] inline float dot_lanes(const T* x, const T* y, std::int64_t count) {
  float lane[kLanes] = {};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) {
      lane[j] += static_cast<float>(x[i + j]) * static_cast<float>(y[i + j]);
    }
  }
  for (int j = 0; i + j < count; ++j) {
    lane[j] += static_cast<float>(x[i + j]) * static_cast<float>(y[i + j]);
  }
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int j = 0; j < step; ++j) lane[j] += lane[j + step];
  }
  return lane[0];
}

}  // namespace

void convert(const float* from, float* to, std::int64_t count) {
  if (from != to && count > 0)
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(float));
}

void convert(const bfloat16* from, bfloat16* to, std::int64_t count) {
  if (from != to && count > 0) {
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(bfloat16));
  }
}

SONICMOE_CLONES void convert(const bfloat16* from, float* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = from[i];
}

SONICMOE_CLONES void convert(const float* from, bfloat16* to, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) to[i] = bfloat16(from[i]);
}

template <>
SONICMOE_CLONES void round_to<bfloat16>(float* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] = bfloat16(x[i]);
}

SONICMOE_CLONES void axpy(float scale, const float* x, float* sum, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] += scale * x[i];
}

SONICMOE_CLONES void axpy(float scale, const bfloat16* x, float* sum, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) sum[i] += scale * static_cast<float>(x[i]);
}

SONICMOE_CLONES void scale(float factor, float* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) x[i] *= factor;
}

SONICMOE_CLONES float dot(const float* x, const float* y, std::int64_t count) {
  return dot_lanes(x, y, count);
}

SONICMOE_CLONES float dot(const bfloat16* x, const bfloat16* y, std::int64_t count) {
  return dot_lanes(x, y, count);
}

SONICMOE_CLONES void deinterleave(const float* x, float* even, float* odd, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    even[i] = x[2 * i];
    odd[i] = x[2 * i + 1];
  }
}

SONICMOE_CLONES void interleave(const float* even, const float* odd, float* x, std::int64_t count) {
  for (std::int64_t i = 0; i < count; ++i) {
    x[2 * i] = even[i];
    x[2 * i + 1] = odd[i];
  }
}

}  // namespace sonicmoe::cpu
