// One valid call of a public operation on a target, with its tensors and options by name: a test
// makes one of them wrong and looks at what comes of it.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "api/arguments.hpp"
#include "rig/tensor.hpp"

namespace sonicmoe::rig {

/// A tensor of a call.
struct Operand {
  std::string name;
  Access access;
  bool optional = false;
  double neutral = 0.0;  ///< contents of an optional input that mean the same as leaving it out
  std::shared_ptr<Tensor> memory;
  std::function<void(const TensorView&)> give;  ///< hands over a view in place of memory's

  std::vector<std::int64_t> shape() const {
    const auto extents = memory->view().shape();
    return {extents.begin(), extents.end()};
  }
  bool written() const { return access == Access::kWrite; }
  /// Scratch or metadata: bytes that may be more than needed.
  bool is_buffer() const { return memory->dtype() == DType::kUInt8; }
  /// Rows that no expert uses are left as they were.
  bool has_unused_rows() const { return name == "h" || name == "grad_h" || name == "scaled_a"; }
  /// Whether a right result may be all zeros: nothing was dropped.
  bool may_be_zero() const { return name == "rows_dropped"; }
  /// Written, and of use to the caller.
  bool is_result() const { return written() && name != "workspace"; }
};

enum class Expected : std::uint8_t {
  kRefused,      ///< with the option's name
  kSameResults,  ///< as the valid call, bit for bit
  kEither,       ///< refused, or computed to finite numbers
};

/// A value, wrong or at the edge, of an option of a call.
struct Setting {
  std::string option;
  std::string value;
  Expected expected;
  std::function<void()> apply;
};

struct Outcome {
  bool refused = false;
  std::string argument;  ///< of the Error
  std::string message;
};

using Elements = std::vector<std::vector<double>>;

class Call {
 public:
  std::string operation;
  const Target* target = nullptr;
  std::vector<Operand> operands;  ///< those that are present
  std::vector<Setting> settings;

  /// Any exception but Error leaves it.
  Outcome run() const;
  /// Takes back every view and option that was changed.
  void make_valid() { reset_(); }
  /// Takes back what was written: outputs are poison again, what is updated holds its old values.
  void restore_memory(bool scratch_too = true);
  /// Elements of the results, in the order of the operands.
  Elements results() const;
  /// The first tensor that is not what it was before the call, guards and gaps included; or empty.
  std::string change(bool scratch_too = true) const;
  /// The first tensor that was changed where it must not be; or empty.
  std::string violation() const;

  const Operand* find(const std::string& name) const;
  void set_optional(const std::string& name, double neutral = 0.0);
  /// Whether errors may give this name: a tensor's, an option's or a size's.
  bool has_argument(const std::string& name) const;

 private:
  template <class Args>
  friend class CallMaker;

  std::function<void()> invoke_;
  std::function<void()> reset_;
};

/// "NAME: " and what differs in a result, the -0 that some sums leave for +0 aside. `rounding`
/// relative to each element.
std::string difference(const Call& call, const Elements& actual, const Elements& expected,
                       double rounding = 0.0);

/// Collects the settings of a call's options and builds the call.
template <class Args>
class CallMaker {
 public:
  using Operation = std::function<void(const Context&, const Args&)>;

  /// assign(args, value) for each value.
  template <class Value, class Assign>
  void each(const char* option, Expected expected, std::initializer_list<Value> values,
            Assign assign) {
    for (const Value value : values) {
      add(option, std::to_string(value), expected,
          [=](Context&, Args& args) { assign(args, value); });
    }
  }
  void add(const char* option, std::string value, Expected expected,
           std::function<void(Context&, Args&)> apply) {
    changes_.push_back({option, std::move(value), expected, std::move(apply)});
  }

  /// `memory`: whatever the views in `args` point to.
  Call make(std::string name, const Target& target, const Args& args, Operation operation,
            const std::vector<std::shared_ptr<Tensor>>& memory, int num_threads) {
    struct State {
      Context context;
      Args args;
    };
    const State valid{target.context(num_threads), args};
    const auto state = std::make_shared<State>(valid);
    Call call;
    call.operation = std::move(name);
    call.target = &target;
    call.invoke_ = [state, operation] { operation(state->context, state->args); };
    call.reset_ = [state, valid] { *state = valid; };
    for_each_tensor(state->args, [&](const char* argument, auto& view, Access access) {
      for (const auto& tensor : memory) {
        if (!view.defined() || view.data() != tensor->view().data()) continue;
        // `state` keeps the view alive.
        call.operands.push_back({argument, access, false, 0.0, tensor,
                                 [state, &view](const TensorView& other) { view = other; }});
      }
    });
    add_context_settings();
    for (const Change& change : changes_) {
      call.settings.push_back(
          {change.option, change.value, change.expected,
           [state, apply = change.apply] { apply(state->context, state->args); }});
    }
    return call;
  }

 private:
  struct Change {
    std::string option;
    std::string value;
    Expected expected;
    std::function<void(Context&, Args&)> apply;
  };

  void add_context_settings() {
    const auto context = [&](const char* option, const char* value, Expected expected, auto set) {
      add(option, value, expected, [set](Context& c, Args&) { set(c); });
    };
    const auto refused = Expected::kRefused;
    context("num_threads", "-1", refused, [](Context& c) { c.num_threads = -1; });
    context("num_threads", "10^9", refused, [](Context& c) { c.num_threads = 1000000000; });
    context("device", "index -1", refused, [](Context& c) { c.device.index = -1; });
    context("device", "index 99", Expected::kEither, [](Context& c) { c.device.index = 99; });
    context("device", "type 255", refused,
            [](Context& c) { c.device.type = static_cast<DeviceType>(255); });
    context("backend", "abacus", refused, [](Context& c) { c.backend = "abacus"; });
  }

  std::vector<Change> changes_;
};

}  // namespace sonicmoe::rig
