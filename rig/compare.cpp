#include "rig/compare.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <sstream>

#include "rig/naive.hpp"

namespace sonicmoe::rig {
namespace {

// One tensor of a run beside what it is compared with.
struct Item {
  const char* name;
  DType dtype;
  bool wanted;
  const Values& actual;
  const Values& reference;
  const Values& naive;
  double magnitude;
};

// Everything a run is compared with.
struct Expectation {
  oracle::ForwardResult forward, naive_forward;
  oracle::BackwardResult backward, naive_backward;
  Magnitudes magnitudes;
};

Values plus(Values values, double offset) {
  for (double& value : values) value += offset;
  return values;
}

void add_offset(oracle::BackwardResult& result, double offset) {
  for (auto* gradient : {&result.grad_w1, &result.grad_b1, &result.grad_w2, &result.grad_b2}) {
    *gradient = plus(std::move(*gradient), offset);
  }
}

std::vector<Item> items(const MoECase& c, const RunOptions& options, const RunResult& run,
                        const Expectation& e) {
  const DType gradient = options.gradient_dtype.value_or(c.dtype);
  const bool backward = !options.inference;
  const auto wants = [&](unsigned bit) { return backward && (options.gradients & bit) != 0; };
  const bool has_weights = c.form != MoEShape::Form::kSorted || c.row_weights;
  return {
      {"out", c.dtype, true, run.out, e.forward.out, e.naive_forward.out, e.magnitudes.out},
      {"h", c.dtype, backward, run.h, e.forward.h, e.naive_forward.h, e.magnitudes.h},
      {"grad_x", c.dtype, wants(kGradX), run.grad_x, e.backward.grad_x, e.naive_backward.grad_x,
       e.magnitudes.grad_x},
      {"grad_w1", gradient, wants(kGradW1), run.grad_w1, e.backward.grad_w1,
       e.naive_backward.grad_w1, e.magnitudes.grad_w1},
      {"grad_b1", gradient, wants(kGradB1) && c.biases, run.grad_b1, e.backward.grad_b1,
       e.naive_backward.grad_b1, e.magnitudes.grad_b1},
      {"grad_w2", gradient, wants(kGradW2), run.grad_w2, e.backward.grad_w2,
       e.naive_backward.grad_w2, e.magnitudes.grad_w2},
      {"grad_b2", gradient, wants(kGradB2) && c.biases, run.grad_b2, e.backward.grad_b2,
       e.naive_backward.grad_b2, e.magnitudes.grad_b2},
      {"grad_routing_weights", DType::kFloat32, wants(kGradRoutingWeights) && has_weights,
       run.grad_routing_weights, e.backward.grad_routing_weights,
       e.naive_backward.grad_routing_weights, e.magnitudes.grad_routing_weights},
  };
}

bool all_zero(const Values& values) { return max_abs(values) == 0.0; }

void check_item(const Item& item, const MoECase& c, Strictness strictness,
                std::vector<std::string>& problems) {
  // dS of bfloat16 operands is summed from rounded dA' and A, though itself stored in float32.
  const double floor =
      strictness == Strictness::kRealistic
          ? relative_floor(item.dtype) * max_abs(item.reference)
          : relative_floor(c.dtype) * std::max(item.magnitude, max_abs(item.reference));
  check_tensor(item.name, item.actual, item.reference, item.naive, floor, strictness, problems);
}

}  // namespace

double max_abs(const Values& values) {
  double result = 0.0;
  for (const double value : values) result = std::max(result, std::abs(value));
  return result;
}

double max_error(const Values& actual, const Values& reference) {
  if (actual.size() != reference.size()) return std::numeric_limits<double>::infinity();
  double result = 0.0;
  for (std::size_t i = 0; i < actual.size(); ++i) {
    const double error = std::abs(actual[i] - reference[i]);
    if (!(error <= std::numeric_limits<double>::max())) {
      return std::numeric_limits<double>::infinity();
    }
    result = std::max(result, error);
  }
  return result;
}

double relative_floor(DType dtype) { return dtype == DType::kBFloat16 ? 0x1p-8 : 0x1p-22; }

Comparison compare(const Values& actual, const Values& reference, const Values& naive,
                   double floor) {
  return {max_error(actual, reference), 2.0 * max_error(naive, reference) + floor,
          max_abs(reference)};
}

void check_tensor(const char* name, const Values& actual, const Values& reference,
                  const Values& naive, double floor, Strictness strictness,
                  std::vector<std::string>& problems) {
  const Comparison result = compare(actual, reference, naive, floor);
  std::ostringstream out;
  if (!result.passed()) {
    out << name << ": error " << result.error << " > tolerance " << result.tolerance
        << " (max|reference| " << result.scale << ", naive error " << max_error(naive, reference)
        << ")";
  } else if (result.vacuous() && strictness == Strictness::kRealistic) {
    out << name << ": the comparison would accept zeros: tolerance " << result.tolerance
        << " beside max|reference| " << result.scale;
  } else if (result.scale > 0 && all_zero(actual) && !all_zero(naive)) {
    out << name << ": suspicious: all zeros where max|reference| is " << result.scale;
  }
  if (!out.str().empty()) problems.push_back(out.str());
}

std::vector<std::string> check_run(const MoECase& test_case, const RunOptions& options,
                                   const RunResult& result, Strictness strictness) {
  const MoEInputs host(host_target(), test_case);
  const oracle::Problem problem = host.problem();
  Expectation expected;
  expected.forward = oracle::forward(problem);
  expected.naive_forward = naive_forward(problem);
  const Values& h = options.inference ? expected.forward.h : result.h;
  if (h.size() != expected.forward.h.size()) return {"h: wrong number of rows"};
  const std::vector<oracle::Row>& rows = expected.forward.rows;
  if (!options.inference) {
    expected.backward = oracle::backward(problem, rows, h, host.grad_out.view());
    expected.naive_backward = naive_backward(problem, rows, h, host.grad_out.view(),
                                             options.gradient_dtype.value_or(test_case.dtype));
    add_offset(expected.backward, options.accumulate ? options.accumulate_onto : 0.0);
    add_offset(expected.naive_backward, options.accumulate ? options.accumulate_onto : 0.0);
  }
  if (strictness == Strictness::kTiny) {
    expected.magnitudes = magnitudes(problem, rows, expected.forward.h, host.grad_out.view());
  }
  std::vector<std::string> problems = result.violations;
  if (result.rows_dropped != host.rows_beyond()) {
    problems.push_back("rows_dropped: " + std::to_string(result.rows_dropped));
  }
  for (const Item& item : items(test_case, options, result, expected)) {
    if (item.wanted) check_item(item, test_case, strictness, problems);
  }
  return problems;
}

std::vector<std::string> check_run_exactly(const MoECase& test_case, const RunOptions& options,
                                           const RunResult& result) {
  const MoEInputs host(host_target(), test_case);
  const oracle::Problem problem = host.problem();
  Expectation exact, stored;
  exact.forward = oracle::forward(problem);
  stored.forward = oracle::forward(problem, oracle::Storage::kAll);
  exact.backward =
      oracle::backward(problem, exact.forward.rows, exact.forward.h, host.grad_out.view());
  stored.backward = oracle::backward(problem, stored.forward.rows, stored.forward.h,
                                     host.grad_out.view(), oracle::Storage::kAll);
  add_offset(exact.backward, options.accumulate ? options.accumulate_onto : 0.0);
  add_offset(stored.backward, options.accumulate ? options.accumulate_onto : 0.0);
  const std::vector<Item> exact_items = items(test_case, options, result, exact);
  const std::vector<Item> stored_items = items(test_case, options, result, stored);
  std::vector<std::string> problems = result.violations;
  if (result.rows_dropped != host.rows_beyond()) {
    problems.push_back("rows_dropped: " + std::to_string(result.rows_dropped));
  }
  for (std::size_t i = 0; i < exact_items.size(); ++i) {
    const Item& item = exact_items[i];
    if (!item.wanted) continue;
    Values rounded = item.reference;
    for (double& value : rounded) value = oracle::rounded_to(item.dtype, value);
    if (max_error(stored_items[i].reference, item.reference) != 0.0 ||
        max_error(rounded, item.reference) != 0.0) {
      problems.push_back(std::string(item.name) + ": the case is not exact in its dtype");
    }
    // +0 and -0 are the same number; everything else is compared bit for bit.
    const std::string difference =
        bitwise_difference(plus(item.actual, 0.0), plus(item.reference, 0.0));
    if (!difference.empty()) problems.push_back(std::string(item.name) + ": " + difference);
    if (item.reference.size() > 20 && all_zero(item.reference) && host.shape().num_pairs > 0 &&
        !exact.forward.rows.empty()) {
      problems.push_back(std::string(item.name) + ": the case is all zeros, it tests nothing");
    }
  }
  return problems;
}

}  // namespace sonicmoe::rig
