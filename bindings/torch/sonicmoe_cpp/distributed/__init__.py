"""For models spread over several processes (docs/guide/distributed.md).

parallel    experts of a module over the ranks of a mesh
exchange    the same as functions
context     what the ranks agree on
clip        clipping of gradients that lie on several meshes
"""

from .clip import clip_grad_norm_
from .context import Context
from .exchange import moe, moe_pairs
from .parallel import ExpertParallel, parallelize_experts

__all__ = [
    "Context",
    "ExpertParallel",
    "clip_grad_norm_",
    "moe",
    "moe_pairs",
    "parallelize_experts",
]
