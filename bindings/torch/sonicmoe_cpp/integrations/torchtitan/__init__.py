"""torchtitan 0.3: its routed experts by this library.

    --override.imports sonicmoe_cpp.integrations.torchtitan.routed_experts

Router, shared experts, checkpoints and their names stay torchtitan's.

    experts     the modules in place of torchtitan's
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torchtitan.config import derive, override
from torchtitan.models.common.moe import GroupedExperts, RoutedExperts

from ..._checks import refuse
from .experts import FusedExperts, SonicRoutedExperts

__all__ = ["FusedExperts", "SonicRoutedExperts", "routed_experts"]


@override(target=RoutedExperts.Config, description="Routed experts by sonicmoe_cpp.")
def routed_experts(
    config: RoutedExperts.Config,
    *,
    row_capacity: float | None = None,
    keep_received: bool | None = None,
) -> SonicRoutedExperts.Config:
    """The configuration of `SonicRoutedExperts` in place of config. Options, of expert parallelism
    alone, as in `sonicmoe_cpp.distributed.moe`.

    Errors: RuntimeError for experts that are not those of GroupedExperts (gpt-oss, low precision).
    """
    inner = config.inner_experts
    if type(inner) is not GroupedExperts.Config:
        got = type(inner).__qualname__
        refuse("torchtitan", "inner_experts", "GroupedExperts.Config (SwiGLU in bfloat16)", got)
    fused = derive(inner, FusedExperts.Config, param_init=_fused_init(inner.param_init))
    if inner.sharding_config is not None:
        fused.sharding_config = _fused_sharding(inner.sharding_config)
    return derive(
        config, SonicRoutedExperts.Config, inner_experts=fused, row_capacity=row_capacity,
        keep_received=keep_received,
    )  # fmt: skip


def _fused_init(init: dict[str, Callable] | None) -> dict[str, Callable] | None:
    """Each half of w13 as its own weight."""
    if init is None:
        return None
    kept = dict(init)
    gate, up = kept.pop("w1_EFD"), kept.pop("w3_EFD")

    def both(w13: Tensor) -> None:
        gate(w13[:, :, 0])
        up(w13[:, :, 1])

    return kept | {"w13": both}


def _fused_sharding(sharding: Any) -> Any:
    """w13 [E, F, 2, D] as w1 [E, F, D]: in the same dimensions."""
    kept = dict(sharding.state_shardings)
    layout = kept.pop("w1_EFD", None)
    kept.pop("w3_EFD", None)
    if layout is not None:
        kept["w13"] = layout
    return dataclasses.replace(sharding, state_shardings=kept)
