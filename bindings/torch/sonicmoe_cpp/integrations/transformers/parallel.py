"""What parallelize_experts spreads of a model of transformers."""

import copy
from typing import Any

from torch import nn

from ...distributed.parallel import Target, check_whole
from ...module import seed_of_rank
from .activations import expert_options
from .blocks import SonicMoEBlock
from .experts import BACKEND, check_parameters, expert_weights, register
from .families import innermost
from .plain import has_own_forward


def target(module: nn.Module) -> Target | None:
    """Of a replaced block or an experts module; None for any other. ValueError, and the module left
    as it was, where its experts cannot be spread."""
    if isinstance(module, SonicMoEBlock):
        family = module._family
        experts = innermost(module.experts, family.experts)
        router = innermost(getattr(module, family.router_name), family.router)
        top_k = None if module.router_kind == "token_rounding" else router.top_k
    elif _has_interface(module):
        experts, top_k = module, None
    else:
        return None
    check_whole(experts)
    path = f"parallelize_experts: {type(experts).__name__}"
    if has_own_forward(experts, type(experts).forward):
        raise ValueError(
            f"{path}.forward: expected that of the class, got another function set on the instance "
            "(expert parallelism of transformers, offloading)"
        )
    expert_options(experts, path)
    check_parameters(experts, path)
    w1 = expert_weights(experts)["w1"]

    def finish(rank: int) -> None:
        register()
        experts.config = copy.copy(experts.config)  # the model's goes on saying what it said
        experts.config._experts_implementation = BACKEND
        if isinstance(module, SonicMoEBlock):
            module.seed = seed_of_rank(module.seed, rank) % 2**62

    return Target(experts, w1.shape[2], w1.shape[0], top_k, finish)


def _has_interface(module: Any) -> bool:
    """Whether transformers chooses who computes the experts, by their configuration."""
    marks = {"config", "has_gate", "has_bias", "is_transposed", "is_concatenated"}
    return marks <= vars(module).keys() and hasattr(type(module).forward, "__wrapped__")
