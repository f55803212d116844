"""For models spread over several processes (docs/guide/distributed.md).

parallel    experts of a module over the ranks of a mesh
exchange    the same as functions
rounding    token rounding of all ranks together
context     what the ranks agree on
clip        clipping of gradients that lie on several meshes
pretrained  folders of transformers, written and read by all ranks
units       the tensors of a spread model, gathered and put back layer by layer
stock       the same as transformers and its files have them
"""

from .clip import clip_grad_norm_
from .context import Context
from .exchange import moe, moe_pairs
from .parallel import ExpertParallel, parallelize_experts
from .pretrained import load_pretrained, save_pretrained

__all__ = [
    "Context",
    "ExpertParallel",
    "clip_grad_norm_",
    "load_pretrained",
    "moe",
    "moe_pairs",
    "parallelize_experts",
    "save_pretrained",
]
