// Forward and backward of the experts on the CPU.
#pragma once

#include <optional>

#include "core/backend.hpp"

namespace sonicmoe::cpu {

WorkspacePlan forward_plan(int threads, const MoEShape& shape, bool inference,
                           std::optional<std::size_t> limit);
void forward(int threads, const MoEShape& shape, const MoEForwardArgs& args);

WorkspacePlan backward_plan(int threads, const MoEShape& shape, std::optional<std::size_t> limit);
void backward(int threads, const MoEShape& shape, const MoEBackwardArgs& args,
              const RouterShare* router);

}  // namespace sonicmoe::cpu
