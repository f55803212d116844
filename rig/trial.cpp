#include "rig/trial.hpp"

#include <algorithm>
#include <cmath>
#include <memory>

#include "sonicmoe/error.hpp"

namespace sonicmoe::rig {
namespace {

using Kind = Attack::Kind;

bool is_float(DType dtype) { return dtype == DType::kFloat32 || dtype == DType::kBFloat16; }
bool is_id(DType dtype) { return dtype == DType::kInt32 || dtype == DType::kInt64; }

std::vector<std::int64_t> packed_strides(const std::vector<std::int64_t>& shape) {
  std::vector<std::int64_t> strides(shape.size(), 1);
  for (std::size_t i = shape.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<std::int64_t>(shape[i], 1);
  }
  return strides;
}

// Whether an operation may take this extent although no other tensor has it.
bool is_free(const Call& call, const Attack& attack) {
  const std::string& operation = call.operation;
  const std::string& name = call.operands[attack.index].name;
  if (name != "logits" && name != "scores") return false;
  const bool loss =
      operation == "load_balancing_loss_forward" || operation == "router_z_loss_forward";
  if (attack.detail == 0) return loss;  // tokens
  for (const char* per_expert : {"selection_bias", "rows_per_expert", "rows_per_expert_before"}) {
    if (call.find(per_expert) != nullptr) return false;
  }
  return attack.amount > 0 && (loss || operation == "route_forward" ||
                               operation == "round_tokens_forward" || operation == "round_select");
}

bool has_results(const Call& call) {
  return std::any_of(call.operands.begin(), call.operands.end(),
                     [](const Operand& operand) { return operand.is_result(); });
}

// The values, cut or repeated to the number of elements of the tensor, where its dtype can hold
// them.
void fill_with(Tensor& tensor, const Operand& operand) {
  const DType from = operand.memory->dtype(), to = tensor.dtype();
  if (operand.name == "workspace" || tensor.numel() == 0) return;
  std::vector<double> values = operand.memory->values();
  std::vector<double> fitting(static_cast<std::size_t>(tensor.numel()));
  for (std::size_t i = 0; i < fitting.size(); ++i) fitting[i] = values[i % values.size()];
  if (is_float(from) && is_float(to)) tensor.fill(fitting);
  if ((is_id(from) && is_id(to)) || (from == to && operand.is_buffer())) {
    tensor.fill_ids({fitting.begin(), fitting.end()});
  }
}

}  // namespace

// The argument of an attack, and what may come of it.
struct Trial::Forgery {
  std::string name;     // of the argument
  std::string another;  // that an error may name instead
  bool any_name = false;
  bool may_compute = false, may_refuse = true;
  double rounding = 0.0;
  bool other_values = false;  // results need not be those of the valid call, only numbers

