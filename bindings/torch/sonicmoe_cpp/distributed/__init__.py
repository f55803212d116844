"""For models spread over several processes (docs/guide/distributed.md).

clip    clipping of gradients that lie on several meshes
"""

from .clip import clip_grad_norm_

__all__ = ["clip_grad_norm_"]
