// Forward and backward of the expert layer on CUDA: which kernels run, on which buffers.
#pragma once

#include <optional>

#include "core/backend.hpp"

namespace sonicmoe::cuda {

WorkspacePlan forward_plan(const MoEShape& shape, bool inference, std::optional<std::size_t> limit);
WorkspacePlan backward_plan(const MoEShape& shape, std::optional<std::size_t> limit);

/// Throws for what the Hopper kernels decline (dtype, widths, strides, alignment), by argument.
void check_forward(const Check& check, const MoEShape& shape, const MoEForwardArgs& args);
void check_backward(const Check& check, const MoEShape& shape, const MoEBackwardArgs& args);

void forward(const Context& context, const MoEShape& shape, const MoEForwardArgs& args);
void backward(const Context& context, const MoEShape& shape, const MoEBackwardArgs& args,
              RouterShare* router);

}  // namespace sonicmoe::cuda
