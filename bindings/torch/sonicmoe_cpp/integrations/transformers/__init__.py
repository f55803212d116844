"""Hugging Face transformers, 5.7 or later.

`register()` makes `experts_implementation="sonicmoe_cpp"` available: the experts of any model run
here, its own router stays. `replace_moe_blocks(model)` swaps whole sparse MoE blocks of Qwen3-MoE,
OLMoE, Mixtral, gpt-oss and DeepSeek-V3, router included, with token rounding if asked. Parameters
and their names stay the model's own, so checkpoints load in stock transformers.

    activations   which of the library's activations an experts module computes
    experts       the experts backend
    expert_parallel, parallel    the same with experts over several processes
    plain         whether a module may be read instead of called: hooks, wrappers, offloading
    families      the blocks that can be replaced
    blocks        the replaced block
    standalone    a block as a layer without transformers
"""

import transformers
from packaging.version import parse

if parse(transformers.__version__).release < (5, 7):
    raise ImportError(
        "sonicmoe_cpp.integrations.transformers: transformers: expected version 5.7 or later, "
        f"got {transformers.__version__}"
    )

from .blocks import SonicMoEBlock, replace_moe_blocks
from .experts import experts_forward, register, register_expert_parallel
from .plain import observer
from .standalone import to_moe

__all__ = [
    "SonicMoEBlock",
    "experts_forward",
    "observer",
    "register",
    "register_expert_parallel",
    "replace_moe_blocks",
    "to_moe",
]
