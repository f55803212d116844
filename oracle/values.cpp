#include "oracle/values.hpp"

#include <string>

#include "sonicmoe/error.hpp"

namespace sonicmoe::oracle {
namespace {

double read_element(const ConstTensorView& view, std::int64_t offset) {
  switch (view.dtype()) {
    case DType::kFloat32:
      return view.as<float>()[offset];
    case DType::kBFloat16:
      return static_cast<float>(view.as<bfloat16>()[offset]);
    case DType::kInt32:
      return view.as<std::int32_t>()[offset];
    case DType::kInt64:
      return static_cast<double>(view.as<std::int64_t>()[offset]);
    case DType::kUInt8:
      return view.as<std::uint8_t>()[offset];
    case DType::kFloat16:
    case DType::kFloat64:
    case DType::kInt8:
    case DType::kInt16:
    case DType::kBool:
      break;
  }
  throw Error("oracle", "dtype", "one that operations take", std::string(name_of(view.dtype())));
}

// Element `index`, counted row-major, as an offset in elements.
std::int64_t offset_of(const ConstTensorView& view, std::int64_t index) {
  std::int64_t offset = 0;
  for (int dim = view.rank() - 1; dim >= 0; --dim) {
    offset += index % view.size(dim) * view.stride(dim);
    index /= view.size(dim);
  }
  return offset;
}

}  // namespace

Values to_double(const ConstTensorView& view) {
  Values values(at(view.numel()));
  for (std::int64_t i = 0; i < view.numel(); ++i) {
    values[at(i)] = read_element(view, offset_of(view, i));
  }
  return values;
}

Ids to_ids(const ConstTensorView& view) {
  Ids ids(at(view.numel()));
  for (std::int64_t i = 0; i < view.numel(); ++i) {
    const std::int64_t offset = offset_of(view, i);
    ids[at(i)] = view.dtype() == DType::kInt32 ? std::int64_t{view.as<std::int32_t>()[offset]}
                                               : view.as<std::int64_t>()[offset];
  }
  return ids;
}

double rounded_to(DType dtype, double value) {
  const float single = static_cast<float>(value);
  return dtype == DType::kBFloat16 ? static_cast<float>(bfloat16(single)) : single;
}

}  // namespace sonicmoe::oracle
