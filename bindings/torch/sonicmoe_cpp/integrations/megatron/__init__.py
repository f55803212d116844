"""Megatron-Core 0.16: the experts of its MoE layers by this library.

    spec = get_gpt_layer_local_spec(num_experts=64, moe_grouped_gemm=False, ...)
    replace_experts(spec)

Router, token dispatchers (all-gather, all-to-all, DeepEP) and shared experts stay Megatron's.

    experts       the module in place of SequentialMLP, GroupedMLP, TEGroupedMLP
    checkpoint    its parameters under the names of SequentialMLP
"""

import dataclasses
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec

from .experts import SonicExperts

__all__ = ["SonicExperts", "replace_experts"]


def replace_experts(spec: Any) -> int:
    """Makes SonicExperts the experts of every MoE layer in a spec, in place; returns how many.

    spec: of a layer, a block of layers or submodules of either. ValueError, and the spec left as it
    was, where there is no MoE layer in it.
    """
    found = list({id(each): each for each in _moe_submodules(spec)}.values())
    if not found:
        raise ValueError(
            "replace_experts: spec: expected one with MoESubmodules in it (num_experts), got "
            f"{type(spec).__name__} without"
        )
    for submodules in found:
        submodules.experts = ModuleSpec(module=SonicExperts)
    return len(found)


def _moe_submodules(spec: Any) -> list[MoESubmodules]:
    if isinstance(spec, MoESubmodules):
        return [spec]
    if isinstance(spec, (list, tuple)):
        parts = list(spec)
    elif dataclasses.is_dataclass(spec) and not isinstance(spec, type):
        parts = [getattr(spec, field.name) for field in dataclasses.fields(spec)]
    else:
        parts = []
    return [each for part in parts for each in _moe_submodules(part)]
