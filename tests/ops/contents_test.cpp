// Contents that no operation of this library would have written: indices out of range, metadata of
// another call, numbers that are none. Refused, or computed within the buffers' bounds.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "rig/operations.hpp"
#include "rig/random.hpp"
#include "rig/workbench.hpp"

namespace sonicmoe::rig {
namespace {

// Values on a device are not read back to be checked: the host's backends only.
std::vector<Target> host_targets() {
  std::vector<Target> list;
  for (const Target& target : targets()) {
    if (target.device.type == DeviceType::kCpu) list.push_back(target);
  }
  return list;
}

const Operation& operation(const std::string& name) {
  for (const Operation& entry : all_operations()) {
    if (entry.name == name) return entry;
  }
  throw std::runtime_error("no operation " + name);
}

class Contents : public ::testing::TestWithParam<Target> {
 protected:
  Call make(const char* name, std::uint64_t seed, Optionals optionals = Optionals::kAll) const {
    return operation(name).make(GetParam(), seed, optionals);
  }
};

INSTANTIATE_TEST_SUITE_P(Backends, Contents, ::testing::ValuesIn(host_targets()),
                         [](const auto& test) { return test.param.backend; });

// Runs a call whose inputs were overwritten. "" when it finished, else the argument; the memory is
// looked at in both cases, then everything is as before.
std::string run_within_bounds(Call& call) {
  for (const Operand& operand : call.operands) {
    if (!operand.written()) operand.memory->remember();
  }
  const Outcome outcome = call.run();
  EXPECT_EQ(call.violation(), "") << call.operation;
  if (outcome.refused) {
    EXPECT_EQ(outcome.message.rfind(call.operation.substr(0, call.operation.find('/')), 0), 0u)
        << outcome.message;
  }
  call.restore_memory(/*scratch_too=*/false);
  return outcome.argument;
}

void write_bytes(const Operand& operand, const std::vector<std::byte>& bytes) {
  operand.memory->fill_ids([&] {
    std::vector<std::int64_t> values;
    for (const std::byte byte : bytes) values.push_back(static_cast<std::int64_t>(byte));
    return values;
  }());
}

// ---------------------------------------------------------------------------------------- metadata

class Metadata : public Contents {
 protected:
  static constexpr const char* kBackwards[] = {"moe_backward_topk", "moe_backward_sorted",
                                               "moe_backward_pairs", "moe_layer_backward_topk",
                                               "moe_layer_backward_rounding"};
};

INSTANTIATE_TEST_SUITE_P(Backends, Metadata, ::testing::ValuesIn(host_targets()),
                         [](const auto& test) { return test.param.backend; });

TEST_P(Metadata, OfOneByte) {
  for (const char* name : kBackwards) {
    Call call = make(name, 21);
    const Operand& metadata = *call.find("metadata");
    const auto size = static_cast<std::size_t>(metadata.memory->numel());
    for (const int byte : {0x00, 0x01, 0x7f, 0x80, 0xff}) {
      write_bytes(metadata, std::vector<std::byte>(size, static_cast<std::byte>(byte)));
      const std::string argument = run_within_bounds(call);
      // Zeros may say that there are no rows.
      EXPECT_TRUE(argument == "metadata" || (byte == 0 && argument.empty())) << name << ' ' << byte;
    }
  }
}

TEST_P(Metadata, OfRandomBytesAndRandomIndices) {
  Random random(22);
  for (const char* name : kBackwards) {
    Call call = make(name, 23);
    const Operand& metadata = *call.find("metadata");
    const auto size = static_cast<std::size_t>(metadata.memory->numel());
    for (int i = 0; i < 100; ++i) {
      std::vector<std::byte> bytes(size);
      const std::int64_t most = random.pick<std::int64_t>({3, 12, 40, 1 << 20});
      for (std::size_t k = 0; k + 3 < size; k += 4) {
        const auto index = static_cast<std::int32_t>(random.integer(-1, most));
        std::memcpy(bytes.data() + k, &index, sizeof index);
      }
      write_bytes(metadata, bytes);
      const std::string argument = run_within_bounds(call);
      EXPECT_TRUE(argument == "metadata" || argument.empty()) << name << ": " << argument;
    }
  }
}

// One index changed: the CPU backend sees it, the reference one stays within bounds.
TEST_P(Metadata, WithOneIndexChanged) {
  Random random(24);
  for (const char* name : kBackwards) {
    Call call = make(name, 25);
    const Operand& metadata = *call.find("metadata");
    const std::vector<double> valid = metadata.memory->values();
    for (int i = 0; i < 200; ++i) {
      std::vector<std::byte> bytes;
      for (const double value : valid) bytes.push_back(static_cast<std::byte>(value));
      const auto place = 4 * random.integer(0, static_cast<std::int64_t>(valid.size() / 4) - 1);
      const auto index = static_cast<std::int32_t>(random.integer(-2, 30));
      std::memcpy(bytes.data() + place, &index, sizeof index);
      write_bytes(metadata, bytes);
      const std::string argument = run_within_bounds(call);
      EXPECT_TRUE(argument == "metadata" || argument.empty()) << name << ": " << argument;
    }
  }
}

// A call of the same shape but other routing.
TEST_P(Metadata, OfAnotherCall) {
  for (const char* name : {"moe_backward_topk", "moe_backward_sorted"}) {
    Call call = make(name, 26);
    const Operand& metadata = *call.find("metadata");
    const Workbench ours(GetParam(), 26, Optionals::kAll);
    int tried = 0;
    for (std::uint64_t seed = 100; tried < 5; ++seed) {
      const Workbench sizes(GetParam(), seed, Optionals::kAll);
      if (sizes.T != ours.T || sizes.E != ours.E || sizes.K != ours.K) continue;
      const Call other = make(name, seed);
      const Tensor& theirs = *other.find("metadata")->memory;
      ASSERT_EQ(theirs.numel(), metadata.memory->numel());
      std::vector<std::byte> bytes;
      for (const double value : theirs.values()) bytes.push_back(static_cast<std::byte>(value));
      write_bytes(metadata, bytes);
      const std::string argument = run_within_bounds(call);
      EXPECT_TRUE(argument == "metadata" || argument.empty()) << name << ": " << argument;
      ++tried;
    }
  }
}

// ------------------------------------------------------------------------------------ expert ids

TEST_P(Contents, IdsThatBackwardCannotUse) {
  struct Case {
    const char* operation;
    const char* argument;
  };
  for (const Case c :
       {Case{"route_backward", "topk_ids"}, Case{"round_tokens_backward", "topk_ids"},
        Case{"round_select", "topk_ids"}, Case{"moe_layer_backward_topk", "topk_ids"},
        Case{"moe_layer_backward_rounding", "topk_ids"}}) {
    Call call = make(c.operation, 31);
    Tensor& ids = *call.find(c.argument)->memory;
    const std::vector<double> valid = ids.values();
    const std::int64_t experts = 7;  // no call has as many
    for (const std::int64_t wrong :
         {std::int64_t{-1}, experts, std::int64_t{0x7fffffff}, std::int64_t{-0x7fffffff - 1}}) {
      for (const std::size_t place : {std::size_t{0}, valid.size() - 1}) {
        std::vector<std::int64_t> spoiled(valid.begin(), valid.end());
        spoiled[place] = wrong;
        ids.fill_ids(spoiled);
        EXPECT_EQ(run_within_bounds(call), c.argument) << c.operation << ": " << wrong;
      }
    }
    std::vector<std::int64_t> twice(valid.begin(), valid.end());
    twice[1] = twice[0];
    ids.fill_ids(twice);
    EXPECT_EQ(run_within_bounds(call), c.argument) << c.operation << ": an expert twice";
    ids.fill_ids({valid.begin(), valid.end()});
    EXPECT_EQ(run_within_bounds(call), "") << c.operation;
  }
}

TEST_P(Contents, ARefusalAddsNothingToAccumulatedGradients) {
  for (const char* name : {"moe_layer_backward_topk", "moe_layer_backward_rounding"}) {
    Call call = make(name, 32);
    Tensor& ids = *call.find("topk_ids")->memory;
    std::vector<double> spoiled = ids.values();
    spoiled[0] = -5;
    ids.fill_ids({spoiled.begin(), spoiled.end()});
    ASSERT_TRUE(call.run().refused);
    int gradients = 0;
    for (const Operand& operand : call.operands) {
      if (operand.name.rfind("grad_", 0) != 0 || !operand.written()) continue;
      ++gradients;
      EXPECT_EQ(operand.memory->violation_as_input(), "") << name << ": " << operand.name;
    }
    EXPECT_GT(gradients, 3);
  }
}

TEST_P(Contents, PairsOutsideTheListsAreUnusedPlaces) {
  for (const char* name : {"round_tokens_backward", "moe_forward_pairs"}) {
    Call call = make(name, 33);
    for (const char* argument : {"token_ids", "expert_ids"}) {
      Tensor& ids = *call.find(argument)->memory;
      const std::vector<double> valid = ids.values();
      for (const std::int64_t outside : {-1, 1000, 0x7fffffff}) {
        std::vector<std::int64_t> spoiled(valid.begin(), valid.end());
        spoiled.front() = spoiled.back() = outside;
        ids.fill_ids(spoiled);
        EXPECT_EQ(run_within_bounds(call), "") << name << ": " << argument;
      }
      ids.fill_ids({valid.begin(), valid.end()});
    }
  }
}

TEST_P(Contents, OffsetsThatDecreaseOrPassTheRows) {
  Call call = make("moe_forward_sorted", 34);
  Tensor& offsets = *call.find("offsets")->memory;
  const std::vector<double> valid = offsets.values();
  const auto experts = valid.size();
  const auto spoil = [&](std::size_t place, std::int64_t value) {
    std::vector<std::int64_t> spoiled(valid.begin(), valid.end());
    spoiled[place] = value;
    offsets.fill_ids(spoiled);
    return run_within_bounds(call);
  };
  const auto rows = static_cast<std::int64_t>(call.find("x")->memory->view().size(0));
  EXPECT_EQ(spoil(0, -1), "offsets");
  EXPECT_EQ(spoil(0, rows + 1), "offsets");
  EXPECT_EQ(spoil(experts - 1, rows + 1), "offsets");
  EXPECT_EQ(spoil(experts - 1, -7), "offsets");
  EXPECT_EQ(spoil(experts / 2, std::numeric_limits<std::int32_t>::min()), "offsets");
  EXPECT_EQ(spoil(experts / 2, std::numeric_limits<std::int32_t>::max()), "offsets");
  EXPECT_EQ(spoil(experts - 1, rows), "");
}

// ------------------------------------------------------------------------------------- no numbers

TEST_P(Contents, LogitsThatAreNoNumbers) {
  for (const char* name : {"route_forward", "round_tokens_forward"}) {
    for (const Optionals optionals : {Optionals::kAll, Optionals::kNone}) {
      Call call = make(name, 41, optionals);  // kAll: sigmoid
      Tensor& logits = *call.find("logits")->memory;
      const std::vector<double> valid = logits.values();
      for (const double value : {kNaN, kInfinity, -kInfinity, 3e38f, -3e38f}) {
        for (const std::size_t place : {std::size_t{0}, valid.size() - 1}) {
          std::vector<double> spoiled = valid;
          spoiled[place] = value;
          logits.fill(spoiled);
          const std::string argument = run_within_bounds(call);
          if (std::isnan(value)) {
            EXPECT_EQ(argument, "logits") << name;
          } else {
            EXPECT_TRUE(argument.empty() || (std::isinf(value) && argument == "logits")) << name;
          }
        }
      }
      logits.fill(std::vector<double>(valid.size(), -kInfinity));
      const std::string argument = run_within_bounds(call);
      EXPECT_TRUE(argument.empty() || argument == "logits") << name;
    }
  }
}

TEST_P(Contents, SelectionBiasThatIsNoNumber) {
  for (const char* name : {"route_forward", "round_tokens_forward", "moe_layer_forward_topk"}) {
    Call call = make(name, 42);
    Tensor& bias = *call.find("selection_bias")->memory;
    const std::vector<double> valid = bias.values();
    for (const double value : {kNaN, kInfinity, -kInfinity, 3e38f, -3e38f}) {
      std::vector<double> spoiled = valid;
      spoiled.back() = value;
      bias.fill(spoiled);
      const bool refused = std::isnan(value) || value == kInfinity;
      EXPECT_EQ(run_within_bounds(call), refused ? "selection_bias" : "") << name << ' ' << value;
    }
    bias.fill(std::vector<double>(valid.size(), -kInfinity));
    EXPECT_EQ(run_within_bounds(call), "") << name;
  }
}

// Every float input of every operation: nothing depends on their values but results and, for what
// the router ranks by, an Error.
TEST_P(Contents, NoNumbersAnywhere) {
  for (const Operation& entry : all_operations()) {
    Call call = entry.make(GetParam(), 43, Optionals::kAll);
    for (const Operand& operand : call.operands) {
      const DType dtype = operand.memory->dtype();
      if (operand.written() || (dtype != DType::kFloat32 && dtype != DType::kBFloat16)) continue;
      const std::vector<double> valid = operand.memory->values();
      for (const double value : {kNaN, kInfinity, -kInfinity, 3e38f}) {
        operand.memory->fill(std::vector<double>(valid.size(), value));
        const std::string argument = run_within_bounds(call);
        EXPECT_TRUE(argument.empty() || argument == "logits" || argument == operand.name)
            << call.operation << ": " << operand.name << " = " << value << ": " << argument;
      }
      operand.memory->fill(valid);
      operand.memory->remember();
    }
    EXPECT_EQ(run_within_bounds(call), "") << call.operation;
  }
}

TEST_P(Contents, AnySeedAndAnyCounts) {
  Call rounding = make("round_tokens_forward", 44);
  for (const std::int64_t seed : {std::int64_t{-1}, std::numeric_limits<std::int64_t>::min(),
                                  std::numeric_limits<std::int64_t>::max()}) {
    rounding.find("seed_tensor")->memory->fill_ids({seed});
    EXPECT_EQ(run_within_bounds(rounding), "");
  }
  for (const char* name :
       {"load_balancing_loss_forward", "load_balancing_loss_backward", "update_expert_bias"}) {
    Call call = make(name, 45);
    Tensor& rows = *call.find("rows_per_expert")->memory;
    for (const std::int64_t count : {-1, 0x7fffffff, -0x7fffffff - 1}) {
      rows.fill_ids(std::vector<std::int64_t>(static_cast<std::size_t>(rows.numel()), count));
      EXPECT_EQ(run_within_bounds(call), "") << name;
    }
  }
}

}  // namespace
}  // namespace sonicmoe::rig