  const Operand* operand = nullptr;  // the attacked tensor, null for an option
  TensorView view;                   // in its place
  std::shared_ptr<Tensor> memory;    // of view, where it is not the operand's
  std::shared_ptr<Tensor> twin;      // plain memory of the same values, where they differ
};

Trial::Forgery Trial::forge(const Attack& attack) const {
  Forgery f;
  if (attack.kind == Kind::kOption) {
    const Setting& setting = call_.settings[attack.index];
    f.name = setting.option;
    f.may_compute = setting.expected != Expected::kRefused;
    f.may_refuse = setting.expected != Expected::kSameResults;
    f.any_name = f.other_values = setting.expected == Expected::kEither;
    return f;
  }
  f.operand = &call_.operands[attack.index];
  f.name = f.operand->name;
  switch (attack.kind) {
    case Kind::kAbsent:
      leave_out(f);
      break;
    case Kind::kDevice:
    case Kind::kRank:
    case Kind::kHuge:
    case Kind::kSwapped:
    case Kind::kOverlap:
      forge_view(attack, f);
      break;
    default:
      forge_memory(attack, f);
  }
  return f;
}

void Trial::leave_out(Forgery& f) const {
  const Operand& operand = *f.operand;
  const TensorView& valid = operand.memory->view();
  // A gradient of what is left out is refused instead.
  f.another = f.name == "row_weights" ? "grad_routing_weights" : "grad_" + f.name;
  f.may_compute = operand.optional;
  f.may_refuse = !operand.optional || call_.find(f.another) != nullptr;
  if (!operand.optional || operand.written()) return;
  f.twin = std::make_shared<Tensor>(*call_.target, valid.dtype(), operand.shape());
  const auto count = static_cast<std::size_t>(valid.numel());
  if (is_float(valid.dtype())) f.twin->fill(std::vector<double>(count, operand.neutral));
  if (is_id(valid.dtype())) f.twin->fill_ids(std::vector<std::int64_t>(count, 0));
}

// Attacks that see the memory of the valid call in another way.
void Trial::forge_view(const Attack& attack, Forgery& f) const {
  const Operand& operand = *f.operand;
  const TensorView& valid = operand.memory->view();
  std::vector<std::int64_t> shape = operand.shape(), strides = packed_strides(shape);
  const auto detail = static_cast<std::size_t>(attack.detail);
  switch (attack.kind) {
    case Kind::kDevice: {
      const Device device = other_devices(*call_.target)[detail];
      f.view = TensorView(valid.data(), valid.dtype(), shape, device);
      break;
    }
    case Kind::kRank:
      if (attack.detail > 0) {
        shape.insert(shape.begin(), 1);
      } else {
        shape[1] *= shape[0];
        shape.erase(shape.begin());
      }
      f.view = TensorView(valid.data(), valid.dtype(), shape, valid.device());
      f.may_compute = operand.is_buffer();
      break;
    case Kind::kHuge:
      shape[detail] = attack.amount;
      strides[detail] = 0;
      try {
        f.view = TensorView(valid.data(), valid.dtype(), shape, strides, valid.device());
      } catch (const Error&) {  // past 2^63 bytes: there is no such view
      }
      f.any_name = true;
      break;
    case Kind::kSwapped:
      f.view = transposed(valid, valid.rank() - 2, valid.rank() - 1);
      f.any_name = true;
      break;
    case Kind::kOverlap: {
      const Operand& other = call_.operands[attack.other];
      const TensorView& theirs = other.memory->view();
      f.view = TensorView(theirs.data(), valid.dtype(), shape, valid.device());
      f.another = other.name;
      f.any_name = f.view.nbytes() > theirs.nbytes();  // over its neighbours too
      break;
    }
    default:
      break;
  }
}

// Attacks with memory of their own.
void Trial::forge_memory(const Attack& attack, Forgery& f) const {
  const Operand& operand = *f.operand;
  const bool buffer = operand.is_buffer();
  const bool cuda = call_.target->device.type == DeviceType::kCuda;
  DType dtype = operand.memory->dtype();
  std::vector<std::int64_t> shape = operand.shape(), strides = packed_strides(shape);
  std::size_t start = 0;
  f.may_compute = !buffer;
  // Where the tensor cores cannot take it, another kernel sums the logits in another order.
  if (cuda && operand.name == "router_weight") f.rounding = 0x1p-7;
  switch (attack.kind) {
    case Kind::kDType: {
      const DType wanted = static_cast<DType>(attack.detail);
      const bool alike = (is_float(dtype) && is_float(wanted)) || (is_id(dtype) && is_id(wanted));
      f.may_compute = f.any_name = alike;
      if (operand.written()) f.rounding = 0x1p-8;
      dtype = wanted;
      break;
    }
    case Kind::kExtent: {
      std::int64_t& extent = shape[static_cast<std::size_t>(attack.detail)];
      f.may_compute = buffer ? attack.amount > extent : is_free(call_, attack);
      f.any_name = !buffer;
      f.other_values = !buffer;
      extent = attack.amount;
      strides = packed_strides(shape);
      break;
    }
    case Kind::kShifted:
      start = static_cast<std::size_t>(attack.amount);
      f.may_compute = !buffer && attack.amount > 1;
      f.may_refuse = buffer || attack.amount == 1 || cuda;
      break;
    case Kind::kInnerStride:
      for (std::int64_t& stride : strides) stride *= 2;
      break;
    case Kind::kRowGaps:
      for (std::size_t i = 0; i + 1 < strides.size(); ++i)
        strides[i] += strides[i] / shape.back() * 8;
      break;
    case Kind::kRepeated:
      strides[static_cast<std::size_t>(attack.detail)] = 0;
      f.may_compute = !operand.written() && !buffer;
      break;
    default:
      break;
  }
  f.memory = std::make_shared<Tensor>(*call_.target, dtype, shape, strides, start);
  fill_with(*f.memory, operand);
  f.view = f.memory->view();
  if (attack.kind == Kind::kRepeated && f.may_compute) {
    f.twin = std::make_shared<Tensor>(*call_.target, dtype, shape);
    const std::vector<double> values = f.memory->values();
    if (is_float(dtype)) f.twin->fill(values);
    if (is_id(dtype)) f.twin->fill_ids({values.begin(), values.end()});
  }
}

// --------------------------------------------------------------------------------------- trials

Trial::Trial(Call call) : call_(std::move(call)) {
  const Outcome outcome = call_.run();
  if (outcome.refused) {
    problem_ = "the valid call is refused: " + outcome.message;
    return;
  }
  problem_ = call_.violation();
  results_ = call_.results();
  std::size_t next = 0;
  for (const Operand& operand : call_.operands) {
    if (!operand.is_result() || !problem_.empty()) continue;
    const std::vector<double>& values = results_[next++];
    const auto is_zero = [](double value) { return value == 0.0; };
    const auto is_number = [&](double value) {
      return std::isfinite(value) || operand.has_unused_rows();
    };
    if (std::all_of(values.begin(), values.end(), is_zero) && !operand.may_be_zero()) {
      problem_ = operand.name + ": all zeros";
    }
    if (!std::all_of(values.begin(), values.end(), is_number)) problem_ = operand.name + ": NaN";
  }
  if (problem_.empty() && !has_results(call_)) problem_ = "no results";
  call_.restore_memory();
}

std::string Trial::attempt(const Attack& attack) {
  const Forgery forgery = forge(attack);
  if (attack.kind == Kind::kHuge && !forgery.view.defined()) return {};
  const Elements expected = expected_results(forgery);
  if (attack.kind == Kind::kOption) {
    call_.settings[attack.index].apply();
  } else {
    forgery.operand->give(forgery.view);
  }
  Outcome outcome;
  std::string problem;
  try {
    outcome = call_.run();
  } catch (const std::exception& error) {
    problem = std::string("another exception than Error: ") + error.what();
  }
  call_.make_valid();
  if (problem.empty()) {
    problem = outcome.refused ? check_refusal(forgery, outcome) : check_results(forgery, expected);
  }
  call_.restore_memory();
  return problem;
}

// Results of the valid call, or of its twin with plain memory of the attack's values.
Elements Trial::expected_results(const Forgery& forgery) {
  if (!forgery.twin) return results_;
  forgery.operand->give(forgery.twin->view());
  const Outcome outcome = call_.run();
  const Elements expected = outcome.refused ? Elements() : call_.results();
  call_.make_valid();
  call_.restore_memory();
  return expected;
}

std::string Trial::check_refusal(const Forgery& forgery, const Outcome& outcome) {
  const std::string& name = outcome.argument;
  if (!forgery.may_refuse) return "refused: " + outcome.message;
  // The CUDA backend declines layouts in words of its own, when it gets to them.
  const bool declined = call_.target->device.type == DeviceType::kCuda && forgery.may_compute &&
                        outcome.message.rfind("cuda ", 0) == 0;
  if (declined) return check_valid_call();
  if (name != forgery.name && (name.empty() || name != forgery.another) &&
      !(forgery.any_name && call_.has_argument(name))) {
    return "the error names another argument: " + outcome.message;
  }
  const std::string operation = call_.operation.substr(0, call_.operation.find('/'));
  if (outcome.message.rfind(operation + ": " + name + ": expected ", 0) != 0) {
    return "the error is not \"operation: argument: expected ...\": " + outcome.message;
  }
  // A shape that may be right is refused when its contents turn out not to fit: scratch is written.
  std::string change = call_.change(!forgery.may_compute);
  if (change.empty() && forgery.memory) change = forgery.memory->violation_as_input();
  if (!change.empty()) return "refused after " + change + ": " + outcome.message;
  return check_valid_call();
}

std::string Trial::check_valid_call() {
  const Outcome outcome = call_.run();
  if (outcome.refused) return "afterwards the valid call is refused: " + outcome.message;
  const std::string change = difference(call_, call_.results(), results_);
  return change.empty() ? "" : "afterwards the valid call gives other results: " + change;
}

std::string Trial::check_results(const Forgery& forgery, const Elements& expected) {
  if (!forgery.may_compute) return "accepted";
  if (const std::string violation = call_.violation(); !violation.empty()) return violation;
  const Operand* attacked = forgery.operand;
  if (forgery.memory) {
    const std::string violation = attacked->written() ? forgery.memory->violation_as_output()
                                                      : forgery.memory->violation_as_input();
    if (!violation.empty()) return attacked->name + ": " + violation;
  }
  Elements actual = call_.results();
  std::size_t next = 0;
  for (const Operand& operand : call_.operands) {
    if (!operand.is_result()) continue;
    if (&operand == attacked && forgery.memory) actual[next] = forgery.memory->values();
    if (operand.is_buffer()) actual[next].resize(expected[next].size());  // may be longer
    if (&operand == attacked && !forgery.memory && !forgery.view.defined()) {
      actual[next] = expected[next];  // left out
    }
    if (forgery.other_values && !operand.has_unused_rows() &&
        !std::all_of(actual[next].begin(), actual[next].end(),
                     [](double value) { return std::isfinite(value); })) {
      return operand.name + ": NaN or infinity";
    }
    ++next;
  }
  return forgery.other_values ? "" : difference(call_, actual, expected, forgery.rounding);
}

}  // namespace sonicmoe::rig
