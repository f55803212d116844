// Registers torch.ops.sonicmoe_cpp.* through LibTorch's stable ABI: one binary serves every torch
// from 2.10 on. Fake implementations and autograd formulas are registered from Python.
#include "ops.hpp"
#include "options.hpp"

namespace sonicmoe_torch {
namespace {

void define_all(Library& library) {
  library.def("version() -> str");
  library.def("enum_names(int kind) -> str");
  library.def("backend_list() -> str");
  library.def("set_shared_device(bool shared) -> ()");
  library.def("is_shared_device() -> bool");
  define_moe_ops(library);
  define_router_ops(library);
  define_moe_layer_ops(library);
  define_exchange_ops(library);
}

void implement_all(Library& library) {
  implement_moe_ops(library);
  implement_router_ops(library);
  implement_moe_layer_ops(library);
  implement_exchange_ops(library);
}

}  // namespace
}  // namespace sonicmoe_torch

STABLE_TORCH_LIBRARY(sonicmoe_cpp, library) { sonicmoe_torch::define_all(library); }

STABLE_TORCH_LIBRARY_IMPL(sonicmoe_cpp, CPU, library) { sonicmoe_torch::implement_all(library); }

STABLE_TORCH_LIBRARY_IMPL(sonicmoe_cpp, CUDA, library) { sonicmoe_torch::implement_all(library); }

STABLE_TORCH_LIBRARY_IMPL(sonicmoe_cpp, CompositeExplicitAutograd, library) {
  library.impl("version", TORCH_BOX(&sonicmoe_torch::version));
  library.impl("enum_names", TORCH_BOX(&sonicmoe_torch::enum_names));
  library.impl("backend_list", TORCH_BOX(&sonicmoe_torch::backend_list));
  library.impl("set_shared_device", TORCH_BOX(&sonicmoe_torch::set_shared_device));
  library.impl("is_shared_device", TORCH_BOX(&sonicmoe_torch::is_shared_device));
  sonicmoe_torch::implement_exchange_ops_of_any_device(library);
}
