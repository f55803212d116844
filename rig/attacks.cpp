#include "rig/attacks.hpp"

#include <set>

namespace sonicmoe::rig {
namespace {

using Kind = Attack::Kind;

constexpr DType kAllDTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kInt32,   DType::kInt64,
                                DType::kUInt8,   DType::kFloat16,  DType::kFloat64, DType::kInt8,
                                DType::kInt16,   DType::kBool};
constexpr std::int64_t kHugeExtents[] = {std::int64_t{1} << 31, std::int64_t{1} << 40,
                                         std::int64_t{1} << 58};

}  // namespace

std::vector<Device> other_devices(const Target& target) {
  if (target.device.type == DeviceType::kCpu) return {{DeviceType::kCuda, 0}};
  return {{DeviceType::kCuda, 1}, {DeviceType::kCpu, 0}};
}

std::vector<Attack> attacks_on(const Call& call) {
  std::vector<Attack> list;
  for (std::size_t i = 0; i < call.settings.size(); ++i) list.push_back({Kind::kOption, i});
  for (std::size_t i = 0; i < call.operands.size(); ++i) {
    const Operand& operand = call.operands[i];
    if (operand.memory->numel() == 0) continue;  // scratch of a step that needs none
    const std::vector<std::int64_t> shape = operand.shape();
    const auto rank = static_cast<int>(shape.size());
    const auto add = [&](Kind kind, int detail = 0, std::int64_t amount = 0, std::size_t j = 0) {
      list.push_back({kind, i, detail, amount, j});
    };
    for (std::size_t k = 0; k < other_devices(*call.target).size(); ++k) {
      add(Kind::kDevice, static_cast<int>(k));
    }
    add(Kind::kAbsent);
    for (const DType dtype : kAllDTypes) {
      if (dtype != operand.memory->dtype()) add(Kind::kDType, static_cast<int>(dtype));
    }
    if (rank < kMaxRank) add(Kind::kRank, 1);
    if (rank > 1) add(Kind::kRank, -1);
    for (int dim = 0; dim < rank; ++dim) {
      const std::int64_t extent = shape[static_cast<std::size_t>(dim)];
      for (const std::int64_t wrong : std::set<std::int64_t>{extent + 1, extent - 1, 0}) {
        add(Kind::kExtent, dim, wrong);
      }
      for (const std::int64_t wrong : kHugeExtents) add(Kind::kHuge, dim, wrong);
      if (extent > 1) add(Kind::kRepeated, dim);
    }
    if (rank > 1 && shape[shape.size() - 1] != shape[shape.size() - 2]) add(Kind::kSwapped);
    add(Kind::kShifted, 0, 1);
    add(Kind::kShifted, 0,
        operand.is_buffer() ? 8 : static_cast<std::int64_t>(size_of(operand.memory->dtype())));
    if (shape.back() > 1) add(Kind::kInnerStride);
    if (rank > 1) add(Kind::kRowGaps);
    for (std::size_t j = 0; j < call.operands.size(); ++j) {
      const Operand& other = call.operands[j];
      if (j == i || other.memory->numel() == 0) continue;
      if (operand.written() || other.written()) add(Kind::kOverlap, 0, 0, j);
    }
  }
  return list;
}

std::string describe(const Call& call, const Attack& attack) {
  if (attack.kind == Kind::kOption) {
    const Setting& setting = call.settings[attack.index];
    return setting.option + " = " + setting.value;
  }
  const Operand& operand = call.operands[attack.index];
  const auto dimension = " in dimension " + std::to_string(attack.detail);
  const auto text = [&]() -> std::string {
    switch (attack.kind) {
      case Kind::kOption:
        return "";
      case Kind::kDevice:
        return "on " +
               to_string(other_devices(*call.target)[static_cast<std::size_t>(attack.detail)]);
      case Kind::kAbsent:
        return "absent";
      case Kind::kDType:
        return "dtype " + std::string(name_of(static_cast<DType>(attack.detail)));
      case Kind::kRank:
        return attack.detail > 0 ? "one dimension more" : "one dimension less";
      case Kind::kExtent:
        return std::to_string(attack.amount) + " elements" + dimension;
      case Kind::kHuge:
        return std::to_string(attack.amount) + " elements of stride 0" + dimension;
      case Kind::kSwapped:
        return "last two dimensions swapped";
      case Kind::kShifted:
        return "shifted by " + std::to_string(attack.amount) + " bytes";
      case Kind::kInnerStride:
        return "inner stride 2";
      case Kind::kRowGaps:
        return "gaps between rows";
      case Kind::kRepeated:
        return "stride 0" + dimension;
      case Kind::kOverlap:
        return "laid over " + call.operands[attack.other].name;
    }
    return "?";
  };
  return operand.name + " " + operand.memory->view().describe() + ": " + text();
}

}  // namespace sonicmoe::rig
