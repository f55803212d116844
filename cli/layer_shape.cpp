#include "cli/layer_shape.hpp"

namespace sonicmoe::cli {

std::string LayerShape::to_string() const {
  std::string text;
  for (const std::int64_t size : {num_tokens, hidden_size, intermediate_size, num_experts, top_k}) {
    text += (text.empty() ? "" : ",") + std::to_string(size);
  }
  return text;
}

MoEShape LayerShape::moe_shape(DType dtype, Activation activation) const {
  MoEShape shape;
  shape.num_tokens = num_tokens;
  shape.hidden_size = hidden_size;
  shape.intermediate_size = intermediate_size;
  shape.num_experts = num_experts;
  shape.num_pairs = num_tokens * top_k;
  shape.activation = activation;
  shape.dtype = dtype;
  return shape;
}

bool LayerShape::has_countable_bytes(Activation activation) const {
  const double T = static_cast<double>(num_tokens), d = static_cast<double>(hidden_size);
  const double n = static_cast<double>(intermediate_size), E = static_cast<double>(num_experts);
  const double K = static_cast<double>(top_k), g = gate_factor(activation);
  const double parameters = E * d * ((g + 1) * n + 1);        // with the router's
  const double rows = T * K * (2 * (g + 1) * n + 2 * d + 8);  // H, A, dH, A', Y, dX~, indices
  const double tokens = T * (4 * d + E);                      // X, O, dO, dX, logits
  constexpr double kBytesPerElement = 16;                     // weight, gradient, states
  return kBytesPerElement * (parameters + rows + tokens) < 0x1p62;
}

}  // namespace sonicmoe::cli
