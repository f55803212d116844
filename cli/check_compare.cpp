#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>

#include "cli/check.hpp"

namespace sonicmoe::cli {
namespace {

std::string scientific(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof buffer, "%.3g", value);
  return buffer;
}

// From this many zeros on, random data cannot have produced them.
constexpr std::size_t kSuspicious = 64;

}  // namespace

void Findings::compare(const std::string& name, const Tensor& result, const Tensor& expected,
                       const Tolerance& tolerance, bool may_vanish, std::size_t count) {
  const Tensor actual = result.to_host();
  if (!actual.guards_intact()) add(name + ": wrote outside of the tensor");
  double scale = 0.0;
  double worst = -1.0;
  double squares = 0.0;
  std::size_t worst_at = 0;
  bool all_zero = true;
  for (std::size_t i = 0; i < count; ++i) {
    const double want = expected.at(i);
    const double got = actual.at(i);
    const double error = std::abs(got - want);
    if (!(error <= 1e300)) {  // NaN or infinite
      add(name + ": element " + std::to_string(i) + " is " + scientific(got) + ", expected " +
          scientific(want));
      return;
    }
    if (got != 0.0) all_zero = false;
    scale = std::max(scale, std::abs(want));
    squares += error * error;
    if (error > worst) {
      worst = error;
      worst_at = i;
    }
  }
  if (scale == 0.0) {
    if (!all_zero) add(name + ": expected zeros only, got " + scientific(actual.at(worst_at)));
    if (!may_vanish && count >= kSuspicious) add(name + ": suspicious, the reference is all zeros");
    return;
  }
  const double rms = std::sqrt(squares / static_cast<double>(count)) / scale;
  // Of a few elements the root mean square says no more than the worst one.
  const double rms_limit = count < kSuspicious ? tolerance.max : tolerance.rms;
  if (all_zero) {
    add(name + ": all zeros");
  } else if (worst / scale > tolerance.max || rms > rms_limit) {
    add(name + ": relative error " + scientific(worst / scale) + " (limit " +
        scientific(tolerance.max) + "), rms " + scientific(rms) + " (limit " +
        scientific(rms_limit) + "), worst element " + std::to_string(worst_at) + ": got " +
        scientific(actual.at(worst_at)) + ", expected " + scientific(expected.at(worst_at)));
  }
}

void Findings::same_bits(const std::string& name, const Tensor& one, const Tensor& other) {
  if (!one.defined()) return;
  const Tensor first = one.to_host(), second = other.to_host();
  const auto* a = first.as<std::uint8_t>();
  const auto* b = second.as<std::uint8_t>();
  const std::size_t bytes = first.view().nbytes();
  if (bytes == 0 || std::memcmp(a, b, bytes) == 0) return;
  const auto at = static_cast<std::size_t>(std::mismatch(a, a + bytes, b).first - a);
  add(name + ": other bits with another thread count or workspace_limit, from element " +
      std::to_string(at / size_of(first.dtype())));
}

}  // namespace sonicmoe::cli
