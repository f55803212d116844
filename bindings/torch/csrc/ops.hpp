// The groups of operators. Each group states its schemas beside the functions that serve them.
#pragma once

#include <torch/csrc/stable/library.h>

namespace sonicmoe_torch {

using Library = torch::stable::detail::StableLibrary;

void define_moe_ops(Library& library);
void define_router_ops(Library& library);
void define_moe_layer_ops(Library& library);
void define_exchange_ops(Library& library);

// The same functions serve every device: the library chooses the backend from the tensors' device.
void implement_moe_ops(Library& library);
void implement_router_ops(Library& library);
void implement_moe_layer_ops(Library& library);
void implement_exchange_ops(Library& library);
/// Those without tensors.
void implement_exchange_ops_of_any_device(Library& library);

}  // namespace sonicmoe_torch
