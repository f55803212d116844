// How the numbers of one call are stored and multiplied.
#pragma once

#include <cstdint>
#include <string>

#include "sonicmoe/dtype.hpp"
#include "sonicmoe/export.hpp"

namespace sonicmoe {

/// Factors that stand beside the operands of a product.
enum class Scaling : std::uint8_t {
  kNone,  ///< "none"  operands are multiplied as they are
};

/// The formats of a call. Products accumulate in float32 and round once into `storage`.
///
/// Today's cases are Numerics::of(kBFloat16) and, on the CPU, Numerics::of(kFloat32); every other
/// one is refused by name. (A CPU without bfloat16 instructions multiplies such operands in
/// float32, which changes no value.)
struct Numerics {
  DType storage = DType::kFloat32;  ///< of x, out, the parameters, H and all that is kept or passed
  DType operand = DType::kFloat32;  ///< of what the matrix products of the experts multiply
  Scaling scaling = Scaling::kNone;

  /// Stored and multiplied in one format, without factors.
  static constexpr Numerics of(DType dtype) noexcept { return {dtype, dtype, Scaling::kNone}; }
  friend bool operator==(const Numerics&, const Numerics&) = default;
};

/// "bfloat16", or "bfloat16 storage, float32 operands" where the two differ; "?" in the place of a
/// value that is no enumerator.
SONICMOE_API std::string to_string(const Numerics& numerics);

}  // namespace sonicmoe
