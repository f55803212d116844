"""Mixture-of-Experts layers that train fast in little memory: SonicMoE for PyTorch.

See docs/guide/python.md. Importing this package needs torch alone; the Hugging Face integration
(`sonicmoe_cpp.integrations.transformers`) is imported on request.
"""

import importlib

from . import distributed
from ._after_import import after_import
from ._library import Backend, __version__, backends
from ._shared_device import set_shared_device
from .functional import (
    load_balancing_loss,
    moe,
    moe_layer,
    moe_pairs,
    moe_sorted,
    round_tokens,
    route,
    router_z_loss,
    update_expert_bias_,
)
from .module import MoE

__all__ = [
    "Backend",
    "MoE",
    "__version__",
    "backends",
    "distributed",
    "load_balancing_loss",
    "moe",
    "moe_layer",
    "moe_pairs",
    "moe_sorted",
    "round_tokens",
    "route",
    "router_z_loss",
    "set_shared_device",
    "update_expert_bias_",
]

# torch's module takes milliseconds to import, which only those pay who count FLOPs.
after_import("torch.utils.flop_counter", lambda: importlib.import_module("._flops", __name__))
