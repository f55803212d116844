#include "router/host_router.hpp"

namespace sonicmoe {

void HostRouterBackend::add_logits_gradient(const Context&, TensorView grad_logits,
                                            ConstTensorView addend) const {
  auto* sum = grad_logits.as<float>();
  const auto* in = addend.as<float>();
  for (std::int64_t i = 0; i < grad_logits.numel(); ++i) sum[i] += in[i];
}

}  // namespace sonicmoe
