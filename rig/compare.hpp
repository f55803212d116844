// Comparators. Each one is shown, in tests/unit/compare_test.cpp, to reject zeros, a swapped row
// and a dropped expert.
#pragma once

#include <string>
#include <vector>

#include "oracle/experts.hpp"
#include "rig/moe_run.hpp"

namespace sonicmoe::rig {

double max_abs(const Values& values);
/// Largest |actual - reference|; infinity for a NaN or a wrong number of elements.
double max_error(const Values& actual, const Values& reference);

/// The smallest tolerance that makes sense for a dtype, relative to max|reference|. bfloat16: 2^-8,
/// half an ulp of the largest element, the one final rounding that two correct programs may do
/// differently. float32: 2^-22, four half ulps, because a handful of sums in another order is not
/// covered by one naive order that happened to be lucky.
double relative_floor(DType dtype);

struct Comparison {
  double error = 0;
  double tolerance = 0;
  double scale = 0;  ///< max|reference|
  bool passed() const { return error <= tolerance; }
  /// Whether zeros (and anything else of the wrong size) would pass too.
  bool vacuous() const { return scale > 0 && tolerance > 0.25 * scale; }
};

/// error <= 2 * naive error + floor.
Comparison compare(const Values& actual, const Values& reference, const Values& naive,
                   double floor);

enum class Strictness {
  kRealistic,  ///< floor relative to max|reference|; a vacuous comparison fails
  kTiny,       ///< floor relative to the sums of |terms| (Magnitudes), for shapes with a few
               ///< elements; a vacuous comparison counts as no comparison
};

/// Adds what is wrong with a tensor, one line, to `problems`: an error beyond 2 x naive + floor; a
/// tolerance that zeros would pass; zeros where neither the reference nor the naive result is zero.
void check_tensor(const char* name, const Values& actual, const Values& reference,
                  const Values& naive, double floor, Strictness strictness,
                  std::vector<std::string>& problems);

/// What is wrong with a run of `test_case`, compared with the oracle: one line per tensor, and the
/// run's violations. Empty when all is well. Gradients are compared with the oracle's backward from
/// the H that the run stored, H itself with the oracle's.
std::vector<std::string> check_run(const MoECase& test_case, const RunOptions& options,
                                   const RunResult& result,
                                   Strictness strictness = Strictness::kRealistic);

/// The same, bit for bit, for cases of small integers. Also checks that the case deserves it: no
/// stored intermediate is rounded.
std::vector<std::string> check_run_exactly(const MoECase& test_case, const RunOptions& options,
                                           const RunResult& result);

}  // namespace sonicmoe::rig
